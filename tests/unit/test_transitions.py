"""The tables of states, and what a lost lease leads to."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qlm_batch.domain.jobs import BatchState, SliceState
from qlm_batch.domain.transitions import (
    BATCH,
    CANCELLABLE,
    EVENT_OF,
    OPEN_SLICE,
    SLICE,
    SUSPECT_AFTER,
    TERMINAL,
    AfterLoss,
    after_lost_lease,
)


def test_every_state_has_its_row() -> None:
    assert set(BATCH) == set(BatchState)
    assert set(SLICE) == set(SliceState)


def test_every_terminal_state_announces_itself_and_no_other_does() -> None:
    assert set(EVENT_OF) == TERMINAL


def test_an_ended_batch_can_only_be_retried_and_a_refused_one_not_even_that() -> None:
    assert BATCH[BatchState.FAILED] == frozenset()
    for state in TERMINAL - {BatchState.FAILED}:
        assert BATCH[state] == {BatchState.IN_PROGRESS}


def test_what_can_be_cancelled_can_turn_cancelling_and_nothing_else_can() -> None:
    assert {state for state in BATCH if BatchState.CANCELLING in BATCH[state]} == CANCELLABLE


def test_every_batch_state_is_reached_from_validating() -> None:
    seen: set[BatchState] = set()
    ahead = {BatchState.VALIDATING}
    while ahead:
        state = ahead.pop()
        seen.add(state)
        ahead |= BATCH[state] - seen
    assert seen == set(BatchState)


def test_a_closed_slice_stays_closed_and_every_open_one_can_close() -> None:
    closed = set(SliceState) - OPEN_SLICE
    assert all(SLICE[state] == frozenset() for state in closed)
    assert all(closed <= SLICE[state] for state in OPEN_SLICE)


def test_only_an_assigned_slice_can_be_leased() -> None:
    assert {state for state in SLICE if SliceState.LEASED in SLICE[state]} == {SliceState.ASSIGNED}


@given(attempts=st.integers(0, SUSPECT_AFTER), remaining=st.integers(1, 64))
def test_a_slice_is_requeued_until_it_has_failed_as_a_suspect(
    attempts: int, remaining: int
) -> None:
    assert after_lost_lease(attempts, remaining) is AfterLoss.REQUEUE


@given(attempts=st.integers(SUSPECT_AFTER + 1, 50), remaining=st.integers(2, 64))
def test_a_suspect_that_kills_again_is_halved(attempts: int, remaining: int) -> None:
    assert after_lost_lease(attempts, remaining) is AfterLoss.BISECT


def test_a_single_line_that_kills_as_a_suspect_fails() -> None:
    assert after_lost_lease(SUSPECT_AFTER + 1, 1) is AfterLoss.FAIL_LINE
