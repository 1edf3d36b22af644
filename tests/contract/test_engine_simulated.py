"""The simulated engine: answers by seed, time by coefficients, faults by order."""

from __future__ import annotations

import asyncio
import json

import pytest

from qlm_batch.domain.engine import EngineRequest
from qlm_batch.domain.errors import ConfigurationError, EngineDead
from qlm_batch.domain.jobs import CHAT, EMBEDDINGS, EngineKind
from qlm_batch.settings import Settings
from qlm_workers.engines import make_engine
from qlm_workers.naming import served_name
from qlm_workers.simulated_engine import SimulatedEngine
from qlm_workers.simulated_parts import Faults
from qlm_workers.step_times import StepTimes
from tests.contract.waiting import in_the_turn

STEPS_OF_1_MS = StepTimes(1e-3, 0, 0, 0)


def chat(number: int, **fields: object) -> EngineRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": f"hi {number}"}], **fields}
    return EngineRequest(f"r{number}", CHAT, json.dumps(body), 5, "")


async def content(engine: SimulatedEngine, request: EngineRequest) -> str:
    body = json.loads((await engine.answer(request)).body)
    return str(body["choices"][0]["message"]["content"])


async def started(**arguments: object) -> SimulatedEngine:
    engine = SimulatedEngine("m", **arguments)  # type: ignore[arg-type]
    await engine.start()
    return engine


async def test_equal_seeds_give_equal_answers_at_any_speed() -> None:
    fast = await started(time_scale=0, seed=3)
    slow = await started(time_scale=0.01, seed=3)
    other = await started(time_scale=0, seed=4)
    said = [await content(fast, chat(1)), await content(fast, chat(2))]
    assert said == [await content(slow, chat(1)), await content(slow, chat(2))]
    assert said[0] != said[1]
    assert said[0] != await content(other, chat(1))
    await slow.stop()


async def test_a_field_no_engine_would_take_is_refused_by_name() -> None:
    engine = await started(time_scale=0)
    answer = await engine.answer(chat(1, stream_options={"include_usage": True}))
    assert answer.status_code == 400
    assert json.loads(answer.body)["error"]["param"] == "stream_options"
    embedder = await started(time_scale=0, kind=EngineKind.EMBED)
    body = json.dumps({"model": "m", "input": "hi", "encoding_format": "hex"})
    answer = await embedder.answer(EngineRequest("r", EMBEDDINGS, body, 5, ""))
    assert answer.status_code == 400
    assert json.loads(answer.body)["error"]["param"] == "encoding_format"


async def test_an_answer_takes_its_modelled_time() -> None:
    engine = await started(step_times=STEPS_OF_1_MS, time_scale=2.0)
    answer = await engine.answer(chat(1, max_tokens=50, ignore_eos=True))
    assert answer.duration_s is not None
    assert answer.first_token_s is not None
    assert answer.duration_s >= 0.099
    assert 0.002 <= answer.first_token_s < answer.duration_s
    rows = engine.stats().steps
    assert [row[0] for row in rows] == [1] * 50
    assert rows[0][2] == answer.usage.input_tokens
    assert {row[3] for row in rows} == {1e-3}
    assert engine.stats().steps == ()
    await engine.stop()


async def test_prefill_is_shared_out_over_steps() -> None:
    engine = await started(step_times=STEPS_OF_1_MS, max_num_batched_tokens=100, max_model_len=4096)
    long = {"role": "user", "content": "word " * 200}
    await engine.answer(chat(1, messages=[long], max_tokens=1))
    assert [row[2] for row in engine.stats().steps] == [100, 100, 50]
    await engine.stop()


async def test_a_poisonous_request_takes_the_engine_and_all_inside_with_it() -> None:
    faults = Faults(poison=lambda request: request.request_id == "r9")
    engine = await started(faults=faults, time_scale=1.0)
    innocent = asyncio.create_task(engine.answer(chat(1, max_tokens=5000, ignore_eos=True)))
    await in_the_turn(lambda: engine.stats().running == 1, "it runs")
    with pytest.raises(EngineDead):
        await engine.answer(chat(9))
    with pytest.raises(EngineDead):
        await innocent
    with pytest.raises(EngineDead):
        engine.stats()
    await engine.stop()


async def test_a_stopped_engine_can_start_again() -> None:
    engine = await started(time_scale=0.01)
    await engine.stop()
    await engine.start()
    assert (await engine.answer(chat(1))).status_code == 200
    await engine.stop()


async def test_a_share_of_requests_fails() -> None:
    engine = await started(faults=Faults(error_rate=0.25), time_scale=0)
    statuses = [(await engine.answer(chat(number))).status_code for number in range(400)]
    assert set(statuses) == {200, 500}
    assert 60 <= statuses.count(500) <= 140


@pytest.mark.parametrize("time_scale", [0, 0.01])
async def test_a_hanging_request_makes_no_progress_until_it_is_cancelled(time_scale: float) -> None:
    engine = await started(faults=Faults(hangs=lambda _: True), time_scale=time_scale)
    task = asyncio.create_task(engine.answer(chat(1)))
    await in_the_turn(lambda: engine.stats().running == 1, "it runs")
    before = engine.stats().step
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(task, 0.1)
    assert engine.stats().step == before
    assert engine.stats().running == 0
    await engine.stop()


def test_a_device_nobody_measured_is_refused() -> None:
    settings = Settings(engine="simulated", engine_args={"device": "abacus"})
    with pytest.raises(ConfigurationError, match="mistral-7b/a100"):
        make_engine(settings, "m", EngineKind.GENERATE)


def test_a_folder_is_served_under_its_own_name(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("models") / "my-model"
    folder.mkdir()
    assert served_name(f"{folder}/") == "my-model"
    assert served_name("org/model") == "org/model"
    assert served_name("qlm-tiny") == "qlm-tiny"
