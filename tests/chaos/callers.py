"""Interactive callers, and receivers of completion events that can be dead for a while."""

from __future__ import annotations

import json
import random
import socket
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from email import message_from_bytes
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, Envelope, Session

from tests.chaos.answers import LIVE, body_of, expected, said
from tests.ports import free_port

SILENCE_S = 60.0
"""A call that has brought nothing for so long has met with silence."""
PATH = "/v1/chat/completions"


@dataclass
class Callers:
    """Clients that ask one question after the other, streamed or not, and never try again."""

    url: str
    keys: Mapping[str, str]
    seed: int
    outcomes: Counter[str] = field(default_factory=Counter)
    """How calls ended: answered, refused, failed or aborted."""
    violations: list[str] = field(default_factory=list)
    _closing: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)

    def start(self) -> None:
        """Begin asking."""
        for tenant, key in self.keys.items():
            thread = threading.Thread(target=self._ask_on, args=(tenant, key), daemon=True)
            self._threads.append(thread)
            thread.start()

    def close(self) -> None:
        """Ask no more, and wait for the calls under way."""
        self._closing.set()
        for thread in self._threads:
            thread.join(2 * SILENCE_S)
            if thread.is_alive():
                self.violations.append("an interactive call never ended")

    def _ask_on(self, tenant: str, key: str) -> None:
        draw, number = random.Random(f"calls/{self.seed}/{tenant}"), 0
        headers = {"Authorization": f"Bearer {key}"}
        with httpx.Client(
            base_url=self.url, headers=headers, timeout=SILENCE_S, trust_env=False
        ) as client:
            while not self._closing.wait(draw.uniform(0.05, 0.5)):
                number += 1
                body = body_of(f"{tenant} asks {number}: {LIVE}", draw.randint(2, 40))
                ask = self._stream if draw.random() < 0.6 else self._whole
                try:
                    outcome = ask(client, body)
                except httpx.ReadTimeout:
                    outcome = "silence"
                    self.violations.append(f"silence after {tenant}'s question {number}")
                except httpx.TransportError:
                    outcome = "aborted"
                self.outcomes[outcome] += 1

    def _whole(self, client: httpx.Client, body: dict[str, Any]) -> str:
        answer = client.post(PATH, json=body)
        if answer.status_code != 200:
            return self._refused(answer.status_code, answer.text)
        return self._checked(body, said(answer.json()) or "")

    def _stream(self, client: httpx.Client, body: dict[str, Any]) -> str:
        text, done = "", False
        with client.stream("POST", PATH, json={**body, "stream": True}) as answer:
            if answer.status_code != 200:
                return self._refused(answer.status_code, answer.read().decode())
            for line in answer.iter_lines():
                if not line.startswith("data:"):
                    continue
                event = line.removeprefix("data:").strip()
                if event == "[DONE]":
                    done = True
                    continue
                parsed = json.loads(event)
                if "error" in parsed:
                    return "failed"
                for choice in parsed["choices"]:
                    text += choice["delta"].get("content") or ""
        if not done:
            # The server hung up in good order in the middle of an answer.
            self.violations.append(f"a stream ended without its end: {text!r}")
            return "cut"
        return self._checked(body, text)

    def _checked(self, body: dict[str, Any], text: str) -> str:
        right = expected(body)
        if text == right:
            return "answered"
        self.violations.append(f"an interactive answer is wrong: {text!r}, not {right!r}")
        return "wrong"

    def _refused(self, status: int, text: str) -> str:
        if status in (429, 500, 503) and "error" in json.loads(text):
            if '"internal_error"' in text:
                self.violations.append(f"an interactive call met a fault of the service: {text}")
            return "refused" if status != 500 else "failed"
        self.violations.append(f"an interactive call was answered {status}: {text[:300]}")
        return "wrong"


class Receivers:
    """Takes webhooks and mails; while `dead`, both slam the door."""

    def __init__(self) -> None:
        self.dead = False
        self.webhooks: defaultdict[str, list[str]] = defaultdict(list)
        """Ids of the batches told of, by the event's id, once for every delivery."""
        self.mails: Counter[str] = Counter()
        """Deliveries by Message-ID."""
        self.refused = 0
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._smtp = Controller(
            _Sink(self), hostname="127.0.0.1", port=free_port(), ready_timeout=60.0
        )

    def start(self) -> None:
        """Listen."""
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        self._smtp.start()

    def stop(self) -> None:
        """Listen no more."""
        self._http.shutdown()
        self._http.server_close()
        self._smtp.stop()

    @property
    def webhook_url(self) -> str:
        """Where webhooks are sent."""
        return f"http://127.0.0.1:{self._http.server_address[1]}/hook"

    @property
    def smtp_url(self) -> str:
        """Where mails are sent."""
        return f"smtp://127.0.0.1:{self._smtp.port}"


def _handler(receivers: Receivers) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            if receivers.dead:
                receivers.refused += 1
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            event = json.loads(body)
            assert self.headers["webhook-id"] == event["id"]
            receivers.webhooks[event["id"]].append(event["data"]["id"])
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_args: object) -> None:
            pass

    return Handler


class _Sink:
    def __init__(self, receivers: Receivers) -> None:
        self._receivers = receivers

    async def handle_DATA(self, _server: SMTP, _session: Session, envelope: Envelope) -> str:
        if self._receivers.dead:
            self._receivers.refused += 1
            return "451 try again later"
        content = envelope.content or b""
        raw = content.encode() if isinstance(content, str) else content
        self._receivers.mails[message_from_bytes(raw)["Message-ID"]] += 1
        return "250 OK"


def until(reached: Any, within_s: float, every_s: float = 0.1) -> bool:
    """Whether `reached()` came true in time; a raised fault counts as not yet."""
    give_up_at = time.monotonic() + within_s
    while True:
        try:
            if reached():
                return True
        except Exception:  # noqa: BLE001 - whatever is away may come back
            pass
        if time.monotonic() > give_up_at:
            return False
        time.sleep(every_s)
