"""Deadline buckets."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qlm_batch.domain.buckets import RATIO, bucket_of

lefts = st.floats(1.001, 30 * 86400)


@given(a=lefts, b=lefts, now=st.floats(0, 2e9))
def test_deadlines_that_share_a_bucket_differ_by_at_most_a_sixteenth_of_the_time_left(
    a: float, b: float, now: float
) -> None:
    first, last = sorted((now + a, now + b))
    if bucket_of(first, now) == bucket_of(last, now):
        assert last - first <= RATIO * (first - now) + 1e-4


@given(a=st.floats(-1e6, 1e7), b=st.floats(-1e6, 1e7))
def test_a_later_deadline_never_gets_a_lower_bucket(a: float, b: float) -> None:
    first, last = sorted((a, b))
    assert bucket_of(first, 0.0) <= bucket_of(last, 0.0)


def test_a_day_and_two_days_are_told_apart() -> None:
    assert bucket_of(86_400.0, 0.0) != bucket_of(2 * 86_400.0, 0.0)


def test_a_minute_more_than_a_day_is_the_same_bucket_as_a_day() -> None:
    assert bucket_of(86_400.0, 0.0) == bucket_of(86_460.0, 0.0)


def test_what_is_past_due_shares_the_lowest_bucket() -> None:
    assert bucket_of(5.0, 100.0) == bucket_of(99.0, 100.0) == bucket_of(100.5, 100.0) == 0
