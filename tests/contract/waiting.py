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


async def in_the_turn(condition: Callable[[], bool], what: str, within_s: float = 30) -> None:
    """Return in the very turn of the event loop in which `condition` comes true.

    What lives in this loop alone, like the simulated engine, can then not have gone on since,
    however long the process was kept from running.
    """
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not in {within_s} s: {what}"
        await asyncio.sleep(0)
