"""Queries on the records of files."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from qlm_batch.domain.errors import InvalidInput, NotFound
from qlm_batch.domain.jobs import FilePurpose, FileRecord
from qlm_batch.domain.records import Page
from qlm_batch.store.sql import sql
from qlm_batch.store.tables import file, unowned_blob

_LIVE = sql("(expires_at IS NULL OR expires_at > {now})")
_COLUMNS = [column for column in file.c if column.name != "seq"]


def to_record(row: Any) -> FileRecord:
    """The row as the domain knows it."""
    values = dict(row._mapping)
    return FileRecord(**{**values, "purpose": FilePurpose(values["purpose"])})


_NOTE = sql(
    """
    INSERT INTO unowned_blob (key, since) VALUES (:key, {now})
    ON CONFLICT (key) DO UPDATE SET since = excluded.since
    """
)


def expect_blob(connection: Connection, key: str) -> None:
    """Note a blob that no file owns yet, or any more."""
    connection.execute(_NOTE, {"key": key})


_UNOWNED = sql(
    """
    SELECT key FROM unowned_blob WHERE since < {now} - :noted_s ORDER BY since LIMIT :limit
    """
)


def unowned_blobs(connection: Connection, noted_s: float, limit: int) -> Sequence[str]:
    """Keys noted over `noted_s` ago."""
    return connection.scalars(_UNOWNED, {"noted_s": noted_s, "limit": limit}).all()


def blobs_removed(connection: Connection, keys: Sequence[str]) -> None:
    """Drop the notes of these keys."""
    connection.execute(sa.delete(unowned_blob).where(unowned_blob.c.key.in_(keys)))


def add_file(connection: Connection, record: FileRecord) -> None:
    """Record a file, which owns its blob from now on; the same record twice is one."""
    blobs_removed(connection, [record.blob_key])
    connection.execute(
        sa.dialects.postgresql.insert(file)
        .values(
            id=record.id,
            tenant=record.tenant,
            purpose=record.purpose.value,
            filename=record.filename,
            bytes=record.bytes,
            sha256=record.sha256,
            blob_key=record.blob_key,
            created_at=record.created_at,
            expires_at=record.expires_at,
        )
        .on_conflict_do_nothing(index_elements=["id"])
    )


def find_file(connection: Connection, tenant: str, file_id: str) -> FileRecord | None:
    """The tenant's file; None when absent, deleted or expired."""
    row = connection.execute(
        sa.select(*_COLUMNS).where(file.c.id == file_id, file.c.tenant == tenant, _LIVE)
    ).one_or_none()
    return None if row is None else to_record(row)


def get_file(connection: Connection, tenant: str, file_id: str) -> FileRecord:
    """The tenant's file. Raises NotFound."""
    found = find_file(connection, tenant, file_id)
    if found is None:
        raise no_such_file(file_id)
    return found


def no_such_file(file_id: str) -> NotFound:
    """The error for an id that names no file of the tenant."""
    return NotFound(f"No file found with id '{file_id}'.", code="file_not_found", param="file_id")


def list_files(
    connection: Connection,
    tenant: str,
    purpose: FilePurpose | None,
    after: str | None,
    limit: int,
    newest_first: bool,
) -> Page[FileRecord]:
    """A page in order of arrival. Raises InvalidInput when `after` is no file of the tenant."""
    query = sa.select(*_COLUMNS).where(file.c.tenant == tenant, _LIVE)
    if purpose is not None:
        query = query.where(file.c.purpose == purpose.value)
    if after is not None:
        last = connection.scalar(
            sa.select(file.c.seq).where(file.c.id == after, file.c.tenant == tenant)
        )
        if last is None:
            raise no_such_cursor("file", after)
        query = query.where(file.c.seq < last if newest_first else file.c.seq > last)
    order = file.c.seq.desc() if newest_first else file.c.seq.asc()
    rows = connection.execute(query.order_by(order).limit(limit + 1)).all()
    return Page(tuple(to_record(row) for row in rows[:limit]), has_more=len(rows) > limit)


def no_such_cursor(kind: str, after: str) -> InvalidInput:
    """The error for a page that should follow something unknown."""
    return InvalidInput(
        f"`after` names no {kind} of yours: '{after}'. Send the last id of the page before.",
        code="invalid_cursor",
        param="after",
    )


def delete_file(connection: Connection, tenant: str, file_id: str) -> FileRecord:
    """Forget a file and return what it was. Raises NotFound."""
    row = connection.execute(
        sa.delete(file)
        .where(file.c.id == file_id, file.c.tenant == tenant, _LIVE)
        .returning(*_COLUMNS)
    ).one_or_none()
    if row is None:
        raise no_such_file(file_id)
    expect_blob(connection, row.blob_key)
    return to_record(row)


_EXPIRED = sql(
    """
    WITH gone AS (
        DELETE FROM file WHERE id IN (
            SELECT id FROM file WHERE expires_at <= {now}
            ORDER BY expires_at LIMIT :limit FOR UPDATE SKIP LOCKED
        )
        RETURNING id, tenant, purpose, filename, bytes, sha256, blob_key, created_at, expires_at
    ), noted AS (
        INSERT INTO unowned_blob (key, since) SELECT blob_key, {now} FROM gone
        ON CONFLICT DO NOTHING
    )
    SELECT * FROM gone
    """
)


def expired_files(connection: Connection, limit: int) -> Sequence[FileRecord]:
    """Forget and return files past their expiry."""
    return [to_record(row) for row in connection.execute(_EXPIRED, {"limit": limit})]
