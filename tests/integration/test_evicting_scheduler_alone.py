"""The scheduler under asynchronous scheduling, as on a GPU; the test plays the model runner."""

from __future__ import annotations

import importlib.util
from collections import deque
from collections.abc import Sequence
from typing import Any

import pytest

from qlm_batch.models import tiny_model_path
from qlm_batch.scheduling.agent import INTERACTIVE_PRIORITY, engine_priority

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed"),
]

DUE = engine_priority(1_800_000_000.0)
BLOCK, PROMPT, OUTPUT = 16, 20, 40
SLOTS, PLACES = 4, 5


class Engine:
    """A scheduler, and a model runner with two steps under way that answers with counted tokens.

    Like vLLM's second model runner it keeps every request it was given until it is told that the
    request has finished or been preempted.
    """

    def __init__(self, scheduler: Any, output: Any) -> None:
        self.scheduler = scheduler
        self._output = output
        self._under_way: deque[Any] = deque()
        self._positions: dict[str, int] = {}
        self.kept: set[str] = set()
        self.most_kept = 0
        self.answers: dict[str, list[int]] = {}
        self.steps_us: list[int] = []

    def step(self) -> Sequence[str]:
        """Schedule a step and finish the one before; who was scheduled."""
        planned = self.scheduler.schedule()
        self._take_in(planned)
        self._under_way.append((planned, self._answer(planned)))
        if len(self._under_way) > 1:
            self._finish()
        return list(planned.num_scheduled_tokens)

    def run(self, steps: int = 2000) -> None:
        """Until nothing is left to do."""
        while self.scheduler.has_requests():
            self.step()
            steps -= 1
            assert steps, "the requests do not end"
        while self._under_way:
            self._finish()

    def _take_in(self, planned: Any) -> None:
        for request_id in planned.finished_req_ids | (planned.preempted_req_ids or set()):
            self.kept.discard(request_id)
        for new in planned.scheduled_new_reqs:
            self.kept.add(new.req_id)
            self._positions[new.req_id] = new.num_computed_tokens
        for request_id in planned.scheduled_cached_reqs.req_ids:
            assert request_id in self.kept, "the model runner does not know the request"
        self.most_kept = max(self.most_kept, len(self.kept))

    def _answer(self, planned: Any) -> dict[str, list[int]]:
        """For each request its token: the position it stands at, none inside its prompt."""
        told: dict[str, list[int]] = {}
        for request_id, tokens in planned.num_scheduled_tokens.items():
            self._positions[request_id] += tokens
            request = self.scheduler.requests[request_id]
            known = request.num_tokens + request.num_output_placeholders
            ready = self._positions[request_id] >= known - 1
            told[request_id] = [self._positions[request_id]] if ready else []
        return told

    def _finish(self) -> None:
        planned, told = self._under_way.popleft()
        ids = list(told)
        made = self._output(
            req_ids=ids,
            req_id_to_index={request_id: index for index, request_id in enumerate(ids)},
            sampled_token_ids=[told[request_id] for request_id in ids],
        )
        for outputs in self.scheduler.update_from_output(planned, made).values():
            for each in outputs.outputs:
                self.answers.setdefault(each.request_id, []).extend(each.new_token_ids)
            if outputs.scheduler_stats is not None:
                told_of = outputs.scheduler_stats.waiting_lora_adapters
                self.steps_us.append(told_of["qlm_step_us"])


def engine(kept: int, blocks: int = 1000, *, second_runner: bool = True) -> Engine:
    """One whose model runner has room for `kept` requests, with `blocks` of KV."""
    import torch
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.outputs import ModelRunnerOutput
    from vllm.v1.structured_output import StructuredOutputManager

    from qlm_workers.evicting_scheduler import EvictingScheduler

    config = EngineArgs(
        model=str(tiny_model_path()),
        dtype="float32",
        max_num_seqs=kept,
        max_num_batched_tokens=256,
        max_model_len=256,
        scheduling_policy="priority",
        block_size=BLOCK,
        enable_prefix_caching=False,
        additional_config={"qlm": {"slots": SLOTS, "places": PLACES, "tell": True}},
    ).create_engine_config()
    # What vLLM decides on CUDA.
    config.scheduler_config.async_scheduling = True
    config.cache_config.num_gpu_blocks = blocks

    class OnCuda(VllmConfig):
        use_v2_model_runner = second_runner

    config.__class__ = OnCuda
    spec = FullAttentionSpec(block_size=BLOCK, num_kv_heads=1, head_size=1, dtype=torch.float32)
    scheduler = EvictingScheduler(
        config,
        KVCacheConfig(blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
        StructuredOutputManager(config),
        BLOCK,
        log_stats=True,
    )
    return Engine(scheduler, ModelRunnerOutput)


def add(engine: Engine, name: str, priority: int, output: int = OUTPUT) -> None:
    """A request whose answer has `output` tokens."""
    from vllm import SamplingParams
    from vllm.v1.request import Request

    engine.scheduler.add_request(
        Request(
            name,
            list(range(PROMPT)),
            SamplingParams(max_tokens=output, ignore_eos=True),
            None,
            priority=priority,
        )
    )


def filled(engine: Engine) -> None:
    """Every slot taken by batch work that has some of its answer."""
    for number in range(SLOTS):
        add(engine, f"batch-{number}", DUE + number)
    for _ in range(8):
        engine.step()


def burst(engine: Engine, many: int = PLACES) -> None:
    """As many interactive requests as there are places, at once."""
    for number in range(many):
        add(engine, f"urgent-{number}", INTERACTIVE_PRIORITY, output=6)


def complete(engine: Engine) -> None:
    """Every answer has each of its positions once, in their order."""
    for name, answer in engine.answers.items():
        length = 6 if name.startswith("urgent") else OUTPUT
        assert answer == list(range(PROMPT, PROMPT + length)), name


def test_a_burst_runs_in_the_step_after_it_came_and_all_are_answered() -> None:
    own = engine(kept=PLACES + SLOTS)
    filled(own)
    burst(own)
    scheduled = own.step()
    assert {f"urgent-{number}" for number in range(PLACES)} <= set(scheduled)
    own.run()
    assert len(own.answers) == SLOTS + PLACES
    complete(own)
    assert own.scheduler._told["qlm_evictions"] == SLOTS
    assert own.scheduler._told["qlm_recomputed_tokens"] == 0


@pytest.mark.parametrize("kept", range(PLACES, PLACES + SLOTS + 1))
def test_a_model_runner_is_never_given_more_than_it_has_room_for(kept: int) -> None:
    own = engine(kept)
    filled(own)
    for _ in range(3):
        burst(own)
        own.run()
        assert own.most_kept <= kept
        complete(own)
        own.answers.clear()
        filled(own)
    own.run()
    complete(own)


def test_the_first_model_runner_bounds_nobody() -> None:
    own = engine(PLACES, second_runner=False)
    filled(own)
    burst(own)
    own.run()
    assert own.scheduler._told["qlm_recomputed_tokens"] == 0


def test_who_left_computes_no_token_twice_that_is_still_on_its_way() -> None:
    own = engine(kept=PLACES + SLOTS, blocks=3 * SLOTS)
    filled(own)
    burst(own)
    own.run()
    assert own.scheduler._told["qlm_recomputed_tokens"] > 0
    complete(own)


def test_every_step_tells_how_long_it_took() -> None:
    own = engine(kept=PLACES + SLOTS)
    filled(own)
    own.run()
    assert own.steps_us
    assert all(took >= 0 for took in own.steps_us)
