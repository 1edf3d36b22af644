"""The default policy: slack insertion, then ruin and recreate, never worse than edf-shed.

Groups are taken by deadline. Each is tried behind the last run of its own model, where it costs no
swap, and at the end of every queue, and goes where its queue then ends soonest, a swap counting
more than its time; only where nothing already placed becomes late. What fits nowhere is let go.
Where that happens and tenants compete, those that had less are inserted first.

The search then empties a stretch of a few queues and puts the groups back together with some that
were let go, keeping what is worth at least as much. At last, what cannot be on time as a whole is
put where a part of it is, if that makes nothing else late, and what could fit if all goes well is
kept too. The loops are in `kernels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np

from qlm_batch.domain.snapshot import Plan, RequestGroup, Snapshot
from qlm_batch.scheduling.fairness import entitled
from qlm_batch.scheduling.kernels import Columns, Flags, Ints
from qlm_batch.scheduling.loops import loops
from qlm_batch.scheduling.policies.base import to_plan
from qlm_batch.scheduling.policies.listing import by_deadline, list_schedule
from qlm_batch.scheduling.problem import SWAP_PRICE, Durations, Problem, Queues
from qlm_batch.scheduling.triage import tail_order

STAY_S: Final = 1.0
"""How much sooner a queue must end to take a group from the queue it stood in before."""
LEAST_SHARE: Final = 0.1
"""Work of which less than this would be on time stays let go."""
HOPE: Final = 3.0
"""By how many of the model's standard errors things may go better than estimated."""
_LEAST_HOPE: Final = 0.5
_NO_SWAP: Final = 100.0
_TRIES = 50_000
"""Places looked at for work that is late in part, so that a plan's time is bounded."""
_ROOM = 64
"""Places beyond the longest queue into which the search may grow one."""

Schedule = tuple[Queues, list[int]]


def insert_all(problem: Problem, first: Flags | None = None) -> Schedule:
    """Slack insertion by deadline: queues in which every group is on time, and those let go.

    Groups marked in `first` are inserted before all others.
    """
    order = problem.by_deadline
    if first is not None:
        early = first[order]
        order = np.concatenate((order[early], order[~early]))
    return _inserted(problem, order)


def _inserted(problem: Problem, order: Ints) -> Schedule:
    machines = len(problem.instances)
    place = np.empty((machines, order.size), dtype=np.int64)
    size = np.zeros(machines, dtype=np.int64)
    owner = loops().by_insertion(problem.columns, order, place, size, STAY_S, SWAP_PRICE)
    return _queues(place, size), [g for g in order.tolist() if owner[g] < 0]


def _queues(place: Ints, size: Ints) -> Queues:
    return [place[i, :n].tolist() for i, n in enumerate(size.tolist())]


def improved(problem: Problem, schedule: Schedule, moves: int, seed: int) -> Schedule:
    """The schedule after so many ruins and recreations; everything in it must be on time."""
    queues, let_go = schedule
    if moves <= 0 or not queues:
        return schedule
    room = min(len(problem.groups), max(len(queue) for queue in queues) + _ROOM)
    place = np.empty((len(queues), max(1, room)), dtype=np.int64)
    for i, queue in enumerate(queues):
        place[i, : len(queue)] = queue
    size = np.array([len(queue) for queue in queues], dtype=np.int64)
    gone = np.empty(max(1, len(problem.groups)), dtype=np.int64)
    gone[: len(let_go)] = let_go
    left = loops().search(
        problem.columns,
        np.array(problem.least, dtype=np.float64),
        place,
        size,
        gone,
        len(let_go),
        moves,
        seed,
        SWAP_PRICE,
        problem.price(1.0),
    )
    return _queues(place, size), gone[:left].tolist()


def with_late(problem: Problem, schedule: Schedule) -> Schedule:
    """The schedule with what was let go put where a part of it is on time, most worthy first.

    Nothing of the schedule becomes late by it. Then, by deadline, what would fit if all went well:
    to let work go is final and an estimate is not. That costs no swap, and nothing where the
    estimates are exact.
    """
    cautious = problem.columns
    order = np.array(tail_order(problem, schedule[1]), dtype=np.int64)
    schedule = _put_late(problem, schedule, order, cautious, problem.price(1.0))
    hope = 1.0 - HOPE * problem.model_error
    if hope >= 1.0 or not schedule[1]:
        return schedule
    hopeful = cautious._replace(z=0.0, inflation=max(_LEAST_HOPE, hope))
    order = np.array(schedule[1], dtype=np.int64)
    order = order[np.argsort(problem.rank[order], kind="stable")]
    return _put_late(problem, schedule, order, hopeful, _NO_SWAP * problem.price(1.0))


def _put_late(
    problem: Problem, schedule: Schedule, order: Ints, columns: Columns, price: float
) -> Schedule:
    """One pass of `insert_late` by these columns; runs of one model are by deadline afterwards."""
    queues, let_go = schedule
    order = order[columns.due[order] > 0.0]
    if not order.size or not queues:
        return schedule
    room = min(len(problem.groups), max(len(queue) for queue in queues) + order.size)
    place = np.empty((len(queues), max(1, room)), dtype=np.int64)
    for i, queue in enumerate(queues):
        place[i, : len(queue)] = queue
    size = np.array([len(queue) for queue in queues], dtype=np.int64)
    movable = columns._replace(due=columns.due.copy())
    placed = loops().insert_late(
        movable,
        columns.due,
        problem.lines,
        problem.table.excess,
        problem.table.classes,
        problem.table.slow,
        place,
        size,
        order,
        LEAST_SHARE,
        price,
        _TRIES,
    )
    chosen = set(order[placed].tolist())
    if not chosen:
        return schedule
    tidy = _tidied(problem, movable, _queues(place, size))
    return tidy, [g for g in let_go if g not in chosen]


def _fairly(problem: Problem, schedule: Schedule) -> Schedule:
    """The better of this schedule and one that inserts first what tenants and classes are owed."""
    queues, let_go = schedule
    owed = problem.floor[let_go].any()
    if not owed and len({group.tenant for group in problem.groups}) < 2:
        return schedule
    work_s = np.where(problem.able, problem.least, 0.0).tolist()
    placed_s = sum(work_s[g] for queue in queues for g in queue)
    first = entitled(problem.virtual, work_s, placed_s)
    fair = insert_all(problem, first | problem.floor)
    worth, fair_worth = (problem.score(q).objective for q in (queues, fair[0]))
    return fair if fair_worth > worth else schedule


def _tidied(problem: Problem, columns: Columns, queues: Queues) -> Queues:
    """The queues with each run of one model by deadline, but where that made something late.

    The search is indifferent to order as long as all is on time; what happens later is not.
    """
    flat, bounds = problem.laid_out(queues)
    tidy = loops().tidied(columns, problem.rank, flat, bounds).tolist()
    return [tidy[start:stop] for start, stop in pairwise(bounds.tolist())]


@dataclass(frozen=True, slots=True)
class QlmPolicy:
    """See the module."""

    name: str = "qlm"

    def plan(
        self,
        snapshot: Snapshot,
        groups: Sequence[RequestGroup],
        estimator: Durations,
        moves: int,
        seed: int,
    ) -> Plan:
        """See Policy; one move is one ruin and recreate."""
        problem = Problem(snapshot, groups, estimator)
        queues, let_go = self.schedule(problem, moves, seed)
        return to_plan(problem, queues, let_go, self.name)

    def schedule(self, problem: Problem, moves: int, seed: int) -> Schedule:
        """The best schedule found, and the groups let go."""
        plain = list_schedule(problem, by_deadline, shed=True)
        floor = problem.score(plain[0])
        inserted = insert_all(problem)
        if inserted[1]:
            inserted = _fairly(problem, inserted)
        better = problem.score(inserted[0]).objective >= floor.objective
        found = improved(problem, inserted if better else plain, moves, seed)
        score = problem.score(found[0])
        if score.on_time < floor.on_time or score.objective < floor.objective:
            return with_late(problem, plain)
        return with_late(problem, (_tidied(problem, problem.columns, found[0]), found[1]))


QLM: Final = QlmPolicy()
