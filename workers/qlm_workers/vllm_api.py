"""Every import of vLLM, whose modules move between releases: 0.26 to 0.33, told by what is there.

Importing this module takes seconds; only a worker that serves through vLLM does.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import importlib
import inspect
import signal
from argparse import Namespace
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from multiprocessing import resource_tracker
from typing import Any, get_args

from pydantic import TypeAdapter
from starlette.datastructures import State
from vllm.v1.metrics.loggers import StatLoggerBase

from qlm_batch.domain.errors import ConfigurationError
from qlm_batch.domain.jobs import CHAT, COMPLETIONS, EMBEDDINGS, EngineKind
from qlm_workers.adapters import Adapter
from qlm_workers.told import EVICTIONS, RECOMPUTED, STEP_US


def _first(*places: str) -> Any:
    for place in places:
        module, _, name = place.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):
            continue
    raise ConfigurationError(
        f"The installed vLLM has none of {', '.join(places)}; install a release from 0.26 to 0.33."
    )


AsyncEngineArgs = _first("vllm.engine.arg_utils:AsyncEngineArgs")
AsyncLLM = _first("vllm.v1.engine.async_llm:AsyncLLM")
EngineDeadError = _first("vllm.v1.engine.exceptions:EngineDeadError")
_platform = _first("vllm.platforms:current_platform")
_make_arg_parser = _first(
    "vllm.entrypoints.launchers.cli_args:make_arg_parser",
    "vllm.entrypoints.openai.cli_args:make_arg_parser",
)
_ArgumentParser = _first(
    "vllm.utils.argparse_utils:FlexibleArgumentParser", "vllm.utils:FlexibleArgumentParser"
)
_init_app_state = _first(
    "vllm.entrypoints.launchers.api_server.app_state:init_app_state",
    "vllm.entrypoints.openai.api_server:init_app_state",
)
_REQUESTS = {
    CHAT: (
        "vllm.entrypoints.openai.chat_completion.protocol:ChatCompletionRequest",
        "vllm.entrypoints.openai.protocol:ChatCompletionRequest",
    ),
    COMPLETIONS: (
        "vllm.entrypoints.openai.completion.protocol:CompletionRequest",
        "vllm.entrypoints.openai.protocol:CompletionRequest",
    ),
    EMBEDDINGS: (
        "vllm.entrypoints.pooling.embed.protocol:EmbeddingRequest",
        "vllm.entrypoints.openai.protocol:EmbeddingRequest",
    ),
}


class StepLog(StatLoggerBase):  # type: ignore[misc]
    """What the engine told about its steps since the start.

    `first_token_s` holds the ids of requests whose time to first token is wanted; the engine fills
    it in when they finish. `evictions` and `recomputed_tokens` are those of EngineStats.
    """

    def __init__(self, vllm_config: object = None, engine_index: int = 0) -> None:
        self.kv_tokens = 0
        self.steps = 0
        self.running = 0
        self.kv_usage = 0.0
        self.generated_tokens = 0
        self.evictions = 0
        self.recomputed_tokens = 0
        self.rows: deque[tuple[int, int, int, float]] = deque(maxlen=4096)
        self.first_token_s: dict[str, float | None] = {}

    def record(self, scheduler_stats: Any, iteration_stats: Any, *_: Any, **__: Any) -> None:
        """One batch of outputs."""
        self.steps += 1
        if scheduler_stats is not None:
            self.running = scheduler_stats.num_running_reqs
            self.kv_usage = scheduler_stats.kv_cache_usage
            told = scheduler_stats.waiting_lora_adapters
            self.evictions = told.get(EVICTIONS, self.evictions)
            self.recomputed_tokens = told.get(RECOMPUTED, self.recomputed_tokens)
            details = getattr(scheduler_stats, "iteration_details", None)
            if details is not None and not getattr(details, "is_dummy", False):
                self.rows.append(
                    (
                        details.num_ctx_requests + details.num_generation_requests,
                        round(self.kv_usage * self.kv_tokens),
                        details.num_ctx_tokens,
                        told.get(STEP_US, 1000 * details.elapsed_ms) / 1e6,
                    )
                )
        if iteration_stats is not None:
            self.generated_tokens += iteration_stats.num_generation_tokens
            for finished in iteration_stats.finished_requests:
                request_id = getattr(finished, "request_id", None)
                if request_id in self.first_token_s:
                    self.first_token_s[request_id] = finished.queued_time + finished.prefill_time

    def log_engine_initialized(self) -> None:
        """Nothing to say."""


def _adapter_path(name: str, path: str, base: str) -> Any:
    return _first(
        "vllm.entrypoints.openai.models.protocol:LoRAModulePath",
        "vllm.entrypoints.openai.serving_models:LoRAModulePath",
    )(name=name, path=path, base_model_name=base)


def lora_rank(rank: int) -> int:
    """The smallest rank this vLLM has room for that fits one of `rank`."""
    ranks = get_args(_first("vllm.config.lora:MaxLoRARanks"))
    return min((own for own in ranks if own >= rank), default=rank)


def on_cpu() -> bool:
    """Whether the installed build runs on the host's processor."""
    return bool(_platform.is_cpu())


def tool_parsers() -> list[str]:
    """The names of the parsers of tool calls, sorted."""
    manager = _first(
        "vllm.tool_parsers:ToolParserManager",
        "vllm.entrypoints.openai.tool_parsers:ToolParserManager",
    )
    return sorted(manager.list_registered())


def split_args(further: Mapping[str, object]) -> tuple[dict[str, object], dict[str, object]]:
    """Arguments of the engine and of its OpenAI layer. Raises ConfigurationError on others."""
    engine_fields = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    frontend_fields = vars(_parse_defaults())
    engine = {name: value for name, value in further.items() if name in engine_fields}
    frontend = {name: value for name, value in further.items() if name not in engine_fields}
    if unknown := sorted(frontend.keys() - frontend_fields.keys()):
        raise ConfigurationError(
            f"This vLLM has no argument '{unknown[0]}'; correct the name in QLM_ENGINE_ARGS.",
            param=unknown[0],
        )
    return engine, frontend


def build(arguments: Mapping[str, object], log: StepLog) -> Any:
    """An `AsyncLLM` with its processes; blocks until it is ready, any thread may call it."""
    accepted = {field.name for field in dataclasses.fields(AsyncEngineArgs)}
    engine_args = AsyncEngineArgs(
        **{name: value for name, value in arguments.items() if name in accepted}
    )
    with _deaf_children():
        engine = AsyncLLM.from_engine_args(engine_args, stat_loggers=[lambda *_, **__: log])
    cache = engine.vllm_config.cache_config
    log.kv_tokens = (cache.num_gpu_blocks or 0) * cache.block_size
    return engine


@contextlib.contextmanager
def _deaf_children() -> Iterator[None]:
    """Keep Ctrl-C from processes started inside, which a terminal sends to the whole group.

    They would drop their work at once, while this process means to finish it and then ends them.
    """
    # Its start would lift the block again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class Serving:
    """vLLM's OpenAI layer over a running engine, called without a network between."""

    def __init__(self, state: State, kind: EngineKind) -> None:
        self._handlers: dict[str, Callable[[Any], Awaitable[Any]]] = {}
        self._requests: dict[str, TypeAdapter[Any]] = {}
        if kind is EngineKind.EMBED:
            embedding: Any = getattr(state, "serving_embedding", None) or getattr(
                state, "openai_serving_embedding", None
            )
            self._errors: Any = embedding
            self._add(EMBEDDINGS, getattr(embedding, "create_embedding", embedding))
        else:
            self._errors = state.openai_serving_chat
            self._add(CHAT, state.openai_serving_chat.create_chat_completion)
            self._add(COMPLETIONS, state.openai_serving_completion.create_completion)

    @classmethod
    async def over(
        cls,
        engine: Any,
        name: str,
        kind: EngineKind,
        frontend: Mapping[str, object],
        adapters: Sequence[Adapter] = (),
    ) -> Serving:
        """Build the layer for one served name and its adapters, which are loaded."""
        args = _parse_defaults()
        config = engine.vllm_config
        for key, value in {
            "model": config.model_config.model,
            "served_model_name": [name],
            "enable_prompt_tokens_details": True,
            "disable_log_stats": True,
            **frontend,
        }.items():
            setattr(args, key, value)
        if adapters:
            args.lora_modules = [_adapter_path(own.name, own.path, name) for own in adapters]
        if hasattr(config, "structured_outputs_config"):
            args.structured_outputs_config = config.structured_outputs_config
        state = State()
        await _init_app_state(engine, state, args, await engine.get_supported_tasks())
        return cls(state, kind)

    def _add(self, endpoint: str, handler: Callable[[Any], Awaitable[Any]]) -> None:
        self._handlers[endpoint] = handler
        self._requests[endpoint] = TypeAdapter(_first(*_REQUESTS[endpoint]))

    def parse(self, endpoint: str, body: Mapping[str, object]) -> Any:
        """The endpoint's own request model. Raises pydantic's ValidationError or one of vLLM's."""
        return self._requests[endpoint].validate_python(body)

    def call(self, endpoint: str, request: Any) -> Awaitable[Any]:
        """Run a request: a response model, an error model, or a starlette response."""
        return self._handlers[endpoint](request)

    def error(self, error: Exception) -> Any:
        """The error model that the server would answer `error` with."""
        return self._errors.create_error_response(error)


def generated_per_request(engine: Any) -> tuple[int, ...]:
    """Output tokens so far of each request inside; empty where this release does not tell."""
    states = getattr(getattr(engine, "output_processor", None), "request_states", {})
    counts = (
        getattr(getattr(state, "stats", None), "num_generation_tokens", None)
        for state in states.values()
    )
    return tuple(count for count in counts if count is not None)


async def fail_all(engine: Any) -> None:
    """Make every request inside raise EngineDeadError, and read no more of what comes out."""
    handler = engine.output_handler
    if handler is not None:
        # It would take the end of the processes for a failure and say so in the log.
        handler.cancel()
        await asyncio.wait([handler])
    engine.output_processor.propagate_error(EngineDeadError())


def shut_down(engine: Any, patience_s: float) -> None:
    """End the engine's processes; blocks, and kills what is left after `patience_s`."""
    if "timeout" in inspect.signature(engine.shutdown).parameters:
        engine.shutdown(timeout=patience_s)
    else:
        engine.shutdown()


def keeps_asleep(engine: Any) -> bool:
    """Whether this release can put an engine to sleep with requests inside."""
    return "mode" in inspect.signature(engine.sleep).parameters


async def put_to_sleep(engine: Any, level: int) -> None:
    """Free the device's memory: level 1 moves the weights to the host's, level 2 drops them."""
    if keeps_asleep(engine):
        await engine.sleep(level=level, mode="keep")
    else:
        await engine.sleep(level=level)


async def wake_up(engine: Any, level: int) -> None:
    """Take the device's memory again; weights dropped by level 2 are read from storage."""
    if level == 1:
        await engine.wake_up()
        return
    await engine.wake_up(tags=["weights"])
    await engine.collective_rpc("reload_weights")
    await engine.wake_up(tags=["kv_cache"])
    if keeps_asleep(engine):
        await engine.wake_up(tags=["scheduling"])


def kv_bytes_per_token(engine_args: Mapping[str, object]) -> int | None:
    """Size of one token's keys and values in plain attention; None when it cannot be told."""
    try:
        model, dtype = engine_args["model"], engine_args["dtype"]
        config = AsyncEngineArgs(model=model, dtype=dtype).create_model_config()
        layers = config.hf_text_config.num_hidden_layers
        heads = config.get_total_num_kv_heads()
        return int(2 * layers * heads * config.get_head_size() * config.dtype.itemsize)
    except Exception:  # noqa: BLE001  only makes a message better
        return None


def _parse_defaults() -> Namespace:
    parsed: Namespace = _make_arg_parser(_ArgumentParser()).parse_args([])
    return parsed
