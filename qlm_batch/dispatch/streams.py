"""Tokens on their way to whoever waits: a capped Redis stream for each process that reads.

An entry carries what is new of any number of requests, each with the number of its first event, so
that a reader sees what it already has and what it missed. A key beside the stream tells writers
that its reader is there, and whom it waits for no more. Every key ends by itself; losing them costs
a look at the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

import orjson
import structlog

from qlm_batch.dispatch.pipe import AWAY, Command, Pipe
from qlm_batch.ids import new_id

log = structlog.get_logger(__name__)

READER_S = 5.0
"""Without a sign of its reader for this long, a request is given up."""
LEFT_S = 60.0
"""How long a writer is told of a request that it may never have taken up."""
STREAM_TTL_S = 60
MOST_ENTRIES = 4096
"""About as many entries a stream keeps; who falls further behind reads the rest in the store."""
MOST_DONE = 32
"""Entries are removed so many at a time once they were read."""
MOST_BEHIND = 1000
"""As many parcels wait for one client that takes none."""
TIMEOUT_S = 5.0
BLOCK_S = 1.0
"""How long the server holds a read back that has nothing to tell."""
RETRY_S = 0.2
_START = b"0-0"

Address = tuple[str, int]
"""A request's id and epoch."""


@dataclass(frozen=True, slots=True)
class End:
    """The last word on a request: the status and, unless its events said it all, a body.

    `again` asks to send the request elsewhere: nothing was done with it. `died` says that an engine
    ended with the request inside. An answer that comes whole had its first token `since_first_s`
    ago.
    """

    status: int
    body: str | None = None
    again: bool = False
    died: bool = False
    since_first_s: float = 0.0


@dataclass(frozen=True, slots=True)
class News:
    """Events from number `first` on, and the end where it was reached."""

    first: int
    events: tuple[str, ...] = ()
    end: End | None = None


@dataclass(frozen=True, slots=True)
class Parcel:
    """News of one request for the process that reads at `inbox`."""

    inbox: str
    to: Address
    news: News


class Reader(Enum):
    """Whether somebody waits for what is written; silent where nothing is known."""

    PRESENT = "present"
    GONE = "gone"
    SILENT = "silent"


@dataclass(frozen=True, slots=True)
class Presence:
    """What a reading process says of itself: that it is there, and whom it waits for no more."""

    there: bool
    left: frozenset[bytes] = frozenset()

    def of(self, address: Address) -> Reader:
        """Whether somebody waits for the request."""
        if not self.there:
            return Reader.SILENT
        return Reader.GONE if _name(address) in self.left else Reader.PRESENT


def _stream(inbox: str) -> str:
    return f"qlm:tokens:{inbox}"


def _reader(inbox: str) -> str:
    return f"qlm:reader:{inbox}"


def _name(of: Address) -> bytes:
    return b"%b:%d" % (of[0].encode(), of[1])


class TokenWriter:
    """A worker's end: everything there is to write goes in one round trip."""

    def __init__(self, redis_url: str) -> None:
        self._pipe = Pipe(redis_url, TIMEOUT_S)

    async def push(
        self, parcels: Iterable[Parcel], watched: Collection[str]
    ) -> Mapping[str, Presence] | None:
        """Write, and learn of the readers at the `watched` inboxes; None when Redis is away.

        Writing the same again is harmless.
        """
        packed: defaultdict[str, list[object]] = defaultdict(list)
        for parcel in parcels:
            news = parcel.news
            packed[parcel.inbox].append((*parcel.to, news.first, news.events, news.end))
        commands: list[Command] = []
        for inbox, told in packed.items():
            stream = _stream(inbox)
            entry = orjson.dumps(told)
            commands.append(("XADD", stream, "MAXLEN", "~", MOST_ENTRIES, "*", "p", entry))
            commands.append(("EXPIRE", stream, STREAM_TTL_S))
        commands += [("GET", _reader(inbox)) for inbox in watched]
        if not commands:
            return {}
        try:
            answers = await self._pipe.run(*commands)
        except AWAY:
            return None
        signs = answers[len(answers) - len(watched) :]
        return dict(zip(watched, map(_presence, signs), strict=True))

    async def close(self) -> None:
        """Give the connection back."""
        await self._pipe.close()


def _presence(sign: bytes | None) -> Presence:
    return Presence(False) if sign is None else Presence(True, frozenset(sign.split()))


@dataclass(slots=True)
class _Box:
    """What has come for one request and is not read yet."""

    news: list[News] = field(default_factory=list)
    waiter: asyncio.Future[None] | None = None

    def put(self, news: News) -> None:
        if len(self.news) >= MOST_BEHIND:
            # The gap this leaves is filled from the store.
            self.news.clear()
        self.news.append(news)
        self.wake()

    def wake(self) -> None:
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    async def wait(self, seconds: float) -> None:
        self.waiter = asyncio.get_running_loop().create_future()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self.waiter


class TokenReader:
    """The end of a process that waits for any number of requests; for one event loop.

    `inbox` is where their tokens have to be sent.
    """

    def __init__(self, redis_url: str) -> None:
        self.inbox = new_id("api_")
        self._reading, self._telling = Pipe(redis_url, TIMEOUT_S), Pipe(redis_url, TIMEOUT_S)
        self._boxes: dict[Address, _Box] = {}
        self._following: asyncio.Task[None] | None = None
        self._last = _START
        self._away = False
        self._left: dict[Address, float] = {}
        self._tell = asyncio.Event()

    def attend(self, of: Address) -> None:
        """Wait for a request from now on: keep its news for it."""
        self._boxes[of] = _Box()
        if self._following is None or self._following.done():
            self._following = asyncio.create_task(self._follow())

    def leave(self, of: Address, *, finished: bool) -> None:
        """Read no more. The writer of a request that is not finished is told to give it up."""
        self._boxes.pop(of, None)
        if not finished:
            self._left[of] = time.monotonic()
            self._tell.set()

    async def read(self, of: Address, wait_s: float) -> Sequence[News] | None:
        """What has come since the last call; empty when nothing came within `wait_s`.

        None when Redis is away. The request must be attended.
        """
        box = self._boxes[of]
        if not (box.news or self._away):
            await box.wait(wait_s)
        news, box.news = box.news, []
        return None if self._away and not news else news

    async def keep_present(self) -> None:
        """Tell writers who reads, for ever; run it as a task."""
        told = False
        while True:
            self._tell.clear()
            too_old = time.monotonic() - LEFT_S
            self._left = {of: at for of, at in self._left.items() if at > too_old}
            try:
                if self._boxes or self._left:
                    left = b"\n".join(map(_name, self._left))
                    lives_ms = int(READER_S * 1000)
                    await self._telling.run(("SET", _reader(self.inbox), left, "PX", lives_ms))
                    told = True
                elif told:
                    await self._telling.run(("DEL", _reader(self.inbox)))
                    told = False
            except Exception as error:  # noqa: BLE001 - every open request hangs on this loop
                log.warning("cannot tell workers who reads", error=repr(error))
                await asyncio.sleep(RETRY_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(READER_S / 4):
                    await self._tell.wait()

    async def close(self) -> None:
        """Give the connections back."""
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        await self._reading.close()
        await self._telling.close()

    async def _follow(self) -> None:
        """Hand out what comes while any writer may write, and leave no stream behind."""
        done: list[bytes] = []
        stream = _stream(self.inbox)
        while self._boxes or self._left:
            read = ("XREAD", "BLOCK", int(BLOCK_S * 1000), "STREAMS", stream, self._last)
            # What was handed out goes, so that the stream holds little more than is on its way.
            gone: list[Command] = [("XDEL", stream, *done)] if len(done) >= MOST_DONE else []
            try:
                *_, found = await self._reading.run(*gone, read, wait_s=BLOCK_S)
                self._away = False
                if gone:
                    done.clear()
                if found is not None:
                    done += self._hand_out(found[0][1])
                if not (self._boxes or self._left):
                    await self._reading.run(("DEL", stream))
                    # The next stream is a new one; numbers come from a clock that may go back.
                    self._last = _START
                    done.clear()
            except Exception as error:  # noqa: BLE001 - every open request hangs on this loop
                await self._miss(error)

    async def _miss(self, error: Exception) -> None:
        if not isinstance(error, AWAY):
            log.warning("cannot read tokens", error=repr(error))
        self._away, self._last = True, _START
        for box in self._boxes.values():
            box.wake()
        await asyncio.sleep(RETRY_S)

    def _hand_out(self, entries: Sequence[tuple[bytes, Sequence[bytes]]]) -> list[bytes]:
        for number, (_, packed) in entries:
            self._last = number
            for request_id, epoch, first, events, end in orjson.loads(packed):
                of = (request_id, epoch)
                if (box := self._boxes.get(of)) is not None:
                    box.put(News(first, tuple(events), None if end is None else End(**end)))
                elif end is not None:
                    self._left.pop(of, None)
        return [number for number, _ in entries]
