"""A simulated worker: claims, feeds its engine, flushes and reports, by the agent's rules."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from typing import Final

import numpy as np

from qlm_batch.domain.jobs import EngineKind, ResultRow, Usage
from qlm_batch.domain.ledger import Directive, Held, ReleaseReason
from qlm_batch.domain.records import Heartbeat
from qlm_batch.domain.snapshot import (
    Call,
    InstanceState,
    ModelView,
    Observation,
    Output,
    Residency,
)
from qlm_batch.domain.store import Store
from qlm_batch.scheduling import agent, eviction
from qlm_batch.scheduling.swapping import Change, Hosted, Parting, next_change, stay_s
from qlm_batch.simulation.engine import EngineLimits
from qlm_batch.simulation.events import EventQueue
from qlm_batch.simulation.fast_engine import FastEngine
from qlm_batch.simulation.fleet import InstanceSpec
from qlm_batch.simulation.records import (
    Columns,
    Lease,
    Span,
    Tallies,
    WorkerTimes,
    call_of,
    expiry,
)
from qlm_batch.simulation.workload import Requests

MOST_GENERATED: Final = 128
FAVOUR: Final = "throughput"
"""What simulated engines favour: their fleets serve far more batch work than calls."""
_MAX_MODEL_LEN: Final = 32_768
FORGETS: Final = 0.05
"""Weight of the newest request in the typical output."""


class SimulatedInstance:
    """One worker on the virtual clock. `key_of` is the first request key of a batch.

    `wake_fails` is asked at each swap. All calls come from the event loop.
    """

    def __init__(
        self,
        spec: InstanceSpec,
        store: Store,
        events: EventQueue,
        requests: Requests,
        key_of: Callable[[str], int],
        times: WorkerTimes,
        wake_fails: Callable[[], bool],
        *,
        draw: bool = False,
    ) -> None:
        self.spec = spec
        self.tallies = Tallies()
        self._store, self._events, self._requests = store, events, requests
        self._columns = Columns.of(requests)
        self._key_of, self._times, self._wake_fails, self._draw = key_of, times, wake_fails, draw
        self._boots = 0
        self.boot_id = ""
        self._alive = False
        self._boot(spec.models[0], dict.fromkeys(spec.models[1:], Residency.ASLEEP))

    def _boot(self, awake: str, others: dict[str, Residency]) -> None:
        self._boots += 1
        self.boot_id = f"{self.spec.name}.{self._boots}"
        self._alive = True
        self.state = InstanceState.READY
        self.awake = awake
        self._residency = {awake: Residency.AWAKE, **others}
        self._leases: dict[int, Lease] = {}
        self._parked: list[Lease] = []
        self._by_key: dict[int, Lease] = {}
        self._urgent: dict[int, str] = {}
        self._urgent_parked: list[int] = []
        self._change: Change | None = None
        self._leave_by = self._awake_since = -math.inf
        self._expires_at = math.inf
        self._rows: list[ResultRow] = []
        self._finished: list[Output] = []
        self._calls: list[Call] = []
        self._share, self._shared_at = 0.0, self._events.now()
        self._turn = 0
        self._start_engine()

    def _start_engine(self) -> None:
        pace = eviction.pace(FAVOUR, self.spec.slots)
        limits = EngineLimits(
            self.spec.slots,
            self.spec.kv_tokens,
            self.spec.batched_tokens,
            headroom=pace.headroom,
            alone=pace.alone,
            together=pace.together,
        )
        step = self.spec.profile(self.awake).step
        self.engine = FastEngine(limits, step, self._events.now())
        self._reported = (0, 0.0)
        self._typical = 0.0

    # What happens to it

    def start(self) -> None:
        """Report for the first time and begin to poll."""
        self._beat(self.boot_id)
        self._poll_in(self._times.poll_s)

    def hinted(self, boot_id: str) -> None:
        """Slices were assigned to this boot."""
        if boot_id == self.boot_id and self._alive and not self._leases:
            self._poll()

    def take_urgent(self, key: int, model: str) -> None:
        """Serve an interactive request."""
        self._collect()
        self._urgent[key] = model
        ready = self.state is InstanceState.READY and self._change is None
        if ready and model == self.awake:
            self._submit_urgent(key)
        else:
            self._urgent_parked.append(key)
            self._switch()
        if len(self._urgent) == 1 and not self._leases:
            self._poll_in(self._times.flush_s)

    @property
    def urgent(self) -> int:
        """Interactive requests it holds."""
        return len(self._urgent)

    @property
    def alive(self) -> bool:
        """Whether it runs at all."""
        return self._alive

    def die(self) -> list[int]:
        """Stop without a word; the interactive requests that had no token yet, by key."""
        self._collect()
        self._fold_engine()
        self._alive = False
        self._turn += 1
        begun = self.engine.begun()
        return sorted(key for key in self._urgent if key not in begun)

    def come_back(self) -> None:
        """Start as a new boot that has loaded its first model, the others cold."""
        model = self.spec.models[0]
        self._boot(model, dict.fromkeys(self.spec.models[1:], Residency.COLD))
        self.state = InstanceState.STARTING
        self._beat(self.boot_id)
        self._events.after(self.spec.profile(model).load_s, self._started(self.boot_id))

    def _started(self, boot_id: str) -> Callable[[], None]:
        def ready() -> None:
            if self.boot_id == boot_id and self._alive:
                self.state = InstanceState.READY
                self._tell()
                self._poll_in(0.0)

        return ready

    def close(self) -> None:
        """Fold the engine's sums into the tallies at the end of a run."""
        if self._alive:
            self._collect()
            self._fold_engine()

    # The loop

    def _poll_in(self, seconds: float) -> None:
        self._turn += 1
        turn = self._turn
        self._events.after(seconds, lambda: self._poll() if turn == self._turn else None)

    def _poll(self) -> None:
        if not self._alive:
            return
        self._collect()
        self._expire()
        self._flush()
        self._switch()
        if self.state is InstanceState.READY and self._change is None:
            self._claim()
            self._switch()
        busy = bool(self._leases or self._urgent)
        self._poll_in(self._times.flush_s if busy else self._times.poll_s)

    def _collect(self) -> None:
        """Take what the engine finished by now."""
        keys, firsts, ends = self.engine.advance_columns(self._events.now())
        columns = self._columns
        for key, first, end in zip(keys, firsts, ends, strict=True):
            if math.isnan(columns.end[key]):
                columns.first[key], columns.end[key] = first, end
            lease = self._by_key.pop(key, None)
            if lease is None:
                del self._urgent[key]
                self._calls.append(call_of(self._requests, key))
                continue
            lease.left.discard(key)
            slice_, came = lease.slice, columns.arrival[key]
            prompt, output = columns.prompt[key], columns.output[key]
            self._finished.append(Output(slice_.tenant, output, prompt))
            share = FORGETS if self._typical else 1.0
            self._typical += share * (output - self._typical)
            # By position, where names would take a fifth of the time.
            self._rows.append(
                ResultRow(
                    slice_.slice_id,
                    slice_.epoch,
                    slice_.run_id,
                    key - lease.first_key,
                    slice_.generation,
                    str(key),
                    200,
                    "",
                    None,
                    None,
                    Usage(prompt, 0, output),
                    None,
                    first - came,
                    end - came,
                )
            )

    def _expire(self) -> None:
        """Stop what is past its time; the reaper closes the slices."""
        now = self._events.now()
        if now < self._expires_at:
            return
        for lease in self._leases.values():
            if expiry(lease) <= now and lease.left:
                self._stop(lease)
        left = (expiry(lease) for lease in self._leases.values() if lease.left)
        self._expires_at = min(left, default=math.inf)

    def _stop(self, lease: Lease) -> None:
        for key in sorted(lease.left):
            self.engine.abort(key)
            self._by_key.pop(key, None)
        lease.left = set()
        if lease in self._parked:
            self._parked.remove(lease)

    def _flush(self) -> None:
        if not (self._leases or self._rows):
            return
        held = [lease.held for lease in self._leases.values()]
        outcome = self._store.flush(self.spec.name, self._rows, held, lease_s=self._times.lease_s)
        self._rows = []
        if all(directive is Directive.KEEP for directive in outcome.directives.values()):
            return
        back = []
        for slice_id, lease in list(self._leases.items()):
            directive = outcome.directives[slice_id]
            if directive is Directive.KEEP:
                continue
            self._stop(lease)
            self._drop(lease)
            if directive is Directive.PREEMPT:
                back.append(lease.held)
        if back:
            self._store.release(self.spec.name, back, ReleaseReason.PREEMPTED)

    def _drop(self, lease: Lease) -> None:
        del self._leases[lease.slice.slice_id]
        if self._draw:
            self._span(lease.slice.batch_id, lease.slice.model, lease.claimed_at)

    def _claim(self) -> None:
        suspect = any(lease.slice.suspect for lease in self._leases.values())
        in_hand = sum(len(lease.left) for lease in self._leases.values())
        wanted = agent.pull_size(in_hand, self.spec.slots, suspect=suspect)
        if not wanted:
            return
        claimed = self._store.claim_slices(
            self.spec.name,
            self.boot_id,
            max_requests=wanted,
            lease_s=self._times.lease_s,
            holding=len(self._leases),
        )
        now = self._events.now()
        for slice_ in claimed:
            first_key = self._key_of(slice_.batch_id)
            keys = {first_key + request.position for request in slice_.requests}
            held = Held(slice_.slice_id, slice_.epoch)
            lease = Lease(slice_, first_key, now, keys, held)
            self._expires_at = min(self._expires_at, expiry(lease))
            self._leases[slice_.slice_id] = lease
            if slice_.model == self.awake and self._change is None:
                self._feed(lease)
            else:
                self._parked.append(lease)

    def _feed(self, lease: Lease) -> None:
        # All of it waits in the engine: outside of it, it would wait in the same order.
        priority, now = agent.engine_priority(lease.slice.deadline), self._events.now()
        keys = np.array(sorted(lease.left), dtype=np.int64)
        prompts, outputs = self._requests.prompt[keys], self._requests.output[keys]
        self.engine.submit_all(keys, prompts, outputs, priority, now)
        self._by_key.update(dict.fromkeys(keys.tolist(), lease))

    # Interactive work

    def _submit_urgent(self, key: int) -> None:
        requests = self._requests
        self.engine.submit(
            key,
            int(requests.prompt[key]),
            int(requests.output[key]),
            agent.interactive_priority(float(requests.due[key])),
            self._events.now(),
        )

    # Swaps

    def _switch(self) -> None:
        """Begin the swap the agent's rule asks for, and make it once the engine is empty."""
        if self.state is not InstanceState.READY or len(self.spec.models) == 1:
            return
        if self._change is None and not self._parked and not self._urgent_parked:
            return
        now = self._events.now()
        if self._change is None:
            self._change = next_change(self._hosted(now), room=1)
            if self._change is None:
                return
            drains = self._change.parting is Parting.DRAIN
            self._leave_by = now + self._change.drain_s if drains else now
            if drains:
                self._recall_waiting()
        if not self._by_key or now >= self._leave_by:
            self._give_back()
        if not self.engine.running and not self.engine.waiting:
            self._swap(self._change.wakes)

    def _hosted(self, now: float) -> list[Hosted]:
        due: dict[str, float] = {}
        held: Counter[str] = Counter()
        for lease in self._leases.values():
            if lease.left:
                slice_ = lease.slice
                due[slice_.model] = min(due.get(slice_.model, math.inf), slice_.deadline)
                held[slice_.model] += len(lease.left)
        calls = Counter(self._urgent.values())
        return [
            Hosted(
                model,
                now - self._awake_since if model == self.awake else None,
                self._swap_s(model),
                due.get(model, math.inf),
                calls[model],
                self._left_s() if model == self.awake else 0.0,
                held[model] / self.spec.slots,
            )
            for model in self.spec.models
        ]

    def _left_s(self) -> float:
        """How long the youngest running request is likely to take still."""
        ages = self.engine.ages(MOST_GENERATED)
        if not ages:
            return 0.0
        busy_s, steps = self.engine.busy_s, max(1, self.engine.steps)
        return agent.tokens_left(ages, self._typical) * busy_s / steps

    def _recall_waiting(self) -> None:
        """Take out of the engine what has not begun, so that the rest can end."""
        begun = self.engine.begun()
        for key in [key for key in self._by_key if key not in begun]:
            self.engine.abort(key)
            del self._by_key[key]

    def _give_back(self) -> None:
        """Return the awake model's leases."""
        if not any(lease.slice.model == self.awake for lease in self._leases.values()):
            return
        self._flush()
        leases = [own for own in self._leases.values() if own.slice.model == self.awake]
        for lease in leases:
            self._stop(lease)
            self._drop(lease)
        held = [lease.held for lease in leases]
        if held:
            self._store.release(self.spec.name, held, ReleaseReason.PREEMPTED)

    def _swap_s(self, model: str) -> float:
        profile = self.spec.profile(model)
        cold = self._residency[model] is Residency.COLD
        arrive_s = profile.load_s if cold else profile.wake_s
        if model == self.awake:
            others = [self.spec.profile(other).sleep_s for other in self.spec.models]
            return max(others) + arrive_s
        return self.spec.profile(self.awake).sleep_s + arrive_s

    def _swap(self, model: str) -> None:
        seconds = self._swap_s(model)
        if self._wake_fails():
            seconds += self.spec.profile(model).load_s
        self.state = InstanceState.SWAPPING
        self._residency[self.awake] = Residency.ASLEEP
        self.tallies.swaps += 1
        self.tallies.swap_s += seconds
        self._tell()
        began, boot_id = self._events.now(), self.boot_id

        def swapped() -> None:
            if self.boot_id != boot_id or not self._alive:
                return
            self.awake, self.state = model, InstanceState.READY
            self._change, self._awake_since = None, self._events.now()
            self._residency[model] = Residency.AWAKE
            self._fold_engine()
            self._start_engine()
            if self._draw:
                self._span("swap", model, began)
            for lease in [lease for lease in self._parked if lease.slice.model == model]:
                self._parked.remove(lease)
                self._feed(lease)
            for key in [key for key in self._urgent_parked if self._urgent[key] == model]:
                self._urgent_parked.remove(key)
                self._submit_urgent(key)
            self._tell()
            self._poll_in(0.0)

        self._events.after(seconds, swapped)

    # Reports

    def _tell(self) -> None:
        self._store.heartbeat(self._heartbeat())

    def _beat(self, boot_id: str) -> None:
        if boot_id == self.boot_id and self._alive:
            self._collect()
            self._tell()
            self._events.after(self._times.heartbeat_s, lambda: self._beat(boot_id))

    def _heartbeat(self) -> Heartbeat:
        inside = self.engine.running + self.engine.waiting
        most = agent.concurrency_cap(self.spec.slots)
        hosted = self._hosted(self._events.now()) if len(self.spec.models) > 1 else ()
        return Heartbeat(
            name=self.spec.name,
            boot_id=self.boot_id,
            device=self.spec.device,
            state=self.state,
            models=tuple(
                ModelView(
                    model,
                    EngineKind.GENERATE,
                    self._residency[model],
                    _MAX_MODEL_LEN,
                    self._swap_s(model),
                    stay_s=stay_s(hosted, model, 1),
                )
                for model in self.spec.models
            ),
            slots=self.spec.slots,
            kv_tokens=self.spec.kv_tokens,
            running=min(inside, most),
            interactive_running=len(self._urgent),
            generated=self.engine.ages(MOST_GENERATED),
            interactive_share=self._share_now(),
            observations=self._observations(),
        )

    def _share_now(self) -> float:
        now = self._events.now()
        seconds, self._shared_at = now - self._shared_at, now
        inside, slots = len(self._urgent), self.spec.slots
        self._share = agent.interactive_share(self._share, inside, slots, seconds)
        return self._share

    def _observations(self) -> tuple[Observation, ...]:
        engine = self.engine
        generated, busy_s = self._reported
        tokens, seconds = engine.generated - generated, engine.busy_s - busy_s
        if not (tokens or self._finished or self._calls):
            return ()
        self._reported = (engine.generated, engine.busy_s)
        seen = Observation(
            instance=self.spec.name,
            device=self.spec.device,
            model=self.awake,
            at=self._events.now(),
            outputs=tuple(self._finished),
            steps=engine.took_steps(),
            tokens=tokens,
            requests=len(self._finished),
            seconds=seconds,
            calls=tuple(self._calls),
        )
        self._finished, self._calls = [], []
        return (seen,)

    def _fold_engine(self) -> None:
        engine, tallies = self.engine, self.tallies
        tallies.busy_s += engine.busy_s
        tallies.preemptions += engine.preemptions
        tallies.recomputed += engine.recomputed
        tallies.generated += engine.generated

    def _span(self, what: str, model: str, start: float) -> None:
        self.tallies.spans.append(Span(self.spec.name, what, model, start, self._events.now()))
