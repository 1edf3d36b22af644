"""What a worker does with hints: hand them to the loop and return."""

from __future__ import annotations

from typing import Any, Protocol

import structlog
from celery import Celery
from celery.worker.control import control_command

from qlm_batch.dispatch import wire
from qlm_batch.dispatch.celery_app import ASSIGNED_TASK, STOPPED_COMMAND
from qlm_batch.domain.errors import InvalidInput
from qlm_batch.domain.messages import Assigned, Stopped

log = structlog.get_logger(__name__)


class Orders(Protocol):
    """Who acts on hints; called from Celery's threads."""

    def wake(self, boot_id: str | None = None) -> None:
        """Slices were assigned to this boot."""
        ...

    def review(self) -> None:
        """Slices may have been closed."""
        ...


def register(app: Celery, orders: Orders) -> None:
    """Receive hints on this application."""

    def assigned(message: object) -> None:
        hint = _read(message)
        if isinstance(hint, Assigned):
            orders.wake(hint.boot_id)

    def stopped(_state: object, message: object = None, **_: Any) -> None:
        if isinstance(_read(message), Stopped):
            orders.review()

    app.task(name=ASSIGNED_TASK, ignore_result=True)(assigned)
    # Remote-control commands are registered per process, not per application.
    control_command(name=STOPPED_COMMAND, args=[("message", dict)])(stopped)


def _read(message: object) -> wire.Message | None:
    try:
        return wire.decode(message)
    except InvalidInput as refusal:
        log.warning("hint ignored", error=refusal.message)
        return None
