"""When a failed delivery is tried again."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlm_batch.callbacks.backoff import DELAYS_S, JITTER, next_delay_s
from qlm_batch.callbacks.webhook import retry_after_s

DAY_S = 86_400.0


def test_attempts_spread_over_days_and_then_end() -> None:
    waits = [next_delay_s(made, jitter=0.0) for made in range(1, 11)]
    assert waits == [5, 300, 1800, 7200, 18_000, 36_000, 50_400, 72_000, 86_400, None]


@settings(deadline=None)
@given(made=st.integers(1, 9), jitter=st.floats(0, 1, exclude_max=True))
def test_jitter_only_stretches_and_only_a_little(made: int, jitter: float) -> None:
    delay = next_delay_s(made, jitter=jitter)
    assert delay is not None
    assert DELAYS_S[made] <= delay <= DELAYS_S[made] * (1 + JITTER)


@pytest.mark.parametrize(
    ("asked", "waited"), [(1.0, 5.0), (60.0, 60.0), (10 * DAY_S, DAY_S), (None, 5.0)]
)
def test_a_receiver_may_ask_for_a_longer_wait_up_to_a_day(
    asked: float | None, waited: float
) -> None:
    assert next_delay_s(1, jitter=0.0, retry_after_s=asked) == waited


def test_a_receiver_that_is_gone_is_left_alone() -> None:
    assert next_delay_s(1, jitter=0.0, gone=True, retry_after_s=5.0) is None


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("120", 120.0),
        ("-5", 0.0),
        ("Thu, 01 Jan 1970 00:16:50 GMT", 10.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        ("soon", None),
        ("inf", None),
        ("", None),
        (None, None),
    ],
)
def test_retry_after_is_a_number_or_a_date(header: str | None, seconds: float | None) -> None:
    assert retry_after_s(header, now=1_000.0) == seconds
