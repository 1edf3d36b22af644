"""Token streams on a real Redis-compatible server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import orjson
import pytest
import redis.asyncio

from qlm_batch.dispatch import streams
from qlm_batch.dispatch.celery_app import client_url
from qlm_batch.dispatch.streams import (
    Address,
    End,
    News,
    Parcel,
    Reader,
    TokenReader,
    TokenWriter,
)

TO = ("req_1", 1)
WITHIN_S = 30.0


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


async def gathered(reader: TokenReader, number: int, of: Address = TO) -> list[News]:
    """As many news of a request, in the order in which they came."""
    news: list[News] = []
    async with asyncio.timeout(WITHIN_S):
        while len(news) < number:
            come = await reader.read(of, 1.0)
            if come is None:
                await asyncio.sleep(0.01)
            news += come or ()
    return news


async def test_what_is_written_is_read_once_and_in_order(redis_url: str) -> None:
    async with both_ends(redis_url) as (writer, reader):
        reader.attend(TO)
        told = [News(0, ("a", '{"text":"ü\\n"}')), News(2, ("c",), End(200, died=True))]
        for news in told:
            await writer.push([Parcel(reader.inbox, TO, news)], [])
        assert await gathered(reader, 2) == told
        assert await reader.read(TO, 0.01) == []


async def test_a_reader_waits_for_news_and_no_longer_than_told(redis_url: str) -> None:
    async with both_ends(redis_url) as (writer, reader):
        reader.attend(TO)
        assert await reader.read(TO, 0.01) == []
        reading = asyncio.create_task(reader.read(TO, WITHIN_S))
        await asyncio.sleep(0)
        news = News(0, (), End(400, '{"error":{}}'))
        await writer.push([Parcel(reader.inbox, TO, news)], [])
        assert await reading == [news]


async def test_each_reader_gets_what_is_for_it_and_each_request_its_own(redis_url: str) -> None:
    async with both_ends(redis_url) as (writer, one), both_ends(redis_url) as (_, other):
        second = ("req_1", 2)
        for reader in (one, other):
            reader.attend(TO)
            reader.attend(second)
        await writer.push(
            [
                Parcel(reader.inbox, to, News(0, (f"{name} {to}",)))
                for name, reader in (("one", one), ("other", other))
                for to in (TO, second)
            ],
            [],
        )
        for name, reader in (("one", one), ("other", other)):
            for to in (TO, second):
                assert await gathered(reader, 1, to) == [News(0, (f"{name} {to}",))]


async def test_a_client_that_takes_nothing_holds_a_bounded_number(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "MOST_BEHIND", 10)
    async with both_ends(redis_url) as (writer, reader):
        reader.attend(TO)
        reader.attend(("req_2", 1))
        for n in range(25):
            await writer.push([Parcel(reader.inbox, TO, News(n, (str(n),)))], [])
        await writer.push([Parcel(reader.inbox, ("req_2", 1), News(0, ("a",)))], [])
        await gathered(reader, 1, ("req_2", 1))
        assert await reader.read(TO, 1.0) == [News(n, (str(n),)) for n in range(20, 25)]


async def test_a_stream_keeps_a_bounded_number_of_entries(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "MOST_ENTRIES", 100)
    async with (
        both_ends(redis_url) as (writer, _),
        redis.asyncio.Redis.from_url(client_url(redis_url)) as client,
    ):
        for n in range(1000):
            await writer.push([Parcel("nobody", TO, News(n, (str(n),)))], [])
        assert 100 <= await client.xlen("qlm:tokens:nobody") < 300


async def test_what_was_read_does_not_stay(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "MOST_DONE", 10)
    async with (
        both_ends(redis_url) as (writer, reader),
        redis.asyncio.Redis.from_url(client_url(redis_url)) as client,
    ):
        reader.attend(TO)
        for n in range(100):
            await writer.push([Parcel(reader.inbox, TO, News(n, (str(n),)))], [])
            await gathered(reader, 1)
        assert await client.xlen(f"qlm:tokens:{reader.inbox}") <= 11


async def test_a_writer_learns_who_reads_and_who_left(redis_url: str) -> None:
    async with both_ends(redis_url) as (writer, reader):
        other = ("req_2", 1)

        async def signs() -> list[Reader]:
            presence = (await writer.push([], [reader.inbox]) or {})[reader.inbox]
            return [presence.of(TO), presence.of(other)]

        async def shown(wanted: list[Reader]) -> None:
            async with asyncio.timeout(WITHIN_S):
                while await signs() != wanted:  # noqa: ASYNC110 - the other end changes it
                    await asyncio.sleep(0.01)

        assert await signs() == [Reader.SILENT, Reader.SILENT]
        reader.attend(TO)
        reader.attend(other)
        presence = asyncio.create_task(reader.keep_present())
        await shown([Reader.PRESENT, Reader.PRESENT])
        reader.leave(TO, finished=False)
        await shown([Reader.GONE, Reader.PRESENT])
        reader.leave(other, finished=True)
        # Once the writer has given it up there is nothing left to tell.
        await writer.push([Parcel(reader.inbox, TO, News(0, end=End(499)))], [])
        await shown([Reader.SILENT, Reader.SILENT])
        presence.cancel()
        await until_async(lambda: keys(redis_url), set())


async def test_a_finished_stream_leaves_no_key_and_every_key_ends_by_itself(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "BLOCK_S", 0.05)
    async with (
        both_ends(redis_url) as (writer, reader),
        redis.asyncio.Redis.from_url(client_url(redis_url)) as client,
    ):
        reader.attend(TO)
        presence = asyncio.create_task(reader.keep_present())
        await writer.push([Parcel(reader.inbox, TO, News(0, ("a",), End(200)))], [])
        await gathered(reader, 1)
        await until_async(lambda: count(redis_url), 2)
        for key in await keys(redis_url):
            assert 0 < await client.ttl(key) <= streams.STREAM_TTL_S
        reader.leave(TO, finished=True)
        await until_async(lambda: keys(redis_url), set())
        presence.cancel()


async def test_a_stream_begun_anew_is_read_also_when_the_servers_clock_went_back(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "BLOCK_S", 0.05)
    async with (
        both_ends(redis_url) as (writer, reader),
        redis.asyncio.Redis.from_url(client_url(redis_url)) as client,
    ):
        reader.attend(TO)
        last = orjson.dumps([(*TO, 0, ("a",), End(200))])
        # By a clock that is years ahead of the one that numbers what is pushed.
        await client.xadd(f"qlm:tokens:{reader.inbox}", {"p": last}, id="9999999999999-0")
        await gathered(reader, 1)
        reader.leave(TO, finished=True)
        await until_async(lambda: keys(redis_url), set())
        other = ("req_2", 1)
        reader.attend(other)
        await writer.push([Parcel(reader.inbox, other, News(0, ("b",)))], [])
        assert await gathered(reader, 1, other) == [News(0, ("b",))]


async def count(url: str) -> int:
    return len(await keys(url))


async def until_async(found: Callable[[], Awaitable[object]], wanted: object) -> None:
    async with asyncio.timeout(WITHIN_S):
        while await found() != wanted:  # noqa: ASYNC110 - it changes outside
            await asyncio.sleep(0.01)


async def test_a_redis_that_is_away_is_told_by_none(tmp_path: Path) -> None:
    url = f"redis+socket://{tmp_path}/none.sock?virtual_host=0"
    async with both_ends(url) as (writer, reader):
        assert await writer.push([Parcel(reader.inbox, TO, News(0, ("a",)))], ["x"]) is None
        reader.attend(TO)
        assert await reader.read(TO, 5.0) is None
        reader.leave(TO, finished=True)


async def test_both_ends_find_a_flushed_server_usable(redis_url: str) -> None:
    async with (
        both_ends(redis_url) as (writer, reader),
        redis.asyncio.Redis.from_url(client_url(redis_url)) as client,
    ):
        reader.attend(TO)
        await writer.push([Parcel(reader.inbox, TO, News(0, ("a", "b")))], [])
        await gathered(reader, 1)
        await client.flushall()
        await writer.push([Parcel(reader.inbox, TO, News(2, ("c",)))], [])
        assert await gathered(reader, 1) == [News(2, ("c",))]


async def test_both_ends_connect_again_when_their_connections_were_cut(redis_url: str) -> None:
    async with (
        both_ends(redis_url) as (writer, reader),
        redis.asyncio.Redis.from_url(client_url(redis_url)) as client,
    ):
        reader.attend(TO)
        await writer.push([Parcel(reader.inbox, TO, News(0, ("a",)))], [])
        await gathered(reader, 1)
        await client.client_kill_filter(_type="normal", skipme=True)
        # Whoever uses a cut connection first notices.
        parcel = Parcel(reader.inbox, TO, News(1, ("b",)))
        assert await writer.push([parcel], []) == {} or await writer.push([parcel], []) == {}
        # What had been read may come again.
        assert (await gathered(reader, 2))[-1] == News(1, ("b",))


async def test_an_error_of_the_server_counts_as_away(redis_url: str) -> None:
    async with (
        both_ends(redis_url) as (writer, _),
        redis.asyncio.Redis.from_url(client_url(redis_url)) as client,
    ):
        await client.set("qlm:tokens:in", "no stream")
        parcel = Parcel("in", TO, News(0, ("a",)))
        assert await writer.push([parcel], []) is None
        await client.delete("qlm:tokens:in")
        assert await writer.push([parcel], []) == {}


def test_urls_of_sockets_are_translated_for_the_client() -> None:
    assert client_url("redis+socket:///a/b.sock?virtual_host=3") == "unix:///a/b.sock?db=3"
    assert client_url("unix:///a/b.sock") == "unix:///a/b.sock?db=0"
    assert client_url("redis://host:1/2") == "redis://host:1/2"


async def test_waiting_readers_share_one_connection(redis_url: str) -> None:
    async with (
        both_ends(redis_url) as (writer, reader),
        redis.asyncio.Redis.from_url(client_url(redis_url)) as client,
    ):
        addresses = [(f"req_{n}", 1) for n in range(100)]
        for to in addresses:
            reader.attend(to)
        reading = [asyncio.create_task(reader.read(to, WITHIN_S)) for to in addresses]
        await writer.push(
            [Parcel(reader.inbox, to, News(0, (to[0],), End(200))) for to in addresses], []
        )
        told = await asyncio.gather(*reading)
        assert [news[0].events for news in told if news] == [(to[0],) for to in addresses]
        # Ours, the writer's and the client's own.
        assert len(await client.client_list()) <= 3
