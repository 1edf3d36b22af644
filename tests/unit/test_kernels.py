"""The compiled loops of planning give what the same loops give as they are written."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from qlm_batch.scheduling import kernels
from qlm_batch.scheduling.compiled import AVAILABLE, plain
from qlm_batch.scheduling.policies import qlm
from qlm_batch.scheduling.policies.listing import by_deadline
from tests.unit.test_planner import Case, cases

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="numba is not installed")


def as_written(function: Any, *arguments: Any) -> Any:
    """Call a loop with every loop it calls as written."""
    names = [n for n in vars(kernels) if hasattr(getattr(kernels, n), "py_func")]
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(kernels, name, plain(getattr(kernels, name)))
        return plain(function)(*arguments)


@given(asked=cases())
@settings(max_examples=40, deadline=None)
def test_lists_are_the_same(asked: Case) -> None:
    problem = asked.problem
    order = problem.in_order([by_deadline(problem, g) for g in range(len(asked.groups))])
    for shed in (False, True):
        fast = kernels.in_order(problem.columns, order, shed)
        assert fast.tolist() == as_written(kernels.in_order, problem.columns, order, shed).tolist()


@given(asked=cases())
@settings(max_examples=40, deadline=None)
def test_insertions_are_the_same(asked: Case) -> None:
    problem = asked.problem
    order = problem.in_order([by_deadline(problem, g) for g in range(len(asked.groups))])
    results = []
    for call in (lambda f, *a: f(*a), as_written):
        machines = len(problem.instances)
        place = np.full((machines, order.size), -1, dtype=np.int64)
        size = np.zeros(machines, dtype=np.int64)
        owner = call(kernels.by_insertion, problem.columns, order, place, size, 1.0, 0.5)
        results.append((owner.tolist(), place.tolist(), size.tolist()))
    assert results[0] == results[1]


@given(asked=cases())
@settings(max_examples=25, deadline=None)
def test_searches_are_the_same(asked: Case) -> None:
    problem = asked.problem
    start = qlm.insert_all(problem)
    fast = qlm.improved(problem, start, 30, 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qlm, "search", lambda *a: as_written(kernels.search, *a))
        assert qlm.improved(problem, start, 30, 3) == fast
