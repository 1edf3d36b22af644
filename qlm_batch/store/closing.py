"""Closing slices: their rows are added to the batch, and the last one settles it.

Everyone locks slices in the order of their ids first, and batches in the order of theirs after.
"""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy.engine import Connection

from qlm_batch.domain.jobs import SliceState
from qlm_batch.store.sql import sql

_CLOSE = sql(
    """
    UPDATE slice s
    SET state = CAST(:state AS text),
        missed = s.missed OR (CAST(:state AS text) = 'expired' AND b.deadline <= {now}),
        failed = s.failed + s.remaining, remaining = 0,
        lease_until = NULL, preempt = false
    FROM batch b
    WHERE s.id = ANY(CAST(:ids AS bigint[])) AND s.state IN ('queued', 'assigned', 'leased')
      AND b.id = s.batch_id
    """
)

_LOCK_BATCHES = sql(
    """
    SELECT id FROM batch
    WHERE id IN (SELECT batch_id FROM slice WHERE id = ANY(CAST(:ids AS bigint[])))
    ORDER BY id FOR NO KEY UPDATE
    """
)

_SETTLE = sql(
    """
    UPDATE batch b
    SET completed = b.completed + d.completed,
        failed = b.failed + d.failed,
        input_tokens = b.input_tokens + d.input_tokens,
        cached_tokens = b.cached_tokens + d.cached_tokens,
        output_tokens = b.output_tokens + d.output_tokens,
        reasoning_tokens = b.reasoning_tokens + d.reasoning_tokens,
        missed = b.missed OR d.missed,
        open_slices = b.open_slices - d.slices,
        state = CASE WHEN b.open_slices = d.slices AND b.state = 'in_progress'
                     THEN 'finalizing' ELSE b.state END,
        finalizing_at = CASE WHEN b.open_slices = d.slices AND b.state = 'in_progress'
                             THEN {now} ELSE b.finalizing_at END
    FROM (
        SELECT batch_id, count(*) AS slices, bool_or(missed) AS missed,
               sum(completed) AS completed, sum(failed) AS failed,
               sum(input_tokens) AS input_tokens, sum(cached_tokens) AS cached_tokens,
               sum(output_tokens) AS output_tokens, sum(reasoning_tokens) AS reasoning_tokens
        FROM slice WHERE id = ANY(CAST(:ids AS bigint[])) GROUP BY batch_id
    ) d
    WHERE b.id = d.batch_id
    RETURNING b.id, b.state
    """
)


def close_slices(connection: Connection, ids: Sequence[int], state: SliceState) -> int:
    """Close open slices that the caller has locked; lines without a row count as failed.

    Returns how many batches that settled.
    """
    if not ids:
        return 0
    connection.execute(_CLOSE, {"ids": list(ids), "state": state.value})
    return settle(connection, ids)


def settle(connection: Connection, ids: Sequence[int]) -> int:
    """Add slices just closed to their batches; returns how many batches have none open any more."""
    if not ids:
        return 0
    connection.execute(_LOCK_BATCHES, {"ids": list(ids)})
    settled = connection.execute(_SETTLE, {"ids": list(ids)}).all()
    return sum(row.state == "finalizing" for row in settled)
