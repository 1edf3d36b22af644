"""When each batch will be done, read off a plan: what users are shown."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from qlm_batch.domain.jobs import Estimate, SloClass
from qlm_batch.domain.snapshot import Plan, Snapshot
from qlm_batch.scheduling.estimator import VERSION, Estimator


@dataclass(frozen=True, slots=True)
class _Part:
    """The end of some of a batch's work, seconds from now."""

    mean: float
    var: float
    left_s: float
    model: str
    slo_class: SloClass
    reason: str


def with_estimates(plan: Plan, snapshot: Snapshot, estimator: Estimator) -> Plan:
    """The plan with an estimate for every batch that has queued or assigned work.

    A batch ends with the last of its parts; it misses when its most endangered part does. A batch
    with a part that no instance serves has no quantiles.
    """
    parts: dict[str, list[_Part]] = {}
    for batch_id, part in (*_planned(plan), *_assigned(snapshot, estimator)):
        parts.setdefault(batch_id, []).append(part)
    stuck = {
        batch_id: placed.reason for placed in plan.unplaced for batch_id in placed.group.batches
    }
    estimates: dict[str, Estimate] = {
        batch_id: Estimate(None, None, None, reason, snapshot.now)
        for batch_id, reason in stuck.items()
    }
    for batch_id, own in parts.items():
        if batch_id not in stuck:
            estimates[batch_id] = _estimate(own, snapshot.now, estimator)
    return replace(plan, estimates=estimates, estimator=VERSION)


def _estimate(parts: Iterable[_Part], now: float, estimator: Estimator) -> Estimate:
    own = tuple(parts)
    last = max(own, key=lambda part: part.mean)
    p50 = max(0.0, last.mean)
    p95 = max(estimator.upper(part.mean, part.var, part.model, part.slo_class) for part in own)
    miss = max(estimator.miss_probability(part.mean, part.var, part.left_s) for part in own)
    return Estimate(now + p50, now + max(p50, p95), miss, last.reason, now)


def _planned(plan: Plan) -> Iterable[tuple[str, _Part]]:
    for queue in plan.queues:
        for placed in queue.groups:
            group = placed.group
            part = _Part(
                placed.finish_mean - plan.made_at,
                placed.finish_var,
                group.deadline - plan.made_at,
                group.model,
                group.slo_class,
                f"let go: {placed.reason}" if placed.shed else placed.reason,
            )
            for batch_id in group.batches:
                yield batch_id, part


def _assigned(snapshot: Snapshot, estimator: Estimator) -> Iterable[tuple[str, _Part]]:
    for i, view in enumerate(snapshot.instances):
        working = [
            own for own in view.assigned if own.requests > 0 and estimator.serves(i, own.model)
        ]
        if not working:
            continue
        ready = estimator.ready(i)
        for own in working:
            yield (
                own.batch_id,
                _Part(
                    ready.mean + estimator.tail_s(i, own),
                    ready.var,
                    own.deadline - snapshot.now,
                    own.model,
                    SloClass.BATCH,
                    f"running on {view.name}; model {own.model}",
                ),
            )
