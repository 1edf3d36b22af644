"""Plans: properties that every policy has, and the default one's promises."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlm_batch.domain.jobs import OnMiss
from qlm_batch.domain.snapshot import Plan, RequestGroup, Snapshot
from qlm_batch.scheduling.estimator import Estimator, EstimatorConfig
from qlm_batch.scheduling.policies import POLICIES, policy
from qlm_batch.scheduling.policies.listing import by_deadline, list_schedule
from qlm_batch.scheduling.policies.qlm import QLM, insert_all
from qlm_batch.scheduling.problem import Problem, Queues
from tests.unit.planning_cases import KnownDurations, group, instance, snapshot, work_of


@dataclass(frozen=True)
class Case:
    """A fleet with known durations and what is queued for it."""

    snapshot: Snapshot
    groups: tuple[RequestGroup, ...]
    durations: KnownDurations

    @property
    def problem(self) -> Problem:
        return Problem(self.snapshot, self.groups, self.durations)


def case(
    work: Sequence[Sequence[float]],
    due: Sequence[float],
    models: Sequence[str],
    serving: Sequence[frozenset[str]],
    *,
    awake: Sequence[frozenset[str]] | None = None,
    swap: float = 0.0,
    requests: Sequence[int] | None = None,
) -> Case:
    fleet = [instance(f"i{n}", sorted(hosted)) for n, hosted in enumerate(serving)]
    groups = tuple(
        group(f"g{n}", deadline=d, model=m, requests=requests[n] if requests else 1)
        for n, (d, m) in enumerate(zip(due, models, strict=True))
    )
    table = {f"g{n}": row for n, row in enumerate(work)}
    durations = KnownDurations(table, serving, awake=awake, swap=swap)
    return Case(snapshot(instances=fleet), groups, durations)


@st.composite
def cases(draw: st.DrawFn, most: int = 25) -> Case:
    models = ["a", "b", "c"]
    machines = draw(st.integers(1, 4))
    serving = [draw(st.frozensets(st.sampled_from(models), min_size=1)) for _ in range(machines)]
    awake = [frozenset({sorted(hosted)[0]}) for hosted in serving]
    count = draw(st.integers(0, most))
    seconds = st.floats(0.5, 60.0)
    return case(
        [draw(st.lists(seconds, min_size=machines, max_size=machines)) for _ in range(count)],
        draw(st.lists(st.floats(-5.0, 200.0), min_size=count, max_size=count)),
        draw(st.lists(st.sampled_from([*models, "x"]), min_size=count, max_size=count)),
        serving,
        awake=awake,
        swap=draw(st.sampled_from([0.0, 3.0, 20.0])),
        requests=draw(st.lists(st.integers(1, 100), min_size=count, max_size=count)),
    )


def planned(asked: Case, name: str, *, moves: int = 20, seed: int = 1) -> Plan:
    return policy(name).plan(asked.snapshot, asked.groups, asked.durations, moves, seed)


@pytest.mark.parametrize("name", POLICIES)
@given(asked=cases())
@settings(max_examples=25, deadline=None)
def test_no_group_is_lost_or_duplicated(name: str, asked: Case) -> None:
    plan = planned(asked, name)
    placed = [entry.group.key for queue in plan.queues for entry in queue.groups]
    placed += [entry.group.key for entry in plan.unplaced]
    assert Counter(placed) == Counter(group.key for group in asked.groups)


@pytest.mark.parametrize("name", POLICIES)
@given(asked=cases())
@settings(max_examples=15, deadline=None)
def test_a_group_stands_only_where_its_model_is_hosted(name: str, asked: Case) -> None:
    plan = planned(asked, name)
    hosted = {v.name: {m.name for m in v.models} for v in asked.snapshot.instances}
    for queue in plan.queues:
        assert {entry.group.model for entry in queue.groups} <= hosted[queue.instance]
    served = set().union(*hosted.values())
    assert all(entry.group.model not in served for entry in plan.unplaced)


@pytest.mark.parametrize("name", POLICIES)
@given(asked=cases())
@settings(max_examples=15, deadline=None)
def test_equal_snapshots_give_equal_plans(name: str, asked: Case) -> None:
    assert planned(asked, name) == planned(asked, name)


@given(asked=cases(), moves=st.integers(0, 60), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_the_default_is_never_worse_than_edf_shed(asked: Case, moves: int, seed: int) -> None:
    problem = asked.problem
    floor = problem.score(list_schedule(problem, by_deadline, shed=True)[0])
    found = problem.score(QLM.schedule(problem, moves, seed)[0])
    assert found.on_time >= floor.on_time
    assert found.objective >= floor.objective


@given(asked=cases(), moves=st.integers(0, 60))
@settings(max_examples=40, deadline=None)
def test_whatever_the_default_does_not_let_go_is_on_time_or_told_to_be_in_part(
    asked: Case, moves: int
) -> None:
    for entry in (e for q in planned(asked, "qlm", moves=moves).queues for e in q.groups):
        if not entry.shed and entry.share == 1.0:
            assert entry.finish_mean <= entry.group.deadline + 1e-6


@given(asked=cases())
@settings(max_examples=40, deadline=None)
def test_renaming_everything_changes_only_names(asked: Case) -> None:
    plan = planned(asked, "qlm")
    renamed = Case(
        replace(
            asked.snapshot,
            instances=tuple(
                replace(v, name=f"z{9 - n}") for n, v in enumerate(asked.snapshot.instances)
            ),
        ),
        tuple(replace(g, key=f"k{n}") for n, g in enumerate(asked.groups)),
        KnownDurations(
            {f"k{n}": asked.durations._work[g.key] for n, g in enumerate(asked.groups)},
            asked.durations._serving,
            awake=asked.durations._awake,
            swap=asked.durations._swap,
        ),
    )
    again = planned(renamed, "qlm")
    shape = [[(e.start, e.group.deadline, e.shed) for e in q.groups] for q in plan.queues]
    assert shape == [[(e.start, e.group.deadline, e.shed) for e in q.groups] for q in again.queues]


@given(asked=cases())
@settings(max_examples=40, deadline=None)
def test_slack_is_what_delaying_everything_behind_would_break(asked: Case) -> None:
    problem = asked.problem
    queues, _ = insert_all(problem)
    for i, queue in enumerate(queues):
        walk = problem.walk(i, queue)
        slack = problem.slack(queue, walk)
        for position in range(len(queue)):
            brute = min(problem.due[g] - walk.done[p] for p, g in enumerate(queue) if p >= position)
            assert slack[position] == brute


@given(asked=cases())
@settings(max_examples=60, deadline=None)
def test_insertion_makes_nothing_late(asked: Case) -> None:
    problem = asked.problem
    queues, let_go = insert_all(problem)
    for i, queue in enumerate(queues):
        for g, done in zip(queue, problem.walk(i, queue).done, strict=True):
            assert done <= problem.due[g] + 1e-9
    placed = sorted(g for queue in queues for g in queue)
    able = [g for g in range(len(asked.groups)) if problem.placeable(g)]
    assert sorted([*placed, *let_go]) == able


def moore_hodgson(work: Sequence[float], due: Sequence[float]) -> int:
    """The largest number of jobs that can be on time on one machine (Moore 1968)."""
    chosen: list[float] = []
    total = 0.0
    for deadline, seconds in sorted(zip(due, work, strict=True)):
        heapq.heappush(chosen, -seconds)
        total += seconds
        if total > deadline:
            total += heapq.heappop(chosen)
    return len(chosen)


one_machine = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 100)), min_size=1, max_size=9)


def on_time(problem: Problem, queues: Queues) -> int:
    return sum(
        done <= problem.due[g]
        for i, queue in enumerate(queues)
        for g, done in zip(queue, problem.walk(i, queue).done, strict=True)
    )


def single(jobs: Sequence[tuple[int, int]]) -> Case:
    return case(
        [[float(work)] for work, _ in jobs],
        [float(due) for _, due in jobs],
        ["a"] * len(jobs),
        [frozenset({"a"})],
    )


@given(jobs=one_machine)
@settings(max_examples=40, deadline=None)
def test_on_one_machine_no_schedule_beats_moore_and_hodgson(jobs: list[tuple[int, int]]) -> None:
    problem = single(jobs).problem
    best = moore_hodgson([w for w, _ in jobs], [d for _, d in jobs])
    for name in ("edf-shed", "llf-shed"):
        order = POLICIES[name].order  # type: ignore[attr-defined]
        assert on_time(problem, list_schedule(problem, order, shed=True)[0]) <= best
    assert on_time(problem, QLM.schedule(problem, 100, 0)[0]) <= best


@given(jobs=one_machine)
@settings(max_examples=40, deadline=None)
def test_on_one_machine_the_search_finds_the_moore_hodgson_optimum(
    jobs: list[tuple[int, int]],
) -> None:
    problem = single(jobs).problem
    best = moore_hodgson([w for w, _ in jobs], [d for _, d in jobs])
    assert on_time(problem, QLM.schedule(problem, 400, 0)[0]) == best


@given(asked=cases(most=4))
@settings(max_examples=30, deadline=None)
def test_on_small_cases_no_schedule_beats_trying_them_all(asked: Case) -> None:
    problem = asked.problem
    able = [g for g in range(len(asked.groups)) if problem.placeable(g)]
    best = 0.0
    machines = len(asked.snapshot.instances)
    for order in permutations(able):
        for code in range(machines ** len(order)):
            queues = problem.empty
            for g in order:
                code, i = divmod(code, machines)
                if problem.serves[i, problem.model[g]]:
                    queues[i].append(g)
            best = max(best, problem.score(queues).on_time)
    assert problem.score(QLM.schedule(problem, 50, 0)[0]).on_time <= best + 1e-9


def best_of_all(problem: Problem) -> float:
    """The most weight on time of all orders on all instances, groups left out included."""
    best, machines = 0.0, len(problem.instances)
    for order in permutations(range(len(problem.groups))):
        for code in range((machines + 1) ** len(order)):
            queues = problem.empty
            for g in order:
                code, i = divmod(code, machines + 1)
                if i < machines and problem.serves[i, problem.model[g]]:
                    queues[i].append(g)
            best = max(best, problem.score(queues).on_time)
    return best


def test_on_small_cases_the_search_is_within_a_fiftieth_of_the_best() -> None:
    rng = np.random.default_rng(7)
    both, found, best = frozenset({"a", "b"}), 0.0, 0.0
    for _ in range(12):
        asked = case(
            rng.uniform(5.0, 40.0, (4, 2)).tolist(),
            rng.uniform(10.0, 70.0, 4).tolist(),
            rng.choice(["a", "b"], 4).tolist(),
            [both, both],
            awake=[frozenset({"a"}), frozenset({"b"})],
            swap=3.0,
            requests=rng.integers(1, 50, 4).tolist(),
        )
        problem = asked.problem
        found += problem.score(QLM.schedule(problem, 200, 0)[0]).on_time
        best += best_of_all(problem)
    assert 0.98 * best <= found <= best + 1e-6


def test_what_fits_only_if_all_goes_well_is_not_let_go() -> None:
    asked = case([[19.0], [90.0]], [20.0, 102.0], ["a"] * 2, [frozenset({"a"})])
    asked.durations.config = EstimatorConfig(quantile=0.8, model_error=0.1)
    queue = planned(asked, "qlm").queues[0].groups
    assert [(entry.group.key, entry.shed) for entry in queue] == [("g0", False), ("g1", False)]


def test_groups_of_one_model_run_together_rather_than_swap() -> None:
    asked = case(
        [[10.0]] * 6,
        [1000.0 + n for n in range(6)],
        ["a", "b"] * 3,
        [frozenset({"a", "b"})],
        awake=[frozenset({"a"})],
        swap=20.0,
    )
    (queue,) = planned(asked, "qlm").queues
    assert [entry.group.model for entry in queue.groups] == ["a", "a", "a", "b", "b", "b"]


def test_a_swap_is_not_made_where_staying_is_as_good() -> None:
    both = frozenset({"a", "b"})
    asked = case(
        [[10.0, 10.0]] * 2,
        [1000.0] * 2,
        ["a", "a"],
        [both, both],
        awake=[frozenset({"a"}), frozenset({"b"})],
        swap=30.0,
    )
    first, second = planned(asked, "qlm").queues
    assert (len(first.groups), len(second.groups)) == (2, 0)


def test_a_swap_is_made_where_a_deadline_needs_it() -> None:
    both = frozenset({"a", "b"})
    asked = case(
        [[10.0, 10.0]] * 2,
        [14.0, 45.0],
        ["a", "b"],
        [both, frozenset({"a"})],
        awake=[frozenset({"b"}), frozenset()],
        swap=3.0,
    )
    plan = planned(asked, "qlm")
    assert not any(entry.shed for queue in plan.queues for entry in queue.groups)


def test_a_tight_group_goes_to_the_faster_device() -> None:
    asked = case([[30.0, 10.0]], [15.0], ["a"], [frozenset({"a"})] * 2)
    slow, fast = planned(asked, "qlm").queues
    assert (len(slow.groups), len(fast.groups)) == (0, 1)


def test_a_plan_of_real_estimates_keeps_a_margin_for_their_spread() -> None:
    fleet = snapshot(instances=[instance("i")])
    estimator = Estimator(fleet)
    asked = group("g", deadline=1e9, requests=1000)
    takes_s = float(work_of(estimator, asked).mean[0])
    tight = replace(asked, deadline=takes_s)
    loose = replace(asked, deadline=takes_s * 1.5)
    shares = [
        policy("qlm").plan(fleet, [g], estimator, 0, 0).queues[0].groups[0].share
        for g in (tight, loose)
    ]
    assert 0.5 < shares[0] < 1.0 == shares[1]


def test_a_group_is_kept_for_the_part_of_it_that_can_be_on_time() -> None:
    asked = case([[100.0]], [60.0], ["a"], [frozenset({"a"})], requests=[10])
    (entry,) = planned(asked, "qlm").queues[0].groups
    assert not entry.shed
    assert entry.share == pytest.approx(0.6)
    assert "60 % of it in time" in entry.reason


def test_what_is_finished_late_has_no_part_in_time() -> None:
    late = replace(group("g0", deadline=-90.0, arrived_at=-150.0), on_miss=OnMiss.FINISH_LATE)
    durations = KnownDurations({"g0": [20.0]}, [frozenset({"m"})])
    plan = policy("qlm").plan(snapshot(instances=[instance("i")]), [late], durations, 0, 0)
    (entry,) = plan.queues[0].groups
    assert not entry.shed
    assert entry.reason == "next on i; model m awake; to be finished late"


def test_what_is_late_in_part_makes_nothing_else_late() -> None:
    asked = case(
        [[100.0], [30.0]], [60.0, 115.0], ["a"] * 2, [frozenset({"a"})], requests=[100, 10]
    )
    first, second = planned(asked, "qlm").queues[0].groups
    assert (first.group.key, first.share, second.share) == ("g1", 1.0, pytest.approx(0.3))
