"""What a policy is, and how the order it chose becomes a plan."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from qlm_batch.domain.durations import in_words
from qlm_batch.domain.snapshot import (
    Plan,
    PlannedGroup,
    RequestGroup,
    Snapshot,
    VirtualQueue,
)
from qlm_batch.scheduling.loops import loops
from qlm_batch.scheduling.problem import START, SWAP_PRICE, Durations, Problem, Queues
from qlm_batch.scheduling.reasons import after, in_time
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
    where = np.repeat(np.arange(len(full)), np.diff(times.bounds))
    tails = problem.table.tail(times.flat, where)
    columns = zip(
        (times.starts + now).tolist(),
        (times.ends + tails + now).tolist(),
        times.variances.tolist(),
        problem.shares(times).tolist(),
        strict=True,
    )
    places = [after(p) for p in range(max(map(len, full), default=0))]
    planned: list[VirtualQueue] = []
    for i, queue in enumerate(full):
        name = problem.instances[i].name
        states: dict[int, str] = {}
        entries = []
        for place, g in zip(places, queue, strict=False):
            start, finish, variance, share = next(columns)
            group = problem.groups[g]
            shed_here = g in let_go
            if shed_here:
                reason = why_shed(problem, g)
            else:
                k = problem.model[g]
                if k not in states:
                    states[k] = f"{name}; {_state(problem, i, k)}"
                late = problem.due[g] > group.deadline - now
                reason = place + states[k] + in_time(share, late=late)
            entries.append(PlannedGroup(group, start, finish, variance, reason, shed_here, share))
        planned.append(VirtualQueue(name, tuple(entries)))
    unplaced = tuple(
        PlannedGroup(
            group,
            start=now,
            finish_mean=now,
            finish_var=0.0,
            reason=f"no instance serves model {group.model}",
        )
        for group, able in zip(problem.groups, problem.able.tolist(), strict=True)
        if not able
    )
    return Plan(now, policy, tuple(planned), unplaced)


def _state(problem: Problem, instance: int, model: int) -> str:
    """What stands between a model and its first token there."""
    lost_s = float(problem.setup[instance, START, model])
    state = "awake" if lost_s == 0.0 else f"to be woken in {in_words(lost_s)}"
    return f"model {problem.models[model]} {state}"


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
