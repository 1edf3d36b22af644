"""What a holder of leases may do: flush results, renew, give back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy.engine import Connection

from qlm_batch.domain.jobs import ResultRow
from qlm_batch.domain.ledger import Directive, FlushOutcome, Held, ReleaseReason
from qlm_batch.store.loss import lose, requeue
from qlm_batch.store.results import LockedSlice, lock_slices, store_rows
from qlm_batch.store.sql import sql

_RENEW = sql(
    """
    UPDATE slice SET lease_until = {now} + :lease_s
    WHERE id = ANY(CAST(:ids AS bigint[])) AND state = 'leased'
    """
)


def flush(
    connection: Connection,
    instance: str,
    rows: Sequence[ResultRow],
    held: Sequence[Held],
    lease_s: float | None,
) -> FlushOutcome:
    """Store rows, close slices in which every line has one, and renew the rest.

    A lease said to be complete whose slice still lacks rows is given back: its holder has stopped
    working on it.
    """
    epochs = {row.slice_id: row.epoch for row in rows} | {h.slice_id: h.epoch for h in held}
    if not epochs:
        return FlushOutcome(0, 0)
    slices = lock_slices(connection, epochs)
    accepted = [row for row in rows if _takes(slices.get(row.slice_id), row, instance)]
    stored = store_rows(connection, slices, accepted, instance)
    closed = set(stored.closed)
    directives = {
        slice_id: Directive.CLOSED
        if slice_id in closed
        else _directive(slices.get(slice_id), epoch, instance)
        for slice_id, epoch in epochs.items()
    }
    mine = {
        h.slice_id: h for h in held if directives[h.slice_id] in (Directive.KEEP, Directive.PREEMPT)
    }
    stranded = [slice_id for slice_id, h in mine.items() if h.complete]
    if stranded:
        requeue(connection, stranded)
        directives.update(dict.fromkeys(stranded, Directive.LOST))
    kept = [slice_id for slice_id, h in mine.items() if not h.complete]
    if kept and lease_s is not None:
        connection.execute(_RENEW, {"ids": kept, "lease_s": lease_s})
    return FlushOutcome(stored.written, len(rows) - stored.written, directives)


def _takes(held: LockedSlice | None, result: ResultRow, instance: str) -> bool:
    if held is None or not held.open:
        return False
    if (result.run_id, result.generation) != (held.run_id, held.generation):
        return False
    if not held.lo <= result.position < held.hi:
        return False
    return result.ok or _holds(held, result.epoch, instance)


def _holds(held: LockedSlice, epoch: int, instance: str) -> bool:
    return held.state == "leased" and held.epoch == epoch and held.instance == instance


def _directive(held: LockedSlice | None, epoch: int, instance: str) -> Directive:
    if held is None or not held.open:
        return Directive.CLOSED
    if not _holds(held, epoch, instance):
        return Directive.LOST
    return Directive.PREEMPT if held.preempt else Directive.KEEP


def release(
    connection: Connection, instance: str, held: Sequence[Held], reason: ReleaseReason
) -> None:
    """Queue what this holder still leases; only the death of an engine counts as an attempt."""
    slices = _held_now(connection, instance, held)
    if reason is ReleaseReason.ENGINE_DIED:
        lose(connection, list(slices.values()), reason.value)
    else:
        requeue(connection, list(slices))


def _held_now(
    connection: Connection, instance: str, held: Sequence[Held]
) -> Mapping[int, LockedSlice]:
    epochs = {h.slice_id: h.epoch for h in held}
    slices = lock_slices(connection, epochs)
    return {
        slice_id: row for slice_id, row in slices.items() if _holds(row, epochs[slice_id], instance)
    }
