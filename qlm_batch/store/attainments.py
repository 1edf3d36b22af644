"""How deadlines of batch requests held, added up as batches end."""

from __future__ import annotations

from sqlalchemy.engine import Connection

from qlm_batch.domain.records import Attainment
from qlm_batch.store.sql import sql

# A line's own deadline belonged to the first attempt; a retry runs under the new window alone.
# Where every line had its success in a generation that expires, nothing was late: no line is read.
_ADD = sql(
    """
    INSERT INTO attainment AS a (id, met, missed)
    SELECT 1, d.met, d.missed FROM (
        SELECT b.completed AS met, 0 AS missed FROM batch b
        WHERE b.id = :id AND b.generation = 1 AND b.on_miss = 'expire' AND b.failed = 0
        UNION ALL
        SELECT count(*) FILTER (WHERE x.ok AND x.in_time),
               count(*) FILTER (WHERE (x.ok AND NOT x.in_time) OR x.error_code = 'batch_expired')
               + max(b.total) - max(b.completed) + count(*) FILTER (WHERE x.ok) - count(x.ok)
        FROM batch b
        LEFT JOIN LATERAL (
            SELECT t.ok, t.error_code, t.stored_at <= coalesce(
                CASE WHEN b.generation = 1 THEN r.deadline END, b.deadline) AS in_time
            FROM run u
            JOIN result t ON t.run_id = u.id AND t.generation = b.generation
            JOIN request r ON r.run_id = t.run_id AND r.position = t.position
            WHERE u.batch_id = b.id
        ) x ON true
        WHERE b.id = :id AND (b.generation > 1 OR b.on_miss <> 'expire' OR b.failed > 0)
        HAVING count(*) > 0
    ) d
    ON CONFLICT (id) DO UPDATE
    SET met = a.met + excluded.met, missed = a.missed + excluded.missed
    """
)
_READ = sql("SELECT met, missed FROM attainment")


def count_batch(connection: Connection, batch_id: str) -> None:
    """Count the lines of a batch's newest generation; call it once, as the batch ends."""
    connection.execute(_ADD, {"id": batch_id})


def attainment(connection: Connection) -> Attainment:
    """What was counted so far."""
    row = connection.execute(_READ).one_or_none()
    return Attainment() if row is None else Attainment(met=row.met, missed=row.missed)
