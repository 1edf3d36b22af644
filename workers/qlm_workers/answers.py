"""What the three engines share: reading a request body and shaping an answer."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from qlm_batch.domain.bodies import MAX_N, refuse_body
from qlm_batch.domain.engine import EngineAnswer, EngineRequest
from qlm_batch.domain.errors import QlmError
from qlm_batch.domain.jobs import EMBEDDINGS, EngineKind, Usage

MOST_TOKENS = 2**31 - 1
"""A larger count of one answer is a fault of its server, and no sum of them could be stored."""
CUT = "length"
"""The `finish_reason` of a choice that a bound on its tokens ended."""


@dataclass(frozen=True, slots=True)
class Door:
    """What one engine lets in: bodies for `model`, its `adapters` and `kind`, within bounds."""

    model: str
    kind: EngineKind
    max_n: int = MAX_N
    media_domains: Collection[str] = ()
    adapters: Collection[str] = ()

    def read(
        self, request: EngineRequest, *, streamed: bool = False
    ) -> dict[str, Any] | EngineAnswer:
        """The parsed body, or the 4xx answer that refuses it.

        Where the answer is `streamed` the body says so, whether or not the client's did.
        """
        try:
            body = orjson.loads(request.body)
        except orjson.JSONDecodeError as error:
            return error_answer(400, f"The body is not valid JSON: {error}", code="invalid_json")
        if not isinstance(body, dict):
            return error_answer(400, "The body must be a JSON object.", code="invalid_json")
        if streamed and request.endpoint != EMBEDDINGS:
            body.pop("stream", None)
        refusal = refuse_body(
            body,
            endpoint=request.endpoint,
            model=self.model,
            kind=self.kind,
            adapters=self.adapters,
            max_n=self.max_n,
            media_domains=self.media_domains,
        )
        if refusal is not None:
            return refusal_answer(refusal)
        if streamed:
            if request.endpoint == EMBEDDINGS:
                return error_answer(
                    400,
                    "Embeddings come whole; remove 'stream' from the request.",
                    param="stream",
                    code="unsupported_value",
                )
            body["stream"] = True
        return body


def refusal_answer(error: QlmError) -> EngineAnswer:
    """An error of ours as an OpenAI answer."""
    return EngineAnswer(error.status, orjson.dumps({"error": dict(error.body())}).decode())


def error_answer(
    status: int,
    message: str,
    *,
    type_: str = "invalid_request_error",
    param: str | None = None,
    code: str | int | None = None,
) -> EngineAnswer:
    """An answer with OpenAI's error body."""
    error = {"message": message, "type": type_, "param": param, "code": code}
    return EngineAnswer(status, orjson.dumps({"error": error}).decode())


def usage_of(usage: object) -> Usage:
    """The token counts in the `usage` object of an OpenAI response.

    0 for those that are absent or no numbers: an answer is worth keeping whatever is told of it.
    """
    told = _object(usage)
    return Usage(
        input_tokens=_count(told.get("prompt_tokens")),
        cached_tokens=_count(_object(told.get("prompt_tokens_details")).get("cached_tokens")),
        output_tokens=_count(told.get("completion_tokens")),
        reasoning_tokens=_count(
            _object(told.get("completion_tokens_details")).get("reasoning_tokens")
        ),
    )


def cut_in(response: Mapping[str, object]) -> bool:
    """Whether a bound ended one of the choices of an OpenAI response."""
    choices = response.get("choices")
    return isinstance(choices, list) and any(
        _object(choice).get("finish_reason") == CUT for choice in choices
    )


def _object(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}


def _count(value: object) -> int:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return 0
    if isinstance(value, float) and math.isnan(value):
        return 0
    return int(min(max(value, 0), MOST_TOKENS))
