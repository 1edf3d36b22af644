"""`/v1/files`."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack
from typing import Annotated, Any, BinaryIO, Literal

import structlog
from fastapi import APIRouter, Query, Request
from starlette.responses import StreamingResponse

from qlm_batch.api import render
from qlm_batch.api.auth import Parts, Reader, Writer
from qlm_batch.api.responses import After, ObjectId, errors, known_shape, streamed
from qlm_batch.api.schemas import FileDeleted, FileObject, Page
from qlm_batch.api.uploads import EXPIRY_MAX_S, EXPIRY_MIN_S, receive_file
from qlm_batch.domain.errors import NotFound, QlmError
from qlm_batch.domain.jobs import FilePurpose

router = APIRouter(prefix="/v1/files", tags=["files"])
log = structlog.get_logger(__name__)

Purpose = Literal[
    "batch",
    "batch_output",
    "assistants",
    "assistants_output",
    "evals",
    "fine-tune",
    "fine-tune-results",
    "user_data",
    "vision",
]
"""What OpenAI lets a file be for."""

_STORED = frozenset(FilePurpose)
_CHUNK_BYTES = 256 * 1024
_UPLOAD_FORM: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file", "purpose"],
                    "additionalProperties": False,
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "purpose": {"type": "string", "enum": ["batch"]},
                        "expires_after[anchor]": {"type": "string", "enum": ["created_at"]},
                        "expires_after[seconds]": {
                            "type": "integer",
                            "minimum": EXPIRY_MIN_S,
                            "maximum": EXPIRY_MAX_S,
                        },
                    },
                    "dependentRequired": {
                        "expires_after[anchor]": ["expires_after[seconds]"],
                        "expires_after[seconds]": ["expires_after[anchor]"],
                    },
                }
            }
        },
    }
}


@router.post("", operation_id="upload_file", responses=errors(), openapi_extra=_UPLOAD_FORM)
async def upload(request: Request, parts: Parts, key: Writer) -> FileObject:
    """Upload a JSONL file with purpose `batch`."""
    return render.file_object(await receive_file(request, parts, key.tenant))


@router.get("", operation_id="list_files", responses=errors(404))
def list_files(
    parts: Parts,
    key: Reader,
    purpose: Purpose | None = None,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 10_000,
    order: Literal["asc", "desc"] = "desc",
) -> Page[FileObject]:
    """The caller's files, newest first; none of a purpose that is OpenAI's and not a batch's."""
    if purpose is not None and purpose not in _STORED:
        return render.whole([])
    found = parts.store.list_files(
        key.tenant,
        purpose=None if purpose is None else FilePurpose(purpose),
        after=known_shape(after, "file") if after else None,
        limit=limit,
        newest_first=order == "desc",
    )
    return render.page(found, render.file_object)


@router.get("/{file_id}", operation_id="get_file", responses=errors(404))
def get_file(file_id: ObjectId, parts: Parts, key: Reader) -> FileObject:
    """One file."""
    return render.file_object(parts.store.file(key.tenant, known_shape(file_id, "file")))


@router.delete("/{file_id}", operation_id="delete_file", responses=errors(404))
def delete_file(file_id: ObjectId, parts: Parts, key: Writer) -> FileDeleted:
    """Remove a file. A batch that was already read from it goes on."""
    record = parts.store.delete_file(key.tenant, known_shape(file_id, "file"))
    try:
        parts.blobs.delete(record.blob_key)
        parts.store.blobs_removed([record.blob_key])
    except QlmError as error:
        log.warning("bytes of a deleted file may remain", file=record.id, reason=error.message)
    return FileDeleted(id=record.id)


@router.get(
    "/{file_id}/content",
    operation_id="get_file_content",
    response_class=StreamingResponse,
    responses=errors(404)
    | {200: {"content": {"application/octet-stream": {}}, "description": "The raw bytes."}},
)
def get_content(file_id: ObjectId, parts: Parts, key: Reader) -> StreamingResponse:
    """The raw bytes of a file, whatever the request accepts."""
    record = parts.store.file(key.tenant, known_shape(file_id, "file"))
    with ExitStack() as opening:
        try:
            blob = opening.enter_context(parts.blobs.open(record.blob_key))
        except NotFound:
            raise NotFound(
                f"The content of file '{record.id}' is gone.", code="file_not_found"
            ) from None
        chunks = _chunks(blob, opening.pop_all())
    return StreamingResponse(
        streamed(chunks, next(chunks, b"")),
        media_type="application/octet-stream",
        headers={"content-length": str(record.bytes), "x-content-type-options": "nosniff"},
    )


def _chunks(blob: BinaryIO, held: ExitStack) -> Generator[bytes, None, None]:
    with held:
        while chunk := blob.read(_CHUNK_BYTES):
            yield chunk
