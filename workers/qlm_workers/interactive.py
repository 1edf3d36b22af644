"""Interactive requests at a worker: served ahead of everything, told as they come."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import orjson
import structlog

from qlm_batch.dispatch.streams import (
    READER_S,
    Address,
    End,
    News,
    Parcel,
    Reader,
    TokenWriter,
)
from qlm_batch.domain.engine import EngineAnswer, EngineRequest, EventStream
from qlm_batch.domain.errors import EngineDead, QlmError, Unavailable
from qlm_batch.domain.interactive import InteractiveMark, InteractiveState
from qlm_batch.domain.jobs import SloClass, Usage
from qlm_batch.domain.messages import Interactive
from qlm_batch.domain.snapshot import Residency
from qlm_batch.domain.store import InteractiveStore
from qlm_batch.scheduling import agent
from qlm_workers.answers import error_answer, usage_of
from qlm_workers.feeder import salt_of
from qlm_workers.hosts import Host
from qlm_workers.link import Link, backoff, pause
from qlm_workers.streams import error_event, is_error

log = structlog.get_logger(__name__)

LOOK_S = 0.5
"""How often readers are looked for while nothing is written."""
LOOK_WRITING_S = 0.1
"""The same while something is."""
RETRY_S = 0.2
"""Wait before writing again to a Redis that is away."""
LAST_PUSH_S = 2.0
REMEMBERED = 4096
"""Requests seen lately, so that one that is sent twice is served once."""
ELSEWHERE = End(503, again=True)
GIVEN_UP = End(
    503,
    error_answer(
        503, "Nobody seemed to wait for this request; send it again.", type_="server_error"
    ).body,
)
"""Its reader left and need not tell so any more, or was silent for too long and passes this on."""


@dataclass(slots=True, eq=False)
class _Job:
    message: Interactive
    host: Host
    reader_at: float
    began: float
    task: asyncio.Task[None] | None = None
    events: list[str] = field(default_factory=list)
    written: int = 0
    end: End | None = None
    end_written: bool = False
    parked: bool = False
    waited_s: float = 0.0
    """For its model to be awake."""
    first_token_s: float | None = None
    usage: Usage = field(default_factory=Usage)
    given_up: bool = False

    @property
    def address(self) -> Address:
        return self.message.request_id, self.message.epoch

    @property
    def news(self) -> News | None:
        """What is not written yet."""
        if self.written == len(self.events) and (self.end is None or self.end_written):
            return None
        return News(self.written, tuple(self.events[self.written :]), self.end)


class InteractiveDesk:
    """Serves the interactive requests of one boot. All methods belong to the runner's loop.

    `died` is told of an engine's death, `idle` when the last request has ended.
    """

    def __init__(self, store: InteractiveStore, writer: TokenWriter, *, flush_s: float) -> None:
        self._store = store
        self._writer = writer
        self._flush_s = flush_s
        self._hosts: Mapping[str, Host] = {}
        self._boot_id = ""
        self._jobs: dict[Address, _Job] = {}
        self._marks: dict[str, InteractiveMark] = {}
        self._seen: OrderedDict[Address, None] = OrderedDict()
        self._last_words: list[Parcel] = []
        """For requests that are no jobs, or no more."""
        self._looked_at = float("-inf")
        self._unwritten = asyncio.Event()
        self._unmarked = asyncio.Event()
        self._open = False

    def begin(
        self,
        link: Link,
        hosts: Mapping[str, Host],
        boot_id: str,
        *,
        died: Callable[[Host, EngineDead], None],
        idle: Callable[[], None],
    ) -> None:
        """Take requests from now on."""
        self._link, self._hosts, self._boot_id = link, hosts, boot_id
        self._died, self._idle = died, idle
        self._open = True

    @property
    def running(self) -> int:
        """Requests that have not ended."""
        return len(self._jobs)

    def refuse_more(self) -> None:
        """Send elsewhere what comes from now on, and what waits for its model to be awake."""
        self._open = False
        for job in self._jobs.values():
            if job.parked and job.task is not None:
                job.task.cancel()

    def accept(self, message: Interactive) -> None:
        """Serve a request, once however often it comes; send it elsewhere where it cannot be."""
        address = (message.request_id, message.epoch)
        if address in self._seen:
            return
        host = self._hosts.get(message.model)
        ready = self._open and host is not None and host.residency is not Residency.FAILED
        if not ready or host is None or message.boot_id != self._boot_id:
            self._say_last(message, ELSEWHERE)
            return
        self._seen[address] = None
        if len(self._seen) > REMEMBERED:
            self._seen.popitem(last=False)
        now = time.monotonic()
        job = _Job(message, host, reader_at=now, began=now)
        self._jobs[address] = job
        self._mark(job, InteractiveState.RUNNING)
        job.task = asyncio.create_task(self._serve(job))

    def _say_last(self, message: Interactive, end: End) -> None:
        address = (message.request_id, message.epoch)
        self._last_words.append(Parcel(message.inbox, address, News(0, end=end)))
        self._unwritten.set()

    # Serving

    async def _serve(self, job: _Job) -> None:
        try:
            job.parked = not job.host.open
            if job.parked and not self._open:
                raise Unavailable("No model is made awake here any more.")
            await job.host.opened()
        except Unavailable:
            job.end = ELSEWHERE
            self._ended(job)
            return
        except asyncio.CancelledError:
            if not job.given_up:
                job.end = ELSEWHERE
            self._ended(job)
            return
        finally:
            job.parked = False
        job.host.interactive += 1
        job.waited_s = time.monotonic() - job.began
        try:
            await self._run(job)
        except EngineDead as death:
            self._engine_died(job)
            self._died(job.host, death)
        except asyncio.CancelledError:
            if not job.given_up:
                self._engine_died(job)
                raise
        except Exception as fault:
            log.exception("interactive request failed", request_id=job.message.request_id)
            self._fail(job, f"The engine failed on this request: {type(fault).__name__}.")
        finally:
            job.host.interactive -= 1
            job.host.moved(time.monotonic())
            self._ended(job)

    async def _run(self, job: _Job) -> None:
        message = job.message
        request = EngineRequest(
            request_id=message.request_id,
            endpoint=message.endpoint,
            body=message.body,
            priority=agent.interactive_priority(message.due_at),
            cache_salt=salt_of(message.tenant),
        )
        engine = job.host.engine
        if not message.streamed:
            self._answered(job, await engine.answer(request))
            return
        opened = await engine.open_stream(request)
        if isinstance(opened, EngineAnswer):
            self._answered(job, opened)
            return
        await self._tell(job, opened)

    async def _tell(self, job: _Job, events: EventStream) -> None:
        last = ""
        try:
            async for event in events:
                if job.first_token_s is None:
                    job.first_token_s = time.monotonic() - job.began
                last = event
                job.events.append(event)
                self._unwritten.set()
        finally:
            await events.aclose()
        failed = is_error(last)
        job.usage = _usage_in(last)
        job.end = End(500 if failed else 200)

    def _answered(self, job: _Job, answer: EngineAnswer) -> None:
        job.usage = answer.usage
        since_first_s = 0.0
        if answer.first_token_s is not None:
            job.first_token_s = job.waited_s + answer.first_token_s
            since_first_s = max(0.0, time.monotonic() - job.began - job.first_token_s)
        # Line ends stand between JSON's tokens only, and separate events where they are stored.
        body = answer.body.replace("\n", " ")
        job.end = End(answer.status_code, body, since_first_s=since_first_s)

    def _engine_died(self, job: _Job) -> None:
        """Whoever has seen nothing yet can be served elsewhere."""
        if job.events:
            self._fail(job, "The engine stopped while it answered; send the request again.")
        else:
            job.end = End(503, again=True, died=True)

    def _fail(self, job: _Job, message: str) -> None:
        if job.events:
            job.events.append(error_event(message))
            job.end = End(500)
        else:
            job.end = End(500, error_answer(500, message, type_="server_error").body)

    def _ended(self, job: _Job) -> None:
        if job.given_up:
            self._mark(job, InteractiveState.ABORTED)
            self._drop(job)
            self._say_last(job.message, GIVEN_UP)
            return
        end = job.end
        if end is None or end.again:
            # The request is not over: whoever waits for it leases it to another boot.
            self._marks.pop(job.message.request_id, None)
        else:
            ok = 200 <= end.status < 300
            self._mark(job, InteractiveState.DONE if ok else InteractiveState.FAILED)
            if ok:
                took_s = time.monotonic() - job.began
                message, used = job.message, job.usage
                job.host.timed(SloClass.INTERACTIVE, job.first_token_s, took_s, used.output_tokens)
                came = self._link.now() - took_s
                due_s = max(0.0, message.due_at - came)
                sizes = used.output_tokens, used.input_tokens
                job.host.called(message.model, (came, due_s, message.tenant, *sizes))
        self._unwritten.set()

    def _drop(self, job: _Job) -> None:
        if self._jobs.pop(job.address, None) is not None and not self._jobs:
            self._idle()

    # Writing

    async def write_forever(self, over: asyncio.Event) -> None:
        """Write what is new, everybody's in one round trip, and give up what nobody reads."""
        while not over.is_set():
            await pause(self._unwritten, LOOK_S)
            self._unwritten.clear()
            if (self._jobs or self._last_words) and not await self._write():
                await pause(over, RETRY_S)

    async def _write(self) -> bool:
        """One round trip; False when Redis is away."""
        now = time.monotonic()
        jobs = list(self._jobs.values())
        last_words, self._last_words = self._last_words, []
        sent = [(job, news) for job in jobs if (news := job.news) is not None]
        parcels = [Parcel(job.message.inbox, job.address, news) for job, news in sent]
        look = now - self._looked_at >= LOOK_WRITING_S
        inboxes = {job.message.inbox for job in jobs} if look else ()
        readers = await self._writer.push(parcels + last_words, inboxes)
        if readers is None:
            self._last_words = last_words + self._last_words
            for job in jobs:
                if job.end is not None:
                    # The store has the answer, and its reader looks there.
                    self._drop(job)
                    if job.end.again:
                        self._say_last(job.message, job.end)
            return False
        for job, news in sent:
            job.written += len(news.events)
            job.end_written = news.end is not None
            if job.end_written:
                self._drop(job)
        if look:
            self._looked_at = now
            for job in jobs:
                self._heed(job, readers[job.message.inbox].of(job.address), now)
        return True

    def _heed(self, job: _Job, sign: Reader, now: float) -> None:
        if sign is Reader.PRESENT:
            job.reader_at = now
            return
        if sign is Reader.SILENT and now - job.reader_at < READER_S:
            return
        if job.task is not None and not job.task.done() and not job.given_up:
            job.given_up = True
            job.task.cancel()

    # Recording

    def _mark(self, job: _Job, state: InteractiveState) -> None:
        end = job.end
        self._marks[job.message.request_id] = InteractiveMark(
            id=job.message.request_id,
            epoch=job.message.epoch,
            state=state,
            status_code=None if end is None else end.status,
            result=None if end is None else (end.body or "\n".join(job.events)),
            usage=job.usage,
            first_token_s=job.first_token_s,
            duration_s=None if end is None else time.monotonic() - job.began,
        )
        if state is not InteractiveState.RUNNING:
            # That it runs is of interest only where it runs for long.
            self._unmarked.set()

    async def record_forever(self, over: asyncio.Event) -> None:
        """Store what became of requests, many at a time, until it is taken."""
        failures = 0
        while not over.is_set():
            await pause(self._unmarked, LOOK_S)
            try:
                await self._record()
                failures = 0
                await pause(over, self._flush_s)
            except Exception as error:  # noqa: BLE001 - no fault of the store may end the work
                failures += 1
                self._link.failed("interactive marks", error, failures)
                await pause(over, backoff(failures))

    async def _record(self) -> None:
        self._unmarked.clear()
        marks, self._marks = self._marks, {}
        if not marks:
            return
        try:
            await self._link.call(self._store.mark_interactive, list(marks.values()))
        except BaseException:
            self._marks = marks | self._marks
            raise

    async def close(self) -> None:
        """End every request with a word to whoever waits, and record it."""
        self._open = False
        tasks = [job.task for job in self._jobs.values() if job.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            async with asyncio.timeout(LAST_PUSH_S):
                await self._write()
                await self._record()
        except (TimeoutError, QlmError) as error:
            log.warning("last words were not told", error=str(error) or type(error).__name__)
        except Exception:
            # Leases still have to be given back.
            log.exception("last words were not told")
        await self._writer.close()


def _usage_in(event: str) -> Usage:
    """The usage told with the last event of a stream."""
    try:
        return usage_of(orjson.loads(event).get("usage"))
    except (orjson.JSONDecodeError, AttributeError):
        return Usage()
