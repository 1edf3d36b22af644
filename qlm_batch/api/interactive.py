"""`/v1/chat/completions`, `/v1/completions` and `/v1/embeddings`: answered now."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from typing import Annotated

from fastapi import APIRouter, Header, Request, Response

from qlm_batch.api.asked import read_asked
from qlm_batch.api.auth import Parts, Writer
from qlm_batch.api.edge import FRESH_ID
from qlm_batch.api.errors import RETRY_AFTER_S
from qlm_batch.api.limits import TTFT_MS
from qlm_batch.api.responses import errors
from qlm_batch.api.services import ApiServices
from qlm_batch.api.sse import DONE, EventResponse, frames_of, while_there
from qlm_batch.api.watch import Watch
from qlm_batch.control.interactive import Call, Calls, Part
from qlm_batch.dispatch.streams import End
from qlm_batch.domain.errors import Unavailable
from qlm_batch.domain.jobs import CHAT, COMPLETIONS, EMBEDDINGS, ApiKey

router = APIRouter(tags=["interactive"])

ENDPOINTS = (CHAT, COMPLETIONS, EMBEDDINGS)
_MAX_TTFT_S = 3600.0
_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["model"],
                    "properties": {
                        "model": {"type": "string"},
                        "stream": {"type": "boolean", "default": False},
                    },
                    "additionalProperties": True,
                }
            }
        },
    }
}

Ttft = Annotated[
    float | None,
    Header(
        alias="x-qlm-ttft",
        description="Target for the first token, in seconds.",
        gt=0,
        le=_MAX_TTFT_S,
    ),
]


@router.post(
    CHAT,
    operation_id="create_chat_completion",
    responses=errors(404),
    openapi_extra=_BODY,
    response_class=Response,
)
async def chat(request: Request, parts: Parts, key: Writer, ttft: Ttft = None) -> Response:
    """OpenAI's chat completions; everything the engine's own server takes."""
    return await _answer(request, parts, key, CHAT, ttft)


@router.post(
    COMPLETIONS,
    operation_id="create_completion",
    responses=errors(404),
    openapi_extra=_BODY,
    response_class=Response,
)
async def completions(request: Request, parts: Parts, key: Writer, ttft: Ttft = None) -> Response:
    """OpenAI's completions."""
    return await _answer(request, parts, key, COMPLETIONS, ttft)


@router.post(
    EMBEDDINGS,
    operation_id="create_embedding",
    responses=errors(404),
    openapi_extra=_BODY,
    response_class=Response,
)
async def embeddings(request: Request, parts: Parts, key: Writer, ttft: Ttft = None) -> Response:
    """OpenAI's embeddings."""
    return await _answer(request, parts, key, EMBEDDINGS, ttft)


async def _answer(
    request: Request, services: ApiServices, key: ApiKey, endpoint: str, ttft: float | None
) -> Response:
    began = time.perf_counter()
    calls = services.calls
    if calls is None:
        raise Unavailable("This process has no way to the engines; set REDIS_URL.")
    asked = read_asked(await request.body(), endpoint)
    target_s = ttft or _target(key, services)
    call = await calls.open(
        key.tenant,
        endpoint,
        asked.model,
        asked.body,
        streamed=asked.streamed,
        ttft_s=target_s,
        request_id=getattr(request.state, FRESH_ID, None),
    )
    watch = Watch(request.app.state.metrics, calls, began, target_s)
    parts = calls.parts(call)
    try:
        async with while_there(request.receive):
            first = await anext(parts)
    except BaseException:
        calls.close(call)
        raise
    headers = {"x-qlm-instance": call.route.instance}
    if first.end is None or first.end.body is None:
        frames = _frames(first, parts, calls, call, watch, usage=asked.usage)
        return EventResponse(frames, headers)
    calls.close(call)
    if first.end.status < 400:
        watch.told((), first.end.since_first_s)
    watch.ended(first.end.status)
    return _whole(first.end, headers)


def _whole(end: End, headers: dict[str, str]) -> Response:
    if end.status in (429, 503):
        headers["retry-after"] = str(round(RETRY_AFTER_S))
    elif 400 <= end.status < 500:
        headers["x-should-retry"] = "false"
    return Response(end.body, end.status, headers, media_type="application/json")


async def _frames(
    part: Part,
    parts: AsyncGenerator[Part, None],
    calls: Calls,
    call: Call,
    watch: Watch,
    *,
    usage: bool,
) -> AsyncGenerator[bytes, None]:
    """The whole stream as bytes; closing it gives the request up."""
    try:
        while True:
            shown = [event for event in part.events if usage or not _only_usage(event)]
            if part.events:
                watch.told(part.events)
            end = part.end
            if end is not None and end.body is not None:
                shown.append(end.body.replace("\n", " "))
            if end is None:
                if shown:
                    yield frames_of(shown)
                part = await anext(parts)
                continue
            watch.ended(end.status)
            yield frames_of(shown) + DONE
            return
    finally:
        await parts.aclose()
        calls.close(call)


def _only_usage(event: str) -> bool:
    return '"choices":[]' in event or '"choices": []' in event


def _target(key: ApiKey, services: ApiServices) -> float:
    limit_ms = key.limits.get(TTFT_MS)
    return limit_ms / 1000 if limit_ms else services.settings.interactive_ttft_s
