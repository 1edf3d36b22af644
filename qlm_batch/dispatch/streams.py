"""Tokens on their way to whoever waits: a capped Redis stream for each interactive request.

An entry carries events from a number on, and its id grows with that number, so that a reader sees
what it already has and what it missed. A key beside the stream tells the writer that somebody
still reads. Every key ends by itself; losing them costs a look at the store.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import orjson
import redis.asyncio
import structlog
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from qlm_batch.dispatch.celery_app import client_url

log = structlog.get_logger(__name__)

READER_S = 5.0
"""Without a sign of its reader for this long, a request is given up."""
STREAM_TTL_S = 60
ENDED_TTL_S = 15
"""How long an ended stream waits for its reader, who may have left meanwhile; the store has it."""
MOST_ENTRIES = 1000
"""About as many entries a stream keeps; who falls further behind reads the rest in the store."""
SOCKET_TIMEOUT_S = 5.0
MOST_CONNECTIONS = 4096

_AWAY = (RedisError, OSError, TimeoutError)


@dataclass(frozen=True, slots=True)
class End:
    """The last word on a request: the status and, unless its events said it all, a body.

    `again` asks to send the request elsewhere: nothing was done with it. `died` says that an engine
    ended with the request inside.
    """

    status: int
    body: str | None = None
    again: bool = False
    died: bool = False


@dataclass(frozen=True, slots=True)
class News:
    """Events from number `first` on, and the end where it was reached."""

    first: int
    events: tuple[str, ...] = ()
    end: End | None = None


class Reader(Enum):
    """Whether somebody waits for what is written; silent where nothing is known."""

    PRESENT = b"1"
    GONE = b"0"
    SILENT = b""


Address = tuple[str, int]
"""A request's id and epoch."""


def _stream(to: Address) -> str:
    return f"qlm:tokens:{to[0]}:{to[1]}"


def _reader(to: Address) -> str:
    return f"qlm:reader:{to[0]}:{to[1]}"


class _Connected:
    def __init__(self, redis_url: str, timeout_s: float = SOCKET_TIMEOUT_S) -> None:
        self._redis: Any = redis.asyncio.Redis.from_url(
            client_url(redis_url),
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 1),
            max_connections=MOST_CONNECTIONS,
        )

    async def close(self) -> None:
        """Give the connections back."""
        await self._redis.aclose()


class TokenWriter(_Connected):
    """A worker's end: everything there is to write goes in one round trip."""

    async def push(
        self, parcels: Iterable[tuple[Address, News]], watched: Sequence[Address]
    ) -> Sequence[Reader] | None:
        """Write, and learn of each watched request's reader; None when Redis is away.

        Writing the same again is harmless.
        """
        pipe = self._redis.pipeline(transaction=False)
        writes = 0
        for to, news in parcels:
            fields: dict[str, str | int | bytes] = {"n": news.first}
            if news.events:
                fields["d"] = "\n".join(news.events)
            if news.end is not None:
                fields["e"] = orjson.dumps(news.end)
            number = news.first + len(news.events) + (news.end is not None)
            pipe.xadd(_stream(to), fields, id=f"{number}-0", maxlen=MOST_ENTRIES)
            pipe.expire(_stream(to), STREAM_TTL_S if news.end is None else ENDED_TTL_S)
            writes += 2
        for to in watched:
            pipe.get(_reader(to))
        try:
            replies = await pipe.execute(raise_on_error=False)
        except _AWAY:
            return None
        # A write that had arrived although its reply had not is refused the second time.
        if any(isinstance(r, Exception) and not isinstance(r, ResponseError) for r in replies):
            return None
        return [_sign(reply) for reply in replies[writes:]]

    async def forget(self, to: Address) -> None:
        """Remove the keys of a request nobody reads any more."""
        try:
            await self._redis.delete(_stream(to), _reader(to))
        except _AWAY:
            return


class TokenReader(_Connected):
    """The API's end. Each waiting call uses a connection of a shared pool and no thread."""

    def __init__(self, redis_url: str) -> None:
        super().__init__(redis_url)
        self._present: set[Address] = set()

    async def read(self, of: Address, after: int, wait_s: float) -> Sequence[News] | None:
        """What was written after `after` events; empty when nothing came within `wait_s`.

        None when Redis is away.
        """
        try:
            found = await self._redis.xread(
                {_stream(of): f"{after}-0"}, block=max(1, int(wait_s * 1000))
            )
        except _AWAY:
            return None
        if not found:
            return ()
        entries = next(iter(found.values()))[0] if isinstance(found, dict) else found[0][1]
        return [_news(fields) for _, fields in entries]

    def attend(self, of: Address) -> None:
        """Keep telling the writer that somebody reads."""
        self._present.add(of)

    async def leave(self, of: Address, *, finished: bool) -> None:
        """Read no more. The writer of a request that is not finished is told to give it up."""
        self._present.discard(of)
        try:
            pipe = self._redis.pipeline(transaction=False)
            pipe.delete(_stream(of))
            if finished:
                pipe.delete(_reader(of))
            else:
                pipe.set(_reader(of), Reader.GONE.value, px=int(READER_S * 2000))
            await pipe.execute()
        except _AWAY:
            return

    async def keep_present(self) -> None:
        """Tell writers of present readers, for ever; run it as a task."""
        while True:
            if self._present:
                pipe = self._redis.pipeline(transaction=False)
                for of in self._present:
                    pipe.set(_reader(of), Reader.PRESENT.value, px=int(READER_S * 1000))
                try:
                    await pipe.execute()
                except Exception as error:  # noqa: BLE001 - every open request hangs on this loop
                    log.warning("cannot tell workers who reads", error=repr(error))
            await asyncio.sleep(READER_S / 4)


def _sign(reply: object) -> Reader:
    if reply == Reader.GONE.value:
        return Reader.GONE
    return Reader.PRESENT if reply == Reader.PRESENT.value else Reader.SILENT


def _news(fields: dict[bytes, bytes]) -> News:
    events = fields.get(b"d")
    end = fields.get(b"e")
    return News(
        int(fields[b"n"]),
        tuple(events.decode().split("\n")) if events is not None else (),
        None if end is None else End(**orjson.loads(end)),
    )
