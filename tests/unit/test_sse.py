"""Server-sent events, to clients that leave or stall."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator

import pytest
from starlette.types import Message

from qlm_batch.api.sse import EventResponse, frames_of
from tests.unit.runner_rig import until


class Client:
    """One end of an ASGI call; `takes` frames are taken before it stalls."""

    def __init__(self, takes: int = 100) -> None:
        self.takes = takes
        self.sent: list[Message] = []
        self.left = asyncio.Event()

    async def receive(self) -> Message:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if len(self.sent) > self.takes:
            await asyncio.Event().wait()
        self.sent.append(message)

    async def get(self, response: EventResponse) -> None:
        async with asyncio.timeout(10):
            await response({"type": "http"}, self.receive, self.send)


class Frames:
    """Frames that know whether they were closed."""

    def __init__(self, *frames: bytes, forever: bool = False) -> None:
        self.frames, self.forever, self.closed = frames, forever, False

    async def run(self) -> AsyncGenerator[bytes, None]:
        try:
            for frame in self.frames:
                yield frame
            if self.forever:
                await asyncio.Event().wait()
        finally:
            self.closed = True


def test_each_event_is_a_frame_of_its_own() -> None:
    assert frames_of(['{"a":1}', '{"ü":2}']) == 'data: {"a":1}\n\ndata: {"ü":2}\n\n'.encode()


@pytest.mark.parametrize("mark", ["\x85", "\u2028", "\u2029"])
def test_an_event_is_one_line_for_readers_that_know_more_line_ends(mark: str) -> None:
    said = f"é{mark}b"
    line, rest = frames_of([f'{{"a":"{said}"}}']).decode().splitlines()
    assert json.loads(line.removeprefix("data: ")) == {"a": said}
    assert rest == ""


async def test_frames_are_sent_as_they_come_and_the_response_ends() -> None:
    client, frames = Client(), Frames(b"1", b"2")
    await client.get(EventResponse(frames.run(), {"x-a": "b"}))
    start, *bodies = client.sent
    headers = dict(start["headers"])
    assert headers[b"content-type"].startswith(b"text/event-stream")
    assert headers[b"x-a"] == b"b"
    assert b"content-length" not in headers
    assert [(m["body"], m["more_body"]) for m in bodies] == [
        (b"1", True),
        (b"2", True),
        (b"", False),
    ]
    assert frames.closed


async def test_a_client_that_leaves_closes_the_frames() -> None:
    client, frames = Client(), Frames(b"1", forever=True)
    getting = asyncio.create_task(client.get(EventResponse(frames.run(), {})))
    await until(lambda: len(client.sent) == 2)
    client.left.set()
    await getting
    assert frames.closed


async def test_a_client_that_takes_nothing_is_hung_up_on() -> None:
    client, frames = Client(takes=1), Frames(b"1", b"2", b"3")
    await client.get(EventResponse(frames.run(), {}, stall_s=0.02))
    assert frames.closed
    assert client.sent[-1]["body"] == b"1"


async def test_a_client_that_is_gone_before_the_head_is_sent_closes_the_frames() -> None:
    client, frames = Client(), Frames(b"1")

    async def broken(_: Message) -> None:
        raise OSError("the connection is closed")

    client.send = broken  # type: ignore[method-assign]
    with pytest.raises(OSError, match="closed"):
        await client.get(EventResponse(frames.run(), {}))
    assert frames.closed


async def test_a_fault_of_the_frames_is_raised() -> None:
    async def broken() -> AsyncGenerator[bytes, None]:
        yield b"1"
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        await Client().get(EventResponse(broken(), {}))
