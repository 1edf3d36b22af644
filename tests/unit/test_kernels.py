"""The compiled loops of planning give what the same loops give as they are written."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlm_batch.domain.jobs import EngineKind
from qlm_batch.domain.snapshot import RunView
from qlm_batch.scheduling import loops
from qlm_batch.scheduling.compiled import AVAILABLE
from qlm_batch.scheduling.estimator import Estimator
from qlm_batch.scheduling.grouping import form_groups
from qlm_batch.scheduling.lengthbook import DECAYS
from qlm_batch.scheduling.lengths import LengthDistribution, kaplan_meier, prior
from qlm_batch.scheduling.policies import policy
from qlm_batch.scheduling.policies.base import standing, to_plan
from tests.unit.planning_cases import instance, run_view, snapshot
from tests.unit.test_grouping import groups_of, runs
from tests.unit.test_planner import Case, case, cases

pytestmark = pytest.mark.skipif(not AVAILABLE, reason="numba is not installed")


@contextmanager
def as_written() -> Iterator[None]:
    """All planning inside uses the loops as they are written."""
    loops.hold_compiling()
    assert loops.loops() is loops.WRITTEN
    try:
        yield
    finally:
        loops.compile_all()
    assert loops.loops() is loops.COMPILED


@pytest.mark.parametrize("name", ["edf", "llf-shed", "shepherd", "qlm"])
@given(asked=cases())
@settings(max_examples=15, deadline=None)
def test_plans_are_the_same_to_the_last_bit(name: str, asked: Case) -> None:
    def plan() -> object:
        return policy(name).plan(asked.snapshot, asked.groups, asked.durations, 25, 3)

    fast = plan()
    with as_written():
        assert plan() == fast


@given(queue=runs, kept=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_groups_are_the_same(queue: list[RunView], kept: int) -> None:
    names = groups_of(queue)[::kept]
    fast = groups_of(queue[1:], names)
    with as_written():
        assert groups_of(queue[1:], names) == fast


@given(
    lengths=st.lists(st.integers(1, 500), min_size=1, max_size=20),
    asked=st.lists(st.tuples(st.integers(1, 600), st.integers(1, 99)), min_size=1, max_size=8),
)
@settings(max_examples=50, deadline=None)
def test_the_largest_of_many_is_the_same_and_that_of_each_limit(
    lengths: list[int], asked: list[tuple[int, int]]
) -> None:
    seen = kaplan_meier(lengths, np.ones(len(lengths)), [7.0, 90.0])
    limits, counts = np.array(asked, dtype=np.float64)[:, 0], np.array(asked)[:, 1]
    fast = np.array(seen.largest_under(limits, counts))
    with as_written():
        assert np.array_equal(seen.largest_under(limits, counts), fast)
    alone = [seen.capped(limit) for limit, _ in asked]
    for found, (own, (_, count)) in zip(fast.T, zip(alone, asked, strict=True), strict=True):
        assert found[0] == pytest.approx(own.largest_of(count))
        assert found[1] == pytest.approx(own.largest_var(count), abs=1e-6)


@given(asked=cases())
@settings(max_examples=25, deadline=None)
def test_arrivals_are_put_in_the_same_places(asked: Case) -> None:
    problem = asked.problem
    half = to_plan(Case(asked.snapshot, asked.groups[::2], asked.durations).problem, [
        [] for _ in asked.snapshot.instances
    ], (), "qlm")  # fmt: skip

    def inserted() -> object:
        kept = standing(problem, half)
        assert kept is not None
        return kept.insert(problem), kept.queues

    fast = inserted()
    with as_written():
        assert inserted() == fast


def test_compiling_ahead_covers_the_calls_of_a_plan() -> None:
    loops.compile_all()
    compiled = loops.COMPILED
    known = [len(loop.signatures) for loop in compiled]  # type: ignore[attr-defined]
    asked = case(
        [[10.0]] * 6,
        [25.0 + n for n in range(6)],
        ["a", "b"] * 3,
        [frozenset({"a", "b"})],
        swap=2.0,
    )
    plan = policy("qlm").plan(asked.snapshot, asked.groups, asked.durations, 25, 0)
    kept = standing(asked.problem, plan)
    assert kept is not None
    kept.insert(asked.problem)
    queue = [
        run_view(n, 9, deadline=200.0 * n, model=model, tenant=f"tenant-{n % 2}")
        for n, model in enumerate("abab", 1)
    ]
    fleet = [instance("i", ("a", "b")), instance("j", ("b", "a"), device="A10")]
    estimator = Estimator(seen := snapshot(runs=queue, instances=fleet))
    groups = form_groups(seen, estimator.capacities(seen))
    policy("qlm").plan(seen, groups, estimator, 25, 0)
    assert [len(loop.signatures) for loop in compiled] == known  # type: ignore[attr-defined]


@given(
    st.lists(st.integers(1, 2000), min_size=1, max_size=300),
    st.integers(0, 60),
)
@settings(deadline=None, max_examples=30)
def test_trust_is_judged_alike_compiled_and_as_written(lengths: list[int], first: int) -> None:
    answers = np.array(lengths, dtype=np.float64)
    memories = np.array(DECAYS)[:, None] ** np.arange(199, -1, -1, dtype=np.float64)
    memories.setflags(write=False)
    asked = (np.full(3, 1 / 3), answers, np.ones(answers.size), first, memories, 20, 9.0, 1000.0)
    fast = loops.COMPILED.trusted(*asked)
    assert fast.tolist() == loops.WRITTEN.trusted(*asked).tolist()
    assert fast.sum() == pytest.approx(1.0)


@given(
    st.lists(st.tuples(st.integers(0, 2000), st.booleans()), min_size=1, max_size=300),
    st.lists(st.integers(1, 2000), max_size=30),
    st.sampled_from([0.0, 8.0]),
)
@settings(deadline=None, max_examples=50)
def test_lengths_are_distributed_alike_compiled_and_as_written(
    answers: list[tuple[int, bool]], ages: list[int], lean: float
) -> None:
    lengths, cut = zip(*answers, strict=True)

    def found() -> LengthDistribution:
        return kaplan_meier(
            lengths, 0.98 ** np.arange(len(lengths)), ages, age_weight=0.7, fading=0.001,
            cut=cut, assumed=prior(EngineKind.GENERATE) if lean else None, lean=lean,
        )  # fmt: skip

    fast = found()
    with as_written():
        written = found()
    assert fast.values.tolist() == written.values.tolist()
    assert fast.probabilities.tolist() == written.probabilities.tolist()
