"""Leases and results in the in-memory store."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import replace

from qlm_batch.domain.jobs import ClaimedRequest, ClaimedSlice, ResultRow, SliceState
from qlm_batch.domain.ledger import Directive, FlushOutcome, Held, Reaped, ReleaseReason
from qlm_batch.domain.transitions import OPEN_SLICE, SUSPECT_AFTER
from qlm_batch.store.memory.leadership import check_leader
from qlm_batch.store.memory.state import Facet, SliceData, locked
from qlm_batch.store.memory.work import close, left, lose, move, requeue, store_row

_HELD = frozenset({Directive.KEEP, Directive.PREEMPT})


class MemoryLedger(Facet):
    """Ledger in memory."""

    @locked
    def claim_slices(
        self, instance: str, boot_id: str, *, max_requests: int, lease_s: float, holding: int = 0
    ) -> Sequence[ClaimedSlice]:
        """Lease slices assigned to this boot, in assignment order, up to about `max_requests`."""
        found = self.state.instances.get(instance)
        if found is None or found.retired or found.beat.boot_id != boot_id or max_requests <= 0:
            return ()
        if not self.state.assigned[instance]:
            return ()
        leased = self.state.leased[instance].values()
        if holding and any(part.attempts >= SUSPECT_AFTER for part in leased):
            return ()
        until = self.state.clock() + lease_s
        chosen = self._next_assigned(instance, max_requests, holding)
        for part in chosen:
            part.epoch += 1
            part.lease_until = until
            part.fruitful = part.preempt = False
            move(self.state, part, SliceState.LEASED, instance=instance)
        return tuple(self._claimed(part) for part in chosen)

    def _next_assigned(self, instance: str, most: int, holding: int) -> list[SliceData]:
        chosen: list[SliceData] = []
        taken = 0
        for part in self.state.assigned[instance].values():
            if taken >= most:
                break
            if part.attempts >= SUSPECT_AFTER:
                # The holder drains first; else suspects would be passed over for ever.
                return chosen if chosen or holding else [part]
            chosen.append(part)
            taken += part.remaining
        return chosen

    def _claimed(self, part: SliceData) -> ClaimedSlice:
        run = part.run
        own = part.generation == 1
        return ClaimedSlice(
            slice_id=part.id,
            epoch=part.epoch,
            run_id=run.id,
            generation=part.generation,
            batch_id=run.batch_id,
            tenant=run.tenant,
            model=run.model,
            endpoint=self.state.batches[run.batch_id].view.spec.endpoint,
            deadline=part.deadline,
            expires_at=part.expires_at,
            suspect=part.attempts >= SUSPECT_AFTER,
            requests=tuple(
                ClaimedRequest(
                    run_id=run.id,
                    position=position,
                    body=run.lines[position].body,
                    deadline=run.lines[position].deadline if own else None,
                    prompt_tokens=run.lines[position].prompt_tokens,
                )
                for position in left(part)
            ),
        )

    @locked
    def flush(
        self,
        instance: str,
        rows: Sequence[ResultRow],
        held: Sequence[Held],
        *,
        lease_s: float | None,
    ) -> FlushOutcome:
        """Store results, close complete slices and renew the rest (None: do not renew), at once."""
        slices = self.state.slices
        written = sum(self._store(instance, row) for row in rows)
        until = None if lease_s is None else self.state.clock() + lease_s
        newest = {row.slice_id: row.epoch for row in rows}
        directives: dict[int, Directive] = {
            slice_id: _directive(slices.get(slice_id), instance, epoch)
            for slice_id, epoch in newest.items()
        }
        for lease in held:
            part = slices.get(lease.slice_id)
            directive = _directive(part, instance, lease.epoch)
            if part is not None and directive in _HELD:
                if lease.complete:
                    # Its holder has stopped, yet lines still lack a row: somebody has to go on.
                    requeue(self.state, part)
                    directive = Directive.LOST
                elif until is not None:
                    part.lease_until = until
            directives[lease.slice_id] = directive
        return FlushOutcome(written, len(rows) - written, directives)

    def _store(self, instance: str, row: ResultRow) -> bool:
        part = self.state.slices.get(row.slice_id)
        if part is None or part.state not in OPEN_SLICE:
            return False
        if row.run_id != part.run.id or row.generation != part.generation:
            return False
        if not part.lo <= row.position < part.hi:
            return False
        if not (row.ok or _holds(part, instance, row.epoch)):
            return False
        return store_row(self.state, part, row)

    @locked
    def release(self, instance: str, held: Sequence[Held], reason: ReleaseReason) -> None:
        """Give leases back."""
        own = [
            self.state.slices[lease.slice_id]
            for lease in held
            if lease.slice_id in self.state.slices
            and _holds(self.state.slices[lease.slice_id], instance, lease.epoch)
        ]
        if reason is ReleaseReason.ENGINE_DIED:
            lose(self.state, own)
            return
        for part in own:
            requeue(self.state, part)

    @locked
    def preempt(self, epoch: int, instance: str, slices: int) -> int:
        """Ask an instance to give back up to `slices`, latest deadline first."""
        check_leader(self.state, epoch)
        placed = [*self.state.assigned[instance].values()]
        placed += (part for part in self.state.leased[instance].values() if not part.preempt)
        placed.sort(key=lambda part: (-part.deadline, part.state is SliceState.LEASED, -part.place))
        for part in placed[:slices]:
            if part.state is SliceState.ASSIGNED:
                requeue(self.state, part)
            else:
                part.preempt = True
        return len(placed[:slices])

    @locked
    def reap(self, epoch: int) -> Reaped:
        """Requeue lost leases, expire slices past their time, and end batches left fully closed."""
        check_leader(self.state, epoch)
        now = self.state.clock()
        expired = finished = 0
        expiring = self.state.expiring
        while expiring and expiring[0][0] <= now:
            _, slice_id = heapq.heappop(expiring)
            part = self.state.slices[slice_id]
            if part.state in OPEN_SLICE:
                expired += 1
                finished += close(self.state, part, SliceState.EXPIRED)
        lost = [
            part
            for leases in self.state.leased.values()
            for part in leases.values()
            if part.lease_until <= now
        ]
        reaped = lose(self.state, sorted(lost, key=lambda part: part.id))
        stranded = self._requeue_stranded(now - self.state.silent_s)
        return replace(
            reaped,
            requeued=reaped.requeued + stranded,
            expired=expired,
            finished_batches=reaped.finished_batches + finished,
        )

    def _requeue_stranded(self, heard_since: float) -> int:
        stranded = [
            part
            for parts in self.state.assigned.values()
            for part in parts.values()
            if self.state.instances[part.instance or ""].at < heard_since
        ]
        for part in stranded:
            requeue(self.state, part)
        return len(stranded)


def _holds(part: SliceData, instance: str, epoch: int) -> bool:
    return part.state is SliceState.LEASED and part.epoch == epoch and part.instance == instance


def _directive(part: SliceData | None, instance: str, epoch: int) -> Directive:
    if part is None or part.state not in OPEN_SLICE:
        return Directive.CLOSED
    if not _holds(part, instance, epoch):
        return Directive.LOST
    return Directive.PREEMPT if part.preempt else Directive.KEEP
