"""What instances tell of first and further tokens, by class."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("instance", sa.Column("latencies", JSONB(), server_default="[]", nullable=False))


def downgrade() -> None:
    op.drop_column("instance", "latencies")
