"""Files, batches, intake, export, retries and outbox, as their owners see them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from qlm_batch.domain.errors import Conflict, InvalidInput, NotFound, Unprocessable
from qlm_batch.domain.jobs import (
    BatchState,
    DeliveryAttempt,
    FilePurpose,
    LineError,
    OnMiss,
    RequestCounts,
    RequestLine,
    SliceState,
)
from qlm_batch.domain.records import Attainment
from tests.contract.harness import LEASE, TENANT, WINDOW, Bench, answer, held, lines_of


def test_a_file_is_found_by_its_owner_only(bench: Bench) -> None:
    record = bench.file()
    assert bench.store.file(TENANT, record.id) == record
    with pytest.raises(NotFound):
        bench.store.file("other", record.id)


def test_files_are_listed_in_pages(bench: Bench) -> None:
    for n in range(5):
        bench.file(f"file-{n}")
    bench.file("file-out", purpose=FilePurpose.BATCH_OUTPUT)
    first = bench.store.list_files(TENANT, purpose=FilePurpose.BATCH, limit=3)
    assert [f.id for f in first.items] == ["file-4", "file-3", "file-2"]
    assert first.has_more
    second = bench.store.list_files(TENANT, purpose=FilePurpose.BATCH, limit=3, after="file-2")
    assert [f.id for f in second.items] == ["file-1", "file-0"]
    assert not second.has_more
    oldest = bench.store.list_files(TENANT, limit=1, newest_first=False)
    assert [f.id for f in oldest.items] == ["file-0"]


def test_a_file_past_its_expiry_is_gone_and_handed_out_for_removal_once(bench: Bench) -> None:
    record = bench.file(expires_at=bench.store.now() + 60)
    bench.file("file-kept")
    bench.harness.advance(61)
    with pytest.raises(NotFound):
        bench.store.file(TENANT, record.id)
    assert [f.id for f in bench.store.expired_files(10)] == [record.id]
    assert list(bench.store.expired_files(10)) == []


def test_a_deleted_file_fails_the_batch_that_still_has_to_read_it(bench: Bench) -> None:
    bench.file()
    bench.store.create_batch("batch_x", bench.spec())
    bench.store.delete_file(TENANT, "file-in")
    assert bench.store.claim_intake("a", 60.0) is None
    failed = bench.get("batch_x")
    assert failed.state is BatchState.FAILED
    assert len(failed.errors) == 1


def test_a_batch_needs_its_file_and_starts_validating(bench: Bench) -> None:
    with pytest.raises(NotFound):
        bench.store.create_batch("batch_x", bench.spec())
    bench.file()
    made = bench.store.create_batch("batch_x", bench.spec())
    assert (made.state, made.generation) == (BatchState.VALIDATING, 1)
    assert made.deadline == pytest.approx(made.created_at + WINDOW)
    with pytest.raises(NotFound):
        bench.store.batch("other", "batch_x")


def test_creating_twice_under_one_key_gives_the_first_batch(bench: Bench) -> None:
    bench.file()
    spec = bench.spec(idempotency_key="k", fingerprint="f")
    first = bench.store.create_batch("batch_1", spec)
    assert bench.store.create_batch("batch_2", spec).id == first.id
    with pytest.raises(Unprocessable):
        bench.store.create_batch("batch_3", replace(spec, fingerprint="g"))
    assert [b.id for b in bench.store.list_batches(TENANT).items] == ["batch_1"]


def test_batches_are_listed_in_pages_newest_first(bench: Bench) -> None:
    bench.file()
    for n in range(3):
        bench.store.create_batch(f"batch_{n}", bench.spec())
    first = bench.store.list_batches(TENANT, limit=2)
    assert ([b.id for b in first.items], first.has_more) == (["batch_2", "batch_1"], True)
    rest = bench.store.list_batches(TENANT, after="batch_1", limit=2)
    assert ([b.id for b in rest.items], rest.has_more) == (["batch_0"], False)
    assert bench.store.list_batches("other").items == ()
    with pytest.raises(InvalidInput) as unknown:
        bench.store.list_batches(TENANT, after="batch_9")
    assert unknown.value.code == "invalid_cursor"


def test_an_intake_is_claimed_by_one_holder_until_its_lease_ends(bench: Bench) -> None:
    bench.file()
    bench.store.create_batch("batch_x", bench.spec())
    assert bench.store.claim_intake("a", 60.0) is not None
    assert bench.store.claim_intake("b", 60.0) is None
    bench.harness.advance(50)
    assert bench.store.renew_intake("batch_x", "a", 60.0)
    bench.harness.advance(50)
    assert bench.store.claim_intake("b", 60.0) is None
    bench.harness.advance(11)
    assert bench.store.claim_intake("b", 60.0) is not None
    assert not bench.store.renew_intake("batch_x", "a", 60.0)
    with pytest.raises(Conflict):
        bench.store.load_lines("batch_x", "a", lines_of(2), 2)
    assert bench.store.load_lines("batch_x", "b", lines_of(2), 2) == 2


def test_a_custom_id_used_twice_is_refused_with_its_line(bench: Bench) -> None:
    _validating(bench)
    lines = lines_of(5)
    lines[3] = replace(lines[3], custom_id="c2")
    with pytest.raises(InvalidInput) as refused:
        bench.store.load_lines("batch_x", "a", lines, 2)
    assert (refused.value.code, refused.value.line) == ("duplicate_custom_id", 4)
    _nothing_is_visible(bench)


def test_an_error_from_the_lines_rolls_everything_back(bench: Bench) -> None:
    _validating(bench)

    def broken() -> Iterator[RequestLine]:
        yield from lines_of(200)
        raise InvalidInput("line 201 is broken", line=201)

    with pytest.raises(InvalidInput):
        bench.store.load_lines("batch_x", "a", broken(), 64)
    _nothing_is_visible(bench)
    assert bench.store.load_lines("batch_x", "a", lines_of(3), 64) == 3


def _validating(bench: Bench) -> None:
    bench.file()
    bench.store.create_batch("batch_x", bench.spec())
    assert bench.store.claim_intake("a", 60.0) is not None


def _nothing_is_visible(bench: Bench) -> None:
    assert bench.get("batch_x").state is BatchState.VALIDATING
    assert bench.get("batch_x").counts.total == 0
    assert bench.harness.slices() == []
    assert bench.lines("batch_x") == []


def test_a_refused_file_fails_the_batch_and_announces_it(bench: Bench) -> None:
    _validating(bench)
    bench.store.fail_intake("batch_x", "a", [LineError("bad", "no", 3, "body")], 7)
    failed = bench.get("batch_x")
    assert (failed.state, failed.error_count) == (BatchState.FAILED, 7)
    assert failed.errors == (LineError("bad", "no", 3, "body"),)
    with pytest.raises(Conflict):
        bench.store.retry_batch(TENANT, "batch_x")


def test_runs_keep_models_and_far_deadlines_apart(bench: Bench) -> None:
    _validating(bench)
    lines = lines_of(4)
    lines[1] = replace(lines[1], model="other")
    lines[2] = replace(lines[2], deadline=bench.store.now() + 60)
    bench.store.load_lines("batch_x", "a", lines, 64)
    runs = bench.store.snapshot().runs
    assert sorted((run.model, run.requests) for run in runs) == [
        ("other", 1), ("qlm-tiny", 1), ("qlm-tiny", 2)
    ]  # fmt: skip
    assert sorted(bench.get("batch_x").models) == ["other", "qlm-tiny"]
    assert [line.custom_id for line in bench.lines("batch_x")] == ["c1", "c2", "c3", "c4"]


def test_cancelling_twice_is_fine_and_cancelling_the_ended_is_not(bench: Bench) -> None:
    batch = bench.batch(lines=4, slice_requests=2)
    (part, _) = bench.take()
    bench.store.flush("gpu-0", [answer(part, part.requests[0])], [held(part)], lease_s=LEASE)
    assert bench.store.cancel_batch(TENANT, batch.id).state is BatchState.CANCELLING
    again = bench.store.cancel_batch(TENANT, batch.id)
    assert again.counts == RequestCounts(4, 1, 3)
    assert bench.export(batch.id).state is BatchState.CANCELLED
    with pytest.raises(Conflict):
        bench.store.cancel_batch(TENANT, batch.id)
    lines = bench.lines(batch.id)
    assert [(line.ok, line.closed_as) for line in lines] == [
        (True, SliceState.CANCELLED),
        *[(False, SliceState.CANCELLED)] * 3,
    ]


def test_a_batch_cancelled_while_it_is_read_takes_no_lines(bench: Bench) -> None:
    _validating(bench)
    bench.store.cancel_batch(TENANT, "batch_x")
    assert not bench.store.renew_intake("batch_x", "a", 60.0)
    with pytest.raises(Conflict):
        bench.store.load_lines("batch_x", "a", lines_of(2), 2)
    assert bench.export("batch_x").state is BatchState.CANCELLED


def test_a_settled_batch_can_no_longer_be_cancelled_or_retried(bench: Bench) -> None:
    batch = bench.batch(lines=2)
    bench.serve()
    with pytest.raises(Conflict) as cancelling:
        bench.store.cancel_batch(TENANT, batch.id)
    assert cancelling.value.code == "batch_not_cancellable"
    with pytest.raises(Conflict) as retrying:
        bench.store.retry_batch(TENANT, batch.id)
    assert retrying.value.code == "batch_not_retryable"


def test_a_partial_export_shows_only_rows_there_are(bench: Bench) -> None:
    batch = bench.batch(lines=3, slice_requests=3)
    (part,) = bench.take()
    bench.store.flush("gpu-0", [answer(part, part.requests[1])], [held(part)], lease_s=LEASE)
    assert [line.custom_id for line in bench.lines(batch.id, partial=True)] == ["c2"]


def test_an_export_is_lost_with_its_lease(bench: Bench) -> None:
    batch = bench.batch(lines=1)
    bench.serve()
    assert bench.store.claim_export("a", 60.0) is not None
    assert bench.store.claim_export("b", 60.0) is None
    bench.harness.advance(61)
    assert bench.store.claim_export("b", 60.0) is not None
    assert not bench.store.renew_export(batch.id, "a", 60.0)
    assert bench.store.finish_export(batch.id, "a", None, None) is None
    assert bench.store.finish_export(batch.id, "b", None, None) is not None


def test_finished_files_are_on_record(bench: Bench) -> None:
    batch = bench.batch(lines=1)
    bench.serve()
    assert bench.store.claim_export("a", 60.0) is not None
    output = replace(bench.file(), id="file-out", purpose=FilePurpose.BATCH_OUTPUT)
    done = bench.store.finish_export(batch.id, "a", output, None)
    assert done is not None
    assert (done.output_file_id, done.error_file_id) == ("file-out", None)
    assert bench.store.file(TENANT, "file-out") == output


def test_a_retry_runs_only_failed_lines_and_the_newest_outcome_is_exported(bench: Bench) -> None:
    batch = bench.batch(lines=6, slice_requests=3)
    first, second = bench.take()
    bench.finish(first)
    rows = [answer(second, r, ok=r.position == 3) for r in second.requests]
    bench.store.flush("gpu-0", rows, [held(second, complete=True)], lease_s=LEASE)
    assert bench.export(batch.id).counts == RequestCounts(6, 4, 2)

    again = bench.store.retry_batch(TENANT, batch.id, window_s=60.0)
    assert (again.generation, again.state) == (2, BatchState.IN_PROGRESS)
    assert again.counts == RequestCounts(6, 4, 0)
    (part,) = bench.take()
    assert [r.position for r in part.requests] == [4, 5]
    rows = [answer(part, r, ok=r.position == 4) for r in part.requests]
    bench.store.flush("gpu-0", rows, [held(part, complete=True)], lease_s=LEASE)
    assert bench.export(batch.id).counts == RequestCounts(6, 5, 1)

    bench.store.retry_batch(TENANT, batch.id, window_s=60.0)
    bench.harness.advance(61)
    assert bench.store.reap(bench.lead()).expired == 1
    ended = bench.export(batch.id)
    assert (ended.state, ended.counts) == (BatchState.EXPIRED, RequestCounts(6, 5, 1))
    lines = bench.lines(batch.id)
    assert [line.ok for line in lines] == [True] * 5 + [False]
    assert lines[5].request_id == rows[1].request_id
    assert lines[4].request_id == rows[0].request_id


def test_a_finished_batch_without_failures_cannot_be_retried(bench: Bench) -> None:
    batch = bench.batch(lines=2)
    bench.serve()
    bench.export(batch.id)
    with pytest.raises(Conflict) as refusal:
        bench.store.retry_batch(TENANT, batch.id)
    assert refusal.value.code == "no_failed_lines"


def test_a_result_of_an_earlier_generation_comes_too_late(bench: Bench) -> None:
    batch = bench.batch(lines=2)
    (old,) = bench.take()
    bench.store.cancel_batch(TENANT, batch.id)
    bench.export(batch.id)
    bench.store.retry_batch(TENANT, batch.id)
    late = bench.store.flush("gpu-0", [answer(old, old.requests[0])], [], lease_s=LEASE)
    assert late.rejected == 1
    bench.serve()
    assert bench.export(batch.id).counts == RequestCounts(2, 2, 0)


def test_every_generation_announces_its_end_once_per_channel(bench: Bench) -> None:
    batch = bench.batch(lines=1, email="a@example.test", on_miss=OnMiss.FINISH_LATE)
    (part,) = bench.take()
    bench.finish(part, ok=False)
    bench.export(batch.id)
    items = bench.store.claim_outbox("a", 10, 60.0)
    assert sorted((i.channel, i.target) for i in items) == [
        ("email", "a@example.test"),
        ("webhook", "https://example.test/hook"),
    ]
    assert {(i.type, i.generation) for i in items} == {("batch.completed", 1)}
    assert len({i.event_id for i in items}) == 1
    bench.store.retry_batch(TENANT, batch.id)
    bench.serve()
    bench.export(batch.id)
    later = bench.store.claim_outbox("a", 10, 60.0)
    assert [i.generation for i in later] == [2, 2]
    assert {i.event_id for i in later}.isdisjoint({i.event_id for i in items})


def test_an_attempt_is_logged_whatever_the_server_said(bench: Bench) -> None:
    batch = bench.batch(lines=1)
    bench.serve()
    bench.export(batch.id)
    (item,) = bench.store.claim_outbox("a", 10, 60.0)
    odd = b"SMTP 451: sp\xe4ter\0".decode(errors="surrogateescape")
    bench.store.record_delivery(DeliveryAttempt(item.id, False, None, odd, 0.1, None))
    ((_, attempt),) = bench.store.deliveries(TENANT, batch.id)
    assert attempt.detail.startswith("SMTP 451: sp")


def test_an_item_is_leased_retried_under_its_event_id_and_at_last_dead(bench: Bench) -> None:
    batch = bench.batch(lines=1)
    bench.serve()
    bench.export(batch.id)
    (item,) = bench.store.claim_outbox("a", 10, 60.0)
    assert list(bench.store.claim_outbox("b", 10, 60.0)) == []
    bench.harness.advance(61)
    (again,) = bench.store.claim_outbox("b", 10, 60.0)
    assert again.event_id == item.event_id
    retry_at = bench.store.now() + 120
    bench.store.record_delivery(DeliveryAttempt(item.id, False, 500, "no", 0.1, retry_at))
    assert list(bench.store.claim_outbox("b", 10, 60.0)) == []
    bench.harness.advance(121)
    (third,) = bench.store.claim_outbox("b", 10, 60.0)
    assert (third.event_id, third.attempts) == (item.event_id, 1)
    bench.store.record_delivery(DeliveryAttempt(item.id, False, 500, "gone", 0.1, None))
    bench.harness.advance(10_000)
    assert list(bench.store.claim_outbox("b", 10, 60.0)) == []
    log = bench.store.deliveries(TENANT, batch.id)
    assert [attempt.detail for _, attempt in log] == ["no", "gone"]
    with pytest.raises(NotFound):
        bench.store.deliveries("other", batch.id)


def test_a_dead_item_is_due_again_once_it_is_replayed(bench: Bench) -> None:
    batch = bench.batch(lines=1, email="a@example.test")
    bench.serve()
    bench.export(batch.id)
    dead, good = bench.store.claim_outbox("a", 10, 60.0)
    assert bench.store.replay_dead(TENANT, batch.id) == 0
    before = bench.store.now()
    bench.store.record_delivery(DeliveryAttempt(dead.id, False, 410, "gone", 0.1, None))
    bench.store.record_delivery(DeliveryAttempt(good.id, True, 200, "ok", 0.1, None))
    assert bench.store.replay_dead(TENANT, batch.id) == 1
    (again,) = bench.store.claim_outbox("a", 10, 60.0)
    assert (again.id, again.event_id, again.attempts) == (dead.id, dead.event_id, 0)
    assert bench.store.replay_dead(TENANT, batch.id) == 0
    for _, attempt in bench.store.deliveries(TENANT, batch.id):
        assert attempt.at is not None and before <= attempt.at <= bench.store.now()
    with pytest.raises(NotFound):
        bench.store.replay_dead("other", batch.id)


def test_totals_count_open_work_per_tenant(bench: Bench) -> None:
    bench.batch(lines=5, slice_requests=2)
    totals = bench.store.queue_totals(TENANT)
    assert (totals.batches, totals.slices, totals.requests) == (1, 3, 5)
    assert totals.tokens > 0
    assert bench.store.queue_totals() == totals
    assert bench.store.queue_totals("other").requests == 0


def test_open_batches_are_listed_by_deadline(bench: Bench) -> None:
    first = bench.batch(lines=1)
    second = bench.batch(lines=1)
    assert [batch.id for batch in bench.store.open_batches()] == [first.id, second.id]
    assert [batch.id for batch in bench.store.open_batches(limit=1)] == [first.id]
    bench.serve()
    bench.export(first.id)
    assert [batch.id for batch in bench.store.open_batches()] == [second.id]


def test_deadlines_that_held_are_counted_once_a_batch_ends(bench: Bench) -> None:
    batch = bench.batch(lines=3)
    bench.serve()
    assert bench.store.attainment() == Attainment(0, 0)
    bench.export(batch.id)
    assert bench.store.attainment() == Attainment(met=3, missed=0)


@pytest.mark.parametrize("on_miss", list(OnMiss))
def test_lines_that_expire_or_come_late_count_as_missed(bench: Bench, on_miss: OnMiss) -> None:
    batch = bench.batch(lines=3, on_miss=on_miss)
    part = bench.take()[0]
    bench.store.flush("gpu-0", [answer(part, part.requests[0])], [held(part)], lease_s=LEASE)
    bench.harness.advance(WINDOW + 1)
    bench.store.reap(bench.lead())
    if on_miss is OnMiss.FINISH_LATE:
        bench.serve()
    bench.export(batch.id)
    assert bench.store.attainment() == Attainment(met=1, missed=2)


def test_a_retry_counts_its_own_lines_under_its_own_deadline(bench: Bench) -> None:
    batch = bench.batch(lines=3)
    for part in bench.take():
        bench.finish(part, ok=part.requests[0].position > 0)
    bench.export(batch.id)
    assert bench.store.attainment() == Attainment(met=1, missed=0)
    bench.store.retry_batch(TENANT, batch.id)
    bench.serve()
    bench.export(batch.id)
    assert bench.store.attainment() == Attainment(met=3, missed=0)


def test_a_cancelled_batch_counts_as_neither(bench: Bench) -> None:
    batch = bench.batch(lines=3)
    bench.store.cancel_batch(TENANT, batch.id)
    bench.export(batch.id)
    assert bench.store.attainment() == Attainment(0, 0)
