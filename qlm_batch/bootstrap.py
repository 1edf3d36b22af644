"""The composition root: builds the real parts from settings, for the entry points alone."""

from __future__ import annotations

import base64
import hashlib
import os
import socket
import threading
from collections.abc import Sequence

from qlm_batch.control.callback_service import CallbackConfig, CallbackService
from qlm_batch.control.clock import SystemClock
from qlm_batch.control.export_service import ExportConfig, ExportService
from qlm_batch.control.intake_service import IntakeConfig, IntakeService
from qlm_batch.control.interactive import THREADS as CALL_THREADS
from qlm_batch.control.interactive import Calls, CallStore
from qlm_batch.control.interactive_sweep import InteractiveSweep, InteractiveSweepConfig
from qlm_batch.control.leadership import Leadership
from qlm_batch.control.lifecycle import Service
from qlm_batch.control.reaper import Reaper, ReaperConfig
from qlm_batch.control.recording import Recorder
from qlm_batch.control.retention import RetentionConfig, RetentionService
from qlm_batch.control.scheduler_loop import SchedulerConfig, SchedulerLoop
from qlm_batch.dispatch.dispatcher import CeleryDispatcher
from qlm_batch.dispatch.streams import TokenReader
from qlm_batch.domain.errors import ConfigurationError
from qlm_batch.domain.ports import BlobStore, Dispatcher
from qlm_batch.intake.blobs import make_blobs
from qlm_batch.scheduling.loops import compile_all, hold_compiling
from qlm_batch.scheduling.policies import policy
from qlm_batch.settings import Settings
from qlm_batch.store.postgres import PostgresStore


def open_store(settings: Settings, *, pool_size: int = 8) -> PostgresStore:
    """The Postgres store; ConfigurationError when no database is named."""
    if not settings.database_url:
        raise ConfigurationError(
            "no database: set DATABASE_URL, or use `qlm up`, which starts one of its own"
        )
    return PostgresStore(
        settings.database_url,
        secret_key=encryption_key(settings),
        instance_silent_s=settings.instance_silent_s,
        pool_size=pool_size,
    )


def open_blobs(settings: Settings) -> BlobStore:
    """Where the bytes of files are."""
    return make_blobs(settings)


def open_dispatcher(settings: Settings) -> Dispatcher:
    """Hints over Celery; ConfigurationError when no broker is named."""
    if not settings.redis_url:
        raise ConfigurationError(
            "no broker: set REDIS_URL, or use `qlm up`, which starts one of its own"
        )
    return CeleryDispatcher(settings.redis_url)


def open_calls(settings: Settings, store: CallStore) -> Calls:
    """The way of interactive requests to the engines; ConfigurationError without a broker."""
    if not settings.redis_url:
        raise ConfigurationError(
            "no broker: set REDIS_URL, or use `qlm up`, which starts one of its own"
        )
    return Calls(
        store,
        CeleryDispatcher(settings.redis_url, connections=CALL_THREADS),
        TokenReader(settings.redis_url),
        most_open=settings.interactive_open,
    )


def scheduler_services(settings: Settings, stop: threading.Event) -> Sequence[Service]:
    """The loop and the reaper, which lead or stand by together, and a sweep."""
    store, leadership = open_store(settings), Leadership()
    # The first start after an installation compiles for up to a minute; plans do not wait for it.
    hold_compiling()
    threading.Thread(target=compile_all, name="compile", daemon=True).start()
    loop = SchedulerLoop(
        store,
        open_dispatcher(settings),
        policy(settings.policy),
        SchedulerConfig(holder=holder(), term_s=settings.leader_term_s, tick_s=settings.tick_s),
        leadership,
        open_recorder(settings),
    )
    reaper = Reaper(store, SystemClock(stop), leadership, ReaperConfig(lease_s=settings.lease_s))
    sweep = InteractiveSweep(store, InteractiveSweepConfig.of(settings))
    return (loop, reaper, sweep)


def open_recorder(settings: Settings) -> Recorder | None:
    """The log that is asked for; ConfigurationError when it cannot be written."""
    if settings.record is None:
        return None
    try:
        return Recorder(settings.record, append=True)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        raise ConfigurationError(
            f"record: {settings.record} cannot be written ({why}); set QLM_RECORD to a"
            " file of this process alone in a folder that exists and is writable"
        ) from None


def file_services(settings: Settings, stop: threading.Event) -> Sequence[Service]:
    """Intake, export and retention."""
    store, blobs, name = open_store(settings), open_blobs(settings), holder()
    return (
        IntakeService(store, blobs, IntakeConfig.of(settings, name)),
        ExportService(store, blobs, ExportConfig.of(settings, name)),
        RetentionService(store, blobs, RetentionConfig.of(settings)),
    )


def callback_services(settings: Settings, stop: threading.Event) -> Sequence[Service]:
    """Delivery of webhooks and e-mails."""
    return (CallbackService(open_store(settings), CallbackConfig.of(settings, holder())),)


def encryption_key(settings: Settings) -> bytes:
    """The Fernet key for secrets at rest, derived from `secret_key`."""
    if not settings.secret_key:
        raise ConfigurationError("no secret key: set QLM_SECRET_KEY to a long random text")
    return base64.urlsafe_b64encode(hashlib.sha256(settings.secret_key.encode()).digest())


def holder() -> str:
    """A name for this process in leases, unique among living processes."""
    return f"{socket.gethostname()}-{os.getpid()}-{os.urandom(3).hex()}"
