"""What was foreseen of a batch as it was promised, for the leader that sees its end."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("estimate", sa.Column("forecast", JSONB()))


def downgrade() -> None:
    op.drop_column("estimate", "forecast")
