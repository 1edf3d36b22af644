"""Queries behind the delivery of completion events, and the secrets that sign them."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Sequence
from typing import Any

from cryptography.fernet import Fernet
from sqlalchemy.engine import Connection

from qlm_batch.domain.errors import NotFound
from qlm_batch.domain.jobs import DeliveryAttempt, OutboxItem
from qlm_batch.store.batches import get_batch
from qlm_batch.store.sql import sql
from qlm_batch.store.text import storable

SECRET_PREFIX = "whsec_"  # noqa: S105
_SECRET_BYTES = 32
_OVERLAP_S = 86_400.0
"""How long a secret stays valid after the next one was made."""

_CLAIM = sql(
    """
    WITH claimed AS (
        UPDATE outbox SET claim_holder = :holder, claim_until = {now} + :lease_s
        WHERE id IN (
            SELECT id FROM outbox
            WHERE state = 'pending' AND next_attempt_at <= {now}
              AND (claim_until IS NULL OR claim_until < {now})
            ORDER BY next_attempt_at, id LIMIT :limit FOR UPDATE SKIP LOCKED
        )
        RETURNING *
    )
    SELECT * FROM claimed ORDER BY next_attempt_at, id
    """
)


def claim_outbox(
    connection: Connection, holder: str, limit: int, lease_s: float
) -> Sequence[OutboxItem]:
    """Due items, the longest due first, leased to this holder."""
    rows = connection.execute(_CLAIM, {"holder": holder, "limit": limit, "lease_s": lease_s})
    return [_to_item(row) for row in rows]


def _to_item(row: Any) -> OutboxItem:
    return OutboxItem(
        id=row.id,
        event_id=row.event_id,
        tenant=row.tenant,
        batch_id=row.batch_id,
        generation=row.generation,
        type=row.type,
        channel=row.channel,
        target=row.target,
        created_at=row.created_at,
        attempts=row.attempts,
    )


_NEXT = sql(
    """
    UPDATE outbox
    SET attempts = attempts + 1, claim_holder = NULL, claim_until = NULL,
        next_attempt_at = coalesce(CAST(:retry_at AS float8), next_attempt_at),
        state = CASE WHEN :ok THEN 'delivered' WHEN CAST(:retry_at AS float8) IS NULL THEN 'dead'
                     ELSE 'pending' END
    WHERE id = :id AND state = 'pending'
    """
)
_LOG = sql(
    """
    INSERT INTO delivery (outbox_id, ok, status_code, detail, duration_s, retry_at, at)
    VALUES (:id, :ok, :status_code, :detail, :duration_s, :retry_at, {now})
    """
)
_EXISTS = sql("SELECT 1 FROM outbox WHERE id = :id FOR UPDATE")


def record_delivery(connection: Connection, attempt: DeliveryAttempt) -> None:
    """Log an attempt and set what is next. Raises NotFound for an item that is gone."""
    if connection.scalar(_EXISTS, {"id": attempt.outbox_id}) is None:
        raise NotFound(f"No event to deliver with number {attempt.outbox_id}.")
    connection.execute(
        _LOG,
        {
            "id": attempt.outbox_id,
            "ok": attempt.ok,
            "status_code": attempt.status_code,
            "detail": storable(attempt.detail),
            "duration_s": attempt.duration_s,
            "retry_at": attempt.retry_at,
        },
    )
    connection.execute(
        _NEXT, {"id": attempt.outbox_id, "ok": attempt.ok, "retry_at": attempt.retry_at}
    )


_DELIVERIES = sql(
    """
    SELECT o.*, d.ok, d.status_code, d.detail, d.duration_s, d.retry_at, d.at
    FROM delivery d JOIN outbox o ON o.id = d.outbox_id
    WHERE o.batch_id = :batch_id ORDER BY d.id
    """
)


def deliveries(
    connection: Connection, tenant: str, batch_id: str
) -> Sequence[tuple[OutboxItem, DeliveryAttempt]]:
    """The delivery log of a batch, oldest first. Raises NotFound."""
    get_batch(connection, tenant, batch_id)
    rows = connection.execute(_DELIVERIES, {"batch_id": batch_id})
    return [
        (
            _to_item(row),
            DeliveryAttempt(
                outbox_id=row.id,
                ok=row.ok,
                status_code=row.status_code,
                detail=row.detail,
                duration_s=row.duration_s,
                retry_at=row.retry_at,
                at=row.at,
            ),
        )
        for row in rows
    ]


_REPLAY = sql(
    """
    UPDATE outbox SET state = 'pending', attempts = 0, next_attempt_at = {now}
    WHERE batch_id = :batch_id AND state = 'dead'
    """
)


def replay_dead(connection: Connection, tenant: str, batch_id: str) -> int:
    """Make the batch's dead deliveries due at once; how many. Raises NotFound."""
    get_batch(connection, tenant, batch_id)
    return connection.execute(_REPLAY, {"batch_id": batch_id}).rowcount


_TENANT = sql("INSERT INTO tenant (id, created_at) VALUES (:id, {now}) ON CONFLICT DO NOTHING")
_LOCK_TENANT = sql("SELECT 1 FROM tenant WHERE id = :id FOR NO KEY UPDATE")
_SECRETS = sql(
    """
    SELECT secret FROM webhook_endpoint
    WHERE tenant = :tenant AND (expires_at IS NULL OR expires_at > {now})
    ORDER BY id DESC
    """
)
_ADD_SECRET = sql(
    "INSERT INTO webhook_endpoint (tenant, secret, created_at) VALUES (:tenant, :secret, {now})"
)
_RETIRE_SECRETS = sql(
    """
    UPDATE webhook_endpoint SET expires_at = {now} + :overlap_s
    WHERE tenant = :tenant AND expires_at IS NULL
    """
)


def add_tenant(connection: Connection, tenant: str) -> None:
    """Make the tenant unless it is there."""
    connection.execute(_TENANT, {"id": tenant})


def webhook_secrets(connection: Connection, tenant: str, box: Fernet) -> Sequence[str]:
    """The tenant's valid secrets, newest first; makes one when there is none."""
    found = connection.scalars(_SECRETS, {"tenant": tenant}).all()
    if not found:
        _lock_tenant(connection, tenant)
        # Another call may have made it while this one waited.
        found = connection.scalars(_SECRETS, {"tenant": tenant}).all()
        if not found:
            return [_add_secret(connection, tenant, box)]
    return [box.decrypt(bytes(secret)).decode() for secret in found]


def rotate_webhook_secret(connection: Connection, tenant: str, box: Fernet) -> str:
    """Add a fresh secret; the one before ends in a day."""
    _lock_tenant(connection, tenant)
    connection.execute(_RETIRE_SECRETS, {"tenant": tenant, "overlap_s": _OVERLAP_S})
    return _add_secret(connection, tenant, box)


def _lock_tenant(connection: Connection, tenant: str) -> None:
    add_tenant(connection, tenant)
    connection.execute(_LOCK_TENANT, {"id": tenant})


def _add_secret(connection: Connection, tenant: str, box: Fernet) -> str:
    made = SECRET_PREFIX + base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()
    connection.execute(_ADD_SECRET, {"tenant": tenant, "secret": box.encrypt(made.encode())})
    return made
