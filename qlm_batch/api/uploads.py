"""From the network to the blob store: an upload is spooled, hashed, checked and then adopted."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request

from qlm_batch.api.multipart import MultipartUpload, boundary_of, too_large
from qlm_batch.api.services import ApiServices
from qlm_batch.domain.errors import InvalidInput, NotFound, QlmError, Unavailable
from qlm_batch.domain.jobs import FilePurpose, FileRecord
from qlm_batch.ids import FILE, new_id
from qlm_batch.intake.scratch import make_scratch

EXPIRY_MIN_S, EXPIRY_MAX_S = 3600, 30 * 86400

_CHUNK_BYTES = 1024**2
_FORM_OVERHEAD = 64 * 1024
_MAX_NAME = 200
_UNPRINTABLE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


@dataclass(frozen=True, slots=True)
class Spool:
    """Where one upload lies while it arrives."""

    path: Path
    file: BinaryIO


async def receive_file(request: Request, services: ApiServices, tenant: str) -> FileRecord:
    """Take the upload in `request` as a file of `tenant`.

    Raises InvalidInput for what the contract does not allow. Memory stays bounded for any size,
    and nothing is left behind unless the file is recorded.
    """
    boundary = boundary_of(request.headers.get("content-type"))
    limit = services.settings.max_file_bytes
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and len(declared) < 20 and int(declared) > limit + _FORM_OVERHEAD:
        raise too_large()
    spool = await run_in_threadpool(_open_spool, spool_dir(services))
    try:
        upload = MultipartUpload(boundary, spool.file, limit)
        await _feed(upload, request.stream())
        return await run_in_threadpool(_keep, services, tenant, upload, spool)
    except OSError as error:
        raise _no_room() from error
    finally:
        await run_in_threadpool(_discard, spool)


def spool_dir(services: ApiServices) -> Path:
    """Where uploads lie while they arrive."""
    return services.settings.data_dir / "spool"


async def _feed(upload: MultipartUpload, stream: AsyncIterator[bytes]) -> None:
    """Give the stream to `upload`; while one piece is hashed and written the next arrives."""
    feeding: asyncio.Future[None] | None = None
    try:
        async for pieces in _gathered(stream):
            if feeding is not None:
                await feeding
            feeding = asyncio.ensure_future(run_in_threadpool(upload.feed, pieces))
    finally:
        # Nobody may close the spool under a thread that still writes to it.
        if feeding is not None:
            await feeding


async def _gathered(stream: AsyncIterator[bytes]) -> AsyncIterator[list[bytes]]:
    """The stream in lists of about a megabyte, so that few thread switches are needed."""
    pieces: list[bytes] = []
    size = 0
    async for piece in stream:
        pieces.append(piece)
        size += len(piece)
        if size >= _CHUNK_BYTES:
            yield pieces
            pieces, size = [], 0
    yield pieces


def _open_spool(folder: Path) -> Spool:
    try:
        handle, path = make_scratch(folder, ".part")
    except OSError as error:
        raise _no_room() from error
    return Spool(path, os.fdopen(handle, "wb", buffering=_CHUNK_BYTES))


def _no_room() -> Unavailable:
    return Unavailable(
        "The service cannot store uploads now; its disk is full or refuses to write.",
        code="storage_unavailable",
    )


def _discard(spool: Spool) -> None:
    # What is still buffered may not fit on the disk either, and is not wanted any more.
    with suppress(OSError):
        spool.file.close()
    spool.path.unlink(missing_ok=True)


def _keep(services: ApiServices, tenant: str, upload: MultipartUpload, spool: Spool) -> FileRecord:
    expires_after_s = _expiry(upload.finish())
    spool.file.flush()
    file_id = new_id(FILE)
    now = services.store.now()
    record = FileRecord(
        id=file_id,
        tenant=tenant,
        purpose=FilePurpose.BATCH,
        filename=safe_filename(upload.filename or ""),
        bytes=upload.size,
        sha256=upload.sha256,
        blob_key=f"files/{file_id}",
        created_at=now,
        expires_at=None if expires_after_s is None else now + expires_after_s,
    )
    services.store.expect_blob(record.blob_key)
    services.blobs.adopt(record.blob_key, str(spool.path))
    try:
        services.store.add_file(record)
    except BaseException:
        if _is_absent(services, record):
            services.blobs.delete(record.blob_key)
            services.store.blobs_removed([record.blob_key])
        raise
    return record


def _is_absent(services: ApiServices, record: FileRecord) -> bool:
    """Whether the record is certainly not there: a commit may have lost no more than its answer."""
    try:
        services.store.file(record.tenant, record.id)
    except NotFound:
        return True
    except QlmError:
        return False
    return False


def _expiry(fields: Mapping[str, str]) -> int | None:
    purpose = fields.get("purpose")
    if purpose is None:
        raise InvalidInput(
            "Missing required parameter: 'purpose'.",
            code="missing_required_parameter",
            param="purpose",
        )
    if purpose != FilePurpose.BATCH:
        raise InvalidInput(
            f"Invalid value for 'purpose': {purpose[:40]!r}. This service takes 'batch'.",
            code="invalid_value",
            param="purpose",
        )
    anchor, seconds = (fields.get(f"expires_after[{part}]") for part in ("anchor", "seconds"))
    if anchor is None and seconds is None:
        return None
    if anchor != "created_at":
        raise InvalidInput(
            "'expires_after[anchor]' must be 'created_at'.",
            code="invalid_value",
            param="expires_after[anchor]",
        )
    allowed = seconds is not None and seconds.isdecimal() and len(seconds) < 9
    if not allowed or not EXPIRY_MIN_S <= int(seconds or 0) <= EXPIRY_MAX_S:
        raise InvalidInput(
            f"'expires_after[seconds]' must be a whole number from {EXPIRY_MIN_S} "
            f"to {EXPIRY_MAX_S}.",
            code="invalid_value",
            param="expires_after[seconds]",
        )
    return int(seconds or 0)


def safe_filename(name: str) -> str:
    """The last part of a client's path, without what could trick a terminal, header or shell."""
    last = re.split(r"[/\\]", name)[-1]
    kept = _UNPRINTABLE.sub("", last).strip()[-_MAX_NAME:]
    return kept if kept.strip(".") else "upload.jsonl"
