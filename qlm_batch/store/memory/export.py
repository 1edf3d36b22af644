"""Writing results out of the in-memory store."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

from qlm_batch.domain.jobs import (
    Batch,
    BatchState,
    ExportLine,
    FileRecord,
    ResultRow,
    SliceState,
)
from qlm_batch.domain.records import Attainment, ExportTask
from qlm_batch.store.memory.state import BatchData, Facet, RunData, State, locked
from qlm_batch.store.memory.work import EXPIRED_LINE, end

_PAGE = 1000
_SETTLED = frozenset({BatchState.FINALIZING, BatchState.CANCELLING})


class MemoryExport(Facet):
    """ExportStore in memory."""

    @locked
    def claim_export(self, holder: str, lease_s: float) -> ExportTask | None:
        """A batch whose slices are all closed and whose files are not written yet."""
        now = self.state.clock()
        free = [
            batch
            for batch in self.state.unfinished.values()
            if batch.view.state in _SETTLED
            and (batch.claim_holder is None or batch.claim_until < now)
        ]
        if not free:
            return None
        batch = min(free, key=lambda b: b.view.cancelling_at or b.view.finalizing_at or now)
        batch.claim_holder, batch.claim_until = holder, now + lease_s
        return ExportTask(batch.shown())

    @locked
    def renew_export(self, batch_id: str, holder: str, lease_s: float) -> bool:
        """Keep the claim."""
        batch = self.state.batches.get(batch_id)
        if batch is None or not _writes(batch, holder):
            return False
        batch.claim_until = self.state.clock() + lease_s
        return True

    def export_lines(self, batch_id: str, *, partial: bool = False) -> Iterator[ExportLine]:
        """One entry per line in file order, paged by key."""
        for page in count():
            lines = self._page(batch_id, page * _PAGE)
            yield from (line for line in lines if not partial or line.request_id is not None)
            if len(lines) < _PAGE:
                return

    @locked
    def _page(self, batch_id: str, start: int) -> list[ExportLine]:
        batch = self.state.batches.get(batch_id)
        if batch is None:
            return []
        wanted = batch.order[start : start + _PAGE]
        closed = _closed_as(batch, wanted)
        return [_line(run, position, closed[run.id, position]) for run, position in wanted]

    @locked
    def finish_export(
        self,
        batch_id: str,
        holder: str,
        output: FileRecord | None,
        errors: FileRecord | None,
    ) -> Batch | None:
        """Record the files, end the batch and insert its outbox rows."""
        batch = self.state.batches.get(batch_id)
        if batch is None or not _writes(batch, holder):
            return None
        for record in (output, errors):
            if record is not None:
                self.state.files[record.id] = record
        if batch.view.state is BatchState.CANCELLING:
            to = BatchState.CANCELLED
        else:
            to = BatchState.EXPIRED if batch.missed else BatchState.COMPLETED
        if to is not BatchState.CANCELLED:
            _count(self.state, batch)
        end(
            self.state,
            batch,
            to,
            output_file_id=output.id if output else None,
            error_file_id=errors.id if errors else None,
        )
        return batch.shown()


def _count(state: State, batch: BatchData) -> None:
    """Count how the lines of the newest generation met their deadlines."""
    met = missed = 0
    for run in batch.runs:
        rows = run.rows[batch.view.generation]
        ok = {position for position, row in rows.items() if row.ok}
        met += len(ok - run.late)
        missed += len(ok & run.late)
        missed += sum(row.error_code == EXPIRED_LINE for row in rows.values())
        missed += len(run.lines) - len(run.successes | rows.keys())
    before = state.attained
    state.attained = Attainment(before.met + met, before.missed + missed)


def _writes(batch: BatchData, holder: str) -> bool:
    return batch.view.state in _SETTLED and batch.claim_holder == holder


def _closed_as(
    batch: BatchData, wanted: list[tuple[RunData, int]]
) -> dict[tuple[int, int], SliceState]:
    spans: dict[int, tuple[int, int]] = {}
    for run, position in wanted:
        lo, hi = spans.get(run.id, (position, position))
        spans[run.id] = (min(lo, position), max(hi, position))
    states: dict[tuple[int, int], SliceState] = {}
    # Later slices belong to later generations, so the newest one has the last word.
    for part in batch.slices:
        if part.run.id in spans:
            lo, hi = spans[part.run.id]
            for position in range(max(lo, part.lo), min(hi + 1, part.hi)):
                states[part.run.id, position] = part.state
    return states


def _line(run: RunData, position: int, closed_as: SliceState) -> ExportLine:
    row = _outcome(run, position)
    line = run.lines[position]
    if row is None:
        return ExportLine(run.id, position, line.custom_id, closed_as, ok=False)
    return ExportLine(
        run_id=run.id,
        position=position,
        custom_id=line.custom_id,
        closed_as=closed_as,
        ok=row.ok,
        request_id=row.request_id,
        status_code=row.status_code,
        body=row.body,
        error_code=row.error_code,
        error_message=row.error_message,
    )


def _outcome(run: RunData, position: int) -> ResultRow | None:
    newest: ResultRow | None = None
    for generation in sorted(run.rows, reverse=True):
        row = run.rows[generation].get(position)
        if row is not None and row.ok:
            return row
        newest = newest or row
    return newest
