"""What travels over Celery: hints. Losing any of them costs only latency."""

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
