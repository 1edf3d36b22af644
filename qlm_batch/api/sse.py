"""Server-sent events as OpenAI sends them, to a client that may stall or leave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence

import structlog
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

STALL_S = 60.0
"""A client that takes nothing for this long is hung up on."""
DONE = b"data: [DONE]\n\n"

log = structlog.get_logger(__name__)


class EventResponse(Response):
    """Sends each of `frames` as it comes, and closes them when the client leaves or stalls."""

    media_type = "text/event-stream"

    def __init__(
        self,
        frames: AsyncGenerator[bytes, None],
        headers: Mapping[str, str],
        *,
        stall_s: float = STALL_S,
    ) -> None:
        super().__init__(
            headers={"cache-control": "no-cache", "x-accel-buffering": "no", **headers}
        )
        del self.headers["content-length"]
        self._frames = frames
        self._stall_s = stall_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one ASGI call."""
        sending = asyncio.create_task(self._send(send))
        leaving = asyncio.create_task(gone(receive))
        try:
            await asyncio.wait({sending, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (sending, leaving):
                task.cancel()
            (fault, _) = await asyncio.gather(sending, leaving, return_exceptions=True)
            await self._frames.aclose()
        if isinstance(fault, TimeoutError):
            log.info("client stalled", seconds=self._stall_s)
        elif isinstance(fault, Exception):
            raise fault

    async def _send(self, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        async for frame in self._frames:
            async with asyncio.timeout(self._stall_s):
                await send({"type": "http.response.body", "body": frame, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def gone(receive: Receive) -> None:
    """Return once the client has left; its body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


def frames_of(events: Sequence[str]) -> bytes:
    """Events in the form they are sent in."""
    return b"".join(b"data: %b\n\n" % event.encode() for event in events)
