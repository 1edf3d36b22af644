"""Forgetting in the in-memory store."""

from __future__ import annotations

import heapq

from qlm_batch.domain.transitions import TERMINAL
from qlm_batch.store.memory.state import BatchData, Facet, State, locked


class MemoryRetention(Facet):
    """RetentionStore in memory."""

    @locked
    def forget_batches(self, rows_s: float, limit: int = 10) -> int:
        """Drop batches that ended over `rows_s` ago, unless a delivery is still under way."""
        state = self.state
        since = state.clock() - rows_s
        pending = {e.item.batch_id for e in state.outbox.values() if e.next_at is not None}
        past = [
            batch
            for batch_id, batch in state.batches.items()
            if batch_id not in pending and _ended_at(batch) < since
        ]
        past.sort(key=_ended_at)
        for batch in past[:limit]:
            _drop(state, batch)
        return len(past[:limit])

    @locked
    def forget_lines(self, limit: int = 5000) -> int:
        """Lines went with their batches."""
        return 0

    @locked
    def forget_instances(self, silent_s: float) -> int:
        """Drop instances that were not heard of for `silent_s` and hold nothing."""
        state = self.state
        since = state.clock() - silent_s
        gone = [
            name
            for name, known in state.instances.items()
            if known.at < since and not state.assigned.get(name) and not state.leased.get(name)
        ]
        for name in gone:
            del state.instances[name]
        return len(gone)


def _ended_at(batch: BatchData) -> float:
    view = batch.view
    if view.state not in TERMINAL:
        return float("inf")
    times = (view.completed_at, view.failed_at, view.expired_at, view.cancelled_at)
    return next(at for at in times if at is not None)


def _drop(state: State, batch: BatchData) -> None:
    batch_id, spec = batch.view.id, batch.view.spec
    del state.batches[batch_id]
    if spec.idempotency_key is not None:
        del state.idempotent[spec.tenant, spec.idempotency_key]
    for run in batch.runs:
        del state.runs[run.id]
    for part in batch.slices:
        del state.slices[part.id]
        state.waiting.pop(part.part, None)
    # Slices closed before their time are still in there.
    state.expiring = [entry for entry in state.expiring if entry[1] in state.slices]
    heapq.heapify(state.expiring)
    state.decisions.pop(batch_id, None)
    state.outbox = {n: e for n, e in state.outbox.items() if e.item.batch_id != batch_id}
    state.deliveries = [known for known in state.deliveries if known[0].batch_id != batch_id]
