"""When a pass may go on with what the last look at the queue found."""

from __future__ import annotations

from dataclasses import replace

import pytest

from qlm_batch.domain.snapshot import (
    Assignment,
    GroupPart,
    InstanceState,
    Observation,
    Output,
    Plan,
    PlannedGroup,
    RequestGroup,
    Snapshot,
    VirtualQueue,
)
from qlm_batch.scheduling.dispatching import DispatchConfig, top_up
from qlm_batch.scheduling.estimator import Estimator
from qlm_batch.scheduling.outlook import Outlook
from qlm_batch.scheduling.profile import Knowledge
from tests.unit.planning_cases import assigned, group, instance, run_view, snapshot

BUSY = instance("i", slots=256, assigned=(assigned(9, 100),))
SEEN = snapshot(runs=[run_view(1, 20)], instances=[BUSY])
KNOWN = Knowledge()
OUTPUTS = Observation("i", "A100", "m", 1.0, (Output("t", 42, 9),))


def group_of(run_id: int, slices: int, key: str) -> RequestGroup:
    return replace(
        group(key, deadline=1e6, requests=slices * 64), parts=(GroupPart(run_id, 1, slices),)
    )


def looked_at(seen: Snapshot = SEEN, *groups: RequestGroup) -> Outlook:
    entries = tuple(PlannedGroup(each, 0.0, 1.0, 0.0, "") for each in groups)
    plan = Plan(seen.now, "qlm", (VirtualQueue("i", entries),))
    return Outlook.of(plan, Estimator(seen, knowledge=KNOWN), len(groups), seen)


def test_it_stands_while_only_what_was_handed_out_is_gone() -> None:
    outlook = looked_at().handed([Assignment("i", 1, 1, 5, "g")])
    assert outlook.stands(replace(SEEN, now=1.0, runs=(run_view(1, 15),)), KNOWN)


def test_all_of_a_run_may_be_handed_out() -> None:
    outlook = looked_at().handed([Assignment("i", 1, 1, 20, "g")])
    assert outlook.stands(replace(SEEN, runs=()), KNOWN)


@pytest.mark.parametrize(
    "news",
    [
        pytest.param(replace(SEEN, runs=(*SEEN.runs, run_view(2, 1))), id="work came"),
        pytest.param(replace(SEEN, runs=(run_view(1, 21),)), id="work came back"),
        pytest.param(replace(SEEN, runs=(run_view(1, 19),)), id="work was cancelled"),
        pytest.param(
            replace(SEEN, instances=(BUSY, instance("j", ["other"]))), id="an instance came"
        ),
        pytest.param(
            replace(SEEN, instances=(replace(BUSY, state=InstanceState.LOST),)),
            id="an instance is lost",
        ),
        pytest.param(replace(SEEN, instances=(replace(BUSY, assigned=()),)), id="one ran dry"),
    ],
)
def test_it_does_not_stand_when(news: Snapshot) -> None:
    assert looked_at().stands(SEEN, KNOWN)
    assert not looked_at().stands(news, KNOWN)


def test_it_does_not_stand_when_lengths_were_learned() -> None:
    assert not looked_at().stands(SEEN, KNOWN.observed([OUTPUTS]))


def test_how_promises_came_true_is_no_news() -> None:
    assert looked_at().stands(SEEN, KNOWN.ended([("m", 1.0)], {}))


def test_an_instance_without_work_it_could_serve_may_stay_idle() -> None:
    seen = replace(SEEN, instances=(BUSY, instance("j", ["other"])))
    assert looked_at(seen).stands(seen, KNOWN)


def test_what_was_handed_out_of_a_group_is_not_handed_out_of_it_again() -> None:
    first, second = group_of(1, 4, "first"), group_of(1, 16, "second")
    outlook = looked_at(SEEN, first, second).handed([Assignment("i", 1, 1, 3, "first")])
    left = replace(SEEN, runs=(run_view(1, 17),))
    config = DispatchConfig(fill=1.75, ahead_s=0.0)
    found = top_up(left, outlook.plan, outlook.estimator, config, taken=outlook.taken)
    assert [(made.group_key, made.slices) for made in found] == [("first", 1), ("second", 5)]
