"""The way from the event loop to the store: threads, back-off and the database's clock."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, Protocol, TypeVar

import structlog

from qlm_batch.domain.errors import Unavailable
from qlm_batch.domain.store import InstanceStore, Ledger

P = ParamSpec("P")
T = TypeVar("T")
log = structlog.get_logger(__name__)

THREADS = 4
BACKOFF_S = (0.1, 0.25, 0.5, 1.0, 2.0)
CLOCK_CHECK_S = 60.0
SLOW_S = 1.0
"""An answer that took longer does not tell what time it is."""


class WorkerStore(Ledger, InstanceStore, Protocol):
    """The part of the store a worker uses."""

    def now(self) -> float:
        """The database's clock."""
        ...


def backoff(failures: int) -> float:
    """Seconds to wait after so many failures in a row, counted from 1."""
    return BACKOFF_S[min(failures, len(BACKOFF_S)) - 1]


class Link:
    """Calls the store off the loop, and keeps an idea of the database's time."""

    def __init__(self, store: WorkerStore) -> None:
        self.store = store
        self._threads = ThreadPoolExecutor(max_workers=THREADS, thread_name_prefix="store")
        self._offset = 0.0
        self._checked = float("-inf")

    async def call(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """The result of a blocking call, made in a thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, partial(function, *args, **kwargs))

    def now(self) -> float:
        """The database's clock, as of the last check."""
        return time.monotonic() + self._offset

    async def check_clock(self) -> None:
        """Compare clocks, once in a while; must have succeeded before `now` means anything."""
        before = time.monotonic()
        if before - self._checked < CLOCK_CHECK_S:
            return
        there = await self.call(self.store.now)
        after = time.monotonic()
        if after - before > SLOW_S and self._checked > float("-inf"):
            # Read somewhere in between: the look before, counted on, is the better one.
            return
        self._offset = there - (before + after) / 2
        self._checked = after

    def failed(self, doing: str, error: Exception, failures: int) -> None:
        """Note that a call failed, `failures` times in a row; only the first tells everything."""
        if failures > 1:
            log.debug("store failed again", doing=doing, failures=failures, error=str(error))
        elif isinstance(error, Unavailable):
            log.warning("store is away", doing=doing, error=error.in_full)
        else:
            log.error("store failed", doing=doing, exc_info=error)

    def close(self) -> None:
        """Start no more calls."""
        self._threads.shutdown(wait=False, cancel_futures=True)


async def pause(event: asyncio.Event, seconds: float) -> None:
    """Until the event is set, at most so long."""
    if event.is_set():
        return
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        return
