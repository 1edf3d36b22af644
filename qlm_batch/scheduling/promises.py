"""When each batch will be done, read off a plan: what users are shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from qlm_batch.domain.jobs import Estimate, SloClass
from qlm_batch.domain.snapshot import Plan, Snapshot
from qlm_batch.scheduling.estimator import VERSION, Estimator


def with_estimates(plan: Plan, snapshot: Snapshot, estimator: Estimator) -> Plan:
    """The plan with an estimate for every batch that has queued or assigned work.

    A batch ends with the last of its parts; it misses when its most endangered part does. A batch
    with a part that no instance serves has no quantiles.
    """
    ends: dict[str, _End] = {}
    parts = [*_planned(plan), *_assigned(snapshot, estimator)]
    for (mean, _, _, _, reason, batches), upper, miss in zip(
        parts, *_told(parts, estimator), strict=True
    ):
        for batch_id in batches:
            known = ends.get(batch_id)
            if known is None:
                ends[batch_id] = _End(mean, upper, miss, reason)
            else:
                known.add(mean, upper, miss, reason)
    now = snapshot.now
    estimates = {batch_id: end.estimate(now) for batch_id, end in ends.items()}
    for placed in plan.unplaced:
        for batch_id in placed.group.batches:
            estimates[batch_id] = Estimate(None, None, None, placed.reason, now)
    return replace(plan, estimates=estimates, estimator=VERSION)


@dataclass(slots=True)
class _End:
    """When a batch is done, seconds from now, going by the parts seen so far."""

    mean: float
    upper: float
    miss: float
    reason: str

    def add(self, mean: float, upper: float, miss: float, reason: str) -> None:
        """Take in one more part."""
        if mean > self.mean:
            self.mean, self.reason = mean, reason
        if upper > self.upper:
            self.upper = upper
        if miss > self.miss:
            self.miss = miss

    def estimate(self, now: float) -> Estimate:
        """In absolute times."""
        p50 = max(0.0, self.mean)
        return Estimate(now + p50, now + max(p50, self.upper), self.miss, self.reason, now)


_Part = tuple[float, float, float, tuple[str, SloClass], str, Sequence[str]]
"""Mean and variance of the end of some work, time to its deadline, whose it is, why, batches."""


def _told(parts: Sequence[_Part], estimator: Estimator) -> tuple[list[float], list[float]]:
    """Of each part the bound shown to users and the chance that it misses its deadline."""
    mean, var, left_s = (np.array([part[n] for part in parts]) for n in range(3))
    owners: dict[tuple[str, SloClass], list[int]] = {}
    for n, part in enumerate(parts):
        owners.setdefault(part[3], []).append(n)
    upper = np.empty(len(parts))
    for (model, slo_class), own in owners.items():
        upper[own] = estimator.upper(mean[own], var[own], model, slo_class)
    return upper.tolist(), estimator.miss_probabilities(mean, var, left_s)


def _planned(plan: Plan) -> Iterator[_Part]:
    now = plan.made_at
    for queue in plan.queues:
        for placed in queue.groups:
            group = placed.group
            yield (
                placed.finish_mean - now,
                placed.finish_var,
                group.deadline - now,
                (group.model, group.slo_class),
                f"let go: {placed.reason}" if placed.shed else placed.reason,
                group.batches,
            )


def _assigned(snapshot: Snapshot, estimator: Estimator) -> Iterator[_Part]:
    for i, view in enumerate(snapshot.instances):
        for own in view.assigned:
            if own.requests > 0 and estimator.serves(i, own.model):
                mean, var = estimator.ready(i).ends[own.run_id, own.generation]
                yield (
                    mean + estimator.tail_s(i, own),
                    var,
                    own.deadline - snapshot.now,
                    (own.model, SloClass.BATCH),
                    f"running on {view.name}; model {own.model}",
                    (own.batch_id,),
                )
