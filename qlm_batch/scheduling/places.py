"""Where everything queued or assigned stands, and which part of it is of which batch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qlm_batch.domain.snapshot import (
    AssignedView,
    InstanceState,
    Plan,
    PlannedGroup,
    RequestGroup,
    Snapshot,
)
from qlm_batch.scheduling.estimator import Estimator
from qlm_batch.scheduling.reasons import LET_GO
from qlm_batch.scheduling.steady import Source
from qlm_batch.scheduling.worktable import Floats, Ints


@dataclass(frozen=True, slots=True, eq=False)
class Places:
    """Work at instances: what is planned, and from `held` on what they hold already.

    Of each its source, its batches, why it is there, and the requests `inside` when it has begun.
    When its occupation of the instance begins and ends, as mean and variance, seconds from now;
    that of what is planned ends with its last request.
    """

    work: Sequence[RequestGroup | AssignedView]
    sources: Sequence[Source]
    batches: Sequence[tuple[str, ...]]
    reasons: Sequence[str]
    held: int
    instance: Ints
    inside: Floats
    start: Floats
    end: Floats
    var: Floats


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """Parts of batches: the place each is `of`, its requests, and the share of work behind it."""

    batches: Sequence[str]
    of: Ints
    requests: Floats
    behind: Floats


def places_of(plan: Plan, snapshot: Snapshot, estimator: Estimator) -> Places:
    """All places of a plan and a snapshot; what is assigned but not served is left out."""
    planned, where, inside = _planned(plan, snapshot, estimator)
    held = [
        (i, own)
        for i, view in enumerate(snapshot.instances)
        for own in view.assigned
        if own.requests > 0 and estimator.serves(i, own.model)
    ]
    groups = [placed.group for placed in planned]
    now = plan.made_at
    ends = [estimator.ready(i).ends[own.run_id, own.generation] for i, own in held]
    return Places(
        [*groups, *(own for _, own in held)],
        [(group.model, group.kind, group.tenant) for group in groups]
        + [(own.model, estimator.fleet.views[i][own.model].kind, own.tenant) for i, own in held],
        [group.batches for group in groups] + [(own.batch_id,) for _, own in held],
        [f"{LET_GO}{own.reason}" if own.shed else own.reason for own in planned]
        + [f"running on {snapshot.instances[i].name}; model {own.model}" for i, own in held],
        len(groups),
        np.array(where + [i for i, _ in held], dtype=np.int64),
        np.array(inside + [_in_hand(snapshot, i, estimator) for i, _ in held]),
        np.append(np.array([own.start for own in planned]) - now, np.zeros(len(held))),
        np.append(np.array([own.finish_mean for own in planned]) - now, [mean for mean, _ in ends]),
        np.array([own.finish_var for own in planned] + [var for _, var in ends]),
    )


def _planned(
    plan: Plan, snapshot: Snapshot, estimator: Estimator
) -> tuple[list[PlannedGroup], list[int], list[float]]:
    """What is planned, the instance of each, and the requests inside that when it has begun."""
    index = {view.name: i for i, view in enumerate(snapshot.instances)}
    planned: list[PlannedGroup] = []
    where: list[int] = []
    inside: list[float] = []
    for queue in plan.queues:
        if not queue.groups:
            continue
        i = index[queue.instance]
        count, awake = _in_hand(snapshot, i, estimator), estimator.ready(i).awake
        for placed in queue.groups:
            count += placed.group.requests if placed.group.model in awake else math.inf
            inside.append(count)
        planned += queue.groups
        where += [i] * len(queue.groups)
    return planned, where, inside


def _in_hand(snapshot: Snapshot, instance: int, estimator: Estimator) -> float:
    """The requests an instance has in hand; inf where what comes next cannot begin at once."""
    view, awake = snapshot.instances[instance], estimator.ready(instance).awake
    held = [own for own in view.assigned if own.requests > 0]
    if view.state is not InstanceState.READY or any(own.model not in awake for own in held):
        return math.inf
    return view.interactive_running + sum(own.requests for own in held)


def parts_of(places: Places, snapshot: Snapshot) -> Parts:
    """The parts that batches have in these places, those that have a place to themselves first."""
    sizes = list(map(len, places.batches))
    of = [n for n, size in enumerate(sizes) if size == 1]
    batches = [places.batches[n][0] for n in of]
    requests, behind = [places.work[n].requests for n in of], [0.0] * len(of)
    mixed = [
        (n, own)
        for n, size in enumerate(sizes)
        if size > 1 and isinstance(own := places.work[n], RequestGroup)
    ]
    batch_of: dict[tuple[int, int], str] = {}
    if any(len(own.parts) != sizes[n] for n, own in mixed):
        batch_of = {(run.run_id, run.generation): run.batch_id for run in snapshot.runs}
    for n, work in mixed:
        names = work.batches
        # Batches are in the order of parts, but some may be of the same one.
        if len(work.parts) != sizes[n]:
            names = tuple(batch_of[part.run_id, part.generation] for part in work.parts)
        slices, done = work.slices, 0
        for part, batch_id in zip(work.parts, names, strict=True):
            done += part.slices
            of.append(n)
            batches.append(batch_id)
            requests.append(max(1, round(work.requests * part.slices / slices)))
            behind.append(1.0 - done / slices)
    return Parts(
        batches,
        np.array(of, dtype=np.int64),
        np.array(requests, dtype=np.float64),
        np.array(behind),
    )
