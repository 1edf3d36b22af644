"""What estimates are made from: the lengths of prompts, and the share of interactive work."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "run", sa.Column("prompts", ARRAY(sa.Integer()), server_default="{}", nullable=False)
    )
    op.add_column(
        "instance",
        sa.Column("interactive_share", sa.Double(), server_default="0", nullable=False),
    )
    # Reports of the shape before would stop the leader; what they say comes again.
    op.execute("DELETE FROM observation")


def downgrade() -> None:
    op.drop_column("instance", "interactive_share")
    op.drop_column("run", "prompts")
    op.execute("DELETE FROM observation")
