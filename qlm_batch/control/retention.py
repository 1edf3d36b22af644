"""Removes what is past its time: expired files and what crashes left behind."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import structlog

from qlm_batch.domain.ports import BlobStore, FileStore
from qlm_batch.intake.scratch import sweep_scratch

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class RetentionConfig:
    """`scratch` are the folders of half-written files; there, what nobody writes goes."""

    scratch: tuple[Path, ...] = ()
    limit: int = 100
    idle_s: float = 60.0


@dataclass(frozen=True, slots=True)
class RetentionResult:
    """One pass: how many expired files and leftovers were removed."""

    files: int = 0
    leftovers: int = 0

    def __bool__(self) -> bool:
        return self.files > 0


class RetentionService:
    """Deletes a page of expired files per pass."""

    name = "retention"

    def __init__(self, store: FileStore, blobs: BlobStore, config: RetentionConfig) -> None:
        self._store = store
        self._blobs = blobs
        self._config = config
        self.idle_s = config.idle_s

    def run_once(self) -> RetentionResult:
        """Forget expired files, delete their bytes, and sweep the scratch folders."""
        expired = self._store.expired_files(self._config.limit)
        for record in expired:
            self._blobs.delete(record.blob_key)
            log.info("file_expired", file=record.id)
        leftovers = sum(sweep_scratch(folder) for folder in self._config.scratch)
        return RetentionResult(len(expired), leftovers)

    def close(self) -> None:
        """Nothing is held between passes."""
