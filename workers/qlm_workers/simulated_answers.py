"""What a simulated engine answers: lengths, words and vectors that are a function of a number."""

from __future__ import annotations

import base64
import math
import struct
import time
from collections.abc import Iterator, Mapping
from random import Random
from typing import Any

import orjson

from qlm_batch.domain.engine import EngineRequest
from qlm_batch.domain.jobs import CHAT, COMPLETIONS, EMBEDDINGS, Usage

CHARS_PER_TOKEN = 4
LIKELY_OUTPUT = 128
"""Median output length where a request sets no limit, as in ShareGPT."""
EMBEDDING_SIZE = 16
BASE64 = "base64"

_LENGTH = 1 << 16
_WORDS = (
    *("batch", "window", "queue", "slice", "lease", "deadline", "token", "engine", "model"),
    *("prompt", "answer", "group", "order", "plan", "worker", "device", "memory", "prefix"),
    *("block", "step", "request", "result", "file", "line", "tenant", "budget", "wait"),
)


class BadBody(Exception):
    """A body no engine would take; `param` is the field."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


def sizes(endpoint: str, body: Mapping[str, Any], max_model_len: int) -> tuple[int, int]:
    """Tokens of all prompts, and the most output tokens of one choice. Raises BadBody."""
    name = {CHAT: "messages", EMBEDDINGS: "input"}.get(endpoint, "prompt")
    prompt = body.get(name)
    if not prompt or not isinstance(prompt, list if endpoint == CHAT else list | str):
        raise BadBody(name, f"'{name}' is missing, empty or of the wrong type.")
    each = [prompt] if endpoint == CHAT else prompts(prompt)
    lengths = [max(1, _chars(one) // CHARS_PER_TOKEN) for one in each]
    longest = max(lengths)
    room = max_model_len - longest
    if room < (0 if endpoint == EMBEDDINGS else 1):
        raise BadBody(
            name,
            f"The prompt has {longest} tokens; this model's context length is {max_model_len}.",
        )
    tokens = sum(lengths)
    if endpoint == EMBEDDINGS:
        if body.get("encoding_format") not in (None, "float", BASE64):
            raise BadBody("encoding_format", "'encoding_format' must be 'float' or 'base64'.")
        return tokens, 0
    if body.get("stream_options") and not body.get("stream"):
        raise BadBody("stream_options", "'stream_options' needs 'stream' to be true.")
    asked = body.get("max_completion_tokens") or body.get("max_tokens")
    if asked is not None and (not isinstance(asked, int) or asked < 1):
        raise BadBody("max_tokens", "'max_tokens' must be a positive integer.")
    return tokens, min(asked or room, room)


def prompts(given: str | list[Any]) -> list[Any]:
    """Each prompt of a completion, or each input of an embedding: a text or a list of token ids."""
    one = isinstance(given, str) or isinstance(given[0], int)
    return [given] if one else list(given)


def choices(endpoint: str, body: Mapping[str, Any]) -> int:
    """How many answers a body asks for: `n` of each of its prompts."""
    n = int(body.get("n") or 1)
    return n * len(prompts(body["prompt"])) if endpoint == COMPLETIONS else n


def output_length(key: int, limit: int, ignore_eos: bool) -> int:
    """Output tokens that `key` draws, at most `limit`."""
    if ignore_eos or limit == 0:
        return limit
    uniform = (key % 9973 + 0.5) / 9973
    # Log-normal, by the logistic approximation of the normal quantile.
    spread = math.log(uniform / (1 - uniform)) / 1.702
    return max(1, min(limit, round(LIKELY_OUTPUT * math.exp(spread))))


def response_body(
    request: EngineRequest, body: Mapping[str, Any], key: int, usage: Usage, stopped: bool
) -> str:
    """The JSON text of an OpenAI response; `stopped` by itself rather than by its limit."""
    shown = {"prompt_tokens": usage.input_tokens, "total_tokens": usage.total_tokens}
    common: dict[str, object] = {"model": body["model"], "created": int(time.time())}
    if request.endpoint == EMBEDDINGS:
        vectors = [embedding(key + index) for index in range(len(prompts(body["input"])))]
        packed = body.get("encoding_format") == BASE64
        common |= {
            "object": "list",
            "data": [
                {
                    "object": "embedding",
                    "index": index,
                    "embedding": _packed(vector) if packed else vector,
                }
                for index, vector in enumerate(vectors)
            ],
        }
        return orjson.dumps(common | {"usage": shown}).decode()
    n = choices(request.endpoint, body)
    each = usage.output_tokens // n
    ending = {"logprobs": None, "finish_reason": "stop" if stopped else "length"}
    texts = [answer_text(key + index, each) for index in range(n)]
    if request.endpoint == CHAT:
        common |= {"id": f"chatcmpl-{request.request_id}", "object": "chat.completion"}
        common["choices"] = [
            {"index": index, "message": {"role": "assistant", "content": text}, **ending}
            for index, text in enumerate(texts)
        ]
    else:
        common |= {"id": f"cmpl-{request.request_id}", "object": "text_completion"}
        common["choices"] = [
            {"index": index, "text": text, **ending} for index, text in enumerate(texts)
        ]
    return orjson.dumps(
        common | {"usage": shown | {"completion_tokens": usage.output_tokens}}
    ).decode()


def chunk_bodies(
    request: EngineRequest, body: Mapping[str, Any], key: int, tokens: int, stopped: bool
) -> Iterator[tuple[str, ...]]:
    """The JSON texts of the stream's events, those of each token together.

    Read together they say what `response_body` says; `tokens` is each choice's length.
    """
    n = choices(request.endpoint, body)
    texts = [answer_text(key + index, tokens).split(" ") for index in range(n)]
    for position in range(max(1, tokens)):
        words = [
            ("" if position == 0 else " ") + (said[position] if position < len(said) else "")
            for said in texts
        ]
        last = position + 1 >= tokens
        ending = ("stop" if stopped else "length") if last else None
        yield tuple(
            _chunk(request, body, index, word, position == 0, ending)
            for index, word in enumerate(words)
        )


def _chunk(
    request: EngineRequest,
    body: Mapping[str, Any],
    index: int,
    word: str,
    first: bool,
    ending: str | None,
) -> str:
    choice: dict[str, object] = {"index": index, "logprobs": None, "finish_reason": ending}
    if request.endpoint == CHAT:
        role = {"role": "assistant"} if first else {}
        choice["delta"] = {**role, "content": word}
    else:
        choice["text"] = word
    return orjson.dumps(_stream_fields(request, body) | {"choices": [choice]}).decode()


def usage_chunk(request: EngineRequest, body: Mapping[str, Any], usage: Usage) -> str:
    """The stream's last event where the request asks for the usage."""
    shown = {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.total_tokens,
    }
    fields = _stream_fields(request, body) | {"choices": [], "usage": shown}
    return orjson.dumps(fields).decode()


def _stream_fields(request: EngineRequest, body: Mapping[str, Any]) -> dict[str, object]:
    prefix, kind = (
        ("chatcmpl", "chat.completion.chunk")
        if request.endpoint == CHAT
        else ("cmpl", "text_completion")
    )
    return {
        "id": f"{prefix}-{request.request_id}",
        "object": kind,
        "created": int(time.time()),
        "model": body["model"],
    }


def _text() -> tuple[str, list[int]]:
    draw = Random(0)  # noqa: S311
    words = [draw.choice(_WORDS) for _ in range(_LENGTH)]
    starts, at = [], 0
    for word in words:
        starts.append(at)
        at += len(word) + 1
    return " ".join(words) + " ", starts


_TEXT, _STARTS = _text()


def answer_text(key: int, tokens: int) -> str:
    """`tokens` words, cut from one long text at a place that `key` names."""
    tokens = min(tokens, _LENGTH - 1)
    first = key % (_LENGTH - tokens)
    return _TEXT[_STARTS[first] : _STARTS[first + tokens] - 1] if tokens else ""


def embedding(key: int) -> list[float]:
    """A vector of length 1 that `key` names."""
    draw = Random(key)  # noqa: S311
    values = [draw.gauss(0, 1) for _ in range(EMBEDDING_SIZE)]
    norm = sum(value * value for value in values) ** 0.5
    return [round(value / norm, 6) for value in values]


def _packed(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def _chars(value: object) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, list):
        return sum(map(_chars, value))
    if isinstance(value, dict):
        return _chars(value.get("content") or value.get("text") or "")
    return CHARS_PER_TOKEN
