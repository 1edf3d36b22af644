"""Interactive requests at a worker, with an engine and a stream steered by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Self

import pytest
from structlog.testing import capture_logs

from qlm_batch.dispatch.streams import Address, End, News, Parcel, Presence
from qlm_batch.domain.engine import EngineAnswer, EngineInfo, EngineRequest
from qlm_batch.domain.errors import EngineDead, Unavailable
from qlm_batch.domain.interactive import (
    OPEN_INTERACTIVE,
    InteractiveMark,
    InteractiveState,
    NewInteractive,
)
from qlm_batch.domain.jobs import CHAT, EngineKind, Usage
from qlm_batch.domain.messages import Interactive
from qlm_batch.domain.snapshot import Residency
from qlm_batch.scheduling import agent
from qlm_batch.store.memory import MemoryStore
from qlm_workers import interactive
from qlm_workers.hosts import Host
from qlm_workers.interactive import ELSEWHERE, GIVEN_UP, InteractiveDesk
from qlm_workers.link import Link
from qlm_workers.meter import Meter
from tests.unit.runner_rig import until
from tests.unit.worker_fakes import FakeEngine, FakeStore

CALL = Interactive("req_1", 1, "gpu-0", "boot", "acme", CHAT, "m", '{"a":1}', True, 100.0, "api_1")
USAGE = '{"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2}}'


class Events:
    """A stream that gives what is put into it."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[str | Exception | None] = asyncio.Queue()
        self.closed = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        event = await self.queue.get()
        if event is None:
            raise StopAsyncIteration
        if isinstance(event, Exception):
            raise event
        return event

    async def aclose(self) -> None:
        self.closed = True


class StreamEngine(FakeEngine):
    """Opens what it is told to."""

    def __init__(self, opens: EngineAnswer | Events | Exception) -> None:
        super().__init__()
        self.opens = opens

    async def open_stream(self, request: EngineRequest) -> EngineAnswer | Events:
        self.requests.append(request)
        if isinstance(self.opens, Exception):
            raise self.opens
        return self.opens


class Writer:
    """What would stand in Redis."""

    def __init__(self) -> None:
        self.entries: dict[Address, list[News]] = {}
        self.presence = Presence(True)
        self.away = False
        self.trips = 0
        self.gate = asyncio.Event()
        self.gate.set()

    async def push(
        self, parcels: Iterable[Parcel], watched: Collection[str]
    ) -> Mapping[str, Presence] | None:
        self.trips += 1
        await self.gate.wait()
        if self.away:
            return None
        for parcel in parcels:
            assert parcel.inbox == "api_1"
            self.entries.setdefault(parcel.to, []).append(parcel.news)
        return dict.fromkeys(watched, self.presence)

    async def close(self) -> None:
        pass

    def events(self, to: Address = ("req_1", 1)) -> list[str]:
        return [event for news in self.entries.get(to, ()) for event in news.events]

    def end(self, to: Address = ("req_1", 1)) -> End | None:
        entries = self.entries.get(to)
        return entries[-1].end if entries else None


class Desk:
    """A desk at work, over the store in memory."""

    def __init__(self, engine: FakeEngine) -> None:
        self.engine = engine
        self.writer = Writer()
        self.store = MemoryStore(lambda: 1000.0)
        self.deaths: list[EngineDead] = []
        self.host = Host("m", EngineKind.GENERATE, engine, Meter("gpu-0", "cpu", "m"))
        self.host.started(EngineInfo("m", EngineKind.GENERATE, 2048, 8, 4096), 0.0)
        self.desk = InteractiveDesk(self.store, self.writer, flush_s=0.001)  # type: ignore[arg-type]
        self.over = asyncio.Event()
        self.link = Link(FakeStore())

    def accept(self, call: Interactive = CALL) -> None:
        """Store and take a call."""
        self.store.add_interactive(
            NewInteractive(
                call.request_id, "acme", CHAT, "m", call.body, True, 1.0, "gpu-0", "boot"
            )
        )
        self.desk.accept(call)

    def state(self, request_id: str = "req_1") -> InteractiveState:
        return self.store.interactive("acme", request_id).state


@asynccontextmanager
async def working(engine: FakeEngine) -> AsyncIterator[Desk]:
    bench = Desk(engine)
    bench.desk.begin(
        bench.link,
        {"m": bench.host},
        "boot",
        died=lambda _, death: bench.deaths.append(death),
        idle=lambda: None,
    )
    loops = [
        asyncio.create_task(bench.desk.write_forever(bench.over)),
        asyncio.create_task(bench.desk.record_forever(bench.over)),
    ]
    try:
        yield bench
    finally:
        bench.over.set()
        await asyncio.gather(*loops)
        await bench.desk.close()
        bench.link.close()


@pytest.fixture(autouse=True)
def _impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interactive, "LOOK_S", 0.01)
    monkeypatch.setattr(interactive, "LOOK_WRITING_S", 0.0)
    monkeypatch.setattr(interactive, "RETRY_S", 0.005)


async def test_events_are_told_in_order_and_the_end_is_stored() -> None:
    events = Events()
    async with working(StreamEngine(events)) as bench:
        bench.accept()
        for event in ("a", "b", USAGE, None):
            events.queue.put_nowait(event)
        await until(lambda: bench.state() is InteractiveState.DONE)
        await until(lambda: bench.writer.end() == End(200))
        assert bench.writer.events() == ["a", "b", USAGE]
        assert bench.desk.running == 0
        stored = bench.store.interactive("acme", "req_1")
        assert (stored.result, stored.usage) == (f"a\nb\n{USAGE}", Usage(5, 0, 2))
        assert stored.first_token_s is not None
        told = bench.host.meter.report(1000.0)
        assert told is not None and told.outputs == ()
        ((came, due_s, *of),) = told.calls
        assert came + due_s == pytest.approx(max(came, 100.0)) and of == ["acme", 2, 5]
        (request,) = bench.engine.requests
        assert request.priority == agent.interactive_priority(100.0) < agent.engine_priority(0)
        assert events.closed


async def test_a_request_that_ends_soon_is_recorded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interactive, "LOOK_S", 600.0)
    events = Events()
    async with working(StreamEngine(events)) as bench:
        recorded: list[InteractiveState] = []
        mark = bench.store.mark_interactive

        def noted(marks: Sequence[InteractiveMark]) -> int:
            recorded.extend(each.state for each in marks)
            return mark(marks)

        bench.store.mark_interactive = noted  # type: ignore[method-assign]
        bench.accept()
        await until(lambda: bench.engine.requests)
        events.queue.put_nowait(None)
        await until(lambda: bench.state() is InteractiveState.DONE)
        assert recorded == [InteractiveState.DONE]
        # Nobody looks for long: the loops are told of the end.
        bench.over.set()
        bench.desk._unwritten.set()
        bench.desk._unmarked.set()


async def test_what_comes_during_a_round_trip_goes_with_the_next() -> None:
    events = Events()
    async with working(StreamEngine(events)) as bench:
        bench.writer.gate.clear()
        bench.accept()
        events.queue.put_nowait("0")
        await until(lambda: bench.writer.trips)
        for n in range(1, 50):
            events.queue.put_nowait(str(n))
        events.queue.put_nowait(None)
        await until(lambda: events.closed)
        bench.writer.gate.set()
        await until(lambda: bench.writer.end() is not None)
        assert bench.writer.events() == [str(n) for n in range(50)]
        assert len(bench.writer.entries["req_1", 1]) <= 3


async def test_a_refused_stream_is_told_as_an_answer() -> None:
    async with working(StreamEngine(EngineAnswer(400, '{"error":\n{}}'))) as bench:
        bench.accept()
        await until(lambda: bench.state() is InteractiveState.FAILED)
        await until(lambda: bench.writer.end() == End(400, '{"error": {}}'))


async def test_an_answer_that_comes_whole_tells_when_its_first_token_was_there() -> None:
    async with working(StreamEngine(EngineAnswer(200, "{}", first_token_s=0.0))) as bench:
        bench.accept()
        await until(lambda: bench.writer.end() is not None)
    end = bench.writer.end()
    assert end is not None and end.since_first_s > 0.0


async def test_an_engine_that_dies_before_the_first_event_lets_the_request_go_elsewhere() -> None:
    async with working(StreamEngine(EngineDead("gone"))) as bench:
        bench.accept()
        await until(lambda: bench.writer.end() == End(503, again=True, died=True))
        assert len(bench.deaths) == 1
        assert bench.state() in OPEN_INTERACTIVE


async def test_an_engine_that_dies_later_ends_the_stream_with_an_error() -> None:
    events = Events()
    async with working(StreamEngine(events)) as bench:
        bench.accept()
        events.queue.put_nowait("a")
        events.queue.put_nowait(EngineDead("gone"))
        await until(lambda: bench.writer.end() == End(500))
        told = bench.writer.events()
        assert told[0] == "a" and told[1].startswith('{"error"')
        await until(lambda: bench.state() is InteractiveState.FAILED)


@pytest.mark.parametrize(
    "call",
    [
        replace(CALL, boot_id="an older boot"),
        replace(CALL, model="another"),
    ],
)
async def test_what_is_not_for_this_boot_goes_elsewhere(call: Interactive) -> None:
    async with working(StreamEngine(Events())) as bench:
        bench.accept(call)
        await until(lambda: bench.writer.end() == End(503, again=True))
        assert not bench.engine.requests


async def test_a_draining_worker_sends_new_requests_elsewhere() -> None:
    async with working(StreamEngine(Events())) as bench:
        bench.desk.refuse_more()
        bench.accept()
        await until(lambda: bench.writer.end() == End(503, again=True))


async def test_a_message_that_comes_twice_is_served_once() -> None:
    events = Events()
    async with working(StreamEngine(events)) as bench:
        bench.accept()
        bench.desk.accept(CALL)
        await until(lambda: bench.engine.requests)
        events.queue.put_nowait(None)
        await until(lambda: bench.state() is InteractiveState.DONE)
        bench.desk.accept(CALL)
        assert bench.desk.running == 0
        assert len(bench.engine.requests) == 1


async def test_a_reader_that_left_ends_the_request_at_once() -> None:
    events = Events()
    async with working(StreamEngine(events)) as bench:
        bench.accept()
        events.queue.put_nowait("a")
        await until(lambda: bench.writer.events())
        bench.writer.presence = Presence(True, frozenset([b"req_1:1"]))
        await until(lambda: bench.state() is InteractiveState.ABORTED)
        assert events.closed
        assert bench.desk.running == 0
        await until(lambda: bench.writer.end() == GIVEN_UP)


async def test_a_reader_is_given_up_only_after_a_long_silence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(interactive, "READER_S", 600.0)
    events = Events()
    async with working(StreamEngine(events)) as bench:
        bench.writer.presence = Presence(False)
        bench.accept()
        await until(lambda: bench.writer.trips > 5)
        await until(lambda: bench.state() is InteractiveState.RUNNING)
        monkeypatch.setattr(interactive, "READER_S", 0.0)
        await until(lambda: bench.state() is InteractiveState.ABORTED)
        # A process that was only stopped for a while must not take this for the answer's end.
        await until(lambda: bench.writer.end() is not None)
        end = bench.writer.end()
        assert end is not None and '"error"' in (end.body or "")


async def test_without_redis_the_answer_is_stored_all_the_same() -> None:
    events = Events()
    async with working(StreamEngine(events)) as bench:
        bench.writer.away = True
        bench.accept()
        events.queue.put_nowait("a")
        events.queue.put_nowait(None)
        await until(lambda: bench.state() is InteractiveState.DONE)
        await until(lambda: bench.desk.running == 0)
        assert bench.store.interactive("acme", "req_1").result == "a"


async def test_what_has_to_go_elsewhere_is_told_once_redis_is_back() -> None:
    async with working(StreamEngine(EngineDead("gone"))) as bench:
        bench.writer.away = True
        bench.accept()
        await until(lambda: bench.desk.running == 0)
        bench.writer.away = False
        await until(lambda: bench.writer.end() == End(503, again=True, died=True))


async def test_marks_wait_for_a_store_that_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlm_workers.link.BACKOFF_S", (0.005,))
    events = Events()
    async with working(StreamEngine(events)) as bench:
        plain = bench.store.mark_interactive
        tries = []

        def away(marks: Sequence[InteractiveMark]) -> int:
            tries.append(marks)
            raise Unavailable("away")

        bench.store.mark_interactive = away  # type: ignore[method-assign]
        bench.accept()
        events.queue.put_nowait(None)
        await until(lambda: len(tries) > 2)
        bench.store.mark_interactive = plain  # type: ignore[method-assign]
        await until(lambda: bench.state() is InteractiveState.DONE)


async def test_the_end_of_the_worker_leaves_nobody_waiting() -> None:
    events = Events()
    async with working(StreamEngine(events)) as bench:
        bench.accept()
        bench.accept(replace(CALL, request_id="req_2"))
        await until(lambda: len(bench.engine.requests) == 2)
    assert bench.writer.end() == End(503, again=True, died=True)
    assert bench.writer.end(("req_2", 1)) == End(503, again=True, died=True)
    assert events.closed


async def test_a_call_for_a_sleeping_model_waits_until_it_is_awake() -> None:
    events = Events()
    async with working(StreamEngine(events)) as bench:
        bench.host.left(Residency.ASLEEP)
        bench.accept()
        await until(lambda: bench.host.parked == 1)
        assert not bench.engine.requests
        assert not bench.host.busy
        bench.host.started(EngineInfo("m", EngineKind.GENERATE, 2048, 8, 4096), 1.0)
        await until(lambda: bench.engine.requests)
        assert (bench.host.parked, bench.host.interactive) == (0, 1)
        events.queue.put_nowait(USAGE)
        events.queue.put_nowait(None)
        await until(lambda: bench.writer.end() == End(200))


async def test_a_waiting_call_goes_elsewhere_when_its_model_cannot_be_loaded() -> None:
    async with working(StreamEngine(Events())) as bench:
        bench.host.left(Residency.COLD)
        bench.accept()
        await until(lambda: bench.host.parked == 1)
        bench.host.left(Residency.FAILED)
        await until(lambda: bench.writer.end() == ELSEWHERE)
        bench.accept(replace(CALL, request_id="req_2"))
        await until(lambda: bench.writer.end(("req_2", 1)) == ELSEWHERE)
    assert not bench.engine.requests


async def test_a_draining_worker_sends_calls_for_a_sleeping_model_elsewhere_at_once() -> None:
    async with working(StreamEngine(Events())) as bench:
        bench.host.left(Residency.ASLEEP)
        bench.accept()
        await until(lambda: bench.host.parked == 1)
        bench.accept(replace(CALL, request_id="req_2"))
        bench.desk.refuse_more()
        await until(lambda: bench.writer.end() == ELSEWHERE)
        await until(lambda: bench.writer.end(("req_2", 1)) == ELSEWHERE)
        assert bench.desk.running == 0
        assert bench.host.parked == 0


async def test_a_draining_worker_goes_on_with_calls_inside() -> None:
    events = Events()
    async with working(StreamEngine(events)) as bench:
        bench.accept()
        await until(lambda: bench.engine.requests)
        bench.desk.refuse_more()
        events.queue.put_nowait(USAGE)
        events.queue.put_nowait(None)
        await until(lambda: bench.writer.end() == End(200))


async def test_a_reader_that_leaves_while_its_model_sleeps_ends_the_wait() -> None:
    async with working(StreamEngine(Events())) as bench:
        bench.host.left(Residency.ASLEEP)
        bench.accept()
        await until(lambda: bench.host.parked == 1)
        bench.writer.presence = Presence(True, frozenset([b"req_1:1"]))
        await until(lambda: bench.state() is InteractiveState.ABORTED)
        assert bench.host.parked == 0


async def test_a_store_that_cannot_take_the_last_marks_does_not_break_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(_: object) -> int:
        raise ValueError("a result this database cannot hold")

    with capture_logs() as told:
        async with working(StreamEngine(EngineAnswer(200, "{}"))) as bench:
            monkeypatch.setattr(bench.store, "mark_interactive", broken)
            bench.accept()
            await until(lambda: bench.writer.end() is not None)
    assert any(line["event"] == "last words were not told" for line in told)


async def test_when_a_call_came_is_told_by_the_databases_clock(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with working(StreamEngine(EngineAnswer(200, "{}"))) as bench:
        monkeypatch.setattr(bench.link, "now", lambda: 99.0)
        bench.accept()
        await until(lambda: bench.writer.end() is not None)
        seen = bench.host.meter.report(99.0)
    assert seen is not None
    ((came, due_s, *_),) = seen.calls
    assert 90.0 < came <= 99.0
    assert came + due_s == pytest.approx(100.0)
