"""Webhooks against a real receiver: signatures, redirects, and receivers that misbehave."""

from __future__ import annotations

import ssl
import time
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import openai
import orjson
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from qlm_batch.callbacks.webhook import WebhookConfig, send_webhook
from tests.integration.callback_support import (
    LOCAL,
    OTHER_SECRET,
    SECRET,
    Receiver,
    answers,
    item,
)

CONFIG = WebhookConfig(timeout_s=30.0, allow=LOCAL)
LONG_S = 60
"""How long receivers that never finish go on."""


def test_the_official_client_unwraps_our_webhook() -> None:
    now = time.time()
    with Receiver([answers(204)]) as receiver:
        outcome = send_webhook(item(target=receiver.url, created_at=now), [SECRET], CONFIG)
    assert (outcome.ok, outcome.status_code) == (True, 204)
    (request,) = receiver.received
    assert request.path == "/hook?x=1"
    assert request.headers["content-type"] == "application/json"
    client = openai.OpenAI(api_key="-", webhook_secret=SECRET)
    event = client.webhooks.unwrap(request.body, request.headers)
    assert (event.id, event.type, event.object) == ("evt_0123", "batch.completed", "event")
    assert event.created_at == int(now)
    assert event.data.id == "batch_1"  # type: ignore[union-attr]
    assert request.headers["webhook-id"] == event.id


@pytest.mark.parametrize("held", [SECRET, OTHER_SECRET])
def test_while_a_secret_is_rotated_either_one_verifies(held: str) -> None:
    with Receiver([answers(200)]) as receiver:
        send_webhook(item(target=receiver.url), [OTHER_SECRET, SECRET], CONFIG)
    (request,) = receiver.received
    client = openai.OpenAI(api_key="-", webhook_secret=held)
    client.webhooks.verify_signature(request.body, request.headers)


def test_a_changed_body_does_not_verify() -> None:
    with Receiver([answers(200)]) as receiver:
        send_webhook(item(target=receiver.url), [SECRET], CONFIG)
    (request,) = receiver.received
    client = openai.OpenAI(api_key="-", webhook_secret=SECRET)
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.verify_signature(request.body + b" ", request.headers)


def test_every_attempt_carries_the_same_id_and_body() -> None:
    with Receiver([answers(500), answers(200)]) as receiver:
        outcomes = [send_webhook(item(target=receiver.url), [SECRET], CONFIG) for _ in range(2)]
    assert [outcome.ok for outcome in outcomes] == [False, True]
    first, second = receiver.received
    assert first.body == second.body
    assert first.headers["webhook-id"] == second.headers["webhook-id"]


def test_a_redirect_is_a_failure_and_is_not_followed() -> None:
    other = Receiver([answers(200)])
    with other, Receiver([answers(307, Location=other.url)]) as receiver:
        outcome = send_webhook(item(target=receiver.url), [SECRET], CONFIG)
    assert (outcome.ok, outcome.status_code) == (False, 307)
    assert "redirect" in outcome.detail
    assert other.received == []


def test_retry_after_and_gone_are_passed_on() -> None:
    with Receiver([answers(429, Retry_After="90"), answers(410)]) as receiver:
        throttled = send_webhook(item(target=receiver.url), [SECRET], CONFIG)
        gone = send_webhook(item(target=receiver.url), [SECRET], CONFIG)
    assert (throttled.ok, throttled.retry_after_s, throttled.gone) == (False, 90.0, False)
    assert (gone.ok, gone.gone) == (False, True)


def hang(handler: BaseHTTPRequestHandler) -> None:
    handler.connection.settimeout(LONG_S)
    handler.connection.recv(1)


def drip_headers(handler: BaseHTTPRequestHandler) -> None:
    handler.wfile.write(b"HTTP/1.1 200 OK\r\n")
    for number in range(20 * LONG_S):
        handler.wfile.write(b"x-%d: y\r\n" % number)
        handler.wfile.flush()
        time.sleep(0.05)


def drip_body(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.end_headers()
    for _ in range(20 * LONG_S):
        handler.wfile.write(b"x")
        handler.wfile.flush()
        time.sleep(0.05)


@pytest.mark.parametrize("answer", [hang, drip_headers, drip_body])
def test_a_receiver_that_never_finishes_is_cut_off(answer: Any) -> None:
    started = time.monotonic()
    with Receiver([answer]) as receiver:
        config = WebhookConfig(timeout_s=2.0, allow=LOCAL)
        outcome = send_webhook(item(target=receiver.url), [SECRET], config)
        assert time.monotonic() - started < 5.0
        assert receiver.finished.wait(30), "the connection was left open"
    assert not outcome.ok
    assert "within 2 s" in outcome.detail


def test_an_endless_answer_is_cut_off_and_is_no_success() -> None:
    sent = 0

    def flood(handler: BaseHTTPRequestHandler) -> None:
        nonlocal sent
        handler.send_response(200)
        handler.send_header("Content-Length", str(10 * 1024**3))
        handler.end_headers()
        block = b"x" * 65_536
        for _ in range(10 * 1024**3 // len(block)):
            handler.wfile.write(block)
            sent += len(block)

    with Receiver([flood]) as receiver:
        outcome = send_webhook(item(target=receiver.url), [SECRET], CONFIG)
        assert receiver.finished.wait(30), "the connection was left open"
    assert not outcome.ok
    assert "longer than" in outcome.detail
    assert sent < 64 * 1024**2


def test_a_compressed_bomb_is_not_unpacked() -> None:
    def bomb(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Encoding", "gzip")
        handler.send_header("Content-Length", "4")
        handler.end_headers()
        handler.wfile.write(b"zzzz")

    with Receiver([bomb]) as receiver:
        assert send_webhook(item(target=receiver.url), [SECRET], CONFIG).ok


def test_a_closed_port_or_a_broken_answer_is_a_failure_with_a_reason() -> None:
    def garbage(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(b"\x16\x03\x01 not http\r\n\r\n")

    with Receiver([garbage]) as receiver:
        broken = send_webhook(item(target=receiver.url), [SECRET], CONFIG)
    closed = send_webhook(item(target=receiver.url), [SECRET], CONFIG)
    assert not broken.ok and "ProtocolError" in broken.detail
    assert not closed.ok and "ConnectError" in closed.detail


def test_a_private_address_is_not_connected_to() -> None:
    with Receiver([answers(200)]) as receiver:
        outcome = send_webhook(item(target=receiver.url), [SECRET], WebhookConfig())
    assert not outcome.ok
    assert "not a public address" in outcome.detail
    assert receiver.received == []


def test_proxies_of_the_environment_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    with Receiver([answers(200)]) as receiver:
        assert send_webhook(item(target=receiver.url), [SECRET], CONFIG).ok


def test_the_checked_address_is_used_under_the_original_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []
    with Receiver([answers(200)]) as receiver:

        def look_up(host: str, port: int, **_: Any) -> list[Any]:
            asked.append(host)
            return [(2, 1, 6, "", (address, port)) for address in ("127.0.0.9", "127.0.0.1")]

        monkeypatch.setattr("qlm_batch.callbacks.targets.socket.getaddrinfo", look_up)
        name = f"hooks.example:{receiver.port}"
        outcome = send_webhook(item(target=f"http://{name}/hook"), [SECRET], CONFIG)
    assert outcome.ok
    assert receiver.received[0].headers["host"] == name
    assert asked == ["hooks.example"]


def test_an_ipv6_receiver_is_reached() -> None:
    try:
        receiver = Receiver([answers(200)], "::1")
    except OSError:
        pytest.skip("no IPv6 loopback here")
    with receiver:
        outcome = send_webhook(item(target=receiver.url), [SECRET], CONFIG)
    assert outcome.ok
    assert receiver.received[0].headers["host"] == f"[::1]:{receiver.port}"


def test_tls_asks_for_the_original_name_and_refuses_an_unknown_certificate(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str | None] = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(self_signed(tmp_path, "hooks.example"))
    context.sni_callback = lambda _socket, name, _context: asked.append(name)
    monkeypatch.setattr(
        "qlm_batch.callbacks.targets.socket.getaddrinfo",
        lambda host, port, **_: [(2, 1, 6, "", ("127.0.0.1", port))],
    )
    with Receiver([answers(200)], tls=context) as receiver:
        target = f"https://Hooks.Example:{receiver.port}/"
        outcome = send_webhook(item(target=target), [SECRET], CONFIG)
    assert asked == ["hooks.example"]
    assert not outcome.ok
    assert "CERTIFICATE_VERIFY_FAILED" in outcome.detail
    assert receiver.received == []


def self_signed(folder: Path, name: str) -> Path:
    """A certificate for `name` that nobody trusts, with its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(subject, subject, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    path = folder / "receiver.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path.write_bytes(private + certificate.public_bytes(serialization.Encoding.PEM))
    return path


def test_the_body_is_the_events_json() -> None:
    with Receiver([answers(200)]) as receiver:
        send_webhook(item(target=receiver.url, type="batch.expired"), [SECRET], CONFIG)
    assert orjson.loads(receiver.received[0].body) == {
        "id": "evt_0123",
        "object": "event",
        "created_at": 1_800_000_000,
        "type": "batch.expired",
        "data": {"id": "batch_1"},
    }
