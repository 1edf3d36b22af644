"""Turns uploaded files into runs and slices."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import structlog

from qlm_batch.control.keepalive import KeepAlive
from qlm_batch.domain.errors import Conflict, InvalidInput, NotFound
from qlm_batch.domain.jobs import LineError, RequestLine
from qlm_batch.domain.ports import BlobStore
from qlm_batch.domain.records import IntakeTask
from qlm_batch.domain.store import IntakeStore
from qlm_batch.failpoints import failpoint
from qlm_batch.intake.jsonl import FileRefused, LineRules, read_requests
from qlm_batch.intake.lines import chunks_of
from qlm_batch.settings import Settings

log = structlog.get_logger(__name__)

_CHECK_EVERY_LINES = 1024


@dataclass(frozen=True, slots=True)
class IntakeConfig:
    """`holder` names this process in leases; limits are as in the settings."""

    holder: str
    slice_requests: int = 64
    max_line_bytes: int = 1024**2
    max_lines: int = 5_000_000
    max_depth: int = 64
    max_n: int = 16
    lease_s: float = 30.0
    idle_s: float = 0.25

    @classmethod
    def of(cls, settings: Settings, holder: str) -> IntakeConfig:
        """The configuration these settings ask for."""
        return cls(
            holder=holder,
            slice_requests=settings.slice_requests,
            max_line_bytes=settings.max_line_bytes,
            max_lines=settings.max_lines,
            max_depth=settings.max_json_depth,
            max_n=settings.max_n,
            lease_s=settings.lease_s,
        )


@dataclass(frozen=True, slots=True)
class IntakeResult:
    """One pass: the batch it took up, if any, and how that ended."""

    batch_id: str | None = None
    lines: int = 0
    errors: int = 0

    def __bool__(self) -> bool:
        return self.batch_id is not None


class IntakeService:
    """Reads the file of one validating batch per pass, all or nothing."""

    name = "intake"

    def __init__(self, store: IntakeStore, blobs: BlobStore, config: IntakeConfig) -> None:
        self._store = store
        self._blobs = blobs
        self._config = config
        self.idle_s = config.idle_s

    def run_once(self) -> IntakeResult:
        """Take up the oldest waiting batch and load it, or fail it with the faults of its file.

        A claim lost on the way (another process, a cancellation) leaves nothing behind.
        """
        task = self._store.claim_intake(self._config.holder, self._config.lease_s)
        if task is None:
            return IntakeResult()
        batch_id = task.batch.id
        try:
            lines = self._load(task)
        except FileRefused as refused:
            return self._fail(batch_id, refused.errors, refused.total)
        except InvalidInput as error:
            fault = LineError(error.code or "invalid_file", error.message, error.line, error.param)
            return self._fail(batch_id, [fault], 1)
        except NotFound:
            message = "The input file was deleted before it was read; upload it again."
            fault = LineError("file_not_found", message, None, "input_file_id")
            return self._fail(batch_id, [fault], 1)
        except Conflict as error:
            log.info("intake_given_up", batch=batch_id, reason=error.message)
            return IntakeResult(batch_id)
        log.info("batch_loaded", batch=batch_id, lines=lines)
        return IntakeResult(batch_id, lines=lines)

    def close(self) -> None:
        """Nothing is held between passes."""

    def _load(self, task: IntakeTask) -> int:
        config, batch = self._config, task.batch
        rules = LineRules(
            endpoint=batch.spec.endpoint,
            accepted_at=batch.created_at,
            batch_deadline=batch.deadline,
            max_line_bytes=config.max_line_bytes,
            max_lines=config.max_lines,
            max_depth=config.max_depth,
            max_n=config.max_n,
            strict=batch.spec.strict,
        )

        def renew() -> bool:
            return self._store.renew_intake(batch.id, config.holder, config.lease_s)

        with (
            self._blobs.open(task.file.blob_key) as file,
            KeepAlive(renew, config.lease_s) as lease,
        ):
            requests = _while_held(read_requests(chunks_of(file), rules), lease)
            return self._store.load_lines(batch.id, config.holder, requests, config.slice_requests)

    def _fail(
        self, batch_id: str, errors: list[LineError] | tuple[LineError, ...], total: int
    ) -> IntakeResult:
        try:
            self._store.fail_intake(batch_id, self._config.holder, errors, total)
        except Conflict as error:
            log.info("intake_given_up", batch=batch_id, reason=error.message)
            return IntakeResult(batch_id)
        log.info("batch_refused", batch=batch_id, errors=total, first=errors[0].message)
        return IntakeResult(batch_id, errors=total)


def _while_held(requests: Iterable[RequestLine], lease: KeepAlive) -> Iterator[RequestLine]:
    for count, request in enumerate(requests):
        if count % _CHECK_EVERY_LINES == 0:
            lease.check()
            failpoint("intake.chunk")
        yield request
    lease.check()
