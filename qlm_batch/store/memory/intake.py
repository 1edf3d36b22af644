"""Reading files into the in-memory store."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from qlm_batch.domain.buckets import MAX_RUNS, bucket_of, prompt_mix
from qlm_batch.domain.errors import Conflict, InvalidInput
from qlm_batch.domain.jobs import (
    EMBEDDINGS,
    BatchState,
    EngineKind,
    LineError,
    OnMiss,
    RequestCounts,
    RequestLine,
)
from qlm_batch.domain.records import IntakeTask
from qlm_batch.store.memory.state import BatchData, Facet, RunData, change, locked
from qlm_batch.store.memory.work import add, end, new_slice


class MemoryIntake(Facet):
    """IntakeStore in memory."""

    @locked
    def claim_intake(self, holder: str, lease_s: float) -> IntakeTask | None:
        """The oldest validating batch nobody is reading."""
        now = self.state.clock()
        for batch in list(self.state.unfinished.values()):
            spec = batch.view.spec
            if batch.view.state is not BatchState.VALIDATING:
                continue
            if batch.claim_holder is not None and batch.claim_until >= now:
                continue
            file = self.state.live_file(spec.tenant, spec.input_file_id)
            if file is not None:
                batch.claim_holder, batch.claim_until = holder, now + lease_s
                return IntakeTask(batch.shown(), file)
            missing = LineError(
                code="file_not_found",
                message=f"The input file '{spec.input_file_id}' was deleted or expired before it"
                " was read; upload it again and create a new batch.",
                param="input_file_id",
            )
            end(self.state, batch, BatchState.FAILED, errors=(missing,), error_count=1)
        return None

    @locked
    def renew_intake(self, batch_id: str, holder: str, lease_s: float) -> bool:
        """Keep the claim."""
        batch = self.state.batches.get(batch_id)
        if batch is None or not _reads(batch, holder):
            return False
        batch.claim_until = self.state.clock() + lease_s
        return True

    def load_lines(
        self,
        batch_id: str,
        holder: str,
        lines: Iterable[RequestLine],
        slice_requests: int,
    ) -> int:
        """Store all lines, cut runs and slices and turn the batch `in_progress`, all at once."""
        with self.state.lock:
            batch = self._reading(batch_id, holder)
            now = self.state.clock()
        # Outside the lock: the lines may come slowly, and the claim must be renewed meanwhile.
        runs, order = _cut(batch, lines, now)
        with self.state.lock:
            batch = self._reading(batch_id, holder)
            self._take_in(batch, runs, order, slice_requests)
        return len(order)

    def _reading(self, batch_id: str, holder: str) -> BatchData:
        batch = self.state.batches.get(batch_id)
        if batch is None or not _reads(batch, holder):
            raise _claim_lost(batch_id)
        return batch

    def _take_in(
        self,
        batch: BatchData,
        runs: Sequence[RunData],
        order: list[tuple[RunData, int]],
        size: int,
    ) -> None:
        batch.runs, batch.order = list(runs), order
        batch.slice_requests, batch.claim_holder = size, None
        change(
            batch,
            state=BatchState.IN_PROGRESS,
            in_progress_at=self.state.clock(),
            counts=RequestCounts(total=len(order)),
            models=tuple(dict.fromkeys(run.model for run in runs)),
        )
        expires = batch.view.spec.on_miss is OnMiss.EXPIRE
        for run in runs:
            run.id = self.state.next("run")
            run.prompts = prompt_mix(line.prompt_tokens for line in run.lines)
            self.state.runs[run.id] = run
            for lo in range(0, len(run.lines), size):
                hi = min(lo + size, len(run.lines))
                latest = max(
                    batch.view.deadline if line.deadline is None else line.deadline
                    for line in run.lines[lo:hi]
                )
                expires_at = latest if expires else None
                part = new_slice(
                    self.state, run, batch.view.generation, lo, hi, expires_at, run.deadline
                )
                add(self.state, batch, part)

    @locked
    def fail_intake(
        self, batch_id: str, holder: str, errors: Sequence[LineError], total: int
    ) -> None:
        """Turn the batch `failed` with the errors found (`total` may exceed those listed)."""
        batch = self._reading(batch_id, holder)
        end(self.state, batch, BatchState.FAILED, errors=tuple(errors), error_count=total)


def _reads(batch: BatchData, holder: str) -> bool:
    return batch.view.state is BatchState.VALIDATING and batch.claim_holder == holder


def _claim_lost(batch_id: str) -> Conflict:
    return Conflict(
        f"Batch '{batch_id}' was cancelled, or is read by somebody else now.", code="claim_lost"
    )


def _cut(
    batch: BatchData, lines: Iterable[RequestLine], now: float
) -> tuple[Sequence[RunData], list[tuple[RunData, int]]]:
    spec, deadline = batch.view.spec, batch.view.deadline
    kind = EngineKind.EMBED if spec.endpoint == EMBEDDINGS else EngineKind.GENERATE
    runs: dict[tuple[str, int], RunData] = {}
    order: list[tuple[RunData, int]] = []
    seen: dict[str, int] = {}
    own = bucket_of(deadline, now)
    place, register = order.append, seen.setdefault
    for line in lines:
        first = register(line.custom_id, line.line)
        if first != line.line:
            raise InvalidInput(
                f"Line {line.line} has the custom_id '{line.custom_id}' of line {first}; every line"
                " needs its own.",
                code="duplicate_custom_id",
                param="custom_id",
                line=line.line,
            )
        if line.deadline is None:
            until, key = deadline, (line.model, own)
        else:
            until, key = line.deadline, (line.model, bucket_of(line.deadline, now))
        run = runs.get(key)
        if run is None:
            if len(runs) == MAX_RUNS:
                raise InvalidInput(
                    f"Line {line.line} begins run {MAX_RUNS + 1} of this batch, and at most"
                    f" {MAX_RUNS} are allowed: use fewer different models and deadlines, or"
                    " several batches.",
                    code="too_many_runs",
                    line=line.line,
                )
            run = runs[key] = RunData(0, batch.view.id, spec.tenant, line.model, kind, until)
        if until < run.deadline:
            run.deadline = until
        place((run, len(run.lines)))
        run.lines.append(line)
    if not order:
        raise InvalidInput("The input file has no lines.", code="empty_file")
    return list(runs.values()), order
