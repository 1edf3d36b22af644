"""Queries on interactive requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from qlm_batch.domain.errors import NotFound
from qlm_batch.domain.interactive import (
    OPEN_INTERACTIVE,
    InteractiveMark,
    InteractiveRequest,
    InteractiveState,
    NewInteractive,
    Timeliness,
)
from qlm_batch.domain.jobs import Usage
from qlm_batch.store.fleet_tables import interactive_request
from qlm_batch.store.sql import sql
from qlm_batch.store.text import storable

LOST = '{"error":{"message":"The instance that served this request was lost.",\
"type":"server_error","param":null,"code":"instance_lost"}}'
"""What is stored as the answer of a request whose instance went away."""

UNSENT_GRACES = 10
"""Whoever waits sends a request again every few seconds; one still not taken up after so many
times the grace has lost its caller, as when that process was killed before it could send it."""

_USAGE = ("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens")

# The client holds the connection open: should the server crash within the fraction of a second
# before this reaches the disk, the call fails as it would have a moment earlier.
_ADD = sql(
    """
    INSERT INTO interactive_request
        (id, tenant, endpoint, model, body, streamed, ttft_s, instance, boot_id, epoch, state,
         created_at)
    SELECT :id, :tenant, :endpoint, :model, :body, :streamed, :ttft_s, :instance, :boot_id, 1,
           'sent', {now}
    FROM set_config('synchronous_commit', 'off', true)
    RETURNING created_at
    """
)


def add_interactive(connection: Connection, new: NewInteractive) -> float:
    """Store a call as leased by its instance; the time it was accepted at."""
    return float(connection.execute(_ADD, asdict(new)).scalar_one())


_REROUTE = sql(
    """
    UPDATE interactive_request
    SET instance = :instance, boot_id = :boot_id, epoch = epoch + 1, state = 'sent'
    WHERE id = :id AND epoch = :epoch AND ended_at IS NULL
    RETURNING epoch
    """
)


def reroute_interactive(
    connection: Connection, request_id: str, epoch: int, instance: str, boot_id: str
) -> int | None:
    """Lease an open request to another boot; its next epoch, None where it cannot be moved."""
    moved = connection.execute(
        _REROUTE, {"id": request_id, "epoch": epoch, "instance": instance, "boot_id": boot_id}
    ).scalar_one_or_none()
    return None if moved is None else int(moved)


_MARK = sql(
    """
    UPDATE interactive_request
    SET state = :state, ended_at = CASE WHEN :ended THEN {now} END, status_code = :status_code,
        result = :result, input_tokens = :input_tokens, cached_tokens = :cached_tokens,
        output_tokens = :output_tokens, reasoning_tokens = :reasoning_tokens,
        first_token_s = :first_token_s, duration_s = :duration_s
    WHERE id = :id AND epoch = :epoch AND ended_at IS NULL
    """
)


def mark_interactive(connection: Connection, marks: Sequence[InteractiveMark]) -> int:
    """Record the last mark of each request; how many were taken."""
    last = {mark.id: mark for mark in marks}
    if not last:
        return 0
    # In the order of ids, so that two writers never wait for each other in a circle.
    rows = [_row(last[request_id]) for request_id in sorted(last)]
    return max(0, connection.execute(_MARK, rows if len(rows) > 1 else rows[0]).rowcount)


def _row(mark: InteractiveMark) -> dict[str, object]:
    return {
        "id": mark.id,
        "epoch": mark.epoch,
        "state": mark.state.value,
        "ended": mark.state not in OPEN_INTERACTIVE,
        "status_code": mark.status_code,
        "result": None if mark.result is None else storable(mark.result),
        "first_token_s": mark.first_token_s,
        "duration_s": mark.duration_s,
        **asdict(mark.usage),
    }


def get_interactive(connection: Connection, tenant: str, request_id: str) -> InteractiveRequest:
    """The request. Raises NotFound."""
    row = connection.execute(
        sa.select(interactive_request).where(
            interactive_request.c.id == request_id, interactive_request.c.tenant == tenant
        )
    ).one_or_none()
    if row is None:
        raise NotFound(
            f"No request found with id '{request_id}'.", code="request_not_found", param="id"
        )
    return _to_request(row)


def _to_request(row: Any) -> InteractiveRequest:
    found = dict(row._mapping)
    usage = Usage(**{name: found.pop(name) for name in _USAGE})
    return InteractiveRequest(**found | {"state": InteractiveState(row.state), "usage": usage})


_TIMELINESS = sql(
    """
    SELECT count(*) AS requests,
           percentile_cont(0.5) WITHIN GROUP (ORDER BY first_token_s) AS ttft_p50,
           percentile_cont(0.95) WITHIN GROUP (ORDER BY first_token_s) AS ttft_p95,
           percentile_cont(0.99) WITHIN GROUP (ORDER BY first_token_s) AS ttft_p99,
           percentile_cont(0.5) WITHIN GROUP (
               ORDER BY (duration_s - first_token_s) / (output_tokens - 1)
           ) FILTER (WHERE output_tokens > 1) AS tpot_p50,
           avg((first_token_s <= ttft_s)::int)::double precision AS met
    FROM interactive_request
    WHERE ended_at > {now} - :window_s AND state = 'done' AND first_token_s IS NOT NULL
    """
)


def timeliness(connection: Connection, window_s: float) -> Timeliness:
    """How the requests fared that were answered within the last `window_s`."""
    row = connection.execute(_TIMELINESS, {"window_s": window_s}).one()
    return Timeliness(**row._mapping)


_SWEEP = sql(
    """
    UPDATE interactive_request SET state = 'failed', ended_at = {now}, status_code = 500,
        result = :lost
    WHERE ended_at IS NULL AND id IN (
        SELECT r.id FROM interactive_request r
        LEFT JOIN instance i ON i.name = r.instance AND i.boot_id = r.boot_id
            AND i.retired_at IS NULL AND i.beat_at + :silent_s > {now} - :grace_s
        WHERE r.state IN ('sent', 'running') AND r.created_at < {now} - :grace_s
          AND (i.name IS NULL OR r.state = 'sent' AND r.created_at < {now} - :unsent_s)
        LIMIT :limit)
    """
)


def sweep_interactive(connection: Connection, silent_s: float, grace_s: float, limit: int) -> int:
    """Fail open requests whose boot has been gone for `grace_s`, or that nobody sends; how many."""
    given = {
        "silent_s": silent_s,
        "grace_s": grace_s,
        "unsent_s": UNSENT_GRACES * grace_s,
        "limit": limit,
        "lost": LOST,
    }
    return connection.execute(_SWEEP, given).rowcount


_EMPTY = sql(
    """
    UPDATE interactive_request SET body = NULL, result = NULL
    WHERE id IN (SELECT id FROM interactive_request
                 WHERE ended_at < {now} - :bodies_s
                   AND (body IS NOT NULL OR result IS NOT NULL) LIMIT :limit)
    """
)
_DROP = sql(
    """
    DELETE FROM interactive_request
    WHERE id IN (SELECT id FROM interactive_request WHERE ended_at < {now} - :rows_s LIMIT :limit)
    """
)


def forget_interactive(connection: Connection, bodies_s: float, rows_s: float, limit: int) -> int:
    """Empty bodies and results, and drop rows, whose time is over; how many."""
    emptied = connection.execute(_EMPTY, {"bodies_s": bodies_s, "limit": limit}).rowcount
    return emptied + connection.execute(_DROP, {"rows_s": rows_s, "limit": limit}).rowcount
