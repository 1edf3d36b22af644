"""What becomes of slices that lost their lease, their engine or their instance."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy.engine import Connection

from qlm_batch.domain.jobs import ResultRow
from qlm_batch.domain.ledger import Reaped
from qlm_batch.domain.transitions import SUSPECT_AFTER, AfterLoss, after_lost_lease
from qlm_batch.ids import new_id
from qlm_batch.store.results import LockedSlice, lock_slices, positions_left, store_rows
from qlm_batch.store.sql import sql

POISON = "engine_crashed"
REQUEST = "req_"

_REQUEUE = sql(
    """
    UPDATE slice
    SET state = 'queued', instance = NULL, group_key = NULL, assigned_at = NULL, place = NULL,
        lease_until = NULL, preempt = false,
        attempts = CASE WHEN fruitful THEN 0 ELSE attempts END, fruitful = false
    WHERE id = ANY(CAST(:ids AS bigint[])) AND state IN ('assigned', 'leased')
    """
)
_FRUITLESS = sql(
    """
    UPDATE slice SET attempts = attempts + 1
    WHERE id = ANY(CAST(:ids AS bigint[])) AND NOT fruitful
    """
)
_RECORD = sql(
    """
    INSERT INTO attempt_error (run_id, generation, lo, hi, slice_id, epoch, instance, reason, at)
    SELECT run_id, generation, lo, hi, id, epoch, instance, :reason, {now} FROM slice
    WHERE id = ANY(CAST(:ids AS bigint[]))
    """
)


def requeue(connection: Connection, ids: Sequence[int]) -> None:
    """Queue locked slices again; a lease that brought rows clears the attempts before it."""
    if ids:
        connection.execute(_REQUEUE, {"ids": list(ids)})


def lose(connection: Connection, slices: Sequence[LockedSlice], reason: str) -> Reaped:
    """Deal with locked, leased slices whose lease ended without their holder's consent."""
    if not slices:
        return Reaped()
    ids = [row.id for row in slices]
    connection.execute(_RECORD, {"ids": ids, "reason": reason})
    connection.execute(_FRUITLESS, {"ids": ids})
    bisected = failed = finished = 0
    for row in slices:
        attempts = 0 if row.fruitful else row.attempts + 1
        match after_lost_lease(attempts, row.remaining):
            case AfterLoss.BISECT:
                _bisect(connection, row)
                bisected += 1
            case AfterLoss.FAIL_LINE:
                finished += _fail_lines(connection, row)
                failed += row.remaining
            case AfterLoss.REQUEUE:
                pass
    requeue(connection, ids)
    return Reaped(
        requeued=len(ids) - bisected - failed,
        bisected=bisected,
        failed_lines=failed,
        finished_batches=finished,
    )


_UPPER_HALF = sql(
    """
    INSERT INTO slice (run_id, batch_id, generation, lo, hi, deadline, expires_at, attempts,
                       remaining, prompt_tokens, max_tokens, unbounded)
    SELECT run_id, batch_id, generation, CAST(:mid AS integer), hi, deadline, expires_at,
           :attempts, CAST(:upper AS bigint), prompt_tokens * :upper / remaining,
           max_tokens * :upper / remaining, unbounded * :upper / remaining
    FROM slice WHERE id = :id
    """
)
_LOWER_HALF = sql(
    """
    UPDATE slice
    SET hi = :mid, attempts = :attempts, remaining = remaining - :upper,
        prompt_tokens = prompt_tokens - prompt_tokens * :upper / remaining,
        max_tokens = max_tokens - max_tokens * :upper / remaining,
        unbounded = unbounded - unbounded * :upper / remaining
    WHERE id = :id
    """
)
_ONE_MORE = sql("UPDATE batch SET open_slices = open_slices + 1 WHERE id = :id")


def _bisect(connection: Connection, row: LockedSlice) -> None:
    left = positions_left(connection, [row.id])
    _, middle = left[len(left) // 2]
    half = {
        "id": row.id,
        "mid": middle,
        "upper": len(left) - len(left) // 2,
        "attempts": SUSPECT_AFTER,
    }
    connection.execute(_UPPER_HALF, half)
    connection.execute(_LOWER_HALF, half)
    connection.execute(_ONE_MORE, {"id": row.batch_id})


def _fail_lines(connection: Connection, row: LockedSlice) -> int:
    rows = [
        ResultRow(
            slice_id=row.id,
            epoch=row.epoch,
            run_id=row.run_id,
            position=position,
            generation=row.generation,
            request_id=new_id(REQUEST),
            error_code=POISON,
            error_message="The inference engine stopped every time it worked on this line,"
            " the last times on this line alone.",
        )
        for _, position in positions_left(connection, [row.id])
    ]
    return store_rows(connection, {row.id: row}, rows, row.instance).settled


def lose_all(
    connection: Connection, ids: Sequence[int], reason: str, instance: str | None = None
) -> Reaped:
    """As `lose`, for slices not locked yet; those no longer leased are left alone.

    With `instance` also those that are leased to another by now.
    """
    slices = lock_slices(connection, ids).values()
    leased = [row for row in slices if row.state == "leased"]
    return lose(connection, [row for row in leased if instance in (None, row.instance)], reason)
