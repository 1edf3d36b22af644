"""What was promised, kept until it is over: what calibration learns from."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from qlm_batch.domain.snapshot import Snapshot
from qlm_batch.scheduling.calibration import Foreseen, score
from qlm_batch.scheduling.promises import End

LEAST_S = 1.0
"""Shorter predictions are not scored: ticks and polls, not queues, decide what comes of them."""
MOST = 10_000
MOST_OVERDUE = 100
NEAR = 0.25
"""A batch whose end was expected further off than this share of its whole did not end, but was
taken away."""

Outcome = tuple[str, float]
"""Model, and the score of one of its batches."""


@dataclass(frozen=True, slots=True)
class _Forecast:
    model: str
    made_at: float
    told: Foreseen
    latest: float
    """Its end as expected last."""

    def score(self, now: float) -> float:
        return score(self.told.mean_s, self.told.error, now - self.made_at)

    def to_data(self) -> Mapping[str, object]:
        return {"model": self.model, "made_at": self.made_at, "told": asdict(self.told)}

    @staticmethod
    def from_data(data: Any) -> _Forecast:
        told, made_at = Foreseen(**data["told"]), float(data["made_at"])
        return _Forecast(str(data["model"]), made_at, told, made_at + told.p50_s)


@dataclass(frozen=True, slots=True)
class Forecasts:
    """What was foreseen of batches when they were promised; outcomes not yet learned.

    `fresh` are those not yet kept for the next leader.
    """

    ends: Mapping[str, _Forecast] = field(default_factory=dict)
    outcomes: tuple[Outcome, ...] = ()
    fresh: Mapping[str, Mapping[str, object]] = field(default_factory=dict)

    @staticmethod
    def resumed(kept: Mapping[str, Mapping[str, object]]) -> Forecasts:
        """What earlier leaders foresaw; data of unknown shape says nothing."""
        ends = {}
        for batch_id, data in kept.items():
            with suppress(KeyError, TypeError, ValueError):
                ends[batch_id] = _Forecast.from_data(data)
        return Forecasts(ends)

    def planned(self, ends: Mapping[str, End], snapshot: Snapshot) -> Forecasts:
        """After a plan that lets its batches end like this; those without a promise get one.

        One that rests on assumptions says nothing of the estimator, and is not remembered.
        """
        known, fresh = dict(self.ends), dict(self.fresh)
        for batch_id, end in ends.items():
            expected, before = snapshot.now + end.told.p50_s, known.get(batch_id)
            if before is not None:
                known[batch_id] = _Forecast(before.model, before.made_at, before.told, expected)
            elif batch_id in snapshot.unpromised and end.told.informed and len(known) < MOST:
                known[batch_id] = _Forecast(end.model, snapshot.now, end.told, expected)
                fresh[batch_id] = known[batch_id].to_data()
        return replace(self, ends=known, fresh=fresh)

    def kept(self) -> Forecasts:
        """After the fresh ones were kept."""
        return replace(self, fresh={})

    def seen(self, snapshot: Snapshot) -> Forecasts:
        """After a look at the queue: what is neither in it nor waits for its files has ended."""
        if not self.ends:
            return self
        left = {run.batch_id for run in snapshot.runs} | snapshot.finishing
        left |= {own.batch_id for view in snapshot.instances for own in view.assigned}
        gone = [known for batch_id, known in self.ends.items() if batch_id not in left]
        if not gone:
            return self
        ended = tuple(
            (known.model, known.score(snapshot.now))
            for known in gone
            if known.told.mean_s >= LEAST_S
            and known.latest - snapshot.now <= NEAR * known.told.mean_s
        )
        ends = {batch_id: known for batch_id, known in self.ends.items() if batch_id in left}
        return replace(self, ends=ends, outcomes=(*self.outcomes, *ended))

    def overdue(self, now: float) -> Mapping[str, tuple[float, ...]]:
        """By model, the scores reached by batches that were promised to be done by now."""
        found: dict[str, tuple[float, ...]] = {}
        for known in self.ends.values():
            late = now - known.made_at > known.told.p95_s
            if late and known.told.mean_s >= LEAST_S:
                own = found.get(known.model, ())
                found[known.model] = (*own, round(known.score(now), 1))[-MOST_OVERDUE:]
        return found

    def learned(self) -> Forecasts:
        """After the outcomes were learned."""
        return replace(self, outcomes=())
