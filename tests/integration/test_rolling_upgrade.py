"""What the running version does when a later one adds to its tables."""

from __future__ import annotations

from collections.abc import Iterator

import psycopg
import pytest
from cryptography.fernet import Fernet

from qlm_batch.domain.jobs import CHAT, BatchSpec, FilePurpose, FileRecord
from qlm_batch.store.postgres import PostgresStore

USES = 8
"""More than it takes until the driver prepares a statement at the server."""


@pytest.fixture
def store(postgres_url: str) -> Iterator[PostgresStore]:
    made = PostgresStore(postgres_url, secret_key=Fernet.generate_key(), pool_size=1)
    yield made
    made.close()


def test_a_column_that_is_added_disturbs_nothing(store: PostgresStore, postgres_url: str) -> None:
    store.add_file(
        FileRecord("file-1", "acme", FilePurpose.BATCH, "in.jsonl", 1, "00", "k", store.now())
    )
    made = store.create_batch("batch_1", BatchSpec("acme", CHAT, "file-1", "10m", 600.0))

    def everything() -> None:
        assert store.batch("acme", "batch_1").id == made.id
        assert store.snapshot().runs == ()
        assert list(store.export_lines("batch_1")) == []
        assert store.claim_outbox("me", 5, 30) == []

    for _ in range(USES):
        everything()
    with psycopg.connect(postgres_url, autocommit=True) as other:
        for table in ("batch", "slice", "run", "request", "result", "outbox"):
            other.execute(f"ALTER TABLE {table} ADD COLUMN later integer DEFAULT 7")
            everything()
