"""What a policy is, and how the order it chose becomes a plan."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

from qlm_batch.domain.snapshot import (
    Plan,
    PlannedGroup,
    RequestGroup,
    Snapshot,
    VirtualQueue,
)
from qlm_batch.scheduling.problem import START, Durations, Problem, Queues
from qlm_batch.scheduling.triage import append_tail, why_shed


class Policy(Protocol):
    """Decides who runs where and in which order. Pure: equal arguments give equal plans."""

    @property
    def name(self) -> str:
        """As in settings and tables."""
        ...

    def plan(
        self,
        snapshot: Snapshot,
        groups: Sequence[RequestGroup],
        estimator: Durations,
        moves: int,
        seed: int,
    ) -> Plan:
        """Every group exactly once, in a queue or unplaced; `moves` bounds the search, if any.

        The plan carries no estimates for batches; see `promises`.
        """
        ...


def to_plan(problem: Problem, queues: Queues, shed: Collection[int], policy: str) -> Plan:
    """The plan of these queues, groups in `shed` standing at their tails.

    What no instance serves is unplaced.
    """
    let_go = frozenset(shed)
    full = [list(queue) for queue in queues]
    append_tail(problem, full, let_go)
    now = problem.now
    planned: list[VirtualQueue] = []
    for i, queue in enumerate(full):
        walk = problem.walk(i, queue)
        entries = []
        start = float(problem.ready[i])
        for p, g in enumerate(queue):
            last = problem.model[queue[p - 1]] if p else START
            start += float(problem.setup[i, last, problem.model[g]])
            finish = walk.ends[p] + float(problem.tail[g, i])
            entries.append(
                PlannedGroup(
                    problem.groups[g],
                    start=now + start,
                    finish_mean=now + finish,
                    finish_var=walk.variances[p],
                    reason=why_shed(problem, g) if g in let_go else _place(problem, i, p, queue),
                    shed=g in let_go,
                )
            )
            start = walk.ends[p]
        planned.append(VirtualQueue(problem.instances[i].name, tuple(entries)))
    unplaced = tuple(
        PlannedGroup(
            group,
            start=now,
            finish_mean=now,
            finish_var=0.0,
            reason=f"no instance serves model {group.model}",
        )
        for g, group in enumerate(problem.groups)
        if not problem.placeable(g)
    )
    return Plan(now, policy, tuple(planned), unplaced)


def _place(problem: Problem, instance: int, position: int, queue: Sequence[int]) -> str:
    k = problem.model[queue[position]]
    name = problem.instances[instance].name
    ahead = f"{position} group{'s' if position != 1 else ''}"
    where = f"starts after {ahead} on {name}" if position else f"next on {name}"
    lost_s = float(problem.setup[instance, START, k])
    state = "awake" if lost_s == 0.0 else f"to be woken in {lost_s:.0f} s"
    return f"{where}; model {problem.models[k]} {state}"


def standing(problem: Problem, plan: Plan) -> tuple[Queues, list[int]] | None:
    """An earlier plan's order for today's groups, and those let go; None where it has no place.

    Groups that are gone drop out. None when a group was not in the plan, or an instance of it
    cannot serve any more.
    """
    index = {group.key: g for g, group in enumerate(problem.groups)}
    names = {view.name: i for i, view in enumerate(problem.instances)}
    queues, shed = problem.empty, []
    for queue in plan.queues:
        i = names.get(queue.instance, -1)
        for placed in queue.groups:
            g = index.pop(placed.group.key, -1)
            if g < 0:
                continue
            if placed.shed:
                shed.append(g)
            elif i >= 0 and problem.serves[i, problem.model[g]]:
                queues[i].append(g)
            else:
                return None
    if any(problem.placeable(g) for g in index.values()):
        return None
    return queues, shed
