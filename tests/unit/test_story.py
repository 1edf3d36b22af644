"""What is told of a plan: decisions about batches."""

from __future__ import annotations

from dataclasses import replace

from qlm_batch.control.story import EVICTIONS_EVERY_S, MOST_DECISIONS, Story
from qlm_batch.domain.jobs import Estimate
from qlm_batch.domain.snapshot import (
    InstanceView,
    Plan,
    PlannedGroup,
    Residency,
    Snapshot,
    VirtualQueue,
)
from tests.unit.planning_cases import assigned, group, instance, snapshot

AWAKE = {"n": Residency.AWAKE, "m": Residency.ASLEEP}


def plan_of(now: float, *, key: str = "g") -> Plan:
    placed = PlannedGroup(group(key, deadline=100.0), now, now + 1.0, 0.1, "next")
    return Plan(now, "qlm", (VirtualQueue("i", (placed,)),))


def test_a_swap_a_batch_waits_for_is_told_once() -> None:
    seen = snapshot(instances=[instance("i", AWAKE)])
    decisions, story = Story().told(plan_of(0.0), seen)
    (swap,) = [made for made in decisions if made.kind == "swapped"]
    assert (swap.batch_id, swap.instance) == ("batch-g", "i")
    assert "swapped n for m" in str(swap.detail["reason"])
    again, _ = story.told(plan_of(1.0), replace(seen, now=1.0))
    assert again == ()


def test_each_decision_about_a_batch_let_go_in_part_has_the_reason_of_its_part() -> None:
    kept = PlannedGroup(group("g", deadline=100.0), 0.0, 1.0, 0.1, "next")
    gone = replace(kept, group=replace(kept.group, key="h"), start=1.0, reason="late", shed=True)
    plan = Plan(0.0, "qlm", (VirtualQueue("i", (kept, gone)),))
    decisions, _ = Story().told(plan, snapshot(instances=[instance("i")]))
    told = [(made.kind, made.group_key, made.detail["reason"]) for made in decisions]
    assert told == [("planned", "g", "next"), ("shed", "h", "late")]


def test_of_very_many_batches_at_once_every_promise_is_told_and_every_place_in_the_end() -> None:
    keys = [f"g{n}" for n in range(2 * MOST_DECISIONS)]
    placed = tuple(PlannedGroup(group(key, deadline=100.0), 0.0, 1.0, 0.1, "") for key in keys)
    batches = {f"batch-{key}" for key in keys}
    made = dict.fromkeys(batches, Estimate(1.0, 2.0, 0.0, "", 0.0))
    plan = Plan(0.0, "qlm", (VirtualQueue("i", placed),), estimates=made)
    new = replace(snapshot(instances=[instance("i")]), unpromised=frozenset(batches))
    first, story = Story().told(plan, new)
    # The plan is saved with its promises: the next look finds none to make.
    second, _ = story.told(plan, replace(new, unpromised=frozenset()))
    for kind in ("planned", "promised"):
        assert {own.batch_id for own in (*first, *second) if own.kind == kind} == batches


def test_work_taken_back_before_it_began_is_told() -> None:
    held = (assigned(1, 10, slices=3, leased=1), assigned(2, 10, slices=1, leased=1))
    seen = snapshot(instances=[instance("i", assigned=held)])
    decisions, _ = Story().told(plan_of(0.0), seen, ["i"])
    assert [made.batch_id for made in decisions if made.kind == "recalled"] == ["batch-1"]


def evicting(times: int, now: float) -> Snapshot:
    held = (assigned(1, 10, slices=1, leased=1),)
    view = replace(instance("i", assigned=held), evictions=times)
    return snapshot(instances=[view], now=now)


def test_evictions_are_told_together_and_seldom() -> None:
    story = Story.resumed(evicting(7, 0.0))
    told: list[int] = []
    for second in range(61):
        decisions, story = story.told(Plan(float(second), "qlm", ()), evicting(7 + second, second))
        told += [int(str(d.detail["times"])) for d in decisions if d.kind == "evicted"]
    assert told == [EVICTIONS_EVERY_S, EVICTIONS_EVERY_S]


def swapped(times: int, seconds: float, **fields: object) -> InstanceView:
    """An instance that made `n` awake so many times, in so many seconds altogether."""
    view = instance("i", {"m": Residency.COLD, "n": Residency.AWAKE}, **fields)  # type: ignore[arg-type]
    first, second = view.models
    return replace(view, models=(first, replace(second, swaps=times, swap_s=seconds)))


def woken(
    story: Story, view: InstanceView, *groups: PlannedGroup
) -> list[tuple[str | None, object]]:
    """Batches a swap is told to, and the seconds it took."""
    plan = Plan(10.0, "qlm", (VirtualQueue("i", groups),))
    decisions, _ = story.told(plan, snapshot(instances=[view]))
    return [(own.batch_id, own.detail["seconds"]) for own in decisions if own.kind == "woken"]


def test_a_swap_that_was_made_is_told_to_the_batches_it_was_made_for() -> None:
    held = assigned(7, 4, model="n")
    waiting = PlannedGroup(group("next", deadline=99.0, model="n"), 11.0, 12.0, 0.0, "why")
    other = PlannedGroup(group("other", deadline=99.0, model="m"), 13.0, 14.0, 0.0, "why")
    found = woken(Story(), swapped(2, 9.0, assigned=(held,)), waiting, other)
    assert found == [("batch-7", 4.5), ("batch-next", 4.5)]


def test_a_swap_that_was_made_is_told_once() -> None:
    view = swapped(1, 4.0)
    _, story = Story().told(Plan(1.0, "qlm", ()), snapshot(instances=[view]))
    assert woken(story, view) == []
    assert woken(story, swapped(2, 7.0)) == [(None, 3.0)]


def test_a_new_leader_tells_only_swaps_made_after_it() -> None:
    story = Story.resumed(snapshot(instances=[swapped(3, 9.0)]))
    assert woken(story, swapped(3, 9.0)) == []


def test_the_swaps_of_a_new_boot_count_from_none() -> None:
    _, story = Story().told(Plan(1.0, "qlm", ()), snapshot(instances=[swapped(5, 20.0)]))
    assert woken(story, swapped(1, 4.0, boot_id="again")) == [(None, 4.0)]
