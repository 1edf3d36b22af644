"""Following interactive requests to their end, over a stream and a store steered by hand."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import orjson
import pytest

from qlm_batch.control import fleet, interactive
from qlm_batch.control.interactive import Call, Calls, Part
from qlm_batch.dispatch.streams import Address, End, News
from qlm_batch.domain.errors import InvalidInput, NotFound, TooMany, Unavailable
from qlm_batch.domain.interactive import InteractiveMark, InteractiveRequest, InteractiveState
from qlm_batch.domain.jobs import CHAT, EMBEDDINGS, EngineKind
from qlm_batch.domain.messages import Interactive
from qlm_batch.domain.records import Heartbeat
from qlm_batch.domain.snapshot import InstanceState, ModelView, Residency
from qlm_batch.store.memory import MemoryStore
from tests.unit.runner_rig import until

SLOTS = 2


class Streams:
    """What workers wrote, by request and epoch; `away` is a Redis that does not answer."""

    def __init__(self) -> None:
        self.inbox = "api_1"
        self.entries: dict[Address, list[News]] = {}
        self.present: set[Address] = set()
        self.left: dict[Address, bool] = {}
        self.away = False

    async def read(self, of: Address, wait_s: float) -> Sequence[News] | None:
        if self.away or not self.entries.get(of):
            await asyncio.sleep(wait_s)
        return None if self.away else self.entries.pop(of, [])

    def attend(self, of: Address) -> None:
        self.present.add(of)

    def leave(self, of: Address, *, finished: bool) -> None:
        self.present.discard(of)
        self.left[of] = finished

    async def keep_present(self) -> None:
        pass

    async def close(self) -> None:
        pass


class Rig:
    """Calls over the memory store, with whatever `act` does once a message was sent."""

    def __init__(self, act: Callable[[Rig, Interactive], None] = lambda *_: None) -> None:
        self.time = 1000.0
        self.store = MemoryStore(lambda: self.time)
        self.streams = Streams()
        self.sent: list[Interactive] = []
        self.act = act
        self.broker_away = False
        self.calls = Calls(self.store, self, self.streams, most_open=50)  # type: ignore[arg-type]

    def interactive(self, message: Interactive) -> None:
        """The courier."""
        if self.broker_away:
            raise Unavailable("away")
        self.sent.append(message)
        self.act(self, message)

    def beat(
        self,
        name: str = "gpu-0",
        boot: str = "boot",
        kind: EngineKind = EngineKind.GENERATE,
        **changes: object,
    ) -> None:
        """An instance that serves `m` reports."""
        model = ModelView("m", kind, Residency.AWAKE, 2048)
        state = changes.pop("state", InstanceState.READY)
        beat = Heartbeat(name, boot, "cpu", state, (model,), SLOTS, 8192, **changes)  # type: ignore[arg-type]
        self.store.heartbeat(beat)

    def write(self, *news: News, to: Interactive | None = None) -> None:
        """A worker writes."""
        message = to or self.sent[-1]
        self.streams.entries.setdefault((message.request_id, message.epoch), []).extend(news)

    def end(self, result: str, status: int = 200, *, to: Interactive | None = None) -> None:
        """A worker stores the end."""
        message = to or self.sent[-1]
        state = InteractiveState.DONE if status < 300 else InteractiveState.FAILED
        mark = InteractiveMark(message.request_id, message.epoch, state, status, result)
        assert self.store.mark_interactive([mark]) == 1

    async def open(self, model: str = "m", *, endpoint: str = CHAT, streamed: bool = True) -> Call:
        return await self.calls.open("acme", endpoint, model, "{}", streamed=streamed, ttft_s=1.0)

    async def told(self, call: Call) -> tuple[list[str], End]:
        """Everything that comes back."""
        events: list[str] = []
        parts: list[Part] = []
        async with asyncio.timeout(10):
            async for part in self.calls.parts(call):
                events += part.events
                parts.append(part)
        self.calls.close(call)
        end = parts[-1].end
        assert end is not None
        assert all(part.end is None for part in parts[:-1])
        return events, end

    def stored(self) -> InteractiveRequest:
        return self.store.interactive("acme", self.sent[-1].request_id)


@pytest.fixture(autouse=True)
def _impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in {"WAIT_S": 0.01, "ASK_S": 0.05, "POLL_S": 0.005}.items():
        monkeypatch.setattr(interactive, name, seconds)
    monkeypatch.setattr(fleet, "FRESH_S", 0.01)


@asynccontextmanager
async def at_work(act: Callable[[Rig, Interactive], None] = lambda *_: None) -> AsyncIterator[Rig]:
    rig = Rig(act)
    rig.beat()
    yield rig
    await rig.calls.shut()


def error_in(end: End) -> dict[str, object]:
    error: dict[str, object] = orjson.loads(end.body or "")["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


async def test_events_come_through_in_order_to_the_end() -> None:
    def act(rig: Rig, _: Interactive) -> None:
        rig.write(News(0, ("a", "b")), News(2, ("c",)), News(3, (), End(200)))

    async with at_work(act) as rig:
        call = await rig.open()
        assert rig.streams.present == {call.address}
        assert await rig.told(call) == (["a", "b", "c"], End(200))
        assert rig.streams.left == {call.address: True}
        assert (rig.sent[0].due_at, rig.sent[0].inbox) == (1001.0, "api_1")


async def test_what_was_written_twice_is_told_once() -> None:
    def act(rig: Rig, _: Interactive) -> None:
        rig.write(News(0, ("a", "b")), News(1, ("b", "c")), News(0, ("a", "b", "c", "d"), End(200)))

    async with at_work(act) as rig:
        assert (await rig.told(await rig.open()))[0] == ["a", "b", "c", "d"]


async def test_a_gap_is_filled_from_the_store() -> None:
    async with at_work() as rig:
        call = await rig.open()
        rig.write(News(0, ("a",)))
        telling = asyncio.create_task(rig.told(call))
        await until(lambda: call.shown)
        rig.streams.entries.clear()
        rig.write(News(3, ("d",)))
        await asyncio.sleep(0.03)
        rig.end("a\nb\nc\nd\ne")
        assert await telling == (["a", "b", "c", "d", "e"], End(200))


async def test_a_gap_among_news_that_come_together_is_filled_from_the_store() -> None:
    async with at_work() as rig:
        call = await rig.open()
        rig.write(News(0, ("a",)), News(2, ("c",)))
        rig.end("a\nb\nc")
        assert await rig.told(call) == (["a", "b", "c"], End(200))


async def test_a_lost_end_is_found_in_the_store() -> None:
    async with at_work() as rig:
        call = await rig.open()
        rig.write(News(0, ("a",)))
        telling = asyncio.create_task(rig.told(call))
        rig.end("a\nb")
        assert await telling == (["a", "b"], End(200))


async def test_without_redis_the_answer_comes_from_the_store() -> None:
    async with at_work() as rig:
        rig.streams.away = True
        call = await rig.open(streamed=False)
        telling = asyncio.create_task(rig.told(call))
        await asyncio.sleep(0.02)
        rig.end('{"whole":1}')
        assert await telling == ([], End(200, '{"whole":1}'))


async def test_a_message_nobody_took_is_sent_again() -> None:
    def act(rig: Rig, _: Interactive) -> None:
        if len(rig.sent) == 3:
            rig.write(News(0, ("a",), End(200)))

    async with at_work(act) as rig:
        assert await rig.told(await rig.open()) == (["a"], End(200))
        assert len({(m.request_id, m.epoch) for m in rig.sent}) == 1


async def test_a_request_that_is_sent_back_is_leased_to_another() -> None:
    def act(rig: Rig, message: Interactive) -> None:
        if message.instance == "gpu-0":
            rig.write(News(0, (), End(503, again=True)))
        else:
            rig.write(News(0, ("a",), End(200)))

    async with at_work(act) as rig:
        rig.beat("gpu-1")
        call = await rig.open()
        assert await rig.told(call) == (["a"], End(200))
        assert [(m.instance, m.epoch) for m in rig.sent] == [("gpu-0", 1), ("gpu-1", 2)]
        assert rig.stored().instance == "gpu-1"
        assert rig.streams.left[call.new.id, 1] is False


async def test_a_request_that_is_sent_back_once_redis_was_away_is_leased_to_another() -> None:
    def act(rig: Rig, message: Interactive) -> None:
        if message.instance == "gpu-1":
            rig.end("a")

    async with at_work(act) as rig:
        rig.beat("gpu-1")
        call = await rig.open()
        rig.streams.away = True
        telling = asyncio.create_task(rig.told(call))
        await asyncio.sleep(0.02)
        rig.streams.away = False
        rig.write(News(0, (), End(503, again=True)))
        assert await telling == (["a"], End(200))


async def test_a_request_is_attended_before_it_is_sent_anywhere() -> None:
    attended: list[bool] = []

    def act(rig: Rig, message: Interactive) -> None:
        attended.append((message.request_id, message.epoch) in rig.streams.present)
        elsewhere = message.instance == "gpu-0"
        rig.write(News(0, (), End(503 if elsewhere else 200, again=elsewhere)))

    async with at_work(act) as rig:
        rig.beat("gpu-1")
        await rig.told(await rig.open())
        assert attended == [True, True]


async def test_a_request_whose_instance_is_lost_before_the_first_event_moves() -> None:
    def act(rig: Rig, message: Interactive) -> None:
        if message.epoch == 2:
            rig.write(News(0, ("a",), End(200)))

    async with at_work(act) as rig:
        call = await rig.open()
        rig.beat("gpu-1")
        rig.store.retire("gpu-0", "boot")
        assert await rig.told(call) == (["a"], End(200))


async def test_a_request_whose_instance_is_lost_later_ends_with_an_error() -> None:
    async with at_work() as rig:
        call = await rig.open()
        rig.write(News(0, ("a",)))
        telling = asyncio.create_task(rig.told(call))
        await until(lambda: call.shown)
        rig.beat("gpu-1")
        rig.beat("gpu-0", "another boot")
        events, end = await telling
        assert events == ["a"]
        assert error_in(end)["type"] == "server_error"
        assert rig.stored().state is InteractiveState.FAILED


@pytest.mark.parametrize("result", [None, '{"error":{"message":"The instance was lost."}}'])
async def test_a_stream_that_others_ended_meanwhile_is_not_taken_for_complete(
    result: str | None,
) -> None:
    async with at_work() as rig:
        call = await rig.open()
        rig.write(News(0, ("a",)))
        telling = asyncio.create_task(rig.told(call))
        await until(lambda: call.shown)
        state = InteractiveState.FAILED if result else InteractiveState.ABORTED
        mark = InteractiveMark(call.new.id, 1, state, 500 if result else None, result)
        rig.store.mark_interactive([mark])
        events, end = await telling
        assert "error" in orjson.loads(end.body or events[-1])


async def test_a_request_that_ends_engines_is_not_handed_round() -> None:
    def act(rig: Rig, _: Interactive) -> None:
        rig.write(News(0, (), End(503, again=True, died=True)))

    async with at_work(act) as rig:
        for n in range(1, 5):
            rig.beat(f"gpu-{n}")
        _, end = await rig.told(await rig.open())
        assert end.status == 503
        assert len(rig.sent) == 2
        assert rig.stored().state is InteractiveState.FAILED


async def test_a_request_in_hand_wherever_a_worker_dies_is_not_handed_round() -> None:
    def act(rig: Rig, message: Interactive) -> None:
        taken = InteractiveMark(message.request_id, message.epoch, InteractiveState.RUNNING)
        rig.store.mark_interactive([taken])
        rig.store.died(message.instance, message.boot_id)

    async with at_work(act) as rig:
        for n in range(1, 5):
            rig.beat(f"gpu-{n}")
        _, end = await rig.told(await rig.open())
        assert end.status == 503
        assert len(rig.sent) == 2


async def test_a_request_no_dead_worker_had_taken_goes_on_to_the_next() -> None:
    def act(rig: Rig, message: Interactive) -> None:
        if len(rig.sent) < 5:
            rig.store.died(message.instance, message.boot_id)
        else:
            rig.write(News(0, ("a",), End(200)))

    async with at_work(act) as rig:
        for n in range(1, 5):
            rig.beat(f"gpu-{n}")
        assert await rig.told(await rig.open()) == (["a"], End(200))


async def test_what_a_worker_stored_before_it_died_is_told() -> None:
    async with at_work() as rig:
        rig.beat("gpu-1")
        call = await rig.open()
        rig.end("a\nb")
        rig.store.died(*call.boot)
        assert await rig.told(call) == (["a", "b"], End(200))


async def test_a_request_nobody_else_can_take_ends_with_an_error() -> None:
    def act(rig: Rig, _: Interactive) -> None:
        rig.write(News(0, (), End(503, again=True)))

    async with at_work(act) as rig:
        _, end = await rig.told(await rig.open())
        assert end.status == 503
        assert "try again" in str(error_in(end)["message"])


async def test_a_model_nobody_serves_is_told_at_once() -> None:
    async with at_work() as rig:
        with pytest.raises(NotFound) as refusal:
            await rig.open("another")
        assert (refusal.value.code, refusal.value.param) == ("model_not_found", "model")


@pytest.mark.parametrize(
    ("kind", "endpoint", "said"),
    [
        (EngineKind.EMBED, CHAT, "The model 'm' makes embeddings; ask /v1/embeddings."),
        (
            EngineKind.GENERATE,
            EMBEDDINGS,
            "The model 'm' generates text; ask /v1/chat/completions or /v1/completions.",
        ),
    ],
)
async def test_a_model_of_the_other_kind_is_refused_before_it_is_sent_anything(
    kind: EngineKind, endpoint: str, said: str
) -> None:
    async with at_work() as rig:
        rig.beat(kind=kind)
        with pytest.raises(InvalidInput) as refusal:
            await rig.open(endpoint=endpoint)
        assert (refusal.value.code, refusal.value.param) == ("unsupported_endpoint", "model")
        assert refusal.value.message == said
        assert not rig.sent


async def test_a_model_whose_instance_restarts_is_worth_another_try() -> None:
    async with at_work() as rig:
        rig.calls.close(await rig.open())
        rig.store.retire("gpu-0", "boot")
        with pytest.raises(Unavailable):
            # For a moment the fleet is still taken for what it was.
            while True:
                rig.calls.close(await rig.open())
                await asyncio.sleep(0.005)


async def test_an_api_process_that_has_just_started_knows_who_has_just_left() -> None:
    async with at_work() as rig:
        rig.store.retire("gpu-0", "boot")
        with pytest.raises(Unavailable):
            await rig.open()


async def test_full_queues_say_when_to_come_back() -> None:
    async with at_work() as rig:
        rig.beat(interactive_running=4 * SLOTS + 3)
        for _ in range(200):
            rig.calls.took(2.0)
        with pytest.raises(TooMany) as refusal:
            await rig.open()
        assert refusal.value.code == "queue_full"
        assert refusal.value.retry_after_s == pytest.approx(4.0, rel=0.01)
        assert not rig.sent


async def test_what_this_process_sent_fills_the_queue_before_any_report() -> None:
    async with at_work() as rig:
        calls = [await rig.open() for _ in range(4 * SLOTS)]
        with pytest.raises(TooMany):
            await rig.open()
        rig.calls.close(calls[0])
        rig.calls.close(calls[0])
        await rig.open()


async def test_a_process_takes_only_so_many_requests() -> None:
    async with at_work() as rig:
        for n in range(1, 30):
            rig.beat(f"gpu-{n}")
        for _ in range(50):
            await rig.open()
        with pytest.raises(TooMany, match="under way"):
            await rig.open()


async def test_a_broker_that_is_away_leaves_no_open_request() -> None:
    async with at_work() as rig:
        rig.broker_away = True
        with pytest.raises(Unavailable):
            await rig.open()
        (stored,) = rig.store.state.interactive.values()
        assert stored.state is InteractiveState.ABORTED
        await until(lambda: not rig.streams.present)


async def test_a_call_that_is_closed_early_is_given_up() -> None:
    async with at_work() as rig:
        call = await rig.open()
        rig.calls.close(call)
        await until(lambda: rig.streams.left == {call.address: False})


async def test_a_database_that_stays_away_ends_the_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interactive, "AWAY_S", 0.05)

    def away(*_: object) -> InteractiveRequest:
        raise Unavailable("The database is away; try again.")

    async with at_work() as rig:
        call = await rig.open()
        rig.streams.away = True
        rig.store.interactive = away  # type: ignore[method-assign]
        _, end = await rig.told(call)
        assert end.status == 503
        assert error_in(end)["code"] == "service_unavailable"


async def test_a_request_whose_row_a_crash_took_is_still_answered() -> None:
    def act(rig: Rig, _: Interactive) -> None:
        rig.store.state.interactive.clear()
        if len(rig.sent) == 2:
            rig.write(News(0, ("a",), End(200)))

    async with at_work(act) as rig:
        assert await rig.told(await rig.open()) == (["a"], End(200))


async def test_a_request_lost_in_the_store_and_in_the_stream_ends_with_an_error() -> None:
    async with at_work() as rig:
        call = await rig.open()
        rig.streams.away = True
        rig.store.state.interactive.clear()
        _, end = await rig.told(call)
        assert end.status == 503
        assert "send the request again" in str(error_in(end)["message"])
