"""Files of the in-memory store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from qlm_batch.domain.errors import InvalidInput, NotFound
from qlm_batch.domain.jobs import FilePurpose, FileRecord
from qlm_batch.domain.records import Page
from qlm_batch.store.memory.state import Facet, locked

T = TypeVar("T")


def no_such_file(file_id: str) -> NotFound:
    """The error for an id that names no file of the tenant."""
    return NotFound(f"No file found with id '{file_id}'.", code="file_not_found", param="file_id")


def page_of(items: dict[str, T], kind: str, after: str | None, limit: int) -> Page[T]:
    """Up to `limit` items behind `after`. Raises InvalidInput when that is none of them."""
    ids = list(items)
    start = 0
    if after is not None:
        if after not in items:
            raise InvalidInput(
                f"`after` names no {kind} of yours: '{after}'. Send the last id of the page"
                " before.",
                code="invalid_cursor",
                param="after",
            )
        start = ids.index(after) + 1
    chosen = ids[start : start + limit]
    return Page(tuple(items[i] for i in chosen), has_more=len(ids) > start + limit)


class MemoryFiles(Facet):
    """FileStore in memory."""

    @locked
    def expect_blob(self, key: str) -> None:
        """Note that a blob is about to be stored."""
        self.state.unowned[key] = self.state.clock()

    @locked
    def unowned_blobs(self, noted_s: float, limit: int = 100) -> Sequence[str]:
        """Keys that were noted over `noted_s` ago and that no file owns."""
        before = self.state.clock() - noted_s
        return [key for key, since in self.state.unowned.items() if since < before][:limit]

    @locked
    def blobs_removed(self, keys: Sequence[str]) -> None:
        """Drop the notes of blobs that are gone."""
        for key in keys:
            self.state.unowned.pop(key, None)

    @locked
    def add_file(self, record: FileRecord) -> None:
        """Record a file whose bytes are already in the blob store."""
        self.blobs_removed([record.blob_key])
        self.state.files.setdefault(record.id, record)

    @locked
    def file(self, tenant: str, file_id: str) -> FileRecord:
        """The file."""
        record = self.state.live_file(tenant, file_id)
        if record is None:
            raise no_such_file(file_id)
        return record

    @locked
    def list_files(
        self,
        tenant: str,
        *,
        purpose: FilePurpose | None = None,
        after: str | None = None,
        limit: int = 10_000,
        newest_first: bool = True,
    ) -> Page[FileRecord]:
        """A page of the tenant's files."""
        live = {
            record.id: record
            for record in self.state.files.values()
            if self.state.live_file(tenant, record.id) and purpose in (None, record.purpose)
        }
        if newest_first:
            live = dict(reversed(live.items()))
        return page_of(live, "file", after, limit)

    @locked
    def delete_file(self, tenant: str, file_id: str) -> FileRecord:
        """Forget a file."""
        record = self.file(tenant, file_id)
        del self.state.files[file_id]
        self.expect_blob(record.blob_key)
        return record

    @locked
    def expired_files(self, limit: int) -> Sequence[FileRecord]:
        """Forget and return files past their expiry."""
        now = self.state.clock()
        past = [
            record
            for record in self.state.files.values()
            if record.expires_at is not None and record.expires_at <= now
        ]
        past.sort(key=lambda record: record.expires_at or 0.0)
        for record in past[:limit]:
            del self.state.files[record.id]
            self.expect_blob(record.blob_key)
        return past[:limit]
