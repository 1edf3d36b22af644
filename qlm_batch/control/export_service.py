"""Writes the result files of batches whose outcome is settled."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from typing import BinaryIO

import structlog

from qlm_batch import ids
from qlm_batch.control.keepalive import KeepAlive
from qlm_batch.domain.errors import Conflict
from qlm_batch.domain.jobs import Batch, FilePurpose, FileRecord
from qlm_batch.domain.ports import BlobStore
from qlm_batch.domain.store import Store
from qlm_batch.failpoints import failpoint
from qlm_batch.intake.results import render_line
from qlm_batch.settings import Settings

log = structlog.get_logger(__name__)

_CHECK_EVERY_LINES = 1024
_BUFFER_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class ExportConfig:
    """`holder` names this process in leases."""

    holder: str
    lease_s: float = 30.0
    idle_s: float = 0.25

    @classmethod
    def of(cls, settings: Settings, holder: str) -> ExportConfig:
        """The configuration these settings ask for."""
        return cls(holder=holder, lease_s=settings.lease_s)


@dataclass(frozen=True, slots=True)
class ExportResult:
    """One pass: the batch it took up, if any, and the lines written to each file."""

    batch_id: str | None = None
    output_lines: int = 0
    error_lines: int = 0

    def __bool__(self) -> bool:
        return self.batch_id is not None


class ExportService:
    """Writes the files of one settled batch per pass and ends the batch."""

    name = "export"

    def __init__(self, store: Store, blobs: BlobStore, config: ExportConfig) -> None:
        self._store = store
        self._blobs = blobs
        self._config = config
        self.idle_s = config.idle_s

    def run_once(self) -> ExportResult:
        """Export one batch. A pass that fails half-way leaves no file and is simply done again."""
        task = self._store.claim_export(self._config.holder, self._config.lease_s)
        if task is None:
            return ExportResult()
        try:
            return self._export(task.batch)
        except Conflict as error:
            log.info("export_given_up", batch=task.batch.id, reason=error.message)
            return ExportResult(task.batch.id)

    def close(self) -> None:
        """Nothing is held between passes."""

    def _export(self, batch: Batch) -> ExportResult:
        config = self._config

        def renew() -> bool:
            return self._store.renew_export(batch.id, config.holder, config.lease_s)

        with KeepAlive(renew, config.lease_s) as lease:
            with contextlib.ExitStack() as files:
                output = _ResultFile(self._blobs, batch, "output", files)
                errors = _ResultFile(self._blobs, batch, "error", files)
                for count, line in enumerate(self._store.export_lines(batch.id)):
                    if count % _CHECK_EVERY_LINES == 0:
                        lease.check()
                    ok, text = render_line(line)
                    (output if ok else errors).write(text)
                output.flush()
                errors.flush()
                lease.check()
            now = self._store.now()
            ended = self._store.finish_export(
                batch.id, config.holder, output.record(now), errors.record(now)
            )
        if ended is None:
            log.info("export_given_up", batch=batch.id, reason="the lease was lost")
        else:
            log.info("batch_ended", batch=batch.id, state=ended.state)
            counted = (ended.counts.completed, ended.counts.failed)
            if counted != (output.lines, errors.lines):
                written = (output.lines, errors.lines)
                log.error("export_disagrees", batch=batch.id, counted=counted, written=written)
        return ExportResult(batch.id, output.lines, errors.lines)


class _ResultFile:
    """One of a batch's two files; its blob is begun with the first line.

    The key is fixed by batch and generation: whoever exports writes the same bytes to it, so that
    an export done twice, or by two holders, leaves one blob.
    """

    def __init__(
        self, blobs: BlobStore, batch: Batch, kind: str, files: contextlib.ExitStack
    ) -> None:
        self._blobs = blobs
        self._batch = batch
        self._files = files
        self._filename = f"{batch.id}_{kind}.jsonl"
        self._key = f"results/{batch.id}/{batch.generation}/{kind}.jsonl"
        self._file: BinaryIO | None = None
        self._buffer = bytearray()
        self._digest = hashlib.sha256()
        self._bytes = 0
        self.lines = 0

    def write(self, text: bytes) -> None:
        self._buffer += text
        self.lines += 1
        if len(self._buffer) >= _BUFFER_BYTES:
            self.flush()

    def flush(self) -> None:
        if not self._buffer:
            return
        if self._file is None:
            # Runs right after this file has appeared under its key, before the other one does.
            self._files.callback(failpoint, "export.file_written")
            self._file = self._files.enter_context(self._blobs.create(self._key))
        self._file.write(self._buffer)
        self._digest.update(self._buffer)
        self._bytes += len(self._buffer)
        self._buffer.clear()

    def record(self, now: float) -> FileRecord | None:
        """The finished file; None when nothing was written."""
        if not self.lines:
            return None
        keep_s = self._batch.spec.output_expires_after_s
        return FileRecord(
            id=ids.new_id(ids.FILE),
            tenant=self._batch.spec.tenant,
            purpose=FilePurpose.BATCH_OUTPUT,
            filename=self._filename,
            bytes=self._bytes,
            sha256=self._digest.hexdigest(),
            blob_key=self._key,
            created_at=now,
            expires_at=None if keep_s is None else now + keep_s,
        )
