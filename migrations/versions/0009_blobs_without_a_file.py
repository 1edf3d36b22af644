"""Blobs that may lie in the storage although no file owns them."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "unowned_blob",
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("since", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_unowned_blob")),
    )
    op.create_index("ix_unowned_blob_since", "unowned_blob", ["since"])


def downgrade() -> None:
    op.drop_table("unowned_blob")
