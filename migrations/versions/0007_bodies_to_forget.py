"""Ended interactive requests that still have a body: those already emptied are not looked at."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_index(
        "ix_interactive_request_full",
        "interactive_request",
        ["ended_at"],
        postgresql_where=sa.text(
            "ended_at IS NOT NULL AND (body IS NOT NULL OR result IS NOT NULL)"
        ),
    )


def downgrade() -> None:
    op.drop_index("ix_interactive_request_full", table_name="interactive_request")
