"""The batch of the co-serving benchmark: lines of every kind of sampling, and how outputs differ.

A file repeats a few dozen different bodies; a run of each body without interactive traffic is what
all other runs of it are compared with.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import aiohttp
import orjson

from benchmarks.support import CHAT, require

TOKENS = 300
LOGPROB_TOLERANCE = 1e-4
WORDS = ("one", "two", "river", "stone", "green", "seven", "paper", "light", "north", "water")
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 60, "maxLength": 90},
        "tags": {
            "type": "array",
            "items": {"type": "string", "minLength": 9, "maxLength": 12},
            "minItems": 6,
            "maxItems": 8,
        },
    },
    "required": ["name", "tags"],
    "additionalProperties": False,
}
KINDS: Sequence[Mapping[str, object]] = (
    {"temperature": 1, "seed": 11, "ignore_eos": True},
    {
        "temperature": 0.9,
        "seed": 5,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "s", "schema": SCHEMA},
        },
    },
    {
        "temperature": 0.8,
        "seed": 3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.4,
        "repetition_penalty": 1.1,
        "ignore_eos": True,
    },
    {"temperature": 0, "logprobs": True, "top_logprobs": 2, "ignore_eos": True},
)
"""Every eighth body is of one of these; the others are greedy and plain."""


def body(model: str, number: int) -> dict[str, object]:
    """The body of a number; equal numbers give equal bodies."""
    words = " ".join(WORDS[(number * 7 + n * n) % len(WORDS)] for n in range(16))
    plain: Mapping[str, object] = {"temperature": 0, "ignore_eos": True}
    kind = KINDS[number // 8 % len(KINDS)] if number % 8 == 7 else plain
    return {
        "model": model,
        "messages": [{"role": "user", "content": f"{number} {words}"}],
        "max_tokens": TOKENS,
        **kind,
    }


def file_of(model: str, lines: int, bodies: int) -> bytes:
    """A batch file; a line's custom_id is its number and its body's, as in `17:5`."""
    return b"\n".join(
        orjson.dumps(
            {
                "custom_id": f"{line}:{line % bodies}",
                "method": "POST",
                "url": CHAT,
                "body": body(model, line % bodies),
            }
        )
        for line in range(lines)
    )


def answers(output: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    """The custom_id and the choice of each line of an output file."""
    for line in output.splitlines():
        row = orjson.loads(line)
        require(row["response"]["status_code"] == 200, str(row)[:400])
        yield row["custom_id"], row["response"]["body"]["choices"][0]


@dataclass(frozen=True)
class Likeness:
    """How many of the outputs were compared, and how many differed."""

    compared: int
    different: int

    @property
    def share(self) -> float:
        """The differing share."""
        return self.different / self.compared if self.compared else 0.0


def compare(output: bytes, reference: Mapping[str, Mapping[str, Any]]) -> Likeness:
    """Compare each line with the reference of its body: text, reason of the end, logprobs."""
    compared = different = 0
    for custom_id, choice in answers(output):
        compared += 1
        different += not _same(choice, reference[custom_id.split(":")[1]])
    return Likeness(compared, different)


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    if one["message"]["content"] != other["message"]["content"]:
        return False
    if one["finish_reason"] != other["finish_reason"]:
        return False
    mine, theirs = ((choice.get("logprobs") or {}).get("content") or [] for choice in (one, other))
    return len(mine) == len(theirs) and all(
        a["token"] == b["token"] and abs(a["logprob"] - b["logprob"]) <= LOGPROB_TOLERANCE
        for a, b in zip(mine, theirs, strict=True)
    )


class Service:
    """The service's batch API."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session, self._url = session, url

    async def submit(self, file: bytes) -> str:
        """Upload a file and start it; the batch's id."""
        form = aiohttp.FormData()
        form.add_field("purpose", "batch")
        form.add_field("file", file, filename="batch.jsonl")
        async with self._session.post(f"{self._url}/files", data=form) as answer:
            require(answer.status == 200, await answer.text())
            file_id = (await answer.json())["id"]
        spec = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
        async with self._session.post(f"{self._url}/batches", json=spec) as answer:
            require(answer.status == 200, await answer.text())
            return str((await answer.json())["id"])

    async def batch(self, batch_id: str) -> dict[str, Any]:
        """The batch as it is now."""
        async with self._session.get(f"{self._url}/batches/{batch_id}") as answer:
            require(answer.status == 200, await answer.text())
            found: dict[str, Any] = await answer.json()
            return found

    async def cancel(self, batch_id: str) -> None:
        """Stop it; what is done stays."""
        async with self._session.post(f"{self._url}/batches/{batch_id}/cancel") as answer:
            require(answer.status == 200, await answer.text())

    async def output(self, batch_id: str, limit_s: float = 300) -> bytes:
        """The output file, once the batch has ended."""
        give_up_at = time.monotonic() + limit_s
        while True:
            batch = await self.batch(batch_id)
            if batch["status"] in ("completed", "cancelled", "failed", "expired"):
                break
            require(time.monotonic() < give_up_at, f"batch still {batch['status']}")
            await asyncio.sleep(0.5)
        require(batch["output_file_id"] is not None, str(batch)[:400])
        url = f"{self._url}/files/{batch['output_file_id']}/content"
        async with self._session.get(url) as answer:
            require(answer.status == 200, str(answer.status))
            return await answer.read()


async def keep_full(
    session: aiohttp.ClientSession,
    url: str,
    model: str,
    bodies: int,
    in_flight: int,
    extra: Mapping[str, object],
) -> None:
    """Keep a server's queue full of the batch's bodies, for ever; run it as a task.

    With a priority in `extra`, each request's is that of one due a little later.
    """
    numbers = iter(range(10**9))

    async def one_after_another() -> None:
        for number in numbers:
            own = dict(extra)
            if isinstance(due := own.get("priority"), int):
                own["priority"] = due + number
            sent = orjson.dumps(body(model, number % bodies) | own)
            headers = {"content-type": "application/json"}
            async with session.post(url, data=sent, headers=headers) as answer:
                require(answer.status == 200, (await answer.text())[:400])
                await answer.read()

    await asyncio.gather(*(one_after_another() for _ in range(in_flight)))
