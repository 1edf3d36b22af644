"""Celery's worker around the engines: hints in the main thread, engines in their own."""

from __future__ import annotations

from typing import Any

from celery import Celery, bootsteps
from celery.worker import WorkController
from celery.worker import state as celery_state

from qlm_batch.dispatch.celery_app import batch_queue, interactive_queue
from qlm_workers import tasks
from qlm_workers.exits import Exit
from qlm_workers.lifecycle import EngineThread, exit_soon

HINT_THREADS = 2


def serve(celery: Celery, engines: EngineThread, instance: str) -> None:
    """Receive hints until the engines have ended; a broker that is away is waited for."""
    tasks.register(celery, engines)
    celery.engines = engines
    celery.steps["worker"].add(EngineStep)
    controller = WorkController(
        app=celery,
        hostname=f"worker@{instance}",
        pool_cls="threads",
        concurrency=HINT_THREADS,
        queues=[interactive_queue(instance), batch_queue(instance)],
        without_gossip=True,
        without_mingle=True,
        without_heartbeat=True,
        task_events=False,
    )
    controller.start()
    engines.end()
    engines.join()


class EngineStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Owns the engines within Celery's worker: starts them before any broker is needed."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, parent: Any, **options: Any) -> None:
        super().__init__(parent, **options)
        self._engines: EngineThread = parent.app.engines

    def start(self, parent: Any) -> None:
        """Start the loop thread."""
        self._engines.start()

    def stop(self, parent: Any) -> None:
        """Give all leases back and stop the engines."""
        self._engines.end()
        self._engines.join()

    terminate = stop


def ended(verdict: Exit) -> None:
    """Bring the rest of the process to its end once the engines have ended."""
    exit_soon(verdict)
    # Celery's main loop looks at this flag at least once a second, also while it reconnects.
    celery_state.should_stop = int(verdict)
