"""One attempt to deliver one event, and what follows from it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import structlog

from qlm_batch.callbacks.backoff import next_delay_s
from qlm_batch.callbacks.email import EmailConfig, send_email
from qlm_batch.callbacks.outcome import Outcome
from qlm_batch.callbacks.webhook import WebhookConfig, send_webhook
from qlm_batch.domain.errors import NotFound, QlmError
from qlm_batch.domain.jobs import DeliveryAttempt, OutboxItem
from qlm_batch.domain.store import Store

log = structlog.get_logger(__name__)

Sender = Callable[[OutboxItem], Outcome]
"""Makes one attempt over one channel; a receiver's faults come back as an Outcome."""


def make_senders(store: Store, webhook: WebhookConfig, email: EmailConfig) -> Mapping[str, Sender]:
    """The channels by their names in the outbox."""

    def by_webhook(item: OutboxItem) -> Outcome:
        return send_webhook(item, store.webhook_secrets(item.tenant), webhook)

    def by_email(item: OutboxItem) -> Outcome:
        try:
            batch = store.batch(item.tenant, item.batch_id)
        except NotFound:
            return Outcome(False, "the batch is gone", gone=True)
        return send_email(item, batch, email)

    return {"webhook": by_webhook, "email": by_email}


def attempt(
    item: OutboxItem, senders: Mapping[str, Sender], now: Callable[[], float], jitter: float
) -> DeliveryAttempt:
    """Try once; the attempt says when the next is due on the clock `now`, if there is one.

    Raises only where the service's own parts are away.
    """
    started = time.monotonic()
    send = senders.get(item.channel)
    if send is None:
        outcome = Outcome(False, f"no such channel: {item.channel}", gone=True)
    else:
        outcome = _sent(send, item)
    duration_s = time.monotonic() - started
    delay_s = None
    if not outcome.ok:
        delay_s = next_delay_s(
            item.attempts + 1,
            jitter=jitter,
            retry_after_s=outcome.retry_after_s,
            gone=outcome.gone,
        )
    return DeliveryAttempt(
        outbox_id=item.id,
        ok=outcome.ok,
        status_code=outcome.status_code,
        detail=outcome.detail,
        duration_s=duration_s,
        retry_at=None if delay_s is None else now() + delay_s,
    )


def _sent(send: Sender, item: OutboxItem) -> Outcome:
    """What came of it; a fault nobody foresaw counts too, else it would come back for ever."""
    try:
        return send(item)
    except QlmError:
        raise
    except Exception as error:
        log.exception("delivery_crashed", event_id=item.event_id, channel=item.channel)
        return Outcome(False, f"it could not be sent: {type(error).__name__}")
