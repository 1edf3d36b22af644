"""Shares between tenants, the floor for batch work, and ageing of late work."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlm_batch.domain.jobs import OnMiss, SloClass
from qlm_batch.domain.snapshot import Observation, Output, RequestGroup
from qlm_batch.scheduling.fairness import HALF_LIFE_S, Served, aged, entitled
from qlm_batch.scheduling.policies import policy
from qlm_batch.scheduling.profile import Knowledge, fold
from tests.unit.planning_cases import KnownDurations, group, instance, snapshot

FLEET = snapshot(instances=[instance("i")])


def seen(tenant: str, tokens: int, at: float = 1.0) -> Observation:
    return Observation("i", "A100", "m", at, (Output(tenant, tokens, 9),))


def on_time(*groups: RequestGroup, served: Served | None = None) -> list[str]:
    work = {g.key: [10.0] for g in groups}
    durations = KnownDurations(work, [frozenset({"m"})], served=served)
    plan = policy("qlm").plan(FLEET, groups, durations, 300, 0)
    return [entry.group.key for entry in plan.queues[0].groups if not entry.shed]


def crowd(tenant: str, count: int, deadline: float = 41.0) -> list[RequestGroup]:
    return [
        replace(group(f"{tenant}{n}", deadline=deadline + n / 1000), tenant=tenant)
        for n in range(count)
    ]


def test_what_was_served_counts_by_tokens_and_is_forgotten() -> None:
    served = Served().after([seen("a", 100), seen("b", 300)])
    assert served.share("a", "ab") == pytest.approx(0.25)
    later = served.after([seen("a", 150, at=1.0 + HALF_LIFE_S)])
    assert later.share("b", "ab") == pytest.approx(150 / 350)


def test_what_was_served_survives_in_profiles() -> None:
    profiles = fold((), [seen("a", 100), seen("b", 300)])
    assert Knowledge.of(profiles).served == Served({"a": 100.0, "b": 300.0}, 1.0)


def test_in_overload_a_small_tenant_gets_its_work_done_beside_a_big_one() -> None:
    found = on_time(*crowd("big", 20, deadline=40.0), *crowd("small", 2))
    assert {"small0", "small1"} <= set(found)
    assert len(found) == 4


def test_tenants_that_want_alike_get_alike() -> None:
    found = on_time(*crowd("a", 10), *crowd("b", 10))
    assert sorted(key[0] for key in found) == ["a", "a", "b", "b"]


def test_who_was_served_more_yields() -> None:
    served = Served({"a": 1000.0})
    found = on_time(*crowd("a", 2), *crowd("b", 4), served=served)
    assert [key[0] for key in sorted(found)] == ["b"] * 4


def test_a_tenant_alone_is_planned_as_without_fairness() -> None:
    groups = crowd("a", 9)
    assert on_time(*groups) == on_time(*groups, served=Served({"a": 1e9}))


def test_interactive_work_leaves_batch_work_its_floor() -> None:
    urgent = [replace(g, slo_class=SloClass.INTERACTIVE) for g in crowd("t", 30, deadline=200.0)]
    waiting = crowd("w", 10, deadline=150.0)
    found = on_time(*urgent, *waiting)
    assert sum(key.startswith("w") for key in found) == 2
    assert len(found) == 20


@given(
    shares=st.lists(st.tuples(st.floats(0, 2), st.floats(0.1, 9)), max_size=20),
    capacity=st.floats(0, 100),
)
def test_no_more_is_entitled_than_there_is_time_for(
    shares: list[tuple[float, float]], capacity: float
) -> None:
    times, work = [t for t, _ in shares], [w for _, w in shares]
    chosen = entitled(times, work, capacity)
    assert sum(w for w, yes in zip(work, chosen, strict=True) if yes) <= capacity + 1e-9
    if sum(work) <= capacity:
        assert all(chosen)


def late(deadline: float, arrived_at: float = 0.0) -> RequestGroup:
    return replace(
        group("late", deadline=deadline, arrived_at=arrived_at), on_miss=OnMiss.FINISH_LATE
    )


def test_work_that_ends_at_its_deadline_does_not_age() -> None:
    assert aged(group("g", deadline=50.0), 60.0, 10.0) == (-10.0, 1.0)


def test_work_finished_late_is_due_again_and_weighs_more_with_every_window() -> None:
    asked = late(100.0)
    assert aged(asked, 50.0, 10.0) == (50.0, 1.0)
    assert aged(asked, 110.0, 10.0) == (90.0, 0.25)
    assert aged(asked, 210.0, 10.0) == (90.0, 0.5)
    assert aged(asked, 510.0, 10.0)[1] == 4.0


@given(now=st.floats(0, 1e6), needs=st.floats(0.1, 1e4), window=st.floats(1, 1e5))
def test_late_work_is_always_due_in_the_future_or_after_one_more_window(
    now: float, needs: float, window: float
) -> None:
    due, factor = aged(late(window), now, needs)
    assert due >= needs or due > 0.0
    assert factor > 0.0


def test_late_work_does_not_starve_under_a_stream_of_new_work() -> None:
    """Every window brings more new work than fits; the old group is served all the same."""
    waited = 0
    for round_ in range(1, 12):
        now = 100.0 * round_
        fresh = [
            group(f"n{n}", deadline=now + 101.0 + n / 1000, arrived_at=now, requests=8)
            for n in range(80)
        ]
        old = replace(late(100.0), requests=8)
        fleet = replace(FLEET, now=now)
        work = {g.key: [10.0] for g in (*fresh, old)}
        plan = policy("qlm").plan(
            fleet, [*fresh, old], KnownDurations(work, [frozenset({"m"})]), 300, round_
        )
        if not next(e.shed for e in plan.queues[0].groups if e.group.key == "late"):
            break
        waited += 1
    assert 1 <= waited <= 6
