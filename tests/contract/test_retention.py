"""What is past its time is forgotten whole, and nothing else is."""

from __future__ import annotations

import pytest

from qlm_batch.domain.errors import NotFound
from qlm_batch.domain.jobs import BatchState, DeliveryAttempt, LineError, OnMiss
from qlm_batch.domain.records import Attainment
from qlm_batch.domain.snapshot import Decision, Plan
from tests.contract.harness import LEASE, TENANT, WINDOW, Bench

KEPT_S = 1000.0
MONTHS_S = 1e7


def ended(bench: Bench, **changes: object) -> str:
    """The id of a batch that was served, with its story."""
    batch = bench.batch(webhook=None, **changes)  # type: ignore[arg-type]
    bench.serve()
    bench.store.save_plan(bench.lead(), Plan(1.0, "qlm", ()), [Decision("planned", 1.0, batch.id)])
    bench.export(batch.id)
    return batch.id


def forget(bench: Bench) -> int:
    """Forget batches and all their lines; how many batches."""
    gone = bench.store.forget_batches(KEPT_S)
    while bench.store.forget_lines(limit=3):
        pass
    return gone


def test_an_ended_batch_is_kept_whole_for_its_time_and_then_gone_with_all_it_had(
    bench: Bench,
) -> None:
    batch_id = ended(bench, lines=8)
    bench.harness.advance(KEPT_S - 1)
    assert forget(bench) == 0
    assert bench.get(batch_id).state is BatchState.COMPLETED
    assert [made.kind for made in bench.store.decisions(TENANT, batch_id)] == ["planned"]
    assert bench.store.request_story(TENANT, batch_id, "c8").outcome is not None
    bench.harness.advance(2)
    assert forget(bench) == 1
    for look in (
        bench.store.batch,
        bench.store.decisions,
        bench.store.deliveries,
        bench.store.retry_batch,
    ):
        with pytest.raises(NotFound):
            look(TENANT, batch_id)
    assert not bench.store.list_batches(TENANT).items
    assert (bench.harness.rows(), bench.harness.slices()) == ({}, [])
    assert bench.store.file(TENANT, "file-in")
    assert bench.store.attainment() == Attainment(met=8)


def test_a_batch_is_gone_for_its_owner_before_the_last_of_its_lines_is(bench: Bench) -> None:
    ended(bench, lines=8)
    kept = ended(bench, lines=1)
    bench.harness.advance(KEPT_S + 1)
    assert bench.store.forget_batches(KEPT_S, limit=1) == 1
    assert bench.lines("batch_1") == []
    assert [batch.id for batch in bench.store.list_batches(TENANT).items] == [kept]
    assert forget(bench) == 1
    assert bench.harness.rows() == {}


def test_what_has_not_ended_is_never_forgotten(bench: Bench) -> None:
    bench.file()
    bench.store.create_batch("batch_v", bench.spec())
    assert bench.store.forget_batches(0.0) == 0
    bench.store.claim_intake("intake", MONTHS_S * 2)
    running = bench.batch(on_miss=OnMiss.FINISH_LATE)
    bench.harness.advance(MONTHS_S)
    assert forget(bench) == 0
    bench.store.cancel_batch(TENANT, running.id)
    assert forget(bench) == 0
    assert len(bench.lines(running.id)) == 4


def test_every_end_counts_from_its_own_time(bench: Bench) -> None:
    bench.file()
    bench.store.create_batch("batch_f", bench.spec())
    bench.store.claim_intake("intake", 60.0)
    bench.store.fail_intake("batch_f", "intake", [LineError("empty_file", "no line")], 1)
    cancelled = bench.batch(webhook=None)
    bench.store.cancel_batch(TENANT, cancelled.id)
    bench.export(cancelled.id)
    expired = bench.batch(webhook=None)
    bench.harness.advance(WINDOW + 1)
    assert forget(bench) == 2
    bench.store.reap(bench.lead())
    assert bench.export(expired.id).state is BatchState.EXPIRED
    assert forget(bench) == 0
    bench.harness.advance(KEPT_S + 1)
    assert forget(bench) == 1


def test_a_retried_batch_is_kept_from_its_newest_end(bench: Bench) -> None:
    batch = bench.batch(lines=1, webhook=None, on_miss=OnMiss.FINISH_LATE)
    (part,) = bench.take()
    bench.finish(part, ok=False)
    bench.export(batch.id)
    bench.harness.advance(KEPT_S - 1)
    bench.store.retry_batch(TENANT, batch.id)
    bench.harness.advance(KEPT_S)
    assert forget(bench) == 0
    bench.serve()
    bench.export(batch.id)
    assert forget(bench) == 0
    bench.harness.advance(KEPT_S + 1)
    assert forget(bench) == 1


def test_a_batch_whose_end_is_still_to_be_announced_is_kept(bench: Bench) -> None:
    batch = bench.batch(lines=1)
    bench.serve()
    bench.export(batch.id)
    bench.harness.advance(KEPT_S + 1)
    assert forget(bench) == 0
    (item,) = bench.store.claim_outbox("a", 10, 60.0)
    bench.store.record_delivery(DeliveryAttempt(item.id, False, 410, "gone", 0.1, None))
    assert forget(bench) == 1


def test_the_key_of_a_forgotten_batch_makes_a_new_one(bench: Bench) -> None:
    bench.file()
    spec = bench.spec(idempotency_key="k", fingerprint="f")
    bench.store.create_batch("batch_old", spec)
    bench.store.claim_intake("intake", 60.0)
    bench.store.fail_intake("batch_old", "intake", [LineError("empty_file", "no line")], 1)
    bench.harness.advance(KEPT_S + 1)
    assert forget(bench) == 1
    assert bench.store.create_batch("batch_new", spec).id == "batch_new"


def test_work_goes_on_beside_what_is_forgotten(bench: Bench) -> None:
    for _ in range(3):
        ended(bench)
    bench.harness.advance(KEPT_S + 1)
    running = bench.batch()
    assert forget(bench) == 3
    bench.serve()
    assert bench.export(running.id).counts.completed == 4
    bench.harness.advance(WINDOW)
    bench.store.reap(bench.lead())


def test_a_blob_without_a_file_is_known_until_a_file_owns_it_or_it_is_removed(
    bench: Bench,
) -> None:
    for key in ("blob-file-in", "blob-lost", "blob-late"):
        bench.store.expect_blob(key)
    bench.file()
    bench.harness.advance(KEPT_S)
    bench.store.expect_blob("blob-late")
    assert bench.store.unowned_blobs(KEPT_S - 1) == ["blob-lost"]
    bench.store.blobs_removed(["blob-lost"])
    assert bench.store.unowned_blobs(KEPT_S - 1) == []


def test_a_blob_is_without_a_file_once_that_is_deleted_or_has_expired(bench: Bench) -> None:
    bench.file("file-old", expires_at=bench.store.now() + 60)
    bench.store.delete_file(TENANT, bench.file().id)
    bench.harness.advance(61)
    bench.store.expired_files(10)
    bench.harness.advance(1)
    assert bench.store.unowned_blobs(0.0, limit=1) == ["blob-file-in"]
    assert list(bench.store.unowned_blobs(0.0)) == ["blob-file-in", "blob-file-old"]


def test_an_instance_is_forgotten_once_it_has_been_silent_and_holds_nothing(bench: Bench) -> None:
    bench.batch(on_miss=OnMiss.FINISH_LATE)
    bench.beat("idle")
    bench.beat("left", "boot-1")
    bench.store.retire("left", "boot-1")
    assert bench.take("busy")
    bench.harness.advance(KEPT_S)
    bench.beat("alive")
    assert bench.store.forget_instances(KEPT_S - 1) == 2
    assert {view.name for view in bench.store.instances()} == {"busy", "alive"}
    bench.harness.advance(LEASE + 1)
    bench.store.reap(bench.lead())
    assert bench.store.forget_instances(KEPT_S - 1) == 1
    assert {view.name for view in bench.store.instances()} == {"alive"}
