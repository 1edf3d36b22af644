"""Queries behind what owners do with their batches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from qlm_batch.domain.errors import Conflict, Unprocessable
from qlm_batch.domain.jobs import Batch, BatchSpec, BatchState, SliceState
from qlm_batch.domain.records import Page, QueueTotals
from qlm_batch.domain.snapshot import Decision
from qlm_batch.domain.transitions import CANCELLABLE, TERMINAL
from qlm_batch.store.batch_rows import batch_by_id, batches_by_id, no_such_batch
from qlm_batch.store.closing import close_slices
from qlm_batch.store.files import find_file, no_such_cursor, no_such_file
from qlm_batch.store.session import lift_timeouts
from qlm_batch.store.sql import sql
from qlm_batch.store.tables import batch

_INSERT = sql(
    """
    INSERT INTO batch (id, tenant, endpoint, input_file_id, completion_window, window_s, metadata,
        webhook, email, on_miss, strict, output_expires_after_s, idempotency_key, fingerprint,
        state, created_at, deadline)
    SELECT :id, :tenant, :endpoint, :input_file_id, :completion_window,
        CAST(:window_s AS float8), CAST(:metadata AS jsonb), :webhook, :email, :on_miss,
        CAST(:strict AS boolean), CAST(:output_expires_after_s AS float8), :idempotency_key,
        :fingerprint, 'validating', t.now, t.now + CAST(:window_s AS float8)
    FROM (SELECT {now} AS now) t
    ON CONFLICT (tenant, idempotency_key) WHERE idempotency_key IS NOT NULL DO NOTHING
    RETURNING id
    """
)


def create_batch(connection: Connection, batch_id: str, spec: BatchSpec) -> Batch:
    """Accept a batch. Raises NotFound without its file, Unprocessable for a key used otherwise."""
    first = _with_key(connection, spec)
    if first is not None:
        return first
    if find_file(connection, spec.tenant, spec.input_file_id) is None:
        raise no_such_file(spec.input_file_id)
    made = connection.execute(
        _INSERT,
        {
            "id": batch_id,
            "tenant": spec.tenant,
            "endpoint": spec.endpoint,
            "input_file_id": spec.input_file_id,
            "completion_window": spec.completion_window,
            "window_s": spec.window_s,
            "metadata": None if spec.metadata is None else json.dumps(dict(spec.metadata)),
            "webhook": spec.callbacks.webhook,
            "email": spec.callbacks.email,
            "on_miss": spec.on_miss.value,
            "strict": spec.strict,
            "output_expires_after_s": spec.output_expires_after_s,
            "idempotency_key": spec.idempotency_key,
            "fingerprint": spec.fingerprint,
        },
    ).one_or_none()
    # Nothing inserted: the same key arrived at the same time, and the other one was first.
    first = _with_key(connection, spec) if made is None else None
    return first or batch_by_id(connection, batch_id)


def _with_key(connection: Connection, spec: BatchSpec) -> Batch | None:
    if spec.idempotency_key is None:
        return None
    row = connection.execute(
        sa.select(batch.c.id, batch.c.fingerprint).where(
            batch.c.tenant == spec.tenant, batch.c.idempotency_key == spec.idempotency_key
        )
    ).one_or_none()
    if row is None:
        return None
    if row.fingerprint != spec.fingerprint:
        raise Unprocessable(
            f"The idempotency key '{spec.idempotency_key}' was used for a different batch,"
            f" '{row.id}'; send a new key.",
            code="idempotency_key_reused",
            param="idempotency_key",
        )
    return batch_by_id(connection, row.id)


def get_batch(connection: Connection, tenant: str, batch_id: str) -> Batch:
    """The tenant's batch. Raises NotFound."""
    found = batch_by_id(connection, batch_id)
    if found.spec.tenant != tenant:
        raise no_such_batch(batch_id)
    return found


def list_batches(connection: Connection, tenant: str, after: str | None, limit: int) -> Page[Batch]:
    """A page, newest first. Raises InvalidInput when `after` is no batch of the tenant."""
    query = sa.select(batch.c.id).where(batch.c.tenant == tenant)
    if after is not None:
        last = connection.scalar(
            sa.select(batch.c.seq).where(batch.c.id == after, batch.c.tenant == tenant)
        )
        if last is None:
            raise no_such_cursor("batch", after)
        query = query.where(batch.c.seq < last)
    ids = connection.scalars(query.order_by(batch.c.seq.desc()).limit(limit + 1)).all()
    return Page(tuple(batches_by_id(connection, ids[:limit])), has_more=len(ids) > limit)


_UNENDED = sql(
    """
    SELECT id FROM batch
    WHERE state IN ('validating', 'in_progress', 'finalizing', 'cancelling')
    ORDER BY deadline, seq LIMIT :limit
    """
)


def open_batches(connection: Connection, limit: int) -> Sequence[Batch]:
    """Batches of all tenants that have not ended, earliest deadline first."""
    ids = connection.scalars(_UNENDED, {"limit": limit}).all()
    return sorted(batches_by_id(connection, ids), key=lambda found: ids.index(found.id))


_OPEN_SLICES = sql(
    """
    SELECT id FROM slice
    WHERE batch_id = :batch_id AND state IN ('queued', 'assigned', 'leased')
    ORDER BY id FOR UPDATE
    """
)
_LOCK = sql("SELECT state, open_slices, generation FROM batch WHERE id = :id FOR NO KEY UPDATE")
_CANCELLING = sql(
    """
    UPDATE batch SET state = 'cancelling', cancelling_at = {now}, finalizing_at = NULL,
                     claim_holder = NULL, claim_until = NULL
    WHERE id = :id
    """
)


def cancel_batch(connection: Connection, tenant: str, batch_id: str) -> Batch:
    """Close every open slice and turn the batch `cancelling`. Raises Conflict when it has ended."""
    get_batch(connection, tenant, batch_id)
    slices = connection.scalars(_OPEN_SLICES, {"batch_id": batch_id}).all()
    row = _locked(connection, batch_id)
    state = BatchState(row.state)
    if state is BatchState.CANCELLING:
        return batch_by_id(connection, batch_id)
    if state not in CANCELLABLE:
        raise Conflict(
            f"Cannot cancel a batch with status '{state.value}'.",
            code="batch_not_cancellable",
            param="batch_id",
        )
    if row.open_slices > len(slices):
        # A slice was halved between the two locks; under this one no further can be.
        slices = connection.scalars(_OPEN_SLICES, {"batch_id": batch_id}).all()
    # First the slices: an open one is allowed only in a batch in progress.
    close_slices(connection, slices, SliceState.CANCELLED)
    connection.execute(_CANCELLING, {"id": batch_id})
    return batch_by_id(connection, batch_id)


def _locked(connection: Connection, batch_id: str) -> Any:
    row = connection.execute(_LOCK, {"id": batch_id}).one_or_none()
    if row is None:
        # It was forgotten since it was seen.
        raise no_such_batch(batch_id)
    return row


_RETRY = sql(
    """
    UPDATE batch
    SET generation = generation + 1, state = 'in_progress', failed = 0, missed = false,
        deadline = {now} + coalesce(CAST(:window_s AS float8), window_s),
        in_progress_at = {now}, finalizing_at = NULL, completed_at = NULL, expired_at = NULL,
        cancelling_at = NULL, cancelled_at = NULL, output_file_id = NULL, error_file_id = NULL,
        promise = NULL, claim_holder = NULL, claim_until = NULL
    WHERE id = :id
    """
)
# A line's own deadline belonged to the first attempt; a retry runs under the new window alone.
_RETRY_SLICES = sql(
    """
    INSERT INTO slice (run_id, batch_id, generation, lo, hi, deadline, expires_at,
                       remaining, prompt_tokens, max_tokens, unbounded)
    SELECT l.run_id, b.id, b.generation, min(l.position), max(l.position) + 1, b.deadline,
           CASE WHEN b.on_miss = 'expire' THEN b.deadline END,
           count(*), sum(l.prompt_tokens), coalesce(sum(l.max_tokens), 0),
           count(*) FILTER (WHERE l.max_tokens IS NULL)
    FROM batch b
    CROSS JOIN LATERAL (
        SELECT r.run_id, r.position, r.prompt_tokens, r.max_tokens,
               (row_number() OVER (PARTITION BY r.run_id ORDER BY r.position) - 1)
                   / b.slice_requests AS part
        FROM request r
        WHERE r.run_id IN (SELECT id FROM run WHERE batch_id = b.id)
          AND NOT EXISTS (SELECT FROM result x
                          WHERE x.run_id = r.run_id AND x.position = r.position AND x.ok)
    ) l
    WHERE b.id = :id
    GROUP BY b.id, l.run_id, l.part
    ORDER BY l.run_id, l.part
    """
)
_OPENED = sql("UPDATE batch SET open_slices = :slices WHERE id = :id")
_FORGET_ESTIMATE = sql("DELETE FROM estimate WHERE batch_id = :id")


def retry_batch(
    connection: Connection, tenant: str, batch_id: str, window_s: float | None
) -> Batch:
    """Start the next generation. Raises Conflict unless it ended with lines without a success."""
    get_batch(connection, tenant, batch_id)
    state = BatchState(_locked(connection, batch_id).state)
    now = batch_by_id(connection, batch_id)
    if state not in TERMINAL or state is BatchState.FAILED:
        raise Conflict(
            f"Cannot retry a batch with status '{state.value}'.",
            code="batch_not_retryable",
            param="batch_id",
        )
    if now.counts.completed == now.counts.total:
        raise Conflict(
            f"Batch '{batch_id}' has no failed lines to retry.",
            code="no_failed_lines",
            param="batch_id",
        )
    lift_timeouts(connection)
    connection.execute(_RETRY, {"id": batch_id, "window_s": window_s})
    slices = connection.execute(_RETRY_SLICES, {"id": batch_id}).rowcount
    connection.execute(_OPENED, {"id": batch_id, "slices": slices})
    connection.execute(_FORGET_ESTIMATE, {"id": batch_id})
    return batch_by_id(connection, batch_id)


_DECISIONS = sql(
    """
    SELECT kind, at, batch_id, group_key, instance, detail FROM decision
    WHERE batch_id = :batch_id ORDER BY id LIMIT :limit
    """
)


def decisions(connection: Connection, tenant: str, batch_id: str, limit: int) -> Sequence[Decision]:
    """The batch's story, oldest first. Raises NotFound."""
    get_batch(connection, tenant, batch_id)
    rows = connection.execute(_DECISIONS, {"batch_id": batch_id, "limit": limit})
    return [Decision(**row._mapping) for row in rows]


_TOTALS = sql(
    """
    SELECT count(*) AS batches, coalesce(sum(s.slices), 0)::bigint AS slices,
           coalesce(sum(s.requests), 0)::bigint AS requests,
           coalesce(sum(s.tokens), 0)::bigint AS tokens
    FROM batch b
    LEFT JOIN LATERAL (
        SELECT count(*) AS slices, sum(remaining) AS requests,
               sum(prompt_tokens + max_tokens) AS tokens
        FROM slice
        WHERE batch_id = b.id AND state IN ('queued', 'assigned', 'leased')
    ) s ON true
    WHERE b.state IN ('validating', 'in_progress', 'finalizing', 'cancelling')
      AND (CAST(:tenant AS text) IS NULL OR b.tenant = :tenant)
    """
)


def queue_totals(connection: Connection, tenant: str | None) -> QueueTotals:
    """Unfinished batches, their open slices, and the lines in them without an outcome."""
    return QueueTotals(**connection.execute(_TOTALS, {"tenant": tenant}).one()._mapping)
