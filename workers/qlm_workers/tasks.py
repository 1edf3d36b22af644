"""What a worker does with messages: hand them to the loop and return."""

from __future__ import annotations

from typing import Any, Protocol

import structlog
from celery import Celery
from celery.worker.control import control_command

from qlm_batch.dispatch import wire
from qlm_batch.dispatch.celery_app import ASSIGNED_TASK, INTERACTIVE_TASK, STOPPED_COMMAND
from qlm_batch.domain.errors import InvalidInput
from qlm_batch.domain.messages import Assigned, Interactive, Stopped

log = structlog.get_logger(__name__)


class Orders(Protocol):
    """Who acts on messages; called from Celery's threads."""

    def wake(self, boot_id: str | None = None) -> None:
        """Slices were assigned to this boot."""
        ...

    def review(self) -> None:
        """Slices may have been closed."""
        ...

    def interactive(self, message: Interactive) -> None:
        """Somebody waits for the answer to this."""
        ...


def register(app: Celery, orders: Orders) -> None:
    """Receive messages on this application."""

    def assigned(message: object) -> None:
        hint = _read(message)
        if isinstance(hint, Assigned):
            orders.wake(hint.boot_id)

    def interactive(message: object) -> None:
        call = _read(message)
        if isinstance(call, Interactive):
            orders.interactive(call)

    def stopped(_state: object, message: object = None, **_: Any) -> None:
        if isinstance(_read(message), Stopped):
            orders.review()

    app.task(name=ASSIGNED_TASK, ignore_result=True)(assigned)
    app.task(name=INTERACTIVE_TASK, ignore_result=True)(interactive)
    # Remote-control commands are registered per process, not per application.
    control_command(name=STOPPED_COMMAND, args=[("message", dict)])(stopped)


def _read(message: object) -> wire.Message | None:
    try:
        return wire.decode(message)
    except InvalidInput as refusal:
        log.warning("message ignored", error=refusal.message)
        return None
