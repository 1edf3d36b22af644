"""Who gives way to whom."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlm_batch.scheduling.agent import INTERACTIVE_PRIORITY, engine_priority
from qlm_batch.scheduling.eviction import (
    MAX_EVICTIONS,
    Running,
    Waiting,
    admission_limit,
    is_urgent,
    pace,
    victims,
)

DUE = engine_priority(1_800_000_000.0)


def batch(id: str, due: int = DUE, arrival: float = 0.0, kv: int = 10, grows: int = 0) -> Running:
    return Running(id, due, arrival, kv, grows)


def interactive(id: str, kv: int = 1) -> Waiting:
    return Waiting(id, kv)


def chosen(
    waiting: list[Waiting],
    running: list[Running],
    free_slots: int = 0,
    free_kv: int = 1000,
    evictions: dict[str, int] | None = None,
) -> list[str]:
    found = victims(
        waiting, running, free_slots=free_slots, free_kv=free_kv, evictions=evictions or {}
    )
    return [running[index].id for index in found]


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
    assert chosen([interactive("i", kv=7)], running, free_slots=9, free_kv=0) == ["3", "2"]


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
        st.tuples(st.booleans(), st.integers(0, 3), st.integers(0, 20), st.integers(0, 2)),
        max_size=8,
    ),
    free_slots=st.integers(0, 3),
    free_kv=st.integers(0, 40),
)
def test_victims_are_batch_work_whose_absence_lets_someone_in(
    needs: list[int],
    held: list[tuple[bool, int, int, int]],
    free_slots: int,
    free_kv: int,
) -> None:
    waiting = [interactive(f"w{n}", kv) for n, kv in enumerate(needs)]
    running = [
        Running(f"r{n}", INTERACTIVE_PRIORITY if urgent else DUE + due, n, kv, grows)
        for n, (urgent, due, kv, grows) in enumerate(held)
    ]
    found = victims(waiting, running, free_slots=free_slots, free_kv=free_kv, evictions={})
    assert len(set(found)) == len(found)
    assert not any(is_urgent(running[index].priority) for index in found)
    stay = [request for n, request in enumerate(running) if n not in found]
    if found:
        lowest_out = min(running[index].priority for index in found)
        assert all(is_urgent(r.priority) or r.priority <= lowest_out for r in stay)
        room = free_kv + sum(running[n].kv for n in found) - sum(r.grows for r in stay)
        assert free_slots + len(found) >= 1
        assert room >= waiting[0].kv


@pytest.mark.parametrize("urgent", range(8))
def test_batch_work_keeps_to_its_slots(urgent: int) -> None:
    limit = admission_limit(36, 32, 32, urgent_running=urgent, urgent_waiting=0)
    assert limit - urgent <= 32
    assert limit <= 36
    assert admission_limit(36, 32, 32, 0, urgent) >= min(36, 32 + urgent)


def test_a_place_stays_free_of_batch_work_while_there_are_interactive_requests() -> None:
    assert admission_limit(64, 64, 60, urgent_running=0, urgent_waiting=0) == 64
    assert admission_limit(64, 64, 60, urgent_running=20, urgent_waiting=0) == 62
    assert admission_limit(64, 64, 62, urgent_running=20, urgent_waiting=1) == 63
    assert admission_limit(2, 2, 1, urgent_running=1, urgent_waiting=0) == 2


def test_headroom_grows_as_latency_is_favoured() -> None:
    paces = [pace(favour, 32) for favour in ("throughput", "balanced", "latency")]
    assert [each.headroom for each in paces] == [0, 4, 8]
    assert [each.alone for each in paces] == [False, True, True]
    assert pace("balanced", 1).headroom == 1
    with pytest.raises(ValueError, match="none of throughput, balanced, latency"):
        pace("both", 32)
