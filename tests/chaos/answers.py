"""Questions whose right answer is known without asking."""

from __future__ import annotations

import zlib
from typing import Any

import orjson

from qlm_workers.simulated_answers import answer_text, output_length

MODEL = "sim"
POISON = "this one kills the engine"
FLAKY = "this one makes the engine talk nonsense once"
LIVE = "somebody waits for this"
"""Marks a question that is asked interactively."""


def body_of(question: str, max_tokens: int = 12) -> dict[str, Any]:
    """A chat request for the simulated engine."""
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": question}],
        "max_tokens": max_tokens,
    }


def expected(body: dict[str, Any]) -> str:
    """What the simulated engine answers to it."""
    key = zlib.crc32(orjson.dumps(body), 0)
    return answer_text(key, output_length(key, int(body["max_tokens"]), False))


def said(response: Any) -> str | None:
    """The text of a chat completion; None for anything else."""
    try:
        return str(response["choices"][0]["message"]["content"])
    except (LookupError, TypeError):
        return None
