"""What happened to one request: a line of a batch, or an interactive call."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel

from qlm_batch.api import render
from qlm_batch.api.auth import Parts, Reader
from qlm_batch.api.responses import ObjectId, errors, known_shape
from qlm_batch.api.schemas import DecisionObject
from qlm_batch.domain.interactive import InteractiveRequest
from qlm_batch.domain.stories import RequestStory

router = APIRouter(prefix="/v1", tags=["estimates"])

_ID = re.compile(r"req_[0-9a-f]+")


class LossObject(BaseModel):
    """An instance that was lost, or an engine that died, with the request inside."""

    at: float
    instance: str | None
    reason: str


class OutcomeObject(BaseModel):
    """What came of a line: an answer's status, or an error; times in seconds."""

    status_code: int | None
    error_code: str | None
    error_message: str | None
    input_tokens: int
    output_tokens: int
    started_at: float | None
    first_token_s: float | None
    duration_s: float | None


class RequestStoryObject(BaseModel):
    """A line of a batch on its way."""

    object: Literal["batch.request.story"] = "batch.request.story"
    batch_id: str
    custom_id: str
    line: int
    model: str
    deadline: float
    generation: int
    state: str
    instance: str | None
    attempts: int
    decisions: list[DecisionObject]
    losses: list[LossObject]
    outcome: OutcomeObject | None


class CallObject(BaseModel):
    """An interactive call: what its first token was promised within, and what came."""

    object: Literal["request.story"] = "request.story"
    id: str
    model: str
    state: str
    instance: str
    routed: int
    created_at: float
    ended_at: float | None
    ttft_target_s: float
    first_token_s: float | None
    duration_s: float | None
    status_code: int | None
    input_tokens: int
    output_tokens: int


@router.get("/batches/{batch_id}/story", operation_id="get_request_story", responses=errors(404))
def request_story(
    batch_id: ObjectId,
    parts: Parts,
    key: Reader,
    custom_id: Annotated[str, Query(min_length=1, max_length=4096)],
) -> RequestStoryObject:
    """What was done with one line of the batch, and why."""
    known = known_shape(batch_id, "batch")
    return _story_object(parts.store.request_story(key.tenant, known, custom_id))


@router.get("/requests/{request_id}", operation_id="get_request", responses=errors(404))
def call_story(request_id: ObjectId, parts: Parts, key: Reader) -> CallObject:
    """What became of an interactive call, by the id its answer carries."""
    known = known_shape(request_id, "request")
    # Answers carry it inside the name the engine gave them.
    inner = _ID.search(known)
    return _call_object(parts.store.interactive(key.tenant, inner[0] if inner else known))


def _story_object(story: RequestStory) -> RequestStoryObject:
    row = story.outcome
    return RequestStoryObject(
        batch_id=story.batch_id,
        custom_id=story.custom_id,
        line=story.line,
        model=story.model,
        deadline=story.deadline,
        generation=story.generation,
        state=story.state.value,
        instance=story.instance,
        attempts=story.attempts,
        decisions=[render.decision_object(made) for made in story.decisions],
        losses=[
            LossObject(at=loss.at, instance=loss.instance, reason=loss.reason)
            for loss in story.losses
        ],
        outcome=None
        if row is None
        else OutcomeObject(
            status_code=row.status_code,
            error_code=row.error_code,
            error_message=row.error_message,
            input_tokens=row.usage.input_tokens,
            output_tokens=row.usage.output_tokens,
            started_at=row.started_at,
            first_token_s=row.first_token_s,
            duration_s=row.duration_s,
        ),
    )


def _call_object(call: InteractiveRequest) -> CallObject:
    return CallObject(
        id=call.id,
        model=call.model,
        state=call.state.value,
        instance=call.instance,
        routed=call.epoch,
        created_at=call.created_at,
        ended_at=call.ended_at,
        ttft_target_s=call.ttft_s,
        first_token_s=call.first_token_s,
        duration_s=call.duration_s,
        status_code=call.status_code,
        input_tokens=call.usage.input_tokens,
        output_tokens=call.usage.output_tokens,
    )
