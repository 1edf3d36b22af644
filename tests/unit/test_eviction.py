"""Who gives way to whom."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlm_batch.scheduling.agent import INTERACTIVE_PRIORITY, engine_priority
from qlm_batch.scheduling.eviction import (
    MAX_EVICTIONS,
    TOGETHER,
    GivingWay,
    Running,
    Waiting,
    admission_limit,
    entering,
    is_urgent,
    pace,
    victims,
)

DUE = engine_priority(1_800_000_000.0)


def batch(id: str, due: int = DUE, arrival: float = 0.0, kv: int = 10, grows: int = 0) -> Running:
    return Running(id, due, arrival, kv, grows)


def resting(id: str, due: int = DUE + 5, kv: int = 10) -> Running:
    return Running(id, due, 0.0, kv, 0, rests=True)


def interactive(id: str, kv: int = 1) -> Waiting:
    return Waiting(id, kv)


def given_way(
    waiting: list[Waiting],
    running: list[Running],
    free_slots: int = 0,
    free_kv: int = 1000,
    evictions: dict[str, int] | None = None,
) -> tuple[list[str], list[str]]:
    """Who loses its place, and who its KV."""
    found = victims(
        waiting, running, free_slots=free_slots, free_kv=free_kv, evictions=evictions or {}
    )
    return [running[index].id for index in found.rest], [running[index].id for index in found.leave]


def chosen(
    waiting: list[Waiting],
    running: list[Running],
    free_slots: int = 0,
    free_kv: int = 1000,
    evictions: dict[str, int] | None = None,
) -> list[str]:
    """Who loses its place."""
    return given_way(waiting, running, free_slots, free_kv, evictions)[0]


def test_interactive_work_evicts_batch_work_and_nothing_else_evicts() -> None:
    assert is_urgent(INTERACTIVE_PRIORITY)
    assert not is_urgent(DUE)
    assert chosen([interactive("i")], [batch("a")]) == ["a"]
    assert chosen([interactive("i")], [Running("other", INTERACTIVE_PRIORITY + 5, 0, 10, 0)]) == []


def test_a_free_place_needs_no_victim() -> None:
    assert chosen([interactive("i")], [batch("a")], free_slots=1) == []


def test_the_latest_deadline_gives_way_first_and_of_equals_the_last_to_arrive() -> None:
    running = [batch("early", DUE), batch("late", DUE + 60), batch("later", DUE + 60, 1.0)]
    assert chosen([interactive("i")], running) == ["later"]
    assert chosen([interactive("i"), interactive("j")], running) == ["later", "late"]


def test_interactive_work_never_gives_way() -> None:
    assert chosen([interactive("i")], [Running("other", INTERACTIVE_PRIORITY, 0, 10, 0)]) == []


def test_as_many_give_way_as_the_kv_needs() -> None:
    running = [batch(str(n), DUE + n, kv=4) for n in range(4)]
    found = given_way([interactive("i", kv=7)], running, free_slots=9, free_kv=0)
    assert found == (["3", "2"], ["3", "2"])


def test_who_lacks_a_place_takes_nobodys_kv() -> None:
    running = [batch("a"), batch("b", DUE + 1)]
    assert given_way([interactive("i")], running) == (["b"], [])


def test_kv_is_taken_first_from_those_that_rest() -> None:
    running = [batch("runs", DUE + 9, kv=4), resting("early", DUE, kv=4), resting("late", kv=4)]
    assert given_way([interactive("i", kv=3)], running, free_slots=1, free_kv=0) == ([], ["late"])
    assert given_way([interactive("i", kv=9)], running, free_slots=1, free_kv=0) == (
        ["runs"],
        ["late", "early", "runs"],
    )


def test_who_rests_has_no_place_to_give() -> None:
    assert given_way([interactive("i")], [resting("a")]) == ([], [])


def test_what_running_requests_take_in_the_next_step_is_not_free() -> None:
    running = [batch("a", kv=4, grows=1), batch("b", DUE + 1, kv=4, grows=1)]
    assert chosen([interactive("i", kv=1)], running, free_slots=1, free_kv=3) == []
    assert chosen([interactive("i", kv=2)], running, free_slots=1, free_kv=3) == ["b"]


def test_nobody_gives_way_in_vain() -> None:
    running = [batch("a", kv=4), batch("b", DUE + 1, kv=4)]
    assert chosen([interactive("big", kv=99)], running, free_slots=1, free_kv=0) == []
    two = [interactive("small", kv=3), interactive("big", kv=99)]
    assert chosen(two, running, free_slots=1, free_kv=0) == ["b"]


def test_a_request_gives_way_a_bounded_number_of_times() -> None:
    running = [batch("a"), batch("b", DUE + 1)]
    assert chosen([interactive("i")], running, evictions={"b": MAX_EVICTIONS - 1}) == ["b"]
    assert chosen([interactive("i")], running, evictions={"b": MAX_EVICTIONS}) == ["a"]
    assert chosen([interactive("i")], running, evictions=dict.fromkeys("ab", MAX_EVICTIONS)) == []


@given(
    needs=st.lists(st.integers(1, 30), max_size=5),
    held=st.lists(
        st.tuples(
            st.sampled_from(["interactive", "runs", "rests"]),
            st.integers(0, 3),
            st.integers(0, 20),
            st.integers(0, 2),
        ),
        max_size=8,
    ),
    free_slots=st.integers(0, 3),
    free_kv=st.integers(0, 40),
)
def test_victims_are_batch_work_whose_absence_lets_someone_in(
    needs: list[int],
    held: list[tuple[str, int, int, int]],
    free_slots: int,
    free_kv: int,
) -> None:
    waiting = [interactive(f"w{n}", kv) for n, kv in enumerate(needs)]
    running = [
        Running(
            f"r{n}",
            INTERACTIVE_PRIORITY if what == "interactive" else DUE + due,
            n,
            kv,
            0 if what == "rests" else grows,
            rests=what == "rests",
        )
        for n, (what, due, kv, grows) in enumerate(held)
    ]
    found = victims(waiting, running, free_slots=free_slots, free_kv=free_kv, evictions={})
    assert all(len(set(each)) == len(each) for each in (found.rest, found.leave))
    assert not any(is_urgent(running[index].priority) for index in (*found.rest, *found.leave))
    assert not any(running[index].rests for index in found.rest)
    assert all(running[index].rests or index in found.rest for index in found.leave)
    stay = [n for n in range(len(running)) if not running[n].rests and n not in found.rest]
    if found.rest:
        lowest_out = min(running[index].priority for index in found.rest)
        assert all(
            is_urgent(running[n].priority) or running[n].priority <= lowest_out for n in stay
        )
    if found != GivingWay():
        room = free_kv + sum(running[n].kv for n in found.leave)
        room -= sum(running[n].grows for n in stay)
        assert free_slots + len(found.rest) >= 1
        assert room >= waiting[0].kv


@pytest.mark.parametrize("urgent", range(8))
def test_batch_work_keeps_to_its_slots(urgent: int) -> None:
    limit = admission_limit(36, 32, urgent)
    assert limit - urgent <= 32
    assert limit == min(36, 32 + urgent)


@pytest.mark.parametrize(
    ("prompts", "enter"),
    [
        ([], 0),
        ([900], 1),
        ([900, 1], 1),
        ([100, 100], 2),
        ([100, 156, 1], 2),
        ([100, 157, 1], 1),
        ([28] * 16, 9),
    ],
)
def test_a_burst_enters_in_groups_of_short_prompts(prompts: list[int], enter: int) -> None:
    assert entering(prompts, 256) == enter


def test_only_on_a_processor_a_burst_is_parted() -> None:
    assert pace("balanced", 32).together is None
    assert pace("throughput", 32, processor=True).together is None
    assert pace("balanced", 32, processor=True).together == TOGETHER
    assert pace("latency", 32, processor=True).together == TOGETHER


def test_headroom_grows_as_latency_is_favoured() -> None:
    paces = [pace(favour, 32) for favour in ("throughput", "balanced", "latency")]
    assert [each.headroom for each in paces] == [0, 4, 8]
    assert [each.alone for each in paces] == [False, False, True]
    assert pace("balanced", 32, processor=True).alone
    assert pace("balanced", 1).headroom == 1
    with pytest.raises(ValueError, match="none of throughput, balanced, latency"):
        pace("both", 32)
