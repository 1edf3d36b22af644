"""What travels over Celery. Losing any of it costs only latency."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Assigned:
    """Slices were assigned to this boot of an instance; it should claim them now."""

    instance: str
    boot_id: str


@dataclass(frozen=True, slots=True)
class Stopped:
    """A batch's slices were closed or taken back; holders should look at their leases now."""

    batch_id: str


@dataclass(frozen=True, slots=True)
class Interactive:
    """A call for this boot of an instance, whole, so that it can start without asking the store.

    `epoch` is the lease it was stored under; `due_at` when its first token is due (Unix time);
    `inbox` where the process that waits reads the answer.
    """

    request_id: str
    epoch: int
    instance: str
    boot_id: str
    tenant: str
    endpoint: str
    model: str
    body: str
    streamed: bool
    due_at: float
    inbox: str
