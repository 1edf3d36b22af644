"""What was predicted, kept until it is over: what calibration learns from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from qlm_batch.domain.jobs import SloClass
from qlm_batch.domain.snapshot import Plan, Snapshot

LEAST_S = 1.0
"""Shorter predictions are not scored: ticks and polls, not queues, decide what comes of them."""
MOST = 10_000
NEAR = 0.25
"""A batch whose end was expected further off than this share of its whole did not end, but was
taken away."""

Outcome = tuple[str, SloClass, float, float, bool]
"""Model, class, predicted and actual seconds, and whether it is a batch's end, not a wait."""


@dataclass(frozen=True, slots=True)
class _Forecast:
    model: str
    slo_class: SloClass
    made_at: float
    seconds: float
    latest: float = 0.0
    """For a batch: its end as expected last."""


@dataclass(frozen=True, slots=True)
class Forecasts:
    """First predictions of waiting groups and of batches under way; outcomes not yet learned."""

    waits: Mapping[str, _Forecast] = field(default_factory=dict)
    ends: Mapping[str, _Forecast] = field(default_factory=dict)
    outcomes: tuple[Outcome, ...] = ()

    def planned(self, plan: Plan, snapshot: Snapshot) -> Forecasts:
        """After a plan: what is new in it is remembered, groups gone from it are forgotten.

        What was let go is not scored: its wait is a decision, not a prediction. Batches are
        remembered from their promise on, those of one model.
        """
        waits: dict[str, _Forecast] = {}
        for queue in plan.queues:
            for placed in queue.groups:
                if placed.shed or len(waits) >= MOST:
                    continue
                group = placed.group
                waits[group.key] = self.waits.get(group.key) or _Forecast(
                    group.model, group.slo_class, plan.made_at, placed.start - plan.made_at
                )
        return replace(self, waits=waits, ends=self._ends(plan, snapshot))

    def _ends(self, plan: Plan, snapshot: Snapshot) -> Mapping[str, _Forecast]:
        ends = dict(self.ends)
        fresh = snapshot.unpromised - ends.keys()
        models: dict[str, set[str]] = {batch_id: set() for batch_id in fresh}
        if fresh:
            for run in snapshot.runs:
                if run.batch_id in fresh:
                    models[run.batch_id].add(run.model)
        for batch_id, estimate in plan.estimates.items():
            if estimate.p50 is None:
                continue
            known = ends.get(batch_id)
            if known is not None:
                ends[batch_id] = replace(known, latest=estimate.p50)
            elif len(own := models.get(batch_id, set())) == 1 and len(ends) < MOST:
                (model,) = own
                seconds = estimate.p50 - plan.made_at
                ends[batch_id] = _Forecast(
                    model, SloClass.BATCH, plan.made_at, seconds, estimate.p50
                )
        return ends

    def started(self, keys: Iterable[str], now: float) -> Forecasts:
        """After the first slices of these groups were assigned."""
        waits, outcomes = dict(self.waits), list(self.outcomes)
        for key in keys:
            known = waits.get(key)
            if known is not None and known.seconds >= LEAST_S:
                outcomes.append(_scored(known, now, end=False))
                # Kept, but unscored from now on: its rest is the same wait.
                waits[key] = replace(known, seconds=0.0)
        return replace(self, waits=waits, outcomes=tuple(outcomes))

    def seen(self, snapshot: Snapshot) -> Forecasts:
        """After a look at the queue: batches with nothing left in it have ended."""
        if not self.ends:
            return self
        left = {run.batch_id for run in snapshot.runs}
        left |= {own.batch_id for view in snapshot.instances for own in view.assigned}
        gone = [known for batch_id, known in self.ends.items() if batch_id not in left]
        if not gone:
            return self
        ended = tuple(
            _scored(known, snapshot.now, end=True)
            for known in gone
            if known.seconds >= LEAST_S and known.latest - snapshot.now <= NEAR * known.seconds
        )
        ends = {batch_id: known for batch_id, known in self.ends.items() if batch_id in left}
        return replace(self, ends=ends, outcomes=(*self.outcomes, *ended))

    def told(self) -> Forecasts:
        """After the outcomes were learned."""
        return replace(self, outcomes=())


def _scored(known: _Forecast, now: float, *, end: bool) -> Outcome:
    return (known.model, known.slo_class, known.seconds, now - known.made_at, end)
