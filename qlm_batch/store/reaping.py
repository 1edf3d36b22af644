"""The leader's sweep over slices that nobody will move otherwise."""

from __future__ import annotations

import json

from sqlalchemy.engine import Connection

from qlm_batch.domain.jobs import ResultRow, SliceState
from qlm_batch.domain.ledger import Reaped
from qlm_batch.ids import new_id
from qlm_batch.store.closing import close_slices
from qlm_batch.store.leadership import fence
from qlm_batch.store.loss import REQUEST, lose_all, requeue
from qlm_batch.store.results import lock_slices, positions_left, store_rows
from qlm_batch.store.sql import sql

_PASS = 5000

_EXPIRED = sql(
    """
    SELECT id FROM slice
    WHERE id IN (SELECT id FROM slice
                 WHERE state IN ('queued', 'assigned', 'leased') AND expires_at IS NOT NULL
                   AND expires_at <= {now}
                 LIMIT :most)
      AND state IN ('queued', 'assigned', 'leased')
    ORDER BY id FOR UPDATE
    """
)
_LOST = sql("SELECT id FROM slice WHERE state = 'leased' AND lease_until < {now} LIMIT :most")
_STRANDED = sql(
    """
    SELECT s.id FROM slice s
    WHERE s.id IN (
        SELECT a.id FROM slice a
        LEFT JOIN instance i ON i.name = a.instance AND i.retired_at IS NULL
        WHERE a.state = 'assigned' AND (i.name IS NULL OR i.beat_at < {now} - :silent_s)
        LIMIT :most
    ) AND s.state = 'assigned'
    ORDER BY s.id FOR UPDATE
    """
)
_SETTLED = sql(
    """
    UPDATE batch SET state = 'finalizing', finalizing_at = {now}
    WHERE id IN (SELECT id FROM batch WHERE state = 'in_progress' AND open_slices = 0
                 ORDER BY id FOR NO KEY UPDATE)
    """
)


def reap(connection: Connection, epoch: int, silent_s: float) -> Reaped:
    """One bounded pass: expire, requeue what was lost, end batches with nothing open.

    A lease that was renewed between the look and the lock is safe: it is looked at again.
    """
    fence(connection, epoch)
    most = {"most": _PASS}
    expired = connection.scalars(_EXPIRED, most).all()
    finished = close_slices(connection, expired, SliceState.EXPIRED)
    candidates = connection.scalars(_LOST, most).all()
    locked = lock_slices(connection, candidates) if candidates else {}
    run_out = [
        slice_id
        for slice_id, row in locked.items()
        if row.lease_until is not None and row.lease_until < row.now
    ]
    lost = lose_all(connection, run_out, "lease_lost") if run_out else Reaped()
    stranded = connection.scalars(_STRANDED, {**most, "silent_s": silent_s}).all()
    requeue(connection, stranded)
    finished += lost.finished_batches + connection.execute(_SETTLED).rowcount
    return Reaped(
        requeued=lost.requeued + len(stranded),
        bisected=lost.bisected,
        failed_lines=lost.failed_lines,
        expired=len(expired),
        finished_batches=finished,
    )


_UNSERVABLE = sql(
    """
    SELECT id FROM slice
    WHERE id IN (SELECT s.id FROM slice s JOIN run u ON u.id = s.run_id
                 WHERE u.model = :model AND s.state = 'queued' ORDER BY s.id LIMIT :limit)
      AND state = 'queued'
    ORDER BY id FOR UPDATE
    """
)


def fail_unservable(
    connection: Connection, epoch: int, model: str, message: str, limit: int
) -> int:
    """Give each line left in queued slices of `model` a 404; returns how many slices closed."""
    fence(connection, epoch)
    ids = connection.scalars(_UNSERVABLE, {"model": model, "limit": limit}).all()
    if not ids:
        return 0
    slices = lock_slices(connection, ids)
    body = json.dumps(
        {
            "error": {
                "message": message,
                "type": "invalid_request_error",
                "param": "model",
                "code": "model_not_found",
            }
        }
    )
    rows = [
        ResultRow(
            slice_id=slice_id,
            epoch=slices[slice_id].epoch,
            run_id=slices[slice_id].run_id,
            position=position,
            generation=slices[slice_id].generation,
            request_id=new_id(REQUEST),
            status_code=404,
            body=body,
        )
        for slice_id, position in positions_left(connection, ids)
    ]
    return len(store_rows(connection, slices, rows, None).closed)
