"""The REST application."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib import metadata
from typing import Any

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from qlm_batch.api import (
    batches,
    errors,
    files,
    fleet,
    foresight,
    health,
    interactive,
    models,
    results,
    stories,
    webhooks,
)
from qlm_batch.api.auth import KeyRing, require_key
from qlm_batch.api.edge import Edge
from qlm_batch.api.limits import RateLimiter
from qlm_batch.api.metrics import Metrics
from qlm_batch.api.server import run_api
from qlm_batch.api.services import ApiServices
from qlm_batch.api.uploads import spool_dir
from qlm_batch.dispatch.rates import SharedBuckets
from qlm_batch.intake.scratch import sweep_scratch

__all__ = ["create_app", "run_api"]

_DESCRIPTION = """Runs files of LLM requests by a deadline. Compatible with OpenAI's Files and
Batches API; what goes beyond it is under `qlm`. Every error has OpenAI's envelope."""


def create_app(services: ApiServices) -> FastAPI:
    """The application over these parts. It opens nothing itself and closes nothing."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await run_in_threadpool(_prepare_spool, services)
        try:
            async with _calling(services):
                yield
        finally:
            await app.state.limiter.close()

    app = FastAPI(
        title="qlm-batch",
        version=metadata.version("qlm-batch"),
        description=_DESCRIPTION,
        lifespan=lifespan,
        redirect_slashes=False,
        redoc_url=None,
    )
    app.state.services = services
    app.state.keys = KeyRing(services.store)
    redis_url = services.settings.redis_url
    app.state.limiter = RateLimiter(SharedBuckets(redis_url) if redis_url else None)
    app.state.metrics = Metrics(services.store)
    errors.install(app, require_key)
    most = dict.fromkeys(interactive.ENDPOINTS, services.settings.interactive_body_bytes)
    app.add_middleware(Edge, observe=app.state.metrics.observe, most_bytes=most)
    for part in (
        files,
        batches,
        results,
        interactive,
        foresight,
        stories,
        fleet,
        models,
        webhooks,
        health,
    ):
        app.include_router(part.router)
    app.openapi = _honest(app.openapi)  # type: ignore[method-assign]
    return app


@asynccontextmanager
async def _calling(services: ApiServices) -> AsyncIterator[None]:
    """Keep interactive calls going meanwhile, where there are any."""
    calls = services.calls
    if calls is None:
        yield
        return
    presence = asyncio.create_task(calls.keep_present())
    try:
        yield
    finally:
        presence.cancel()
        await asyncio.gather(presence, return_exceptions=True)
        await calls.shut()


def _honest(document: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    """Without FastAPI's own 422, which this application never answers: invalid input is a 400."""

    def honest() -> dict[str, Any]:
        made = document()
        for path in made["paths"].values():
            for operation in path.values():
                answers = operation["responses"]
                if "HTTPValidationError" in str(answers.get("422")):
                    del answers["422"]
        for name in ("HTTPValidationError", "ValidationError"):
            made["components"]["schemas"].pop(name, None)
        return made

    return honest


def _prepare_spool(services: ApiServices) -> None:
    folder = spool_dir(services)
    folder.mkdir(parents=True, exist_ok=True)
    sweep_scratch(folder)
