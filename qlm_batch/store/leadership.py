"""The leader's row: taken by compare-and-set on the database's time, and checked by every write."""

from __future__ import annotations

from sqlalchemy.engine import Connection

from qlm_batch.domain.errors import NotLeader
from qlm_batch.store.sql import sql

_LEAD = sql(
    """
    INSERT INTO leader AS l (id, holder, epoch, until) VALUES (1, :holder, 1, {now} + :term_s)
    ON CONFLICT (id) DO UPDATE
    SET holder = :holder, until = {now} + :term_s,
        epoch = l.epoch
            + CASE WHEN l.holder = :holder AND l.until >= {now} THEN 0 ELSE 1 END
    WHERE l.holder IS NULL OR l.holder = :holder OR l.until < {now}
    RETURNING epoch
    """
)
_RESIGN = sql("UPDATE leader SET holder = NULL, until = 0 WHERE holder = :holder")
_FENCE = sql(
    "SELECT 1 FROM leader WHERE id = 1 AND epoch = :epoch AND holder IS NOT NULL FOR SHARE"
)


def lead(connection: Connection, holder: str, term_s: float) -> int | None:
    """Take or renew leadership; a term that ran out begins anew under the next epoch."""
    epoch = connection.scalar(_LEAD, {"holder": holder, "term_s": term_s})
    return None if epoch is None else int(epoch)


def resign(connection: Connection, holder: str) -> None:
    """Give leadership up."""
    connection.execute(_RESIGN, {"holder": holder})


def fence(connection: Connection, epoch: int) -> None:
    """Let nobody else take over before this transaction ends. Raises NotLeader."""
    if connection.scalar(_FENCE, {"epoch": epoch}) is None:
        raise NotLeader(f"This scheduler no longer leads (epoch {epoch}); nothing was changed.")
