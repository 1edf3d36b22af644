"""The delivery service: what it sends at once, what it puts off, and what it gives up."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import pytest
from structlog.testing import capture_logs

from qlm_batch.callbacks.deliver import Sender
from qlm_batch.callbacks.email import EmailConfig
from qlm_batch.callbacks.outcome import Outcome
from qlm_batch.callbacks.webhook import WebhookConfig
from qlm_batch.control.callback_service import CallbackConfig, CallbackService
from qlm_batch.domain.errors import Unavailable
from qlm_batch.domain.jobs import DeliveryAttempt, OutboxItem
from qlm_batch.domain.store import Store
from tests.integration.callback_support import (
    LOCAL,
    MemoryOutbox,
    Receiver,
    answers,
    item,
    mail_server,
    wait_for,
)

NOW = 5_000.0


@contextmanager
def service_on(
    outbox: MemoryOutbox,
    senders: Mapping[str, Sender] | None = None,
    smtp_port: int = 1,
    **more: Any,
) -> Iterator[CallbackService]:
    config = CallbackConfig(
        holder="test",
        webhook=WebhookConfig(timeout_s=30.0, allow=LOCAL),
        email=EmailConfig(f"smtp://127.0.0.1:{smtp_port}", "qlm@localhost", "http://localhost"),
        **more,
    )
    service = CallbackService(cast(Store, outbox), config, senders)
    try:
        yield service
    finally:
        service.close()


def deliver_all(outbox: MemoryOutbox, **options: Any) -> list[DeliveryAttempt]:
    """Run until every item was attempted once; the attempts in the order of their items."""
    expected = len(outbox.waiting)
    with service_on(outbox, **options) as service:
        while service.run_once():
            pass
    wait_for(lambda: len(outbox.attempts) == expected)
    return sorted(outbox.attempts, key=lambda attempt: attempt.outbox_id)


def test_a_webhook_and_an_email_of_one_event_are_both_delivered() -> None:
    with Receiver([answers(200)]) as receiver, mail_server() as sink:
        outbox = MemoryOutbox(
            [item(id=1, target=receiver.url), item(id=2, channel="email", target="a@b.example")]
        )
        attempts = deliver_all(outbox, smtp_port=sink.port)
    assert [(a.ok, a.retry_at) for a in attempts] == [(True, None), (True, None)]
    assert receiver.received[0].headers["webhook-id"] in str(sink.messages[0]["Message-ID"])


@pytest.mark.parametrize(("made", "earliest"), [(0, 5.0), (1, 300.0), (8, 86_400.0)])
def test_a_failure_is_put_off_by_the_attempts_made(made: int, earliest: float) -> None:
    with Receiver([answers(503)]) as receiver:
        (attempt,) = deliver_all(MemoryOutbox([item(target=receiver.url, attempts=made)]))
    assert (attempt.ok, attempt.status_code) == (False, 503)
    assert attempt.retry_at is not None
    assert NOW + earliest <= attempt.retry_at <= NOW + 1.2 * earliest


def test_retry_after_puts_off_further() -> None:
    with Receiver([answers(503, Retry_After="7200")]) as receiver:
        (attempt,) = deliver_all(MemoryOutbox([item(target=receiver.url)]))
    assert attempt.retry_at == NOW + 7_200


@pytest.mark.parametrize(("status", "made"), [(410, 0), (500, 9)])
def test_a_receiver_that_is_gone_or_failed_every_time_leaves_a_dead_letter(
    status: int, made: int
) -> None:
    with Receiver([answers(status)]) as receiver, capture_logs() as logs:
        (attempt,) = deliver_all(MemoryOutbox([item(target=receiver.url, attempts=made)]))
    assert (attempt.ok, attempt.status_code, attempt.retry_at) == (False, status, None)
    assert logs[-1]["event"] == "callback_dead"


def test_a_private_target_fails_with_the_reason_in_the_log_of_deliveries() -> None:
    (attempt,) = deliver_all(MemoryOutbox([item(target="https://169.254.169.254/")]))
    assert not attempt.ok
    assert "not a public address" in attempt.detail


def test_a_fault_that_nobody_foresaw_is_an_attempt_and_put_off() -> None:
    with Receiver([answers(302, Location="http://xn--/")]) as receiver, capture_logs():
        (made,) = deliver_all(MemoryOutbox([item(target=receiver.url)]))
    assert (made.ok, made.detail) == (False, "it could not be sent: IDNAError")
    assert made.retry_at is not None


def test_slow_receivers_hold_their_own_threads_only() -> None:
    release = threading.Event()

    def send(event: OutboxItem) -> Outcome:
        if event.target == "slow":
            release.wait(60)
        return Outcome(True, "fine")

    outbox = MemoryOutbox([item(id=n, target="slow") for n in range(3)])
    with service_on(outbox, {"webhook": send}, concurrency=4) as service:
        assert service.run_once().started == 3
        outbox.waiting.append(item(id=9, target="quick"))
        assert service.run_once().started == 1
        wait_for(lambda: [a.outbox_id for a in outbox.attempts] == [9])
        release.set()
    assert len(outbox.attempts) == 4


def test_no_more_is_claimed_than_can_be_sent_at_once() -> None:
    release = threading.Event()

    def send(_: OutboxItem) -> Outcome:
        release.wait(60)
        return Outcome(True, "fine")

    outbox = MemoryOutbox([item(id=n) for n in range(5)])
    with service_on(outbox, {"webhook": send}, concurrency=2) as service:
        assert service.run_once().started == 2
        assert not service.run_once()
        assert len(outbox.waiting) == 3
        release.set()
        wait_for(lambda: service.running == 0)
        assert service.run_once().started == 2
    assert outbox.limits == [2, 2]


def test_stopping_waits_for_the_deliveries_under_way() -> None:
    def send(_: OutboxItem) -> Outcome:
        time.sleep(0.05)
        return Outcome(True, "fine")

    outbox = MemoryOutbox([item()])
    with service_on(outbox, {"webhook": send}) as service:
        service.run_once()
    assert len(outbox.attempts) == 1


def test_a_store_that_is_away_while_recording_is_reported_to_the_loop() -> None:
    class Away(MemoryOutbox):
        def record_delivery(self, attempt: DeliveryAttempt) -> None:
            raise Unavailable("database away")

    outbox = Away([item()])
    with service_on(outbox, {"webhook": lambda _: Outcome(True, "fine")}) as service:
        service.run_once()
        wait_for(lambda: service.running == 0)
        with pytest.raises(Unavailable):
            service.run_once()


def test_an_unknown_channel_is_a_dead_letter() -> None:
    (attempt,) = deliver_all(MemoryOutbox([item(channel="pigeon")]))
    assert (attempt.ok, attempt.retry_at) == (False, None)
