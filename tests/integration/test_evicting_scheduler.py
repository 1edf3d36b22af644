"""Eviction inside a real vLLM: who starts at once, and what that does to those who give way."""

from __future__ import annotations

import asyncio
import importlib.util
import json
from collections.abc import AsyncIterator, Coroutine, Sequence
from itertools import count
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import pytest_asyncio
import structlog

from qlm_batch.domain.engine import EngineAnswer, EngineInfo, EngineRequest, Lso
from qlm_batch.domain.jobs import CHAT, EngineKind
from qlm_batch.scheduling.agent import INTERACTIVE_PRIORITY, engine_priority
from qlm_batch.scheduling.eviction import MAX_EVICTIONS, TOGETHER, pace
from qlm_batch.settings import Settings
from qlm_workers.engines import make_engine
from qlm_workers.vllm_engine import VllmEngine
from tests.contract.waiting import until

pytestmark = [
    pytest.mark.asyncio(loop_scope="module"),
    pytest.mark.vllm,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]

MODEL = "qlm-tiny"
SLOTS = 4
PLACES = SLOTS + pace("balanced", SLOTS).headroom
DUE = engine_priority(1_800_000_000.0)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "score": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 9}, "maxItems": 4},
    },
    "required": ["name", "score", "tags"],
}
KINDS: Sequence[dict[str, Any]] = (
    {"temperature": 0, "ignore_eos": True, "logprobs": True, "top_logprobs": 3},
    {"temperature": 1, "ignore_eos": True, "seed": 7},
    {"temperature": 1, "seed": 5, "response_format": {
        "type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}},
    {"temperature": 0.8, "ignore_eos": True, "seed": 3, "presence_penalty": 0.5,
     "frequency_penalty": 0.4, "repetition_penalty": 1.1},
)  # fmt: skip
_ids = count()


def chat(text: str, priority: int, salt: str = "t", **fields: Any) -> EngineRequest:
    body = {"model": MODEL, "messages": [{"role": "user", "content": text}], **fields}
    return EngineRequest(f"e{next(_ids)}", CHAT, json.dumps(body), priority, salt)


class Rig:
    """A started engine, the process it computes in, and what is asked of it."""

    def __init__(self, engine: VllmEngine, info: EngineInfo, core: psutil.Process) -> None:
        self.engine = engine
        self.info = info
        self._core = core

    @property
    def evictions(self) -> int:
        return self.engine.stats().evictions

    def batch(
        self, tokens: int, many: int = SLOTS, salt: str = "t"
    ) -> list[asyncio.Task[EngineAnswer]]:
        """Long batch requests of every kind of sampling, the last due last."""
        return [
            asyncio.create_task(
                self.engine.answer(
                    chat(
                        f"What is {n} plus 4?",
                        DUE + n,
                        salt,
                        max_tokens=tokens,
                        **KINDS[n % len(KINDS)],
                    )
                )
            )
            for n in range(many)
        ]

    def greedy(self, tokens: int, salt: str) -> list[asyncio.Task[EngineAnswer]]:
        """A long batch request for every slot, whose answers can be compared."""
        plain = {"max_tokens": tokens, "ignore_eos": True, "temperature": 0}
        asked = [chat(f"What is {n} plus 4?", DUE + n, salt, **plain) for n in range(SLOTS)]
        return [asyncio.create_task(self.engine.answer(request)) for request in asked]

    async def filled(self, tokens: int) -> list[asyncio.Task[EngineAnswer]]:
        """Every slot taken by plain long batch work."""
        tasks = [
            asyncio.create_task(
                self.engine.answer(
                    chat(f"Count to {n}.", DUE + n, max_tokens=tokens, ignore_eos=True)
                )
            )
            for n in range(SLOTS)
        ]
        await until(lambda: self.computing(SLOTS), "all slots taken")
        return tasks

    def computing(self, many: int) -> bool:
        """Whether exactly so many are inside and all get tokens; what came before is then told."""
        generated = self.engine.stats().generated
        return len(generated) == many and min(generated) >= 2

    async def at_once(
        self, *asked: Coroutine[Any, Any, EngineAnswer]
    ) -> list[asyncio.Task[EngineAnswer]]:
        """Ask all while the engine stands still: it sees them together, however slow we are.

        Nothing that runs may end meanwhile. `entered` then counts from the first step that can
        serve them.
        """
        self._core.suspend()
        try:
            inside = len(self.engine.stats().generated)
            tasks = [asyncio.create_task(one) for one in asked]
            await until(
                lambda: len(self.engine.stats().generated) == inside + len(tasks), "all are sent"
            )
        finally:
            self._core.resume()
        return tasks

    def entered(self) -> Sequence[int]:
        """The steps since the last look in which prompts were computed, counted from one."""
        rows = self.engine.stats().steps
        return [at for at, (_, _, prefill, _) in enumerate(rows, start=1) if prefill]

    async def interactive(self, tokens: int = 4, text: str = "Hi.") -> EngineAnswer:
        request = chat(text, INTERACTIVE_PRIORITY, max_tokens=tokens, ignore_eos=True)
        answer = await self.engine.answer(request)
        assert answer.status_code == 200, answer.body
        return answer


async def started(**changes: Any) -> Rig:
    settings = Settings(
        slots=SLOTS,
        max_model_len=2048,
        dtype="float32",
        kv_cache_bytes=256 * 1024**2,
        **changes,
    )
    before = set(psutil.Process().children(recursive=True))
    engine = make_engine(settings, MODEL, EngineKind.GENERATE)
    assert isinstance(engine, VllmEngine)
    info = await engine.start()
    family = set(psutil.Process().children(recursive=True)) - before
    (core,) = (one for one in family if "EngineCore" in f"{one.name()} {one.cmdline()}")
    return Rig(engine, info, core)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rig() -> AsyncIterator[Rig]:
    """An engine with KV for all its places."""
    rig = await started()
    yield rig
    await rig.engine.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def narrow() -> AsyncIterator[Rig]:
    """An engine whose KV is full long before its places are taken by long requests.

    It favours latency, so interactive prompts have steps of their own.
    """
    rig = await started(
        favour="latency", engine_args={"num_gpu_blocks_override": 68, "block_size": 32}
    )
    yield rig
    await rig.engine.stop()


async def cancelled(tasks: Sequence[asyncio.Task[EngineAnswer]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def same(one: EngineAnswer, other: EngineAnswer) -> None:
    """Equal texts and endings, logprobs within 1e-4."""
    mine, theirs = (json.loads(answer.body)["choices"][0] for answer in (one, other))
    assert mine["message"]["content"] == theirs["message"]["content"]
    assert mine["finish_reason"] == theirs["finish_reason"]
    assert one.usage.output_tokens == other.usage.output_tokens
    if mine["logprobs"] is not None:
        for left, right in zip(
            mine["logprobs"]["content"], theirs["logprobs"]["content"], strict=True
        ):
            assert left["token"] == right["token"]
            assert left["logprob"] == pytest.approx(right["logprob"], abs=1e-4)


async def test_the_engine_says_that_it_evicts(rig: Rig) -> None:
    assert Lso.EVICT in rig.info.supports
    assert rig.info.slots == SLOTS


async def test_batch_work_keeps_to_its_slots(rig: Rig) -> None:
    tasks = rig.batch(30, many=3 * SLOTS)
    seen = 0
    while not all(task.done() for task in tasks):
        seen = max(seen, rig.engine.stats().running)
        await asyncio.sleep(0.005)
    assert seen == SLOTS


async def test_one_arrival_takes_the_headroom_and_evicts_nobody(rig: Rig) -> None:
    running = await rig.filled(1900)
    before = rig.evictions
    await asyncio.gather(*await rig.at_once(rig.interactive()))
    assert rig.entered()[-1] < 20
    assert not any(task.done() for task in running)
    assert rig.evictions == before
    await cancelled(running)


async def test_a_burst_starts_within_a_few_steps_although_batch_work_fills_the_engine(
    rig: Rig,
) -> None:
    running = await rig.filled(600)
    before = rig.engine.stats()
    await asyncio.gather(*await rig.at_once(*(rig.interactive() for _ in range(PLACES))))
    assert rig.entered()[-1] < 20
    assert not any(task.done() for task in running)
    answers = await asyncio.gather(*running)
    assert {answer.usage.output_tokens for answer in answers} == {600}
    after = rig.engine.stats()
    assert 1 <= after.evictions - before.evictions <= SLOTS
    # There is KV for all: who gave way rested with what had been computed.
    assert after.recomputed_tokens == before.recomputed_tokens


async def test_a_burst_of_long_prompts_enters_in_several_steps(rig: Rig) -> None:
    running = await rig.filled(1900)
    prompts = [f"{n} " + "and then " * 20 for n in range(PLACES)]
    answers = await asyncio.gather(
        *await rig.at_once(*(rig.interactive(text=text) for text in prompts))
    )
    sizes = [answer.usage.input_tokens for answer in answers]
    assert sum(sizes) > TOGETHER > max(sizes), "the burst has to be parted, no single prompt"
    told = rig.engine.stats().steps
    assert sum(prefill for _, _, prefill, _ in told) == sum(sizes)
    assert max(prefill for _, _, prefill, _ in told) <= TOGETHER
    await cancelled(running)


async def test_one_that_rests_can_be_cancelled(rig: Rig) -> None:
    running = await rig.filled(1900)
    before = rig.evictions
    guests = await rig.at_once(*(rig.interactive(tokens=900) for _ in range(PLACES)))
    await until(lambda: rig.evictions == before + SLOTS, "all batch work rests")
    stats = rig.engine.stats()
    assert (stats.running, stats.waiting) == (PLACES, SLOTS)
    await cancelled(running)
    await until(lambda: rig.engine.stats().waiting == 0, "nobody rests")
    await asyncio.gather(*guests)
    await until(lambda: rig.engine.stats().kv_usage == 0.0, "nothing holds KV")


async def test_an_interactive_request_with_a_grammar_is_let_in_too(rig: Rig) -> None:
    running = await rig.filled(1900)
    others = [asyncio.create_task(rig.interactive(tokens=1900)) for _ in range(PLACES - SLOTS)]
    await until(lambda: rig.engine.stats().running == PLACES, "the headroom is taken")
    request = chat(
        "Hi.",
        INTERACTIVE_PRIORITY,
        max_tokens=8,
        response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}},
    )
    answer = await rig.engine.answer(request)
    assert answer.status_code == 200, answer.body
    assert not any(task.done() for task in running)
    await cancelled([*running, *others])


async def test_what_victims_answer_is_what_they_answer_undisturbed(rig: Rig) -> None:
    alone = await asyncio.gather(*rig.batch(400, many=SLOTS + 2, salt="alone"))
    before = rig.evictions
    tasks = rig.batch(400, many=SLOTS + 2, salt="disturbed")
    while not all(task.done() for task in tasks):
        await asyncio.gather(*(rig.interactive() for _ in range(PLACES - 1)))
        await asyncio.sleep(0.02)
    assert rig.evictions - before >= SLOTS
    for one, other in zip(alone, await asyncio.gather(*tasks), strict=True):
        same(one, other)


async def test_a_seeded_prompt_computed_in_parts_is_answered_as_one_computed_at_once(
    rig: Rig,
) -> None:
    """Beside interactive requests a step takes part of a batch prompt; later it is cached."""
    await rig.interactive()
    seeded = {"max_tokens": 30, "temperature": 1, "seed": 7, "ignore_eos": True}
    prompt = "What is 3 plus 4? " * 150
    answers = [await rig.engine.answer(chat(prompt, DUE, "parts", **seeded)) for _ in range(2)]
    assert answers[0].usage.input_tokens > 2 * (pace("balanced", SLOTS).batch_prefill or 0)
    same(*answers)


async def test_victims_do_not_come_back_to_push_out_who_pushed_them(rig: Rig) -> None:
    running = await rig.filled(600)
    before = rig.evictions
    long = await rig.at_once(*(rig.interactive(tokens=120) for _ in range(PLACES + 2)))
    await until(lambda: rig.evictions == before + SLOTS, "all batch work has given way")
    await asyncio.gather(*long)
    assert rig.evictions == before + SLOTS
    await asyncio.gather(*running)


async def test_a_victim_gives_way_a_bounded_number_of_times(rig: Rig) -> None:
    running = await rig.filled(1900)
    before = rig.evictions
    for _ in range(MAX_EVICTIONS + 4):
        await asyncio.gather(
            *await rig.at_once(*(rig.interactive(tokens=1) for _ in range(PLACES)))
        )
        seen = rig.engine.stats().step
        await until(lambda seen=seen: rig.engine.stats().step > seen + 3, "batch work is back")  # type: ignore[misc]
    assert not any(task.done() for task in running)
    given_way = rig.evictions - before
    assert SLOTS * (MAX_EVICTIONS - 1) <= given_way <= SLOTS * MAX_EVICTIONS
    await cancelled(running)


async def test_kv_is_made_free_for_an_interactive_prompt(narrow: Rig) -> None:
    """Places are free all the time: only KV is short."""
    alone = await asyncio.gather(*narrow.greedy(500, "alone"))
    tasks = narrow.greedy(500, "disturbed")
    await until(lambda: narrow.computing(SLOTS), "batch work runs")
    await until(lambda: narrow.engine.stats().kv_usage > 0.8, "the KV is nearly taken")
    before, lost = narrow.evictions, narrow.engine.stats().recomputed_tokens
    await asyncio.gather(*await narrow.at_once(narrow.interactive(text="What is 3 plus 4? " * 60)))
    # The prompt is computed first; the victims' tokens again once there is room.
    assert narrow.entered()[0] < 20
    assert not any(task.done() for task in tasks)
    assert narrow.evictions > before
    for one, other in zip(alone, await asyncio.gather(*tasks), strict=True):
        same(one, other)
    assert narrow.engine.stats().recomputed_tokens > lost


async def test_those_that_rest_give_their_kv_to_interactive_requests_that_grow(
    narrow: Rig,
) -> None:
    alone = await asyncio.gather(*narrow.greedy(450, "calm"))
    tasks = narrow.greedy(450, "crowded")
    await until(lambda: narrow.computing(SLOTS), "batch work runs")
    await until(lambda: narrow.engine.stats().kv_usage > 0.3, "it holds some KV")
    before, lost = narrow.evictions, narrow.engine.stats().recomputed_tokens
    places = SLOTS + pace("latency", SLOTS).headroom
    await asyncio.gather(
        *await narrow.at_once(*(narrow.interactive(tokens=350) for _ in range(places)))
    )
    assert narrow.evictions >= before + SLOTS
    for one, other in zip(alone, await asyncio.gather(*tasks), strict=True):
        same(one, other)
    assert narrow.engine.stats().recomputed_tokens > lost


async def test_a_prompt_for_which_no_room_can_be_made_evicts_nobody(narrow: Rig) -> None:
    interactive = [asyncio.create_task(narrow.interactive(tokens=1000)) for _ in range(2)]
    await until(lambda: narrow.computing(2), "interactive work runs")
    await until(lambda: narrow.engine.stats().kv_usage > 0.7, "it holds the KV")
    (batch,) = await narrow.at_once(
        narrow.engine.answer(chat("Hi.", DUE, max_tokens=60, ignore_eos=True))
    )
    await until(lambda: narrow.engine.stats().running == 3, "batch work runs beside it")
    before = narrow.evictions
    large = asyncio.create_task(narrow.interactive(text="What is 3 plus 4? " * 110))
    await until(lambda: batch.done() or narrow.evictions > before, "the batch request ends")
    assert narrow.evictions == before
    await cancelled([*interactive, large])


async def test_a_server_whose_policy_ignores_priorities_is_told_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from qlm_workers import evicting_scheduler

    def base(self: Any, config: Any) -> None:
        self.scheduler_config = config.scheduler_config
        self.max_num_active_reqs, self.max_num_scheduled_tokens = 8, 2048
        self.kv_cache_config = SimpleNamespace(kv_cache_groups=[])

    monkeypatch.setattr("qlm_workers.evicting_scheduler.Scheduler.__init__", base)
    for policy in ("fcfs", "priority"):
        scheduling = SimpleNamespace(policy=policy, async_scheduling=False)
        config = SimpleNamespace(scheduler_config=scheduling, additional_config={})
        caplog.clear()
        with caplog.at_level("WARNING", logger=evicting_scheduler.__name__):
            evicting_scheduler.EvictingScheduler(config)
        assert ("--scheduling-policy priority" in caplog.text) == (policy == "fcfs")


async def test_a_worker_whose_engine_ignores_priorities_says_so_at_its_start(rig: Rig) -> None:
    scheduling = rig.engine._engine.vllm_config.scheduler_config
    before = scheduling.policy
    scheduling.policy = "fcfs"
    try:
        with structlog.testing.capture_logs() as told:
            info = rig.engine._info()
    finally:
        scheduling.policy = before
    assert Lso.EVICT not in info.supports
    assert [entry["log_level"] for entry in told] == ["warning"]
    assert "ignores priorities" in told[0]["event"]
