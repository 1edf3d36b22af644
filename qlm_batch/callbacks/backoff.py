"""When a delivery is tried again."""

from __future__ import annotations

_MINUTE, _HOUR = 60.0, 3600.0

DELAYS_S = (
    0.0,
    5.0,
    5 * _MINUTE,
    30 * _MINUTE,
    2 * _HOUR,
    5 * _HOUR,
    10 * _HOUR,
    14 * _HOUR,
    20 * _HOUR,
    24 * _HOUR,
)
"""The wait before each attempt, the first included: the schedule Standard Webhooks suggests."""

JITTER = 0.2
"""Waits are stretched by up to this share, so that many deliveries do not return together."""

_LONGEST_S = 24 * _HOUR


def next_delay_s(
    made: int, *, jitter: float, retry_after_s: float | None = None, gone: bool = False
) -> float | None:
    """Seconds until the next attempt after `made` failed ones; None when there is no next.

    `jitter` in [0, 1) picks the stretch. A receiver's `retry_after_s` is honoured up to a day where
    it asks for a longer wait. `gone` (HTTP 410) ends the attempts.
    """
    if gone or made >= len(DELAYS_S):
        return None
    delay = DELAYS_S[made] * (1.0 + JITTER * jitter)
    if retry_after_s is not None:
        delay = max(delay, min(retry_after_s, _LONGEST_S))
    return delay
