"""An engine as the runner sees it: what waits for it, what is inside, and whether it moves."""

from __future__ import annotations

import asyncio
import heapq
from dataclasses import dataclass, replace
from itertools import count
from statistics import fmean

from qlm_batch.domain.engine import Engine, EngineInfo, EngineStats
from qlm_batch.domain.errors import Unavailable
from qlm_batch.domain.jobs import ClaimedRequest, EngineKind, SloClass
from qlm_batch.domain.snapshot import Call, Latency, ModelView, Output, Residency
from qlm_batch.scheduling import agent
from qlm_workers.leases import Lease
from qlm_workers.meter import Meter

QUIET_S = 10.0
"""So long after the last interactive request batch work runs as if there were none."""


@dataclass(slots=True)
class SwapTimes:
    """How long one model's engine last took to load, to sleep and to wake; None: never done."""

    load_s: float | None = None
    wake_s: float | None = None
    sleep_s: float = 0.0
    sleeps_to: Residency = Residency.COLD

    def woke(self, residency: Residency, took_s: float) -> None:
        """It took so long from there."""
        if residency is Residency.ASLEEP:
            self.wake_s = took_s
        else:
            self.load_s = took_s

    def slept(self, residency: Residency, took_s: float) -> None:
        """It took so long to get there."""
        self.sleep_s, self.sleeps_to = took_s, residency

    def arrive_s(self, residency: Residency) -> float | None:
        """From there to awake; for one that is awake, from where it would be put."""
        if residency is Residency.AWAKE:
            residency = self.sleeps_to
        asleep = residency is Residency.ASLEEP
        return self.wake_s if asleep and self.wake_s is not None else self.load_s


class Totals:
    """An engine's counters since the worker's boot, however often the engine starts anew."""

    def __init__(self) -> None:
        self.evictions = self.recomputed_tokens = self.generated_tokens = 0
        self._base = (0, 0, 0)

    def saw(self, stats: EngineStats) -> None:
        """What the engine counts now."""
        evictions, recomputed, generated = self._base
        self.evictions = evictions + stats.evictions
        self.recomputed_tokens = recomputed + stats.recomputed_tokens
        self.generated_tokens = generated + stats.generated_tokens

    def restarted(self) -> None:
        """The engine was ended, and counts from nothing again."""
        self._base = (self.evictions, self.recomputed_tokens, self.generated_tokens)


class Host:
    """One model's engine with the requests that wait for it, earliest deadline first.

    `adapters` are the meters of its LoRA adapters, which share the engine; `told` is the context
    length as far as it is known before the engine was started.
    """

    def __init__(
        self,
        model: str,
        kind: EngineKind,
        engine: Engine,
        meter: Meter,
        *adapters: Meter,
        told: int = 0,
    ) -> None:
        self.model = model
        self.kind = kind
        self.engine = engine
        self.meter = meter
        self.adapters = {own.model: own for own in adapters}
        self.info: EngineInfo | None = None
        self.residency = Residency.COLD
        self.awake_since = float("-inf")
        self.swaps = 0
        self.swapped_s = 0.0
        self._told_length = told
        self.times = SwapTimes()
        self._open = False
        self._settled = asyncio.Event()
        self.inside = 0
        self.interactive = 0
        self.parked = 0
        self.fault = ""
        """Why it could not be made awake, where that is so."""
        self.cap = 0
        self._waiting: list[tuple[int, int, Lease, ClaimedRequest]] = []
        self._order = count()
        self._step = -1
        self._moved_at = 0.0
        self._step_s: float | None = None
        self._interactive_at = float("-inf")
        self.stats: EngineStats | None = None
        self.totals = Totals()
        self.latencies = {each: Latency(each) for each in SloClass}

    # Residency

    def started(self, info: EngineInfo, now: float, took_s: float | None = None) -> None:
        """The engine is ready to answer, `took_s` after it was asked to be."""
        if took_s is not None:
            self.times.woke(self.residency, took_s)
        if self.residency is not Residency.ASLEEP:
            self.totals.restarted()
        self.fault = ""
        self.info = info
        self.residency = Residency.AWAKE
        self.cap = agent.concurrency_cap(info.slots)
        self._moved_at = now
        self._step_s = None
        self.meter.resumed(now)
        self._open = True
        self._settled.set()

    def close(self) -> None:
        """Let nothing more inside: the model is about to sleep."""
        self._open = False
        self._settled.clear()

    def left(self, residency: Residency, took_s: float | None = None) -> None:
        """It is no longer awake; `took_s` where it was put to sleep in order."""
        self.close()
        self.residency = residency
        self.stats = None
        if residency is Residency.FAILED:
            self._settled.set()
        if took_s is not None:
            self.times.slept(residency, took_s)

    @property
    def open(self) -> bool:
        """Whether requests may go inside."""
        return self._open

    async def opened(self) -> None:
        """Wait until requests may go inside; they still may when this returns.

        Unavailable when the model could not be made awake here.
        """
        while not self._open:
            if self.residency is Residency.FAILED:
                raise Unavailable(f"The model '{self.model}' could not be loaded here.")
            self.parked += 1
            try:
                await self._settled.wait()
            finally:
                self.parked -= 1

    @property
    def names(self) -> tuple[str, ...]:
        """The model's name and those of its adapters."""
        return (self.model, *self.adapters)

    def finished(self, model: str, output: Output) -> None:
        """A request to the model or one of its adapters ended with an answer."""
        adapter = self.adapters.get(model)
        if adapter is None:
            self.meter.finished(output)
        else:
            adapter.finished(output)
            self.meter.of_adapter(output.tokens)

    def called(self, model: str, call: Call) -> None:
        """An interactive request to the model or one of its adapters was answered."""
        self.adapters.get(model, self.meter).called(call)

    def timed(
        self,
        slo_class: SloClass,
        first_token_s: float | None,
        duration_s: float | None,
        tokens: int,
    ) -> None:
        """A request was answered after these times, with so many tokens."""
        before = self.latencies[slo_class]
        self.latencies[slo_class] = before.after(first_token_s, duration_s, tokens)

    def views(self, wake_s: float | None = None, stay_s: float = 0.0) -> tuple[ModelView, ...]:
        """The model and its adapters as the scheduler sees them."""
        own = ModelView(
            name=self.model,
            kind=self.kind,
            residency=self.residency,
            max_model_len=self._told_length if self.info is None else self.info.max_model_len,
            wake_s=wake_s,
            swaps=self.swaps,
            swap_s=round(self.swapped_s, 3),
            stay_s=stay_s,
            fault=self.fault,
        )
        adapters = [
            replace(own, name=name, parent=self.model, swaps=0, swap_s=0.0)
            for name in self.adapters
        ]
        return (own, *adapters)

    # Work

    def enqueue(self, lease: Lease) -> None:
        """Let a lease's open requests wait for a place."""
        for request in lease.open.values():
            heapq.heappush(self._waiting, (lease.priority, next(self._order), lease, request))

    def take(self) -> tuple[Lease, ClaimedRequest] | None:
        """The next request to put inside, None when the engine is full or nothing waits."""
        while self.open and self._waiting and self.inside < self.cap:
            _, _, lease, request = heapq.heappop(self._waiting)
            if not lease.ended and not lease.preempted and request.position in lease.open:
                return lease, request
        return None

    @property
    def busy(self) -> bool:
        """Whether anything is inside, batch or interactive."""
        return self.inside > 0 or self.interactive > 0

    def left_s(self) -> float:
        """How long the youngest request inside is likely to take still."""
        if not self.busy or self._step_s is None:
            return 0.0
        ages = self.stats.generated if self.stats else ()
        return agent.tokens_left(ages, self.meter.typical_output) * self._step_s

    def moved(self, now: float) -> None:
        """Something came out of the engine."""
        self._moved_at = now

    def look(self, now: float) -> EngineStats:
        """Look inside and remember whether it moved. Raises EngineDead where the engine tells."""
        stats = self.engine.stats()
        if stats.step != self._step or not self.busy:
            self._step, self._moved_at = stats.step, now
        self.meter.look(stats, busy=self.busy, now=now)
        if stats.steps:
            self._step_s = fmean(seconds for *_, seconds in stats.steps)
        self.totals.saw(stats)
        self.stats = replace(stats, steps=())
        return stats

    def pace(self, now: float, target_s: float) -> bool:
        """Fit the cap to the steps of the last look; whether there is more room than before."""
        if self.interactive:
            self._interactive_at = now
        if self.info is None:
            return False
        before = self.cap
        self.cap = agent.batch_cap(
            before,
            self.info.slots,
            step_s=self._step_s,
            target_s=target_s,
            quiet=now - self._interactive_at > QUIET_S,
        )
        return self.cap > before

    def stalled_s(self, now: float) -> float:
        """How long it has held work without moving."""
        return now - self._moved_at if self.busy else 0.0
