"""When each batch will be done, read off a plan: what users are shown."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import repeat

import numpy as np

from qlm_batch.domain.jobs import Estimate
from qlm_batch.domain.snapshot import Plan, Snapshot
from qlm_batch.scheduling.calibration import Foreseen, beyond, bounds, chance
from qlm_batch.scheduling.estimator import VERSION, Estimator
from qlm_batch.scheduling.flows import EPSILON_S, fews
from qlm_batch.scheduling.places import Parts, Places, parts_of, places_of
from qlm_batch.scheduling.steady import Steady, distinct
from qlm_batch.scheduling.worktable import Floats


@dataclass(slots=True)
class End:
    """When a batch is done: `told` of its last part, of this `model`, and why it is there.

    `miss` is the chance that its most endangered part is late.
    """

    model: str
    told: Foreseen
    miss: float
    reason: str


def ends_of(plan: Plan, snapshot: Snapshot, estimator: Estimator) -> Mapping[str, End]:
    """When every batch that has queued or assigned work ends, where all of it is served.

    A batch ends with the last of its parts; it misses when its most endangered part does.
    """
    places = places_of(plan, snapshot, estimator)
    parts = parts_of(places, snapshot)
    if not parts.batches:
        return {}
    work = estimator.steady(places.work, places.sources)
    mean, var = _part_ends(places, parts, work, estimator)
    # What is told beside that is the same for all work of one source at one class of instances.
    source = np.repeat(np.arange(len(work.rows.sources)), np.diff(work.rows.bounds))[work.kind]
    first, which = distinct(source, estimator.fleet.classes[places.instance])
    doubts = [
        estimator.doubt(places.sources[n][0], i)
        for n, i in zip(first.tolist(), places.instance[first].tolist(), strict=True)
    ]
    middle, high, squared, informed = np.array(doubts).T[:, which[parts.of]]
    mean = np.maximum(EPSILON_S, mean)
    error = np.sqrt(np.log1p(np.maximum(0.0, var) / mean**2 + squared))
    told = bounds(mean, error, middle, high)
    left_s = np.array([own.deadline for own in places.work])[parts.of] - plan.made_at
    late = beyond(left_s, told[2], told[3])
    # Each batch's parts together, the last to end first; of those that end alike the first placed.
    index = {batch_id: n for n, batch_id in enumerate(dict.fromkeys(parts.batches))}
    batch = np.array([index[batch_id] for batch_id in parts.batches], dtype=np.int64)
    order = np.lexsort((parts.of, -told[2], batch))
    starts = np.searchsorted(batch[order], np.arange(len(index)))
    last = order[starts]
    ends = map(
        End,
        [places.sources[n][0] for n in parts.of[last].tolist()],
        map(Foreseen, *(part[last].tolist() for part in told), (informed[last] > 0.0).tolist()),
        map(chance, np.minimum.reduceat(late[order], starts).tolist()),
        [places.reasons[n] for n in parts.of[last].tolist()],
    )
    unserved = {batch_id for lost in plan.unplaced for batch_id in lost.group.batches}
    return {
        batch_id: end for batch_id, end in zip(index, ends, strict=True) if batch_id not in unserved
    }


def _part_ends(
    places: Places, parts: Parts, work: Steady, estimator: Estimator
) -> tuple[Floats, Floats]:
    """When each part ends, as mean and variance, seconds from now.

    Where all an instance has runs together, it ends when its longest request does; else in its
    turn, as a full instance ends it.
    """
    fleet, held = estimator.fleet, places.held
    place, slow = fleet.classes[places.instance], fleet.slow[places.instance]
    every = np.arange(len(places.work))
    end = places.end.copy()
    rest, at = work.kind[held:], place[held:]
    running = np.ceil(work.flows.running[rest, at])
    last = fews(np.minimum(work.requests[held:], running))
    end[held:] += work.tails(rest, at, last) * slow[held:]
    whole = work.lasts(every, place, slow, work.requests, places.inside)
    of = parts.of
    own = work.lasts(of, place[of], slow[of], parts.requests, places.inside[of])
    occupied = np.maximum(0.0, end - whole.mean - places.start)
    mean = end[of] - (whole.mean[of] - own.mean) - parts.behind * occupied[of]
    sooner = own.together & (own.mean < mean)
    return np.where(sooner, own.mean, mean), np.where(sooner, own.var, places.var[of] + own.var)


def with_estimates(plan: Plan, ends: Mapping[str, End]) -> Plan:
    """The plan with an estimate for every batch; without quantiles where a part is not served."""
    now = plan.made_at
    told = [end.told for end in ends.values()]
    made = map(
        Estimate,
        [now + end.p50_s for end in told],
        [now + end.p95_s for end in told],
        [end.miss for end in ends.values()],
        [end.reason for end in ends.values()],
        repeat(now),
    )
    estimates = dict(zip(ends, made, strict=True))
    for placed in plan.unplaced:
        for batch_id in placed.group.batches:
            estimates[batch_id] = Estimate(None, None, None, placed.reason, now)
    return replace(plan, estimates=estimates, estimator=VERSION)
