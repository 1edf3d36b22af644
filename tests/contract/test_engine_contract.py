"""What every engine behind the port does, whichever it is."""

from __future__ import annotations

import asyncio
import base64
import importlib.util
import json
import struct
from collections.abc import AsyncIterator
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import pytest
import pytest_asyncio

from qlm_batch.domain.engine import (
    Engine,
    EngineAnswer,
    EngineInfo,
    EngineRequest,
    EventStream,
    Lso,
)
from qlm_batch.domain.errors import ConfigurationError, EngineDead
from qlm_batch.domain.jobs import CHAT, COMPLETIONS, EMBEDDINGS, EngineKind
from qlm_batch.domain.snapshot import Residency
from qlm_batch.scheduling.agent import INTERACTIVE_PRIORITY, engine_priority
from qlm_batch.settings import Settings
from qlm_workers.engines import make_engine
from qlm_workers.simulated_engine import SimulatedEngine
from qlm_workers.vllm_engine import VllmEngine
from tests.contract.openai_server import Server, serving
from tests.contract.waiting import until

MODEL = "qlm-tiny"
SLOTS = 4
MAX_MODEL_LEN = 2048
TIME_SCALE = 0.3
DUE = engine_priority(1_800_000_000.0)
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
        self, endpoint: str, body: dict[str, object] | str, priority: int = DUE
    ) -> EngineRequest:
        text = body if isinstance(body, str) else json.dumps({"model": MODEL} | body)
        return EngineRequest(f"r{next(_ids)}", endpoint, text, priority, "tenant-a")

    def chat(self, *, rank: int = DUE, **fields: object) -> EngineRequest:
        messages = [{"role": "user", "content": f"What is {next(_ids)} plus 4?"}]
        return self.request(CHAT, {"messages": messages} | fields, rank)

    def submit(self, request: EngineRequest) -> asyncio.Task[EngineAnswer]:
        return asyncio.create_task(self.engine.answer(request))

    async def fill(self, tokens: list[int]) -> list[asyncio.Task[EngineAnswer]]:
        """Occupy slots with answers of these lengths, and wait until they run."""
        tasks = [self.submit(self.chat(max_tokens=many, ignore_eos=True)) for many in tokens]
        await until(lambda: self.computing(len(tokens)), "all slots taken")
        return tasks

    def computing(self, many: int) -> bool:
        """Whether exactly so many run, and all have tokens where the engine tells of them."""
        stats = self.engine.stats()
        told = self.name == "openai" or (len(stats.generated) == many and min(stats.generated) > 0)
        return stats.running == many and told

    async def stream(self, request: EngineRequest) -> EventStream:
        stream = await self.engine.open_stream(request)
        assert not isinstance(stream, EngineAnswer), stream
        return stream

    async def events(self, request: EngineRequest) -> list[dict[str, Any]]:
        """Every event of a stream that is expected to end well."""
        async with aclosing(await self.stream(request)) as stream:
            events = [json.loads(event) async for event in stream]
        assert not any("error" in event for event in events), events
        return events


def read_together(events: list[dict[str, Any]], index: int = 0) -> tuple[str, str | None]:
    """What one choice says in a stream, and why it ended."""
    said, ending = "", None
    for event in events:
        for choice in event["choices"]:
            if choice["index"] == index:
                said += (
                    (choice["delta"].get("content") or "") if "delta" in choice else choice["text"]
                )
                ending = choice["finish_reason"] or ending
    return said, ending


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


async def test_an_answer_tells_whether_a_bound_cut_it(rig: Rig) -> None:
    # Always the same one: how long an answer of the simulated engine becomes goes by the question.
    question = {"messages": [{"role": "user", "content": "What is 7 plus 4?"}]}
    ended = rig.request(CHAT, question | {"max_tokens": 300, "temperature": 0})
    cut = rig.chat(n=2, max_tokens=3, ignore_eos=True)
    said = await asyncio.gather(rig.engine.answer(ended), rig.engine.answer(cut))
    endings = [
        {choice["finish_reason"] for choice in json.loads(answer.body)["choices"]}
        for answer in said
    ]
    assert endings == [{"stop"}, {"length"}]
    assert [answer.cut for answer in said] == [False, True]


async def test_an_embedding_is_never_cut(embedder: Rig) -> None:
    assert not (await embedder.engine.answer(embedder.request(EMBEDDINGS, {"input": "a"}))).cut


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


async def test_embeddings_come_packed_where_asked(embedder: Rig) -> None:
    body = {"input": "one two", "encoding_format": "base64"}
    answer = await embedder.engine.answer(embedder.request(EMBEDDINGS, body))
    assert answer.status_code == 200, answer.body
    packed = base64.b64decode(json.loads(answer.body)["data"][0]["embedding"])
    vector = struct.unpack(f"<{len(packed) // 4}f", packed)
    assert sum(value * value for value in vector) == pytest.approx(1, abs=1e-2)


async def test_an_embedding_engine_refuses_a_chat(embedder: Rig) -> None:
    assert error_of(await embedder.engine.answer(embedder.chat()))["param"] == "url"


async def test_a_generating_engine_refuses_an_embedding(rig: Rig) -> None:
    answer = await rig.engine.answer(rig.request(EMBEDDINGS, {"input": "hi"}))
    assert error_of(answer)["param"] == "url"


async def test_each_of_several_prompts_has_its_choices(rig: Rig) -> None:
    for prompts, n in ((["one", "two"], 1), ([[1, 2], [3]], 2), ([1, 2], 1)):
        body = {"prompt": prompts, "n": n, "max_tokens": 3, "ignore_eos": True}
        answer = await rig.engine.answer(rig.request(COMPLETIONS, body))
        assert answer.status_code == 200, answer.body
        count = n * (1 if isinstance(prompts[0], int) else len(prompts))
        choices = json.loads(answer.body)["choices"]
        assert [choice["index"] for choice in choices] == list(range(count))
        assert answer.usage.output_tokens == 3 * count


@pytest.mark.parametrize("n", [3, 3.0])
async def test_several_choices_are_counted_together(rig: Rig, n: float) -> None:
    answer = await rig.engine.answer(rig.chat(n=n, max_tokens=5, ignore_eos=True))
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
        ({"n": "1000"}, "n"),
        ({"messages": "not a list"}, "messages"),
        ({"max_tokens": "many"}, "max_tokens"),
    ],
)
async def test_a_bad_field_is_refused_by_name(
    rig: Rig, fields: dict[str, object], param: str
) -> None:
    assert error_of(await rig.engine.answer(rig.chat(**fields)))["param"] == param


async def test_an_unknown_parameter_gets_the_endpoints_own_answer(rig: Rig) -> None:
    answer = await rig.engine.answer(rig.chat(frobnicate=1, max_tokens=2))
    assert answer.status_code == 200 or error_of(answer)["param"] == "frobnicate"


async def test_media_elsewhere_are_not_fetched(rig: Rig) -> None:
    part = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/meta"}}
    messages = [{"role": "user", "content": [part]}]
    error = error_of(await rig.engine.answer(rig.request(CHAT, {"messages": messages})))
    assert error["param"] == "messages[0].content"


@pytest.mark.parametrize("text", ["{", "[]", '"hi"', "", "null", r'{"a": "\ud83d"}'])
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


async def test_the_times_of_steps_are_those_of_the_answer(rig: Rig) -> None:
    rig.engine.stats()
    answer = await rig.engine.answer(rig.chat(max_tokens=200, ignore_eos=True))
    rows = rig.engine.stats().steps
    if rig.name == "openai":
        assert rows == ()
        return
    taken = sum(row[3] for row in rows) * (TIME_SCALE if rig.name == "simulated" else 1.0)
    assert answer.duration_s is not None
    assert 0.3 * answer.duration_s < taken <= answer.duration_s


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


@pytest.mark.parametrize("n", [1, 2])
async def test_a_streamed_chat_says_what_the_whole_answer_says(rig: Rig, n: int) -> None:
    request = rig.chat(max_tokens=12, ignore_eos=True, temperature=0 if n == 1 else 1, seed=3, n=n)
    whole = json.loads((await rig.engine.answer(request)).body)["choices"]
    events = await rig.events(replace(request, request_id=f"again-{n}"))
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert {event["model"] for event in events} == {MODEL}
    assert len(events) >= 12
    for choice in whole:
        expected = (choice["message"]["content"], choice["finish_reason"])
        assert read_together(events, choice["index"]) == expected


async def test_a_streamed_completion_says_what_the_whole_answer_says(rig: Rig) -> None:
    body = {"prompt": "3 + 4 =", "max_tokens": 7, "ignore_eos": True, "temperature": 0}
    whole = json.loads((await rig.engine.answer(rig.request(COMPLETIONS, body))).body)["choices"]
    events = await rig.events(rig.request(COMPLETIONS, body | {"stream": True}))
    assert {event["object"] for event in events} == {"text_completion"}
    assert read_together(events) == (whole[0]["text"], whole[0]["finish_reason"])


async def test_a_stream_tells_its_usage_where_asked(rig: Rig) -> None:
    asked = {"stream_options": {"include_usage": True}}
    events = await rig.events(rig.chat(max_tokens=9, ignore_eos=True, **asked))
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 9
    assert events[-1]["usage"]["prompt_tokens"] > 0
    silent = await rig.events(rig.chat(max_tokens=9, ignore_eos=True))
    assert not any(event.get("usage") for event in silent)


async def test_a_stream_comes_as_the_tokens_are_made(rig: Rig) -> None:
    made_before = rig.engine.stats().generated_tokens
    async with aclosing(await rig.stream(rig.chat(max_tokens=1500, ignore_eos=True))) as stream:
        for _ in range(5):
            await anext(stream)
        assert rig.engine.stats().generated_tokens - made_before < 1000
    await until(lambda: rig.engine.stats().running == 0, "nothing runs")


async def test_closing_a_stream_frees_its_slot(rig: Rig) -> None:
    requests = [rig.chat(max_tokens=1500, ignore_eos=True) for _ in range(SLOTS)]
    streams = [await rig.stream(request) for request in requests]
    await until(lambda: rig.engine.stats().running == SLOTS, "all slots taken")
    short = rig.submit(rig.chat(max_tokens=2))
    await until(lambda: rig.engine.stats().waiting == 1, "the short one waits")
    await streams[0].aclose()
    assert (await asyncio.wait_for(short, 60)).status_code == 200
    assert [event async for event in streams[0]] == []
    await anext(streams[1])
    for stream in streams:
        await stream.aclose()
        await stream.aclose()
    await until(lambda: rig.engine.stats().running == 0, "all slots free")


async def test_a_reader_that_is_cancelled_frees_its_slot(rig: Rig) -> None:
    async def read() -> None:
        async with aclosing(await rig.stream(rig.chat(max_tokens=1500, ignore_eos=True))) as stream:
            async for _ in stream:
                pass

    reader = asyncio.create_task(read())
    await until(lambda: rig.engine.stats().running == 1, "the stream runs")
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    await until(lambda: rig.engine.stats().running == 0, "the slot is free")


async def test_a_stream_that_is_cancelled_before_its_first_event_leaves_nothing(rig: Rig) -> None:
    running = await rig.fill([1500] * SLOTS)
    opening = asyncio.create_task(rig.stream(rig.chat(max_tokens=5)))
    await until(lambda: rig.engine.stats().waiting == 1, "the stream waits")
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    await until(lambda: rig.engine.stats().waiting == 0, "nothing waits")
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    await until(lambda: rig.engine.stats().running == 0, "all slots free")


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"priority": -1000}, "priority"), ({"n": 1000}, "n"), ({"messages": "no list"}, "messages")],
)
async def test_a_bad_stream_is_refused_with_an_answer(
    rig: Rig, fields: dict[str, object], param: str
) -> None:
    answer = await rig.engine.open_stream(rig.chat(stream=True, **fields))
    assert isinstance(answer, EngineAnswer)
    assert error_of(answer)["param"] == param


async def test_a_streamed_prompt_beyond_the_context_is_refused_with_an_answer(rig: Rig) -> None:
    messages = [{"role": "user", "content": "What is 3 plus 4? " * 2000}]
    answer = await rig.engine.open_stream(rig.request(CHAT, {"messages": messages}))
    assert isinstance(answer, EngineAnswer)
    assert str(MAX_MODEL_LEN) in str(error_of(answer)["message"])


async def test_embeddings_are_not_streamed(embedder: Rig) -> None:
    for further in ({}, {"stream": True}):
        request = embedder.request(EMBEDDINGS, {"input": "a"} | further)
        answer = await embedder.engine.open_stream(request)
        assert isinstance(answer, EngineAnswer)
        assert error_of(answer)["param"] == "stream"


async def test_the_lowest_priority_starts_first_when_slots_are_full(rig: Rig) -> None:
    finished: list[str] = []

    async def serve(name: str, priority: int) -> None:
        await rig.engine.answer(rig.chat(rank=priority, max_tokens=4, ignore_eos=True))
        finished.append(name)

    running = await rig.fill([1500] * SLOTS)
    late = [asyncio.create_task(serve(f"late {index}", DUE + 9)) for index in range(3)]
    await until(lambda: rig.engine.stats().waiting == 3, "the late ones wait")
    urgent = asyncio.create_task(serve("urgent", DUE - 9))
    await until(lambda: rig.engine.stats().waiting == 4, "the urgent one waits")
    running[0].cancel()
    await asyncio.gather(*late, urgent)
    assert finished[0] == "urgent"
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    await until(lambda: rig.engine.stats().running == 0, "all slots free")


async def test_interactive_requests_start_at_once_although_batch_work_fills_the_engine(
    rig: Rig,
) -> None:
    if Lso.EVICT not in rig.info.supports:
        pytest.skip("this engine does not evict")
    running = await rig.fill([1000] * SLOTS)
    before = rig.engine.stats()
    burst = [
        rig.submit(rig.chat(rank=INTERACTIVE_PRIORITY, max_tokens=3, ignore_eos=True))
        for _ in range(SLOTS)
    ]
    assert {answer.status_code for answer in await asyncio.gather(*burst)} == {200}
    assert not any(task.done() for task in running)
    answers = await asyncio.gather(*running)
    assert [answer.usage.output_tokens for answer in answers] == [1000] * SLOTS
    after = rig.engine.stats()
    assert after.evictions > before.evictions
    # There is KV for all: who gave way rested with what had been computed.
    assert after.recomputed_tokens == before.recomputed_tokens


async def test_an_engine_that_slept_answers_as_before(rig: Rig) -> None:
    question = {"messages": [{"role": "user", "content": "What is 12 + 4?"}], "temperature": 0}
    before = await rig.engine.answer(rig.request(CHAT, question))
    if Lso.SWAP not in rig.info.supports:
        with pytest.raises(ConfigurationError):
            await rig.engine.sleep()
        return
    assert await rig.engine.sleep() in (Residency.ASLEEP, Residency.COLD)
    with pytest.raises(EngineDead):
        await rig.engine.answer(rig.chat())
    info = await rig.engine.wake()
    assert (info.model, info.slots, info.max_model_len) == (MODEL, SLOTS, MAX_MODEL_LEN)
    after = await rig.engine.answer(rig.request(CHAT, question))
    said = [json.loads(answer.body)["choices"][0]["message"] for answer in (before, after)]
    assert said[0] == said[1]


async def test_what_is_inside_goes_on_after_vllms_own_sleep(rig: Rig) -> None:
    """A host's processor has no memory to free, but goes through the same motions."""
    if not isinstance(rig.engine, VllmEngine):
        pytest.skip("only vLLM sleeps so")
    rig.engine.sleeps = True
    question: dict[str, object] = {
        "messages": [{"role": "user", "content": "Count from 1 to 60."}],
        "temperature": 0,
        "max_tokens": 1000,
        "ignore_eos": True,
    }
    undisturbed = await rig.engine.answer(rig.request(CHAT, question))
    asked = rig.submit(rig.request(CHAT, question))
    await until(lambda: any(many > 5 for many in rig.engine.stats().generated), "tokens")
    assert await rig.engine.sleep() is Residency.ASLEEP
    made = rig.engine.stats().generated_tokens
    assert not asked.done()
    await rig.engine.wake()
    answer = await asked
    assert rig.engine.stats().generated_tokens > made
    said = [json.loads(each.body)["choices"][0]["message"] for each in (undisturbed, answer)]
    assert said[0] == said[1]
    rig.engine.sleeps = False


async def test_stopping_ends_what_is_inside_and_stays_stopped(rig: Rig) -> None:
    """Stands last: the engine does not come back."""
    pending = await rig.fill([1500] * 2)
    stream = await rig.stream(rig.chat(max_tokens=1500, ignore_eos=True))
    await rig.engine.stop()
    with pytest.raises(EngineDead):
        async for _ in stream:
            pass
    await stream.aclose()
    results = await asyncio.gather(*pending, return_exceptions=True)
    assert all(isinstance(result, EngineDead) for result in results), results
    await rig.engine.stop()
    with pytest.raises(EngineDead):
        await rig.engine.answer(rig.chat())
    with pytest.raises(EngineDead):
        await rig.engine.open_stream(rig.chat())
    with pytest.raises(EngineDead):
        rig.engine.stats()
