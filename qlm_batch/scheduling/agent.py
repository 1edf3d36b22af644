"""What the agent beside an engine decides: how much to hold, in which order, and when to try again.

Pure rules, called by the worker's runner and by the simulated cluster alike.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

PULL_BELOW = 1.5
"""Claim more once less than this many running batches of requests are in hand."""

PULL_TO = 2.0
"""Claim up to this many running batches, so that a new order bites within seconds."""

INTERACTIVE_PRIORITY = 0
"""The engine priority of interactive work; batch work is always behind it."""

CALM = 0.8
"""Below this share of the target for a step there is room for more batch work."""

SHARE_WINDOW_S = 60.0
"""Seconds after which an instance's share of interactive work has forgotten two thirds."""

_INTERACTIVE_BASE = 2**40
"""Above any time in tenths of seconds: what is left of it stays below INTERACTIVE_PRIORITY."""

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


def batch_cap(cap: int, slots: int, *, step_s: float | None, target_s: float, quiet: bool) -> int:
    """The next cap on batch requests inside the engine, given how long its steps take now.

    A step is the time per output token of every stream. Over the target the cap falls by a tenth,
    well below it it rises; never under a quarter of the slots, so that batch work is not starved.
    While `quiet` (no interactive request lately) or untold, it is the plain `concurrency_cap`.
    """
    full = concurrency_cap(slots)
    if quiet or step_s is None:
        return full
    if step_s > target_s:
        return max(1, slots // 4, cap * 9 // 10)
    if step_s < CALM * target_s:
        return min(full, cap + max(1, slots // 16))
    return cap


def interactive_share(before: float, interactive: int, slots: int, seconds: float) -> float:
    """The share of the running batch that interactive requests take, in [0, 1]: a fading mean.

    `interactive` requests were inside the engine during the last `seconds`.
    """
    now = min(1.0, interactive / max(1, slots))
    kept = math.exp(-max(0.0, seconds) / SHARE_WINDOW_S)
    return round(before * kept + now * (1.0 - kept), 4)


def engine_priority(deadline: float) -> int:
    """The engine's priority for batch work due at `deadline` (Unix seconds): earliest first."""
    return max(INTERACTIVE_PRIORITY + 1, int(deadline))


def interactive_priority(due_at: float) -> int:
    """The engine's priority for a call whose first token is due then (Unix seconds).

    Ahead of any batch work; among calls the earliest due comes first, to a tenth of a second.
    """
    return min(INTERACTIVE_PRIORITY, int(due_at * 10) - _INTERACTIVE_BASE)


def tokens_left(ages: Sequence[int], typical: float) -> float:
    """Output tokens the last of these running requests is likely to make still.

    `ages` are their output tokens so far, `typical` the mean of requests that have ended.
    """
    return max(1.5 * typical - min(ages, default=0), 0.5 * typical)


def worth_retrying(status_code: int) -> bool:
    """Whether an answer with this status may turn out better if the same request is sent again."""
    return status_code >= 500 or status_code in _RETRIED_STATUS


def retry_delay(attempts: int) -> float | None:
    """Seconds to wait after `attempts` failed attempts, None when it was the last."""
    return RETRY_DELAYS_S[attempts - 1] if attempts <= len(RETRY_DELAYS_S) else None
