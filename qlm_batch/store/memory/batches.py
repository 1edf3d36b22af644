"""Batches of the in-memory store, as their owners see them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from qlm_batch.domain.errors import Conflict, Unprocessable
from qlm_batch.domain.jobs import Batch, BatchSpec, BatchState, OnMiss, SliceState
from qlm_batch.domain.records import Attainment, Page, QueueTotals
from qlm_batch.domain.snapshot import Decision
from qlm_batch.domain.stories import RequestStory, no_such_request, of_run
from qlm_batch.domain.transitions import CANCELLABLE, TERMINAL
from qlm_batch.store.memory.files import no_such_file, page_of
from qlm_batch.store.memory.state import BatchData, Facet, RunData, change, locked
from qlm_batch.store.memory.work import add, close, new_slice


class MemoryBatches(Facet):
    """BatchStore in memory."""

    @locked
    def create_batch(self, batch_id: str, spec: BatchSpec) -> Batch:
        """Accept a batch in state `validating`."""
        state = self.state
        key = None if spec.idempotency_key is None else (spec.tenant, spec.idempotency_key)
        if key in state.idempotent:
            first = state.batches[state.idempotent[key]].shown()
            if first.spec.fingerprint != spec.fingerprint:
                raise Unprocessable(
                    f"The idempotency key '{spec.idempotency_key}' was used for a different batch,"
                    f" '{first.id}'; send a new key.",
                    code="idempotency_key_reused",
                    param="idempotency_key",
                )
            return first
        if state.live_file(spec.tenant, spec.input_file_id) is None:
            raise no_such_file(spec.input_file_id)
        now = state.clock()
        view = Batch(
            id=batch_id,
            spec=spec,
            state=BatchState.VALIDATING,
            generation=1,
            created_at=now,
            deadline=now + spec.window_s,
        )
        state.batches[batch_id] = state.unfinished[batch_id] = BatchData(view)
        if key is not None:
            state.idempotent[key] = batch_id
        return view

    @locked
    def batch(self, tenant: str, batch_id: str) -> Batch:
        """The batch with live counts (rows in open slices included) and its newest estimate."""
        return self.state.batch_of(tenant, batch_id).shown()

    @locked
    def list_batches(
        self, tenant: str, *, after: str | None = None, limit: int = 20
    ) -> Page[Batch]:
        """A page of the tenant's batches, newest first."""
        own = {
            batch_id: batch.shown()
            for batch_id, batch in reversed(self.state.batches.items())
            if batch.view.spec.tenant == tenant
        }
        return page_of(own, "batch", after, limit)

    @locked
    def open_batches(self, limit: int = 100) -> Sequence[Batch]:
        """Batches of all tenants that have not ended, earliest deadline first."""
        found = [batch.shown() for batch in self.state.unfinished.values()]
        return sorted(found, key=lambda batch: batch.deadline)[:limit]

    @locked
    def cancel_batch(self, tenant: str, batch_id: str) -> Batch:
        """Close every open slice as cancelled and turn the batch `cancelling`."""
        batch = self.state.batch_of(tenant, batch_id)
        if batch.view.state is BatchState.CANCELLING:
            return batch.shown()
        if batch.view.state not in CANCELLABLE:
            raise Conflict(
                f"Cannot cancel a batch with status '{batch.view.state.value}'.",
                code="batch_not_cancellable",
                param="batch_id",
            )
        batch.claim_holder = None
        change(batch, state=BatchState.CANCELLING, cancelling_at=self.state.clock())
        for slice_id in sorted(batch.open):
            close(self.state, self.state.slices[slice_id], SliceState.CANCELLED)
        return batch.shown()

    @locked
    def retry_batch(self, tenant: str, batch_id: str, window_s: float | None = None) -> Batch:
        """Start the next generation over the lines without a success."""
        batch = self.state.batch_of(tenant, batch_id)
        view = batch.view
        if view.state not in TERMINAL or view.state is BatchState.FAILED:
            raise Conflict(
                f"Cannot retry a batch with status '{view.state.value}'.",
                code="batch_not_retryable",
                param="batch_id",
            )
        if batch.completed == view.counts.total:
            raise Conflict(
                f"Batch '{batch_id}' has no failed lines to retry.",
                code="no_failed_lines",
                param="batch_id",
            )
        now = self.state.clock()
        batch.failed, batch.missed, batch.claim_holder = 0, False, None
        batch.estimate, batch.forecast = None, None
        batch.view = replace(
            view,
            state=BatchState.IN_PROGRESS,
            generation=view.generation + 1,
            deadline=now + (view.spec.window_s if window_s is None else window_s),
            in_progress_at=now,
            finalizing_at=None,
            completed_at=None,
            expired_at=None,
            cancelling_at=None,
            cancelled_at=None,
            output_file_id=None,
            error_file_id=None,
            promise=None,
        )
        self.state.unfinished[batch_id] = batch
        self._slice_failed_lines(batch)
        return batch.shown()

    def _slice_failed_lines(self, batch: BatchData) -> None:
        # A line's own deadline belonged to the first attempt; a retry has the new window alone.
        view = batch.view
        expires = view.deadline if view.spec.on_miss is OnMiss.EXPIRE else None
        for run in batch.runs:
            for lo, hi in _failed_ranges(run, batch.slice_requests):
                part = new_slice(self.state, run, view.generation, lo, hi, expires, view.deadline)
                add(self.state, batch, part)

    @locked
    def decisions(self, tenant: str, batch_id: str, limit: int = 1000) -> Sequence[Decision]:
        """The batch's story, oldest first."""
        self.state.batch_of(tenant, batch_id)
        return tuple(self.state.decisions.get(batch_id, ())[:limit])

    @locked
    def request_story(self, tenant: str, batch_id: str, custom_id: str) -> RequestStory:
        """What happened to one request; the losses of leases are not kept in memory."""
        batch = self.state.batch_of(tenant, batch_id)
        found = [
            (run, position)
            for run, position in batch.order
            if run.lines[position].custom_id == custom_id
        ]
        if not found:
            raise no_such_request(batch_id, custom_id)
        run, position = found[0]
        part = max(
            (p for p in batch.slices if p.run is run and p.lo <= position < p.hi),
            key=lambda p: (p.generation, p.id),
        )
        rows = sorted(run.rows.items())
        own = [by_position[position] for _, by_position in rows if position in by_position]
        # Sorting is stable: of equals the newest stands last.
        outcome = sorted(own, key=lambda row: row.ok)[-1] if own else None
        return RequestStory(
            batch_id=batch_id,
            custom_id=custom_id,
            line=run.lines[position].line,
            model=run.model,
            deadline=part.deadline,
            generation=part.generation,
            state=part.state,
            instance=part.instance,
            attempts=part.attempts,
            decisions=of_run(
                tuple(self.state.decisions.get(batch_id, ())),
                run.id,
                {other.id for other in batch.runs},
            ),
            outcome=None if outcome is None else replace(outcome, body=None),
        )

    @locked
    def attainment(self) -> Attainment:
        """How deadlines held so far."""
        return self.state.attained

    @locked
    def queue_totals(self, tenant: str | None = None) -> QueueTotals:
        """Open work of one tenant, or of all."""
        own = [
            batch
            for batch in self.state.unfinished.values()
            if tenant in (None, batch.view.spec.tenant)
        ]
        return QueueTotals(
            batches=len(own),
            slices=sum(len(batch.open) for batch in own),
            requests=sum(
                batch.view.counts.total - batch.completed - batch.failed
                for batch in own
                if batch.open
            ),
            tokens=sum(
                tally.prompt_tokens + tally.max_tokens
                for tallies in (self.state.queued, *self.state.placed.values())
                for (run_id, _), tally in tallies.items()
                if tenant in (None, self.state.runs[run_id].tenant)
            ),
        )


def _failed_ranges(run: RunData, size: int) -> Iterator[tuple[int, int]]:
    failed = [p for p in range(len(run.lines)) if p not in run.successes]
    for start in range(0, len(failed), size):
        chunk = failed[start : start + size]
        yield chunk[0], chunk[-1] + 1
