"""Which deadlines are close enough to share a run."""

from __future__ import annotations

import math

RATIO = 1 / 16
"""Most that deadlines in one bucket differ, as a share of the earliest one's time left."""

MAX_RUNS = 1000
"""Most runs one batch may be cut into: each costs the planner as much as a small batch."""

_STEP = math.log1p(RATIO)


def bucket_of(deadline: float, now: float) -> int:
    """The bucket of an absolute `deadline` seen at `now`; later deadlines never get a lower one.

    Buckets grow with the time left, so that what is due in minutes is told apart finely and what is
    due in a week is not. Everything due within one second, or already past, shares bucket 0.
    """
    left = deadline - now
    return 0 if left <= 1.0 else 1 + int(math.log(left) / _STEP)
