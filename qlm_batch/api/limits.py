"""Limits per key: requests a minute, counted over all API processes, and queued work."""

from __future__ import annotations

import math
from dataclasses import dataclass

from qlm_batch.dispatch.rates import SharedBuckets
from qlm_batch.domain.errors import TooMany
from qlm_batch.domain.jobs import ApiKey
from qlm_batch.domain.store import Store

REQUESTS_PER_MINUTE = "requests_per_minute"
QUEUED_REQUESTS = "queued_requests"
QUEUED_TOKENS = "queued_tokens"
TTFT_MS = "ttft_ms"
"""Not a bound: the target for the first token of a key's interactive requests."""
LIMITS = (REQUESTS_PER_MINUTE, QUEUED_REQUESTS, QUEUED_TOKENS, TTFT_MS)
"""Every limit a key may have."""
QUEUED_RETRY_S = 30.0
_MINUTE_S = 60.0


@dataclass(frozen=True, slots=True)
class Allowance:
    """What is left of a limit: `wait_s` until the next request when none is, else 0."""

    limit: int
    remaining: int
    reset_s: float
    wait_s: float

    def headers(self) -> dict[str, str]:
        """OpenAI's rate-limit headers."""
        return {
            "x-ratelimit-limit-requests": str(self.limit),
            "x-ratelimit-remaining-requests": str(self.remaining),
            "x-ratelimit-reset-requests": f"{math.ceil(self.reset_s)}s",
        }


class RateLimiter:
    """A token bucket per key, full at first, refilled evenly over a minute.

    `shared` buckets count for all processes; without them, or while they are away, this process
    counts for itself.
    """

    def __init__(self, shared: SharedBuckets | None = None) -> None:
        self._shared = shared
        self._buckets: dict[str, tuple[float, float]] = {}

    async def spend(self, key_id: str, per_minute: int, now: float) -> Allowance:
        """As `take`, from the shared bucket where it is within reach."""
        taken = None
        if self._shared is not None and per_minute > 0:
            taken = await self._shared.take(key_id, per_minute, per_minute / _MINUTE_S)
        if taken is None:
            return self.take(key_id, per_minute, now)
        granted, level = taken
        return _allowance(per_minute, level, granted)

    async def close(self) -> None:
        """Give the shared buckets' connections back."""
        if self._shared is not None:
            await self._shared.close()

    def take(self, key_id: str, per_minute: int, now: float) -> Allowance:
        """Spend one request of `key_id` at `now`; nothing is spent where none is left."""
        rate = per_minute / _MINUTE_S
        level, seen = self._buckets.get(key_id, (float(per_minute), now))
        level = min(float(per_minute), level + (now - seen) * rate)
        granted = level >= 1
        if granted:
            level -= 1
        self._buckets[key_id] = (level, now)
        return _allowance(per_minute, level, granted)


def _allowance(per_minute: int, level: float, granted: bool) -> Allowance:
    rate = per_minute / _MINUTE_S
    return Allowance(
        limit=per_minute,
        remaining=int(level),
        reset_s=(per_minute - level) / rate if rate else _MINUTE_S,
        wait_s=0.0 if granted else (1 - level) / rate if rate else _MINUTE_S,
    )


def check_queued(store: Store, key: ApiKey) -> None:
    """Raise TooMany while the key's tenant has its limit of queued requests or tokens open."""
    if not key.limits.keys() & {QUEUED_REQUESTS, QUEUED_TOKENS}:
        return
    totals = store.queue_totals(key.tenant)
    queued = {QUEUED_REQUESTS: totals.requests, QUEUED_TOKENS: totals.tokens}
    for name, found in queued.items():
        limit = key.limits.get(name)
        if limit is not None and found >= limit:
            raise TooMany(
                f"{found:,} {name.removeprefix('queued_')} are queued and this key allows "
                f"{limit:,}. Wait until some are done, or cancel a batch.",
                code=f"{name}_exceeded",
                retry_after_s=QUEUED_RETRY_S,
            )
