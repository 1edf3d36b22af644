"""The outline of each endpoint's body, for batches that ask to be checked before they run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qlm_batch.domain.jobs import CHAT, COMPLETIONS

_ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "function"})
_COUNTS: Mapping[str, int] = {
    "n": 1,
    "max_tokens": 0,
    "max_completion_tokens": 0,
    "top_logprobs": 0,
    "dimensions": 1,
}
"""Whole numbers and the least each may be."""
_RANGES: Mapping[str, tuple[float, float]] = {
    "temperature": (0.0, 2.0),
    "top_p": (0.0, 1.0),
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
}


def check_body(endpoint: str, body: dict[str, Any], max_n: int) -> tuple[str, str] | None:
    """The first fault of a body as (parameter, what is wrong with it); None when it has none.

    Only outlines are checked: the engine's own model of the request stays the judge of the rest.
    """
    if endpoint == CHAT:
        fault = _messages_fault(body.get("messages"))
        if fault:
            return fault
    else:
        param = "prompt" if endpoint == COMPLETIONS else "input"
        if not _is_prompt(body.get(param)):
            return param, "must be a text, a list of texts or a list of token ids, and not empty"
    if body.get("stream"):
        return "stream", "cannot be used in a batch; leave it out"
    return _number_fault(body, max_n)


def _messages_fault(messages: object) -> tuple[str, str] | None:
    if not isinstance(messages, list) or not messages:
        return "messages", "must be a list of at least one message"
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            return where, "must be an object with a role and a content"
        role = message.get("role")
        if not isinstance(role, str) or role not in _ROLES:
            return f"{where}.role", f"must be one of {', '.join(sorted(_ROLES))}"
        content = message.get("content")
        if not isinstance(content, str | list) and not (role == "assistant" and content is None):
            return f"{where}.content", "must be a text or a list of parts"
    return None


def _is_prompt(value: object) -> bool:
    if isinstance(value, str):
        return bool(value)
    if not isinstance(value, list) or not value:
        return False
    if type(value[0]) is list:
        return all(type(item) is list and item and _are_tokens(item) for item in value)
    return all(isinstance(item, str) for item in value) or _are_tokens(value)


def _are_tokens(items: list[Any]) -> bool:
    return all(type(item) is int and item >= 0 for item in items)


def _number_fault(body: dict[str, Any], max_n: int) -> tuple[str, str] | None:
    for param, least in _COUNTS.items():
        value = body.get(param)
        if value is not None and (type(value) is not int or value < least):
            return param, f"must be a whole number of at least {least}"
    if (body.get("n") or 1) > max_n:
        return "n", f"must be at most {max_n}"
    for param, (low, high) in _RANGES.items():
        value = body.get(param)
        if value is None:
            continue
        if type(value) not in (int, float) or not low <= value <= high:
            return param, f"must be a number between {low:g} and {high:g}"
    return None
