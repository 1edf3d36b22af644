"""The QLM paper's global scheduler as a baseline: a mixed-integer program, else group EDF.

Patke et al., SoCC 2024: x[g, i, j] puts group g at position j of queue i; every group stands once,
a slot takes one group, waiting is the work ahead and a swap wherever the model changes, every
deadline is to be met, and the sum of waits is minimised. Corrected where the paper is loose: slots
fill from the front, a swap is charged between used slots and at the head, only where the model is
served, and the deadline holds for a group's end. Infeasible or too large, it falls back to EDF
over groups, as the paper does. Solved by HiGHS through SciPy (the extra `sim`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from qlm_batch.domain.errors import ConfigurationError
from qlm_batch.domain.snapshot import Plan, RequestGroup, Snapshot
from qlm_batch.scheduling.policies.base import to_plan
from qlm_batch.scheduling.policies.listing import by_deadline, list_schedule
from qlm_batch.scheduling.problem import START, Durations, Problem, Queues

MOST_BINARIES = 240
"""Placements beyond which the program is not tried: the solver would take minutes."""
NODES = 50
"""Search nodes of one solution: a count, so that equal snapshots give equal plans."""
_GAP = 0.05


@dataclass(frozen=True, slots=True)
class PaperPolicy:
    """See the module."""

    name: str = "qlm-paper"

    def plan(
        self,
        snapshot: Snapshot,
        groups: Sequence[RequestGroup],
        estimator: Durations,
        moves: int,
        seed: int,
    ) -> Plan:
        """See Policy; `moves` and `seed` are not used. ConfigurationError without SciPy."""
        problem = Problem(snapshot, groups, estimator)
        queues = solved(problem)
        if queues is None:
            queues, _ = list_schedule(problem, by_deadline, shed=False)
        return to_plan(problem, queues, (), self.name)


def solved(problem: Problem) -> Queues | None:
    """Queues in which every deadline is met, or None: infeasible, or too large to try."""
    able = [g for g in range(len(problem.groups)) if problem.placeable(g)]
    machines = [i for i in range(len(problem.instances)) if problem.serves[i].any()]
    if not able:
        return problem.empty
    depth = min(len(able), 2 * math.ceil(len(able) / len(machines)) + 1)
    if len(able) * len(machines) * depth > MOST_BINARIES:
        return None
    return _Program(problem, able, machines, depth).solve()


class _Program:
    """The program's rows; variables are the placements, then each slot's start, swap and wait."""

    def __init__(self, problem: Problem, able: list[int], machines: list[int], depth: int) -> None:
        self.p, self.able, self.machines, self.depth = problem, able, machines, depth
        self.slots = len(machines) * depth
        self.placements = len(able) * self.slots
        self.size = self.placements + 3 * self.slots
        self.rows: list[np.ndarray[Any, np.dtype[np.float64]]] = []
        self.low: list[float] = []
        self.high: list[float] = []
        finite = problem.setup[np.isfinite(problem.setup)]
        work_s = sum(max(self._work(g, i) for i in machines) for g in able)
        self.big = 1.0 + work_s + len(able) * float(finite.max(initial=0.0))
        self.big += float(problem.ready[machines].max()) + max(abs(problem.due[g]) for g in able)

    def _work(self, g: int, i: int) -> float:
        return self.p.mean(g, i) if self.p.serves[i, self.p.model[g]] else 0.0

    def _x(self, g: int, i: int, j: int) -> int:
        return g * self.slots + i * self.depth + j

    def _start(self, i: int, j: int) -> int:
        return self.placements + i * self.depth + j

    def _swap(self, i: int, j: int) -> int:
        return self.placements + self.slots + i * self.depth + j

    def _wait(self, i: int, j: int) -> int:
        return self.placements + 2 * self.slots + i * self.depth + j

    def _row(self, entries: dict[int, float], low: float, high: float) -> None:
        row = np.zeros(self.size)
        for column, value in entries.items():
            row[column] += value
        self.rows.append(row)
        self.low.append(low)
        self.high.append(high)

    def _rows(self) -> None:
        inf = math.inf
        count, deep = range(len(self.able)), range(self.depth)
        for g in count:
            everywhere = {self._x(g, i, j): 1.0 for i in range(len(self.machines)) for j in deep}
            self._row(everywhere, 1.0, 1.0)
        for i, machine in enumerate(self.machines):
            for j in deep:
                used = {self._x(g, i, j): 1.0 for g in count}
                self._row(used, 0.0, 1.0)
                if j:
                    ahead = {self._x(g, i, j - 1): -1.0 for g in count}
                    self._row({**used, **ahead}, -inf, 0.0)
                self._times(i, machine, j)

    def _times(self, i: int, machine: int, j: int) -> None:
        p, inf, count = self.p, math.inf, range(len(self.able))
        start, swap = self._start(i, j), self._swap(i, j)
        if j:
            # A slot starts when the one before it ends, after a swap.
            ends = {self._x(g, i, j - 1): -self._work(self.able[g], machine) for g in count}
            self._row({start: 1.0, self._start(i, j - 1): -1.0, swap: -1.0, **ends}, 0.0, inf)
        else:
            ready = float(p.ready[machine])
            self._row({start: 1.0, swap: -1.0}, ready, inf)
        for k in range(len(p.models)):
            if not p.serves[machine, k]:
                continue
            own = {self._x(g, i, j): 1.0 for g in count if p.model[self.able[g]] == k}
            if not j:
                lost = float(p.setup[machine, START, k])
                self._row({swap: 1.0, **dict.fromkeys(own, -lost)}, 0.0, inf)
                continue
            for a in range(len(p.models)):
                lost = float(p.setup[machine, a, k]) if p.serves[machine, a] else 0.0
                if lost > 0.0:
                    before = {
                        self._x(g, i, j - 1): -lost for g in count if p.model[self.able[g]] == a
                    }
                    now = dict.fromkeys(own, -lost)
                    self._row({swap: 1.0, **now, **before}, -lost, inf)
        used = {self._x(g, i, j): -self.big for g in count}
        self._row({self._wait(i, j): 1.0, start: -1.0, **used}, -self.big, inf)
        # Its end is within its deadline where the slot is used.
        ends = {
            self._x(n, i, j): self._work(g, machine)
            + (p.tail(g, machine) if p.serves[machine, p.model[g]] else 0.0)
            - p.due[g]
            + self.big
            for n, g in enumerate(self.able)
        }
        self._row({start: 1.0, **ends}, -inf, self.big)

    def solve(self) -> Queues | None:
        try:
            from scipy.optimize import Bounds, LinearConstraint, milp
        except ImportError as error:
            raise ConfigurationError(
                "The policy qlm-paper needs SciPy; install qlm-batch[sim], or set another policy."
            ) from error
        self._rows()
        upper = np.full(self.size, np.inf)
        upper[: self.placements] = 1.0
        for n, g in enumerate(self.able):
            for i, machine in enumerate(self.machines):
                if not self.p.serves[machine, self.p.model[g]]:
                    first = self._x(n, i, 0)
                    upper[first : first + self.depth] = 0.0
        whole = np.zeros(self.size)
        whole[: self.placements] = 1.0
        cost = np.zeros(self.size)
        cost[self.placements + 2 * self.slots :] = 1.0
        answer = milp(
            cost,
            constraints=LinearConstraint(np.array(self.rows), self.low, self.high),
            integrality=whole,
            bounds=Bounds(0.0, upper),
            options={"node_limit": NODES, "mip_rel_gap": _GAP},
        )
        if answer.x is None:
            return None
        queues = self.p.empty
        placed = np.round(answer.x[: self.placements]).reshape(-1, len(self.machines), self.depth)
        for i, machine in enumerate(self.machines):
            for j in range(self.depth):
                queues[machine] += [self.able[g] for g in np.flatnonzero(placed[:, i, j])]
        return queues


PAPER: Final = PaperPolicy()
