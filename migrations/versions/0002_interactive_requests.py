"""Interactive requests."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_HOT = {
    "fillfactor": "50",
    "autovacuum_vacuum_scale_factor": "0",
    "autovacuum_vacuum_threshold": "2000",
    "autovacuum_analyze_scale_factor": "0",
    "autovacuum_analyze_threshold": "5000",
}


def upgrade() -> None:
    op.create_table(
        "interactive_request",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("endpoint", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("body", sa.Text(), nullable=True),
        sa.Column("streamed", sa.Boolean(), nullable=False),
        sa.Column("ttft_s", sa.Double(), nullable=False),
        sa.Column("instance", sa.Text(), nullable=False),
        sa.Column("boot_id", sa.Text(), nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("ended_at", sa.Double(), nullable=True),
        sa.Column("status_code", sa.Integer(), nullable=True),
        sa.Column("result", sa.Text(), nullable=True),
        sa.Column("input_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("cached_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("output_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("reasoning_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("first_token_s", sa.Double(), nullable=True),
        sa.Column("duration_s", sa.Double(), nullable=True),
        sa.CheckConstraint(
            "state IN ('sent', 'running', 'done', 'failed', 'aborted')",
            name=op.f("ck_interactive_request_state"),
        ),
        sa.CheckConstraint(
            "(state IN ('running', 'sent')) = (ended_at IS NULL)",
            name=op.f("ck_interactive_request_ended"),
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_interactive_request")),
        postgresql_with=_HOT,
    )
    op.create_index(
        "ix_interactive_request_open",
        "interactive_request",
        ["instance", "id"],
        postgresql_where=sa.text("state IN ('running', 'sent')"),
    )
    op.create_index(
        "ix_interactive_request_ended",
        "interactive_request",
        ["ended_at"],
        postgresql_where=sa.text("ended_at IS NOT NULL"),
    )


def downgrade() -> None:
    op.drop_table("interactive_request")
