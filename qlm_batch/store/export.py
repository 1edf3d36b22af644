"""Queries behind the writing of result files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from heapq import merge
from typing import Any

from sqlalchemy.engine import Connection

from qlm_batch.domain.jobs import Batch, BatchState, ExportLine, FileRecord, SliceState
from qlm_batch.domain.records import ExportTask
from qlm_batch.store.attainments import count_batch
from qlm_batch.store.batch_rows import batch_by_id
from qlm_batch.store.events import announce
from qlm_batch.store.files import add_file
from qlm_batch.store.session import lift_timeouts
from qlm_batch.store.sql import sql

_PAGE_ROWS = 2000
_FEWEST_ROWS = 16

_CLAIM = sql(
    """
    UPDATE batch SET claim_holder = :holder, claim_until = {now} + :lease_s
    WHERE id = (
        SELECT id FROM batch
        WHERE state IN ('finalizing', 'cancelling')
          AND (claim_until IS NULL OR claim_until < {now})
        ORDER BY coalesce(cancelling_at, finalizing_at), seq LIMIT 1 FOR UPDATE SKIP LOCKED
    )
    RETURNING id
    """
)


def claim_export(connection: Connection, holder: str, lease_s: float) -> ExportTask | None:
    """A settled batch whose files are not written yet, the longest waiting first."""
    batch_id = connection.scalar(_CLAIM, {"holder": holder, "lease_s": lease_s})
    return None if batch_id is None else ExportTask(batch_by_id(connection, batch_id))


_RENEW = sql(
    """
    UPDATE batch SET claim_until = {now} + :lease_s
    WHERE id = :id AND claim_holder = :holder AND state IN ('finalizing', 'cancelling')
    """
)


def renew_export(connection: Connection, batch_id: str, holder: str, lease_s: float) -> bool:
    """Keep the claim; False when it is somebody else's."""
    found = connection.execute(_RENEW, {"id": batch_id, "holder": holder, "lease_s": lease_s})
    return found.rowcount == 1


_END = sql(
    """
    UPDATE batch
    SET state = CASE WHEN state = 'cancelling' THEN 'cancelled'
                     WHEN missed THEN 'expired' ELSE 'completed' END,
        cancelled_at = CASE WHEN state = 'cancelling' THEN {now} END,
        expired_at = CASE WHEN state <> 'cancelling' AND missed THEN {now} END,
        completed_at = CASE WHEN state <> 'cancelling' AND NOT missed THEN {now} END,
        output_file_id = :output, error_file_id = :errors,
        claim_holder = NULL, claim_until = NULL
    WHERE id = :id AND claim_holder = :holder AND state IN ('finalizing', 'cancelling')
    RETURNING state
    """
)


def finish_export(
    connection: Connection,
    batch_id: str,
    holder: str,
    output: FileRecord | None,
    errors: FileRecord | None,
) -> Batch | None:
    """Record the files and end the batch; None when the claim is lost."""
    state = connection.scalar(
        _END,
        {
            "id": batch_id,
            "holder": holder,
            "output": output.id if output else None,
            "errors": errors.id if errors else None,
        },
    )
    if state is None:
        return None
    for record in (output, errors):
        if record is not None:
            add_file(connection, record)
    if BatchState(state) is not BatchState.CANCELLED:
        lift_timeouts(connection)
        count_batch(connection, batch_id)
    announce(connection, batch_id, BatchState(state))
    return batch_by_id(connection, batch_id)


_RUNS = sql("SELECT id FROM run WHERE batch_id = :id ORDER BY id")

# Slices of one generation do not overlap, so the nearest below a line is the one that has it, if
# any does. A line without a success is in one of the newest generation.
_LINES = sql(
    """
    SELECT r.run_id, r.position, r.line, r.custom_id,
           CASE WHEN c.hi > r.position THEN c.state ELSE 'done' END AS state,
           x.ok, x.request_id, x.status_code, x.body, x.error_code, x.error_message
    FROM request r
    JOIN run u ON u.id = r.run_id
    JOIN batch b ON b.id = u.batch_id
    LEFT JOIN LATERAL (
        SELECT * FROM result
        WHERE run_id = r.run_id AND position = r.position
        ORDER BY ok DESC, generation DESC LIMIT 1
    ) x ON true
    LEFT JOIN LATERAL (
        SELECT state, hi FROM slice
        WHERE run_id = r.run_id AND generation = b.generation AND lo <= r.position
        ORDER BY lo DESC LIMIT 1
    ) c ON true
    WHERE r.run_id = :run_id AND r.position > :after
    ORDER BY r.position LIMIT :limit
    """
)
_ROWS = sql(
    """
    SELECT r.run_id, r.position, r.line, r.custom_id, 'done' AS state, x.ok, x.request_id,
           x.status_code, x.body, x.error_code, x.error_message
    FROM (
        SELECT DISTINCT ON (position) * FROM (
            SELECT * FROM result
            WHERE run_id = :run_id AND position > :after AND position <= :until
        ) page
        ORDER BY position, ok DESC, generation DESC
    ) x
    JOIN request r ON r.run_id = x.run_id AND r.position = x.position
    ORDER BY r.position
    """
)
_UNTIL = sql(
    """
    SELECT max(position) FROM (
        SELECT position FROM result WHERE run_id = :run_id AND position > :after
        ORDER BY position LIMIT :limit
    ) page
    """
)

Read = Callable[..., Any]


def run_ids(connection: Connection, batch_id: str) -> Sequence[int]:
    """The batch's runs, in the order they were cut."""
    return connection.scalars(_RUNS, {"id": batch_id}).all()


def page_of_lines(connection: Connection, run_id: int, after: int, limit: int) -> Sequence[Any]:
    """Lines of a run behind position `after`, each with its success or else its newest error."""
    rows = connection.execute(_LINES, {"run_id": run_id, "after": after, "limit": limit})
    return rows.all()


def page_of_rows(connection: Connection, run_id: int, after: int, limit: int) -> Sequence[Any]:
    """As `page_of_lines`, but only lines that have a row."""
    until = connection.scalar(_UNTIL, {"run_id": run_id, "after": after, "limit": limit})
    if until is None:
        return []
    return connection.execute(_ROWS, {"run_id": run_id, "after": after, "until": until}).all()


def export_lines(read: Read, batch_id: str, partial: bool) -> Iterator[ExportLine]:
    """Lines in file order. `read` runs a query in a transaction of its own.

    Runs are merged by line; the more there are, the smaller their pages, to bound the memory.
    """
    runs = read(run_ids, batch_id)
    page = page_of_rows if partial else page_of_lines
    size = max(_FEWEST_ROWS, _PAGE_ROWS // max(1, len(runs)))
    streams = [_stream(read, page, run_id, size) for run_id in runs]
    for row in merge(*streams, key=lambda row: row.line):
        yield _to_line(row)


def _stream(read: Read, page: Callable[..., Any], run_id: int, size: int) -> Iterator[Any]:
    after = -1
    while rows := read(page, run_id, after, size):
        yield from rows
        after = rows[-1].position


def _to_line(row: Any) -> ExportLine:
    return ExportLine(
        run_id=row.run_id,
        position=row.position,
        custom_id=row.custom_id,
        closed_as=SliceState(row.state),
        ok=bool(row.ok),
        request_id=row.request_id,
        status_code=row.status_code,
        body=row.body,
        error_code=row.error_code,
        error_message=row.error_message,
    )
