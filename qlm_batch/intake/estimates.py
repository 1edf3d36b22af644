"""How much work a request is, guessed from its body alone."""

from __future__ import annotations

from typing import Any

from qlm_batch.domain.jobs import CHAT, COMPLETIONS

_CHARS_PER_TOKEN = 4
"""Common for English text under byte-pair tokenizers; the engine's usage corrects it later."""
_TOKENS_PER_MESSAGE = 4
_TOKENS_PER_MEDIA = 256
_COMPLETIONS_DEFAULT_MAX = 16
"""What the completions endpoint generates when `max_tokens` is not given."""
_INT32_MAX = 2**31 - 1


def prompt_tokens(endpoint: str, body: dict[str, Any]) -> int:
    """A guess at the prompt's tokens, at least 1; never fails, whatever the body holds."""
    if endpoint == CHAT:
        messages = body.get("messages")
        if not isinstance(messages, list):
            return 1
        tokens = 0
        characters = 0
        for message in messages:
            tokens += _TOKENS_PER_MESSAGE
            content = message.get("content") if isinstance(message, dict) else None
            if isinstance(content, str):
                characters += len(content)
            elif isinstance(content, list):
                for part in content:
                    text = part.get("text") if isinstance(part, dict) else None
                    if isinstance(text, str):
                        characters += len(text)
                    else:
                        tokens += _TOKENS_PER_MEDIA
        return tokens + characters // _CHARS_PER_TOKEN + 1
    return _text_tokens(body.get("prompt" if endpoint == COMPLETIONS else "input"))


def max_tokens(endpoint: str, body: dict[str, Any]) -> int | None:
    """The most tokens the request may generate over all its choices; None when it sets no bound.

    Embeddings generate none.
    """
    if endpoint == CHAT:
        bound = body.get("max_completion_tokens")
        if bound is None:
            bound = body.get("max_tokens")
        if bound is None:
            return None
    elif endpoint == COMPLETIONS:
        bound = body.get("max_tokens", _COMPLETIONS_DEFAULT_MAX)
    else:
        return 0
    if type(bound) is not int or bound < 0:
        return None
    choices = body.get("n")
    if type(choices) is int and choices > 1:
        bound *= choices
    return min(bound, _INT32_MAX)


def _text_tokens(value: object) -> int:
    """Tokens of a prompt in any of its forms: text, texts, token ids, lists of token ids."""
    if isinstance(value, str):
        return len(value) // _CHARS_PER_TOKEN + 1
    if not isinstance(value, list):
        return 1
    tokens = 0
    for item in value:
        if isinstance(item, str):
            tokens += len(item) // _CHARS_PER_TOKEN + 1
        else:
            tokens += len(item) if isinstance(item, list) else 1
    return max(tokens, 1)
