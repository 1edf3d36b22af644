"""`/v1/estimates` and `/v1/calibration`: what will be, and how well such answers held."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from qlm_batch.api.auth import Parts, Reader
from qlm_batch.api.responses import errors
from qlm_batch.api.schemas import Eta, Text
from qlm_batch.domain.bodies import MAX_MODEL_CHARS
from qlm_batch.domain.buckets import prompt_bucket
from qlm_batch.domain.durations import format_duration, parse_window
from qlm_batch.domain.jobs import OnMiss
from qlm_batch.domain.store import BatchStore
from qlm_batch.scheduling.admission import Admission, Admissions, Work
from qlm_batch.scheduling.policies import policy
from qlm_batch.scheduling.receipts import Receipt, receipt, reliability

router = APIRouter(prefix="/v1", tags=["estimates"])

MOVES = 500
"""Search of one hypothetical plan; several are made for an answer."""
_PAGE = 100
_MOST_REQUESTS = 10**9
_MOST_TOKENS = 10**15

Count = Annotated[int, Field(ge=0, le=_MOST_TOKENS)]


class WorkIn(BaseModel):
    """Requests of one model: how many, and their tokens in all.

    `prompts` are pairs [tokens, requests] of prompts about as long, where that is known.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    model: Annotated[Text, Field(min_length=1, max_length=MAX_MODEL_CHARS)]
    requests: Annotated[int, Field(ge=1, le=_MOST_REQUESTS)]
    prompt_tokens: Count
    max_tokens: Count
    unbounded: Annotated[int, Field(ge=0, le=_MOST_REQUESTS)] = 0
    prompts: Annotated[
        list[Annotated[list[Count], Field(min_length=2, max_length=2)]], Field(max_length=1000)
    ] = []

    def to_work(self) -> Work:
        """As admission takes it."""
        mix: dict[int, int] = {}
        for tokens, requests in self.prompts:
            bucket = prompt_bucket(tokens)
            mix[bucket] = mix.get(bucket, 0) + requests
        given = self.model_dump(exclude={"prompts"})
        return Work(**given, prompts=tuple(sorted(mix.items())))


class EstimateAsk(BaseModel):
    """Work that may be submitted."""

    model_config = ConfigDict(extra="forbid", strict=True)

    completion_window: Annotated[Text, Field(min_length=2, max_length=64)]
    work: Annotated[list[WorkIn], Field(min_length=1, max_length=1000)]
    on_miss: Literal["expire", "finish_late"] = "expire"


class EstimateObject(BaseModel):
    """When it would be done, and whether it would be accepted."""

    object: Literal["estimate"] = "estimate"
    verdict: Literal["accept", "warn", "refuse"]
    deadline: int
    eta: Eta
    miss_probability: float | None
    reason: str | None
    earliest_window: str | None
    earliest_window_s: int | None
    late_batches: int


class LevelObject(BaseModel):
    """The share of outcomes at or below one level of what was promised."""

    level: float
    share: float


class ReceiptObject(BaseModel):
    """One promise and its outcome, in seconds after it was made; null: it expired."""

    batch_id: str
    p50_s: float
    p95_s: float
    actual_s: float | None


class CalibrationObject(BaseModel):
    """The reliability of promises made to batches that have ended."""

    object: Literal["calibration"] = "calibration"
    promises: int
    done_by_p50: float | None
    done_by_p95: float | None
    error: float | None
    curve: list[LevelObject]
    receipts: list[ReceiptObject]


@router.post("/estimates", operation_id="create_estimate", responses=errors(413))
def estimate(asked: EstimateAsk, parts: Parts, key: Reader) -> EstimateObject:
    """When a batch of this work would be done if it were submitted now; nothing is stored."""
    window_s = parse_window(asked.completion_window)
    admissions = Admissions(
        policy(parts.settings.policy), MOVES, slice_requests=parts.settings.slice_requests
    )
    work = [own.to_work() for own in asked.work]
    found = admissions.foresee(
        parts.store.snapshot(), work, key.tenant, window_s, OnMiss(asked.on_miss)
    )
    return _estimate_object(found)


@router.get("/calibration", operation_id="get_calibration", responses=errors())
def calibration(
    parts: Parts, key: Reader, batches: Annotated[int, Query(ge=1, le=10_000)] = 1000
) -> CalibrationObject:
    """How well the promises to the caller's newest batches held."""
    receipts = _receipts(parts.store, key.tenant, batches)
    found = reliability(receipts)
    return CalibrationObject(
        promises=found.count,
        done_by_p50=found.by_p50 if receipts else None,
        done_by_p95=found.by_p95 if receipts else None,
        error=found.error if receipts else None,
        curve=[LevelObject(level=level, share=share) for level, share in found.curve],
        receipts=[
            ReceiptObject(
                batch_id=own.batch_id,
                p50_s=round(own.p50_s, 3),
                p95_s=round(own.p95_s, 3),
                actual_s=None if own.actual_s == float("inf") else round(own.actual_s, 3),
            )
            for own in receipts
        ],
    )


def _estimate_object(found: Admission) -> EstimateObject:
    made, window_s = found.estimate, found.earliest_window_s
    whole_s = None if window_s is None else max(10, int(-(-window_s // 1)))
    return EstimateObject(
        verdict=found.verdict.value,
        deadline=int(found.deadline),
        eta=Eta(
            p50=None if made.p50 is None else int(made.p50),
            p95=None if made.p95 is None else int(made.p95),
        ),
        miss_probability=made.miss_probability,
        reason=made.reason,
        earliest_window=None if whole_s is None else format_duration(whole_s),
        earliest_window_s=whole_s,
        late_batches=len(found.others),
    )


def _receipts(store: BatchStore, tenant: str, most: int) -> list[Receipt]:
    found: list[Receipt] = []
    after, seen = None, 0
    while seen < most:
        page = store.list_batches(tenant, after=after, limit=min(_PAGE, most - seen))
        found += [own for own in map(receipt, page.items) if own is not None]
        seen += len(page.items)
        if not page.has_more or not page.items:
            break
        after = page.items[-1].id
    return found
