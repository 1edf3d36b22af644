"""E-mail against a real mail server on this machine."""

from __future__ import annotations

import socket

import pytest

from qlm_batch.callbacks.email import EmailConfig, send_email
from tests.integration.callback_support import batch, item, mail_server

ITEM = item(channel="email", target="ann@example.com")


def config(port: int, **changes: float) -> EmailConfig:
    url = f"smtp://127.0.0.1:{port}"
    return EmailConfig(url, "batches@example.com", "http://localhost", **changes)


def test_the_mail_arrives_with_text_and_html() -> None:
    with mail_server() as sink:
        outcome = send_email(ITEM, batch(), config(sink.port))
    assert outcome.ok
    (message,) = sink.messages
    assert message["To"] == "ann@example.com"
    assert message["Message-ID"] == "<evt_0123@example.com>"
    assert [part.get_content_type() for part in message.iter_parts()] == ["text/plain", "text/html"]


@pytest.mark.parametrize(("answer", "gone"), [("550 no such user", True), ("450 later", False)])
def test_a_refused_recipient_is_tried_again_only_when_the_server_says_later(
    answer: str, gone: bool
) -> None:
    with mail_server(refuse=answer) as sink:
        outcome = send_email(ITEM, batch(), config(sink.port))
    assert (outcome.ok, outcome.gone) == (False, gone)
    assert outcome.status_code == int(answer[:3])
    assert sink.messages == []


def test_a_silent_mail_server_is_given_up_on() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        outcome = send_email(ITEM, batch(), config(port, timeout_s=0.2))
    assert (outcome.ok, outcome.gone) == (False, False)


def test_a_closed_port_is_a_failure_to_try_again() -> None:
    outcome = send_email(ITEM, batch(), config(1))
    assert (outcome.ok, outcome.gone) == (False, False)


@pytest.mark.parametrize("url", ["", "localhost:25", "http://localhost", "smtp://"])
def test_without_a_usable_server_it_says_which_setting_to_mend(url: str) -> None:
    outcome = send_email(ITEM, batch(), EmailConfig(url, "batches@example.com", "http://localhost"))
    assert (outcome.ok, outcome.gone) == (False, False)
    assert "QLM_SMTP_URL" in outcome.detail
