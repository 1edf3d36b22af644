"""Batches with checkable answers, followed until every line has been accounted for."""

from __future__ import annotations

import json
import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.chaos.answers import FLAKY, POISON, body_of, expected, said
from tests.chaos.client import Client, Silent

ENDED = ("completed", "failed", "expired", "cancelled")
ENDPOINT = "/v1/chat/completions"
POLL_S = 0.3


@dataclass(frozen=True, slots=True)
class Line:
    """One request, its right answer, and the error code that is right instead, if any."""

    body: Mapping[str, Any]
    answer: str
    error: str = ""


@dataclass
class Sent:
    """A batch under way. `may_miss` are error codes a line may have although nothing is wrong."""

    name: str
    lines: Mapping[str, Line]
    may_miss: frozenset[str] = frozenset()
    id: str = ""
    cancel_after_s: float | None = None
    retry: bool = False
    generation: int = 1
    check: bool = True
    """Whether answers are compared; else only that there are some."""


@dataclass
class Tally:
    """What was found out about finished batches. Every list holds evidence."""

    requests: int = 0
    right: int = 0
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    duplicated: list[str] = field(default_factory=list)
    non_poison_errors: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    ended: Counter[tuple[str, int]] = field(default_factory=Counter)
    """Completions seen, by batch and generation."""
    poisoned: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(
        self, sent: Sent, outputs: list[Any], errors: list[Any], state: Mapping[str, Any]
    ) -> None:
        """Check the files of a batch that ended."""
        with self._lock:
            self._add(sent, outputs, errors, state)

    def _add(
        self, sent: Sent, outputs: list[Any], errors: list[Any], state: Mapping[str, Any]
    ) -> None:
        name = f"{sent.name} {sent.id}"
        seen = Counter(row["custom_id"] for row in (*outputs, *errors))
        self.requests += len(sent.lines)
        self.lost += [f"{name}: {line}" for line in sent.lines if not seen[line]]
        self.duplicated += [f"{name}: {line}" for line, times in seen.items() if times > 1]
        self.faults += [f"{name}: unknown line {line}" for line in seen if line not in sent.lines]
        counts = state["request_counts"]
        told = (counts["total"], counts["completed"], counts["failed"])
        if told != (len(sent.lines), len(outputs), len(errors)):
            self.faults.append(f"{name}: counts {told}, files {len(outputs)} + {len(errors)}")
        for row in outputs:
            line = sent.lines.get(row["custom_id"])
            text = said(row["response"]["body"])
            if line is None or row["error"] is not None:
                self.faults.append(f"{name}: {json.dumps(row)[:300]}")
            elif line.error:
                self.faults.append(f"{name}: poison was answered, {row['custom_id']}")
            elif text is None or (sent.check and text.strip() != line.answer.strip()):
                self.wrong.append(f"{name}: {row['custom_id']} said {text!r}, not {line.answer!r}")
            else:
                self.right += text.strip() == line.answer.strip()
        for row in errors:
            line = sent.lines.get(row["custom_id"])
            code = (row["error"] or {}).get("code") or (row["response"] or {}).get("status_code")
            if line is not None and code == line.error:
                self.poisoned += 1
            elif code not in sent.may_miss:
                self.non_poison_errors.append(f"{name}: {json.dumps(row)[:400]}")


class Follower:
    """Keeps batches of one tenant under way in a thread of its own, and checks how they end."""

    def __init__(self, client: Client, tally: Tally, callbacks: Mapping[str, str]) -> None:
        self._client = client
        self._tally = tally
        self._callbacks = dict(callbacks)

    def run(self, sent: Sent) -> None:
        """Submit a batch, follow it to its end and check it; faults go to the tally."""
        try:
            self._submit(sent)
            self._follow(sent)
        except (Silent, AssertionError) as fault:
            self._tally.faults.append(f"{sent.name} {sent.id}: {fault}")

    def _submit(self, sent: Sent) -> None:
        content = "".join(
            json.dumps({"custom_id": key, "method": "POST", "url": ENDPOINT, "body": line.body})
            + "\n"
            for key, line in sent.lines.items()
        ).encode()
        form = {"file": (f"{sent.name}.jsonl", content)}
        file = self._client.json("POST", "/v1/files", files=form, data={"purpose": "batch"})
        window = "10s" if "batch_expired" in sent.may_miss else "6h"
        asked = {
            "input_file_id": file["id"],
            "endpoint": ENDPOINT,
            "completion_window": window,
            "callbacks": self._callbacks,
        }
        headers = {"Idempotency-Key": uuid.uuid4().hex}
        sent.id = self._client.json("POST", "/v1/batches", json=asked, headers=headers)["id"]

    def _follow(self, sent: Sent) -> None:
        began = time.monotonic()
        while True:
            state = self._client.json("GET", f"/v1/batches/{sent.id}")
            if state["status"] in ENDED and state["qlm"]["generation"] == sent.generation:
                break
            late = time.monotonic() - began
            loaded = state["in_progress_at"] is not None
            if loaded and sent.cancel_after_s is not None and late > sent.cancel_after_s:
                # Whether this call or an earlier one of it did it, a refusal says it has ended.
                self._client.call("POST", f"/v1/batches/{sent.id}/cancel")
                sent.cancel_after_s = None
            time.sleep(POLL_S)
        self._tally.ended[sent.id, sent.generation] += 1
        if sent.retry and state["status"] in ("cancelled", "expired"):
            sent.retry = False
            asked = {"completion_window": "6h"}
            answer = self._client.call("POST", f"/v1/batches/{sent.id}/retry", json=asked)
            assert answer.status_code in (200, 409), answer.text
            # Where nothing is left to do again it is refused; and so is a call whose earlier try
            # got through although its answer was lost.
            state = self._client.json("GET", f"/v1/batches/{sent.id}")
            if state["qlm"]["generation"] > sent.generation:
                sent.generation += 1
                sent.may_miss = frozenset()
                return self._follow(sent)
        outputs, errors = (self._rows(state[name]) for name in ("output_file_id", "error_file_id"))
        self._tally.add(sent, outputs, errors, state)
        return None

    def _rows(self, file_id: str | None) -> list[Any]:
        if file_id is None:
            return []
        answer = self._client.call("GET", f"/v1/files/{file_id}/content")
        assert answer.status_code == 200, f"{file_id}: {answer.status_code} {answer.text[:200]}"
        return [json.loads(line) for line in answer.text.splitlines()]


def ordinary(name: str, draw: random.Random, most: int) -> Sent:
    """A batch of simple questions; some are cancelled, expire or come with nonsense."""
    lines = {}
    for n in range(draw.randint(most // 4, most)):
        question = f"{name}: what about {n}?"
        if draw.random() < 0.001:
            question = f"{question} {FLAKY}"
        lines[f"{name}-{n}"] = _line(question, draw)
    sent = Sent(name, lines)
    chance = draw.random()
    if chance < 0.08:
        sent.may_miss = frozenset({"batch_cancelled"})
        sent.cancel_after_s = draw.uniform(0.2, 3.0)
    elif chance < 0.12:
        sent.may_miss = frozenset({"batch_expired"})
    sent.retry = bool(sent.may_miss) and draw.random() < 0.7
    return sent


def poisoned(name: str, draw: random.Random) -> Sent:
    """A small batch with one line that kills every engine it comes to."""
    lines = {f"{name}-{n}": _line(f"{name}: and {n}?", draw) for n in range(40)}
    body = body_of(f"{name}: {POISON}")
    lines[f"{name}-poison"] = Line(body, "", error="engine_crashed")
    return Sent(name, lines)


def _line(question: str, draw: random.Random) -> Line:
    body = body_of(question, draw.randint(2, 24))
    return Line(body, expected(body))


@dataclass
class Load:
    """Several tenants' batches, always some of them under way until `close`."""

    clients: Mapping[str, Client]
    tally: Tally
    callbacks: Mapping[str, str]
    seed: int
    most_lines: int
    threads: list[threading.Thread] = field(default_factory=list)
    _closing: threading.Event = field(default_factory=threading.Event)
    _numbers: Counter[str] = field(default_factory=Counter)

    def start(self, lanes: int) -> None:
        """Keep `lanes` batches of each tenant under way."""
        for tenant, client in self.clients.items():
            for lane in range(lanes):
                draw = random.Random(f"load/{self.seed}/{tenant}/{lane}")
                self._spawn(self._lane, client, f"{tenant}{lane}", draw)

    def poison(self) -> None:
        """Add a batch with poison."""
        number = self._numbers["poison"] = self._numbers["poison"] + 1
        draw = random.Random(f"poison/{self.seed}/{number}")
        client = next(iter(self.clients.values()))
        follower = Follower(client, self.tally, self.callbacks)
        self._spawn(follower.run, poisoned(f"poison{number}", draw))

    def close(self, within_s: float) -> bool:
        """Start no more, and wait for all to end; False when some did not in time."""
        self._closing.set()
        give_up_at = time.monotonic() + within_s
        for thread in self.threads:
            thread.join(max(0.0, give_up_at - time.monotonic()))
        return not any(thread.is_alive() for thread in self.threads)

    def _lane(self, client: Client, name: str, draw: random.Random) -> None:
        follower, number = Follower(client, self.tally, self.callbacks), 0
        while not self._closing.is_set():
            number += 1
            follower.run(ordinary(f"{name}.{number}", draw, self.most_lines))

    def _spawn(self, target: Callable[..., None], *given: object) -> None:
        thread = threading.Thread(target=target, args=given, daemon=True)
        self.threads.append(thread)
        thread.start()
