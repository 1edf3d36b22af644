"""The instances as an event loop sees them: a moment old, and never waited for twice."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from qlm_batch.domain.snapshot import InstanceView

FRESH_S = 1.0
"""An older view is refreshed by whoever looks, who does not wait for that."""
STALE_S = 5.0
"""An older view is not shown."""


class Fleet:
    """The instances as of a moment ago, asked for at most once at a time."""

    def __init__(self, ask: Callable[[], Sequence[InstanceView]], threads: ThreadPoolExecutor):
        self._ask = ask
        self._threads = threads
        self._views: Sequence[InstanceView] = ()
        self._at = float("-inf")
        self._asking: asyncio.Task[None] | None = None

    async def views(self, most_s: float = STALE_S) -> Sequence[InstanceView]:
        """All instances, from at most `most_s` ago. Raises Unavailable."""
        age = time.monotonic() - self._at
        if age > FRESH_S or age > most_s:
            if self._asking is None or self._asking.done():
                self._asking = asyncio.create_task(self._refresh())
            if age > most_s:
                await asyncio.shield(self._asking)
        return self._views

    async def _refresh(self) -> None:
        loop = asyncio.get_running_loop()
        self._views = await loop.run_in_executor(self._threads, self._ask)
        self._at = time.monotonic()
