"""Waits that were predicted, kept until they are over: what calibration learns from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from qlm_batch.domain.jobs import SloClass
from qlm_batch.domain.snapshot import Plan

LEAST_S = 1.0
"""Waits predicted shorter than this are not scored: ticks and polls, not queues, decide them."""
MOST = 10_000

Outcome = tuple[str, SloClass, float, float]


@dataclass(frozen=True, slots=True)
class _Forecast:
    model: str
    slo_class: SloClass
    made_at: float
    wait_s: float


@dataclass(frozen=True, slots=True)
class Forecasts:
    """The first prediction for each group that still waits, and the outcomes not yet learned.

    An outcome is (model, class, predicted seconds, actual seconds).
    """

    pending: Mapping[str, _Forecast] = field(default_factory=dict)
    outcomes: tuple[Outcome, ...] = ()

    def planned(self, plan: Plan) -> Forecasts:
        """After a plan: groups new in it are remembered, those gone from it forgotten.

        What was let go is not scored: its wait is a decision, not a prediction.
        """
        pending: dict[str, _Forecast] = {}
        for queue in plan.queues:
            for placed in queue.groups:
                if placed.shed or len(pending) >= MOST:
                    continue
                group = placed.group
                pending[group.key] = self.pending.get(group.key) or _Forecast(
                    group.model, group.slo_class, plan.made_at, placed.start - plan.made_at
                )
        return replace(self, pending=pending)

    def started(self, keys: Iterable[str], now: float) -> Forecasts:
        """After the first slices of these groups were assigned."""
        pending, outcomes = dict(self.pending), list(self.outcomes)
        for key in keys:
            forecast = pending.get(key)
            if forecast is not None and forecast.wait_s >= LEAST_S:
                actual_s = now - forecast.made_at
                outcomes.append((forecast.model, forecast.slo_class, forecast.wait_s, actual_s))
                # Kept, but unscored from now on: its rest is the same wait.
                pending[key] = replace(forecast, wait_s=0.0)
        return Forecasts(pending, tuple(outcomes))

    def told(self) -> Forecasts:
        """After the outcomes were learned."""
        return replace(self, outcomes=())
