"""Every store passes the same suite."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest

from qlm_batch.embedded.postgres import EmbeddedPostgres
from tests.contract.harness import Bench, MemoryHarness, PostgresHarness, StoreHarness


@pytest.fixture(scope="session")
def shared_postgres(postgres: EmbeddedPostgres) -> Iterator[PostgresHarness]:
    """One migrated database for the whole suite: emptying it is quicker than copying another."""
    with psycopg.connect(postgres.url_of("postgres"), autocommit=True) as admin:
        admin.execute("CREATE DATABASE contract TEMPLATE template_qlm STRATEGY file_copy")
    harness = PostgresHarness(postgres.url_of("contract"))
    yield harness
    harness.close()


@pytest.fixture
def postgres_harness(shared_postgres: PostgresHarness) -> PostgresHarness:
    """An empty PostgreSQL store."""
    shared_postgres.truncate()
    return shared_postgres


@pytest.fixture(params=["memory", "postgres"])
def harness(request: pytest.FixtureRequest) -> StoreHarness:
    """An empty store."""
    if request.param == "memory":
        return MemoryHarness()
    found: StoreHarness = request.getfixturevalue("postgres_harness")
    return found


@pytest.fixture
def bench(harness: StoreHarness) -> Bench:
    """An empty store, with short words for what tests do."""
    return Bench(harness)
