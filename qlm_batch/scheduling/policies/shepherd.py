"""A SHEPHERD-like baseline: instances dedicated to models, and the largest batch first.

Zhang et al., NSDI 2023: a periodic integer program shares the fleet out among streams; within a
share the largest batch that can still be on time runs first. The program is approximated: every
instance goes to the model it hosts whose queued work per instance given so far is greatest. A group
is its batch. The engine batches continuously all the same, which flatters this baseline.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from qlm_batch.domain.snapshot import Plan, RequestGroup, Snapshot
from qlm_batch.scheduling.loops import loops
from qlm_batch.scheduling.policies.base import to_plan
from qlm_batch.scheduling.problem import Durations, Problem


@dataclass(frozen=True, slots=True)
class ShepherdPolicy:
    """See the module."""

    name: str = "shepherd"

    def plan(
        self,
        snapshot: Snapshot,
        groups: Sequence[RequestGroup],
        estimator: Durations,
        moves: int,
        seed: int,
    ) -> Plan:
        """See Policy; `moves` and `seed` are not used."""
        problem = Problem(snapshot, groups, estimator)
        order = problem.in_order(
            [(-group.requests, due) for group, due in zip(groups, problem.due, strict=True)]
        )
        owner = (
            loops().in_order(problem.columns._replace(serves=shares(problem)), order, True).tolist()
        )
        queues, let_go = problem.empty, []
        for g in order.tolist():
            if owner[g] >= 0:
                queues[owner[g]].append(g)
            else:
                let_go.append(g)
        return to_plan(problem, queues, let_go, self.name)


def shares(problem: Problem) -> NDArray[np.bool_]:
    """Which model each instance is dedicated to: one at most, of those it serves."""
    wanted = np.zeros(len(problem.models))
    for g, least in enumerate(problem.least):
        if problem.placeable(g):
            wanted[problem.model[g]] += least
    given = np.zeros(len(problem.models))
    mine = np.zeros_like(problem.serves)
    # Those with the fewest choices choose first.
    for i in np.argsort(problem.serves.sum(axis=1), kind="stable").tolist():
        hosted = np.flatnonzero(problem.serves[i])
        if hosted.size:
            pressing = wanted[hosted] / (given[hosted] + 1.0)
            # Of equal ones, what is awake.
            k = int(hosted[np.lexsort((~problem.awake[i, hosted], -pressing))[0]])
            mine[i, k], given[k] = True, given[k] + 1.0
    return mine


SHEPHERD: Final = ShepherdPolicy()
