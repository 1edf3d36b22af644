"""Receivers of completion events for the demo: an HTTP server and an SMTP sink on loopback."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email import message_from_bytes
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, Envelope, Session


@dataclass(frozen=True, slots=True)
class ReceivedWebhook:
    """One POST as it arrived."""

    body: bytes
    headers: Mapping[str, str]


@dataclass(slots=True)
class _Inbox:
    webhooks: list[ReceivedWebhook] = field(default_factory=list)
    mails: list[Message] = field(default_factory=list)
    changed: threading.Condition = field(default_factory=threading.Condition)


class Receivers:
    """Both receivers, as a context manager; they listen on free ports of 127.0.0.1."""

    def __init__(self) -> None:
        self._inbox = _Inbox()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self._inbox))
        self._smtp = Controller(_Sink(self._inbox), hostname="127.0.0.1", port=_free_port())

    def __enter__(self) -> Receivers:
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        self._smtp.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._smtp.stop()

    @property
    def webhook_url(self) -> str:
        """Where to send webhooks."""
        return f"http://127.0.0.1:{self._http.server_address[1]}/webhook"

    @property
    def smtp_url(self) -> str:
        """Where to send mail."""
        return f"smtp://127.0.0.1:{self._smtp.port}"

    @property
    def webhooks(self) -> list[ReceivedWebhook]:
        """What arrived so far."""
        return list(self._inbox.webhooks)

    @property
    def mails(self) -> list[Message]:
        """What arrived so far."""
        return list(self._inbox.mails)

    def wait_for(self, condition: Callable[[Receivers], bool], timeout_s: float) -> bool:
        """Wait until the condition holds; False when it did not in time."""
        with self._inbox.changed:
            return self._inbox.changed.wait_for(lambda: condition(self), timeout_s)


def _free_port() -> int:
    """A port to listen on; the SMTP controller cannot choose one itself."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _handler(inbox: _Inbox) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            with inbox.changed:
                inbox.webhooks.append(ReceivedWebhook(body, headers))
                inbox.changed.notify_all()
            self.send_response(204)
            self.end_headers()

        def log_message(self, *_args: object) -> None:
            pass

    return Handler


class _Sink:
    def __init__(self, inbox: _Inbox) -> None:
        self._inbox = inbox

    async def handle_DATA(self, _server: SMTP, _session: Session, envelope: Envelope) -> str:
        content = envelope.content or b""
        raw = content.encode() if isinstance(content, str) else content
        with self._inbox.changed:
            self._inbox.mails.append(message_from_bytes(raw))
            self._inbox.changed.notify_all()
        return "250 OK"
