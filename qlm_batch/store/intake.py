"""Queries behind the reading of files: claims, loading, refusal."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict

from sqlalchemy.engine import Connection

from qlm_batch.domain.buckets import MAX_RUNS
from qlm_batch.domain.errors import Conflict, InvalidInput
from qlm_batch.domain.jobs import (
    EMBEDDINGS,
    Batch,
    BatchState,
    EngineKind,
    LineError,
    OnMiss,
    RequestLine,
    SloClass,
)
from qlm_batch.domain.records import IntakeTask
from qlm_batch.store.batch_rows import batch_by_id
from qlm_batch.store.copying import copy_rows, float8, int4, int8, text
from qlm_batch.store.cutting import COLUMNS, Cutter, RunCut
from qlm_batch.store.events import announce
from qlm_batch.store.files import find_file
from qlm_batch.store.session import lift_timeouts
from qlm_batch.store.sql import sql

_CLAIM = sql(
    """
    UPDATE batch SET claim_holder = :holder, claim_until = {now} + :lease_s
    WHERE id = (
        SELECT id FROM batch
        WHERE state = 'validating' AND (claim_until IS NULL OR claim_until < {now})
        ORDER BY seq LIMIT 1 FOR UPDATE SKIP LOCKED
    )
    RETURNING id
    """
)


def claim_intake(connection: Connection, holder: str, lease_s: float) -> IntakeTask | None:
    """The oldest batch that nobody reads; those whose file was deleted fail on the way."""
    while True:
        batch_id = connection.scalar(_CLAIM, {"holder": holder, "lease_s": lease_s})
        if batch_id is None:
            return None
        batch = batch_by_id(connection, batch_id)
        file = find_file(connection, batch.spec.tenant, batch.spec.input_file_id)
        if file is not None:
            return IntakeTask(batch, file)
        missing = LineError(
            code="file_not_found",
            message=f"The input file '{batch.spec.input_file_id}' was deleted or expired before it"
            " was read; upload it again and create a new batch.",
            param="input_file_id",
        )
        fail_intake(connection, batch_id, holder, [missing], 1)


_RENEW = sql(
    """
    UPDATE batch SET claim_until = {now} + :lease_s
    WHERE id = :id AND claim_holder = :holder AND state = 'validating'
    """
)


def renew_intake(connection: Connection, batch_id: str, holder: str, lease_s: float) -> bool:
    """Keep the claim; False when it is somebody else's or the batch left `validating`."""
    found = connection.execute(_RENEW, {"id": batch_id, "holder": holder, "lease_s": lease_s})
    return found.rowcount == 1


_FAIL = sql(
    """
    UPDATE batch SET state = 'failed', failed_at = {now}, errors = CAST(:errors AS jsonb),
                     error_count = :total, claim_holder = NULL, claim_until = NULL
    WHERE id = :id AND claim_holder = :holder AND state = 'validating'
    """
)


def fail_intake(
    connection: Connection, batch_id: str, holder: str, errors: Sequence[LineError], total: int
) -> None:
    """Turn the batch `failed`. Raises Conflict when the claim was lost."""
    found = connection.execute(
        _FAIL,
        {
            "id": batch_id,
            "holder": holder,
            "errors": json.dumps([asdict(error) for error in errors]),
            "total": total,
        },
    )
    if found.rowcount == 0:
        raise _claim_lost(batch_id)
    announce(connection, batch_id, BatchState.FAILED)


def _claim_lost(batch_id: str) -> Conflict:
    return Conflict(
        f"Batch '{batch_id}' was cancelled, or is read by somebody else now.", code="claim_lost"
    )


_HELD = sql(
    """
    SELECT {now} FROM batch WHERE id = :id AND claim_holder = :holder AND state = 'validating'
    """
)
_TAKE_RUNS = sql(
    "SELECT nextval(pg_get_serial_sequence('run', 'id')) FROM generate_series(1, :runs)"
)
_INSERT_RUN = sql(
    """
    INSERT INTO run (id, batch_id, tenant, model, kind, slo_class, deadline, requests,
                     prompt_tokens, max_tokens, unbounded, prompts)
    OVERRIDING SYSTEM VALUE
    VALUES (:id, :batch_id, :tenant, :model, :kind, :slo_class, :deadline, :requests,
            :prompt_tokens, :max_tokens, :unbounded, CAST(:prompts AS integer[]))
    """
)
_SLICE_COLUMNS = (
    "run_id, batch_id, generation, lo, hi, deadline, expires_at, remaining, prompt_tokens,"
    " max_tokens, unbounded"
)
_ELEVEN_FIELDS = (11).to_bytes(2, "big")
_FLIP = sql(
    """
    UPDATE batch SET state = 'in_progress', in_progress_at = {now}, total = :total,
        open_slices = :slices, slice_requests = :slice_requests, models = :models,
        claim_holder = NULL, claim_until = NULL
    WHERE id = :id AND claim_holder = :holder AND state = 'validating'
    """
)


def load_lines(
    connection: Connection,
    batch_id: str,
    holder: str,
    lines: Iterable[RequestLine],
    slice_requests: int,
) -> int:
    """Store all lines, cut runs and slices, and turn the batch `in_progress`.

    Raises InvalidInput for a duplicate id, for too many runs and for no line at all, Conflict when
    the claim was lost. The batch is not locked before the end: a claim can be renewed and a
    cancellation need not wait.
    """
    now = connection.scalar(_HELD, {"id": batch_id, "holder": holder})
    if now is None:
        raise _claim_lost(batch_id)
    lift_timeouts(connection)
    batch = batch_by_id(connection, batch_id)
    # Before the COPY, during which its connection takes no other query.
    run_ids = connection.scalars(_TAKE_RUNS, {"runs": MAX_RUNS}).all()
    cutter = Cutter(run_ids, batch.deadline, now, slice_requests)
    copy_rows(connection, "request", COLUMNS, cutter.rows(lines), ahead=True)
    if cutter.total == 0:
        raise InvalidInput("The input file has no lines.", code="empty_file")
    _refuse_duplicates(connection, cutter)
    connection.execute(_INSERT_RUN, [_run_row(batch, run) for run in cutter.runs])
    copy_rows(connection, "slice", _SLICE_COLUMNS, _slice_rows(batch, cutter.runs))
    flipped = connection.execute(
        _FLIP,
        {
            "id": batch_id,
            "holder": holder,
            "total": cutter.total,
            "slices": sum(len(run.slices) for run in cutter.runs),
            "slice_requests": slice_requests,
            "models": list(dict.fromkeys(run.model for run in cutter.runs)),
        },
    )
    if flipped.rowcount == 0:
        raise _claim_lost(batch_id)
    return cutter.total


def _run_row(batch: Batch, run: RunCut) -> dict[str, object]:
    embeds = batch.spec.endpoint == EMBEDDINGS
    return {
        "id": run.run_id,
        "batch_id": batch.id,
        "tenant": batch.spec.tenant,
        "model": run.model,
        "kind": (EngineKind.EMBED if embeds else EngineKind.GENERATE).value,
        "slo_class": SloClass.BATCH.value,
        "deadline": run.deadline,
        "requests": run.requests,
        "prompt_tokens": sum(part.prompt_tokens for part in run.slices),
        "max_tokens": sum(part.max_tokens for part in run.slices),
        "unbounded": sum(part.unbounded for part in run.slices),
        "prompts": [number for pair in sorted(run.prompts.items()) for number in pair],
    }


def _slice_rows(batch: Batch, runs: Sequence[RunCut]) -> Iterator[bytes]:
    expires = batch.spec.on_miss is OnMiss.EXPIRE
    for run in runs:
        head = _ELEVEN_FIELDS + int8(run.run_id) + text(batch.id) + int4(batch.generation)
        deadline = float8(run.deadline)
        for part in run.slices:
            yield (
                head
                + int4(part.lo)
                + int4(part.hi)
                + deadline
                + float8(part.latest if expires else None)
                + int8(part.hi - part.lo)
                + int8(part.prompt_tokens)
                + int8(part.max_tokens)
                + int8(part.unbounded)
            )


_DUPLICATES = sql(
    """
    SELECT custom_id, (array_agg(line ORDER BY line))[1:2] AS lines
    FROM request
    WHERE run_id = ANY(CAST(:runs AS bigint[])) AND line = ANY(CAST(:lines AS integer[]))
    GROUP BY custom_id HAVING count(*) > 1
    ORDER BY (array_agg(line ORDER BY line))[2] LIMIT 1
    """
)


def _refuse_duplicates(connection: Connection, cutter: Cutter) -> None:
    lines = cutter.suspects()
    if not lines:
        return
    found = connection.execute(
        _DUPLICATES, {"runs": [run.run_id for run in cutter.runs], "lines": lines}
    ).one_or_none()
    if found is not None:
        first, second = found.lines
        raise InvalidInput(
            f"Line {second} has the custom_id '{found.custom_id}' of line {first}; every line needs"
            " its own.",
            code="duplicate_custom_id",
            param="custom_id",
            line=second,
        )
