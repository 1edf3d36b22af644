"""The migrations make exactly the tables that are declared, and can be undone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy.engine import Engine

from qlm_batch.domain.errors import ConfigurationError
from qlm_batch.store import migrate
from qlm_batch.store.session import make_engine

_CHECKS = """
    SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint
    WHERE contype IN ('c', 'u', 'f') AND connamespace = 'public'::regnamespace ORDER BY 1, 2
"""
_INDEXES = "SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = 'public' ORDER BY 1"
_STORAGE = """
    SELECT relname, reloptions FROM pg_class
    WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' ORDER BY 1
"""
_COLUMNS = """
    SELECT table_name, column_name, data_type, is_nullable, column_default, is_identity
    FROM information_schema.columns WHERE table_schema = 'public' ORDER BY 1, 2
"""


@pytest.fixture
def engine(empty_postgres_url: str) -> Iterator[Engine]:
    made = make_engine(empty_postgres_url, pool_size=2)
    yield made
    made.dispose()


def _shape(engine: Engine) -> dict[str, list[tuple[object, ...]]]:
    """Everything the catalogue says of our tables; Alembic's own one is left out."""
    with engine.begin() as connection:
        return {
            name: [
                tuple(row)
                for row in connection.execute(sa.text(query))
                if "alembic_version" not in str(row)
            ]
            for name, query in {
                "constraints": _CHECKS,
                "indexes": _INDEXES,
                "storage": _STORAGE,
                "columns": _COLUMNS,
            }.items()
        }


def test_migrated_tables_are_the_declared_ones(empty_postgres_url: str, engine: Engine) -> None:
    migrate.METADATA.create_all(engine)
    declared = _shape(engine)
    migrate.METADATA.drop_all(engine)
    migrate.upgrade(empty_postgres_url)
    assert _shape(engine) == declared
    with engine.begin() as connection:
        assert compare_metadata(MigrationContext.configure(connection), migrate.METADATA) == []


def test_there_is_one_head() -> None:
    script = ScriptDirectory.from_config(Config(migrate.folder() / "alembic.ini"))
    assert script.get_heads() == [migrate.head()]


def test_migrations_go_up_down_and_up_again(empty_postgres_url: str, engine: Engine) -> None:
    assert migrate.current(empty_postgres_url) is None
    migrate.upgrade(empty_postgres_url)
    assert migrate.is_current(empty_postgres_url)
    first = _shape(engine)
    migrate.downgrade(empty_postgres_url, "base")
    assert not migrate.is_current(empty_postgres_url)
    assert _shape(engine)["columns"] == []
    migrate.upgrade(empty_postgres_url)
    assert _shape(engine) == first


def test_upgrading_a_current_database_changes_nothing(postgres_url: str) -> None:
    migrate.upgrade(postgres_url)
    assert migrate.is_current(postgres_url)


def test_a_database_of_a_newer_release_is_told(empty_postgres_url: str, engine: Engine) -> None:
    migrate.upgrade(empty_postgres_url)
    with engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(ConfigurationError, match="9999"):
        migrate.upgrade(empty_postgres_url)
