"""Removes what is past its time: expired files and what crashes left behind."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path

import structlog

from qlm_batch.domain.ports import BlobStore, FileStore

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class RetentionConfig:
    """`scratch` are the folders of half-written files; there, what is older goes."""

    scratch: tuple[Path, ...] = ()
    scratch_age_s: float = 86_400.0
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
        leftovers = sum(self._sweep(folder) for folder in self._config.scratch)
        return RetentionResult(len(expired), leftovers)

    def close(self) -> None:
        """Nothing is held between passes."""

    def _sweep(self, folder: Path) -> int:
        """Remove old files of a local folder; their ages are on this machine's own clock."""
        if not folder.is_dir():
            return 0
        oldest = time.time() - self._config.scratch_age_s
        removed = 0
        for path in folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if path.is_file() and path.stat().st_mtime < oldest:
                    path.unlink()
                    removed += 1
        return removed
