"""When a plan stands."""

from __future__ import annotations

from dataclasses import replace

from qlm_batch.scheduling.policies import policy
from qlm_batch.scheduling.replanning import Incumbent, ReplanConfig, carried_on, fleet_signature
from tests.unit.test_planner import Case, case

ONE = [frozenset({"a"})]


def after_a_second(asked: Case) -> str | None:
    """Why the default's plan does not stand a second later; empty where it does."""
    plan = policy("qlm").plan(asked.snapshot, asked.groups, asked.durations, 10, 0)
    incumbent = Incumbent(plan, asked.snapshot.now, fleet_signature(asked.snapshot))
    later = replace(asked.snapshot, now=asked.snapshot.now + 1.0)
    kept, why = carried_on(later, asked.groups, asked.durations, incumbent, ReplanConfig())
    return why if kept is not None or why else None


def test_a_plan_stands_while_all_of_it_is_on_time() -> None:
    assert after_a_second(case([[10.0]], [60.0], ["a"], ONE)) == ""


def test_work_that_becomes_late_calls_for_a_new_plan() -> None:
    assert after_a_second(case([[10.0]], [10.5], ["a"], ONE)) == "a deadline is in danger"


def test_work_known_to_be_late_in_part_does_not() -> None:
    assert after_a_second(case([[100.0]], [60.0], ["a"], ONE, requests=[10])) == ""
