"""When each batch will be done, read off a plan: what users are shown."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat

import numpy as np

from qlm_batch.domain.jobs import Estimate
from qlm_batch.domain.snapshot import Plan, Snapshot
from qlm_batch.scheduling.calibration import Foreseen, beyond, bounds, chance
from qlm_batch.scheduling.estimator import VERSION, Estimator
from qlm_batch.scheduling.flows import EPSILON_S, fews
from qlm_batch.scheduling.places import Parts, Places, parts_of, places_of
from qlm_batch.scheduling.reasons import of_batch
from qlm_batch.scheduling.steady import Source, Steady, distinct
from qlm_batch.scheduling.worktable import Floats, Ints


@dataclass(slots=True)
class End:
    """When a batch is done: `told` of its last part, of this `model`, and why it is there.

    Work ahead of it is what stands before the first of the batch's groups in that queue.
    `miss` is the chance that its most endangered part is late.
    """

    model: str
    told: Foreseen
    miss: float
    reason: str


class Ends(Mapping[str, End]):
    """The end of each batch, kept as columns: of thousands only few are looked at."""

    def __init__(
        self,
        batches: Iterable[str],
        sources: Sequence[Source],
        of: Ints,
        told: Floats,
        misses: Sequence[float],
        reasons: Sequence[str],
    ) -> None:
        """The last part of each batch is `of` one of `sources`; `told` has the rows of Foreseen."""
        self._index = {batch_id: n for n, batch_id in enumerate(batches)}
        self._sources, self._of, self._told = sources, of, told
        self._misses, self._reasons = misses, reasons

    def __getitem__(self, batch_id: str) -> End:
        n = self._index[batch_id]
        mean_s, error, p50_s, p95_s, informed = self._told[:, n].tolist()
        told = Foreseen(mean_s, error, p50_s, p95_s, informed > 0.0)
        model, _, _ = self._sources[self._of[n]]
        return End(model, told, self._misses[n], self._reasons[n])

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)

    def estimates(self, now: float) -> dict[str, Estimate]:
        """All of them in absolute times."""
        p50, p95 = (now + self._told[2:4]).tolist()
        made = map(Estimate, p50, p95, self._misses, self._reasons, repeat(now))
        return dict(zip(self._index, made, strict=True))


def ends_of(plan: Plan, snapshot: Snapshot, estimator: Estimator) -> Ends:
    """When every batch that has queued or assigned work ends, where all of it is served.

    A batch ends with the last of its parts; it misses when its most endangered part does.
    """
    places = places_of(plan, snapshot, estimator)
    parts = parts_of(places, snapshot)
    if not parts.batches:
        return Ends((), (), np.zeros(0, dtype=np.int64), np.zeros((5, 0)), (), ())
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
    told = np.array((*bounds(mean, error, middle, high), informed))
    left_s = np.array([own.deadline for own in places.work])[parts.of] - plan.made_at
    late = beyond(left_s, told[2], told[3])
    # Each batch's parts together, the last to end first; of those that end alike the first placed.
    index: dict[str, int] = {}
    batch = np.array([index.setdefault(batch_id, len(index)) for batch_id in parts.batches])
    order = np.lexsort((parts.of, -told[2], batch))
    starts = np.searchsorted(batch[order], np.arange(len(index)))
    worst = np.minimum.reduceat(late[order], starts)
    for lost in plan.unplaced:
        for batch_id in lost.group.batches:
            index.pop(batch_id, None)
    kept = np.array(list(index.values()), dtype=np.int64)
    last = order[starts[kept]]
    of = parts.of[last]
    return Ends(
        index,
        places.sources,
        of,
        told[:, last],
        list(map(chance, worst[kept].tolist())),
        _reasons(
            places,
            of,
            _firsts(places, parts, order, starts)[kept],
            np.diff(starts, append=order.size)[kept],
        ),
    )


def _firsts(places: Places, parts: Parts, order: Ints, starts: Ints) -> Ints:
    """The first place of each batch in the queue that its last part stands in, if that is planned.

    `order` has the parts of a batch together, the last to end first, beginning at `starts`.
    """
    of = parts.of[order]
    queue = np.where(of < places.held, places.instance[of], -1)
    sizes = np.diff(starts, append=of.size)
    apart = queue != np.repeat(queue[starts], sizes)
    found: Ints = np.minimum.reduceat(np.where(apart, len(places.work), of), starts)
    return found


def _reasons(places: Places, of: Ints, first: Ints, parts: Ints) -> list[str]:
    """Why batches of so many parts are where they are whose last one is in places `of`."""
    told = [places.reasons[n] for n in of.tolist()]
    queues, begins = np.unique(places.instance[: places.held], return_index=True)
    head = dict(zip(queues.tolist(), begins.tolist(), strict=True))
    for b in np.flatnonzero((of < places.held) & (parts > 1)).tolist():
        n, begin = of.item(b), head[places.instance.item(of.item(b))]
        told[b] = of_batch(told[b], n - begin, first.item(b) - begin)
    return told


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


def with_estimates(plan: Plan, ends: Ends) -> Plan:
    """The plan with an estimate for every batch; without quantiles where a part is not served."""
    estimates = ends.estimates(plan.made_at)
    for placed in plan.unplaced:
        for batch_id in placed.group.batches:
            estimates[batch_id] = Estimate(None, None, None, placed.reason, plan.made_at)
    return replace(plan, estimates=estimates, estimator=VERSION)
