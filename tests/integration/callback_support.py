"""A local HTTP receiver, an SMTP sink and an outbox in memory, for the callback tests."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import socket
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, Envelope, Session

from qlm_batch.domain.jobs import Batch, BatchSpec, BatchState, DeliveryAttempt, OutboxItem

SECRET = "whsec_" + base64.b64encode(b"first secret of 24 bytes").decode()
OTHER_SECRET = "whsec_" + base64.b64encode(b"other secret of 24 bytes").decode()
LOCAL = ("127.0.0.0/8", "::1")


def item(**changes: Any) -> OutboxItem:
    """A webhook event about a completed batch."""
    made = OutboxItem(
        id=1,
        event_id="evt_0123",
        tenant="acme",
        batch_id="batch_1",
        generation=0,
        type="batch.completed",
        channel="webhook",
        target="http://127.0.0.1:1/hook",
        created_at=1_800_000_000.7,
        attempts=0,
    )
    return dataclasses.replace(made, **changes)


def batch(**changes: Any) -> Batch:
    """The batch the events are about."""
    made = Batch(
        id="batch_1",
        spec=BatchSpec("acme", "/v1/completions", "file-1", "24h", 86_400.0),
        state=BatchState.COMPLETED,
        generation=0,
        created_at=1_799_990_000.0,
        deadline=1_800_076_400.0,
        completed_at=1_800_000_000.0,
    )
    return dataclasses.replace(made, **changes)


def wait_for(condition: Callable[[], bool], within_s: float = 30.0) -> None:
    """Return once the condition holds; fail after the deadline."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.005)


Answer = Callable[[BaseHTTPRequestHandler], None]


def answers(status: int, **headers: str) -> Answer:
    """A plain answer with a status and headers (underscores become dashes)."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    return answer


@dataclass
class Received:
    """One request as the receiver saw it."""

    path: str
    headers: dict[str, str]
    body: bytes


class Receiver:
    """An HTTP server that records what it gets and plays one scripted answer after the other."""

    def __init__(
        self,
        script: Sequence[Answer],
        address: str = "127.0.0.1",
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.received: list[Received] = []
        self.finished = threading.Event()
        remaining = list(script)
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                receiver.received.append(Received(self.path, headers, body))
                answer = remaining.pop(0) if len(remaining) > 1 else remaining[0]
                with contextlib.suppress(OSError):
                    answer(self)
                receiver.finished.set()

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
            block_on_close = False

            def handle_error(self, request: object, client_address: object) -> None:
                pass

        self._server = Server((address, 0), Handler)
        self._server.daemon_threads = True
        if tls is not None:
            self._server.socket = tls.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        host = f"[{address}]" if ":" in address else address
        self.port = int(self._server.server_address[1])
        self.url = f"http://{host}:{self.port}/hook?x=1"

    def __enter__(self) -> Receiver:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@dataclass
class Sink:
    """What a local mail server was given."""

    port: int = 0
    messages: list[EmailMessage] = field(default_factory=list)
    refuse: str | None = None

    async def handle_RCPT(
        self, server: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        if self.refuse:
            return self.refuse
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:
        assert isinstance(envelope.content, bytes)
        self.messages.append(message_from_bytes(envelope.content, policy=default))
        return "250 OK"


class MailController(Controller):
    """Serves on a socket that listens already, so that nobody else gets its port."""

    def __init__(self, sink: Sink, listening: socket.socket) -> None:
        super().__init__(sink, *listening.getsockname(), ready_timeout=60.0)
        self._listening = listening

    def _create_server(self) -> Awaitable[asyncio.AbstractServer]:
        return self.loop.create_server(self._factory_invoker, sock=self._listening)


@contextlib.contextmanager
def mail_server(refuse: str | None = None) -> Iterator[Sink]:
    """A mail server on a free local port."""
    sink = Sink(refuse=refuse)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        controller = MailController(sink, listening)
        controller.start()
        sink.port = controller.port
        try:
            yield sink
        finally:
            controller.stop()


class MemoryOutbox:
    """The outbox part of a store: claims once, records what happened."""

    def __init__(self, items: Sequence[OutboxItem], secrets: Sequence[str] = (SECRET,)) -> None:
        self.waiting = list(items)
        self.attempts: list[DeliveryAttempt] = []
        self.limits: list[int] = []
        self._secrets = tuple(secrets)
        self._lock = threading.Lock()

    def claim_outbox(self, holder: str, limit: int, lease_s: float) -> Sequence[OutboxItem]:
        with self._lock:
            self.limits.append(limit)
            claimed, self.waiting = self.waiting[:limit], self.waiting[limit:]
            return claimed

    def record_delivery(self, attempt: DeliveryAttempt) -> None:
        with self._lock:
            self.attempts.append(attempt)

    def webhook_secrets(self, tenant: str) -> Sequence[str]:
        return self._secrets

    def batch(self, tenant: str, batch_id: str) -> Batch:
        return batch()

    def now(self) -> float:
        return 5_000.0
