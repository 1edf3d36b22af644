"""A connection to Redis for the way of every token: commands in, answers out, nothing between."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import hiredis
import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError, RedisError, ResponseError

from qlm_batch.dispatch.celery_app import client_url

AWAY = (RedisError, OSError, TimeoutError)
"""What `run` raises where the server cannot be used."""

Command = tuple[str | bytes | int, ...]
_pack: Any = hiredis.pack_command
_MORE = object()


class Pipe:
    """Commands over one connection; each call's go in one write and are answered in order.

    redis-py connects, authenticates and encrypts; its client, at ten times the cost of a command,
    is passed by. Connects when it is used, anew after a failure. For one event loop.
    """

    def __init__(self, redis_url: str, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._pool: Any = redis.asyncio.ConnectionPool.from_url(
            client_url(redis_url),
            protocol=2,
            socket_connect_timeout=timeout_s,
            retry=Retry(NoBackoff(), 0),
        )
        self._link: _Link | None = None
        self._linking = asyncio.Lock()

    async def run(self, *commands: Command, wait_s: float = 0.0) -> list[Any]:
        """The answers to `commands`, in order. Raises one of AWAY, also where one is an error.

        `wait_s` is how long the server may hold them back, beyond the usual time for an answer.
        """
        link = None
        try:
            async with asyncio.timeout(self._timeout_s + wait_s):
                link = self._link or await self._connect()
                answers = await link.ask(commands)
            for answer in answers:
                if isinstance(answer, ResponseError):
                    raise answer
        except AWAY:
            if link is not None:
                await self._drop(link)
            raise
        return answers

    async def close(self) -> None:
        """Give the connection back."""
        if self._link is not None:
            await self._drop(self._link)

    async def _connect(self) -> _Link:
        async with self._linking:
            if self._link is None:
                connection = self._pool.make_connection()
                await connection.connect()
                self._link = _Link(connection)
            return self._link

    async def _drop(self, link: _Link) -> None:
        if self._link is link:
            self._link = None
        await link.close()


@dataclass(slots=True)
class _Asked:
    number: int
    told: asyncio.Future[list[Any]]
    answers: list[Any] = field(default_factory=list)


class _Link(asyncio.Protocol):
    """What becomes of redis-py's connection once it stands."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._transport = connection._writer.transport
        self._reader: Any = hiredis.Reader(
            protocolError=ConnectionError, replyError=ResponseError, notEnoughData=_MORE
        )
        self._asked: deque[_Asked] = deque()
        self._transport.set_protocol(self)

    def ask(self, commands: tuple[Command, ...]) -> asyncio.Future[list[Any]]:
        """Send commands; their answers. A lost connection is told there."""
        packed = b"".join(map(_pack, commands))
        told: asyncio.Future[list[Any]] = asyncio.get_running_loop().create_future()
        self._asked.append(_Asked(len(commands), told))
        if self._transport.is_closing():
            self.connection_lost(None)
        else:
            self._transport.write(packed)
        return told

    async def close(self) -> None:
        """End the connection, whatever it still holds."""
        self._transport.abort()
        self.connection_lost(None)
        await self._connection.disconnect(nowait=True)

    def data_received(self, data: bytes) -> None:
        """Answers, or parts of one."""
        self._reader.feed(data)
        while self._asked and (answer := self._reader.gets()) is not _MORE:
            asked = self._asked[0]
            asked.answers.append(answer)
            if len(asked.answers) == asked.number:
                self._asked.popleft()
                if not asked.told.done():
                    asked.told.set_result(asked.answers)

    def connection_lost(self, _: Exception | None) -> None:
        """Nothing is answered any more."""
        for asked in self._asked:
            if not asked.told.done():
                asked.told.set_exception(ConnectionError("The connection was lost."))
        self._asked.clear()
