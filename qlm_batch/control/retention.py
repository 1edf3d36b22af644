"""Removes what is past its time: old batches, expired files, and what crashes left behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import structlog

from qlm_batch.domain.ports import BlobStore
from qlm_batch.domain.store import FileStore, RetentionStore
from qlm_batch.intake.scratch import sweep_scratch
from qlm_batch.settings import Settings

log = structlog.get_logger(__name__)

_INSTANCES_S = 7 * 86_400.0
"""How long an instance must be silent to be forgotten; boots it replaced are not known after."""

_UNOWNED_S = 86_400.0
"""How long a blob may wait for its file to be recorded; it takes seconds unless a process died."""


class Kept(FileStore, RetentionStore, Protocol):
    """What retention needs of the store."""


@dataclass(frozen=True, slots=True)
class RetentionConfig:
    """Batches are kept for `rows_s` after their end.

    `scratch` are the folders of half-written files; there, what nobody writes goes.
    """

    scratch: tuple[Path, ...] = ()
    rows_s: float = 30 * 86_400.0
    limit: int = 100
    idle_s: float = 60.0

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """As the settings say."""
        folder = settings.data_dir
        scratch = (folder / "spool", folder / "scratch", folder / "blobs" / ".scratch")
        return cls(scratch=scratch, rows_s=settings.batch_rows_s)


@dataclass(frozen=True, slots=True)
class RetentionResult:
    """How much a pass removed; `strays` are blobs no file owned, `leftovers` half-written files."""

    batches: int = 0
    lines: int = 0
    instances: int = 0
    files: int = 0
    strays: int = 0
    leftovers: int = 0

    def __bool__(self) -> bool:
        return bool(self.batches or self.lines or self.files or self.strays)


class RetentionService:
    """Removes a bounded part of everything per pass; any number of processes may run it."""

    name = "retention"

    def __init__(self, store: Kept, blobs: BlobStore, config: RetentionConfig) -> None:
        self._store = store
        self._blobs = blobs
        self._config = config
        self.idle_s = config.idle_s

    def run_once(self) -> RetentionResult:
        """Forget old batches, silent instances and expired files with their bytes; sweep."""
        store, config = self._store, self._config
        batches, lines = store.forget_batches(config.rows_s), store.forget_lines()
        if batches:
            log.info("batches_forgotten", batches=batches)
        instances = store.forget_instances(_INSTANCES_S)
        expired = store.expired_files(config.limit)
        for record in expired:
            log.info("file_expired", file=record.id)
        strays = store.unowned_blobs(_UNOWNED_S, config.limit)
        if strays:
            log.info("unowned_blobs_removed", keys=strays)
        self._remove([*(record.blob_key for record in expired), *strays])
        leftovers = sum(sweep_scratch(folder) for folder in config.scratch)
        return RetentionResult(batches, lines, instances, len(expired), len(strays), leftovers)

    def _remove(self, keys: Sequence[str]) -> None:
        for key in keys:
            self._blobs.delete(key)
        if keys:
            self._store.blobs_removed(keys)

    def close(self) -> None:
        """Nothing is held between passes."""
