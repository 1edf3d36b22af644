"""Ended batches are found by when they ended; runs of forgotten ones wait for their lines to go."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index(
        "ix_batch_ended",
        "batch",
        [sa.text("coalesce(completed_at, failed_at, expired_at, cancelled_at)")],
    )
    op.create_table(
        "forgotten_run",
        sa.Column("run_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("requests", sa.BigInteger(), server_default="0", nullable=False),
        sa.PrimaryKeyConstraint("run_id", name=op.f("pk_forgotten_run")),
    )


def downgrade() -> None:
    # Nothing else would find these lines again.
    for table in ("result", "request"):
        op.execute(f"DELETE FROM {table} WHERE run_id IN (SELECT run_id FROM forgotten_run)")
    op.drop_table("forgotten_run")
    op.drop_index("ix_batch_ended", table_name="batch")
