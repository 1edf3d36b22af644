"""Result rows from what became of a request."""

from __future__ import annotations

from dataclasses import replace

from qlm_batch.domain.engine import EngineAnswer
from qlm_batch.domain.jobs import ClaimedRequest, ClaimedSlice, ResultRow, Usage
from qlm_batch.ids import new_id

REQUEST = "req_"
MOST_MESSAGE = 2000
"""Characters of an error's message that are kept."""
EXPIRED_MESSAGE = "This request could not be executed before the completion window expired."


def answered(
    claimed: ClaimedSlice,
    request: ClaimedRequest,
    request_id: str,
    answer: EngineAnswer,
    started_at: float,
    duration_s: float,
) -> ResultRow:
    """The engine answered, with whatever status; `duration_s` is used where it told none."""
    return ResultRow(
        slice_id=claimed.slice_id,
        epoch=claimed.epoch,
        run_id=request.run_id,
        position=request.position,
        generation=claimed.generation,
        request_id=request_id,
        status_code=answer.status_code,
        body=answer.body,
        usage=answer.usage,
        started_at=started_at,
        first_token_s=answer.first_token_s,
        duration_s=duration_s if answer.duration_s is None else answer.duration_s,
    )


def failed(
    claimed: ClaimedSlice,
    request: ClaimedRequest,
    code: str,
    message: str,
    *,
    request_id: str | None = None,
    started_at: float | None = None,
) -> ResultRow:
    """There is no answer, and the line's error says why."""
    return ResultRow(
        slice_id=claimed.slice_id,
        epoch=claimed.epoch,
        run_id=request.run_id,
        position=request.position,
        generation=claimed.generation,
        request_id=request_id or new_id(REQUEST),
        error_code=code,
        error_message=_plain(message),
        started_at=started_at,
    )


def not_stored(row: ResultRow) -> ResultRow:
    """What takes the place of a row that the store cannot take."""
    return replace(
        row,
        status_code=None,
        body=None,
        usage=Usage(),
        error_code="result_not_stored",
        error_message="The result of this request could not be stored; the worker's log says why.",
    )


def expired(claimed: ClaimedSlice, request: ClaimedRequest) -> ResultRow:
    """The line's deadline passed."""
    return failed(claimed, request, "batch_expired", EXPIRED_MESSAGE)


def _plain(message: str) -> str:
    """Text that every database takes: no NUL, no half of a surrogate pair, of a bounded length."""
    return message[:MOST_MESSAGE].replace("\0", "").encode("utf-8", "replace").decode()
