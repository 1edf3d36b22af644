"""Completion events of the in-memory store, on their way out."""

from __future__ import annotations

import base64
import secrets
from collections.abc import Sequence
from dataclasses import replace

from qlm_batch.domain.jobs import DeliveryAttempt, OutboxItem
from qlm_batch.store.memory.state import Facet, SecretData, locked

_GRACE_S = 86_400.0


class MemoryOutbox(Facet):
    """OutboxStore in memory."""

    @locked
    def claim_outbox(self, holder: str, limit: int, lease_s: float) -> Sequence[OutboxItem]:
        """Due items, leased so that nobody else sends them meanwhile."""
        now = self.state.clock()
        due = [
            entry
            for entry in self.state.outbox.values()
            if entry.next_at is not None and entry.next_at <= now and entry.claim_until <= now
        ]
        due.sort(key=lambda entry: (entry.next_at or 0.0, entry.item.id))
        for entry in due[:limit]:
            entry.claim_until = now + lease_s
        return tuple(entry.item for entry in due[:limit])

    @locked
    def record_delivery(self, attempt: DeliveryAttempt) -> None:
        """Log an attempt and set what is next for its item."""
        entry = self.state.outbox.get(attempt.outbox_id)
        if entry is None:
            return
        entry.item = replace(entry.item, attempts=entry.item.attempts + 1)
        entry.next_at, entry.claim_until = attempt.retry_at, 0.0
        self.state.deliveries.append((entry.item, replace(attempt, at=self.state.clock())))

    @locked
    def deliveries(
        self, tenant: str, batch_id: str
    ) -> Sequence[tuple[OutboxItem, DeliveryAttempt]]:
        """The delivery log of a batch, oldest first."""
        self.state.batch_of(tenant, batch_id)
        return tuple(
            (self.state.outbox[item.id].item, attempt)
            for item, attempt in self.state.deliveries
            if item.batch_id == batch_id
        )

    @locked
    def replay_dead(self, tenant: str, batch_id: str) -> int:
        """Make the batch's dead deliveries due again, their attempts counted anew; how many."""
        self.state.batch_of(tenant, batch_id)
        ended = {item.id: attempt.ok for item, attempt in self.state.deliveries}
        dead = [
            entry
            for entry in self.state.outbox.values()
            if entry.item.batch_id == batch_id
            and entry.next_at is None
            and not ended.get(entry.item.id, True)
        ]
        for entry in dead:
            entry.item = replace(entry.item, attempts=0)
            entry.next_at = self.state.clock()
        return len(dead)

    @locked
    def webhook_secrets(self, tenant: str) -> Sequence[str]:
        """The tenant's `whsec_…` secrets, newest first."""
        now = self.state.clock()
        live = [s for s in self.state.secrets[tenant] if s.expires_at is None or s.expires_at > now]
        self.state.secrets[tenant] = live
        if not live:
            return (self.rotate_webhook_secret(tenant),)
        return tuple(secret.secret for secret in live)

    @locked
    def rotate_webhook_secret(self, tenant: str) -> str:
        """Add a fresh secret."""
        known = self.state.secrets[tenant]
        for secret in known:
            if secret.expires_at is None:
                secret.expires_at = self.state.clock() + _GRACE_S
        fresh = "whsec_" + base64.b64encode(secrets.token_bytes(24)).decode()
        known.insert(0, SecretData(fresh))
        return fresh
