"""The worker process: Celery receives hints in the main thread, engines run in their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import structlog
from celery import Celery, bootsteps
from celery.worker import WorkController
from celery.worker import state as celery_state

from qlm_batch.bootstrap import open_store
from qlm_batch.dispatch.celery_app import batch_queue, interactive_queue, make_app
from qlm_batch.domain.errors import ConfigurationError
from qlm_batch.ids import new_id
from qlm_batch.settings import Settings
from qlm_workers import tasks
from qlm_workers.engines import make_engine, served_name
from qlm_workers.exits import Exit
from qlm_workers.hosts import Host, parse_model
from qlm_workers.lifecycle import EngineThread, end_on_signals, exit_soon
from qlm_workers.link import WorkerStore
from qlm_workers.meter import Meter
from qlm_workers.runner import Runner

log = structlog.get_logger(__name__)

BOOT = "boot_"
HINT_THREADS = 2


def run_worker(settings: Settings) -> int:
    """Run one instance until it ends; returns the process's exit status (see `exits`).

    Call from the main thread. ConfigurationError when the settings cannot work.
    """
    if not settings.models:
        raise ConfigurationError("this worker hosts no model: set QLM_MODELS, or pass --model")
    celery = make_app(settings.redis_url, instance=settings.instance)
    store = open_store(settings)
    try:
        engines = EngineThread(make_runner(settings, store), on_end=_ended)
        end_on_signals(engines)
        serve(celery, engines, settings.instance)
        verdict = engines.verdict
    finally:
        store.close()
    return int(Exit.CRASHED if verdict is None else verdict)


def make_runner(settings: Settings, store: WorkerStore) -> Runner:
    """The runner of a fresh boot, with an engine, not started yet, for each model."""
    device = device_name(settings)
    hosts = []
    for model, kind in map(parse_model, settings.models):
        name = served_name(model)
        meter = Meter(settings.instance, device, name)
        hosts.append(Host(name, kind, make_engine(settings, model, kind), meter))
    boot_id = new_id(BOOT)
    log.info("worker boots", instance=settings.instance, boot_id=boot_id, device=device)
    return Runner(store, hosts, settings, boot_id=boot_id, device=device)


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


def device_name(settings: Settings) -> str:
    """What the profiles of this worker's device are filed under."""
    if settings.engine == "simulated":
        return "simulated"
    if settings.engine == "openai":
        return f"server:{settings.engine_url}"
    for card in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in card.read_text().splitlines():
            key, _, value = line.partition(":")
            if key == "Model":
                return value.strip()
    return "cpu"


def _ended(verdict: Exit) -> None:
    exit_soon(verdict)
    # Celery's main loop looks at this flag at least once a second, also while it reconnects.
    celery_state.should_stop = int(verdict)
