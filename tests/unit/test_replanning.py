"""When a plan stands."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qlm_batch.scheduling.policies import policy
from qlm_batch.scheduling.replanning import Incumbent, ReplanConfig, carried_on, fleet_signature
from tests.unit.test_planner import Case, case

ONE = [frozenset({"a"})]


@pytest.mark.parametrize(
    ("due", "order"),
    [
        pytest.param([1000.0, 1001.0, 1002.0], ["g0", "g1", "g2"], id="last of all"),
        pytest.param([1000.0, 2000.0, 1500.0], ["g0", "g2", "g1"], id="between the others"),
    ],
)
def test_what_comes_later_overtakes_only_what_is_due_after_it(
    due: list[float], order: list[str]
) -> None:
    asked = case([[1.0]] * 3, due, ["a"] * 3, ONE)
    before = policy("qlm").plan(asked.snapshot, asked.groups[:-1], asked.durations, 10, 0)
    incumbent = Incumbent(before, asked.snapshot.now, fleet_signature(asked.snapshot))
    kept, _ = carried_on(asked.snapshot, asked.groups, asked.durations, incumbent, ReplanConfig())
    assert kept is not None
    assert [placed.group.key for placed in kept.queues[0].groups] == order


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
