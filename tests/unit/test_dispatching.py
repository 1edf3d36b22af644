"""How much an instance is handed, and what is taken back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from qlm_batch.domain.snapshot import (
    Assignment,
    GroupPart,
    InstanceState,
    InstanceView,
    Plan,
    PlannedGroup,
    RequestGroup,
    Residency,
    VirtualQueue,
)
from qlm_batch.scheduling.dispatching import DispatchConfig, recalls, rescues, top_up
from qlm_batch.scheduling.estimator import Estimator
from qlm_batch.scheduling.worktable import WorkTable
from tests.unit.planning_cases import DAY, assigned, group, instance, run_view, snapshot

CONFIG = DispatchConfig(fill=1.75, ahead_s=0.0)


def of_run(run_id: int, slices: int, *, model: str = "m", deadline: float = 1e6) -> RequestGroup:
    plain = group(f"g{run_id}", deadline=deadline, model=model, requests=slices * 64)
    return replace(plain, parts=(GroupPart(run_id, 1, slices),))


def plan_of(instance: str, *groups: RequestGroup, start: float = 0.0, finish: float = 1.0) -> Plan:
    entries = tuple(PlannedGroup(g, start, finish, 0.0, "") for g in groups)
    return Plan(0.0, "qlm", (VirtualQueue(instance, entries),))


def handed(view: InstanceView, groups: Sequence[RequestGroup]) -> list[Assignment]:
    runs = [run_view(p.run_id, p.slices, model=g.model) for g in groups for p in g.parts]
    situation = snapshot(runs=runs, instances=[view])
    return top_up(situation, plan_of(view.name, *groups), Estimator(situation), CONFIG)


def test_an_idle_instance_gets_its_batch_and_something_to_follow() -> None:
    found = handed(instance("i", slots=256), [of_run(1, 100)])
    assert found == [Assignment("i", 1, 1, 7, "g1")]


def test_what_it_holds_already_counts() -> None:
    view = instance("i", slots=256, assigned=(assigned(9, 400),))
    assert [a.slices for a in handed(view, [of_run(1, 100)])] == [1]


def test_a_full_instance_gets_nothing() -> None:
    view = instance("i", slots=256, assigned=(assigned(9, 500),))
    assert handed(view, [of_run(1, 100)]) == []


def test_a_fast_instance_gets_what_it_will_end_before_the_next_pass() -> None:
    situation = snapshot(runs=[run_view(1, 1000)], instances=[instance("i")])
    estimator = Estimator(situation)
    plan = plan_of("i", of_run(1, 1000))
    some, more = (
        sum(a.slices for a in top_up(situation, plan, estimator, DispatchConfig(ahead_s=s)))
        for s in (0.0, 60.0)
    )
    assert more > 5 * some


def test_groups_are_handed_out_from_the_head() -> None:
    found = handed(instance("i", slots=100), [of_run(1, 1), of_run(2, 1), of_run(3, 9)])
    assert [(a.run_id, a.slices) for a in found] == [(1, 1), (2, 1), (3, 1)]


def test_short_requests_do_not_pass_by_the_long_ones_before_them() -> None:
    long, short = of_run(1, 50), of_run(2, 50)
    short.max_tokens = short.requests
    runs = [run_view(1, 50), run_view(2, 50, max_tokens=1)]
    situation = snapshot(runs=runs, instances=[instance("i")])
    found = top_up(situation, plan_of("i", long, short), Estimator(situation))
    assert [a.run_id for a in found] == [1]


@pytest.mark.parametrize("state", [s for s in InstanceState if s is not InstanceState.READY])
def test_only_a_ready_instance_is_handed_work(state: InstanceState) -> None:
    assert handed(instance("i", state=state), [of_run(1, 1)]) == []


def test_a_sleeping_model_waits_until_the_awake_one_is_through() -> None:
    busy = instance("i", ["m", "n"], assigned=(assigned(9, 1, leased=1),))
    groups = [of_run(1, 1, model="n"), of_run(2, 1)]
    assert handed(busy, groups) == []
    idle = replace(busy, assigned=())
    assert [a.run_id for a in handed(idle, groups)] == [1]


@pytest.mark.parametrize(
    ("deadline", "finish", "interrupts"),
    [
        pytest.param(900.0, 880.0, True, id="pressed"),
        pytest.param(900.0, 700.0, False, id="with time to spare"),
        pytest.param(1100.0, 1095.0, False, id="due after what runs"),
    ],
)
def test_a_sleeping_model_is_handed_its_work_early_where_it_cannot_wait(
    deadline: float, finish: float, interrupts: bool
) -> None:
    held = (assigned(9, 64, leased=1, deadline=1000.0),)
    situation = snapshot(
        runs=[run_view(1, 1, model="n"), run_view(2, 1)],
        instances=[instance("i", ["m", "n"], assigned=held)],
    )
    groups = (of_run(1, 1, model="n", deadline=deadline), of_run(2, 1))
    plan = plan_of("i", *groups, start=100.0, finish=finish)
    found = top_up(situation, plan, Estimator(situation), CONFIG)
    assert [a.run_id for a in found] == ([1] if interrupts else [])


@pytest.mark.parametrize(
    ("held", "deadline", "finish", "handed_out"),
    [
        pytest.param(8, 1000.0, 998.0, True, id="thin"),
        pytest.param(64, 1000.0, 998.0, False, id="not thin"),
        pytest.param(8, 1000.0, 500.0, False, id="time to wait for the last of it"),
        pytest.param(8, 1001.0, 999.0, False, id="due later"),
    ],
)
def test_the_last_answers_of_a_model_do_not_keep_work_due_at_the_same_time_waiting(
    held: int, deadline: float, finish: float, handed_out: bool
) -> None:
    own = (assigned(9, held, leased=1, deadline=1000.0),)
    situation = snapshot(
        runs=[run_view(1, 1, model="n")],
        instances=[instance("i", ["m", "n"], slots=128, assigned=own)],
    )
    group = of_run(1, 1, model="n", deadline=deadline)
    plan = plan_of("i", group, start=1.0, finish=finish)
    found = top_up(situation, plan, Estimator(situation), CONFIG)
    assert [a.run_id for a in found] == ([1] if handed_out else [])


def test_behind_a_swap_nothing_is_handed_out() -> None:
    view = instance("i", ["m", "n"], assigned=(assigned(9, 1, model="n"),))
    assert handed(view, [of_run(2, 1)]) == []


def test_models_awake_side_by_side_are_filled_apart() -> None:
    view = instance("i", {"m": Residency.AWAKE, "n": Residency.AWAKE})
    found = handed(view, [of_run(1, 50), of_run(2, 50, model="n")])
    assert [a.run_id for a in found] == [1, 2]


def test_two_instances_are_never_handed_the_same_slice() -> None:
    situation = snapshot(runs=[run_view(1, 1)], instances=[instance("i"), instance("j")])
    plan = Plan(
        0.0,
        "qlm",
        tuple(
            VirtualQueue(name, (PlannedGroup(of_run(1, 1), 0.0, 1.0, 0.0, ""),)) for name in "ij"
        ),
    )
    assert len(top_up(situation, plan, Estimator(situation), CONFIG)) == 1


def pressed(deadline: float, *, finish: float, leased: int = 0) -> dict[str, str]:
    view = instance("i", assigned=(assigned(9, 64, leased=leased, deadline=1000.0),))
    situation = snapshot(instances=[view])
    head = of_run(1, 1, deadline=deadline)
    return recalls(situation, plan_of("i", head, start=10.0, finish=finish))


def test_unclaimed_work_is_recalled_for_what_would_else_be_late() -> None:
    assert list(pressed(30.0, finish=25.0)) == ["i"]


def test_nothing_is_recalled_for_what_can_wait() -> None:
    assert pressed(400.0, finish=25.0) == {}


def test_claimed_work_is_not_recalled() -> None:
    assert pressed(30.0, finish=25.0, leased=1) == {}


def test_nothing_is_recalled_for_work_due_at_about_the_same_time() -> None:
    assert pressed(900.0, finish=890.0) == {}


def test_a_draining_instance_gives_back_what_it_has_not_claimed() -> None:
    view = instance("i", state=InstanceState.DRAINING, assigned=(assigned(9, 64),))
    assert recalls(snapshot(instances=[view]), Plan(0.0, "qlm", ())) == {"i": ""}


def holding(*, leased: int) -> InstanceView:
    """An instance that holds two slices due much later, so many of them claimed."""
    return instance("i", assigned=(assigned(9, 128, slices=2, leased=leased, deadline=DAY),))


def missed(*deadlines: float) -> Plan:
    """A plan that lets groups with these deadlines go."""
    groups = (of_run(n, 1, deadline=deadline) for n, deadline in enumerate(deadlines, 1))
    late = tuple(PlannedGroup(g, 10.0, 20.0, 0.0, "", shed=True) for g in groups)
    return Plan(0.0, "qlm", (VirtualQueue("i", late),))


def saved(plan: Plan, view: InstanceView) -> dict[str, str]:
    situation = snapshot(instances=[view])
    return rescues(situation, plan, Estimator(situation))


def test_unclaimed_work_makes_way_for_a_group_that_is_late_only_because_of_it() -> None:
    assert saved(missed(600.0), holding(leased=0)) == {"i": "g1"}


@pytest.mark.parametrize("deadline", [-1.0, 0.5, 0.8 * DAY])
def test_nothing_makes_way_for_what_is_hopeless_or_not_urgent(deadline: float) -> None:
    assert saved(missed(deadline), holding(leased=0)) == {}


def test_what_is_claimed_makes_way_for_nothing() -> None:
    assert saved(missed(600.0), holding(leased=2)) == {}


def test_however_many_groups_are_late_they_are_looked_at_together() -> None:
    asked: list[int] = []

    class Watched(Estimator):
        def table(self, groups: Sequence[RequestGroup]) -> WorkTable:
            asked.append(len(groups))
            return super().table(groups)

    held = [replace(holding(leased=0), name=name) for name in "ijk"]
    situation = snapshot(instances=held)
    assert rescues(situation, missed(*[0.5] * 100), Watched(situation)) == {}
    assert asked == [100]
