"""What a worker does with messages: hand them to the loop and return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import structlog
from celery import Celery
from celery.exceptions import InvalidTaskError
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

    def received(message: object) -> None:
        match _read(message):
            case Assigned(boot_id=boot_id):
                orders.wake(boot_id)
            case Interactive() as call:
                orders.interactive(call)

    def stopped(_state: object, message: object = None, **_: Any) -> None:
        if isinstance(_read(message), Stopped):
            orders.review()

    for name in (ASSIGNED_TASK, INTERACTIVE_TASK):
        app.task(name=name, ignore_result=True, Strategy=staticmethod(_at_once))(received)
    # Remote-control commands are registered per process, not per application.
    control_command(name=STOPPED_COMMAND, args=[("message", dict)])(stopped)


def _at_once(task: Any, _app: Celery, _consumer: Any, **_: object) -> Callable[..., None]:
    """Celery's way from a message to its task, without the pool and its threads.

    There is nothing to wait for, and a call's first token waits for every hop.
    """

    def receive(message: Any, *_: object) -> None:
        try:
            arguments = message.payload[1]
            task.run(arguments.get("message"))
        except (LookupError, TypeError, AttributeError) as error:
            raise InvalidTaskError(f"not a message of ours: {error!r}") from error

    return receive


def _read(message: object) -> wire.Message | None:
    try:
        return wire.decode(message)
    except InvalidInput as refusal:
        log.warning("message ignored", error=refusal.message)
        return None
