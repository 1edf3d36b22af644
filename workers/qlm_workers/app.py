"""The worker process, put together from settings."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Protocol

import structlog

from qlm_batch.bootstrap import open_store
from qlm_batch.dispatch.celery_app import make_app
from qlm_batch.dispatch.streams import TokenWriter
from qlm_batch.domain.errors import ConfigurationError
from qlm_batch.domain.store import InteractiveStore
from qlm_batch.ids import new_id
from qlm_batch.settings import Settings
from qlm_workers.adapters import adapters_of
from qlm_workers.engines import make_engine
from qlm_workers.exits import Exit
from qlm_workers.hosts import Host
from qlm_workers.interactive import InteractiveDesk
from qlm_workers.lifecycle import EngineThread, end_on_signals
from qlm_workers.link import WorkerStore
from qlm_workers.meter import Meter
from qlm_workers.naming import parse_model, served_name, shown, told_length
from qlm_workers.room import models_that_fit
from qlm_workers.runner import Runner
from qlm_workers.witness import Witness
from qlm_workers.worker import ended, serve

log = structlog.get_logger(__name__)

BOOT = "boot_"


def run_worker(settings: Settings) -> int:
    """Run one instance until it ends; returns the process's exit status (see `exits`).

    Call from the main thread. ConfigurationError when the settings cannot work.
    """
    if not settings.models:
        raise ConfigurationError(
            'this worker hosts no model: set QLM_MODELS to a JSON list, as ["Qwen/Qwen3-8B"]'
        )
    celery = make_app(settings.redis_url, instance=settings.instance)
    store = open_store(settings)
    # Claims make thousands of objects at a time; at the usual thresholds each one is a collection.
    gc.set_threshold(50_000, 20, 20)
    # A claim or a flush is a dozen waits for the server, and after each its thread needs a turn.
    sys.setswitchinterval(0.001)
    boot_id = new_id(BOOT)
    try:
        engines = EngineThread(make_runner(settings, store, boot_id), on_end=ended)
        witness = Witness(
            settings.database_url,
            settings.instance,
            boot_id,
            patience_s=settings.instance_silent_s,
        )
        end_on_signals(engines)
        serve(celery, engines, settings.instance)
        verdict = engines.verdict
    finally:
        store.close()
    if verdict is not Exit.ENGINE_HUNG:
        # Only a boot with a hung engine leaves without giving back what it holds.
        witness.release()
    if verdict is None or (verdict is Exit.OK and not engines.told_to_end):
        # Celery's own loop gave up: the engines ended in order, but nobody asked for it.
        verdict = Exit.CRASHED
    return int(verdict)


class Storage(WorkerStore, InteractiveStore, Protocol):
    """The part of the store a worker process uses."""


def make_runner(settings: Settings, store: Storage, boot_id: str) -> Runner:
    """The runner of a fresh boot, so named, with an engine, not started yet, for each model."""
    device = device_name(settings)
    fits = models_that_fit(settings, on_gpu=bool(_cards()))
    settings = settings.model_copy(update={"models_awake": fits})
    if settings.swaps:
        log.info("models take turns", awake=fits, hosted=len(settings.models))
    adapters = adapters_of(settings)
    hosts = []
    for model, kind in map(parse_model, settings.models):
        name = served_name(model)
        own = tuple(adapter for adapter in adapters if adapter.base == name)
        meters = [
            Meter(settings.instance, device, each)
            for each in (name, *(adapter.name for adapter in own))
        ]
        engine = make_engine(settings, model, kind, own)
        hosts.append(Host(name, kind, engine, *meters, told=told_length(settings, model)))
    log.info("worker boots", instance=settings.instance, boot_id=boot_id, device=device)
    desk = InteractiveDesk(store, TokenWriter(settings.redis_url), flush_s=settings.flush_s)
    return Runner(store, hosts, settings, boot_id=boot_id, device=device, desk=desk)


def device_name(settings: Settings) -> str:
    """What the profiles of this worker's device are filed under."""
    if settings.engine == "simulated":
        return "simulated"
    if settings.engine == "openai":
        return f"server:{shown(settings.engine_url)}"
    for card in _cards():
        for line in card.read_text().splitlines():
            key, _, value = line.partition(":")
            if key == "Model":
                return value.strip()
    return "cpu"


def _cards() -> list[Path]:
    return sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
