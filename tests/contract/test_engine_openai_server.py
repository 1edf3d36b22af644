"""What the engine over HTTP does about servers that are busy, away, or not what was expected."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import pytest_asyncio
from structlog.testing import capture_logs

from qlm_batch.domain.engine import EngineAnswer, EngineRequest, Lso
from qlm_batch.domain.errors import ConfigurationError, EngineDead
from qlm_batch.domain.jobs import CHAT, EngineKind
from qlm_batch.domain.ledger import ReleaseReason
from qlm_batch.settings import Settings
from qlm_cli import existing_engine
from qlm_workers import openai_engine, openai_probe
from qlm_workers.app import device_name
from qlm_workers.engines import make_engine
from qlm_workers.exits import Exit
from qlm_workers.hosts import Host
from qlm_workers.meter import Meter
from qlm_workers.openai_engine import OpenAIEngine
from qlm_workers.openai_probe import metric_sum
from qlm_workers.runner import Runner
from qlm_workers.simulated_engine import SimulatedEngine
from tests.contract.openai_server import Server, serving
from tests.contract.waiting import in_the_turn, until
from tests.unit.worker_fakes import FakeStore, make_slice

MODEL = "some/model"


def chat() -> EngineRequest:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    return EngineRequest("r1", CHAT, json.dumps(body), 7, "tenant-a")


@pytest.fixture
def server() -> Server:
    """A server that answers at once, not started yet."""
    return Server(SimulatedEngine(MODEL, time_scale=0), MODEL, 4096)


@asynccontextmanager
async def connected(server: Server, **options: float) -> AsyncIterator[OpenAIEngine]:
    """An engine connected to the running server."""
    with serving(server):
        engine = OpenAIEngine(server.url, MODEL, slots=4, **options)  # type: ignore[arg-type]
        await engine.start()
        try:
            yield engine
        finally:
            await engine.stop()


@pytest_asyncio.fixture
async def engine(server: Server) -> AsyncIterator[OpenAIEngine]:
    """A patient engine connected to the running server."""
    async with connected(server) as engine:
        yield engine


@pytest.mark.parametrize("status", [429, 502, 503, 504])
async def test_a_busy_server_is_asked_again(
    server: Server, engine: OpenAIEngine, status: int
) -> None:
    server.next_answers.append((status, {"retry-after": "0"}))
    assert (await engine.answer(chat())).status_code == 200
    assert not server.next_answers


async def test_a_server_that_says_no_is_not_asked_again(
    server: Server, engine: OpenAIEngine
) -> None:
    server.next_answers.extend([(400, {}), (503, {})])
    assert (await engine.answer(chat())).status_code == 400
    assert len(server.next_answers) == 1


async def test_no_request_fails_because_the_server_refuses_the_workers_key(
    server: Server, engine: OpenAIEngine
) -> None:
    server.next_answers.append((401, {}))
    with pytest.raises(EngineDead, match="QLM_ENGINE_API_KEY"):
        await engine.answer(chat())
    server.next_answers.append((401, {}))
    with pytest.raises(EngineDead, match="QLM_ENGINE_API_KEY"):
        await engine.open_stream(chat())


async def test_a_server_that_broke_is_not_asked_again(server: Server, engine: OpenAIEngine) -> None:
    server.next_answers.append((500, {}))
    assert (await engine.answer(chat())).status_code == 500


async def test_a_server_that_stays_busy_is_not_dead(server: Server) -> None:
    async with connected(server, give_up_s=0.2) as engine:
        server.next_answers.extend([(429, {"retry-after-ms": "100"})] * 4)
        assert (await engine.answer(chat())).status_code == 200


async def test_a_server_that_stays_away_is_dead(server: Server) -> None:
    async with connected(server, give_up_s=0.2) as engine:
        server.next_answers.extend([(503, {"retry-after-ms": "50"})] * 100)
        with pytest.raises(EngineDead, match="has not answered"):
            await engine.answer(chat())


async def test_a_server_that_went_down_is_dead(server: Server) -> None:
    with serving(server):
        engine = OpenAIEngine(server.url, MODEL, give_up_s=0.2)
        await engine.start()
    with pytest.raises(EngineDead):
        await engine.answer(chat())
    await engine.stop()


async def test_a_server_that_goes_away_with_nothing_inside_is_dead(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_engine, "_LOOK_S", 0.05)
    with serving(server):
        engine = OpenAIEngine(server.url, MODEL, give_up_s=0.2)
        await engine.start()
        engine.stats()
    with pytest.raises(EngineDead, match="has not answered"):
        await until(lambda: engine.stats() is None, "the engine is told dead")
    await engine.stop()


async def test_a_worker_whose_server_went_down_gives_back_what_it_holds(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_engine, "_LOOK_S", 0.05)
    server.engine = SimulatedEngine(MODEL, time_scale=10)
    long = chat().body.replace('"max_tokens": 3', '"max_tokens": 2000')
    store = FakeStore(*(make_slice(n, 5, model=MODEL, body=long) for n in (1, 2)))
    with serving(server):
        settings = Settings(
            engine="openai", engine_url=server.url, models=(MODEL,), slots=4, stall_s=2.0
        )
        engine = make_engine(settings, MODEL, EngineKind.GENERATE)
        host = Host(MODEL, EngineKind.GENERATE, engine, Meter("gpu-0", "cpu", MODEL))
        runner = Runner(store, [host], settings, boot_id="boot", device="cpu")
        running = asyncio.create_task(runner.run())
        await until(lambda: server.bodies and not store.waiting, "requests are inside")
    assert await running is Exit.ENGINE_DIED
    assert store.released == {1: ReleaseReason.ENGINE_DIED, 2: ReleaseReason.SHUTDOWN}
    assert store.retired


async def test_vllm_gets_priority_and_cache_salt(server: Server, engine: OpenAIEngine) -> None:
    await engine.answer(chat())
    assert (server.bodies[-1]["priority"], server.bodies[-1]["cache_salt"]) == (7, "tenant-a")


async def test_another_server_gets_the_body_as_it_is(server: Server) -> None:
    server.owned_by = "someone"
    with serving(server):
        engine = OpenAIEngine(server.url, MODEL)
        await engine.start()
        await engine.answer(chat())
        await engine.stop()
    assert server.bodies[-1] == json.loads(chat().body)


async def test_the_probe_tells_which_operations_are_supported(engine: OpenAIEngine) -> None:
    assert engine.facts is not None
    assert engine.facts.supports == {Lso.PULL, Lso.BALANCE}
    assert "evict: no" in engine.facts.describe()


async def test_an_address_with_its_version_works_too(server: Server) -> None:
    with serving(server):
        engine = OpenAIEngine(f"{server.url}/v1/", MODEL)
        assert (await engine.start()).max_model_len == 4096
        await engine.stop()


async def test_a_model_the_server_does_not_have_is_named(server: Server) -> None:
    problem = "serves some/model, not 'other'"
    with serving(server), pytest.raises(ConfigurationError, match=problem):
        await OpenAIEngine(server.url, "other").start()


async def test_a_model_of_the_other_kind_is_refused_at_start(server: Server) -> None:
    with serving(server), pytest.raises(ConfigurationError, match="for embed"):
        await OpenAIEngine(server.url, MODEL, EngineKind.EMBED).start()


async def test_a_wrong_key_is_told_apart(server: Server) -> None:
    server.key = "good"
    with serving(server):
        with pytest.raises(ConfigurationError, match="QLM_ENGINE_API_KEY"):
            await OpenAIEngine(server.url, MODEL, api_key="bad").start()
        engine = OpenAIEngine(server.url, MODEL, api_key="good")
        await engine.start()
        await engine.stop()


async def test_an_absent_server_is_given_up_after_the_start_time() -> None:
    with pytest.raises(EngineDead, match="QLM_ENGINE_URL"):
        await OpenAIEngine("http://127.0.0.1:9", MODEL, start_timeout_s=0.1).start()


async def test_a_worker_whose_server_is_absent_ends_to_be_started_anew() -> None:
    settings = Settings(
        engine="openai", engine_url="http://127.0.0.1:9", models=(MODEL,), start_timeout_s=0.5
    )
    engine = make_engine(settings, MODEL, EngineKind.GENERATE)
    host = Host(MODEL, EngineKind.GENERATE, engine, Meter("gpu-0", "cpu", MODEL))
    runner = Runner(FakeStore(), [host], settings, boot_id="boot", device="cpu")
    assert await runner.run() is Exit.ENGINE_DIED


async def test_a_server_that_is_busy_at_the_start_is_waited_for(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_probe, "_PAUSE_S", 0.01)
    server.next_answers.extend([(429, {}), (503, {})] * 2)
    with serving(server):
        engine = OpenAIEngine(server.url, MODEL)
        await engine.start()
        assert engine.facts is not None
        assert engine.facts.takes_priority
        await engine.stop()


async def test_a_server_without_a_list_of_models_is_told_while_it_is_waited_for(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_probe, "_PAUSE_S", 0.01)
    monkeypatch.setattr(openai_probe, "_TELL_S", 0.0)
    server.unlisted = 3
    with serving(server), capture_logs() as logs:
        engine = OpenAIEngine(server.url, MODEL)
        await engine.start()
        await engine.stop()
    told = [entry for entry in logs if entry["event"] == "engine_waited_for"]
    assert {(entry["url"], entry["problem"]) for entry in told} == {
        (server.url, "answered 404 to /v1/models")
    }
    assert len(told) == 3


async def test_a_wait_that_is_short_is_not_told(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_probe, "_PAUSE_S", 0.01)
    server.next_answers.extend([(503, {})] * 3)
    with serving(server), capture_logs() as logs:
        engine = OpenAIEngine(server.url, MODEL)
        await engine.start()
        await engine.stop()
    assert "engine_waited_for" not in {entry["event"] for entry in logs}


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://127.0.0.1", "localhost"])
async def test_an_address_that_is_none_is_told_at_once(url: str) -> None:
    with pytest.raises(ConfigurationError, match="QLM_ENGINE_URL"):
        await OpenAIEngine(url, MODEL).start()


async def test_a_password_in_the_address_is_used_and_not_told(server: Server) -> None:
    with serving(server):
        address = server.url.replace("://", "://me:s3cret@")
        with pytest.raises(ConfigurationError) as told:
            await OpenAIEngine(address, "other").start()
        settings = Settings(engine="openai", engine_url=address)
        assert server.headers[-1]["authorization"].startswith("Basic ")
    assert server.url in told.value.message
    assert "s3cret" not in told.value.message
    assert device_name(settings) == f"server:{server.url}"


def test_an_engine_without_an_address_cannot_be_made() -> None:
    with pytest.raises(ConfigurationError, match="QLM_ENGINE_URL"):
        make_engine(Settings(engine="openai"), MODEL, EngineKind.GENERATE)


async def test_cancelling_while_waiting_for_a_place_gives_nothing_away(server: Server) -> None:
    server.engine = SimulatedEngine(MODEL, time_scale=1)
    with serving(server):
        engine = OpenAIEngine(server.url, MODEL, slots=1)
        await engine.start()
        first, second = (asyncio.create_task(engine.answer(chat())) for _ in range(2))
        await in_the_turn(lambda: engine.stats().waiting == 1, "the second waits")
        second.cancel()
        assert (await first).status_code == 200
        assert (await engine.answer(chat())).status_code == 200
        assert (engine.stats().running, engine.stats().waiting) == (0, 0)
        await engine.stop()


def test_metrics_are_summed_over_labels_and_told_from_longer_names() -> None:
    text = '# HELP x y\nx{a="1"} 2.0\nx{a="2"} 3\nx_total 9\n'
    assert metric_sum(text, ("x",)) == 5.0
    assert metric_sum(text, ("y",)) is None


def test_metrics_that_cannot_be_read_are_passed_over() -> None:
    text = 'x{a="b} 7 {"} 2.0 1700000000000\nx 1 # {t="1"} 9\nx\nx{a="1"} odd\nx NaN\nx{a="1" 5\n'
    assert metric_sum(text, ("x",)) == 3.0
    assert metric_sum("x odd\n", ("x",)) is None


async def test_odd_metrics_do_not_end_the_watch_over_a_long_answer(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openai_engine, "_LOOK_S", 0.05)
    with serving(server):
        engine = OpenAIEngine(server.url, MODEL)
        await engine.start()
        server.metrics = "vllm:generation_tokens_total odd\n"
        await until(lambda: engine.stats().step >= 3, "the server is seen to live")
        server.metrics = "vllm:generation_tokens_total 5\n"
        before = engine.stats().step
        await until(lambda: engine.stats().step > before, "progress is read again")
        await engine.stop()


async def test_an_event_ends_at_a_line_feed_alone(server: Server, engine: OpenAIEngine) -> None:
    server.says = ('{"text":"a\u2028b\x85c\x0bd"}', '{"text":"e"}')
    stream = await engine.open_stream(chat())
    assert not isinstance(stream, EngineAnswer)
    assert [event async for event in stream] == [*server.says]


async def test_a_server_that_hangs_up_ends_the_stream_with_an_error(
    server: Server, engine: OpenAIEngine
) -> None:
    server.hang_up_after = 2
    stream = await engine.open_stream(chat())
    assert not isinstance(stream, EngineAnswer)
    events = [json.loads(event) async for event in stream]
    assert [*("choices" in event for event in events)] == [True, True, False]
    assert "hung up" in events[-1]["error"]["message"]
    await stream.aclose()
    assert engine.stats().running == 0


async def test_a_stream_that_opens_in_the_moment_its_caller_leaves_is_closed(
    engine: OpenAIEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[httpx.Response] = []
    send = httpx.AsyncClient.send

    async def noted(client: httpx.AsyncClient, *args: Any, **options: Any) -> httpx.Response:
        response = await send(client, *args, **options)
        opened.append(response)
        # Its turn comes after the response is there and before the caller's own.
        asyncio.get_running_loop().call_soon(calling.cancel)
        return response

    monkeypatch.setattr(httpx.AsyncClient, "send", noted)
    calling = asyncio.create_task(engine.open_stream(chat()))
    await asyncio.gather(calling, return_exceptions=True)
    assert calling.cancelled()
    assert [response.is_closed for response in opened] == [True]


async def test_a_busy_server_is_asked_again_for_a_stream(
    server: Server, engine: OpenAIEngine
) -> None:
    server.next_answers.append((429, {"retry-after": "0"}))
    stream = await engine.open_stream(chat())
    assert not isinstance(stream, EngineAnswer)
    assert len([event async for event in stream]) == 3


def test_a_server_absent_when_the_service_is_started_is_a_wrong_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(existing_engine, "_PATIENCE_S", 0.1)
    with pytest.raises(ConfigurationError, match="check QLM_ENGINE_URL"):
        existing_engine.look_at("http://127.0.0.1:9", "", (MODEL,))
