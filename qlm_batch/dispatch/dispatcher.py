"""The dispatcher over Celery: hints, whose loss it shrugs at, and interactive requests."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import structlog
from kombu import Queue
from kombu.exceptions import KombuError, OperationalError
from redis.exceptions import RedisError

from qlm_batch.dispatch import wire
from qlm_batch.dispatch.celery_app import (
    ASSIGNED_TASK,
    BATCH_PRIORITY,
    INTERACTIVE_PRIORITY,
    INTERACTIVE_TASK,
    STOPPED_COMMAND,
    batch_queue,
    interactive_queue,
    make_app,
)
from qlm_batch.domain.errors import Unavailable
from qlm_batch.domain.messages import Assigned, Interactive, Stopped

log = structlog.get_logger(__name__)

SEND_TIMEOUT_S = 1.0
"""How long a hint may hold its sender up; workers poll the store anyway."""
KEPT_S = 600.0
"""How long after the last message a queue is kept whose instance takes none: it may never return,
and calls have whole bodies."""


class CeleryDispatcher:
    """Messages over Celery. A broker that is away is logged once per outage.

    Hints never raise for it. Safe to share between threads; `connections` may send at a time.
    """

    def __init__(
        self, redis_url: str, *, timeout_s: float = SEND_TIMEOUT_S, connections: int = 2
    ) -> None:
        self._app: Any = make_app(redis_url, timeout_s=timeout_s, connections=connections)
        self._away = False
        self._lock = threading.Lock()

    def assigned(self, message: Assigned) -> None:
        """Tell an instance that slices wait for it."""
        self._send(
            lambda: self._app.send_task(
                ASSIGNED_TASK,
                kwargs={"message": wire.encode(message)},
                queue=_passing(batch_queue(message.instance)),
                priority=BATCH_PRIORITY,
                ignore_result=True,
                retry=False,
            )
        )

    def stopped(self, message: Stopped) -> None:
        """Tell every worker that a batch's slices were closed."""
        self._send(
            lambda: self._app.control.broadcast(
                STOPPED_COMMAND, arguments={"message": wire.encode(message)}, reply=False
            )
        )

    def interactive(self, message: Interactive) -> None:
        """Send a call to its instance, ahead of all hints. Unavailable when it cannot be sent."""
        sent = self._send(
            lambda: self._app.send_task(
                INTERACTIVE_TASK,
                kwargs={"message": wire.encode(message)},
                # Celery would repeat the beginning of the body in a header.
                kwargsrepr="",
                queue=_passing(interactive_queue(message.instance)),
                priority=INTERACTIVE_PRIORITY,
                ignore_result=True,
                retry=False,
            )
        )
        if not sent:
            raise Unavailable("The way to the engines is interrupted; try again.")

    def close(self) -> None:
        """Give the connections back."""
        self._app.close()

    def _send(self, send: Callable[[], object]) -> bool:
        try:
            send()
        except (KombuError, OperationalError, RedisError, OSError) as error:
            with self._lock:
                first, self._away = not self._away, True
            if first:
                log.warning("broker is away; workers poll until it is back", error=str(error))
            return False
        with self._lock:
            back, self._away = self._away, False
        if back:
            log.info("broker is back")
        return True


def _passing(name: str) -> Queue:
    """The queue of this name, which ends by itself."""
    return Queue(name, routing_key=name, expires=KEPT_S)
