"""What only a real database can show: locks, forced interleavings, leases on its clock."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import psycopg
import pytest
from cryptography.fernet import Fernet
from sqlalchemy.exc import IntegrityError

from qlm_batch.domain.errors import InvalidInput, NotLeader, Unavailable
from qlm_batch.domain.interactive import NewInteractive
from qlm_batch.domain.jobs import (
    CHAT,
    BatchSpec,
    BatchState,
    Callbacks,
    ClaimedSlice,
    EngineKind,
    FilePurpose,
    FileRecord,
    OnMiss,
    RequestLine,
    ResultRow,
    SliceState,
)
from qlm_batch.domain.ledger import Directive, Held, ReleaseReason
from qlm_batch.domain.records import Heartbeat
from qlm_batch.domain.snapshot import Assignment, InstanceState, ModelView, Residency
from qlm_batch.store import interactive
from qlm_batch.store.postgres import PostgresStore

TENANT, BATCH, GPU, BOOT = "acme", "batch_1", "gpu-0", "boot-1"


@pytest.fixture
def store(postgres_url: str) -> Iterator[PostgresStore]:
    made = PostgresStore(postgres_url, secret_key=Fernet.generate_key(), instance_silent_s=600.0)
    yield made
    made.close()


def _line(number: int, custom_id: str | None = None, **given: object) -> RequestLine:
    return RequestLine(
        line=number,
        custom_id=custom_id or f"id-{number}",
        model="tiny",
        body='{"text": "a\\tb\\\\c\\nd"}',
        prompt_tokens=10,
        max_tokens=None,
        **given,  # type: ignore[arg-type]
    )


def _submit(store: PostgresStore, window_s: float = 600.0, **given: object) -> None:
    store.add_file(
        FileRecord("file-1", TENANT, FilePurpose.BATCH, "in.jsonl", 1, "00", "k", store.now())
    )
    spec = BatchSpec(TENANT, CHAT, "file-1", "10m", window_s, **given)  # type: ignore[arg-type]
    store.create_batch(BATCH, spec)
    assert store.claim_intake("reader", 30.0) is not None


def _running(store: PostgresStore, lines: int = 4, per_slice: int = 2, **given: object) -> int:
    """A batch in progress with everything assigned; the leader's epoch."""
    _submit(store, **given)  # type: ignore[arg-type]
    store.load_lines(BATCH, "reader", [_line(n + 1) for n in range(lines)], per_slice)
    _beat(store)
    epoch = store.lead("leader", 60.0)
    assert epoch is not None
    _assign(store, epoch)
    return epoch


def _beat(store: PostgresStore, boot: str = BOOT) -> bool:
    model = ModelView("tiny", EngineKind.GENERATE, Residency.AWAKE, 2048)
    return store.heartbeat(
        Heartbeat(GPU, boot, "cpu", InstanceState.READY, (model,), slots=8, kv_tokens=1000)
    )


def _assign(store: PostgresStore, epoch: int) -> None:
    wanted = [
        Assignment(GPU, run.run_id, run.generation, run.slices, "g")
        for run in store.snapshot().runs
    ]
    store.assign(epoch, wanted)


def _claim(store: PostgresStore, *, lease_s: float = 30.0, most: int = 1000) -> list[ClaimedSlice]:
    return list(store.claim_slices(GPU, BOOT, max_requests=most, lease_s=lease_s))


def _rows(work: ClaimedSlice, **given: object) -> list[ResultRow]:
    outcome = given or {"status_code": 200, "body": "{}"}
    return [
        ResultRow(
            slice_id=work.slice_id,
            epoch=work.epoch,
            run_id=work.run_id,
            position=request.position,
            generation=work.generation,
            request_id=f"req_{request.position}",
            **outcome,  # type: ignore[arg-type]
        )
        for request in work.requests
    ]


def _held(work: ClaimedSlice, *, complete: bool = False) -> Held:
    return Held(work.slice_id, work.epoch, complete)


def _until(met: Callable[[], bool], within_s: float = 30.0) -> None:
    deadline = time.monotonic() + within_s
    while not met():
        assert time.monotonic() < deadline, "the condition was not met in time"
        time.sleep(0.02)


def test_bodies_come_back_as_they_were_stored(store: PostgresStore) -> None:
    _running(store)
    bodies = {request.body for work in _claim(store) for request in work.requests}
    assert bodies == {_line(1).body}


def test_a_flush_that_waits_for_a_cancel_stores_nothing(
    store: PostgresStore, postgres_url: str
) -> None:
    _running(store, lines=2)
    (work,) = _claim(store)
    with psycopg.connect(postgres_url) as blocker:
        blocker.execute("SELECT 1 FROM slice WHERE id = %s FOR UPDATE", [work.slice_id])
        cancel = threading.Thread(target=store.cancel_batch, args=(TENANT, BATCH))
        cancel.start()
        _until(lambda: _waiting(postgres_url) == 1)
        outcomes = []
        flush = threading.Thread(
            target=lambda: outcomes.append(
                store.flush(GPU, _rows(work), [_held(work, complete=True)], lease_s=30.0)
            )
        )
        flush.start()
        _until(lambda: _waiting(postgres_url) == 2)
    cancel.join(30)
    flush.join(30)
    assert (outcomes[0].written, outcomes[0].rejected) == (0, 2)
    assert outcomes[0].directives == {work.slice_id: Directive.CLOSED}
    batch = store.batch(TENANT, BATCH)
    assert batch.state is BatchState.CANCELLING
    assert (batch.counts.completed, batch.counts.failed) == (0, 2)


def _waiting(url: str) -> int:
    with psycopg.connect(url) as connection:
        row = connection.execute(
            "SELECT count(DISTINCT pid) FROM pg_locks WHERE NOT granted"
        ).fetchone()
    return int(row[0]) if row else 0


def test_a_lease_that_ran_out_is_queued_again_and_its_late_success_still_counts(
    store: PostgresStore,
) -> None:
    epoch = _running(store, lines=2)
    (work,) = _claim(store, lease_s=0.05)
    _until(lambda: store.reap(epoch).requeued == 1)
    late = store.flush(GPU, _rows(work), [_held(work)], lease_s=30.0)
    assert late.written == 2
    assert store.batch(TENANT, BATCH).state is BatchState.FINALIZING


def test_an_error_from_a_lost_lease_is_refused(store: PostgresStore) -> None:
    epoch = _running(store, lines=2)
    (work,) = _claim(store, lease_s=0.05)
    _until(lambda: store.reap(epoch).requeued == 1)
    outcome = store.flush(GPU, _rows(work, status_code=500, body="{}"), [_held(work)], lease_s=30.0)
    assert (outcome.written, outcome.directives[work.slice_id]) == (0, Directive.LOST)


def test_a_stopped_leader_changes_nothing_once_another_leads(store: PostgresStore) -> None:
    _submit(store)
    old = store.lead("first", 0.05)
    assert old is not None
    _until(lambda: store.lead("second", 30.0) is not None)
    with pytest.raises(NotLeader):
        store.reap(old)
    assert store.lead("first", 30.0) is None


def test_a_poison_line_is_cornered_and_only_it_fails(store: PostgresStore) -> None:
    epoch = _running(store, lines=8, per_slice=8)
    poison = 5
    for _ in range(60):
        claimed = _claim(store)
        for work in claimed:
            if any(request.position == poison for request in work.requests):
                store.release(GPU, [_held(work)], ReleaseReason.ENGINE_DIED)
            else:
                store.flush(GPU, _rows(work), [_held(work, complete=True)], lease_s=30.0)
        if store.batch(TENANT, BATCH).state is BatchState.FINALIZING:
            break
        _assign(store, epoch)
    lines = {line.position: line for line in store.export_lines(BATCH)}
    assert {position for position, line in lines.items() if not line.ok} == {poison}
    assert lines[poison].error_code == "engine_crashed"
    counts = store.batch(TENANT, BATCH).counts
    assert (counts.total, counts.completed, counts.failed) == (8, 7, 1)


def test_a_new_boot_takes_over_and_the_old_one_is_told_to_end(store: PostgresStore) -> None:
    _running(store, lines=4)
    held = _claim(store, most=2)
    assert len(held) == 1
    assert _beat(store, "boot-2")
    assert not _beat(store, BOOT)
    assert sum(run.slices for run in store.snapshot().runs) == 2
    assert _claim(store) == []


def test_lines_past_their_time_end_a_batch_as_expired(store: PostgresStore) -> None:
    epoch = _running(store, lines=2, window_s=0.3, callbacks=Callbacks(email="a@example.org"))
    _until(lambda: store.reap(epoch).expired > 0)
    assert store.claim_export("writer", 30.0) is not None
    assert {line.closed_as for line in store.export_lines(BATCH)} == {SliceState.EXPIRED}
    ended = store.finish_export(BATCH, "writer", None, None)
    assert ended is not None
    assert (ended.state, ended.counts.failed) == (BatchState.EXPIRED, 2)
    assert [item.type for item in store.claim_outbox("sender", 10, 30.0)] == ["batch.expired"]


def test_work_to_be_finished_late_never_expires(store: PostgresStore) -> None:
    epoch = _running(store, lines=2, window_s=0.01, on_miss=OnMiss.FINISH_LATE)
    deadline = store.batch(TENANT, BATCH).deadline
    _until(lambda: store.now() > deadline)
    assert store.reap(epoch).expired == 0
    assert len(_claim(store)) == 1


def test_a_retry_serves_only_lines_without_a_success(store: PostgresStore) -> None:
    epoch = _running(store, lines=4, per_slice=4)
    (work,) = _claim(store)
    rows = _rows(work)
    bad = _rows(work, status_code=400, body='{"error": {}}')
    store.flush(GPU, [rows[0], bad[1], rows[2], bad[3]], [_held(work, complete=True)], lease_s=30)
    assert store.claim_export("writer", 30.0) is not None
    store.finish_export(BATCH, "writer", None, None)
    again = store.retry_batch(TENANT, BATCH)
    assert (again.generation, again.counts.completed, again.counts.failed) == (2, 2, 0)
    _assign(store, epoch)
    (work,) = _claim(store)
    assert [request.position for request in work.requests] == [1, 3]
    store.flush(GPU, _rows(work), [_held(work, complete=True)], lease_s=30.0)
    assert store.batch(TENANT, BATCH).counts.completed == 4
    assert all(line.ok for line in store.export_lines(BATCH))


def test_a_batch_that_takes_long_to_count_or_to_cut_anew_is_ended_and_retried(
    store: PostgresStore, postgres_url: str
) -> None:
    _running(store, lines=2, per_slice=2)
    (work,) = _claim(store)
    bad = _rows(work, status_code=400, body='{"error": {}}')
    store.flush(GPU, bad, [_held(work, complete=True)], lease_s=30)
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(
            """
            CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS
                'BEGIN PERFORM pg_sleep(3.5); RETURN NEW; END';
            CREATE TRIGGER slow BEFORE INSERT ON attainment EXECUTE FUNCTION slow();
            CREATE TRIGGER slow BEFORE INSERT ON slice EXECUTE FUNCTION slow();
            """
        )
    hasty = PostgresStore(postgres_url, secret_key=Fernet.generate_key(), statement_timeout_s=3.0)
    try:
        assert hasty.claim_export("writer", 30.0) is not None
        assert hasty.finish_export(BATCH, "writer", None, None) is not None
        assert hasty.retry_batch(TENANT, BATCH).generation == 2
    finally:
        hasty.close()


def test_a_duplicate_custom_id_leaves_nothing_behind(store: PostgresStore) -> None:
    _submit(store)
    lines = [_line(1, "a"), _line(2, "b"), _line(4, "a")]
    with pytest.raises(InvalidInput) as caught:
        store.load_lines(BATCH, "reader", lines, 64)
    assert (caught.value.code, caught.value.line) == ("duplicate_custom_id", 4)
    assert "line 1" in caught.value.message
    assert store.batch(TENANT, BATCH).state is BatchState.VALIDATING
    assert store.snapshot().runs == ()
    assert store.load_lines(BATCH, "reader", [_line(1)], 64) == 1


def test_export_merges_runs_in_the_order_of_the_file(store: PostgresStore) -> None:
    _submit(store, window_s=10_000.0)
    now = store.now()
    lines = [_line(n + 1, deadline=now + 100.0 * 2 ** (n % 5)) for n in range(100)]
    store.load_lines(BATCH, "reader", lines, 8)
    assert len(store.snapshot().runs) == 5
    assert [line.custom_id for line in store.export_lines(BATCH)] == [
        f"id-{n + 1}" for n in range(100)
    ]


def test_renewing_leases_updates_rows_in_place(store: PostgresStore, postgres_url: str) -> None:
    _running(store, lines=2)
    (work,) = _claim(store)
    before = _hot_updates(postgres_url)
    for _ in range(20):
        store.flush(GPU, [], [_held(work)], lease_s=30.0)
    store.close()
    _until(lambda: _hot_updates(postgres_url) >= before + 15)


def _hot_updates(url: str) -> int:
    with psycopg.connect(url) as connection:
        row = connection.execute(
            "SELECT n_tup_hot_upd FROM pg_stat_user_tables WHERE relname = 'slice'"
        ).fetchone()
    return int(row[0]) if row else 0


def test_a_database_that_is_away_is_told_as_unavailable() -> None:
    store = PostgresStore("postgresql://nobody@127.0.0.1:1/none", secret_key=Fernet.generate_key())
    with pytest.raises(Unavailable) as caught:
        store.now()
    assert caught.value.retry_after_s
    assert "Connection refused" in caught.value.in_full
    assert "127.0.0.1" not in str(caught.value.body())
    store.close()


def test_a_load_cut_off_by_the_database_can_be_done_again(
    store: PostgresStore, postgres_url: str
) -> None:
    _submit(store)

    def lines() -> Iterator[RequestLine]:
        for number in range(1, 5001):
            if number == 1000:
                with psycopg.connect(postgres_url) as other:
                    other.execute(
                        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
                        " WHERE query LIKE 'COPY request%' AND pid <> pg_backend_pid()"
                    )
            yield _line(number)

    with pytest.raises(Unavailable):
        store.load_lines(BATCH, "reader", lines(), 64)
    assert store.load_lines(BATCH, "reader", [_line(1)], 64) == 1
    assert store.batch(TENANT, BATCH).counts.total == 1


def test_a_database_without_tables_names_the_remedy(empty_postgres_url: str) -> None:
    store = PostgresStore(empty_postgres_url, secret_key=Fernet.generate_key())
    with pytest.raises(Unavailable, match="qlm db upgrade"):
        store.ping()
    with pytest.raises(Unavailable, match="qlm db upgrade"):
        store.batch(TENANT, BATCH)
    store.close()


def test_webhook_secrets_are_encrypted_at_rest(store: PostgresStore, postgres_url: str) -> None:
    (first,) = store.webhook_secrets(TENANT)
    second = store.rotate_webhook_secret(TENANT)
    assert store.webhook_secrets(TENANT) == [second, first]
    with psycopg.connect(postgres_url) as connection:
        stored = connection.execute("SELECT secret FROM webhook_endpoint").fetchall()
    assert not any(b"whsec_" in bytes(row[0]) for row in stored)


def test_an_error_of_the_database_does_not_tell_what_users_wrote(store: PostgresStore) -> None:
    call = NewInteractive("req_1", TENANT, CHAT, "m", "what they asked", True, 1.0, GPU, BOOT)
    store.add_interactive(call)
    with pytest.raises(IntegrityError) as told:
        store.add_interactive(call)
    assert "what they asked" not in str(told.value)


def test_forgetting_bodies_does_not_look_at_those_already_forgotten(postgres_url: str) -> None:
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(
            """
            INSERT INTO interactive_request (id, tenant, endpoint, model, body, streamed, ttft_s,
                instance, boot_id, epoch, state, created_at, ended_at)
            SELECT 'req_' || n, 't', '/v1/completions', 'm', CASE WHEN n > 4990 THEN '{}' END,
                   false, 1, 'gpu-0', 'boot', 1, 'done', n, n
            FROM generate_series(1, 5000) n
            """
        )
        connection.execute("ANALYZE interactive_request")
        asked = str(interactive._EMPTY).replace(":bodies_s", "60.0").replace(":limit", "1000")
        plan = "\n".join(row[0] for row in connection.execute(f"EXPLAIN ANALYZE {asked}"))
        emptied = connection.execute(
            "SELECT count(*) FROM interactive_request WHERE body IS NULL"
        ).fetchone()
    assert "Rows Removed by Filter" not in plan
    assert emptied == (5000,)
