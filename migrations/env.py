"""Runs migrations on the connection that `qlm_batch.store.migrate` hands over."""

from __future__ import annotations

from alembic import context

from qlm_batch.store.migrate import METADATA

context.configure(connection=context.config.attributes["connection"], target_metadata=METADATA)
with context.begin_transaction():
    context.run_migrations()
