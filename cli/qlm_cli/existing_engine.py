"""A server that already runs, as `qlm up --engine openai` finds it."""

from __future__ import annotations

import asyncio

import httpx

from qlm_batch.domain.errors import ConfigurationError, EngineDead
from qlm_batch.domain.jobs import EngineKind
from qlm_workers.openai_probe import probe

_PATIENCE_S = 10.0


def look_at(url: str, api_key: str, models: tuple[str, ...]) -> tuple[tuple[str, ...], list[str]]:
    """The models to serve, all of the server's unless given, and a line on each.

    An embedding model is returned as `embed:NAME`. ConfigurationError when the server does not
    answer, refuses the key or does not serve a model.
    """
    try:
        return asyncio.run(_look_at(url, api_key, models))
    except EngineDead as error:
        raise ConfigurationError(error.message, param="engine_url") from error


async def _look_at(
    url: str, api_key: str, models: tuple[str, ...]
) -> tuple[tuple[str, ...], list[str]]:
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    base = url.rstrip("/").removesuffix("/v1")
    async with httpx.AsyncClient(base_url=base, headers=headers, trust_env=False) as client:
        named = models or await _served(client)
        found, lines = [], []
        for model in named:
            name, line = await _describe(client, model)
            found.append(name)
            lines.append(line)
    return tuple(found), lines


async def _served(client: httpx.AsyncClient) -> tuple[str, ...]:
    try:
        response = await client.get("/v1/models", timeout=_PATIENCE_S)
        response.raise_for_status()
        served = tuple(str(card["id"]) for card in response.json()["data"])
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"the server at {client.base_url} does not list its models ({error}); check --url and "
            "QLM_ENGINE_API_KEY, or name the models with --model"
        ) from error
    if not served:
        raise ConfigurationError(f"the server at {client.base_url} serves no model")
    return served


async def _describe(client: httpx.AsyncClient, model: str) -> tuple[str, str]:
    name = model.removeprefix("embed:")
    if name == model:
        try:
            facts = await probe(client, name, EngineKind.GENERATE, _PATIENCE_S)
            return name, f"{name}: {facts.describe()}"
        except ConfigurationError as error:
            refused = error
    else:
        refused = None
    try:
        facts = await probe(client, name, EngineKind.EMBED, _PATIENCE_S)
    except ConfigurationError as error:
        raise refused or error from None
    return f"embed:{name}", f"{name}: {facts.describe()}, embeddings"
