"""The rule by which models take turns on an instance."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlm_batch.scheduling.swapping import (
    CALLS_DRAIN_SWAPS,
    CALLS_SWAPS,
    DRAIN_SWAPS,
    RETRY_DELAYS_S,
    STAY_SWAPS,
    THIN,
    Change,
    Hosted,
    Parting,
    next_change,
    retry_delay,
    stay_s,
)

SWAP_S = 10.0


def awake(
    model: str = "a", for_s: float = 1.0, *, due: float = math.inf, calls: int = 0, left: float = 0
) -> Hosted:
    return Hosted(model, for_s, SWAP_S, due, calls, left)


def asleep(model: str = "b", *, due: float = math.inf, calls: int = 0) -> Hosted:
    return Hosted(model, None, SWAP_S, due, calls)


def woken(*hosted: Hosted, room: int = 1) -> str | None:
    change = next_change(hosted, room)
    return None if change is None else change.wakes


def test_without_work_for_a_sleeping_model_nothing_changes() -> None:
    assert next_change([awake(due=5.0), asleep()], 1) is None
    assert next_change([awake(), asleep()], 1) is None


def test_a_model_without_work_yields_at_once() -> None:
    change = next_change([awake(for_s=0.0), asleep(due=5.0)], 1)
    assert change == Change("b", "a", Parting.DRAIN, DRAIN_SWAPS * SWAP_S)


def test_the_awake_model_finishes_what_it_holds_before_later_work_of_another() -> None:
    assert woken(awake(due=5.0, for_s=1e6), asleep(due=6.0)) is None


def test_work_due_earlier_takes_the_place_once_the_awake_model_has_had_its_stay() -> None:
    assert woken(awake(due=6.0, for_s=STAY_SWAPS * SWAP_S - 1), asleep(due=5.0)) is None
    assert woken(awake(due=6.0, for_s=STAY_SWAPS * SWAP_S), asleep(due=5.0)) == "b"


@pytest.mark.parametrize(
    ("share", "due", "yields"),
    [
        pytest.param(THIN, 5.0, True, id="thin"),
        pytest.param(2 * THIN, 5.0, False, id="not thin"),
        pytest.param(THIN, 6.0, False, id="due later"),
    ],
)
def test_the_last_of_a_models_work_gives_way_to_work_due_at_the_same_time(
    share: float, due: float, yields: bool
) -> None:
    thin = replace(awake(due=5.0, for_s=STAY_SWAPS * SWAP_S), share=share)
    assert woken(thin, asleep(due=due)) == ("b" if yields else None)


def test_of_two_sleeping_models_the_more_urgent_comes_first() -> None:
    assert woken(awake(), asleep("b", due=9.0), asleep("c", due=5.0)) == "c"


def test_an_interactive_request_comes_before_any_batch_work() -> None:
    assert woken(awake(), asleep("b", due=1.0), asleep("c", calls=1)) == "c"


def test_an_interactive_request_interrupts_batch_work_only_after_its_stay() -> None:
    assert woken(awake(due=5.0, for_s=STAY_SWAPS * SWAP_S - 1), asleep(calls=1)) is None
    assert woken(awake(due=5.0, for_s=STAY_SWAPS * SWAP_S), asleep(calls=1)) == "b"


def test_batch_work_gets_its_share_however_many_calls_there_are() -> None:
    busy = awake(calls=100, for_s=CALLS_SWAPS * SWAP_S - 1)
    assert woken(busy, asleep(due=5.0)) is None
    assert woken(awake(calls=100, for_s=CALLS_SWAPS * SWAP_S), asleep(due=5.0)) == "b"


def test_what_soon_ends_by_itself_is_drained_and_what_does_not_is_stopped() -> None:
    for waiting, most in ((asleep(due=5.0), DRAIN_SWAPS), (asleep(calls=1), CALLS_DRAIN_SWAPS)):
        for left, parting in ((most * SWAP_S, Parting.DRAIN), (most * SWAP_S + 1, Parting.STOP)):
            change = next_change([awake(due=9.0, for_s=1e6, left=left), waiting], 1)
            assert change is not None
            assert change.parting is parting


def test_a_free_place_is_taken_without_anyone_leaving() -> None:
    change = next_change([awake(due=1.0), asleep(due=5.0)], 2)
    assert change is not None
    assert (change.wakes, change.sleeps) == ("b", None)


def test_with_several_places_the_one_with_nothing_to_do_leaves() -> None:
    change = next_change([awake("a", due=1.0), awake("c"), asleep(due=5.0)], 2)
    assert change is not None
    assert change.sleeps == "c"


def test_with_several_places_calls_displace_the_work_that_can_wait_longest() -> None:
    change = next_change([awake("a", 1e6, due=1.0), awake("c", 1e6, due=9.0), asleep(calls=1)], 2)
    assert change is not None
    assert change.sleeps == "c"


models = st.builds(
    Hosted,
    model=st.uuids().map(str),
    awake_s=st.none() | st.floats(0, 1e4),
    swap_s=st.floats(0.1, 100),
    due=st.floats(0, 1e4) | st.just(math.inf),
    calls=st.integers(0, 3),
    left_s=st.floats(0, 1e3),
)


@given(st.lists(models, max_size=5), st.integers(1, 4))
def test_a_change_wakes_a_sleeper_with_work_and_never_overfills(
    hosted: list[Hosted], room: int
) -> None:
    change = next_change(hosted, room)
    if change is None:
        return
    by_name = {own.model: own for own in hosted}
    assert by_name[change.wakes].awake_s is None
    assert by_name[change.wakes].wanted
    up = sum(own.awake_s is not None for own in hosted)
    if change.sleeps is None:
        assert up < room
    else:
        assert by_name[change.sleeps].awake_s is not None


@given(st.lists(models, max_size=5), st.integers(1, 4))
def test_a_sleeper_with_work_never_waits_beside_an_idle_model(
    hosted: list[Hosted], room: int
) -> None:
    up = [own for own in hosted if own.awake_s is not None]
    waiting = any(own.wanted and own.awake_s is None for own in hosted)
    if waiting and (len(up) < room or any(not own.wanted for own in up)):
        assert next_change(hosted, room) is not None


def test_how_long_a_call_would_wait_for_a_swap_is_known() -> None:
    busy = awake(due=5.0, for_s=15.0)
    assert stay_s([busy, asleep()], "b", 1) == STAY_SWAPS * SWAP_S - 15.0
    assert stay_s([busy, asleep()], "a", 1) == 0.0
    assert stay_s([busy, asleep()], "b", 2) == 0.0
    assert stay_s([awake(), asleep()], "b", 1) == 0.0


@given(st.lists(models, min_size=1, max_size=5), st.integers(1, 4))
def test_a_call_that_would_not_wait_makes_the_swap_begin(hosted: list[Hosted], room: int) -> None:
    called = next((own for own in hosted if own.awake_s is None), None)
    if called is None or any(own.calls for own in hosted if own.awake_s is None):
        return
    asked = [replace(own, calls=1) if own is called else own for own in hosted]
    begins = next_change(asked, room) is not None
    assert begins == (stay_s(hosted, called.model, room) == 0.0)


def test_waking_is_tried_again_a_few_times() -> None:
    assert [retry_delay(n) for n in (1, 2, 3)] == pytest.approx([*RETRY_DELAYS_S, None])
