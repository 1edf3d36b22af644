"""Token streams on a real Redis-compatible server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import redis.asyncio

from qlm_batch.dispatch import streams
from qlm_batch.dispatch.celery_app import client_url
from qlm_batch.dispatch.streams import End, News, Reader, TokenReader, TokenWriter
from tests.unit.test_runner import until

TO = ("req_1", 1)


@asynccontextmanager
async def both_ends(url: str) -> AsyncIterator[tuple[TokenWriter, TokenReader]]:
    writer, reader = TokenWriter(url), TokenReader(url)
    try:
        yield writer, reader
    finally:
        await writer.close()
        await reader.close()


async def keys(url: str) -> set[bytes]:
    async with redis.asyncio.Redis.from_url(client_url(url)) as client:
        return set(await client.keys("qlm:*"))


async def test_what_is_written_is_read_once_and_in_order(redis_url: str) -> None:
    async with both_ends(redis_url) as (writer, reader):
        await writer.push([(TO, News(0, ("a", '{"text":"ü\\n"}')))], [])
        await writer.push([(TO, News(2, ("c",), End(200)))], [])
        first, last = await reader.read(TO, 0, 1.0) or ()
        assert first == News(0, ("a", '{"text":"ü\\n"}'))
        assert last == News(2, ("c",), End(200))
        assert await reader.read(TO, 2, 0.01) == [last]


async def test_a_reader_waits_for_news_and_no_longer_than_told(redis_url: str) -> None:
    async with both_ends(redis_url) as (writer, reader):
        assert await reader.read(TO, 0, 0.01) == ()
        reading = asyncio.create_task(reader.read(TO, 0, 5.0))
        await asyncio.sleep(0)
        await writer.push([(TO, News(0, (), End(400, '{"error":{}}')))], [])
        assert await reading == [News(0, (), End(400, '{"error":{}}'))]


async def test_writing_again_what_had_arrived_does_no_harm(redis_url: str) -> None:
    async with both_ends(redis_url) as (writer, reader):
        for _ in range(2):
            assert await writer.push([(TO, News(0, ("a", "b")))], [TO]) == [Reader.SILENT]
        await writer.push([(TO, News(0, ("a", "b", "c")))], [])
        told = await reader.read(TO, 0, 1.0)
        assert told == [News(0, ("a", "b")), News(0, ("a", "b", "c"))]


async def test_a_stream_keeps_a_bounded_number_of_entries(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "MOST_ENTRIES", 100)
    async with both_ends(redis_url) as (writer, reader):
        await writer.push([(TO, News(n, (str(n),))) for n in range(1000)], [])
        told = await reader.read(TO, 0, 1.0)
        assert told and told[0].first > 700
        assert told[-1] == News(999, ("999",))


async def test_a_writer_learns_who_reads_and_who_left(redis_url: str) -> None:
    async with both_ends(redis_url) as (writer, reader):
        presence = asyncio.create_task(reader.keep_present())
        reader.attend(TO)
        other = ("req_2", 1)
        signs: list[Reader] = []

        async def look() -> None:
            while signs != [Reader.PRESENT, Reader.SILENT]:
                signs[:] = await writer.push([], [TO, other]) or ()
                await asyncio.sleep(0.01)

        await asyncio.wait_for(look(), 5)
        await reader.leave(TO, finished=False)
        assert await writer.push([], [TO]) == [Reader.GONE]
        presence.cancel()
        await writer.forget(TO)
        assert await keys(redis_url) == set()


async def test_a_finished_stream_leaves_no_key_and_every_key_ends_by_itself(
    redis_url: str,
) -> None:
    async with (
        both_ends(redis_url) as (writer, reader),
        redis.asyncio.Redis.from_url(client_url(redis_url)) as client,
    ):
        await writer.push([(TO, News(0, ("a",), End(200)))], [])
        await reader.leave(("req_2", 1), finished=False)
        assert len(await keys(redis_url)) == 2
        for key in await keys(redis_url):
            assert 0 < await client.ttl(key) <= streams.STREAM_TTL_S
        await reader.leave(TO, finished=True)
        assert len(await keys(redis_url)) == 1


async def test_a_redis_that_is_away_is_told_by_none(tmp_path: Path) -> None:
    url = f"redis+socket://{tmp_path}/none.sock?virtual_host=0"
    async with both_ends(url) as (writer, reader):
        assert await writer.push([(TO, News(0, ("a",)))], [TO]) is None
        assert await reader.read(TO, 0, 0.1) is None
        await reader.leave(TO, finished=True)
        await writer.forget(TO)


async def test_both_ends_find_a_flushed_server_usable(redis_url: str) -> None:
    async with (
        both_ends(redis_url) as (writer, reader),
        redis.asyncio.Redis.from_url(client_url(redis_url)) as client,
    ):
        await writer.push([(TO, News(0, ("a", "b")))], [])
        assert await reader.read(TO, 0, 1.0)
        await client.flushall()
        await writer.push([(TO, News(2, ("c",)))], [])
        assert await reader.read(TO, 2, 1.0) == [News(2, ("c",))]


def test_urls_of_sockets_are_translated_for_the_client() -> None:
    assert client_url("redis+socket:///a/b.sock?virtual_host=3") == "unix:///a/b.sock?db=3"
    assert client_url("unix:///a/b.sock") == "unix:///a/b.sock?db=0"
    assert client_url("redis://host:1/2") == "redis://host:1/2"


async def test_waiting_readers_share_one_pool(redis_url: str) -> None:
    async with both_ends(redis_url) as (writer, reader):
        addresses = [(f"req_{n}", 1) for n in range(100)]
        reading = [asyncio.create_task(reader.read(to, 0, 10.0)) for to in addresses]
        await until(lambda: True)
        await writer.push([(to, News(0, (to[0],), End(200))) for to in addresses], [])
        told = await asyncio.gather(*reading)
        assert [news[0].events for news in told if news] == [(to[0],) for to in addresses]
