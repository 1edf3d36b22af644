"""Delivers completion events from the outbox."""

from __future__ import annotations

import random
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import structlog

from qlm_batch.callbacks.deliver import Sender, attempt, make_senders
from qlm_batch.callbacks.email import EmailConfig
from qlm_batch.callbacks.webhook import WebhookConfig
from qlm_batch.domain.jobs import OutboxItem
from qlm_batch.domain.store import Store
from qlm_batch.failpoints import failpoint
from qlm_batch.settings import Settings

log = structlog.get_logger(__name__)

_RESOLVER_S = 60.0
"""Longest a name look-up is taken to block."""


@dataclass(frozen=True, slots=True)
class CallbackConfig:
    """At most `concurrency` deliveries run at once; `lease_s` must outlast the slowest of them."""

    holder: str
    webhook: WebhookConfig
    email: EmailConfig
    concurrency: int = 16
    lease_s: float = 120.0
    idle_s: float = 0.5

    @classmethod
    def of(cls, settings: Settings, holder: str) -> CallbackConfig:
        """The configuration these settings ask for."""
        timeout_s = settings.webhook_timeout_s
        public_url = settings.public_url or f"http://{settings.host}:{settings.port}"
        return cls(
            holder=holder,
            webhook=WebhookConfig(timeout_s=timeout_s, allow=settings.webhook_allow),
            email=EmailConfig(settings.smtp_url, settings.email_from, public_url, timeout_s),
            lease_s=2 * timeout_s + _RESOLVER_S,
        )


@dataclass(frozen=True, slots=True)
class CallbackResult:
    """One pass: how many deliveries it started."""

    started: int = 0

    def __bool__(self) -> bool:
        return self.started > 0


class CallbackService:
    """Keeps deliveries going, each on a thread of a bounded pool.

    A slow receiver holds one thread for its time-out and nothing else. Delivery is at least once:
    what a crash leaves unrecorded is sent again, under the same event id, when its lease ends.
    """

    name = "callbacks"

    def __init__(
        self, store: Store, config: CallbackConfig, senders: Mapping[str, Sender] | None = None
    ) -> None:
        self._store = store
        self._config = config
        self._senders = senders or make_senders(store, config.webhook, config.email)
        self._pool = ThreadPoolExecutor(config.concurrency, thread_name_prefix="delivery")
        self._running: set[Future[None]] = set()
        self.idle_s = config.idle_s

    def run_once(self) -> CallbackResult:
        """Start as many due deliveries as threads are free; raises what an earlier one raised."""
        self._collect()
        free = self._config.concurrency - len(self._running)
        if free <= 0:
            return CallbackResult()
        items = self._store.claim_outbox(self._config.holder, free, self._config.lease_s)
        for item in items:
            self._running.add(self._pool.submit(self._deliver, item))
        return CallbackResult(len(items))

    @property
    def running(self) -> int:
        """Deliveries under way."""
        return sum(not future.done() for future in self._running)

    def close(self) -> None:
        """Let the deliveries under way finish; each is bounded by its time-out."""
        self._pool.shutdown(wait=True)
        self._collect()

    def _collect(self) -> None:
        done = {future for future in self._running if future.done()}
        self._running -= done
        failures = [error for future in done if (error := future.exception()) is not None]
        for error in failures[1:]:
            log.error("delivery_crashed", exc_info=error)
        if failures:
            raise failures[0]

    def _deliver(self, item: OutboxItem) -> None:
        jitter = random.random()  # noqa: S311 - spreads load, guards nothing
        made = attempt(item, self._senders, self._store.now, jitter)
        failpoint("outbox.sent")
        self._store.record_delivery(made)
        entry = log.bind(
            event_id=item.event_id, batch=item.batch_id, channel=item.channel, detail=made.detail
        )
        if made.ok:
            entry.info("callback_delivered")
        elif made.retry_at is None:
            entry.error("callback_dead", attempts=item.attempts + 1)
        else:
            entry.warning("callback_failed", attempts=item.attempts + 1)
