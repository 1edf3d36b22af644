"""A server that already runs and speaks OpenAI's HTTP API, as an engine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack
from typing import Any, Self

import httpx
import orjson
import structlog

from qlm_batch.domain.engine import EngineAnswer, EngineInfo, EngineRequest, EngineStats, Lso
from qlm_batch.domain.errors import ConfigurationError, EngineDead
from qlm_batch.domain.jobs import EngineKind
from qlm_batch.domain.snapshot import Residency
from qlm_batch.settings import Settings
from qlm_workers.answers import Door, cut_in, error_answer, usage_of
from qlm_workers.naming import shown
from qlm_workers.openai_probe import AWAY, ServerFacts, metric_sum, probe
from qlm_workers.slots import PrioritySlots
from qlm_workers.streams import DONE, Stream, error_event, error_event_answer, opened

log = structlog.get_logger(__name__)

_FIRST_PAUSE_S = 0.25
_LONGEST_PAUSE_S = 15.0
_LOOK_S = 5.0
_GIVE_UP = 0.75
"""Share of `stall_s` after which an absent server is told: sooner than it would count as hung."""
_HUNG_UP = "The server hung up before the end of its answer."
_PROGRESS = ("vllm:prompt_tokens_total", "vllm:generation_tokens_total")


class OpenAIEngine:
    """One model on a server at `url` (with or without `/v1`), at most `slots` requests at a time.

    A busy (429) or absent server is asked again with growing pauses, or when it says in
    `Retry-After`; when it was away for `give_up_s` without an answer, the engine counts as dead,
    with or without work inside.
    """

    def __init__(
        self,
        url: str,
        model: str,
        kind: EngineKind = EngineKind.GENERATE,
        *,
        api_key: str = "",
        slots: int = 32,
        max_model_len: int | None = None,
        give_up_s: float = 120.0,
        start_timeout_s: float = 900.0,
        max_n: int = 16,
        media_domains: tuple[str, ...] = (),
        must_sleep: bool = False,
    ) -> None:
        self._must_sleep = must_sleep
        self._address = url.rstrip("/").removesuffix("/v1")
        self._url = shown(self._address)
        self._model = model
        self._kind = kind
        self._api_key = api_key
        self._slot_count = slots
        self._max_model_len = max_model_len
        self._give_up_s = give_up_s
        self._start_timeout_s = start_timeout_s
        self._door = Door(model, kind, max_n, media_domains)
        self._slots = PrioritySlots(slots)
        self._client: httpx.AsyncClient | None = None
        self._facts: ServerFacts | None = None
        self._watch: asyncio.Task[None] | None = None
        self._calls: set[asyncio.Future[Any]] = set()
        self._seen_at = 0.0
        self._heard_at = 0.0
        self._away = False
        self._steps = 0
        self._generated = 0
        self._progress: float | None = None

    @classmethod
    def from_settings(cls, settings: Settings, model: str, kind: EngineKind) -> Self:
        """As the settings say. Raises ConfigurationError without an engine URL."""
        if not settings.engine_url:
            raise ConfigurationError(
                "The engine 'openai' needs the address of its server: set QLM_ENGINE_URL or "
                "pass --url.",
                param="engine_url",
            )
        domains = settings.engine_args.get("allowed_media_domains", ())
        return cls(
            settings.engine_url,
            model,
            kind,
            api_key=settings.engine_api_key,
            slots=settings.slots,
            max_model_len=settings.max_model_len,
            give_up_s=settings.stall_s * _GIVE_UP,
            start_timeout_s=settings.start_timeout_s,
            max_n=settings.max_n,
            media_domains=tuple(domains) if isinstance(domains, list | tuple) else (),
            must_sleep=settings.swaps,
        )

    @property
    def facts(self) -> ServerFacts | None:
        """What the probe at start learned about the server, None before."""
        return self._facts

    async def start(self) -> EngineInfo:
        """Learn what the server can do, waiting for it to come up; EngineDead when it does not."""
        headers = {"content-type": "application/json"}
        if self._api_key:
            headers["authorization"] = f"Bearer {self._api_key}"
        self._client = httpx.AsyncClient(
            base_url=self._address,
            headers=headers,
            # An answer takes as long as it takes; the watch notices a server that hangs.
            timeout=httpx.Timeout(None, connect=10.0, write=60.0),
            limits=httpx.Limits(
                max_connections=self._slot_count + 4,
                max_keepalive_connections=self._slot_count + 4,
            ),
        )
        try:
            self._facts = await probe(self._client, self._model, self._kind, self._start_timeout_s)
            if self._must_sleep:
                self._check_sleeps(self._facts)
        except BaseException:
            await self.stop()
            raise
        if not self._facts.takes_priority:
            log.warning(
                "This server ignores priorities: what is inside it runs in its own order. Fewer "
                "QLM_SLOTS keep more of the order here.",
                url=self._url,
            )
        self._seen_at = time.monotonic()
        self._heard(200)
        self._watch = asyncio.create_task(self._look())
        return self._info()

    def _info(self) -> EngineInfo:
        facts = self._facts
        length = (facts and facts.max_model_len) or self._max_model_len or 8192
        return EngineInfo(
            model=self._model,
            kind=self._kind,
            max_model_len=length,
            slots=self._slot_count,
            kv_tokens=(facts and facts.kv_tokens) or self._slot_count * length,
            supports=facts.supports if facts else frozenset(),
        )

    async def answer(self, request: EngineRequest) -> EngineAnswer:
        """Serve one request to its end; cancelling the call hangs up on the server."""
        content = self._content(request)
        if isinstance(content, EngineAnswer):
            return content
        began = time.perf_counter()
        async with self._slots.place(request.priority):
            response = await self._post(request, content)
        duration_s = time.perf_counter() - began
        return self._shape(response, duration_s)

    async def open_stream(self, request: EngineRequest) -> EngineAnswer | Stream:
        """Serve one request as a stream; closing it hangs up on the server."""
        content = self._content(request, streamed=True)
        if isinstance(content, EngineAnswer):
            return content
        began = time.perf_counter()
        async with AsyncExitStack() as stack:
            await stack.enter_async_context(self._slots.place(request.priority))
            response = await self._post(request, content, streamed=True)
            stack.push_async_callback(response.aclose)
            if "event-stream" in response.headers.get("content-type", ""):
                return await opened(self._events(response, stack.pop_all()))
            try:
                await response.aread()
            except httpx.HTTPError:
                return error_event_answer(error_event(_HUNG_UP, 502))
            return self._shape(response, time.perf_counter() - began)

    def _content(self, request: EngineRequest, *, streamed: bool = False) -> bytes | EngineAnswer:
        if self._client is None:
            raise EngineDead(f"The engine at {self._url} is not running.")
        body = self._door.read(request, streamed=streamed)
        if isinstance(body, EngineAnswer):
            return body
        if self._facts is not None and self._facts.takes_priority:
            body["priority"] = request.priority
            if request.cache_salt:
                body["cache_salt"] = request.cache_salt
        return orjson.dumps(body)

    async def _events(
        self, response: httpx.Response, held: AsyncExitStack
    ) -> AsyncGenerator[str, None]:
        """The data of the server's events; `held` is given back at the end."""
        async with held:
            lines = _lines_of(response)
            while True:
                line = await self._next_line(lines)
                if self._client is None:
                    raise EngineDead(f"The engine at {self._url} was stopped.")
                if line is None:
                    yield error_event(_HUNG_UP, 502)
                    return
                field, _, value = line.partition(":")
                if field != "data":
                    continue
                if (event := value.strip()) == DONE:
                    return
                self._steps += 1
                self._generated += 1  # Servers send about one token an event.
                self._seen_at = time.monotonic()
                self._heard(200)
                yield event

    async def _next_line(self, lines: AsyncIterator[str]) -> str | None:
        """The next line of a stream, None when the server sends no more."""
        waiting = asyncio.ensure_future(anext(lines))
        self._calls.add(waiting)
        try:
            return await waiting
        except (httpx.HTTPError, StopAsyncIteration):
            return None
        except asyncio.CancelledError:
            if self._client is None and waiting.cancelled():
                raise EngineDead(f"The engine at {self._url} was stopped.") from None
            raise
        finally:
            self._calls.discard(waiting)

    def stats(self) -> EngineStats:
        """What this client has under way. Raises EngineDead when it stopped, or the server did."""
        if self._client is None:
            raise EngineDead(f"The engine at {self._url} is not running.")
        if self._away and time.monotonic() - self._heard_at > self._give_up_s:
            raise self._gone()
        return EngineStats(
            step=self._steps,
            running=self._slots.taken,
            waiting=self._slots.waiting,
            kv_usage=0.0,
            generated_tokens=self._generated,
        )

    async def sleep(self) -> Residency:
        """Let the server sleep, where it is a vLLM in development mode."""
        await self._ask("/sleep", {"level": "1"})
        return Residency.ASLEEP

    async def wake(self) -> EngineInfo:
        """Wake the server, or begin with it where that was not done yet."""
        if self._client is None:
            return await self.start()
        await self._ask("/wake_up", {})
        return self._info()

    def _check_sleeps(self, facts: ServerFacts) -> None:
        if Lso.SWAP not in facts.supports:
            raise ConfigurationError(
                f"The server at {self._url} cannot sleep: start it with --enable-sleep-mode and "
                "VLLM_SERVER_DEV_MODE=1, or unset QLM_MODELS_AWAKE.",
                param="models_awake",
            )

    async def _ask(self, path: str, query: dict[str, str]) -> None:
        if self._client is None or self._facts is None:
            raise EngineDead(f"The engine at {self._url} is not running.")
        self._check_sleeps(self._facts)
        try:
            response = await self._client.post(path, params=query, timeout=None)
        except httpx.HTTPError as error:
            raise EngineDead(f"The engine at {self._url} did not answer to {path}.") from error
        self._heard(response.status_code)
        if response.status_code != 200:
            raise EngineDead(f"The engine at {self._url} answered {response.status_code}.")

    async def stop(self) -> None:
        """Hang up; the server goes on. Safe to call twice."""
        client, self._client = self._client, None
        tasks = [*self._calls] + ([self._watch] if self._watch else [])
        self._watch = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if client is not None:
            await client.aclose()

    async def _post(
        self, request: EngineRequest, content: bytes, *, streamed: bool = False
    ) -> httpx.Response:
        """The first answer that is not a plea to come back later."""
        began = time.monotonic()
        pause_s = _FIRST_PAUSE_S
        while True:
            response = await self._post_once(request, content, streamed)
            self._heard(None if response is None else response.status_code)
            now = time.monotonic()
            if response is not None and response.status_code == 401:
                # About the worker's key, not the caller's: no request has to fail for it.
                await response.aclose()
                raise self._refused()
            if response is not None and response.status_code not in AWAY:
                self._seen_at = now
                if response.status_code != 429:
                    self._steps += 1
                    return response
            elif now - max(self._seen_at, began) > self._give_up_s:
                raise self._gone()
            asked_s = None if response is None else _retry_after_s(response)
            if response is not None:
                await response.aclose()
            # Spread, so that all slots do not come back in one moment.
            spread = random.uniform(0.5, 1.0)  # noqa: S311
            await asyncio.sleep(asked_s if asked_s is not None else pause_s * spread)
            pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)

    async def _post_once(
        self, request: EngineRequest, content: bytes, streamed: bool
    ) -> httpx.Response | None:
        """One try; None when the server could not be reached."""
        if self._client is None:
            raise EngineDead(f"The engine at {self._url} was stopped.")
        headers = {"x-request-id": request.request_id}
        post = self._client.build_request(
            "POST", request.endpoint, content=content, headers=headers
        )
        call = asyncio.ensure_future(self._client.send(post, stream=streamed))
        self._calls.add(call)
        try:
            return await call
        except httpx.TransportError:
            return None
        except asyncio.CancelledError:
            if self._client is None and call.cancelled():
                raise EngineDead(f"The engine at {self._url} was stopped.") from None
            if call.done() and not call.cancelled() and call.exception() is None:
                # It came in the moment the caller left, and would hold its connection for ever.
                await call.result().aclose()
            raise
        finally:
            self._calls.discard(call)

    async def _look(self) -> None:
        """Move the step counter while the server makes progress, also during long answers."""
        while self._client is not None:
            await asyncio.sleep(_LOOK_S)
            try:
                response = await self._client.get("/metrics", timeout=_LOOK_S)
                if response.status_code == 200:
                    progress = metric_sum(response.text, _PROGRESS)
                    if progress is not None:
                        self._heard(200)
                        self._steps += progress != self._progress
                        self._progress = progress
                        continue
                alive = await self._client.get("/v1/models", timeout=_LOOK_S)
            except httpx.HTTPError:
                self._heard(None)
                continue
            self._heard(alive.status_code)
            self._steps += alive.status_code == 200

    def _heard(self, status: int | None) -> None:
        """The server answered with this status, or not at all."""
        self._away = status is None or status in AWAY
        if not self._away:
            self._heard_at = time.monotonic()

    def _gone(self) -> EngineDead:
        return EngineDead(
            f"The engine at {self._url} has not answered for {self._give_up_s:.0f} s."
        )

    def _refused(self) -> EngineDead:
        return EngineDead(
            f"The engine at {self._url} refuses the worker's key; set QLM_ENGINE_API_KEY."
        )

    def _shape(self, response: httpx.Response, duration_s: float) -> EngineAnswer:
        try:
            parsed: Any = orjson.loads(response.content)
        except json.JSONDecodeError:
            parsed = None
        if not isinstance(parsed, dict):
            status = response.status_code if response.status_code >= 400 else 502
            return error_answer(
                status,
                f"The engine answered {response.status_code} without a JSON object.",
                type_="server_error" if status >= 500 else "invalid_request_error",
            )
        usage = usage_of(parsed.get("usage"))
        self._generated += usage.output_tokens
        return EngineAnswer(
            response.status_code, response.text, usage, None, duration_s, cut_in(parsed)
        )


async def _lines_of(response: httpx.Response) -> AsyncIterator[str]:
    """The lines of a stream of events; httpx's own also end at signs that may stand in an event."""
    rest = b""
    async for chunk in response.aiter_bytes():
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line.removesuffix(b"\r").decode(errors="replace")
    if rest:
        yield rest.decode(errors="replace")


def _retry_after_s(response: httpx.Response) -> float | None:
    """Seconds the server asks to wait, at most a minute; None when it does not say."""
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        with contextlib.suppress(KeyError, ValueError):
            return min(60.0, max(0.0, float(response.headers[name]) * scale))
    return None
