"""Streamed bodies."""

from __future__ import annotations

from collections.abc import Generator

from qlm_batch.api.responses import streamed


class Source:
    """Chunks that know whether they were given back."""

    def __init__(self) -> None:
        self.closed = False

    def chunks(self) -> Generator[bytes, None, None]:
        """Ten chunks."""
        try:
            for number in range(10):
                yield b"%d" % number
        finally:
            self.closed = True


async def test_a_stream_carries_every_chunk_in_order() -> None:
    source = Source()
    chunks = source.chunks()
    assert [chunk async for chunk in streamed(chunks, next(chunks))] == [
        b"%d" % number for number in range(10)
    ]
    assert source.closed


async def test_a_stream_whose_reader_leaves_gives_its_source_back() -> None:
    source = Source()
    chunks = source.chunks()
    stream = streamed(chunks, next(chunks))
    assert await anext(stream) == b"0"
    assert await anext(stream) == b"1"
    await stream.aclose()  # type: ignore[attr-defined]
    assert source.closed
