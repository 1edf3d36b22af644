"""Who is let go when not everything can be on time, and what becomes of them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from qlm_batch.domain.durations import in_words
from qlm_batch.scheduling.loops import loops
from qlm_batch.scheduling.problem import CLASS_RANK, START, Problem, Queues

_HOPELESS_S = 1e-9


def tail_order(problem: Problem, shed: Iterable[int]) -> list[int]:
    """Groups let go in the order in which they are still tried, the most worthy first.

    By class, then by weight per second of work, then by deadline.
    """
    order = np.array(sorted(shed), dtype=np.int64)
    rank = np.array([CLASS_RANK[problem.groups[g].slo_class] for g in order.tolist()])
    least = np.array(problem.least)[order]
    per_second = problem.columns.weight[order] / np.maximum(_HOPELESS_S, least)
    found: list[int] = order[np.lexsort((problem.columns.due[order], -per_second, rank))].tolist()
    return found


def append_tail(problem: Problem, queues: Queues, shed: Iterable[int]) -> None:
    """Put groups let go behind all others, each where it would end soonest.

    Groups that nobody serves are left out.
    """
    order = np.array(tail_order(problem, shed), dtype=np.int64)
    order = order[problem.able[order]]
    if not order.size:
        return
    times = problem.times(queues)
    ends = problem.ready.copy()
    last = np.full(len(queues), START, dtype=np.int64)
    for i, queue in enumerate(queues):
        if queue:
            ends[i] = times.ends[times.bounds[i + 1] - 1]
            last[i] = problem.model[queue[-1]]
    owners = loops().behind(problem.columns, order, ends, last).tolist()
    for g, i in zip(order.tolist(), owners, strict=True):
        queues[i].append(g)


def why_shed(problem: Problem, group: int) -> str:
    """The reason recorded for a group that was let go, by its own deadline, however it ages."""
    left_s, needs_s = problem.groups[group].deadline - problem.now, problem.least[group]
    if left_s <= 0.0:
        return f"its deadline passed {in_words(-left_s)} ago"
    if needs_s > left_s:
        return f"needs {in_words(needs_s)} on an idle instance, {in_words(left_s)} are left"
    return (
        f"needs {in_words(needs_s)}, {in_words(left_s)} are left, and its turn would come too late"
    )
