"""What is told of a plan: decisions about batches."""

from __future__ import annotations

from dataclasses import replace

from qlm_batch.control.story import EVICTIONS_EVERY_S, Story
from qlm_batch.domain.snapshot import Plan, PlannedGroup, Residency, Snapshot, VirtualQueue
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
