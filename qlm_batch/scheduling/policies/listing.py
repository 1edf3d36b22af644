"""One pass over the groups in a fixed order, each put where it would be done soonest."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from qlm_batch.domain.snapshot import Plan, RequestGroup, Snapshot
from qlm_batch.scheduling.loops import loops
from qlm_batch.scheduling.policies.base import to_plan
from qlm_batch.scheduling.problem import CLASS_RANK, Durations, Problem, Queues

Order = Callable[[Problem, int], tuple[float, ...]]


def by_arrival(problem: Problem, group: int) -> tuple[float, ...]:
    """First come, first served."""
    return (problem.groups[group].arrived_at,)


def by_class(problem: Problem, group: int) -> tuple[float, ...]:
    """Interactive work first, each class by arrival."""
    return (CLASS_RANK[problem.groups[group].slo_class], problem.groups[group].arrived_at)


def by_deadline(problem: Problem, group: int) -> tuple[float, ...]:
    """Earliest deadline first; of equal ones, the tenant's that had less."""
    return (problem.due[group], problem.virtual[group], problem.groups[group].arrived_at)


def by_laxity(problem: Problem, group: int) -> tuple[float, ...]:
    """Least time to spare first."""
    least = problem.least[group]
    return (problem.due[group] - (least if math.isfinite(least) else 0.0), problem.due[group])


def list_schedule(problem: Problem, order: Order, *, shed: bool) -> tuple[Queues, list[int]]:
    """Queues, and the groups let go: with `shed`, those that could be on time nowhere."""
    queues, let_go = problem.empty, []
    if order is by_deadline:
        ranked = problem.by_deadline
    else:
        ranked = problem.in_order([order(problem, g) for g in range(len(problem.groups))])
    owner = loops().in_order(problem.columns, ranked, shed).tolist()
    for g in ranked.tolist():
        if owner[g] >= 0:
            queues[owner[g]].append(g)
        else:
            let_go.append(g)
    return queues, let_go


@dataclass(frozen=True, slots=True)
class ListPolicy:
    """A baseline: a fixed order, with or without letting hopeless work go."""

    name: str
    order: Order
    shed: bool

    def plan(
        self,
        snapshot: Snapshot,
        groups: Sequence[RequestGroup],
        estimator: Durations,
        moves: int,
        seed: int,
    ) -> Plan:
        """See Policy; there is nothing to search, so `moves` and `seed` are not used."""
        problem = Problem(snapshot, groups, estimator)
        queues, let_go = list_schedule(problem, self.order, shed=self.shed)
        return to_plan(problem, queues, let_go, self.name)


FCFS: Final = ListPolicy("fcfs", by_arrival, shed=False)
PRIORITY: Final = ListPolicy("priority", by_class, shed=False)
EDF: Final = ListPolicy("edf", by_deadline, shed=False)
EDF_SHED: Final = ListPolicy("edf-shed", by_deadline, shed=True)
LLF_SHED: Final = ListPolicy("llf-shed", by_laxity, shed=True)
