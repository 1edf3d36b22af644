"""What instances tell of the tokens they made and of the key-value cache they use."""

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


def downgrade() -> None:
    for name in ("output_tokens", "kv_usage"):
        op.drop_column("instance", name)
