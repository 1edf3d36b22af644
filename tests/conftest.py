"""Real servers for the tests: one PostgreSQL and one Valkey per session, a fresh database each."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
import redis
from hypothesis import HealthCheck, settings

from qlm_batch.embedded.folders import Folders
from qlm_batch.embedded.postgres import EmbeddedPostgres
from qlm_batch.embedded.valkey import EmbeddedValkey
from qlm_batch.store import migrate

_numbers = itertools.count()

# A loaded machine may take its time over any example, and over making any.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

# The threads of a CPU engine spin while they wait, which starves everything on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def no_clusters_left(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Remove the clusters that services started as root keep outside pytest's own folders."""
    yield
    for link in tmp_path_factory.getbasetemp().rglob("postgres"):
        if link.is_symlink():
            shutil.rmtree(link.resolve().parent, ignore_errors=True)


@pytest.fixture(scope="session")
def server_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Folders]:
    """Folders for the session's servers, gone afterwards."""
    folders = Folders.under(tmp_path_factory.mktemp("servers"))
    yield folders
    folders.remove_all()


@pytest.fixture(scope="session")
def postgres(server_folders: Folders) -> Iterator[EmbeddedPostgres]:
    """The session's PostgreSQL, with a migrated database `template` to copy from."""
    server = EmbeddedPostgres(server_folders)
    server.start()
    with psycopg.connect(server.url_of("postgres"), autocommit=True) as admin:
        admin.execute("CREATE DATABASE template_qlm")
    migrate.upgrade(server.url_of("template_qlm"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def valkey(server_folders: Folders) -> Iterator[EmbeddedValkey]:
    """The session's Valkey."""
    server = EmbeddedValkey(server_folders)
    server.start()
    yield server
    server.stop()


@pytest.fixture
def empty_postgres_url(postgres: EmbeddedPostgres) -> Iterator[str]:
    """The URL of a database without any table."""
    yield from _database(postgres, "template1")


@pytest.fixture
def postgres_url(postgres: EmbeddedPostgres) -> Iterator[str]:
    """The URL of a fresh, migrated database."""
    yield from _database(postgres, "template_qlm")


def _database(postgres: EmbeddedPostgres, template: str) -> Iterator[str]:
    name = f"t{next(_numbers)}"
    with psycopg.connect(postgres.url_of("postgres"), autocommit=True) as admin:
        admin.execute(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY file_copy")
        yield postgres.url_of(name)
        admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def redis_url(valkey: EmbeddedValkey) -> Iterator[str]:
    """The URL of an empty Redis-compatible server."""
    yield valkey.url
    client = redis.Redis(unix_socket_path=valkey.url.split("//")[1].split("?")[0])
    client.flushall()
    client.close()


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """An empty data folder."""
    folder = tmp_path / "data"
    folder.mkdir()
    return folder
