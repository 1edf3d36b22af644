"""Streams of an engine, and what stands in one server-sent event."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, Self

import orjson

from qlm_batch.domain.engine import EngineAnswer

DONE = "[DONE]"
"""What OpenAI sends as the data of the last event."""

_ERROR = '{"error"'


class Stream:
    """The events of a generator that has already given its first.

    Having run up to there, it cleans up when it is closed, which an unstarted one would not.
    """

    def __init__(self, first: str, rest: AsyncGenerator[str, None]) -> None:
        self._first: str | None = first
        self._rest = rest

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        if self._first is not None:
            first, self._first = self._first, None
            return first
        return await anext(self._rest)

    async def aclose(self) -> None:
        """Let the generator clean up."""
        self._first = None
        await self._rest.aclose()


async def opened(events: AsyncGenerator[str, None]) -> EngineAnswer | Stream:
    """The stream of `events`, or an answer where the first is an error.

    Returns with the first event. However it ends, nothing but the stream is left to close.
    """
    try:
        first = await anext(events)
    except StopAsyncIteration:
        return error_event_answer("")
    except BaseException:
        await events.aclose()
        raise
    if is_error(first):
        await events.aclose()
        return error_event_answer(first)
    return Stream(first, events)


def is_error(event: str) -> bool:
    """Whether an event tells of a failure."""
    return event.startswith(_ERROR)


def error_event(message: str, code: int = 500) -> str:
    """An event that tells of a failure."""
    error = {"message": message, "type": "server_error", "param": None, "code": code}
    return orjson.dumps({"error": error}).decode()


def error_event_answer(event: str) -> EngineAnswer:
    """The answer for a request that failed before its first event; 500 where none says more."""
    event = event or error_event("The engine ended the stream without an event.")
    error: Any = orjson.loads(event)["error"]
    code = error.get("code") if isinstance(error, dict) else None
    status = code if isinstance(code, int) and 400 <= code < 600 else 500
    return EngineAnswer(status, event)
