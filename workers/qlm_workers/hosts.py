"""An engine as the runner sees it: what waits for it, what is inside, and whether it moves."""

from __future__ import annotations

import heapq
from dataclasses import replace
from itertools import count
from statistics import fmean

from qlm_batch.domain.engine import Engine, EngineInfo, EngineStats
from qlm_batch.domain.jobs import ClaimedRequest, EngineKind
from qlm_batch.domain.snapshot import ModelView, Residency
from qlm_batch.scheduling import agent
from qlm_workers.leases import Lease
from qlm_workers.meter import Meter

QUIET_S = 10.0
"""So long after the last interactive request batch work runs as if there were none."""

_EMBED = "embed:"


def parse_model(spec: str) -> tuple[str, EngineKind]:
    """Model and kind of an entry of `Settings.models`: `embed:NAME` embeds, `NAME` generates."""
    if spec.startswith(_EMBED):
        return spec.removeprefix(_EMBED), EngineKind.EMBED
    return spec, EngineKind.GENERATE


class Host:
    """One model's engine with the requests that wait for it, earliest deadline first."""

    def __init__(self, model: str, kind: EngineKind, engine: Engine, meter: Meter) -> None:
        self.model = model
        self.kind = kind
        self.engine = engine
        self.meter = meter
        self.info: EngineInfo | None = None
        self.inside = 0
        self.interactive = 0
        self.cap = 0
        self._waiting: list[tuple[int, int, Lease, ClaimedRequest]] = []
        self._order = count()
        self._step = -1
        self._moved_at = 0.0
        self._step_s: float | None = None
        self._interactive_at = float("-inf")
        self.stats: EngineStats | None = None

    def started(self, info: EngineInfo, now: float) -> None:
        """The engine is ready to answer."""
        self.info = info
        self.cap = agent.concurrency_cap(info.slots)
        self._moved_at = now

    def view(self, wake_s: float | None = None) -> ModelView:
        """The model as the scheduler sees it."""
        return ModelView(
            name=self.model,
            kind=self.kind,
            residency=Residency.COLD if self.info is None else Residency.AWAKE,
            max_model_len=0 if self.info is None else self.info.max_model_len,
            wake_s=0.0 if self.info is not None else wake_s,
        )

    def enqueue(self, lease: Lease) -> None:
        """Let a lease's open requests wait for a place."""
        for request in lease.open.values():
            heapq.heappush(self._waiting, (lease.priority, next(self._order), lease, request))

    def take(self) -> tuple[Lease, ClaimedRequest] | None:
        """The next request to put inside, None when the engine is full or nothing waits."""
        while self._waiting and self.inside < self.cap:
            _, _, lease, request = heapq.heappop(self._waiting)
            if not lease.ended and not lease.preempted and request.position in lease.open:
                return lease, request
        return None

    @property
    def busy(self) -> bool:
        """Whether anything is inside, batch or interactive."""
        return self.inside > 0 or self.interactive > 0

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
