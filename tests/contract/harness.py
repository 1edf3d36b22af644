"""A store under test, with time that passes on command and a look at its slices."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, LiteralString, Protocol

import psycopg

from qlm_batch.domain.jobs import (
    CHAT,
    Batch,
    BatchSpec,
    BatchState,
    Callbacks,
    ClaimedRequest,
    ClaimedSlice,
    EngineKind,
    ExportLine,
    FilePurpose,
    FileRecord,
    OnMiss,
    RequestLine,
    ResultRow,
    SliceState,
    Usage,
)
from qlm_batch.domain.ledger import Held
from qlm_batch.domain.records import Heartbeat
from qlm_batch.domain.snapshot import Assignment, InstanceState, ModelView, Residency
from qlm_batch.domain.store import Store
from qlm_batch.store.columns import METADATA
from qlm_batch.store.memory import MemoryStore
from qlm_batch.store.postgres import PostgresStore

MODEL = "qlm-tiny"
TENANT = "acme"
LEASE = 30.0
TERM = 10.0
WINDOW = 3600.0
SECRET_KEY = base64.urlsafe_b64encode(bytes(32))


@dataclass(frozen=True, slots=True)
class SliceLook:
    """A slice as stored, and which of its positions have a row in its generation."""

    id: int
    batch_id: str
    run_id: int
    generation: int
    lo: int
    hi: int
    state: SliceState
    epoch: int
    attempts: int


class StoreHarness(Protocol):
    """What the suite needs besides the port."""

    store: Store

    def advance(self, seconds: float) -> None:
        """Let time pass for the store."""
        ...

    def slices(self) -> Sequence[SliceLook]:
        """All slices, by id."""
        ...

    def rows(self) -> Mapping[tuple[int, int, int], bool]:
        """Whether each (run, position, generation) with a row is a success."""
        ...

    def everything(self) -> str:
        """All that is stored, as text: to show that a secret is not among it."""
        ...

    def close(self) -> None:
        """Give everything back."""
        ...


class MemoryHarness:
    """The in-memory store on a clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.time = 1_800_000_000.0
        self.memory = MemoryStore(lambda: self.time)
        self.store: Store = self.memory

    def advance(self, seconds: float) -> None:
        self.time += seconds

    def slices(self) -> Sequence[SliceLook]:
        return [
            SliceLook(
                s.id, s.run.batch_id, s.run.id, s.generation, s.lo, s.hi, s.state, s.epoch,
                s.attempts,
            )
            for s in sorted(self.memory.state.slices.values(), key=lambda s: s.id)
        ]  # fmt: skip

    def rows(self) -> Mapping[tuple[int, int, int], bool]:
        return {
            (run.id, position, generation): row.ok
            for run in self.memory.state.runs.values()
            for generation, rows in run.rows.items()
            for position, row in rows.items()
        }

    def everything(self) -> str:
        state = self.memory.state
        return repr((state.keys, state.keys_by_hash))

    def close(self) -> None:
        self.store.close()


# Moments that the database compares with its clock; setting them back is letting time pass.
_MOMENTS = {
    "slice": ("lease_until", "expires_at", "deadline"),
    "leader": ("until",),
    "instance": ("beat_at",),
    "file": ("expires_at",),
    "unowned_blob": ("since",),
    "batch": (
        "claim_until",
        "deadline",
        "completed_at",
        "failed_at",
        "expired_at",
        "cancelled_at",
    ),
    "outbox": ("claim_until", "next_attempt_at"),
    "webhook_endpoint": ("expires_at",),
    "request": ("deadline",),
    "result": ("stored_at",),
    "interactive_request": ("created_at", "ended_at"),
}


class PostgresHarness:
    """The PostgreSQL store; time passes by setting stored moments back.

    An instance counts as lost once it has been silent for `silent_s`.
    """

    def __init__(self, url: str, silent_s: float = 15.0) -> None:
        self.url = url
        self.store: Store = PostgresStore(
            url, secret_key=SECRET_KEY, pool_size=4, instance_silent_s=silent_s
        )
        self._connection = psycopg.connect(url, autocommit=True)

    def advance(self, seconds: float) -> None:
        with self._connection.transaction():
            for table, columns in _MOMENTS.items():
                moved = ", ".join(f"{name} = {name} - %(s)s" for name in columns)
                self._connection.execute(f"UPDATE {table} SET {moved}", {"s": seconds})

    def slices(self) -> Sequence[SliceLook]:
        rows = self._connection.execute(
            "SELECT id, batch_id, run_id, generation, lo, hi, state, epoch, attempts"
            " FROM slice ORDER BY id"
        )
        return [SliceLook(*row[:6], SliceState(row[6]), *row[7:]) for row in rows]

    def rows(self) -> Mapping[tuple[int, int, int], bool]:
        rows = self._connection.execute("SELECT run_id, position, generation, ok FROM result")
        return {(run, position, generation): ok for run, position, generation, ok in rows}

    def everything(self) -> str:
        return repr(self._connection.execute("SELECT * FROM api_key").fetchall())

    def execute(self, statement: LiteralString) -> psycopg.Cursor[Any]:
        """Run one statement of a test's own."""
        return self._connection.execute(statement)

    def truncate(self) -> None:
        """Empty every table, as if migrated just now."""
        # Deleting few rows is many times quicker than giving every table a new file.
        with self._connection.transaction():
            for table in reversed(METADATA.sorted_tables):
                self._connection.execute(f'DELETE FROM "{table.name}"')

    def close(self) -> None:
        self.store.close()
        self._connection.close()


class Bench:
    """Short words for what the tests do again and again."""

    def __init__(self, harness: StoreHarness) -> None:
        self.harness = harness
        self.store = harness.store
        self.batches = 0
        self.epoch = 0

    def file(self, file_id: str = "file-in", **changes: object) -> FileRecord:
        """A recorded input file."""
        record = FileRecord(
            file_id, TENANT, FilePurpose.BATCH, "in.jsonl", 10, "0" * 64, f"blob-{file_id}",
            self.store.now(),
        )  # fmt: skip
        record = replace(record, **changes)  # type: ignore[arg-type]
        self.store.add_file(record)
        return record

    def spec(self, **changes: object) -> BatchSpec:
        """A specification of a batch over `file-in`."""
        spec = BatchSpec(TENANT, CHAT, "file-in", "1h", WINDOW)
        return replace(spec, **changes)  # type: ignore[arg-type]

    def batch(
        self, lines: int = 4, *, slice_requests: int = 2, on_miss: OnMiss = OnMiss.EXPIRE,
        webhook: str | None = "https://example.test/hook", email: str | None = None,
    ) -> Batch:  # fmt: skip
        """A batch in progress."""
        self.file()
        self.batches += 1
        batch_id = f"batch_{self.batches}"
        spec = self.spec(on_miss=on_miss, callbacks=Callbacks(webhook, email))
        self.store.create_batch(batch_id, spec)
        task = self.store.claim_intake("intake", 60.0)
        assert task is not None
        self.store.load_lines(task.batch.id, "intake", lines_of(lines), slice_requests)
        return self.get(batch_id)

    def get(self, batch_id: str) -> Batch:
        """The batch now."""
        return self.store.batch(TENANT, batch_id)

    def lead(self, holder: str = "leader") -> int:
        """Lead, taking over where the term ran out."""
        epoch = self.store.lead(holder, TERM)
        assert epoch is not None
        self.epoch = epoch
        return epoch

    def beat(self, name: str = "gpu-0", boot: str = "boot-1", **changes: object) -> bool:
        """A heartbeat."""
        model = ModelView(MODEL, EngineKind.GENERATE, Residency.AWAKE, 2048)
        beat = Heartbeat(name, boot, "cpu", InstanceState.READY, (model,), 8, 10_000)
        return self.store.heartbeat(replace(beat, **changes))  # type: ignore[arg-type]

    def assign(self, name: str = "gpu-0", most: int = 100) -> int:
        """Give everything queued to an instance."""
        self.lead()
        parts = [
            Assignment(name, run.run_id, run.generation, min(most, run.slices), "group")
            for run in self.store.snapshot().runs
        ]
        return sum(self.store.assign(self.epoch, parts).values())

    def claim(
        self, name: str = "gpu-0", boot: str = "boot-1", *, most: int = 10_000, holding: int = 0
    ) -> list[ClaimedSlice]:
        """Lease what is assigned."""
        return list(
            self.store.claim_slices(name, boot, max_requests=most, lease_s=LEASE, holding=holding)
        )

    def take(self, name: str = "gpu-0", boot: str = "boot-1") -> list[ClaimedSlice]:
        """Report life, get everything queued assigned, and lease it."""
        self.beat(name, boot)
        self.assign(name)
        return self.claim(name, boot)

    def serve(self, name: str = "gpu-0", boot: str = "boot-1") -> None:
        """Answer everything that is queued."""
        while claimed := self.take(name, boot):
            for part in claimed:
                self.finish(part, name)

    def finish(self, part: ClaimedSlice, name: str = "gpu-0", *, ok: bool = True) -> None:
        """Answer every request of a slice."""
        rows = [answer(part, request, ok=ok) for request in part.requests]
        self.store.flush(name, rows, [held(part, complete=True)], lease_s=LEASE)

    def lose(self) -> None:
        """Let every lease run out, and reap."""
        self.harness.advance(LEASE + 1)
        self.store.reap(self.lead())

    def export(self, batch_id: str) -> Batch:
        """Write the files of a settled batch."""
        task = self.store.claim_export("export", 60.0)
        assert task is not None
        assert task.batch.id == batch_id
        ended = self.store.finish_export(batch_id, "export", None, None)
        assert ended is not None
        return ended

    def lines(self, batch_id: str, *, partial: bool = False) -> list[ExportLine]:
        """The lines as an export reads them."""
        return list(self.store.export_lines(batch_id, partial=partial))

    def open_slices(self) -> list[SliceLook]:
        """Slices that still take results."""
        return [s for s in self.harness.slices() if s.state in ("queued", "assigned", "leased")]


def lines_of(count: int, **changes: object) -> list[RequestLine]:
    """Lines 1…count with ids `c1`…"""
    return [
        replace(
            RequestLine(n, f"c{n}", MODEL, f'{{"n":{n}}}', 10, 20),
            **changes,  # type: ignore[arg-type]
        )
        for n in range(1, count + 1)
    ]


def held(part: ClaimedSlice, *, complete: bool = False) -> Held:
    """The lease as its holder knows it."""
    return Held(part.slice_id, part.epoch, complete)


def answer(
    part: ClaimedSlice, request: ClaimedRequest, *, ok: bool = True, tag: str = ""
) -> ResultRow:
    """A success with 5 tokens in and 7 out, or an error without an HTTP answer."""
    base = ResultRow(
        slice_id=part.slice_id,
        epoch=part.epoch,
        run_id=part.run_id,
        position=request.position,
        generation=part.generation,
        request_id=f"req-{part.slice_id}-{part.epoch}-{request.position}{tag}",
    )
    if ok:
        return replace(base, status_code=200, body='{"ok":true}', usage=Usage(5, 0, 7))
    return replace(base, error_code="server_error", error_message="it broke")


def ended(batch: Batch) -> bool:
    """Whether the batch is in a terminal state."""
    return batch.state in (
        BatchState.COMPLETED, BatchState.FAILED, BatchState.EXPIRED, BatchState.CANCELLED
    )  # fmt: skip
