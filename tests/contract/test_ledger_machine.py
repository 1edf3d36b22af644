"""Any order of leases, losses, cancellations, retries and leaders keeps the ledger's rules."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from qlm_batch.domain.errors import Conflict, NotLeader
from qlm_batch.domain.jobs import BatchState, ClaimedSlice, OnMiss, SliceState
from qlm_batch.domain.ledger import Directive, Held, ReleaseReason
from qlm_batch.domain.snapshot import Assignment, InstanceState
from qlm_batch.domain.transitions import OPEN_SLICE, TERMINAL
from tests.contract.harness import (
    LEASE,
    TENANT,
    TERM,
    WINDOW,
    Bench,
    MemoryHarness,
    PostgresHarness,
    StoreHarness,
    answer,
    ended,
)

NAMES = ("gpu-0", "gpu-1")
HOLDERS = ("one", "two")
pick = st.integers(0, 1_000)
fates_of = st.lists(st.sampled_from("sse."), min_size=1, max_size=4)
"""Success, error, or nothing yet, for one request after the other."""


class LedgerMachine(RuleBasedStateMachine):
    """Two instances, two schedulers and their clients, in any order."""

    harness: StoreHarness

    def __init__(self) -> None:
        super().__init__()
        self.bench = Bench(self.start())
        self.store = self.bench.store
        self.boots = dict.fromkeys(NAMES, 0)
        self.claims: list[tuple[str, ClaimedSlice]] = []
        self.batches: dict[str, int] = {}
        self.leaders: dict[str, int] = {}
        self.newest = 0
        self.epochs: dict[int, int] = {}
        self.closed_rows: dict[int, frozenset[tuple[int, int, int]]] = {}
        self.ends: Counter[tuple[str, int]] = Counter()
        for name in NAMES:
            self.bench.beat(name, "0")

    def start(self) -> StoreHarness:
        """An empty store."""
        raise NotImplementedError

    @rule(
        lines=st.integers(1, 7),
        size=st.integers(1, 4),
        on_miss=st.sampled_from(OnMiss),
        email=st.booleans(),
    )
    @precondition(lambda self: len(self.batches) < 6)
    def submit(self, lines: int, size: int, on_miss: OnMiss, email: bool) -> None:
        batch = self.bench.batch(
            lines,
            slice_requests=size,
            on_miss=on_miss,
            email="a@example.test" if email else None,
        )
        self.batches[batch.id] = lines

    @rule(name=st.sampled_from(NAMES), most=st.integers(1, 3))
    def dispatch_and_claim(self, name: str, most: int) -> None:
        self.dispatch(name, most)

    def dispatch(self, name: str, most: int) -> None:
        """Assign queued slices of every run and lease them, after a new batch if need be."""
        if not self.store.snapshot().runs and len(self.batches) < 6:
            batch = self.bench.batch(6, slice_requests=3)
            self.batches[batch.id] = 6
        epoch = self._leading()
        self.bench.beat(name, str(self.boots[name]))
        if epoch is not None:
            parts = [
                Assignment(name, run.run_id, run.generation, most, "group")
                for run in self.store.snapshot().runs
            ]
            self.store.assign(epoch, parts)
        claimed = self.bench.claim(name, str(self.boots[name]))
        assert len(claimed) == 1 or not any(part.suspect for part in claimed)
        self.claims += [(name, part) for part in claimed]

    @rule(which=st.integers(0, 2), fates=fates_of, more=fates_of, renew=st.booleans())
    @precondition(lambda self: self.claims)
    def flush_newest(self, which: int, fates: list[str], more: list[str], renew: bool) -> None:
        # Twice in a row, so that lines that have their row are offered another.
        name, part = self.claims[-1 - which % len(self.claims)]
        self._flush(name, part, fates, renew)
        self._flush(name, part, more, renew)

    @rule(which=pick, fates=fates_of, renew=st.booleans())
    @precondition(lambda self: self.claims)
    def flush_any_claim_ever_made(self, which: int, fates: list[str], renew: bool) -> None:
        name, part = self.claims[which % len(self.claims)]
        self._flush(name, part, fates, renew)

    def _flush(self, name: str, part: ClaimedSlice, fates: list[str], renew: bool) -> None:
        before = self.harness.rows()
        look = {s.id: s for s in self.harness.slices()}[part.slice_id]
        rows = [
            answer(part, request, ok=fate == "s")
            for request, fate in zip(part.requests, fates * len(part.requests), strict=False)
            if fate != "."
        ]
        complete = len(rows) == len(part.requests)
        outcome = self.store.flush(
            name,
            rows,
            [Held(part.slice_id, part.epoch, complete)],
            lease_s=LEASE if renew else None,
        )
        after = self.harness.rows()
        assert outcome.written == len(after) - len(before)
        assert outcome.written + outcome.rejected == len(rows)
        assert set(outcome.directives) == {part.slice_id}
        assert all(after[key] == ok for key, ok in before.items())
        if look.state not in OPEN_SLICE:
            assert outcome.written == 0
            assert outcome.directives[part.slice_id] is Directive.CLOSED
        elif look.epoch != part.epoch:
            assert all(after[key] for key in after.keys() - before.keys())
        else:
            assert look.state is not SliceState.LEASED or set(after) >= {
                (row.run_id, row.position, row.generation)
                for row in rows
                if look.lo <= row.position < look.hi
            }

    @rule(which=pick, reason=st.sampled_from(ReleaseReason))
    @precondition(lambda self: self.claims)
    def release(self, which: int, reason: ReleaseReason) -> None:
        name, part = self.claims[which % len(self.claims)]
        self.store.release(name, [Held(part.slice_id, part.epoch)], reason)

    @rule(name=st.sampled_from(NAMES), slices=st.integers(1, 3))
    def preempt(self, name: str, slices: int) -> None:
        epoch = self._leading()
        if epoch is not None:
            assert self.store.preempt(epoch, name, slices) <= slices

    @rule(name=st.sampled_from(NAMES))
    def unassign(self, name: str) -> None:
        epoch = self._leading()
        if epoch is not None:
            self.store.unassign(epoch, name)

    @rule(name=st.sampled_from(NAMES), told=st.booleans())
    def new_boot(self, name: str, told: bool) -> None:
        old = str(self.boots[name])
        if told:
            self.store.died(name, old)
            # One that was silent for an hour is not listed any more.
            own = [view for view in self.store.instances() if view.name == name]
            assert all((v.state, v.assigned) == (InstanceState.LOST, ()) for v in own)
            assert not self.bench.beat(name, old)
        self.boots[name] += 1
        assert self.bench.beat(name, str(self.boots[name]))
        assert not self.bench.beat(name, old)
        assert self.bench.claim(name, old) == []

    @rule(which=pick, sure=st.integers(0, 3))
    @precondition(lambda self: self.batches)
    def cancel(self, which: int, sure: int) -> None:
        # Rarely: a cancelled batch has little left to show.
        if sure:
            return
        batch_id = sorted(self.batches)[which % len(self.batches)]
        before = self.bench.get(batch_id).state
        try:
            self.store.cancel_batch(TENANT, batch_id)
        except Conflict:
            assert before not in (BatchState.IN_PROGRESS, BatchState.CANCELLING)
        else:
            assert self.bench.get(batch_id).state is BatchState.CANCELLING

    @rule(which=pick)
    @precondition(lambda self: self.batches)
    def retry(self, which: int) -> None:
        batch_id = sorted(self.batches)[which % len(self.batches)]
        before = self.bench.get(batch_id)
        missing = before.counts.total - before.counts.completed
        try:
            now = self.store.retry_batch(TENANT, batch_id)
        except Conflict:
            assert not ended(before) or missing == 0
            return
        assert missing > 0
        assert now.generation == before.generation + 1
        assert now.counts.open == missing

    @rule()
    def export(self) -> None:
        task = self.store.claim_export("export", 60.0)
        if task is None:
            return
        done = self.store.finish_export(task.batch.id, "export", None, None)
        assert done is not None
        assert ended(done)
        self.ends[done.id, done.generation] += 1

    @rule(holder=st.sampled_from(HOLDERS))
    def lead(self, holder: str) -> None:
        epoch = self.store.lead(holder, TERM)
        if epoch is not None:
            assert epoch >= self.newest
            assert epoch > self.newest or self.leaders.get(holder) == epoch
            self.newest = epoch
            self.leaders[holder] = epoch

    @rule(holder=st.sampled_from(HOLDERS))
    @precondition(lambda self: self.leaders)
    def a_stopped_leader_changes_nothing(self, holder: str) -> None:
        epoch = self.leaders.get(holder)
        if epoch is None or epoch == self.newest:
            return
        before = self.harness.slices()
        for write in (
            lambda: self.store.reap(epoch),
            lambda: self.store.preempt(epoch, NAMES[0], 9),
            lambda: self.store.unassign(epoch, NAMES[0]),
            lambda: self.store.assign(
                epoch,
                [
                    Assignment(NAMES[0], run.run_id, run.generation, 9, "group")
                    for run in self.store.snapshot().runs
                ],
            ),
        ):
            with pytest.raises(NotLeader):
                write()
        assert self.harness.slices() == before

    @rule(seconds=st.sampled_from([1.0, TERM + 1, LEASE / 2, WINDOW / 2]))
    def time_passes(self, seconds: float) -> None:
        self.harness.advance(seconds)

    @rule(reaped=st.booleans(), name=st.sampled_from(NAMES), fates=fates_of)
    def outage_longer_than_every_lease(self, reaped: bool, name: str, fates: list[str]) -> None:
        holders = self.claims[-3:]
        self.harness.advance(LEASE * 3)
        if reaped:
            self.reap()
            self.dispatch(name, 3)
        # Then everyone comes back with what the outage kept them from storing.
        for holder, part in holders:
            self._flush(holder, part, fates, renew=True)

    @rule()
    def reap(self) -> None:
        epoch = self._leading()
        if epoch is not None:
            self.store.reap(epoch)

    def _leading(self) -> int | None:
        for holder in HOLDERS:
            epoch = self.store.lead(holder, TERM)
            if epoch is not None:
                self.newest = max(self.newest, epoch)
                self.leaders[holder] = epoch
                return epoch
        return None

    @invariant()
    def rules_hold(self) -> None:
        rows = self.harness.rows()
        successes = Counter((run, position) for (run, position, _), ok in rows.items() if ok)
        assert all(count == 1 for count in successes.values())
        slices = self.harness.slices()
        by_batch = defaultdict(list)
        for part in slices:
            by_batch[part.batch_id].append(part)
            assert part.epoch >= self.epochs.get(part.id, 0)
            self.epochs[part.id] = part.epoch
            if part.state in OPEN_SLICE:
                assert part.id not in self.closed_rows
                continue
            own = frozenset(
                (run, position, generation)
                for run, position, generation in rows
                if (run, generation) == (part.run_id, part.generation)
                and part.lo <= position < part.hi
            )
            assert self.closed_rows.setdefault(part.id, own) == own
            if part.state is SliceState.DONE:
                for position in range(part.lo, part.hi):
                    assert (part.run_id, position, part.generation) in rows or (
                        successes[part.run_id, position]
                    )
        for batch_id, total in self.batches.items():
            batch = self.bench.get(batch_id)
            counts = batch.counts
            newest = [s for s in by_batch[batch_id] if s.generation == batch.generation]
            still_open = [s for s in by_batch[batch_id] if s.state in OPEN_SLICE]
            assert counts.total == total
            assert counts.completed == sum(
                successes[s, position]
                for s in {part.run_id for part in by_batch[batch_id]}
                for position in range(total)
            )
            assert newest
            assert (batch.state is BatchState.IN_PROGRESS) == bool(still_open)
            if not still_open:
                assert counts.open == 0
                assert self.ends[batch_id, batch.generation] == (batch.state in TERMINAL)

    def teardown(self) -> None:
        for _ in range(6):
            self.harness.advance(LEASE + 1)
            self.reap()
        for batch_id in self.batches:
            if self.bench.get(batch_id).state is BatchState.IN_PROGRESS:
                self.store.cancel_batch(TENANT, batch_id)
        for _ in self.batches:
            self.export()
        self.rules_hold()
        for batch_id, total in self.batches.items():
            batch = self.bench.get(batch_id)
            lines = self.bench.lines(batch_id)
            assert ended(batch)
            assert len(lines) == total
            assert sum(line.ok for line in lines) == batch.counts.completed
            assert sum(not line.ok for line in lines) == batch.counts.failed
        items = self.store.claim_outbox("test", 1000, 60.0)
        assert Counter((i.batch_id, i.generation) for i in items if i.channel == "webhook") == (
            self.ends
        )
        per_channel = Counter((i.batch_id, i.generation, i.channel) for i in items)
        assert all(count == 1 for count in per_channel.values())


class MemoryMachine(LedgerMachine):
    def start(self) -> StoreHarness:
        self.harness = MemoryHarness()
        return self.harness


def test_any_history_keeps_the_rules_in_memory() -> None:
    run_state_machine_as_test(
        MemoryMachine,
        settings=settings(
            max_examples=100,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_any_history_keeps_the_rules_on_postgres(shared_postgres: PostgresHarness) -> None:
    class PostgresMachine(LedgerMachine):
        def start(self) -> StoreHarness:
            shared_postgres.truncate()
            self.harness = shared_postgres
            return self.harness

    run_state_machine_as_test(
        PostgresMachine,
        settings=settings(
            max_examples=20,
            stateful_step_count=30,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
