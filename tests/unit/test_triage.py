"""Who is let go, in which order, and why."""

from __future__ import annotations

from dataclasses import replace

from qlm_batch.domain.jobs import OnMiss, SloClass
from qlm_batch.scheduling.policies import policy
from qlm_batch.scheduling.problem import Problem
from qlm_batch.scheduling.triage import append_tail, tail_order, why_shed
from tests.unit.planning_cases import KnownDurations, group, instance, snapshot

FLEET = snapshot(instances=[instance("i")])


def problem_of(**due_work_requests: tuple[float, float, int]) -> Problem:
    groups = [
        group(key, deadline=due, requests=requests)
        for key, (due, _, requests) in due_work_requests.items()
    ]
    work = {key: [seconds] for key, (_, seconds, _) in due_work_requests.items()}
    return Problem(FLEET, groups, KnownDurations(work, [frozenset({"m"})]))


def test_what_is_worth_most_per_second_is_let_go_last() -> None:
    problem = problem_of(poor=(1.0, 100.0, 1), rich=(1.0, 10.0, 50))
    assert tail_order(problem, [0, 1]) == [1, 0]


def test_interactive_work_is_let_go_after_batch_work() -> None:
    groups = [
        group("batch", deadline=1.0, requests=100),
        replace(group("chat", deadline=1.0), slo_class=SloClass.INTERACTIVE),
    ]
    durations = KnownDurations({"batch": [1.0], "chat": [50.0]}, [frozenset({"m"})])
    assert tail_order(Problem(FLEET, groups, durations), [0, 1]) == [1, 0]


def test_the_tail_goes_where_it_ends_soonest() -> None:
    fleet = snapshot(instances=[instance("i"), instance("j")])
    groups = [group("busy", deadline=900.0), group("gone", deadline=1.0)]
    table = {"busy": [100.0, 100.0], "gone": [10.0, 10.0]}
    problem = Problem(fleet, groups, KnownDurations(table, [frozenset({"m"})] * 2))
    queues = [[0], []]
    append_tail(problem, queues, [1])
    assert queues == [[0], [1]]


def test_the_reason_says_what_was_impossible() -> None:
    problem = problem_of(past=(-3.0, 1.0, 1), big=(10.0, 60.0, 1), crowded=(50.0, 20.0, 1))
    assert why_shed(problem, 0) == "its deadline passed 3 s ago"
    assert why_shed(problem, 1) == "needs 1 min on an idle instance, 10 s are left"
    crowded = "needs 20 s, 50 s are left, and its turn would come too late"
    assert why_shed(problem, 2) == crowded


def test_the_reason_goes_by_the_deadline_that_was_given_however_work_ages() -> None:
    late = replace(group("late", deadline=-20.0, arrived_at=-80.0), on_miss=OnMiss.FINISH_LATE)
    problem = Problem(FLEET, [late], KnownDurations({"late": [7.0]}, [frozenset({"m"})]))
    assert problem.due[0] > 0.0
    assert why_shed(problem, 0) == "its deadline passed 20 s ago"


def test_in_overload_many_small_groups_are_kept_and_one_big_one_is_let_go() -> None:
    groups = [group("big", deadline=99.0, requests=1)]
    groups += [group(f"g{n}", deadline=100.0, requests=1) for n in range(9)]
    work = {"big": [95.0]} | {f"g{n}": [10.0] for n in range(9)}
    durations = KnownDurations(work, [frozenset({"m"})])
    plan = policy("qlm").plan(FLEET, groups, durations, 300, 0)
    assert [e.group.key for q in plan.queues for e in q.groups if e.shed] == ["big"]
