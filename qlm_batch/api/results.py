"""`/v1/batches/{id}/results`: outcomes as JSONL, also while the batch runs."""

from __future__ import annotations

from collections.abc import Generator, Iterator

from fastapi import APIRouter
from starlette.responses import StreamingResponse

from qlm_batch.api.auth import Parts, Reader
from qlm_batch.api.responses import ObjectId, errors, known_shape, streamed
from qlm_batch.domain.errors import Conflict
from qlm_batch.domain.jobs import ExportLine
from qlm_batch.domain.transitions import TERMINAL
from qlm_batch.intake.results import render_line

router = APIRouter(prefix="/v1/batches", tags=["batches"])

_CHUNK_BYTES = 64 * 1024


@router.get(
    "/{batch_id}/results",
    operation_id="get_batch_results",
    response_class=StreamingResponse,
    responses=errors(404, 409)
    | {
        200: {
            "content": {"application/jsonl": {}},
            "description": "One line per outcome, successes and errors alike, in file order.",
        }
    },
)
def get_results(
    batch_id: ObjectId, parts: Parts, key: Reader, partial: bool = False
) -> StreamingResponse:
    """Every line's outcome; with `partial`, those there are so far."""
    batch = parts.store.batch(key.tenant, known_shape(batch_id, "batch"))
    if not partial and batch.state not in TERMINAL:
        raise Conflict(
            f"The batch is still {batch.state}. Ask again with ?partial=true for what is there.",
            code="batch_not_finished",
        )
    chunks = _chunks(parts.store.export_lines(batch.id, partial=partial))
    return StreamingResponse(
        streamed(chunks, next(chunks, b"")),
        media_type="application/jsonl",
        headers={"x-content-type-options": "nosniff"},
    )


def _chunks(lines: Iterator[ExportLine]) -> Generator[bytes, None, None]:
    pending = bytearray()
    for line in lines:
        pending += render_line(line)[1]
        if len(pending) >= _CHUNK_BYTES:
            yield bytes(pending)
            pending.clear()
    if pending:
        yield bytes(pending)
