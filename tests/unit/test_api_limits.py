"""The rate limit of a key."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qlm_batch.api.limits import RateLimiter


def test_a_full_minute_may_be_spent_at_once_and_then_no_more() -> None:
    limiter = RateLimiter()
    assert [limiter.take("k", 3, 0.0).wait_s > 0 for _ in range(4)] == [False, False, False, True]


def test_the_wait_told_is_long_enough_and_not_longer() -> None:
    limiter = RateLimiter()
    for _ in range(2):
        limiter.take("k", 2, 0.0)
    wait = limiter.take("k", 2, 0.0).wait_s
    assert limiter.take("k", 2, wait - 0.01).wait_s > 0
    assert limiter.take("k", 2, wait + 0.01).wait_s == 0


def test_keys_do_not_share_a_bucket() -> None:
    limiter = RateLimiter()
    assert limiter.take("one", 1, 0.0).wait_s == 0
    assert limiter.take("two", 1, 0.0).wait_s == 0
    assert limiter.take("one", 1, 0.0).wait_s > 0


def test_a_limit_of_zero_lets_nothing_through() -> None:
    assert RateLimiter().take("k", 0, 0.0).wait_s > 0


@given(
    st.integers(min_value=1, max_value=100),
    st.lists(st.floats(min_value=0, max_value=2), max_size=200),
)
def test_no_minute_grants_more_than_the_bucket_and_its_refill(
    per_minute: int, gaps: list[float]
) -> None:
    limiter = RateLimiter()
    now = 0.0
    granted = 0
    for gap in gaps:
        now += gap
        granted += limiter.take("k", per_minute, now).wait_s == 0
    assert granted <= per_minute * (1 + now / 60) + 1e-6
