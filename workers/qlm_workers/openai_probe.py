"""What an OpenAI-compatible server is and can do, learned by asking it."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import Collection
from dataclasses import dataclass

import httpx
import structlog

from qlm_batch.domain.engine import Lso
from qlm_batch.domain.errors import ConfigurationError, EngineDead
from qlm_batch.domain.jobs import CHAT, COMPLETIONS, EMBEDDINGS, EngineKind
from qlm_workers.naming import shown

log = structlog.get_logger(__name__)

AWAY = frozenset({502, 503, 504})
"""Answers of what stands before a server that is not there."""
NOT_NOW = AWAY | {429}
"""Answers of a server, or of what stands before it, that will say something else later."""
_PAUSE_S = 1.0
_TELL_S = 30.0
_ASK_S = 60.0
_SAMPLE = re.compile(r'([^{ ]+)(?:\{(?:[^"}]|"(?:[^"\\]|\\.)*")*\})?\s+(\S+)')
"""The name and the value in a line of Prometheus's text; a timestamp may follow."""


@dataclass(frozen=True, slots=True)
class ServerFacts:
    """What the probe learned; None or False where the server does not tell.

    `takes_priority`: a body's `priority` is accepted (vLLM; it orders work there when the server
    runs with `--scheduling-policy priority` and is without effect otherwise).
    """

    is_vllm: bool
    takes_priority: bool
    max_model_len: int | None
    kv_tokens: int | None
    supports: frozenset[Lso]

    def describe(self) -> str:
        """One line for people: the operations this engine supports and those it does not."""
        words = [f"{lso.value}: {'yes' if lso in self.supports else 'no'}" for lso in Lso]
        return f"{'vLLM' if self.is_vllm else 'OpenAI-compatible'} server; " + ", ".join(words)


async def probe(
    client: httpx.AsyncClient, model: str, kind: EngineKind, patience_s: float
) -> ServerFacts:
    """Ask until the server is up, for at most `patience_s`.

    Raises EngineDead when it stays away or busy, and ConfigurationError when its address is none,
    it refuses the key, does not serve the model, or serves it for another kind of work.
    """
    asking = _Asking(client, time.monotonic() + patience_s)
    card = await _model_card(asking, model)
    is_vllm = card.get("owned_by") == "vllm"
    await _check_kind(asking, model, kind)
    takes_priority = is_vllm and await _accepts(asking, model, kind, priority=1)
    # Pulling in order and moving work elsewhere need nothing but the client's own queue.
    supports = {Lso.PULL, Lso.BALANCE}
    if is_vllm and (await asking.for_answer("/is_sleeping")).status_code == 200:
        supports.add(Lso.SWAP)
    length = card.get("max_model_len")
    return ServerFacts(
        is_vllm=is_vllm,
        takes_priority=takes_priority,
        max_model_len=length if isinstance(length, int) else None,
        kv_tokens=await _kv_tokens(client),
        supports=frozenset(supports),
    )


def metric_sum(text: str, names: Collection[str]) -> float | None:
    """The sum of Prometheus samples with these names; None when there is none that can be read."""
    found = [
        value
        for line in text.splitlines()
        if line.startswith(tuple(names)) and (value := _sample(line, names)) is not None
    ]
    return sum(found) if found else None


def _sample(line: str, names: Collection[str]) -> float | None:
    found = _SAMPLE.match(line)
    if found is None or found[1] not in names:
        return None
    try:
        value = float(found[2])
    except ValueError:
        return None
    return value if math.isfinite(value) else None


@dataclass(frozen=True, slots=True)
class _Asking:
    """Questions to a server that may not be up yet, or busy, until `deadline`."""

    client: httpx.AsyncClient
    deadline: float

    async def for_answer(
        self,
        path: str,
        body: dict[str, object] | None = None,
        among: Collection[int] | None = None,
    ) -> httpx.Response:
        """The first answer that is not a plea to come back later, and of a status `among` these.

        GET without a `body`. Waiting is logged every half minute.
        """
        method = "GET" if body is None else "POST"
        told_at = time.monotonic()
        while True:
            try:
                response = await self.client.request(method, path, json=body, timeout=_ASK_S)
                status = response.status_code
                if status not in NOT_NOW and (among is None or status in among):
                    return response
                problem = f"answered {status} to {path}"
            except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
                raise ConfigurationError(
                    f"{self.url} is no address of a server; check QLM_ENGINE_URL.",
                    param="engine_url",
                ) from error
            except httpx.HTTPError as error:
                problem = f"could not be asked ({type(error).__name__})"
            now = time.monotonic()
            if now + _PAUSE_S > self.deadline:
                raise EngineDead(
                    f"The engine at {self.url} {problem} for as long as it was waited for; "
                    "check QLM_ENGINE_URL and that the server runs.",
                    param="engine_url",
                )
            if now - told_at >= _TELL_S:
                left_s = round(self.deadline - now)
                log.warning("engine_waited_for", url=self.url, problem=problem, left_s=left_s)
                told_at = now
            await asyncio.sleep(_PAUSE_S)

    @property
    def url(self) -> str:
        """Where the server is, without a password."""
        return shown(str(self.client.base_url))


async def _model_card(asking: _Asking, model: str) -> dict[str, object]:
    # What stands before an absent server says anything, also that there is no such page.
    response = await asking.for_answer("/v1/models", among=(200, 401, 403))
    if response.status_code in (401, 403):
        raise ConfigurationError(
            f"The engine at {asking.url} refuses the key; set QLM_ENGINE_API_KEY.",
            param="engine_api_key",
        )
    try:
        cards = {card["id"]: card for card in response.json()["data"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{asking.url} does not list models as OpenAI's API does; check QLM_ENGINE_URL.",
            param="engine_url",
        ) from error
    if model not in cards:
        raise ConfigurationError(
            f"The engine at {asking.url} serves {', '.join(cards) or 'no model'}, not "
            f"'{model}'; give one of its names as the model.",
            param="models",
        )
    return dict(cards[model])


async def _check_kind(asking: _Asking, model: str, kind: EngineKind) -> None:
    if not await _accepts(asking, model, kind):
        other = "an embedding" if kind is EngineKind.GENERATE else "a generating"
        hint = f"embed:{model}" if kind is EngineKind.GENERATE else model
        raise ConfigurationError(
            f"The engine at {asking.url} does not answer requests to '{model}' for "
            f"{kind.value}; if it is {other} model, name it '{hint}'.",
            param="models",
        )


async def _accepts(asking: _Asking, model: str, kind: EngineKind, **fields: object) -> bool:
    body: dict[str, object] = {"model": model, **fields}

    async def good(path: str, **asked: object) -> bool:
        return (await asking.for_answer(path, body | asked)).status_code == 200

    if kind is EngineKind.EMBED:
        return await good(EMBEDDINGS, input="a")
    if await good(COMPLETIONS, prompt="a", max_tokens=1):
        return True
    messages = [{"role": "user", "content": "a"}]
    return await good(CHAT, messages=messages, max_tokens=1)


async def _kv_tokens(client: httpx.AsyncClient) -> int | None:
    try:
        response = await client.get("/metrics", timeout=_ASK_S)
    except httpx.HTTPError:
        return None
    for line in response.text.splitlines():
        if line.startswith("vllm:cache_config_info{"):
            labels = dict(re.findall(r'(\w+)="([^"]*)"', line))
            blocks, size = labels.get("num_gpu_blocks", ""), labels.get("block_size", "")
            if blocks.isdigit() and size.isdigit():
                return int(blocks) * int(size)
    return None
