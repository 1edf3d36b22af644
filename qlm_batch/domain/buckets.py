"""Which deadlines are close enough to share a run, and which prompts are of one length."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import lru_cache

RATIO = 1 / 16
"""Most that deadlines in one bucket differ, as a share of the earliest one's time left."""

MAX_RUNS = 1000
"""Most runs one batch may be cut into: each costs the planner as much as a small batch."""

_STEP = math.log1p(RATIO)

PROMPT_RATIO = 1.25
"""What prompts of neighbouring buckets differ by: prompts made from one template share a bucket."""

_PROMPT_STEP = math.log(PROMPT_RATIO)

PromptMix = tuple[tuple[int, int], ...]
"""How many requests have prompts of each bucket, by ascending bucket; empty where not known."""


def bucket_of(deadline: float, now: float) -> int:
    """The bucket of an absolute `deadline` seen at `now`; later deadlines never get a lower one.

    Buckets grow with the time left, so that what is due in minutes is told apart finely and what is
    due in a week is not. Everything due within one second, or already past, shares bucket 0.
    """
    left = deadline - now
    return 0 if left <= 1.0 else 1 + int(math.log(left) / _STEP)


@lru_cache(maxsize=1 << 16)
def prompt_bucket(tokens: int) -> int:
    """The bucket of a prompt of so many tokens, from 0 on; longer prompts never get a lower one."""
    return round(math.log(max(1, tokens)) / _PROMPT_STEP)


def prompt_mix(tokens: Iterable[int]) -> PromptMix:
    """The mix of prompts of these lengths."""
    counts: dict[int, int] = {}
    for length in tokens:
        bucket = prompt_bucket(length)
        counts[bucket] = counts.get(bucket, 0) + 1
    return tuple(sorted(counts.items()))
