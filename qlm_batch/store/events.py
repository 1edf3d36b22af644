"""Completion events, written in the transaction that ends a batch."""

from __future__ import annotations

from sqlalchemy.engine import Connection

from qlm_batch.domain.jobs import BatchState
from qlm_batch.domain.transitions import EVENT_OF
from qlm_batch.ids import EVENT, new_id
from qlm_batch.store.sql import sql

_INSERT = sql(
    """
    INSERT INTO outbox (event_id, tenant, batch_id, generation, type, channel, target,
                        created_at, next_attempt_at)
    SELECT :event_id, b.tenant, b.id, b.generation, :type, c.channel, c.target, t.now, t.now
    FROM batch b
    CROSS JOIN (SELECT {now} AS now) t
    CROSS JOIN LATERAL (VALUES ('webhook', b.webhook), ('email', b.email)) c(channel, target)
    WHERE b.id = :batch_id AND c.target IS NOT NULL
    ON CONFLICT (batch_id, generation, channel) DO NOTHING
    """
)


def announce(connection: Connection, batch_id: str, state: BatchState) -> None:
    """One row per channel the batch asked for, under one event id."""
    connection.execute(
        _INSERT, {"event_id": new_id(EVENT), "batch_id": batch_id, "type": EVENT_OF[state]}
    )
