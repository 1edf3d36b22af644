"""Queries that forget what is past its time, each a bounded part at a time."""

from __future__ import annotations

from sqlalchemy.engine import Connection

from qlm_batch.store.session import lift_timeouts
from qlm_batch.store.sql import sql

_ENDED = sql(
    """
    SELECT b.id FROM batch b
    WHERE coalesce(b.completed_at, b.failed_at, b.expired_at, b.cancelled_at) < {now} - :rows_s
      AND NOT EXISTS (SELECT FROM outbox o WHERE o.batch_id = b.id AND o.state = 'pending')
    ORDER BY coalesce(b.completed_at, b.failed_at, b.expired_at, b.cancelled_at)
    LIMIT :limit FOR UPDATE OF b SKIP LOCKED
    """
)
_REMEMBER_RUNS = sql(
    """
    INSERT INTO forgotten_run (run_id, requests)
    SELECT id, requests FROM run WHERE batch_id = ANY(CAST(:ids AS text[]))
    """
)
_DROP_LOSSES = sql(
    """
    DELETE FROM attempt_error
    WHERE run_id IN (SELECT id FROM run WHERE batch_id = ANY(CAST(:ids AS text[])))
    """
)
_DROP_DECISIONS = sql("DELETE FROM decision WHERE batch_id = ANY(CAST(:ids AS text[]))")
_DROP_BATCHES = sql("DELETE FROM batch WHERE id = ANY(CAST(:ids AS text[]))")


def forget_batches(connection: Connection, rows_s: float, limit: int) -> int:
    """Drop batches that ended over `rows_s` ago, with all but their lines; how many."""
    ids = connection.scalars(_ENDED, {"rows_s": rows_s, "limit": limit}).all()
    if ids:
        # Slices, deliveries and the like go with their batch; of one with millions of lines that
        # are tens of thousands of rows.
        lift_timeouts(connection)
        for statement in (_REMEMBER_RUNS, _DROP_LOSSES, _DROP_DECISIONS, _DROP_BATCHES):
            connection.execute(statement, {"ids": ids})
    return len(ids)


_NEXT_RUN = sql(
    """
    SELECT run_id, requests FROM forgotten_run ORDER BY run_id LIMIT 1 FOR UPDATE SKIP LOCKED
    """
)
_DROP_RESULTS = sql("DELETE FROM result WHERE run_id = :run_id AND position >= :first")
_DROP_REQUESTS = sql("DELETE FROM request WHERE run_id = :run_id AND position >= :first")
_CUT_RUN = sql("UPDATE forgotten_run SET requests = :first WHERE run_id = :run_id")
_DROP_RUN = sql("DELETE FROM forgotten_run WHERE run_id = :run_id")


def forget_lines(connection: Connection, limit: int) -> int:
    """Drop lines of forgotten batches with their results, the last of a run first; how many."""
    gone = 0
    while gone < limit:
        run = connection.execute(_NEXT_RUN).one_or_none()
        if run is None:
            break
        part = {"run_id": run.run_id, "first": max(0, run.requests - (limit - gone))}
        connection.execute(_DROP_RESULTS, part)
        connection.execute(_DROP_REQUESTS, part)
        connection.execute(_CUT_RUN if part["first"] else _DROP_RUN, part)
        gone += run.requests - part["first"]
    return gone


# As many rows as instances ever had names: it is read whole.
_DROP_INSTANCES = sql(
    """
    DELETE FROM instance i
    WHERE i.beat_at < {now} - :silent_s
      AND NOT EXISTS (SELECT FROM slice s WHERE s.instance = i.name AND s.state = 'assigned')
      AND NOT EXISTS (SELECT FROM slice s WHERE s.instance = i.name AND s.state = 'leased')
    """
)


def forget_instances(connection: Connection, silent_s: float) -> int:
    """Drop instances not heard of for `silent_s` that hold nothing; how many."""
    return connection.execute(_DROP_INSTANCES, {"silent_s": silent_s}).rowcount
