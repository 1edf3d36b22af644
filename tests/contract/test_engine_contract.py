"""What every engine behind the port does, whichever it is."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from collections.abc import AsyncIterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count

import pytest
import pytest_asyncio

from qlm_batch.domain.engine import Engine, EngineAnswer, EngineInfo, EngineRequest
from qlm_batch.domain.errors import EngineDead
from qlm_batch.domain.jobs import CHAT, COMPLETIONS, EMBEDDINGS, EngineKind
from qlm_batch.settings import Settings
from qlm_workers.engines import make_engine
from qlm_workers.simulated_engine import SimulatedEngine
from tests.contract.openai_server import Server, serving
from tests.contract.waiting import until

MODEL = "qlm-tiny"
SLOTS = 4
MAX_MODEL_LEN = 2048
TIME_SCALE = 0.3
ENGINES = [
    "simulated",
    "openai",
    pytest.param(
        "vllm",
        marks=[
            pytest.mark.vllm,
            pytest.mark.skipif(
                importlib.util.find_spec("vllm") is None, reason="vllm is not installed"
            ),
        ],
    ),
]
pytestmark = pytest.mark.asyncio(loop_scope="module")
_ids = count()


@dataclass
class Rig:
    """A started engine, and requests for it."""

    name: str
    engine: Engine
    info: EngineInfo

    def request(
        self, endpoint: str, body: dict[str, object] | str, priority: int = 5
    ) -> EngineRequest:
        text = body if isinstance(body, str) else json.dumps({"model": MODEL} | body)
        return EngineRequest(f"r{next(_ids)}", endpoint, text, priority, "tenant-a")

    def chat(self, *, rank: int = 5, **fields: object) -> EngineRequest:
        messages = [{"role": "user", "content": f"What is {next(_ids)} plus 4?"}]
        return self.request(CHAT, {"messages": messages} | fields, rank)

    def submit(self, request: EngineRequest) -> asyncio.Task[EngineAnswer]:
        return asyncio.create_task(self.engine.answer(request))

    async def fill(self, tokens: list[int]) -> list[asyncio.Task[EngineAnswer]]:
        """Occupy slots with answers of these lengths, and wait until they run."""
        tasks = [self.submit(self.chat(max_tokens=many, ignore_eos=True)) for many in tokens]
        await until(lambda: self.engine.stats().running == len(tokens), "all slots taken")
        return tasks


async def start(name: str, kind: EngineKind, stack: ExitStack) -> Rig:
    url = ""
    if name == "openai":
        behind = SimulatedEngine(
            MODEL, kind, slots=SLOTS, max_model_len=MAX_MODEL_LEN, time_scale=TIME_SCALE
        )
        url = stack.enter_context(serving(Server(behind, MODEL, MAX_MODEL_LEN))).url
    settings = Settings(
        engine=name,
        engine_url=url,
        slots=SLOTS,
        max_model_len=MAX_MODEL_LEN,
        simulated_time_scale=TIME_SCALE,
        kv_cache_bytes=256 * 1024**2,
    )
    engine = make_engine(settings, MODEL, kind)
    return Rig(name, engine, await engine.start())


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=ENGINES)
async def rig(request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    """An engine that generates."""
    with ExitStack() as stack:
        rig = await start(request.param, EngineKind.GENERATE, stack)
        yield rig
        await rig.engine.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module", params=ENGINES)
async def embedder(request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    """An engine that embeds."""
    with ExitStack() as stack:
        rig = await start(request.param, EngineKind.EMBED, stack)
        yield rig
        await rig.engine.stop()


def error_of(answer: EngineAnswer) -> dict[str, object]:
    assert 400 <= answer.status_code < 500, answer
    error = json.loads(answer.body)["error"]
    assert {"message", "type", "param", "code"} <= error.keys()
    assert error["message"]
    return dict(error)


async def test_a_started_engine_tells_what_it_holds(rig: Rig) -> None:
    assert (rig.info.model, rig.info.kind) == (MODEL, EngineKind.GENERATE)
    assert rig.info.slots == SLOTS
    assert rig.info.max_model_len == MAX_MODEL_LEN
    assert rig.info.kv_tokens >= MAX_MODEL_LEN


async def test_a_chat_is_answered_with_its_usage(rig: Rig) -> None:
    answer = await rig.engine.answer(rig.chat(max_tokens=12, ignore_eos=True))
    assert answer.status_code == 200, answer.body
    body = json.loads(answer.body)
    assert body["object"] == "chat.completion"
    assert body["model"] == MODEL
    assert body["choices"][0]["message"]["role"] == "assistant"
    assert isinstance(body["choices"][0]["message"]["content"], str)
    assert body["choices"][0]["finish_reason"] == "length"
    assert answer.usage.output_tokens == body["usage"]["completion_tokens"] == 12
    assert answer.usage.input_tokens == body["usage"]["prompt_tokens"] > 0
    assert answer.duration_s is not None
    assert 0 < answer.duration_s < 60
    assert answer.first_token_s is None or 0 <= answer.first_token_s <= answer.duration_s


async def test_a_completion_is_answered_with_its_usage(rig: Rig) -> None:
    body = {"prompt": "3 + 4 =", "max_tokens": 7, "ignore_eos": True}
    answer = await rig.engine.answer(rig.request(COMPLETIONS, body))
    assert answer.status_code == 200, answer.body
    parsed = json.loads(answer.body)
    assert parsed["object"] == "text_completion"
    assert isinstance(parsed["choices"][0]["text"], str)
    assert answer.usage.output_tokens == 7


async def test_embeddings_are_answered_with_their_usage(embedder: Rig) -> None:
    assert embedder.info.kind is EngineKind.EMBED
    answer = await embedder.engine.answer(
        embedder.request(EMBEDDINGS, {"input": ["one two", "three"]})
    )
    assert answer.status_code == 200, answer.body
    data = json.loads(answer.body)["data"]
    assert [row["index"] for row in data] == [0, 1]
    assert len(data[0]["embedding"]) == len(data[1]["embedding"]) > 0
    assert data[0]["embedding"] != data[1]["embedding"]
    assert answer.usage.input_tokens > 0
    assert answer.usage.output_tokens == 0


async def test_an_embedding_engine_refuses_a_chat(embedder: Rig) -> None:
    assert error_of(await embedder.engine.answer(embedder.chat()))["param"] == "url"


async def test_a_generating_engine_refuses_an_embedding(rig: Rig) -> None:
    answer = await rig.engine.answer(rig.request(EMBEDDINGS, {"input": "hi"}))
    assert error_of(answer)["param"] == "url"


async def test_several_choices_are_counted_together(rig: Rig) -> None:
    answer = await rig.engine.answer(rig.chat(n=3, max_tokens=5, ignore_eos=True))
    assert len(json.loads(answer.body)["choices"]) == 3
    assert answer.usage.output_tokens == 15


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"stream": True}, "stream"),
        ({"priority": -1000}, "priority"),
        ({"request_id": "mine"}, "request_id"),
        ({"cache_salt": "theirs"}, "cache_salt"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"vllm_xargs": {"a": 1}}, "vllm_xargs"),
        ({"kv_transfer_params": {"a": 1}}, "kv_transfer_params"),
        ({"n": 1000}, "n"),
        ({"messages": "not a list"}, "messages"),
        ({"max_tokens": "many"}, "max_tokens"),
    ],
)
async def test_a_bad_field_is_refused_by_name(
    rig: Rig, fields: dict[str, object], param: str
) -> None:
    assert error_of(await rig.engine.answer(rig.chat(**fields)))["param"] == param


async def test_media_elsewhere_are_not_fetched(rig: Rig) -> None:
    part = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/meta"}}
    messages = [{"role": "user", "content": [part]}]
    error = error_of(await rig.engine.answer(rig.request(CHAT, {"messages": messages})))
    assert error["param"] == "messages[0].content"


@pytest.mark.parametrize("text", ["{", "[]", '"hi"', "", "null"])
async def test_a_body_that_is_no_json_object_is_refused(rig: Rig, text: str) -> None:
    error_of(await rig.engine.answer(rig.request(CHAT, text)))


async def test_an_unknown_model_is_not_found(rig: Rig) -> None:
    answer = await rig.engine.answer(rig.chat(model="other"))
    assert answer.status_code == 404
    assert error_of(answer)["code"] == "model_not_found"


async def test_a_prompt_beyond_the_context_is_refused(rig: Rig) -> None:
    messages = [{"role": "user", "content": "What is 3 plus 4? " * 2000}]
    answer = await rig.engine.answer(rig.request(CHAT, {"messages": messages}))
    assert str(MAX_MODEL_LEN) in str(error_of(answer)["message"])


async def test_many_requests_overlap(rig: Rig) -> None:
    answers = await asyncio.gather(
        *(rig.engine.answer(rig.chat(max_tokens=6, ignore_eos=True)) for _ in range(64))
    )
    assert {answer.status_code for answer in answers} == {200}
    assert sum(answer.usage.output_tokens for answer in answers) == 64 * 6
    assert rig.engine.stats().running == 0


async def test_the_step_counter_moves_with_the_work(rig: Rig) -> None:
    before = rig.engine.stats()
    await rig.engine.answer(rig.chat(max_tokens=20, ignore_eos=True))
    after = rig.engine.stats()
    assert after.step > before.step
    assert after.generated_tokens - before.generated_tokens == 20


async def test_a_cancelled_answer_frees_its_slot(rig: Rig) -> None:
    long = [1500] * SLOTS
    running = await rig.fill(long)
    short = rig.submit(rig.chat(max_tokens=2))
    await until(lambda: rig.engine.stats().waiting == 1, "the short one waits")
    running[0].cancel()
    assert (await asyncio.wait_for(short, 60)).status_code == 200
    assert not any(task.done() for task in running[1:])
    for task in running:
        task.cancel()
    results = await asyncio.gather(*running, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results)
    await until(lambda: rig.engine.stats().running == 0, "all slots free")


async def test_the_lowest_priority_starts_first_when_slots_are_full(rig: Rig) -> None:
    finished: list[str] = []

    async def serve(name: str, priority: int) -> None:
        await rig.engine.answer(rig.chat(rank=priority, max_tokens=4, ignore_eos=True))
        finished.append(name)

    running = await rig.fill([150 + 60 * index for index in range(SLOTS)])
    late = [asyncio.create_task(serve(f"late {index}", 9)) for index in range(3)]
    await until(lambda: rig.engine.stats().waiting == 3, "the late ones wait")
    urgent = asyncio.create_task(serve("urgent", 1))
    await asyncio.gather(*running, *late, urgent)
    assert finished[0] == "urgent"


async def test_stopping_ends_what_is_inside_and_stays_stopped(rig: Rig) -> None:
    """Stands last: the engine does not come back."""
    pending = await rig.fill([1500] * 2)
    await rig.engine.stop()
    results = await asyncio.gather(*pending, return_exceptions=True)
    assert all(isinstance(result, EngineDead) for result in results), results
    await rig.engine.stop()
    with pytest.raises(EngineDead):
        await rig.engine.answer(rig.chat())
    with pytest.raises(EngineDead):
        rig.engine.stats()
