"""Rows of `batch` as the domain knows them, with the counts of slices still open."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy.engine import Connection

from qlm_batch.domain.errors import NotFound
from qlm_batch.domain.jobs import (
    Batch,
    BatchSpec,
    BatchState,
    Callbacks,
    Estimate,
    LineError,
    OnMiss,
    Promise,
    RequestCounts,
    Usage,
)
from qlm_batch.store.sql import sql

_TIMES = (
    "in_progress_at",
    "finalizing_at",
    "completed_at",
    "failed_at",
    "expired_at",
    "cancelling_at",
    "cancelled_at",
)

_BATCHES = sql(
    """
    SELECT b.*, e.batch_id AS estimated, e.p50, e.p95, e.miss, e.reason, e.made_at,
           coalesce(live.completed, 0)::bigint AS live_completed,
           coalesce(live.failed, 0)::bigint AS live_failed,
           coalesce(live.input_tokens, 0)::bigint AS live_input,
           coalesce(live.cached_tokens, 0)::bigint AS live_cached,
           coalesce(live.output_tokens, 0)::bigint AS live_output,
           coalesce(live.reasoning_tokens, 0)::bigint AS live_reasoning
    FROM batch b
    LEFT JOIN estimate e ON e.batch_id = b.id
    LEFT JOIN LATERAL (
        SELECT sum(s.completed) AS completed, sum(s.failed) AS failed,
               sum(s.input_tokens) AS input_tokens, sum(s.cached_tokens) AS cached_tokens,
               sum(s.output_tokens) AS output_tokens, sum(s.reasoning_tokens) AS reasoning_tokens
        FROM slice s
        WHERE s.batch_id = b.id AND s.epoch > 0 AND s.state IN ('queued', 'assigned', 'leased')
    ) live ON b.state = 'in_progress'
    WHERE b.id = ANY(CAST(:ids AS text[]))
    ORDER BY b.seq DESC
    """
)


def batches_by_id(connection: Connection, ids: Sequence[str]) -> list[Batch]:
    """The batches, newest first, each with rows of open slices counted."""
    return [_to_batch(row) for row in connection.execute(_BATCHES, {"ids": list(ids)})]


def batch_by_id(connection: Connection, batch_id: str) -> Batch:
    """The batch. Raises NotFound."""
    found = batches_by_id(connection, [batch_id])
    if not found:
        raise no_such_batch(batch_id)
    return found[0]


def no_such_batch(batch_id: str) -> NotFound:
    """The error for an id that names no batch of the tenant."""
    return NotFound(
        f"No batch found with id '{batch_id}'.", code="batch_not_found", param="batch_id"
    )


def _to_batch(row: Any) -> Batch:
    return Batch(
        id=row.id,
        spec=_to_spec(row),
        state=BatchState(row.state),
        generation=row.generation,
        created_at=row.created_at,
        deadline=row.deadline,
        counts=RequestCounts(
            row.total, row.completed + row.live_completed, row.failed + row.live_failed
        ),
        usage=Usage(
            row.input_tokens + row.live_input,
            row.cached_tokens + row.live_cached,
            row.output_tokens + row.live_output,
            row.reasoning_tokens + row.live_reasoning,
        ),
        models=tuple(row.models),
        errors=tuple(LineError(**error) for error in row.errors),
        error_count=row.error_count,
        output_file_id=row.output_file_id,
        error_file_id=row.error_file_id,
        estimate=None
        if row.estimated is None
        else Estimate(row.p50, row.p95, row.miss, row.reason, row.made_at),
        promise=None if row.promise is None else Promise(**row.promise),
        **{name: getattr(row, name) for name in _TIMES},
    )


def _to_spec(row: Any) -> BatchSpec:
    return BatchSpec(
        tenant=row.tenant,
        endpoint=row.endpoint,
        input_file_id=row.input_file_id,
        completion_window=row.completion_window,
        window_s=row.window_s,
        metadata=row.metadata,
        callbacks=Callbacks(webhook=row.webhook, email=row.email),
        on_miss=OnMiss(row.on_miss),
        strict=row.strict,
        output_expires_after_s=row.output_expires_after_s,
        idempotency_key=row.idempotency_key,
        fingerprint=row.fingerprint,
    )
