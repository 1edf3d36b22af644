"""The QLM paper's global scheduler as a baseline: a mixed-integer program, else group EDF.

Patke et al., SoCC 2024: x[g, i, j] puts group g at position j of queue i; every group stands once,
a slot takes one group, waiting is the work ahead and a swap wherever the model changes, every
deadline is to be met, and the sum of waits is minimised. Corrected where the paper is loose: slots
fill without gaps, a swap is charged between used slots and at the head, only where the model is
served, and the deadline holds for a group's end. Positions count from a queue's end: what is at j
delays j others, so the sum of waits is linear in x, where counting from the head leaves the solver
a wait for every slot that nothing bounds until x is whole. Infeasible or too large, it falls back
to EDF over groups, as the paper does. Solved by HiGHS through SciPy (the extra `sim`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from qlm_batch.domain.errors import ConfigurationError
from qlm_batch.domain.snapshot import Plan, RequestGroup, Snapshot
from qlm_batch.scheduling.kernels import Ints
from qlm_batch.scheduling.policies.base import to_plan
from qlm_batch.scheduling.policies.listing import by_deadline, list_schedule
from qlm_batch.scheduling.problem import START, Durations, Floats, Problem, Queues

MOST_BINARIES = 240
"""Placements beyond which the program is not tried: the solver would take minutes."""
NODES = 50
"""Search nodes of one solution: a count, so that equal snapshots give equal plans."""
_GAP = 0.05

_Columns = Ints | np.int64


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
    """The program's rows; slot j of a queue has j groups behind it.

    Variables are the placements, then each slot's start and the time it swaps, then whether a slot
    brings in a model. Each queue has one slot more, never used, so that the first has one ahead.
    """

    def __init__(self, problem: Problem, able: list[int], machines: list[int], depth: int) -> None:
        self.p, self.able, self.machines, self.depth = problem, able, machines, depth
        count, queues, models = len(able), len(machines), len(problem.models)
        variables = np.arange((count + 2 + models) * queues * (depth + 1))
        columns = variables.reshape(count + 2 + models, queues, depth + 1)
        self.size = columns.size
        self.x, self.brings = columns[:count], columns[count + 2 :]
        self.start, self.swap = columns[count], columns[count + 1]
        self.of_model = [
            np.array([n for n, g in enumerate(able) if problem.model[g] == k], dtype=np.int64)
            for k in range(models)
        ]
        self.rows: list[Floats] = []
        self.low: list[float] = []
        self.high: list[float] = []

    def _row(self, low: float, high: float, *terms: tuple[_Columns, Floats | float]) -> None:
        row = np.zeros(self.size)
        for columns, factor in terms:
            row[columns] += factor
        self.rows.append(row)
        self.low.append(low)
        self.high.append(high)

    def _works(self, machine: int) -> tuple[Floats, Floats]:
        """What the groups take at an instance, and when they have to start there at the latest."""
        p = self.p
        served = [p.serves[machine, p.model[g]] for g in self.able]
        works = [p.mean(g, machine) if on else 0.0 for g, on in zip(self.able, served, strict=True)]
        latest = [
            p.due[g] - work - p.tail(g, machine) if on else 0.0
            for g, on, work in zip(self.able, served, works, strict=True)
        ]
        return np.array(works), np.array(latest)

    def _rows(self) -> None:
        inf = math.inf
        for everywhere in self.x:
            self._row(1.0, 1.0, (everywhere.ravel(), 1.0))
        for i, machine in enumerate(self.machines):
            ready = float(self.p.ready[machine])
            works, latest = self._works(machine)
            for j in range(self.depth):
                used, ahead = self.x[:, i, j], self.x[:, i, j + 1]
                start, swap = self.start[i, j], self.swap[i, j]
                self._row(0.0, 1.0, (used, 1.0))
                self._row(-inf, 0.0, (ahead, 1.0), (used, -1.0))
                # A slot starts when the one ahead of it ends, after a swap.
                behind = ((start, 1.0), (self.start[i, j + 1], -1.0), (swap, -1.0))
                self._row(0.0, inf, *behind, (ahead, -works))
                # An unused one starts at `ready`: all slots ahead of it are unused.
                self._row(-inf, ready, (start, 1.0), (used, ready - latest))
                self._swaps(i, machine, j)

    def _swaps(self, i: int, machine: int, j: int) -> None:
        """What a slot loses to a change of model, given what is ahead of it."""
        p, inf = self.p, math.inf
        used, ahead, swap = self.x[:, i, j], self.x[:, i, j + 1], self.swap[i, j]
        hosted = [k for k, own in enumerate(self.of_model) if own.size and p.serves[machine, k]]
        charged: list[tuple[_Columns, Floats | float]] = [(swap, 1.0)]
        for k in hosted:
            own, before = self.x[self.of_model[k], i, j], self.x[self.of_model[k], i, j + 1]
            first_s = float(p.setup[machine, START, k])
            after_s = {a: float(p.setup[machine, a, k]) for a in hosted if a != k}
            # It is brought in where it is not ahead; at the head, where it is not awake.
            brings = ((self.brings[k, i, j], 1.0), (own, -1.0), (before, 1.0))
            if first_s > 0.0:
                least_s = min((first_s, *after_s.values()))
                self._row(0.0, inf, *brings)
            else:
                least_s = min(after_s.values(), default=0.0)
                self._row(0.0, inf, *brings, (used, 1.0), (ahead, -1.0))
            charged.append((self.brings[k, i, j], -least_s))
            # What it costs beyond the least depends on what is ahead.
            if first_s > least_s:
                self._row(0.0, inf, (swap, 1.0), (own, -first_s), (ahead, first_s))
            for a, lost_s in after_s.items():
                if lost_s > least_s:
                    other = self.x[self.of_model[a], i, j + 1]
                    self._row(-lost_s, inf, (swap, 1.0), (own, -lost_s), (other, -lost_s))
        self._row(0.0, inf, *charged)

    def _bounds(self) -> tuple[Floats, Floats]:
        """The least and the most of every variable."""
        least, most = np.zeros(self.size), np.full(self.size, np.inf)
        least[self.start] = self.p.ready[self.machines][:, None]
        most[self.x] = 1.0
        most[self.x[:, :, self.depth]] = 0.0
        for n, g in enumerate(self.able):
            most[self.x[n, ~self.p.serves[self.machines, self.p.model[g]]]] = 0.0
        return least, most

    def _cost(self) -> Floats:
        """The sum of waits: what a slot takes delays all behind it, a swap itself too."""
        cost, behind = np.zeros(self.size), np.arange(self.depth + 1)
        for i, machine in enumerate(self.machines):
            works, _ = self._works(machine)
            cost[self.x[:, i]] = float(self.p.ready[machine]) + works[:, None] * behind
        cost[self.swap] = behind + 1.0
        return cost

    def solve(self) -> Queues | None:
        try:
            from scipy.optimize import Bounds, LinearConstraint, milp
        except ImportError as error:
            raise ConfigurationError(
                "The policy qlm-paper needs SciPy; install qlm-batch[sim], or set another policy."
            ) from error
        self._rows()
        whole = np.zeros(self.size)
        whole[self.x] = 1.0
        answer = milp(
            self._cost(),
            constraints=LinearConstraint(np.array(self.rows), self.low, self.high),
            integrality=whole,
            bounds=Bounds(*self._bounds()),
            options={"node_limit": NODES, "mip_rel_gap": _GAP},
        )
        if answer.x is None:
            return None
        queues = self.p.empty
        placed = np.round(answer.x[self.x])
        for i, machine in enumerate(self.machines):
            for j in reversed(range(self.depth)):
                queues[machine] += [self.able[g] for g in np.flatnonzero(placed[:, i, j])]
        return queues


PAPER: Final = PaperPolicy()
