"""The events as receivers see them: OpenAI's four batch events."""

from __future__ import annotations

import orjson

from qlm_batch.domain.jobs import OutboxItem


def event_body(item: OutboxItem) -> bytes:
    """The JSON of an event; the same for every attempt."""
    return orjson.dumps(
        {
            "id": item.event_id,
            "object": "event",
            "created_at": int(item.created_at),
            "type": item.type,
            "data": {"id": item.batch_id},
        }
    )
