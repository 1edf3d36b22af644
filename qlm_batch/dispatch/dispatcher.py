"""The dispatcher over Celery: sends hints, and shrugs when they cannot be sent."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import structlog
from kombu.exceptions import KombuError, OperationalError
from redis.exceptions import RedisError

from qlm_batch.dispatch import wire
from qlm_batch.dispatch.celery_app import (
    ASSIGNED_TASK,
    BATCH_PRIORITY,
    STOPPED_COMMAND,
    batch_queue,
    make_app,
)
from qlm_batch.domain.messages import Assigned, Stopped

log = structlog.get_logger(__name__)

SEND_TIMEOUT_S = 1.0
"""How long a hint may hold its sender up; workers poll the store anyway."""


class CeleryDispatcher:
    """Hints over Celery. Never raises for a broker that is away; logs once per outage."""

    def __init__(self, redis_url: str, *, timeout_s: float = SEND_TIMEOUT_S) -> None:
        self._app: Any = make_app(redis_url, timeout_s=timeout_s)
        self._away = False
        self._lock = threading.Lock()

    def assigned(self, message: Assigned) -> None:
        """Tell an instance that slices wait for it."""
        self._send(
            lambda: self._app.send_task(
                ASSIGNED_TASK,
                kwargs={"message": wire.encode(message)},
                queue=batch_queue(message.instance),
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

    def close(self) -> None:
        """Give the connections back."""
        self._app.close()

    def _send(self, send: Callable[[], object]) -> None:
        try:
            send()
        except (KombuError, OperationalError, RedisError, OSError) as error:
            with self._lock:
                first, self._away = not self._away, True
            if first:
                log.warning("broker is away; workers poll until it is back", error=str(error))
            return
        with self._lock:
            back, self._away = self._away, False
        if back:
            log.info("broker is back")
