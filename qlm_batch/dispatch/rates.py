"""Token buckets that several processes share, kept in Redis under its own clock."""

from __future__ import annotations

from typing import Any

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from qlm_batch.dispatch.celery_app import client_url

TIMEOUT_S = 0.5
"""A slower Redis counts as away: every limited request waits for it."""

_TAKE = """
local size, rate = tonumber(ARGV[1]), tonumber(ARGV[2])
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local held = redis.call('HMGET', KEYS[1], 'level', 'at')
local level = math.min(size, (tonumber(held[1]) or size)
    + math.max(0, now - (tonumber(held[2]) or now)) * rate)
local granted = 0
if level >= 1 then
    level, granted = level - 1, 1
end
redis.call('HSET', KEYS[1], 'level', tostring(level), 'at', tostring(now))
redis.call('PEXPIRE', KEYS[1], math.ceil(size / rate * 1000) + 1000)
return {granted, tostring(level)}
"""


class SharedBuckets:
    """Buckets by name; one that nobody has used for the time it takes to fill is forgotten."""

    def __init__(self, redis_url: str) -> None:
        self._redis: Any = redis.asyncio.Redis.from_url(
            client_url(redis_url),
            socket_timeout=TIMEOUT_S,
            socket_connect_timeout=TIMEOUT_S,
            retry=Retry(NoBackoff(), 0),
        )
        self._take = self._redis.register_script(_TAKE)

    async def take(self, name: str, size: int, rate: float) -> tuple[bool, float] | None:
        """Whether one was to be had from the bucket, and what is left; None when Redis is away.

        `size` and `rate`, what it holds and what flows in per second, are above 0.
        """
        try:
            granted, level = await self._take(keys=[f"qlm:rate:{name}"], args=[size, rate])
        except (RedisError, OSError, TimeoutError):
            return None
        return bool(granted), float(level)

    async def close(self) -> None:
        """Give the connections back."""
        await self._redis.aclose()
