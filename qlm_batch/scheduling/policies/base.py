"""What a policy is, and how the order it chose becomes a plan."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from qlm_batch.domain.snapshot import (
    Plan,
    PlannedGroup,
    RequestGroup,
    Snapshot,
    VirtualQueue,
)
from qlm_batch.scheduling.loops import loops
from qlm_batch.scheduling.problem import START, SWAP_PRICE, Durations, Problem, Queues
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
    times = problem.times(full)
    shares = problem.shares(times).tolist()
    where = np.repeat(np.arange(len(full)), np.diff(times.bounds))
    tails = problem.table.tail(times.flat, where)
    starts, finish = (times.starts + now).tolist(), (times.ends + tails + now).tolist()
    variances, bounds = times.variances.tolist(), times.bounds.tolist()
    planned: list[VirtualQueue] = []
    for i, queue in enumerate(full):
        name, states = problem.instances[i].name, _states(problem, i)
        entries = []
        for p, (g, n) in enumerate(zip(queue, range(bounds[i], bounds[i + 1]), strict=True)):
            shed_here = g in let_go
            if shed_here:
                reason = why_shed(problem, g)
            else:
                reason = f"{_where(p, name)}; {states[problem.model[g]]}"
                if shares[n] < 1.0:
                    reason += f"; about {100.0 * shares[n]:.0f} % of it in time"
            entries.append(
                PlannedGroup(
                    problem.groups[g],
                    start=starts[n],
                    finish_mean=finish[n],
                    finish_var=variances[n],
                    reason=reason,
                    shed=shed_here,
                    share=shares[n],
                )
            )
        planned.append(VirtualQueue(name, tuple(entries)))
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


def _states(problem: Problem, instance: int) -> list[str]:
    """For each model, what stands between it and its first token there."""
    lost = problem.setup[instance, START].tolist()
    return [
        f"model {model} {'awake' if lost_s == 0.0 else f'to be woken in {lost_s:.0f} s'}"
        for model, lost_s in zip(problem.models, lost, strict=True)
    ]


def _where(position: int, name: str) -> str:
    if not position:
        return f"next on {name}"
    return f"starts after {position} group{'s' if position != 1 else ''} on {name}"


@dataclass(slots=True)
class Standing:
    """An earlier plan's order for today's groups, those it let go, and those it does not know.

    `partly` are groups of the order that it knew would be on time in part only.
    """

    queues: Queues
    shed: list[int]
    new: list[int]
    partly: frozenset[int] = frozenset()

    def insert(self, problem: Problem) -> bool:
        """Put the new groups where they make nothing late; False where one fits nowhere."""
        if not self.queues:
            return not self.new
        room = max(len(queue) for queue in self.queues) + len(self.new)
        place = np.empty((len(self.queues), max(1, room)), dtype=np.int64)
        for i, queue in enumerate(self.queues):
            place[i, : len(queue)] = queue
        size = np.array([len(queue) for queue in self.queues], dtype=np.int64)
        for g in self.new:
            i, at = loops().insert_one(problem.columns, place, size, g, SWAP_PRICE)
            if i < 0:
                return False
            self.queues[i].insert(at, g)
            size[i] += 1
            place[i, : size[i]] = self.queues[i]
        self.new = []
        return True


def standing(problem: Problem, plan: Plan) -> Standing | None:
    """What an earlier plan says of today's groups; None where an instance lost a group's model.

    Groups that are gone drop out, and new ones that nobody serves are left out.
    """
    index = {group.key: g for g, group in enumerate(problem.groups)}
    names = {view.name: i for i, view in enumerate(problem.instances)}
    queues, shed, partly = problem.empty, [], set()
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
                if placed.share < 1.0:
                    partly.add(g)
            else:
                return None
    new = [g for g in index.values() if problem.placeable(g)]
    return Standing(queues, shed, new, frozenset(partly))
