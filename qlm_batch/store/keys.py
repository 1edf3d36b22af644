"""Queries on API keys, which are known by the hash of their secret."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from qlm_batch.domain.errors import NotFound, Unauthenticated
from qlm_batch.domain.jobs import ApiKey
from qlm_batch.store.fleet_tables import api_key
from qlm_batch.store.outbox import add_tenant
from qlm_batch.store.sql import sql

_COLUMNS = [column for column in api_key.c if column.name != "hash"]


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="surrogatepass")).hexdigest()


def _to_key(row: Any) -> ApiKey:
    return ApiKey(**row._mapping)


def add_key(connection: Connection, key: ApiKey, secret: str) -> None:
    """Store a key, making its tenant when new."""
    add_tenant(connection, key.tenant)
    connection.execute(
        sa.insert(api_key).values(
            id=key.id,
            tenant=key.tenant,
            name=key.name,
            role=key.role,
            prefix=key.prefix,
            hash=_hash(secret),
            created_at=key.created_at,
            revoked_at=key.revoked_at,
            limits=dict(key.limits),
        )
    )


def key_for(connection: Connection, secret: str) -> ApiKey:
    """The key with this secret. Raises Unauthenticated when unknown or revoked."""
    row = connection.execute(
        sa.select(*_COLUMNS).where(api_key.c.hash == _hash(secret), api_key.c.revoked_at.is_(None))
    ).one_or_none()
    if row is None:
        raise Unauthenticated(
            "This API key is unknown or was revoked; send a valid one as"
            " 'Authorization: Bearer KEY'."
        )
    return _to_key(row)


def list_keys(connection: Connection, tenant: str | None) -> Sequence[ApiKey]:
    """Keys of one tenant or of all, oldest first."""
    query = sa.select(*_COLUMNS).order_by(api_key.c.created_at, api_key.c.id)
    if tenant is not None:
        query = query.where(api_key.c.tenant == tenant)
    return [_to_key(row) for row in connection.execute(query)]


_REVOKE = sql("UPDATE api_key SET revoked_at = coalesce(revoked_at, {now}) WHERE id = :id")


def revoke_key(connection: Connection, key_id: str) -> ApiKey:
    """End a key at once. Raises NotFound."""
    connection.execute(_REVOKE, {"id": key_id})
    row = connection.execute(sa.select(*_COLUMNS).where(api_key.c.id == key_id)).one_or_none()
    if row is None:
        raise NotFound(f"No key found with id '{key_id}'.", code="key_not_found", param="key_id")
    return _to_key(row)
