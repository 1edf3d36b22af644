"""The service on a virtual clock: real loop, reaper, store and agent rules; simulated engines."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count

import numpy as np

from qlm_batch.control.leadership import Leadership
from qlm_batch.control.reaper import Reaper, ReaperConfig
from qlm_batch.control.recording import Recorder
from qlm_batch.control.scheduler_loop import SchedulerConfig, SchedulerLoop
from qlm_batch.domain.jobs import CHAT, BatchSpec, FilePurpose, FileRecord, OnMiss, RequestLine
from qlm_batch.domain.messages import Assigned, Stopped
from qlm_batch.domain.snapshot import InstanceView, Plan, RequestGroup, Snapshot
from qlm_batch.scheduling.policies import Policy
from qlm_batch.scheduling.policies.oracle import TrueLength
from qlm_batch.scheduling.problem import Durations
from qlm_batch.scheduling.routing import Route, route
from qlm_batch.simulation.events import EventQueue
from qlm_batch.simulation.fleet import Fleet
from qlm_batch.simulation.instance import SimulatedInstance
from qlm_batch.simulation.records import Tallies, WorkerTimes
from qlm_batch.simulation.workload import Arrival, Outage, Requests, Workload, requests_of
from qlm_batch.store.memory import MemoryStore

START = 1e9
"""Virtual time of a run's beginning, in Unix seconds like the deadlines priorities are made of."""
_FAULTS, _ARRIVALS, _WORK, _PASSES = range(4)
_HOLDER = "simulator"
_SERVICE_S = 4.0
"""About how long an interactive request takes; routing only compares instances with it."""


Choice = Policy | Callable[[TrueLength], Policy]
"""A policy, or one made for a run because it may know the lengths."""


@dataclass(frozen=True, slots=True)
class SimulationConfig:
    """How the service is set up; the defaults are the service's own.

    A run ends when everything has ended, at the latest `drain_s` after the last arrival. `hint_s`
    is how long a message takes. `draw` keeps what every instance did, for a Gantt chart.
    """

    seed: int = 0
    tick_s: float = 0.5
    hint_s: float = 0.005
    slice_requests: int = 64
    on_miss: OnMiss = OnMiss.EXPIRE
    drain_s: float = 7 * 86_400.0
    worker: WorkerTimes = field(default_factory=WorkerTimes)
    plan_ms: float = 100.0
    draw: bool = False


@dataclass(slots=True, eq=False)
class Outcome:
    """What a run brought. `requests` hold absolute virtual times, the run began at START.

    `planning_s` and `wall_s` are real time, and so the only things two equal runs differ in.
    """

    workload: Workload
    policy: str
    requests: Requests
    tallies: Mapping[str, Tallies]
    ended_at: float
    unfinished: int
    planning_s: Sequence[float]
    wall_s: float


@contextmanager
def _few_collections() -> Iterator[None]:
    """A run keeps every request and makes no cycles: looking for them would take a tenth of it."""
    before = gc.get_threshold()
    gc.set_threshold(200_000, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


class _Timed:
    """A policy with a stopwatch."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self.seconds: list[float] = []

    @property
    def name(self) -> str:
        return self._policy.name

    def plan(
        self,
        snapshot: Snapshot,
        groups: Sequence[RequestGroup],
        estimator: Durations,
        moves: int,
        seed: int,
    ) -> Plan:
        began = time.perf_counter()
        plan = self._policy.plan(snapshot, groups, estimator, moves, seed)
        self.seconds.append(time.perf_counter() - began)
        return plan


class Cluster:
    """One run: a workload on a fleet under a policy."""

    def __init__(
        self,
        fleet: Fleet,
        workload: Workload,
        policy: Choice,
        config: SimulationConfig,
        recorder: Recorder | None = None,
    ) -> None:
        self._workload, self._config = workload, config
        self.events = EventQueue(START)
        self.store = MemoryStore(self.events.now)
        self.requests = requests_of(workload, START)
        self._policy = _Timed(policy(self._true_length) if callable(policy) else policy)
        self._sizes = np.diff([*self.requests.offsets, len(self.requests)])
        leadership = Leadership()
        self._loop = SchedulerLoop(
            self.store,
            self,
            self._policy,
            SchedulerConfig(
                _HOLDER, tick_s=config.tick_s, plan_ms=config.plan_ms, seed=config.seed
            ),
            leadership,
            recorder,
        )
        self._reaper = Reaper(
            self.store, self.events, leadership, ReaperConfig(lease_s=config.worker.lease_s)
        )
        self._keys: dict[str, int] = {}
        longest = max((len(a.prompts) for a in workload.arrivals), default=0)
        self._names = [str(n) for n in range(longest)]
        rng = np.random.default_rng((config.seed, 1))
        failures = workload.swap_failures
        self._instances = [
            SimulatedInstance(
                spec,
                self.store,
                self.events,
                self.requests,
                self._keys.__getitem__,
                config.worker,
                lambda: bool(failures and rng.random() < failures),
                draw=config.draw,
            )
            for spec in fleet.instances
        ]
        self._by_name = {instance.spec.name: instance for instance in self._instances}
        self._views: Sequence[InstanceView] = ()
        self._homeless: list[int] = []
        self._travelling = 0
        self._left = len(workload.arrivals)
        self._over = False

    def run(self, progress: Callable[[float], None] | None = None) -> Outcome:
        """Run to the end; `progress` hears the virtual seconds gone by, now and then."""
        with _few_collections():
            return self._run(progress)

    def _run(self, progress: Callable[[float], None] | None) -> Outcome:
        began = time.perf_counter()
        for instance in self._instances:
            self.events.at(START, instance.start, _WORK)
        self.events.at(START, self._tick, _PASSES)
        self.events.at(START, self._reap, _PASSES)
        for outage in self._workload.outages:
            self._arrange(outage)
        self._arrive(0)
        for n in count():
            if self._over or not self.events.step():
                break
            if progress is not None and n % 20 == 0:
                progress(self.events.now() - START)
        for instance in self._instances:
            instance.close()
        return Outcome(
            self._workload,
            self._policy.name,
            self.requests,
            {name: instance.tallies for name, instance in self._by_name.items()},
            self.events.now(),
            self.store.queue_totals().requests + self._urgent(),
            tuple(self._policy.seconds),
            time.perf_counter() - began,
        )

    # Dispatcher

    def assigned(self, message: Assigned) -> None:
        """Deliver the hint after a while."""
        instance = self._by_name[message.instance]
        self.events.after(self._config.hint_s, lambda: instance.hinted(message.boot_id), _WORK)

    def stopped(self, message: Stopped) -> None:
        """Workers learn at their next flush."""

    def _true_length(self, group: RequestGroup) -> float:
        """Output tokens of a group, from the means of the batches it is part of."""
        keys = [self._keys[batch_id] for batch_id in group.batches]
        numbers = np.searchsorted(self.requests.offsets, keys)
        outputs = self.requests.output
        own = [outputs[k : k + self._sizes[n]] for k, n in zip(keys, numbers, strict=True)]
        return group.requests * float(np.concatenate(own).mean())

    # Passes

    def _tick(self) -> None:
        while self._loop.tick():
            pass
        if any(work.interactive for work in self._workload.classes):
            self._views = self.store.instances()
        for key in self._homeless[:]:
            self._homeless.remove(key)
            self._route(key)
        self._end_batches()
        now = self.events.now()
        late = now > START + self._workload.duration + self._config.drain_s
        if late or (not self._left and not self._open()):
            self._over = True
        self.events.after(self._config.tick_s, self._tick, _PASSES)

    def _reap(self) -> None:
        self._reaper.run_once()
        self.events.after(self._reaper.idle_s, self._reap, _PASSES)

    def _end_batches(self) -> None:
        """Stand in for the export: batches end without files."""
        while (task := self.store.claim_export(_HOLDER, 60.0)) is not None:
            self.store.finish_export(task.batch.id, _HOLDER, None, None)

    def _urgent(self) -> int:
        """Interactive requests under way."""
        held = sum(instance.urgent for instance in self._instances if instance.alive)
        return held + len(self._homeless) + self._travelling

    def _open(self) -> bool:
        return self.store.queue_totals().batches > 0 or self._urgent() > 0

    # Arrivals

    def _arrive(self, number: int) -> None:
        """Schedule one arrival; each schedules the next, so the queue of events stays short."""
        if number == len(self._workload.arrivals):
            return
        arrival = self._workload.arrivals[number]

        def come() -> None:
            self._left -= 1
            if self._workload.classes[arrival.work_class].interactive:
                self._route(int(self.requests.offsets[number]))
            else:
                self._submit(number, arrival)
            self._arrive(number + 1)

        self.events.at(START + arrival.at, come, _ARRIVALS)

    def _submit(self, number: int, arrival: Arrival) -> None:
        batch_id, now = f"batch_{number:08}", self.events.now()
        work_class = self._workload.classes[arrival.work_class]
        self._keys[batch_id] = int(self.requests.offsets[number])
        self.store.add_file(
            FileRecord(
                batch_id, arrival.tenant, FilePurpose.BATCH, "in.jsonl", 0, "0" * 64, batch_id, now
            )
        )
        self.store.create_batch(
            batch_id,
            BatchSpec(
                arrival.tenant,
                CHAT,
                batch_id,
                f"{work_class.target_s:.0f}s",
                work_class.target_s,
                on_miss=self._config.on_miss,
            ),
        )
        self.store.claim_intake(_HOLDER, 60.0)
        most = self._workload.max_tokens
        lines = (
            RequestLine(n + 1, self._names[n], arrival.model, "{}", prompt, most)
            for n, prompt in enumerate(arrival.prompts.tolist())
        )
        self.store.load_lines(batch_id, _HOLDER, lines, self._config.slice_requests)

    def _route(self, key: int) -> None:
        model = self.requests.models[self.requests.model[key]]
        sent = {
            (instance.spec.name, instance.boot_id): instance.urgent for instance in self._instances
        }
        dead = [
            (instance.spec.name, instance.boot_id)
            for instance in self._instances
            if not instance.alive
        ]
        where = route(self._views, model, sent=sent, service_s=_SERVICE_S, avoid=dead)
        if not isinstance(where, Route):
            self._homeless.append(key)
            return
        instance = self._by_name[where.instance]

        self._travelling += 1

        def deliver() -> None:
            self._travelling -= 1
            if instance.alive and instance.boot_id == where.boot_id:
                instance.take_urgent(key, model)
            else:
                self._route(key)

        self.events.after(self._config.hint_s, deliver, _WORK)

    # Faults

    def _arrange(self, outage: Outage) -> None:
        instance = self._instances[outage.instance]

        def die() -> None:
            for key in instance.die():
                self._route(key)

        self.events.at(START + outage.at, die, _FAULTS)
        self.events.at(START + outage.at + outage.seconds, instance.come_back, _FAULTS)
