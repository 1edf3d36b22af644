"""Reads the body of an interactive request: bytes in, or an error that names the field."""

from __future__ import annotations

from codecs import BOM_UTF8
from dataclasses import dataclass
from typing import Any

import orjson

from qlm_batch.domain.bodies import MAX_MODEL_CHARS
from qlm_batch.domain.errors import InvalidInput
from qlm_batch.domain.jobs import EMBEDDINGS


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as the engine gets it, without `stream`; `usage` says whether a stream shows it."""

    model: str
    body: str
    streamed: bool
    usage: bool


def read_asked(raw: bytes, endpoint: str) -> Asked:
    """What a body asks of `endpoint`; a byte-order mark before it is dropped, as in files.

    Raises InvalidInput.
    """
    try:
        body: Any = orjson.loads(raw.removeprefix(BOM_UTF8))
    except orjson.JSONDecodeError as error:
        raise InvalidInput(
            f"The request body is not valid JSON: {error}", code="invalid_json"
        ) from None
    if not isinstance(body, dict):
        raise InvalidInput("The request body must be a JSON object.", code="invalid_body")
    model = _model(body.get("model"))
    streamed = body.pop("stream", None)
    if streamed is not None and not isinstance(streamed, bool):
        raise InvalidInput("'stream' must be true or false.", code="invalid_value", param="stream")
    if streamed and endpoint == EMBEDDINGS:
        raise InvalidInput(
            "Embeddings come whole; remove 'stream' from the request.",
            code="unsupported_value",
            param="stream",
        )
    usage = False
    if streamed:
        options = body.get("stream_options") or {}
        if not isinstance(options, dict):
            raise InvalidInput(
                "'stream_options' must be an object.", code="invalid_value", param="stream_options"
            )
        usage = options.get("include_usage") is True
        # Always counted; shown to those who asked.
        body["stream_options"] = options | {"include_usage": True}
    return Asked(model, _text_of(body), bool(streamed), usage)


def _model(model: object) -> str:
    if model is None:
        raise InvalidInput(
            "Missing required parameter: 'model', the name of a served model.",
            code="missing_required_parameter",
            param="model",
        )
    if not isinstance(model, str):
        raise _bad_model("must be a text", code="invalid_type")
    if not model:
        raise _bad_model("must not be empty")
    if len(model) > MAX_MODEL_CHARS:
        raise _bad_model(f"must have at most {MAX_MODEL_CHARS} characters")
    if "\0" in model:
        raise _bad_model("must have no NUL")
    return model


def _bad_model(wrong: str, code: str = "invalid_value") -> InvalidInput:
    return InvalidInput(
        f"'model' {wrong}; give the name of a served model.", code=code, param="model"
    )


def _text_of(body: dict[str, Any]) -> str:
    try:
        return orjson.dumps(body).decode()
    except orjson.JSONEncodeError:
        # It reads more levels than it writes; nothing else that was read cannot be written.
        raise InvalidInput(
            "The request body is nested more than 250 levels deep.", code="invalid_json"
        ) from None
