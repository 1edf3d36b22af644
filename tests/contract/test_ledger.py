"""Leases, results, and what becomes of both when things go wrong."""

from __future__ import annotations

import pytest

from qlm_batch.domain.errors import NotLeader
from qlm_batch.domain.jobs import BatchState, OnMiss, RequestCounts, SliceState, Usage
from qlm_batch.domain.ledger import Directive, ReleaseReason
from qlm_batch.domain.transitions import SUSPECT_AFTER
from tests.contract.harness import LEASE, TENANT, WINDOW, Bench, answer, held


def test_a_claim_leases_assigned_slices_with_their_requests(bench: Bench) -> None:
    batch = bench.batch(lines=5, slice_requests=2)
    claimed = bench.take()
    assert [len(part.requests) for part in claimed] == [2, 2, 1]
    assert [r.body for part in claimed for r in part.requests] == [
        f'{{"n":{n}}}' for n in range(1, 6)
    ]
    assert {(p.batch_id, p.tenant, p.generation, p.epoch) for p in claimed} == {
        (batch.id, TENANT, 1, 1)
    }


def test_a_claim_takes_about_as_many_requests_as_asked_and_never_nothing(bench: Bench) -> None:
    bench.batch(lines=8, slice_requests=4)
    bench.beat()
    bench.assign()
    assert len(bench.claim(most=1)) == 1
    assert bench.claim(most=0) == []
    assert len(bench.claim(most=8)) == 1


def test_only_the_current_boot_may_claim(bench: Bench) -> None:
    bench.batch()
    bench.beat()
    bench.assign()
    assert bench.claim(boot="boot-0") == []
    assert bench.claim(name="gpu-unknown") == []
    assert bench.claim()


def test_the_last_row_closes_the_slice_and_the_last_slice_settles_the_batch(bench: Bench) -> None:
    batch = bench.batch(lines=4, slice_requests=2)
    first, second = bench.take()
    rows = [answer(first, request) for request in first.requests]
    outcome = bench.store.flush("gpu-0", rows, [held(first, complete=True)], lease_s=LEASE)
    assert (outcome.written, outcome.rejected) == (2, 0)
    assert outcome.directives == {first.slice_id: Directive.CLOSED}
    assert bench.get(batch.id).state is BatchState.IN_PROGRESS
    bench.finish(second)
    now = bench.get(batch.id)
    assert now.state is BatchState.FINALIZING
    assert now.counts == RequestCounts(4, 4, 0)
    assert now.usage == Usage(20, 0, 28)


def test_rows_of_an_open_slice_show_in_the_counts(bench: Bench) -> None:
    batch = bench.batch(lines=2)
    (part,) = bench.take()
    bench.store.flush("gpu-0", [answer(part, part.requests[0])], [held(part)], lease_s=LEASE)
    now = bench.get(batch.id)
    assert now.counts == RequestCounts(2, 1, 0)
    assert now.usage == Usage(5, 0, 7)


def test_a_late_success_of_an_old_epoch_is_accepted_while_the_slice_is_open(bench: Bench) -> None:
    batch = bench.batch(lines=2)
    (old,) = bench.take()
    bench.lose()
    (new,) = bench.take("gpu-1", "boot-9")
    assert new.epoch > old.epoch
    outcome = bench.store.flush("gpu-0", [answer(old, old.requests[0])], [held(old)], lease_s=LEASE)
    assert (outcome.written, outcome.rejected) == (1, 0)
    assert outcome.directives[old.slice_id] is Directive.LOST
    assert bench.get(batch.id).counts.completed == 1


def test_a_late_error_of_an_old_epoch_is_rejected(bench: Bench) -> None:
    batch = bench.batch(lines=2)
    (old,) = bench.take()
    bench.lose()
    late = answer(old, old.requests[0], ok=False)
    assert bench.store.flush("gpu-0", [late], [], lease_s=LEASE).rejected == 1
    bench.take("gpu-1", "boot-9")
    assert bench.store.flush("gpu-0", [late], [], lease_s=LEASE).rejected == 1
    assert bench.get(batch.id).counts == RequestCounts(2, 0, 0)


def test_the_first_row_of_a_line_wins(bench: Bench) -> None:
    batch = bench.batch(lines=2)
    (part,) = bench.take()
    request = part.requests[0]
    first = answer(part, request, ok=False)
    second = answer(part, request, ok=True, tag="b")
    outcome = bench.store.flush("gpu-0", [first, second], [held(part)], lease_s=LEASE)
    assert (outcome.written, outcome.rejected) == (1, 1)
    again = bench.store.flush("gpu-0", [second, first], [held(part)], lease_s=LEASE)
    assert (again.written, again.rejected) == (0, 2)
    (line,) = bench.lines(batch.id, partial=True)
    assert (line.ok, line.request_id) == (False, first.request_id)


def test_nothing_is_written_into_a_closed_slice(bench: Bench) -> None:
    batch = bench.batch(lines=2)
    (part,) = bench.take()
    bench.store.cancel_batch(TENANT, batch.id)
    outcome = bench.store.flush(
        "gpu-0", [answer(part, r) for r in part.requests], [held(part)], lease_s=LEASE
    )
    assert (outcome.written, outcome.rejected) == (0, 2)
    assert outcome.directives[part.slice_id] is Directive.CLOSED
    assert bench.get(batch.id).counts == RequestCounts(2, 0, 2)


def test_a_row_outside_its_slice_is_rejected(bench: Bench) -> None:
    bench.batch(lines=4, slice_requests=2)
    first, second = bench.take()
    stray = answer(first, second.requests[0])
    assert bench.store.flush("gpu-0", [stray], [], lease_s=LEASE).rejected == 1


def test_a_slice_said_to_be_complete_is_not_closed_with_a_gap(bench: Bench) -> None:
    batch = bench.batch(lines=2)
    (part,) = bench.take()
    row = answer(part, part.requests[0])
    bench.store.flush("gpu-0", [row], [held(part, complete=True)], lease_s=LEASE)
    assert bench.open_slices()
    assert bench.get(batch.id).state is BatchState.IN_PROGRESS
    bench.lose()
    (again,) = bench.take()
    assert [r.position for r in again.requests] == [part.requests[1].position]


def test_a_lease_is_requeued_only_after_its_term(bench: Bench) -> None:
    bench.batch(lines=2)
    bench.take()
    bench.harness.advance(LEASE - 5)
    assert bench.store.reap(bench.lead()).requeued == 0
    bench.harness.advance(6)
    assert bench.store.reap(bench.lead()).requeued == 1


def test_a_flush_renews_the_lease_and_a_flush_without_renewal_does_not(bench: Bench) -> None:
    bench.batch(lines=4, slice_requests=2)
    renewed, left_alone = bench.take()
    bench.harness.advance(LEASE - 5)
    bench.store.flush("gpu-0", [], [held(renewed)], lease_s=LEASE)
    bench.store.flush("gpu-0", [], [held(left_alone)], lease_s=None)
    bench.harness.advance(6)
    assert bench.store.reap(bench.lead()).requeued == 1
    states = {s.id: s.state for s in bench.harness.slices()}
    assert states == {
        renewed.slice_id: SliceState.LEASED,
        left_alone.slice_id: SliceState.QUEUED,
    }


def test_only_what_is_missing_is_leased_again(bench: Bench) -> None:
    bench.batch(lines=3, slice_requests=3)
    (part,) = bench.take()
    bench.store.flush("gpu-0", [answer(part, part.requests[1])], [held(part)], lease_s=LEASE)
    bench.store.release("gpu-0", [held(part)], ReleaseReason.PREEMPTED)
    (again,) = bench.take()
    assert [r.position for r in again.requests] == [0, 2]


def test_work_finished_by_a_late_success_needs_no_further_lease(bench: Bench) -> None:
    batch = bench.batch(lines=1)
    (old,) = bench.take()
    bench.lose()
    bench.store.flush("gpu-0", [answer(old, old.requests[0])], [], lease_s=LEASE)
    bench.take()
    assert bench.open_slices() == []
    assert bench.get(batch.id).state is BatchState.FINALIZING


@pytest.mark.parametrize(
    "reason", [ReleaseReason.SHUTDOWN, ReleaseReason.PREEMPTED, ReleaseReason.UNSUITABLE]
)
def test_giving_a_lease_back_is_no_attempt(bench: Bench, reason: ReleaseReason) -> None:
    bench.batch(lines=2)
    for _ in range(SUSPECT_AFTER + 3):
        (part,) = bench.take()
        assert not part.suspect
        bench.store.release("gpu-0", [held(part)], reason)
    assert [s.attempts for s in bench.harness.slices()] == [0]


def test_a_released_lease_is_queued_at_once(bench: Bench) -> None:
    bench.batch(lines=2)
    (part,) = bench.take()
    bench.store.release("gpu-0", [held(part)], ReleaseReason.SHUTDOWN)
    assert [s.state for s in bench.harness.slices()] == [SliceState.QUEUED]


def test_a_release_under_an_old_epoch_changes_nothing(bench: Bench) -> None:
    bench.batch(lines=2)
    (old,) = bench.take()
    bench.lose()
    bench.take("gpu-1", "boot-9")
    bench.store.release("gpu-0", [held(old)], ReleaseReason.ENGINE_DIED)
    assert [s.state for s in bench.harness.slices()] == [SliceState.LEASED]


def test_the_death_of_an_engine_is_an_attempt(bench: Bench) -> None:
    bench.batch(lines=2)
    for expected in (False,) * SUSPECT_AFTER + (True,):
        (part,) = bench.take()
        assert part.suspect is expected
        bench.store.release("gpu-0", [held(part)], ReleaseReason.ENGINE_DIED)


def test_a_lease_that_brought_a_row_clears_the_attempts_before_it(bench: Bench) -> None:
    bench.batch(lines=3, slice_requests=3)
    bench.take()
    bench.lose()
    (part,) = bench.take()
    bench.store.flush("gpu-0", [answer(part, part.requests[0])], [held(part)], lease_s=LEASE)
    bench.lose()
    assert [s.attempts for s in bench.harness.slices()] == [0]


def test_one_poison_line_fails_and_every_other_line_succeeds(bench: Bench) -> None:
    poison = 5
    batch = bench.batch(lines=12, slice_requests=8)
    for _ in range(60):
        bench.beat()
        bench.assign()
        claimed = bench.claim()
        if not claimed:
            break
        if any(r.position == poison for part in claimed for r in part.requests):
            assert len(claimed) == 1 or not any(part.suspect for part in claimed)
            bench.store.release("gpu-0", [held(p) for p in claimed], ReleaseReason.ENGINE_DIED)
        else:
            for part in claimed:
                bench.finish(part)
    now = bench.get(batch.id)
    assert now.state is BatchState.FINALIZING
    assert now.counts == RequestCounts(12, 11, 1)
    (failed,) = [line for line in bench.lines(batch.id) if not line.ok]
    assert failed.position == poison
    assert failed.error_code
    assert failed.error_message


def test_a_suspect_slice_runs_alone(bench: Bench) -> None:
    bench.batch(lines=4, slice_requests=2)
    for _ in range(SUSPECT_AFTER):
        bench.take()
        bench.lose()
    bench.beat()
    assert bench.assign() == 2
    assert bench.claim(holding=1) == []
    (alone,) = bench.claim()
    assert alone.suspect
    assert bench.claim(holding=2) == []
    bench.finish(alone)
    (other,) = bench.claim()
    assert other.slice_id != alone.slice_id


def test_preemption_takes_back_unclaimed_slices_at_once_and_asks_for_leased_ones(
    bench: Bench,
) -> None:
    bench.batch(lines=6, slice_requests=2)
    bench.beat()
    bench.assign()
    (part,) = bench.claim(most=1)
    assert bench.store.preempt(bench.epoch, "gpu-0", 10) == 3
    states = [s.state for s in bench.harness.slices()]
    assert sorted(states) == [SliceState.LEASED, SliceState.QUEUED, SliceState.QUEUED]
    outcome = bench.store.flush("gpu-0", [], [held(part)], lease_s=LEASE)
    assert outcome.directives == {part.slice_id: Directive.PREEMPT}
    assert bench.store.preempt(bench.epoch, "gpu-0", 10) == 0
    bench.store.release("gpu-0", [held(part)], ReleaseReason.PREEMPTED)
    (again, *_) = bench.take()
    outcome = bench.store.flush("gpu-0", [], [held(again)], lease_s=LEASE)
    assert outcome.directives == {again.slice_id: Directive.KEEP}


def test_preemption_takes_no_more_than_asked(bench: Bench) -> None:
    bench.batch(lines=6, slice_requests=2)
    bench.take()
    assert bench.store.preempt(bench.epoch, "gpu-0", 2) == 2
    assert bench.store.preempt(bench.epoch, "gpu-0", 2) == 1


def test_slices_past_their_time_expire_whoever_holds_them(bench: Bench) -> None:
    batch = bench.batch(lines=6, slice_requests=2)
    bench.beat()
    bench.assign(most=2)
    (part, _) = bench.claim()
    bench.store.flush("gpu-0", [answer(part, part.requests[0])], [held(part)], lease_s=LEASE)
    bench.harness.advance(WINDOW + 1)
    reaped = bench.store.reap(bench.lead())
    assert (reaped.expired, reaped.finished_batches) == (3, 1)
    now = bench.get(batch.id)
    assert now.state is BatchState.FINALIZING
    assert now.counts == RequestCounts(6, 1, 5)
    assert bench.export(batch.id).state is BatchState.EXPIRED
    assert [line.closed_as for line in bench.lines(batch.id)] == [SliceState.EXPIRED] * 6
    assert [line.ok for line in bench.lines(batch.id)] == [True] + [False] * 5


def test_what_may_finish_late_does_not_expire(bench: Bench) -> None:
    batch = bench.batch(lines=2, on_miss=OnMiss.FINISH_LATE)
    bench.harness.advance(WINDOW * 3)
    assert bench.store.reap(bench.lead()).expired == 0
    (part,) = bench.take()
    assert part.expires_at is None
    bench.finish(part)
    assert bench.export(batch.id).state is BatchState.COMPLETED


def test_only_the_leader_reaps_and_preempts(bench: Bench) -> None:
    old = bench.lead("a")
    bench.harness.advance(11)
    bench.lead("b")
    with pytest.raises(NotLeader):
        bench.store.reap(old)
    with pytest.raises(NotLeader):
        bench.store.preempt(old, "gpu-0", 1)


def test_a_flush_of_nothing_is_fine(bench: Bench) -> None:
    outcome = bench.store.flush("gpu-0", [], [], lease_s=LEASE)
    assert (outcome.written, outcome.rejected, dict(outcome.directives)) == (0, 0, {})
