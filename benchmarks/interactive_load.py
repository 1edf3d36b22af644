"""Interactive load over HTTP: arrivals by chance and in bursts, and what each client saw.

aiohttp comes with vLLM; it costs the machine under test less than httpx would.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import aiohttp
import numpy as np
import orjson

BURST = 16
"""Requests of a burst, sent at once, unless more are asked for."""
TOKENS = 16
"""Output tokens of an interactive request."""
LIMIT_S = 180.0
WORDS = ("what", "is", "the", "next", "number", "after", "these", "and", "which", "word")


@dataclass(frozen=True)
class Arrival:
    """When a request is sent, in seconds after the start, and whether in a burst."""

    at: float
    burst: bool


@dataclass(frozen=True)
class Seen:
    """What a client saw of one request; times in seconds, None where nothing came."""

    burst: bool
    ttft_s: float | None
    tpot_s: float | None
    fault: str = ""


def arrivals(
    seconds: float, rate: float, burst_every_s: float, seed: int, burst: int = BURST
) -> list[Arrival]:
    """Poisson arrivals at `rate` a second, and a burst in the middle of every `burst_every_s`."""
    chance = random.Random(seed)
    found, at = [], chance.expovariate(rate)
    while at < seconds:
        found.append(Arrival(at, burst=False))
        at += chance.expovariate(rate)
    bursts = int(seconds / burst_every_s + 1e-9)
    found += [
        Arrival((number + 0.5) * burst_every_s, burst=True)
        for number in range(bursts)
        for _ in range(burst)
    ]
    return sorted(found, key=lambda arrival: arrival.at)


async def play(
    session: aiohttp.ClientSession,
    url: str,
    model: str,
    plan: Sequence[Arrival],
    seed: int,
    extra: Mapping[str, object] = {},
) -> list[Seen]:
    """Send each request at its time and return what came of all, in the plan's order."""
    began = time.perf_counter()
    sent = []
    for number, arrival in enumerate(plan):
        await asyncio.sleep(max(0.0, began + arrival.at - time.perf_counter()))
        wanted = orjson.dumps(body(model, seed * 10_000 + number) | dict(extra))
        sent.append(asyncio.create_task(ask(session, url, wanted, burst=arrival.burst)))
    return await asyncio.gather(*sent)


async def ask(
    session: aiohttp.ClientSession, url: str, wanted: bytes, *, burst: bool = False
) -> Seen:
    """One streamed request; the first event counts as the first token, in which it comes."""
    began = time.perf_counter()
    first = last = None
    try:
        async with asyncio.timeout(LIMIT_S):
            headers = {"content-type": "application/json"}
            async with session.post(url, data=wanted, headers=headers) as answer:
                if answer.status != 200:
                    return Seen(burst, None, None, f"{answer.status} {await answer.text()}"[:300])
                async for line in answer.content:
                    if line.startswith(b"data: [DONE]"):
                        break
                    if not line.startswith(b"data: "):
                        continue
                    if line.startswith(b'data: {"error"'):
                        return Seen(burst, None, None, line.decode()[:300])
                    last = time.perf_counter()
                    first = first or last
    except (aiohttp.ClientError, TimeoutError) as fault:
        return Seen(burst, None, None, repr(fault)[:300])
    if first is None or last is None:
        return Seen(burst, None, None, "no event")
    return Seen(burst, first - began, (last - first) / (TOKENS - 1))


def summary(seen: Sequence[Seen]) -> dict[str, float]:
    """The figures of an arm.

    Medians are told of requests in bursts and out of them too: where half of the requests are in
    bursts, the median of all lies anywhere between the two.
    """
    done = [one for one in seen if one.ttft_s is not None]
    every = [one.ttft_s for one in done]
    bursts = [one.ttft_s for one in done if one.burst]
    others = [one.ttft_s for one in done if not one.burst]
    told = {
        "ttft_p50": _quantile(every, 50),
        "ttft_p95": _quantile(every, 95),
        "ttft_p99": _quantile(every, 99),
        "ttft_alone_p50": _quantile(others, 50),
        "ttft_burst_p50": _quantile(bursts, 50),
        "ttft_burst_p99": _quantile(bursts, 99),
        "tpot_p50": _quantile([one.tpot_s for one in done], 50),
        "interactive_done": len(done),
    }
    if len(done) < len(seen):
        told["interactive_failed"] = len(seen) - len(done)
    return told


class Counter:
    """Watches a counter in a server's metrics, dating each change when it is seen.

    A label that disappears keeps what it had; one that starts again counts on.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str, name: str) -> None:
        self._session, self._url, self._name = session, url, name
        self._last: dict[str, float] = {}
        self._total = 0.0
        self._rows: list[tuple[float, float]] = []

    async def watch(self, every_s: float = 0.1) -> None:
        """Look for ever; run it as a task."""
        while True:
            async with self._session.get(self._url) as answer:
                found = samples(await answer.text(), self._name)
            now = time.perf_counter()
            for label, value in found.items():
                before = self._last.get(label, 0.0)
                self._total += value - before if value >= before else value
            self._last |= found
            if not self._rows or self._total != self._rows[-1][1]:
                self._rows.append((now, self._total))
            await asyncio.sleep(every_s)

    def rate(self, since: float, until: float) -> float:
        """Growth a second between the changes nearest to two times (perf_counter)."""
        if len(self._rows) < 2:
            return 0.0
        (t0, v0), (t1, v1) = (
            min(self._rows, key=lambda row: abs(row[0] - at)) for at in (since, until)
        )
        return (v1 - v0) / (t1 - t0) if t1 > t0 else 0.0


def samples(text: str, name: str) -> dict[str, float]:
    """A metric's values by its labels, in Prometheus' text format."""
    found = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {key: float(value) for key, value in found if key.split("{")[0] == name}


def body(model: str, number: int) -> dict[str, object]:
    """The body of a request; each number gives another prompt."""
    words = " ".join(WORDS[(number * 3 + n * n) % len(WORDS)] for n in range(12))
    return {
        "model": model,
        "messages": [{"role": "user", "content": f"{number} {words}"}],
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }


def _quantile(values: Sequence[float | None], percent: float) -> float:
    known = [value for value in values if value is not None]
    return round(float(np.percentile(known, percent)), 4) if known else float("nan")
