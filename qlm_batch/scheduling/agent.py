"""What the agent beside an engine decides: how much to hold, in which order, and when to try again.

Pure rules, called by the worker's runner and by the simulated cluster alike.
"""

from __future__ import annotations

PULL_BELOW = 1.5
"""Claim more once less than this many running batches of requests are in hand."""

PULL_TO = 2.0
"""Claim up to this many running batches, so that a new order bites within seconds."""

INTERACTIVE_PRIORITY = 0
"""The engine priority of interactive work; batch work is always behind it."""

RETRY_DELAYS_S = (0.2, 1.0, 3.0)
"""Waits before a request the engine failed on is tried again."""

_RETRIED_STATUS = frozenset({408, 409, 425, 429})


def pull_size(in_hand: int, slots: int, *, suspect: bool = False) -> int:
    """How many requests to claim now, 0 for none.

    `in_hand` counts requests without an outcome, `slots` the largest running batch. While a
    `suspect` slice is held nothing joins it: it has to stand alone when its engine dies.
    """
    if suspect or slots <= 0 or in_hand >= PULL_BELOW * slots:
        return 0
    return int(PULL_TO * slots) - in_hand


def concurrency_cap(slots: int) -> int:
    """How many batch requests may be inside the engine at once.

    A quarter above the slots hides the hop between an end and the next start. The rest waits
    outside, so that an engine's death makes suspects of few.
    """
    return slots + max(1, slots // 4)


def engine_priority(deadline: float) -> int:
    """The engine's priority for batch work due at `deadline` (Unix seconds): earliest first."""
    return max(INTERACTIVE_PRIORITY + 1, int(deadline))


def worth_retrying(status_code: int) -> bool:
    """Whether an answer with this status may turn out better if the same request is sent again."""
    return status_code >= 500 or status_code in _RETRIED_STATUS


def retry_delay(attempts: int) -> float | None:
    """Seconds to wait after `attempts` failed attempts, None when it was the last."""
    return RETRY_DELAYS_S[attempts - 1] if attempts <= len(RETRY_DELAYS_S) else None
