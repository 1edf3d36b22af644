"""The orders of the baselines, and the registry."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qlm_batch.domain.errors import ConfigurationError
from qlm_batch.domain.jobs import SloClass
from qlm_batch.domain.snapshot import RequestGroup
from qlm_batch.scheduling.policies import POLICIES, policy
from tests.unit.planning_cases import KnownDurations, group, instance, snapshot

LATE = group("late", deadline=300.0, arrived_at=0.0)
SOON = group("soon", deadline=100.0, arrived_at=1.0)
LONG = group("long", deadline=200.0, arrived_at=2.0)
HOPELESS = group("hopeless", deadline=5.0, arrived_at=3.0)
WORK = {"late": [10.0], "soon": [10.0], "long": [150.0], "hopeless": [10.0]}


def order(name: str, *groups: RequestGroup) -> list[str]:
    durations = KnownDurations(WORK, [frozenset({"m"})])
    plan = policy(name).plan(snapshot(instances=[instance("i")]), groups, durations, 10, 0)
    return [entry.group.key for entry in plan.queues[0].groups]


def test_fcfs_goes_by_arrival() -> None:
    assert order("fcfs", LONG, SOON, LATE) == ["late", "soon", "long"]


def test_priority_puts_interactive_work_first() -> None:
    urgent = replace(SOON, slo_class=SloClass.INTERACTIVE)
    assert order("priority", LATE, urgent, LONG) == ["soon", "late", "long"]


def test_edf_goes_by_deadline_even_where_it_is_hopeless() -> None:
    assert order("edf", LATE, SOON, HOPELESS) == ["hopeless", "soon", "late"]


@pytest.mark.parametrize("name", ["edf-shed", "llf-shed", "qlm"])
def test_hopeless_work_goes_behind_what_can_be_on_time(name: str) -> None:
    assert order(name, HOPELESS, SOON, LATE) == ["soon", "late", "hopeless"]


def test_llf_goes_by_time_to_spare() -> None:
    assert order("llf-shed", SOON, LONG)[0] == "long"


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_is_found_by_its_name(name: str) -> None:
    assert policy(name).name == name


def test_an_unknown_policy_is_refused_with_the_known_names() -> None:
    with pytest.raises(ConfigurationError, match="edf-shed"):
        policy("edff")


@pytest.mark.parametrize("name", POLICIES)
def test_an_empty_queue_and_an_empty_fleet_have_a_plan(name: str) -> None:
    durations = KnownDurations({"soon": []}, [])
    assert policy(name).plan(snapshot(), [], durations, 10, 0).queues == ()
    (waiting,) = policy(name).plan(snapshot(), [SOON], durations, 10, 0).unplaced
    assert waiting.reason == "no instance serves model m"
