"""Files in, files out, on both stores: what a file becomes and what comes back of it."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet

from qlm_batch import ids
from qlm_batch.control.export_service import ExportConfig, ExportService
from qlm_batch.control.intake_service import IntakeConfig, IntakeService
from qlm_batch.control.keepalive import KeepAlive
from qlm_batch.control.retention import RetentionConfig, RetentionService
from qlm_batch.domain.engine import EngineAnswer, EngineRequest
from qlm_batch.domain.errors import Conflict, NotFound, Unavailable
from qlm_batch.domain.jobs import (
    COMPLETIONS,
    Batch,
    BatchSpec,
    BatchState,
    Callbacks,
    ClaimedRequest,
    EngineKind,
    FilePurpose,
    FileRecord,
    RequestCounts,
    ResultRow,
)
from qlm_batch.domain.ledger import Held
from qlm_batch.domain.records import Heartbeat
from qlm_batch.domain.snapshot import Assignment, InstanceState
from qlm_batch.domain.store import Store
from qlm_batch.intake.blobs import LocalBlobs
from qlm_batch.intake.scratch import make_scratch
from qlm_batch.store.memory import MemoryStore
from qlm_batch.store.postgres import PostgresStore
from qlm_workers.answers import Door

TENANT = "acme"


@pytest.fixture(params=["memory", "postgres"])
def store(request: pytest.FixtureRequest) -> Iterator[Store]:
    if request.param == "memory":
        yield MemoryStore(time.time)
        return
    url = request.getfixturevalue("postgres_url")
    postgres = PostgresStore(url, secret_key=Fernet.generate_key())
    yield postgres
    postgres.close()


@dataclass
class House:
    """A store, its blobs and the services on them."""

    store: Store
    blobs: LocalBlobs
    folder: Path

    def submit(self, data: bytes, **spec: Any) -> Batch:
        """Upload and create a batch over a file."""
        record = self.add_file(data)
        asked = BatchSpec(TENANT, COMPLETIONS, record.id, "1h", 3_600.0)
        return self.store.create_batch(ids.new_id(ids.BATCH), replace(asked, **spec))

    def add_file(self, data: bytes, expires_at: float | None = None) -> FileRecord:
        file_id = ids.new_id(ids.FILE)
        with self.blobs.create(file_id) as file:
            file.write(data)
        record = FileRecord(
            id=file_id,
            tenant=TENANT,
            purpose=FilePurpose.BATCH,
            filename="in.jsonl",
            bytes=len(data),
            sha256=hashlib.sha256(data).hexdigest(),
            blob_key=file_id,
            created_at=self.store.now(),
            expires_at=expires_at,
        )
        self.store.add_file(record)
        return record

    def intake(self, **changes: Any) -> IntakeService:
        config = IntakeConfig("test-intake", slice_requests=4)
        return IntakeService(self.store, self.blobs, replace(config, **changes))

    def export(self, **changes: Any) -> ExportService:
        return ExportService(
            self.store, self.blobs, replace(ExportConfig("test-export"), **changes)
        )

    def batch(self, batch: Batch) -> Batch:
        return self.store.batch(TENANT, batch.id)

    def answer(self, outcome: Callable[[ClaimedRequest], dict[str, Any] | None]) -> None:
        """Play a worker: lease everything and store what `outcome` says, None being no result."""
        beat = Heartbeat("gpu-0", "boot-1", "cpu", InstanceState.READY, (), 64, 100_000)
        assert self.store.heartbeat(beat)
        epoch = self.store.lead("test-leader", 30.0)
        assert epoch is not None
        runs = {(s.run_id, s.generation) for s in self.store.snapshot().runs}
        plan = [Assignment("gpu-0", run, generation, 1000, "g") for run, generation in sorted(runs)]
        self.store.assign(epoch, plan)
        for leased in self.store.claim_slices("gpu-0", "boot-1", max_requests=10_000, lease_s=30.0):
            rows = []
            for request in leased.requests:
                result = outcome(request)
                if result is None:
                    continue
                row = ResultRow(
                    slice_id=leased.slice_id,
                    epoch=leased.epoch,
                    run_id=request.run_id,
                    position=request.position,
                    generation=leased.generation,
                    request_id=f"req-{request.position}",
                )
                rows.append(replace(row, **result))
            held = Held(leased.slice_id, leased.epoch, complete=len(rows) == len(leased.requests))
            self.store.flush("gpu-0", rows, [held], lease_s=30.0)

    def lines_of(self, file_id: str | None) -> list[dict[str, Any]]:
        """A result file's lines, checked against its record."""
        if file_id is None:
            return []
        record = self.store.file(TENANT, file_id)
        with self.blobs.open(record.blob_key) as file:
            data = file.read()
        assert record.bytes == len(data)
        assert record.sha256 == hashlib.sha256(data).hexdigest()
        assert record.purpose is FilePurpose.BATCH_OUTPUT
        return [json.loads(line) for line in data.splitlines()]


@pytest.fixture
def house(store: Store, tmp_path: Path) -> House:
    return House(store, LocalBlobs(tmp_path / "blobs"), tmp_path)


def line(number: int, **changes: Any) -> bytes:
    body = {"model": f"model-{number % 2}", "prompt": f"Say {number}", "max_tokens": 4}
    members = {"custom_id": f"c{number}", "method": "POST", "url": COMPLETIONS, "body": body}
    return json.dumps(members | changes).encode() + b"\n"


def lines(count: int) -> bytes:
    return b"".join(line(number) for number in range(count))


def succeed(request: ClaimedRequest) -> dict[str, Any]:
    return {"status_code": 200, "body": json.dumps({"echo": json.loads(request.body)["prompt"]})}


def test_a_file_goes_in_and_every_line_comes_out(house: House) -> None:
    batch = house.submit(lines(10))
    result = house.intake().run_once()
    assert (result.batch_id, result.lines, result.errors) == (batch.id, 10, 0)
    loaded = house.batch(batch)
    assert (loaded.state, loaded.counts) == (BatchState.IN_PROGRESS, RequestCounts(10, 0, 0))
    assert sorted(loaded.models) == ["model-0", "model-1"]

    house.answer(succeed)
    assert house.batch(batch).state is BatchState.FINALIZING
    exported = house.export().run_once()
    assert (exported.output_lines, exported.error_lines) == (10, 0)

    done = house.batch(batch)
    assert (done.state, done.counts) == (BatchState.COMPLETED, RequestCounts(10, 10, 0))
    assert done.error_file_id is None
    found = house.lines_of(done.output_file_id)
    assert {x["custom_id"]: x["response"]["body"]["echo"] for x in found} == {
        f"c{n}": f"Say {n}" for n in range(10)
    }
    assert done.output_file_id is not None
    assert house.store.file(TENANT, done.output_file_id).filename == f"{batch.id}_output.jsonl"


def test_failures_of_every_kind_go_to_the_error_file(house: House) -> None:
    def outcome(request: ClaimedRequest) -> dict[str, Any]:
        number = int(json.loads(request.body)["prompt"].split()[1])
        if number == 0:
            return {"status_code": 400, "body": '{"error": {"message": "too long"}}'}
        if number == 1:
            return {"error_code": "request_timeout", "error_message": "too slow"}
        return succeed(request)

    batch = house.submit(lines(5))
    house.intake().run_once()
    house.answer(outcome)
    house.export().run_once()
    done = house.batch(batch)
    assert done.counts == RequestCounts(5, 3, 2)
    assert len(house.lines_of(done.output_file_id)) == 3
    errors = {x["custom_id"]: x for x in house.lines_of(done.error_file_id)}
    assert errors["c0"]["response"]["body"]["error"]["message"] == "too long"
    assert errors["c0"]["error"] is None
    assert errors["c1"]["response"] is None
    assert errors["c1"]["error"]["code"] == "request_timeout"


def test_a_line_with_half_of_a_surrogate_pair_fails_alone(house: House) -> None:
    halved = line(1, body={"model": "model-0", "prompt": "cut in an emoji: \ud83d"})
    batch = house.submit(line(0) + halved + line(2))
    house.intake().run_once()

    def outcome(request: ClaimedRequest) -> dict[str, Any]:
        asked = EngineRequest("r", COMPLETIONS, request.body, 0, TENANT)
        read = Door("model-0", EngineKind.GENERATE).read(asked)
        if isinstance(read, EngineAnswer):
            return {"status_code": read.status_code, "body": read.body}
        return succeed(request)

    house.answer(outcome)
    house.export().run_once()
    ended = house.batch(batch)
    assert [each["custom_id"] for each in house.lines_of(ended.output_file_id)] == ["c0", "c2"]
    (failed,) = house.lines_of(ended.error_file_id)
    assert failed["custom_id"] == "c1"
    assert failed["response"]["status_code"] == 400
    assert failed["response"]["body"]["error"]["code"] == "invalid_json"


def test_a_batch_whose_lines_all_failed_is_complete_without_an_output_file(house: House) -> None:
    batch = house.submit(lines(3))
    house.intake().run_once()
    house.answer(lambda _: {"error_code": "server_error", "error_message": "no"})
    house.export().run_once()
    done = house.batch(batch)
    assert (done.state, done.output_file_id) == (BatchState.COMPLETED, None)
    assert len(house.lines_of(done.error_file_id)) == 3


def test_a_cancelled_batch_accounts_for_every_line(house: House) -> None:
    batch = house.submit(lines(8))
    house.intake().run_once()
    house.answer(lambda r: succeed(r) if r.position == 0 else None)
    house.store.cancel_batch(TENANT, batch.id)
    house.export().run_once()
    done = house.batch(batch)
    assert done.state is BatchState.CANCELLED
    output, errors = house.lines_of(done.output_file_id), house.lines_of(done.error_file_id)
    assert {x["custom_id"] for x in output + errors} == {f"c{n}" for n in range(8)}
    assert (len(output), len(errors)) == (done.counts.completed, done.counts.failed)
    assert {x["error"]["code"] for x in errors} == {"batch_cancelled"}


def test_result_files_expire_as_asked(house: House) -> None:
    batch = house.submit(lines(1), output_expires_after_s=3_600.0)
    house.intake().run_once()
    house.answer(succeed)
    house.export().run_once()
    file_id = house.batch(batch).output_file_id
    assert file_id is not None
    record = house.store.file(TENANT, file_id)
    assert record.expires_at == pytest.approx(record.created_at + 3_600.0)


@pytest.mark.parametrize(
    ("data", "code", "number"),
    [
        (b"", "empty_file", None),
        (line(0) + b"{\n" + line(1), "invalid_json_line", 2),
        (line(0) + b"\xff\xfe\n", "invalid_json_line", 2),
        (line(0) + line(1, custom_id=None), "missing_required_parameter", 2),
        (line(0) + line(1, url="/v1/embeddings"), "url_mismatch", 2),
        (line(0) + line(1) + line(0), "duplicate_custom_id", 3),
        (lines(11), "too_many_tasks", 11),
        (line(0) + b" " * 5_000 + line(1), "line_too_long", 2),
    ],
)
def test_a_bad_file_fails_its_batch_with_line_and_reason_and_leaves_nothing(
    house: House, data: bytes, code: str, number: int | None
) -> None:
    batch = house.submit(data, callbacks=Callbacks(webhook="https://example.com/"))
    house.intake(max_lines=10, max_line_bytes=4_000).run_once()
    failed = house.batch(batch)
    assert failed.state is BatchState.FAILED
    assert (failed.errors[0].code, failed.errors[0].line) == (code, number)
    assert failed.counts.total == 0
    assert house.store.queue_totals().slices == 0
    (event,) = house.store.claim_outbox("test", 10, 30.0)
    assert event.type == "batch.failed"
    assert not house.intake().run_once()


def test_all_faults_are_counted_and_the_first_hundred_listed(house: House) -> None:
    batch = house.submit(b"{\n" * 300)
    assert house.intake().run_once().errors == 300
    failed = house.batch(batch)
    assert (len(failed.errors), failed.error_count) == (100, 300)


def test_a_strict_batch_is_refused_for_a_bad_body(house: House) -> None:
    data = line(0, body={"model": "m", "prompt": 5})
    lenient, strict = house.submit(data), house.submit(data, strict=True)
    while house.intake().run_once():
        pass
    assert house.batch(lenient).state is BatchState.IN_PROGRESS
    assert house.batch(strict).errors[0].code == "invalid_request"


def test_a_file_deleted_before_it_was_read_fails_the_batch_with_that_reason(house: House) -> None:
    batch = house.submit(lines(1))
    record = house.store.delete_file(TENANT, batch.spec.input_file_id)
    house.blobs.delete(record.blob_key)
    house.intake().run_once()
    failed = house.batch(batch)
    assert (failed.state, failed.errors[0].code) == (BatchState.FAILED, "file_not_found")


def test_lost_bytes_fail_the_batch_instead_of_hanging_it(house: House) -> None:
    batch = house.submit(lines(1))
    house.blobs.delete(batch.spec.input_file_id)
    house.intake().run_once()
    assert house.batch(batch).errors[0].code == "file_not_found"


def test_a_batch_cancelled_while_it_is_read_takes_no_lines(house: House) -> None:
    batch = house.submit(lines(2_000))

    class CancellingBlobs(LocalBlobs):
        def open(self, key: str) -> Any:
            house.store.cancel_batch(TENANT, batch.id)
            return super().open(key)

    service = house.intake()
    service = IntakeService(house.store, CancellingBlobs(house.folder / "blobs"), service._config)
    result = service.run_once()
    assert (result.lines, result.errors) == (0, 0)
    house.export().run_once()
    cancelled = house.batch(batch)
    assert (cancelled.state, cancelled.counts.total) == (BatchState.CANCELLED, 0)


def test_an_export_that_fails_half_way_shows_nothing_and_is_done_again(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = house.submit(lines(6))
    house.intake().run_once()
    house.answer(succeed)
    real = house.store.export_lines

    def broken(batch_id: str, *, partial: bool = False) -> Iterator[Any]:
        for count, each in enumerate(real(batch_id, partial=partial)):
            if count == 3:
                raise Unavailable("database away")
            yield each

    monkeypatch.setattr(house.store, "export_lines", broken)
    with pytest.raises(Unavailable):
        house.export(lease_s=0.05).run_once()
    assert not (house.folder / "blobs" / "results").exists()
    monkeypatch.undo()
    deadline = time.monotonic() + 30
    while not house.export().run_once():
        assert time.monotonic() < deadline, "the export was never taken up again"
        time.sleep(0.02)
    assert len(house.lines_of(house.batch(batch).output_file_id)) == 6


def test_an_export_whose_lease_was_lost_ends_nothing(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = house.submit(lines(2))
    house.intake().run_once()
    house.answer(succeed)
    monkeypatch.setattr(house.store, "finish_export", lambda *_: None)
    assert house.export().run_once().batch_id == batch.id
    monkeypatch.undo()
    assert house.batch(batch).state is BatchState.FINALIZING


def test_expired_files_lose_their_bytes(house: House) -> None:
    now = house.store.now()
    old, kept = house.add_file(b"old", now - 1), house.add_file(b"kept", now + 3_600)
    service = RetentionService(house.store, house.blobs, RetentionConfig())
    assert service.run_once().files == 1
    with pytest.raises(NotFound), house.blobs.open(old.blob_key):
        pass
    with house.blobs.open(kept.blob_key) as file:
        assert file.read() == b"kept"
    assert not service.run_once()


def test_a_blob_that_no_file_owns_is_removed_after_a_day(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = house.add_file(b"kept")
    for key in ("files/file-left", kept.blob_key):
        house.store.expect_blob(key)
    with house.blobs.create("files/file-left") as file:
        file.write(b"left")
    house.store.add_file(kept)
    service = RetentionService(house.store, house.blobs, RetentionConfig())
    assert not service.run_once()
    monkeypatch.setattr("qlm_batch.control.retention._UNOWNED_S", 0.0)
    assert service.run_once().strays == 1
    with pytest.raises(NotFound), house.blobs.open("files/file-left"):
        pass
    with house.blobs.open(kept.blob_key) as file:
        assert file.read() == b"kept"
    assert not service.run_once()


def test_bytes_that_could_not_be_removed_are_removed_later(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = house.add_file(b"old", house.store.now() - 1)

    def away(key: str) -> None:
        raise Unavailable("The storage is away.")

    monkeypatch.setattr(house.blobs, "delete", away)
    monkeypatch.setattr("qlm_batch.control.retention._UNOWNED_S", 0.0)
    service = RetentionService(house.store, house.blobs, RetentionConfig())
    with pytest.raises(Unavailable):
        service.run_once()
    monkeypatch.undo()
    monkeypatch.setattr("qlm_batch.control.retention._UNOWNED_S", 0.0)
    assert service.run_once().strays == 1
    with pytest.raises(NotFound), house.blobs.open(old.blob_key):
        pass


def test_a_batch_past_its_time_goes_and_its_files_stay(house: House) -> None:
    batch = house.submit(lines(5))
    house.intake().run_once()
    house.answer(succeed)
    house.export().run_once()
    ended = house.batch(batch)
    kept = RetentionService(house.store, house.blobs, RetentionConfig())
    assert not kept.run_once()
    assert RetentionService(house.store, house.blobs, RetentionConfig(rows_s=0.0)).run_once()
    with pytest.raises(NotFound):
        house.batch(batch)
    assert len(house.lines_of(ended.output_file_id)) == 5


def test_what_crashes_left_half_written_is_swept_and_nothing_else(tmp_path: Path) -> None:
    left, folder = tmp_path / "left", tmp_path / "folder"
    left.touch()
    folder.mkdir()
    handle, written = make_scratch(tmp_path)
    config = RetentionConfig(scratch=(tmp_path, tmp_path / "absent"))
    service = RetentionService(MemoryStore(time.time), LocalBlobs(tmp_path / "blobs"), config)
    assert service.run_once().leftovers == 1
    assert (left.exists(), written.exists(), folder.exists()) == (False, True, True)
    os.close(handle)
    assert service.run_once().leftovers == 1
    assert not written.exists()


def test_a_lease_is_renewed_while_the_work_goes_on() -> None:
    renewed = threading.Semaphore(0)

    def renew() -> bool:
        renewed.release()
        return True

    with KeepAlive(renew, lease_s=0.03) as lease:
        assert all(renewed.acquire(timeout=30) for _ in range(3))
        lease.check()


def test_an_outage_while_renewing_does_not_end_the_work_but_a_lost_lease_does() -> None:
    answers: list[Any] = [Unavailable("away"), True, False]
    lost = threading.Event()

    def renew() -> bool:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        if not answer:
            lost.set()
        return bool(answer)

    with KeepAlive(renew, lease_s=0.03) as lease:
        assert lost.wait(30)
        deadline = time.monotonic() + 30
        while True:
            try:
                lease.check()
            except Conflict:
                break
            assert time.monotonic() < deadline
            time.sleep(0.002)
    assert answers == []
