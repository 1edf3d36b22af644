"""What vLLM's OpenAI layer returns, as answers of the engine port. Imports nothing of vLLM."""

from __future__ import annotations

from typing import Any

import orjson
from pydantic import ValidationError

from qlm_batch.domain.engine import EngineAnswer
from qlm_batch.domain.jobs import Usage
from qlm_workers.answers import CUT, error_answer, usage_of


def shape(response: Any, first_token_s: float | None, duration_s: float) -> EngineAnswer:
    """The answer in a response model, an error model or a starlette response."""
    if (failure := getattr(response, "error", None)) is not None:
        failure.message = _with_remedy(failure.message)
        return EngineAnswer(int(failure.code), response.model_dump_json(), duration_s=duration_s)
    if hasattr(response, "model_dump_json"):
        return EngineAnswer(
            200,
            response.model_dump_json(),
            _usage(getattr(response, "usage", None)),
            first_token_s,
            duration_s,
            any(choice.finish_reason == CUT for choice in getattr(response, "choices", ())),
        )
    raw = getattr(response, "body", None)
    if raw is None:
        return error_answer(
            400,
            "This encoding cannot stand in a file; choose 'float' or 'base64'.",
            param="encoding_format",
            code="unsupported_value",
        )
    usage = usage_of(orjson.loads(raw).get("usage"))
    return EngineAnswer(response.status_code, bytes(raw).decode(), usage, duration_s, duration_s)


def _with_remedy(message: str) -> str:
    """vLLM names flags of its own server, which nobody here can give."""
    if "--tool-call-parser" not in message:
        return message
    return (
        f"{message}: start the service with --tool-parser NAME, or a worker with QLM_TOOL_PARSER."
    )


def _usage(usage: Any) -> Usage:
    if usage is None:
        return Usage()
    prompt = usage.prompt_tokens_details
    completion = getattr(usage, "completion_tokens_details", None)
    return Usage(
        input_tokens=usage.prompt_tokens or 0,
        cached_tokens=(prompt.cached_tokens or 0) if prompt else 0,
        output_tokens=usage.completion_tokens or 0,
        reasoning_tokens=(completion.reasoning_tokens or 0) if completion else 0,
    )


def schema_answer(error: ValidationError) -> EngineAnswer:
    """A 400 naming the first field that breaks the endpoint's schema."""
    first = error.errors(include_url=False, include_input=False)[0]
    raised = first.get("ctx", {}).get("error")
    # Branches of unions and wrappers stand among the names as `list[...]` or `Model`.
    names = [str(part) for part in first["loc"] if str(part).replace("_", "").isalnum()]
    param = getattr(raised, "parameter", None) or ".".join(
        name for name in names if not name[:1].isupper()
    )
    message = f"{param}: {first['msg']}" if param else first["msg"]
    return error_answer(400, message, param=param or None, code="invalid_value")
