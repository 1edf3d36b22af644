"""The single processes of the service, and its database, for running on several machines."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence

import click

from qlm_batch import bootstrap
from qlm_batch.control.clock import SystemClock
from qlm_batch.control.lifecycle import Service, run_services, stop_on_signals
from qlm_batch.domain.errors import ConfigurationError
from qlm_batch.logs import configure_logging
from qlm_batch.settings import Settings, load_settings


@click.command()
def api() -> None:
    """Run the REST API."""
    from qlm_batch.api.app import create_app, run_api
    from qlm_batch.api.services import ApiServices

    settings = _settings()
    store = bootstrap.open_store(settings)
    try:
        services = ApiServices(
            store=store,
            blobs=bootstrap.open_blobs(settings),
            settings=settings,
            calls=bootstrap.open_calls(settings, store) if settings.redis_url else None,
        )
        run_api(create_app(services), settings)
    finally:
        store.close()


@click.command()
def scheduler() -> None:
    """Run a scheduler; start two, and one stands by."""
    _run(bootstrap.scheduler_services)


@click.command()
def files() -> None:
    """Read submitted files in and write result files out."""
    # While lines are parsed, the thread that sends them waits for its turn with every chunk.
    sys.setswitchinterval(0.001)
    _run(bootstrap.file_services)


@click.command()
def callbacks() -> None:
    """Deliver webhooks and e-mails."""
    _run(bootstrap.callback_services)


@click.command()
def worker() -> None:
    """Run one instance: a Celery worker with its engines."""
    from qlm_workers.app import run_worker

    sys.exit(run_worker(_settings()))


@click.group()
def db() -> None:
    """Manage the database's schema."""


@db.command("upgrade")
@click.option("--revision", default="head", show_default=True, help="How far; head is the newest.")
def upgrade(revision: str) -> None:
    """Bring the schema of DATABASE_URL up to date."""
    from qlm_batch.store import migrate

    settings = _settings()
    if not settings.database_url:
        raise ConfigurationError("no database: set DATABASE_URL")
    before = migrate.current(settings.database_url)
    migrate.upgrade(settings.database_url, revision)
    after = migrate.current(settings.database_url)
    click.echo(f"schema {after}" if before == after else f"schema {before or 'empty'} → {after}")


def _settings() -> Settings:
    settings = load_settings()
    configure_logging(settings)
    return settings


def _run(build: Callable[[Settings, threading.Event], Sequence[Service]]) -> None:
    settings = _settings()
    stop = threading.Event()
    stop_on_signals(stop)
    sys.exit(run_services(build(settings, stop), SystemClock(stop), stop))
