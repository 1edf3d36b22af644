"""A bounded number of places, given to the most urgent waiter first."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class PrioritySlots:
    """`size` places; while all are taken, waiters queue by (priority, arrival), lowest first."""

    def __init__(self, size: int) -> None:
        self._free = size
        self._size = size
        self._waiters: list[tuple[int, int, asyncio.Future[None]]] = []
        self._arrivals = itertools.count()

    @property
    def taken(self) -> int:
        """Places in use."""
        return self._size - self._free

    @property
    def waiting(self) -> int:
        """Callers without a place yet."""
        return sum(1 for _, _, waiter in self._waiters if not waiter.done())

    @asynccontextmanager
    async def place(self, priority: int) -> AsyncIterator[None]:
        """Hold one place; cancelling the wait or the block gives it back."""
        await self._take(priority)
        try:
            yield
        finally:
            self._give()

    async def _take(self, priority: int) -> None:
        if self._free > 0:
            self._free -= 1
            return
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiters, (priority, next(self._arrivals), waiter))
        try:
            await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self._give()
            raise

    def _give(self) -> None:
        while self._waiters:
            _, _, waiter = heapq.heappop(self._waiters)
            if not waiter.done():
                waiter.set_result(None)
                return
        self._free += 1
