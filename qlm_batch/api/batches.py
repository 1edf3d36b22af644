"""`/v1/batches`."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from typing import Annotated

import orjson
import structlog
from fastapi import APIRouter, Header, Query

from qlm_batch.api import render
from qlm_batch.api.auth import Parts, Reader, Writer
from qlm_batch.api.limits import check_queued
from qlm_batch.api.responses import After, ObjectId, errors, known_shape
from qlm_batch.api.schemas import (
    BatchCreate,
    BatchObject,
    BatchRetry,
    DecisionObject,
    DeliveryObject,
    Page,
    ReplayObject,
)
from qlm_batch.api.services import ApiServices
from qlm_batch.api.targets import checked_callbacks
from qlm_batch.domain.durations import parse_window
from qlm_batch.domain.errors import InvalidInput, NotFound, QlmError
from qlm_batch.domain.jobs import BatchSpec, FilePurpose, OnMiss
from qlm_batch.domain.messages import Stopped
from qlm_batch.ids import BATCH, new_id

router = APIRouter(prefix="/v1/batches", tags=["batches"])
log = structlog.get_logger(__name__)

IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=255,
        pattern=r"^[\x20-\x7e]+$",
        description="Sent again with the same body, it returns the batch made the first time.",
    ),
]


@router.post("", operation_id="create_batch", responses=errors(404, 413, 422))
def create(
    asked: BatchCreate, parts: Parts, key: Writer, idempotency_key: IdempotencyKey = None
) -> BatchObject:
    """Run a file; answers at once, while the file is still to be read."""
    window_s = parse_window(asked.completion_window)
    callbacks = checked_callbacks(asked.callbacks, key.tenant, parts.settings)
    _check_input(parts, key.tenant, asked.input_file_id)
    check_queued(parts.store, key)
    expiry = asked.output_expires_after
    spec = BatchSpec(
        tenant=key.tenant,
        endpoint=asked.endpoint,
        input_file_id=asked.input_file_id,
        completion_window=asked.completion_window,
        window_s=window_s,
        metadata=asked.metadata,
        callbacks=callbacks,
        on_miss=OnMiss(asked.on_miss),
        strict=asked.strict,
        output_expires_after_s=None if expiry is None else float(expiry.seconds),
        idempotency_key=idempotency_key,
        fingerprint=_fingerprint(asked),
    )
    try:
        return render.batch_object(parts.store.create_batch(new_id(BATCH), spec))
    except NotFound as error:
        raise NotFound(error.message, code=error.code, param="input_file_id") from error


@router.get("", operation_id="list_batches", responses=errors(404))
def list_batches(
    parts: Parts,
    key: Reader,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> Page[BatchObject]:
    """The caller's batches, newest first."""
    found = parts.store.list_batches(
        key.tenant, after=known_shape(after, "batch") if after else None, limit=limit
    )
    return render.page(found, render.batch_object)


@router.get("/{batch_id}", operation_id="get_batch", responses=errors(404))
def get_batch(batch_id: ObjectId, parts: Parts, key: Reader) -> BatchObject:
    """One batch with live counts and its newest estimate."""
    return render.batch_object(parts.store.batch(key.tenant, known_shape(batch_id, "batch")))


@router.post("/{batch_id}/cancel", operation_id="cancel_batch", responses=errors(404, 409))
def cancel(batch_id: ObjectId, parts: Parts, key: Writer) -> BatchObject:
    """Stop a batch; lines already done keep their results."""
    batch = parts.store.cancel_batch(key.tenant, known_shape(batch_id, "batch"))
    if parts.dispatcher is not None:
        try:
            parts.dispatcher.stopped(Stopped(batch.id))
        except QlmError as error:
            log.warning("cancel hint lost", batch=batch.id, reason=error.message)
    return render.batch_object(batch)


@router.post("/{batch_id}/retry", operation_id="retry_batch", responses=errors(404, 409, 413))
def retry(
    batch_id: ObjectId, parts: Parts, key: Writer, asked: BatchRetry | None = None
) -> BatchObject:
    """Run the lines without a success again, as the batch's next generation."""
    window = asked.completion_window if asked else None
    window_s = None if window is None else parse_window(window)
    check_queued(parts.store, key)
    return render.batch_object(
        parts.store.retry_batch(key.tenant, known_shape(batch_id, "batch"), window_s)
    )


@router.get("/{batch_id}/deliveries", operation_id="list_deliveries", responses=errors(404))
def list_deliveries(batch_id: ObjectId, parts: Parts, key: Reader) -> Page[DeliveryObject]:
    """Every attempt to announce the batch's completion, oldest first."""
    log_of_batch = parts.store.deliveries(key.tenant, known_shape(batch_id, "batch"))
    return render.whole([render.delivery_object(item, attempt) for item, attempt in log_of_batch])


@router.post(
    "/{batch_id}/deliveries/replay", operation_id="replay_deliveries", responses=errors(404)
)
def replay_deliveries(batch_id: ObjectId, parts: Parts, key: Writer) -> ReplayObject:
    """Try the announcements again that were given up; those under way or delivered stay so."""
    replayed = parts.store.replay_dead(key.tenant, known_shape(batch_id, "batch"))
    return ReplayObject(replayed=replayed)


@router.get("/{batch_id}/decisions", operation_id="list_decisions", responses=errors(404))
def list_decisions(
    batch_id: ObjectId,
    parts: Parts,
    key: Reader,
    limit: Annotated[int, Query(ge=1, le=10_000)] = 1000,
) -> Page[DecisionObject]:
    """What the scheduler did with the batch and why, oldest first."""
    story = parts.store.decisions(key.tenant, known_shape(batch_id, "batch"), limit)
    return render.whole([render.decision_object(decision) for decision in story])


def _check_input(parts: ApiServices, tenant: str, file_id: str) -> None:
    # A file that is gone is the store's to judge: a repeated call must still find its batch.
    with suppress(NotFound):
        if parts.store.file(tenant, file_id).purpose is not FilePurpose.BATCH:
            raise InvalidInput(
                f"File '{file_id}' holds results. Upload the input with purpose 'batch'.",
                code="invalid_purpose",
                param="input_file_id",
            )


def _fingerprint(asked: BatchCreate) -> str:
    canonical = orjson.dumps(asked.model_dump(), option=orjson.OPT_SORT_KEYS)
    return hashlib.sha256(canonical).hexdigest()
