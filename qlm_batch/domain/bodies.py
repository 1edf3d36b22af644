"""What a request body may not hold: fields the service sets itself, and unbounded work.

The serving layer behind the engines honours these fields, so a line could outrank interactive
traffic, read another tenant's prefix cache or make the server fetch any address.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from urllib.parse import urlsplit

from qlm_batch.domain.errors import InvalidInput, NotFound, QlmError
from qlm_batch.domain.jobs import CHAT, COMPLETIONS, EMBEDDINGS, EngineKind

OWNED_FIELDS = (
    "priority",
    "request_id",
    "cache_salt",
    "kv_transfer_params",
    "ec_transfer_params",
    "vllm_xargs",
    "chat_template",
)
KIND_OF: Mapping[str, EngineKind] = {
    CHAT: EngineKind.GENERATE,
    COMPLETIONS: EngineKind.GENERATE,
    EMBEDDINGS: EngineKind.EMBED,
}
MAX_N = 16
MAX_MODEL_CHARS = 512
MAX_LOGPROBS = 20
MAX_GRAMMAR_CHARS = 64 * 1024
MAX_PROMPTS = 2048
"""Most prompts of a completion, or inputs of an embedding, in one body; as in OpenAI's API."""

_COUNTS = ("n", "best_of")
_LOGPROBS = ("logprobs", "top_logprobs", "prompt_logprobs")
_GRAMMARS = ("response_format", "structured_outputs", "tools")
_PROMPTS = ("prompt", "input")
_WATCHED = frozenset(
    {*OWNED_FIELDS, "chat_template_kwargs", "stream", *_COUNTS, *_LOGPROBS, *_GRAMMARS, *_PROMPTS}
)


def refuse_body(
    body: Mapping[str, object],
    *,
    endpoint: str,
    model: str,
    kind: EngineKind,
    adapters: Collection[str] = (),
    max_n: int = MAX_N,
    media_domains: Collection[str] = (),
) -> QlmError | None:
    """Why an engine that serves `model` and `adapters` for `kind` takes no such body, or None."""
    if KIND_OF.get(endpoint) is not kind:
        return wrong_kind(model, kind, "url")
    named = body.get("model")
    if named != model and named not in adapters:
        return NotFound(
            f"The model '{named}' is not served here; '{model}' is.",
            code="model_not_found",
            param="model",
        )
    return refuse_owned_fields(body, max_n=max_n, media_domains=media_domains)


def wrong_kind(model: str, kind: EngineKind, param: str) -> InvalidInput:
    """The error for a call to an endpoint that a model of `kind` does not answer."""
    embeds = kind is EngineKind.EMBED
    can = "makes embeddings" if embeds else "generates text"
    ask = EMBEDDINGS if embeds else f"{CHAT} or {COMPLETIONS}"
    return InvalidInput(
        f"The model '{model}' {can}; ask {ask}.", code="unsupported_endpoint", param=param
    )


def refuse_owned_fields(
    body: Mapping[str, object], *, max_n: int = MAX_N, media_domains: Collection[str] = ()
) -> InvalidInput | None:
    """The first field that only the service may set or that is out of bounds, as an error.

    Media are accepted inline (`data:` URLs) and from the hosts in `media_domains`. Values of a
    wrong type are left to the engine's own schema, but for counts.
    """
    if _WATCHED.isdisjoint(body):
        return _foreign_media(body, media_domains)
    for field in OWNED_FIELDS:
        if body.get(field) is not None:
            return _owned(field)
    template_args = body.get("chat_template_kwargs")
    if isinstance(template_args, Mapping) and "chat_template" in template_args:
        return _owned("chat_template_kwargs.chat_template")
    if body.get("stream"):
        return InvalidInput(
            "'stream' must be absent or false: the answer is delivered whole.",
            code="unsupported_value",
            param="stream",
        )
    return _out_of_bounds(body, max_n) or _foreign_media(body, media_domains)


def _owned(field: str) -> InvalidInput:
    return InvalidInput(
        f"'{field}' is set by the service; remove it from the request.",
        code="unsupported_parameter",
        param=field,
    )


def _out_of_bounds(body: Mapping[str, object], max_n: int) -> InvalidInput | None:
    limits = dict.fromkeys(_COUNTS, max_n) | dict.fromkeys(_LOGPROBS, MAX_LOGPROBS)
    for field, limit in limits.items():
        value = body.get(field)
        least = 1 if field in _COUNTS else 0
        # Engines read a number out of "1000" and 1000.0 too.
        if isinstance(value, str):
            return InvalidInput(f"'{field}' must be a number.", code="invalid_type", param=field)
        if isinstance(value, int | float) and not least <= value <= limit:
            return InvalidInput(
                f"'{field}' is {value}; it must lie between {least} and {limit}.",
                code="invalid_value",
                param=field,
            )
    for field in _GRAMMARS:
        value = body.get(field)
        if isinstance(value, Mapping | list) and _chars(value) > MAX_GRAMMAR_CHARS:
            return InvalidInput(
                f"'{field}' is larger than {MAX_GRAMMAR_CHARS} characters.",
                code="invalid_value",
                param=field,
            )
    for field in _PROMPTS:
        value = body.get(field)
        if not isinstance(value, list) or len(value) <= MAX_PROMPTS:
            continue
        # One prompt may be a list too, of token ids.
        if not isinstance(value[0], int):
            return InvalidInput(
                f"'{field}' has {len(value)} entries; at most {MAX_PROMPTS} go in one request.",
                code="invalid_value",
                param=field,
            )
    return None


def _chars(value: object) -> int:
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(len(str(key)) + _chars(item) for key, item in value.items())
    if isinstance(value, list):
        return sum(map(_chars, value))
    return 1


def _foreign_media(
    body: Mapping[str, object], media_domains: Collection[str]
) -> InvalidInput | None:
    for root in ("messages", "input"):
        messages = body.get(root)
        if not isinstance(messages, list):
            continue
        for index, message in enumerate(messages):
            content = message.get("content") if isinstance(message, Mapping) else None
            if isinstance(content, str) or not isinstance(content, list | Mapping):
                continue
            for url in _urls(content):
                if not _allowed(url, media_domains):
                    return InvalidInput(
                        f"'{root}[{index}]' refers to media at '{url[:80]}', which this service "
                        "does not fetch; send the media inline as a data: URL.",
                        code="invalid_value",
                        param=f"{root}[{index}].content",
                    )
    return None


def _urls(value: object, *, named: bool = False) -> Iterator[str]:
    if isinstance(value, str):
        if named:
            yield value
    elif isinstance(value, list):
        for item in value:
            yield from _urls(item, named=named)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _urls(item, named=key == "url" or str(key).endswith("_url"))


def _allowed(url: str, media_domains: Collection[str]) -> bool:
    if url.startswith("data:"):
        return True
    # Parsers disagree on backslashes and on who is the host before an '@'.
    if "\\" in url or "@" in url:
        return False
    try:
        parts = urlsplit(url)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and parts.hostname in media_domains
