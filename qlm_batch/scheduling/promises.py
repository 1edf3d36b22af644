"""When each batch will be done, read off a plan: what users are shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, repeat

import numpy as np
from numpy.typing import NDArray

from qlm_batch.domain.jobs import Estimate, SloClass
from qlm_batch.domain.snapshot import Plan, Snapshot
from qlm_batch.scheduling.estimator import VERSION, Estimator

Floats = NDArray[np.float64]


def with_estimates(plan: Plan, snapshot: Snapshot, estimator: Estimator) -> Plan:
    """The plan with an estimate for every batch that has queued or assigned work.

    A batch ends with the last of its parts; it misses when its most endangered part does. A batch
    with a part that no instance serves has no quantiles.
    """
    parts, now = _Parts(), snapshot.now
    parts.take_planned(plan)
    parts.take_assigned(snapshot, estimator)
    estimates = parts.estimates(now, estimator)
    for placed in plan.unplaced:
        for batch_id in placed.group.batches:
            estimates[batch_id] = Estimate(None, None, None, placed.reason, now)
    return replace(plan, estimates=estimates, estimator=VERSION)


@dataclass(slots=True)
class _Parts:
    """Pieces of work, column by column: mean and variance of each one's end, seconds from now, the
    time to its deadline, whose it is, why it ends then, and of which batches it is."""

    mean: list[float] = field(default_factory=list)
    var: list[float] = field(default_factory=list)
    left_s: list[float] = field(default_factory=list)
    owner: list[tuple[str, SloClass]] = field(default_factory=list)
    reason: list[str] = field(default_factory=list)
    batches: list[Sequence[str]] = field(default_factory=list)

    def take_planned(self, plan: Plan) -> None:
        """Add the groups of a plan's queues."""
        now = plan.made_at
        placed = [entry for queue in plan.queues for entry in queue.groups]
        groups = [entry.group for entry in placed]
        self.mean += [entry.finish_mean - now for entry in placed]
        self.var += [entry.finish_var for entry in placed]
        self.left_s += [group.deadline - now for group in groups]
        self.owner += [(group.model, group.slo_class) for group in groups]
        self.reason += [
            f"let go: {entry.reason}" if entry.shed else entry.reason for entry in placed
        ]
        self.batches += [group.batches for group in groups]

    def take_assigned(self, snapshot: Snapshot, estimator: Estimator) -> None:
        """Add what instances hold."""
        for i, view in enumerate(snapshot.instances):
            for own in view.assigned:
                if own.requests > 0 and estimator.serves(i, own.model):
                    mean, var = estimator.ready(i).ends[own.run_id, own.generation]
                    self.mean.append(mean + estimator.tail_s(i, own))
                    self.var.append(var)
                    self.left_s.append(own.deadline - snapshot.now)
                    self.owner.append((own.model, SloClass.BATCH))
                    self.reason.append(f"running on {view.name}; model {own.model}")
                    self.batches.append((own.batch_id,))

    def estimates(self, now: float, estimator: Estimator) -> dict[str, Estimate]:
        """By batch, in absolute times."""
        batches = list(chain.from_iterable(self.batches))
        if not batches:
            return {}
        index: dict[str, int] = {}
        owner = np.array([index.setdefault(batch_id, len(index)) for batch_id in batches])
        part = np.repeat(np.arange(len(self.batches)), list(map(len, self.batches)))
        mean, var, left_s = (np.array(own) for own in (self.mean, self.var, self.left_s))
        upper = self._upper(mean, var, estimator)
        miss = estimator.miss_probabilities(mean, var, left_s)
        # Each batch's parts together, the last to end first and of equal ones the first.
        order = np.lexsort((-mean[part], owner))
        begins = np.flatnonzero(np.diff(owner[order], prepend=-1))
        latest = part[order[begins]]
        p50 = np.maximum(0.0, mean[latest])
        p95 = np.maximum(p50, np.maximum.reduceat(upper[part[order]], begins))
        missed = np.maximum.reduceat(miss[part[order]], begins)
        reasons = [self.reason[n] for n in latest.tolist()]
        columns = (now + p50).tolist(), (now + p95).tolist(), missed.tolist(), reasons, repeat(now)
        return dict(zip(index, map(Estimate, *columns), strict=True))

    def _upper(self, mean: Floats, var: Floats, estimator: Estimator) -> Floats:
        """The bound shown to users of each part's end."""
        index = {owner: n for n, owner in enumerate(set(self.owner))}
        whose = np.array([index[owner] for owner in self.owner])
        upper = np.empty(mean.size)
        for (model, slo_class), n in index.items():
            own = np.flatnonzero(whose == n)
            upper[own] = estimator.upper(mean[own], var[own], model, slo_class)
        return upper
