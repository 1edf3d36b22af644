"""What instances tell of what they do to batch work for the sake of interactive requests."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_TOLD = ("batch_cap", "evictions", "recomputed_tokens")


def upgrade() -> None:
    for name in _TOLD:
        op.add_column(
            "instance", sa.Column(name, sa.BigInteger(), server_default="0", nullable=False)
        )


def downgrade() -> None:
    for name in _TOLD:
        op.drop_column("instance", name)
