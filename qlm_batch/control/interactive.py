"""Interactive calls: routed, stored, sent, and followed to their end whatever fails on the way."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from typing import ParamSpec, Protocol, TypeVar

import orjson
import structlog

from qlm_batch.control.fleet import FRESH_S, STALE_S, Fleet
from qlm_batch.dispatch.streams import Address, End, News, TokenReader
from qlm_batch.domain.bodies import KIND_OF, wrong_kind
from qlm_batch.domain.errors import NotFound, QlmError, TooMany, Unavailable
from qlm_batch.domain.interactive import (
    OPEN_INTERACTIVE,
    InteractiveMark,
    InteractiveRequest,
    InteractiveState,
    NewInteractive,
)
from qlm_batch.domain.messages import Interactive
from qlm_batch.domain.ports import Courier
from qlm_batch.domain.snapshot import InstanceState, InstanceView
from qlm_batch.domain.store import InstanceStore, InteractiveStore
from qlm_batch.ids import REQUEST, new_id
from qlm_batch.scheduling.routing import Boot, Full, Route, route

P = ParamSpec("P")
T = TypeVar("T")
log = structlog.get_logger(__name__)

THREADS = 8
WAIT_S = 0.5
"""How long a silent stream is waited for before anything else is looked at."""
ASK_S = 2.0
"""After so much silence the store is asked how the request stands."""
POLL_S = 0.2
"""How soon a result is looked for again in the store when its stream has a gap."""
MOST_POLL_S = 1.0
MOST_DEATHS = 1
"""After how many engines that died with it inside a request is sent no further."""
RESTART_S = 120.0
"""A model whose last instance left so long ago may come back."""
AWAY_S = 30.0
"""How long a call waits for a database that went away under it."""
_SMOOTHING = 0.1


class CallStore(InteractiveStore, InstanceStore, Protocol):
    """The part of the store calls need."""


@dataclass(slots=True, eq=False)
class Call:
    """One request under way."""

    new: NewInteractive
    due_at: float
    route: Route
    epoch: int = 1
    shown: int = 0
    """Events passed on to the client."""
    deaths: int = 0
    avoid: set[Boot] = field(default_factory=set)
    finished: bool = False
    closed: bool = False

    @property
    def address(self) -> Address:
        """Where its tokens are."""
        return self.new.id, self.epoch

    @property
    def boot(self) -> Boot:
        """Who holds it."""
        return self.route.instance, self.route.boot_id


@dataclass(frozen=True, slots=True)
class Part:
    """What came next: events to pass on, and the end where it was reached."""

    events: Sequence[str] = ()
    end: End | None = None


class Calls:
    """All interactive calls of one API process; its methods belong to one event loop."""

    def __init__(
        self, store: CallStore, courier: Courier, tokens: TokenReader, *, most_open: int
    ) -> None:
        self._store = store
        self._courier = courier
        self._tokens = tokens
        self._most_open = most_open
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="calls")
        self._fleet = Fleet(store.instances, self._threads)
        self._sent: Counter[Boot] = Counter()
        self._service_s = 1.0

    async def open(
        self,
        tenant: str,
        endpoint: str,
        model: str,
        body: str,
        *,
        streamed: bool,
        ttft_s: float,
        request_id: str | None = None,
    ) -> Call:
        """Route, store and send a request; follow it with `parts`, and `close` it in every case.

        It goes by `request_id`, which no other request may have had, else by a new id.

        NotFound for a model nobody serves, InvalidInput for one of another kind than the endpoint;
        TooMany when all who serve it have enough; Unavailable.
        """
        if self._sent.total() >= self._most_open:
            raise TooMany(
                f"{self._most_open} requests are under way here; try again in a moment.",
                retry_after_s=self._service_s,
            )
        chosen = await self._route(model, endpoint, ())
        new = NewInteractive(
            id=request_id or new_id(REQUEST),
            tenant=tenant,
            endpoint=endpoint,
            model=model,
            body=body,
            streamed=streamed,
            ttft_s=ttft_s,
            instance=chosen.instance,
            boot_id=chosen.boot_id,
        )
        call = Call(new, 0.0, chosen)
        self._hold(call)
        try:
            call.due_at = await self._run(self._store_and_send, new)
        except BaseException:
            self.close(call)
            raise
        return call

    async def parts(self, call: Call) -> AsyncGenerator[Part, None]:
        """What comes back, in order and without gaps; the last part has the end."""
        silent_since = time.monotonic()
        while True:
            news = await self._tokens.read(call.address, WAIT_S)
            if news is None:
                async for part in self._from_store(call):
                    yield part
                return
            if not news:
                asked = time.monotonic() - silent_since >= ASK_S
                if asked:
                    silent_since = time.monotonic()
                over = await self._look(call, ask=asked)
                if over is not None:
                    yield over
                    return
                continue
            silent_since = time.monotonic()
            if _has_gap(news, call.shown):
                async for part in self._from_store(call):
                    yield part
                return
            end = news[-1].end
            if end is not None and end.again:
                call.deaths += end.died
                over = await self._elsewhere(call)
                if over is not None:
                    yield over
                    return
                continue
            events = _unseen(news, call.shown)
            call.shown += len(events)
            call.finished = end is not None
            yield Part(events, end)
            if call.finished:
                return

    def close(self, call: Call) -> None:
        """Nobody waits any more: give an unfinished request up. Safe to call twice."""
        if call.closed:
            return
        call.closed = True
        self._release(call)
        self._tokens.leave(call.address, finished=call.finished)

    def took(self, seconds: float) -> None:
        """Learn how long a request takes."""
        self._service_s += _SMOOTHING * (seconds - self._service_s)

    async def keep_present(self) -> None:
        """Tell workers who still waits, for ever."""
        await self._tokens.keep_present()

    async def shut(self) -> None:
        """Give everything back."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        await self._tokens.close()

    # Sending

    async def _route(self, model: str, endpoint: str, avoid: Sequence[Boot] | set[Boot]) -> Route:
        for most_s in (STALE_S, FRESH_S / 4):
            views = await self._fleet.views(most_s)
            _check_kind(views, model, endpoint)
            found = route(
                views, model, sent=self._sent, service_s=self._service_s, avoid=frozenset(avoid)
            )
            if isinstance(found, Route):
                return found
        if isinstance(found, Full):
            raise TooMany(
                "Every instance that serves this model has its queue full.",
                code="queue_full",
                retry_after_s=found.retry_after_s,
            )
        if await self._run(self._store.served_lately, model, RESTART_S):
            raise Unavailable(
                f"No instance is ready to serve '{model[:100]}' now; try again.",
                retry_after_s=ASK_S,
            )
        raise NotFound(
            f"The model '{model[:100]}' is not served here. GET /v1/models lists those that are.",
            code="model_not_found",
            param="model",
        )

    def _store_and_send(self, new: NewInteractive) -> float:
        accepted_at = self._store.add_interactive(new)
        due_at = accepted_at + new.ttft_s
        try:
            self._courier.interactive(self._message(new, 1, due_at))
        except Unavailable:
            self._store.mark_interactive([InteractiveMark(new.id, 1, InteractiveState.ABORTED)])
            raise
        return due_at

    def _message(self, new: NewInteractive, epoch: int, due_at: float) -> Interactive:
        return Interactive(
            request_id=new.id,
            epoch=epoch,
            instance=new.instance,
            boot_id=new.boot_id,
            tenant=new.tenant,
            endpoint=new.endpoint,
            model=new.model,
            body=new.body,
            streamed=new.streamed,
            due_at=due_at,
            inbox=self._tokens.inbox,
        )

    def _hold(self, call: Call) -> None:
        self._sent[call.boot] += 1
        self._tokens.attend(call.address)

    def _release(self, call: Call) -> None:
        self._sent[call.boot] -= 1
        if self._sent[call.boot] <= 0:
            del self._sent[call.boot]

    async def _elsewhere(self, call: Call) -> Part | None:
        """Lease the request to another boot; the end where there is none."""
        self._release(call)
        self._tokens.leave(call.address, finished=call.finished)
        call.avoid.add(call.boot)
        try:
            try:
                await self._lease_again(call)
            finally:
                # Before it is sent: what comes for a request that nobody attends is not kept.
                self._hold(call)
            await self._send(call)
        except QlmError as error:
            return await self._failed(call, error)
        log.info("rerouted", request=call.new.id, instance=call.route.instance, epoch=call.epoch)
        return None

    async def _lease_again(self, call: Call) -> None:
        if call.deaths > MOST_DEATHS:
            raise Unavailable("Engines stopped while they served this request.")
        call.route = await self._route(call.new.model, call.new.endpoint, call.avoid)
        where = call.route.instance, call.route.boot_id
        epoch = await self._run(self._store.reroute_interactive, call.new.id, call.epoch, *where)
        if epoch is None:
            raise Unavailable("The request was ended meanwhile.")
        call.epoch = epoch

    async def _send(self, call: Call) -> None:
        new = replace(call.new, instance=call.route.instance, boot_id=call.route.boot_id)
        await self._run(self._courier.interactive, self._message(new, call.epoch, call.due_at))

    # Doubt

    async def _look(self, call: Call, *, ask: bool) -> Part | None:
        """Why nothing comes: the end where it is over, None where waiting goes on."""
        alive = await self._alive(call)
        if alive and not ask:
            return None
        try:
            stored = await self._stored(call)
        except Unavailable:
            return None
        if stored is not None and stored.state not in OPEN_INTERACTIVE:
            return self._rest(call, stored)
        if not alive:
            return await self._lost(call, stored)
        if stored is None or stored.state is InteractiveState.SENT:
            with contextlib.suppress(Unavailable):
                # The message may be lost; a worker that has it ignores the second.
                await self._send(call)
        return None

    async def _from_store(self, call: Call) -> AsyncGenerator[Part, None]:
        """The rest of a request whose stream is lost: whole, once it has ended."""
        away_since: float | None = None
        sent_at, pause_s = time.monotonic(), POLL_S
        while True:
            try:
                stored = await self._stored(call)
                away_since = None
            except Unavailable as error:
                away_since = away_since or time.monotonic()
                if time.monotonic() - away_since > AWAY_S:
                    yield self._finish(call, Part((), _end_of(error)))
                    return
                await asyncio.sleep(pause_s)
                continue
            if stored is None:
                lost = Unavailable("The answer was lost; send the request again.")
                yield await self._failed(call, lost)
                return
            if stored.state not in OPEN_INTERACTIVE:
                yield self._rest(call, stored)
                return
            part = None
            back = await self._sent_back(call)
            if back is not None:
                call.deaths += back.died
                part = await self._elsewhere(call)
            elif not await self._alive(call):
                part = await self._lost(call, stored)
            elif stored.state is InteractiveState.SENT and time.monotonic() - sent_at > ASK_S:
                sent_at = time.monotonic()
                with contextlib.suppress(Unavailable):
                    await self._send(call)
            if part is not None:
                yield self._finish(call, part)
                return
            await asyncio.sleep(pause_s)
            # Many calls may wait like this at once while Redis is away.
            pause_s = min(MOST_POLL_S, pause_s * 1.2)

    async def _sent_back(self, call: Call) -> End | None:
        """Its worker's word to send it elsewhere, which no store has."""
        news = await self._tokens.read(call.address, 0.0)
        end = news[-1].end if news else None
        return end if end is not None and end.again else None

    async def _lost(self, call: Call, stored: InteractiveRequest | None) -> Part | None:
        """Move a request whose boot is gone; the end where it has begun to answer."""
        if call.shown:
            lost = Unavailable("The instance that answered was lost; send it again.")
            return await self._failed(call, lost)
        call.deaths += stored is not None and stored.state is InteractiveState.RUNNING
        return await self._elsewhere(call)

    async def _alive(self, call: Call) -> bool:
        """Whether the boot that holds the request is there; yes while nobody can tell."""
        try:
            views = await self._fleet.views()
        except Unavailable:
            return True
        return any(
            (view.name, view.boot_id) == call.boot and view.state is not InstanceState.LOST
            for view in views
        )

    async def _stored(self, call: Call) -> InteractiveRequest | None:
        """The request as it stands; None where a crash of the database took it.

        It is stored without waiting for the disk. Whoever serves it does so nevertheless.
        """
        try:
            return await self._run(self._store.interactive, call.new.tenant, call.new.id)
        except NotFound:
            return None

    def _rest(self, call: Call, stored: InteractiveRequest) -> Part:
        """What the client has not seen of an ended request."""
        if stored.result is None:
            lost = Unavailable("The answer was lost; send the request again.")
            return self._finish(call, Part((), _end_of(lost)))
        status = stored.status_code or 500
        events = stored.result.split("\n")
        if stored.streamed and (status < 400 or call.shown or len(events) > 1):
            # Without its last word a stream that failed would look like one that is complete.
            unseen = events[call.shown :] or (events[-1:] if status >= 400 else [])
            return self._finish(call, Part(unseen, End(status)))
        first_s, took_s = stored.first_token_s, stored.duration_s
        since_first_s = 0.0 if first_s is None or took_s is None else max(0.0, took_s - first_s)
        end = End(status, stored.result, since_first_s=since_first_s)
        return self._finish(call, Part((), end))

    async def _failed(self, call: Call, error: QlmError) -> Part:
        """End a request that cannot go on, here and in the store."""
        end = _end_of(error)
        mark = InteractiveMark(
            call.new.id, call.epoch, InteractiveState.FAILED, end.status, end.body
        )
        with contextlib.suppress(Unavailable):
            await self._run(self._store.mark_interactive, [mark])
        return self._finish(call, Part((), end))

    def _finish(self, call: Call, part: Part) -> Part:
        call.shown += len(part.events)
        call.finished = True
        return part

    async def _run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, partial(function, *args, **kwargs))


def _check_kind(views: Sequence[InstanceView], model: str, endpoint: str) -> None:
    kinds = {hosted.kind for view in views for hosted in view.models if hosted.name == model}
    if kinds and KIND_OF[endpoint] not in kinds:
        raise wrong_kind(model[:100], kinds.pop(), "model")


def _has_gap(news: Sequence[News], shown: int) -> bool:
    """Whether events are missing before or between those told."""
    for each in news:
        if each.first > shown:
            return True
        shown = max(shown, each.first + len(each.events))
    return False


def _unseen(news: Sequence[News], shown: int) -> Sequence[str]:
    """Events the client has not seen; entries overlap where a write was repeated."""
    events: list[str] = []
    for each in news:
        events += each.events[max(0, shown + len(events) - each.first) :]
    return events


def _end_of(error: QlmError) -> End:
    return End(error.status, orjson.dumps({"error": dict(error.body())}).decode())
