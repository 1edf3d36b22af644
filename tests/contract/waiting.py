"""Waiting on a condition, with a deadline."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable


async def until(condition: Callable[[], bool], what: str, within_s: float = 30) -> None:
    """Return once `condition` holds; fail naming `what` when it does not in time."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not in {within_s} s: {what}"
        await asyncio.sleep(0.005)
