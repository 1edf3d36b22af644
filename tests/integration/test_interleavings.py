"""Races that matter, forced: a third session holds a row, so that both sides stand in its queue."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import psycopg
import pytest

from qlm_batch.domain.errors import NotLeader
from qlm_batch.domain.jobs import BatchState, RequestCounts, SliceState
from qlm_batch.domain.ledger import Directive
from tests.contract.harness import LEASE, TENANT, TERM, Bench, PostgresHarness, answer, held

T = TypeVar("T")


class Race:
    """Calls that wait in line for a row until it is let go."""

    def __init__(self, url: str, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._holder = psycopg.connect(url)
        self._watch = psycopg.connect(url, autocommit=True)
        self._waiting = 0

    def hold(self, query: str) -> None:
        """Take the rows that `query` locks."""
        self._holder.execute(query)

    def join(self, call: Callable[[], T]) -> Future[T]:
        """Start a call, and return once it waits for a lock."""
        future = self._pool.submit(call)
        self._waiting += 1
        until = time.monotonic() + 30
        while self._blocked() < self._waiting:
            if future.done() or time.monotonic() > until:
                pytest.fail("the call did not wait for a lock")
            time.sleep(0.005)
        return future

    def _blocked(self) -> int:
        row = self._watch.execute(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE datname = current_database() AND wait_event_type = 'Lock'"
        ).fetchone()
        assert row is not None
        return int(row[0])

    def change(self, query: str) -> None:
        """Change something in the holder's transaction."""
        self._holder.execute(query)

    def go(self) -> None:
        """Let the rows go."""
        self._holder.commit()

    def close(self) -> None:
        """Give the connections back."""
        self._holder.close()
        self._watch.close()


@pytest.fixture
def bench(postgres_url: str) -> Iterator[Bench]:
    """A PostgreSQL store of its own."""
    harness = PostgresHarness(postgres_url)
    yield Bench(harness)
    harness.close()


@contextmanager
def race(url: str) -> Iterator[Race]:
    """Two callers and a third session."""
    with ThreadPoolExecutor(2) as pool:
        made = Race(url, pool)
        try:
            yield made
        finally:
            made.close()


@pytest.mark.parametrize("death_first", [True, False])
@pytest.mark.parametrize("step", ["assign", "claim"])
def test_nothing_is_left_with_a_boot_that_dies_while_it_is_given_work(
    bench: Bench, postgres_url: str, step: str, death_first: bool
) -> None:
    bench.batch(lines=2)
    bench.beat()
    if step == "claim":
        bench.assign()
    with race(postgres_url) as line:
        line.hold("SELECT 1 FROM instance FOR UPDATE")

        def give() -> bool:
            return bool(bench.assign() if step == "assign" else bench.claim())

        def die() -> bool:
            bench.store.died("gpu-0", "boot-1")
            return True

        first, second = (die, give) if death_first else (give, die)
        calls = [line.join(first), line.join(second)]
        line.go()
        one, two = (call.result(timeout=30) for call in calls)
    assert (two if death_first else one) is not death_first
    assert [s.state for s in bench.harness.slices()] == [SliceState.QUEUED]


def test_a_dead_boot_does_not_take_along_what_another_leased_meanwhile(
    bench: Bench, postgres_url: str
) -> None:
    bench.batch(lines=2)
    bench.beat()
    bench.take()
    with race(postgres_url) as line:
        line.hold("SELECT 1 FROM slice FOR UPDATE")
        call = line.join(lambda: bench.store.died("gpu-0", "boot-1"))
        # Given back, handed out again and claimed, all while the look is over and the lock is not.
        line.change("UPDATE slice SET instance = 'gpu-1', epoch = epoch + 1")
        line.go()
        call.result(timeout=30)
    (left,) = bench.harness.slices()
    assert (left.state, left.attempts) == (SliceState.LEASED, 0)


@pytest.mark.parametrize("flush_first", [True, False])
def test_a_late_success_and_a_cancellation_agree_on_the_counts(
    bench: Bench, postgres_url: str, flush_first: bool
) -> None:
    batch = bench.batch(lines=2)
    (old,) = bench.take()
    bench.lose()
    rows = [answer(old, old.requests[0])]
    with race(postgres_url) as line:
        line.hold("SELECT 1 FROM slice FOR UPDATE")

        def flush() -> int:
            return bench.store.flush("gpu-0", rows, [], lease_s=LEASE).written

        def cancel() -> int:
            return int(bench.store.cancel_batch(TENANT, batch.id).counts.open)

        first, second = (flush, cancel) if flush_first else (cancel, flush)
        calls = [line.join(first), line.join(second)]
        line.go()
        one, two = (call.result(timeout=30) for call in calls)
    assert (one if flush_first else two) == int(flush_first)
    counts = bench.get(batch.id).counts
    assert counts == RequestCounts(2, int(flush_first), 2 - int(flush_first))
    assert sum(item.ok for item in bench.lines(batch.id)) == counts.completed


def test_a_leader_that_was_replaced_while_it_waited_writes_nothing(
    bench: Bench, postgres_url: str
) -> None:
    bench.batch(lines=2)
    bench.beat()
    bench.assign()
    with race(postgres_url) as line:
        line.hold("SELECT 1 FROM leader FOR UPDATE")
        write = line.join(lambda: bench.store.unassign(bench.epoch, "gpu-0"))
        line.change("UPDATE leader SET holder = 'standby', epoch = epoch + 1")
        line.go()
        with pytest.raises(NotLeader):
            write.result(timeout=30)
    assert [s.state for s in bench.harness.slices()] == [SliceState.ASSIGNED]


def test_nobody_takes_over_in_the_middle_of_a_leaders_write(
    bench: Bench, postgres_url: str
) -> None:
    bench.batch(lines=2)
    bench.beat()
    bench.assign()
    bench.harness.advance(TERM + 1)
    with race(postgres_url) as line:
        line.hold("SELECT 1 FROM slice FOR UPDATE")
        write = line.join(lambda: bench.store.unassign(bench.epoch, "gpu-0"))
        takeover = line.join(lambda: bench.store.lead("standby", TERM))
        line.go()
        assert write.result(timeout=30) == 1
        assert takeover.result(timeout=30) == bench.epoch + 1
    with pytest.raises(NotLeader):
        bench.store.unassign(bench.epoch, "gpu-0")


@pytest.mark.parametrize("flush_first", [True, False])
def test_a_lease_is_either_renewed_or_lost_when_flush_meets_reaper(
    bench: Bench, postgres_url: str, flush_first: bool
) -> None:
    batch = bench.batch(lines=2)
    (part,) = bench.take()
    bench.harness.advance(LEASE + 1)
    epoch = bench.lead()
    rows = [answer(part, part.requests[0])]
    with race(postgres_url) as line:
        line.hold("SELECT 1 FROM slice FOR UPDATE")

        def flush() -> object:
            outcome = bench.store.flush("gpu-0", rows, [held(part)], lease_s=LEASE)
            return outcome.written, outcome.directives[part.slice_id]

        def reap() -> object:
            return bench.store.reap(epoch).requeued

        first, second = (flush, reap) if flush_first else (reap, flush)
        calls = [line.join(first), line.join(second)]
        line.go()
        one, two = (call.result(timeout=30) for call in calls)
    flushed, reaped = (one, two) if flush_first else (two, one)
    assert flushed == (1, Directive.KEEP if flush_first else Directive.LOST)
    assert reaped == int(not flush_first)
    (look,) = bench.harness.slices()
    assert look.state is (SliceState.LEASED if flush_first else SliceState.QUEUED)
    assert bench.get(batch.id).counts == RequestCounts(2, 1, 0)


def test_two_flushes_that_close_the_last_two_slices_settle_the_batch_once(
    bench: Bench, postgres_url: str
) -> None:
    batch = bench.batch(lines=4, slice_requests=2)
    parts = bench.take()
    with race(postgres_url) as line:
        line.hold("SELECT 1 FROM batch FOR UPDATE")
        calls = [line.join(lambda part=part: bench.finish(part)) for part in parts]  # type: ignore[misc]
        line.go()
        for call in calls:
            call.result(timeout=30)
    now = bench.get(batch.id)
    assert (now.state, now.counts) == (BatchState.FINALIZING, RequestCounts(4, 4, 0))
    bench.export(batch.id)
    assert len(bench.store.claim_outbox("a", 10, 60.0)) == 1
