"""Tokens instances made, the key-value cache they use, and how deadlines held."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "instance", sa.Column("output_tokens", sa.BigInteger(), server_default="0", nullable=False)
    )
    op.add_column(
        "instance", sa.Column("kv_usage", sa.Double(), server_default="0", nullable=False)
    )
    op.create_table(
        "attainment",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("met", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("missed", sa.BigInteger(), server_default="0", nullable=False),
        sa.CheckConstraint("id = 1", name=op.f("ck_attainment_one_row")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_attainment")),
    )


def downgrade() -> None:
    op.drop_table("attainment")
    for name in ("output_tokens", "kv_usage"):
        op.drop_column("instance", name)
