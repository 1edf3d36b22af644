"""The default policy: slack insertion, then ruin and recreate, never worse than edf-shed.

Groups are taken by deadline. Each is tried behind the last run of its own model, where it costs no
swap, and at the end of every queue, and goes where its queue then ends soonest, a swap counting
more than its time; only where nothing already placed becomes late. What fits nowhere is let go.

The search then empties a stretch of one queue and the queues that could take its groups, and puts
them back together with some that were let go, keeping what is worth at least as much.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Final

import numpy as np

from qlm_batch.domain.snapshot import Plan, RequestGroup, Snapshot
from qlm_batch.scheduling.policies.base import to_plan
from qlm_batch.scheduling.policies.listing import by_deadline, list_schedule
from qlm_batch.scheduling.problem import START, SWAP_PRICE, Durations, Problem, Queues, Walk

STAY_S: Final = 1.0
"""How much sooner a queue must end to take a group from the queue it stood in before."""
RUIN_QUEUES = 3
RUIN_GROUPS = 5
RECALLED = 4
"""Most groups let go that are tried again in one move."""
POSITIONS_PER_MOVE = 2048
"""Insertions tried in one move; a longer one is charged as several."""


def insert_all(problem: Problem) -> tuple[Queues, list[int]]:
    """Slack insertion by deadline: queues in which every group is on time, and those let go."""
    return _Insertion(problem).run()


class _Insertion:
    """Queues being filled, with what is needed to try a group on all instances at once.

    For instance i and model k, `spot[i, k]` is the position behind the last run of k (or the head,
    where k is awake at the start); `spot_end`, `spot_var` its time and `spot_slack` what the groups
    behind it can bear.
    """

    def __init__(self, problem: Problem) -> None:
        self.p = problem
        self.queues = problem.empty
        m, k = len(problem.instances), len(problem.models)
        self.rows = np.arange(m)
        self.ends, self.variances = problem.ready.copy(), problem.ready_var.copy()
        self.last = np.full(m, START)
        self.spot = np.zeros((m, k), dtype=np.int64)
        self.spot_end = np.where(problem.awake, problem.ready[:, None], np.inf)
        self.spot_var = np.repeat(problem.ready_var[:, None], k, axis=1)
        self.spot_slack = np.full((m, k), np.inf)

    def run(self) -> tuple[Queues, list[int]]:
        let_go = []
        for g in sorted(range(len(self.p.groups)), key=lambda g: by_deadline(self.p, g)):
            if self.p.placeable(g) and not self._insert(g):
                let_go.append(g)
        return self.queues, let_go

    def _insert(self, g: int) -> bool:
        p, k = self.p, self.p.model[g]
        mean, var, tail = p.mean[g], p.var[g], p.tail[g]
        serves = p.serves[:, k]
        setup = p.setup[self.rows, self.last, k]
        with np.errstate(invalid="ignore"):
            end = self.ends + setup + mean
            late = (end + tail) * p.inflation + p.z * np.sqrt(self.variances + var) - p.due[g]
            behind = (self.spot_end[:, k] + mean + tail) * p.inflation
            behind += p.z * np.sqrt(self.spot_var[:, k] + var) - p.due[g]
            push = mean * p.inflation + p.z * np.sqrt(var)
        at_end = serves & (late <= 0.0)
        in_run = serves & (behind <= 0.0) & (push <= self.spot_slack[:, k])
        price = np.where(at_end, end + SWAP_PRICE * setup, np.inf)
        price_in_run = np.where(in_run, self.ends + mean, np.inf)
        best = np.minimum(price, price_in_run)
        if p.before[g] >= 0:
            best[p.before[g]] -= STAY_S
        i = int(best.argmin())
        if not math.isfinite(best[i]):
            return False
        if price[i] <= price_in_run[i]:
            self._append(i, g)
        else:
            self.queues[i].insert(int(self.spot[i, k]), g)
            self._rewalk(i)
        return True

    def _append(self, i: int, g: int) -> None:
        p, k, queue = self.p, self.p.model[g], self.queues[i]
        self.ends[i] += p.setup[i, self.last[i], k] + p.mean[g, i]
        self.variances[i] += p.var[g, i]
        done = p.done(float(self.ends[i] + p.tail[g, i]), float(self.variances[i]))
        # A run at the queue's end has nothing behind it yet, and so no bound; now it has one.
        np.minimum(self.spot_slack[i], p.due[g] - done, out=self.spot_slack[i])
        if self.last[i] != k:
            self._charge_drains(i, int(self.last[i]), k)
        queue.append(g)
        self.last[i] = k
        self._mark(i, k, len(queue), math.inf)

    def _charge_drains(self, i: int, last: int, k: int) -> None:
        """A head spot changes the first swap; keep it only where it does not."""
        if last != START:
            return
        for other in np.flatnonzero(self.p.awake[i]):
            extra = self.p.setup[i, other, k] - self.p.setup[i, START, k]
            if extra > 0.0:
                self.spot_end[i, other] = np.inf

    def _mark(self, i: int, k: int, position: int, slack: float) -> None:
        self.spot[i, k] = position
        self.spot_end[i, k], self.spot_var[i, k] = self.ends[i], self.variances[i]
        self.spot_slack[i, k] = slack

    def _rewalk(self, i: int) -> None:
        p, queue = self.p, self.queues[i]
        walk = p.walk(i, queue)
        slack = p.slack(queue, walk)
        first = p.model[queue[0]]
        for k in np.flatnonzero(p.awake[i]):
            free = p.setup[i, k, first] <= p.setup[i, START, first]
            self.spot[i, k] = 0
            self.spot_end[i, k] = p.ready[i] if free else np.inf
            self.spot_var[i, k] = p.ready_var[i]
            self.spot_slack[i, k] = slack[0]
        for position, g in enumerate(queue):
            k = p.model[g]
            self.spot[i, k] = position + 1
            self.spot_end[i, k] = walk.ends[position]
            self.spot_var[i, k] = walk.variances[position]
            self.spot_slack[i, k] = slack[position + 1]
        self.ends[i], self.variances[i] = walk.ends[-1], walk.variances[-1]
        self.last[i] = p.model[queue[-1]]


@dataclass(slots=True)
class _Queue:
    """A queue with its times, slack and worth; replaced, never changed."""

    groups: list[int]
    walk: Walk
    slack: list[float]
    worth: float


class _Search:
    """Ruin and recreate over queues in which every group is on time."""

    def __init__(self, problem: Problem, queues: Queues, let_go: Sequence[int], seed: int) -> None:
        self.p = problem
        self.let_go = list(let_go)
        self.rng = np.random.default_rng(seed)
        self.queues = [self._made(i, list(queue)) for i, queue in enumerate(queues)]
        self.mean: list[list[float]] = problem.mean.tolist()
        self.var: list[list[float]] = problem.var.tolist()
        self.tail: list[list[float]] = problem.tail.tolist()
        self.setup: list[list[list[float]]] = problem.setup.tolist()
        self.tried = 0

    def _made(self, i: int, groups: list[int]) -> _Queue:
        walk = self.p.walk(i, groups)
        worth = sum(self.p.weight[g] for g in groups) - self.p.price(walk.swap_s)
        return _Queue(groups, walk, self.p.slack(groups, walk), worth)

    def run(self, moves: int) -> tuple[Queues, list[int]]:
        busy = [i for i, queue in enumerate(self.queues) if self.p.serves[i].any()]
        budget = float(moves)
        while budget > 0.0 and busy and self._improvable():
            self.tried = 0
            self._move(busy)
            budget -= max(1.0, self.tried / POSITIONS_PER_MOVE)
        return [queue.groups for queue in self.queues], self.let_go

    def _improvable(self) -> bool:
        """Whether anything is let go or swapped for; else no schedule is worth more."""
        return bool(self.let_go) or any(queue.walk.swap_s > 0.0 for queue in self.queues)

    def _move(self, busy: Sequence[int]) -> None:
        chosen = self._related(busy)
        kept: dict[int, _Queue] = {}
        out: list[int] = []
        for i in chosen:
            groups = self.queues[i].groups
            if groups:
                size = int(self.rng.integers(1, RUIN_GROUPS + 1))
                start = int(self.rng.integers(0, max(1, len(groups) - size + 1)))
                out += groups[start : start + size]
                kept[i] = self._made(i, groups[:start] + groups[start + size :])
            else:
                kept[i] = self.queues[i]
        recalled = self._recalled(chosen)
        before = sum(self.queues[i].worth for i in chosen)
        left = self._recreate(kept, self._ordered(out + recalled))
        after = sum(queue.worth for queue in kept.values())
        if after < before:
            return
        for i, queue in kept.items():
            self.queues[i] = queue
        gone = set(recalled)
        self.let_go = [g for g in self.let_go if g not in gone] + left

    def _related(self, busy: Sequence[int]) -> list[int]:
        """An instance, and others that serve what it serves."""
        first = busy[int(self.rng.integers(len(busy)))]
        alike = [i for i in busy if i != first and (self.p.serves[i] & self.p.serves[first]).any()]
        take = min(len(alike), int(self.rng.integers(0, RUIN_QUEUES)))
        others = self.rng.choice(len(alike), size=take, replace=False) if take else ()
        return [first, *(alike[int(o)] for o in others)]

    def _recalled(self, chosen: Sequence[int]) -> list[int]:
        count = min(len(self.let_go), RECALLED)
        picked = self.rng.choice(len(self.let_go), size=count, replace=False) if count else ()
        groups = [self.let_go[int(g)] for g in picked]
        return [g for g in groups if any(self.p.serves[i, self.p.model[g]] for i in chosen)]

    def _ordered(self, groups: list[int]) -> list[int]:
        how = int(self.rng.integers(3))
        if how == 0:
            return sorted(groups, key=lambda g: (self.p.due[g], g))
        if how == 1:
            return sorted(groups, key=lambda g: (-self.p.weight[g] / self.p.least[g], g))
        return [groups[int(o)] for o in self.rng.permutation(len(groups))]

    def _recreate(self, kept: dict[int, _Queue], groups: Sequence[int]) -> list[int]:
        """Put each where it costs least; returns those that fit nowhere."""
        left = []
        for g in groups:
            best = (math.inf, -1, 0)
            for i, queue in kept.items():
                if self.p.serves[i, self.p.model[g]]:
                    cost, position = self._cheapest(i, queue, g)
                    if cost < best[0]:
                        best = (cost, i, position)
            _, i, position = best
            if i < 0:
                left.append(g)
                continue
            old = kept[i].groups
            kept[i] = self._made(i, [*old[:position], g, *old[position:]])
        return left

    def _cheapest(self, i: int, queue: _Queue, g: int) -> tuple[float, int]:
        """The least time a group adds to a queue, and where; inf where it fits nowhere."""
        p, setup, groups, model = self.p, self.setup[i], queue.groups, self.p.model
        k, due = model[g], self.p.due[g]
        mean, var, tail = self.mean[g][i], self.var[g][i], self.tail[g][i]
        push_var = p.z * math.sqrt(var)
        end, end_var, last = float(p.ready[i]), float(p.ready_var[i]), START
        best, where = math.inf, -1
        self.tried += len(groups) + 1
        for position in range(len(groups) + 1):
            lead = setup[last][k]
            if (end + mean) * p.inflation > due:
                break
            follow = groups[position] if position < len(groups) else -1
            added = mean + lead
            if follow >= 0:
                added += setup[k][model[follow]] - setup[last][model[follow]]
            cost = added + SWAP_PRICE * (added - mean)
            if (
                cost < best
                and added * p.inflation + push_var <= queue.slack[position]
                and p.done(end + lead + mean + tail, end_var + var) <= due
            ):
                best, where = cost, position
            if follow >= 0:
                end, end_var = queue.walk.ends[position], queue.walk.variances[position]
                last = model[follow]
        return best, where


def _by_deadline_in_runs(problem: Problem, instance: int, queue: list[int]) -> list[int]:
    """The queue with each run of one model by deadline, unless that made something late.

    The search is indifferent to order as long as all is on time; what happens later is not.
    """
    tidy: list[int] = []
    for _, run in groupby(queue, key=lambda g: problem.model[g]):
        tidy += sorted(run, key=lambda g: by_deadline(problem, g))
    walk = problem.walk(instance, tidy)
    return tidy if problem.slack(tidy, walk)[0] >= 0.0 else queue


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

    def schedule(self, problem: Problem, moves: int, seed: int) -> tuple[Queues, list[int]]:
        """The best schedule found, and the groups let go."""
        plain = list_schedule(problem, by_deadline, shed=True)
        floor = problem.score(plain[0])
        inserted = insert_all(problem)
        better = problem.score(inserted[0]).objective >= floor.objective
        start = inserted if better else plain
        found = _Search(problem, *start, seed).run(moves)
        score = problem.score(found[0])
        if score.on_time < floor.on_time or score.objective < floor.objective:
            return plain
        return [_by_deadline_in_runs(problem, i, q) for i, q in enumerate(found[0])], found[1]


QLM: Final = QlmPolicy()
