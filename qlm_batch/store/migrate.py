"""Bringing a database's tables to a revision, with the migrations of this checkout or wheel."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy.engine import Connection

import qlm_batch
from qlm_batch.domain.errors import ConfigurationError
from qlm_batch.store import fleet_tables, tables
from qlm_batch.store.columns import METADATA
from qlm_batch.store.session import Database, make_engine

__all__ = ["METADATA", "current", "downgrade", "folder", "head", "is_current", "upgrade"]

_DECLARED = (tables, fleet_tables)
_LOCK = 0x716C6D
"""Held while migrating: two processes that start together must not both run one."""


@cache
def folder() -> Path:
    """Where the migrations are: a checkout's, else those shipped in the wheel."""
    package = Path(qlm_batch.__file__).parent
    for candidate in (package.parent / "migrations", package / "_migrations"):
        if (candidate / "alembic.ini").is_file():
            return candidate
    raise ConfigurationError("The migrations are missing from this installation; install it anew.")


def _config(connection: Connection | None = None) -> Config:
    config = Config(folder() / "alembic.ini")
    config.attributes["connection"] = connection
    return config


@cache
def head() -> str:
    """The newest revision."""
    revision = ScriptDirectory.from_config(_config()).get_current_head()
    if revision is None:
        raise ConfigurationError("There are no migrations in this installation; install it anew.")
    return revision


def revision_of(connection: Connection) -> str | None:
    """The revision of the connected database; None when it has no tables yet."""
    return MigrationContext.configure(connection).get_current_revision()


def _database(url: str) -> Database:
    return Database(make_engine(url, pool_size=1, statement_timeout_s=0, idle_in_transaction_s=0))


def _migrate(url: str, revision: str, *, up: bool) -> None:
    database = _database(url)
    try:
        with database.transaction() as connection:
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_LOCK)))
            move = command.upgrade if up else command.downgrade
            move(_config(connection), revision)
    except CommandError as error:
        raise ConfigurationError(
            f"The database's schema cannot be brought to {revision}: {error}. What a newer release"
            " has brought forward needs that release, or a newer one."
        ) from error
    finally:
        database.close()


def upgrade(url: str, revision: str = "head") -> None:
    """Bring the tables forward to `revision`; nothing happens when they are there already.

    ConfigurationError where `revision`, or the one the tables are at, is unknown here.
    """
    _migrate(url, revision, up=True)


def downgrade(url: str, revision: str) -> None:
    """Take the tables back to `revision`; `base` removes them with all they hold."""
    _migrate(url, revision, up=False)


def current(url: str) -> str | None:
    """The database's revision; None when it has no tables yet."""
    database = _database(url)
    try:
        with database.transaction() as connection:
            return revision_of(connection)
    finally:
        database.close()


def is_current(url: str) -> bool:
    """Whether the database has the newest revision."""
    return current(url) == head()
