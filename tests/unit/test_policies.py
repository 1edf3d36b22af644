"""The orders of the baselines, and the registry."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qlm_batch.domain.errors import ConfigurationError
from qlm_batch.domain.jobs import SloClass
from qlm_batch.domain.snapshot import InstanceView, RequestGroup
from qlm_batch.scheduling.estimator import Estimator
from qlm_batch.scheduling.grouping import form_groups
from qlm_batch.scheduling.policies import POLICIES, OraclePolicy, policy
from tests.unit.planning_cases import KnownDurations, group, instance, run_view, snapshot

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


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("elsewhere", [(), (instance("a", models=("other",)),)])
def test_work_of_a_model_nobody_serves_is_told_to_be_unplaced(
    name: str, elsewhere: tuple[InstanceView, ...]
) -> None:
    seen = snapshot(runs=[run_view(1, 2), run_view(2, 1, model="n")], instances=elsewhere)
    estimator = Estimator(seen)
    groups = form_groups(seen, estimator.capacities(seen))
    plan = policy(name).plan(seen, groups, estimator, 10, 0)
    assert {placed.group.key for placed in plan.unplaced} == {group.key for group in groups}


def test_the_papers_program_finds_the_order_that_meets_every_deadline() -> None:
    # EDF would start with `a`, swap, and be late with `c`; the program keeps one model together.
    a = group("a", deadline=100.0, model="m")
    b = group("b", deadline=101.0, model="n")
    c = group("c", deadline=102.0, model="m")
    durations = KnownDurations(
        {"a": [20.0], "b": [20.0], "c": [20.0]},
        [frozenset({"m", "n"})],
        awake=[frozenset({"m"})],
        swap=35.0,
    )
    fleet = snapshot(instances=[instance("i", ["m", "n"])])
    plan = policy("qlm-paper").plan(fleet, [a, b, c], durations, 0, 0)
    queue = plan.queues[0].groups
    assert [entry.group.model for entry in queue] == ["m", "m", "n"]
    assert all(entry.finish_mean <= entry.group.deadline for entry in queue)


def test_the_papers_program_falls_back_to_edf_in_overload() -> None:
    assert order("qlm-paper", LATE, SOON, HOPELESS) == ["hopeless", "soon", "late"]


def test_shepherd_dedicates_instances_to_models_by_their_work() -> None:
    both = frozenset({"m", "n"})
    groups = [group(f"m{n}", deadline=1e3) for n in range(6)]
    groups += [group(f"n{n}", deadline=1e3, model="n") for n in range(2)]
    durations = KnownDurations({g.key: [10.0] * 4 for g in groups}, [both] * 4)
    fleet = snapshot(instances=[instance(f"i{n}", ["m", "n"]) for n in range(4)])
    plan = policy("shepherd").plan(fleet, groups, durations, 0, 0)
    hosted = sorted("".join({e.group.model for e in queue.groups}) for queue in plan.queues)
    assert hosted == ["m", "m", "m", "n"]


def test_shepherd_takes_the_largest_batch_first() -> None:
    small, large = replace(SOON, requests=2), replace(LATE, requests=9)
    assert order("shepherd", small, large) == ["late", "soon"]


def test_the_oracle_plans_with_the_lengths_it_is_told() -> None:
    durations = KnownDurations({"late": [10.0], "soon": [10.0]}, [frozenset({"m"})])
    fleet = snapshot(instances=[instance("i")])
    long, short = replace(SOON, deadline=15.0), replace(LATE, deadline=16.0)
    true = {"soon": 40.0 * 128, "late": 1.0 * 128}
    plan = OraclePolicy(lambda g: true[g.key] / 4).plan(fleet, [long, short], durations, 10, 0)
    first, second = plan.queues[0].groups
    assert plan.policy == "oracle"
    assert (first.finish_mean, first.shed, second.shed) == (pytest.approx(2.5), False, True)
