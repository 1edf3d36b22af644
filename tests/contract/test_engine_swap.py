"""Going to sleep and waking, as every engine that can does it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from itertools import count

import pytest

from qlm_batch.domain.engine import Engine, EngineRequest, Lso
from qlm_batch.domain.errors import ConfigurationError, EngineDead
from qlm_batch.domain.jobs import CHAT, EngineKind
from qlm_batch.domain.snapshot import Residency
from qlm_batch.settings import Settings
from qlm_workers.engines import make_engine
from qlm_workers.simulated_engine import SimulatedEngine
from qlm_workers.simulated_parts import Faults, SwapTimes
from tests.contract.openai_server import Server, serving
from tests.contract.waiting import in_the_turn

MODEL = "qlm-tiny"
_ids = count()


def simulated(**fields: object) -> SimulatedEngine:
    return SimulatedEngine(MODEL, time_scale=0.1, **fields)  # type: ignore[arg-type]


def chat(max_tokens: int = 60) -> EngineRequest:
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "What is 3 + 4?"}],
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "temperature": 0,
    }
    return EngineRequest(f"r{next(_ids)}", CHAT, json.dumps(body), 5, "")


async def said(engine: Engine) -> str:
    answer = await engine.answer(chat())
    assert answer.status_code == 200, answer.body
    return str(json.loads(answer.body)["choices"][0]["message"]["content"])


@pytest.mark.parametrize(
    ("make", "residency"),
    [
        (lambda: simulated(), Residency.ASLEEP),
        (lambda: simulated(swap_times=SwapTimes(keeps=False)), Residency.COLD),
    ],
    ids=["keeping", "ended"],
)
async def test_after_sleep_and_wake_an_engine_says_what_it_said_before(
    make: Callable[[], SimulatedEngine], residency: Residency
) -> None:
    engine = make()
    started = await engine.start()
    before = await said(engine)
    assert await engine.sleep() is residency
    with pytest.raises(EngineDead):
        await engine.answer(chat())
    assert await engine.wake() == started
    assert await said(engine) == before
    await engine.stop()


async def test_what_is_inside_an_engine_that_keeps_goes_on_where_it_was() -> None:
    engine = simulated()
    await engine.start()
    expected = await said(engine)
    asked = asyncio.create_task(engine.answer(chat()))
    await in_the_turn(lambda: sum(engine.stats().generated) >= 5, "a few tokens")
    await engine.sleep()
    assert engine.stats().running == 0
    assert not asked.done()
    await engine.wake()
    answer = await asked
    assert json.loads(answer.body)["choices"][0]["message"]["content"] == expected
    assert engine.stats().generated_tokens == 120
    await engine.stop()


async def test_what_is_inside_an_engine_that_is_ended_ends_with_it() -> None:
    engine = simulated(swap_times=SwapTimes(keeps=False))
    await engine.start()
    asked = asyncio.create_task(engine.answer(chat()))
    await in_the_turn(lambda: engine.stats().running == 1, "it runs")
    await engine.sleep()
    with pytest.raises(EngineDead):
        await asked
    await engine.stop()


async def test_waking_may_fail_and_be_tried_again() -> None:
    engine = simulated(faults=Faults(wakes=iter([False, True])))
    await engine.start()
    await engine.sleep()
    with pytest.raises(EngineDead):
        await engine.wake()
    await engine.wake()
    assert await said(engine)
    await engine.stop()


async def test_a_stopped_engine_wakes_anew() -> None:
    engine = simulated()
    await engine.start()
    await engine.stop()
    await engine.wake()
    assert await said(engine)
    await engine.stop()


async def test_a_server_that_cannot_sleep_is_refused_where_models_take_turns() -> None:
    behind = SimulatedEngine(MODEL, time_scale=0.0)
    with serving(Server(behind, MODEL, 2048)) as server:
        settings = Settings(
            engine="openai", engine_url=server.url, models=(MODEL, "other"), models_awake=1
        )
        engine = make_engine(settings, MODEL, EngineKind.GENERATE)
        with pytest.raises(ConfigurationError, match="cannot sleep"):
            await engine.start()
        await engine.stop()


async def test_a_server_that_can_sleep_is_told_to() -> None:
    behind = SimulatedEngine(MODEL, time_scale=0.0)
    with serving(Server(behind, MODEL, 2048, sleeps=True)) as server:
        settings = Settings(
            engine="openai", engine_url=server.url, models=(MODEL, "other"), models_awake=1
        )
        engine = make_engine(settings, MODEL, EngineKind.GENERATE)
        info = await engine.start()
        assert Lso.SWAP in info.supports
        assert await engine.sleep() is Residency.ASLEEP
        assert await engine.wake() == info
        assert await said(engine)
        await engine.stop()
