"""Server-sent events as OpenAI sends them, to a client that may stall or leave."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

import structlog
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from qlm_batch.domain.json_text import one_line_for_all

STALL_S = 60.0
"""A client that takes nothing for this long is hung up on."""
DONE = b"data: [DONE]\n\n"

log = structlog.get_logger(__name__)


class EventResponse(Response):
    """Sends each of `frames` as it comes, and closes them when the client leaves or stalls.

    The head goes with the first frame: what has begun cleans up when it is closed, which frames
    that never did would not. Frames end with the one that ends in DONE, or by themselves; none is
    empty.
    """

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
        try:
            async with while_there(receive):
                await self._send(send)
        except ClientDisconnect:
            return
        except TimeoutError:
            log.info("client stalled", seconds=self._stall_s)
        finally:
            await self._frames.aclose()

    async def _send(self, send: Send) -> None:
        frame = await anext(self._frames, b"")
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )
        while True:
            more = frame != b"" and not frame.endswith(DONE)
            async with asyncio.timeout(self._stall_s):
                await send({"type": "http.response.body", "body": frame, "more_body": more})
            if not more:
                return
            frame = await anext(self._frames, b"")


@asynccontextmanager
async def while_there(receive: Receive) -> AsyncIterator[None]:
    """End the block with ClientDisconnect once the client, whose body was read, has left."""
    block = asyncio.current_task()
    assert block is not None
    left = False

    async def watch() -> None:
        nonlocal left
        while (await receive())["type"] != "http.disconnect":
            pass
        left = True
        block.cancel()

    watching = asyncio.create_task(watch())
    try:
        yield
    except asyncio.CancelledError:
        # Both may have happened: the client left, and somebody else ends this.
        if left and not block.uncancel():
            raise ClientDisconnect from None
        raise
    finally:
        watching.cancel()


def frames_of(events: Sequence[str]) -> bytes:
    """Events in the form they are sent in, each on one line for every reader."""
    return b"".join(b"data: %b\n\n" % one_line_for_all(event.encode()) for event in events)
