"""What the OpenAPI document says of errors, and bodies that stream."""

from __future__ import annotations

from collections.abc import AsyncIterator, Generator
from typing import Annotated, Any

import anyio
from fastapi import Path, Query
from starlette.concurrency import run_in_threadpool

from qlm_batch.api.schemas import ErrorEnvelope
from qlm_batch.domain.errors import NotFound

_MEANINGS = {
    400: "The request is not acceptable as it is; `param` names the field.",
    401: "No key, an unknown key or a revoked key.",
    403: "The key's role does not allow this.",
    404: "No such object of this tenant.",
    409: "The object's state does not allow this.",
    413: "The body is too large.",
    422: "The idempotency key was used before with another body.",
    429: "A limit was passed; `retry-after` says when to try again.",
    500: "A fault of the service.",
    503: "A part of the service is away; `retry-after` says when to try again.",
}

_MAX_ID = 128

After = Annotated[
    str | None,
    Query(max_length=_MAX_ID, description="The last id of the page before; empty is as if absent."),
]
ObjectId = Annotated[str, Path(description="The object's id.")]


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """OpenAPI entries for these statuses and for those every call with a key may answer."""
    return {
        status: {"model": ErrorEnvelope, "description": _MEANINGS[status]}
        for status in sorted({400, 401, 403, 429, 500, 503, *statuses})
    }


async def streamed(chunks: Generator[bytes, None, None], first: bytes) -> AsyncIterator[bytes]:
    """`first`, then the rest of `chunks`, each made on a thread; closed when the client leaves."""
    try:
        chunk: bytes | None = first
        while chunk is not None:
            yield chunk
            chunk = await run_in_threadpool(next, chunks, None)
    finally:
        with anyio.CancelScope(shield=True):
            await run_in_threadpool(chunks.close)


def known_shape(object_id: str, kind: str) -> str:
    """`object_id` when it could be one; NotFound otherwise, without asking the database."""
    if len(object_id) > _MAX_ID or not object_id.isascii() or not object_id.isprintable():
        raise NotFound(f"No {kind} found with that id.", code=f"{kind}_not_found")
    return object_id
