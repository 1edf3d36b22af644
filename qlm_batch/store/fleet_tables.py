"""The tables around the work: the fleet, plans, the outbox, and who may do what."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

from qlm_batch.domain.interactive import OPEN_INTERACTIVE, InteractiveState
from qlm_batch.domain.snapshot import InstanceState
from qlm_batch.store.columns import (
    HOT,
    METADATA,
    count,
    key,
    moment,
    one_of,
    parent,
    serial,
    text,
)

instance = sa.Table(
    "instance",
    METADATA,
    key("name"),
    text("boot_id"),
    sa.Column("past_boots", ARRAY(sa.Text), nullable=False, server_default="{}"),
    text("device"),
    text("state"),
    sa.Column("models", JSONB, nullable=False),
    sa.Column("slots", sa.Integer, nullable=False),
    count("kv_tokens"),
    sa.Column("running", sa.Integer, nullable=False),
    sa.Column("interactive_running", sa.Integer, nullable=False),
    count("batch_cap"),
    count("evictions"),
    count("recomputed_tokens"),
    count("output_tokens"),
    sa.Column("kv_usage", sa.Double, nullable=False, server_default="0"),
    sa.Column("latencies", JSONB, nullable=False, server_default="[]"),
    sa.Column("generated", ARRAY(sa.Integer), nullable=False),
    sa.Column("tokens_per_s", sa.Double, nullable=False),
    sa.Column("interactive_share", sa.Double, nullable=False, server_default="0"),
    text("phase"),
    moment("beat_at"),
    moment("retired_at", nullable=True),
    one_of("state", InstanceState),
    postgresql_with=HOT,
)

_OPEN = ", ".join(f"'{state.value}'" for state in sorted(OPEN_INTERACTIVE))

interactive_request = sa.Table(
    "interactive_request",
    METADATA,
    key(),
    text("tenant"),
    text("endpoint"),
    text("model"),
    text("body", nullable=True),
    sa.Column("streamed", sa.Boolean, nullable=False),
    sa.Column("ttft_s", sa.Double, nullable=False),
    text("instance"),
    text("boot_id"),
    sa.Column("epoch", sa.Integer, nullable=False),
    text("state"),
    moment("created_at"),
    moment("ended_at", nullable=True),
    sa.Column("status_code", sa.Integer),
    text("result", nullable=True),
    count("input_tokens"),
    count("cached_tokens"),
    count("output_tokens"),
    count("reasoning_tokens"),
    sa.Column("first_token_s", sa.Double),
    sa.Column("duration_s", sa.Double),
    one_of("state", InteractiveState),
    sa.CheckConstraint(f"(state IN ({_OPEN})) = (ended_at IS NULL)", name="ended"),
    postgresql_with=HOT,
)
sa.Index(
    "ix_interactive_request_open",
    interactive_request.c.instance,
    interactive_request.c.id,
    postgresql_where=sa.text(f"state IN ({_OPEN})"),
)
sa.Index(
    "ix_interactive_request_ended",
    interactive_request.c.ended_at,
    postgresql_where=sa.text("ended_at IS NOT NULL"),
)
sa.Index(
    "ix_interactive_request_full",
    interactive_request.c.ended_at,
    postgresql_where=sa.text("ended_at IS NOT NULL AND (body IS NOT NULL OR result IS NOT NULL)"),
)

observation = sa.Table("observation", METADATA, serial(), sa.Column("data", JSONB, nullable=False))

virtual_queue = sa.Table(
    "virtual_queue",
    METADATA,
    sa.Column("instance", sa.Text, primary_key=True),
    sa.Column("position", sa.Integer, primary_key=True, autoincrement=False),
    text("group_key"),
    sa.Column("slices", sa.Integer, nullable=False),
    text("reason"),
    postgresql_with=HOT,
)

leader = sa.Table(
    "leader",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    text("holder", nullable=True),
    sa.Column("epoch", sa.BigInteger, nullable=False),
    moment("until"),
    sa.CheckConstraint("id = 1", name="one_row"),
    postgresql_with=HOT,
)

decision = sa.Table(
    "decision",
    METADATA,
    serial(),
    text("kind"),
    moment("at"),
    text("batch_id", nullable=True),
    text("group_key", nullable=True),
    text("instance", nullable=True),
    sa.Column("detail", JSONB, nullable=False),
)
sa.Index("ix_decision_batch", decision.c.batch_id, decision.c.id)

estimate = sa.Table(
    "estimate",
    METADATA,
    sa.Column("batch_id", sa.Text, sa.ForeignKey("batch.id", ondelete="CASCADE"), primary_key=True),
    moment("p50", nullable=True),
    moment("p95", nullable=True),
    sa.Column("miss", sa.Double),
    text("reason"),
    moment("made_at"),
    sa.Column("forecast", JSONB),
    sa.CheckConstraint("miss >= 0 AND miss <= 1", name="miss"),
    postgresql_with=HOT,
)

attainment = sa.Table(
    "attainment",
    METADATA,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    count("met"),
    count("missed"),
    sa.CheckConstraint("id = 1", name="one_row"),
)

profile = sa.Table(
    "profile",
    METADATA,
    sa.Column("model", sa.Text, primary_key=True),
    sa.Column("device", sa.Text, primary_key=True),
    sa.Column("data", JSONB, nullable=False),
    moment("updated_at"),
)

outbox = sa.Table(
    "outbox",
    METADATA,
    serial(),
    text("event_id"),
    text("tenant"),
    parent("batch_id", "batch.id", sa.Text),
    sa.Column("generation", sa.Integer, nullable=False),
    text("type"),
    text("channel"),
    text("target"),
    moment("created_at"),
    sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
    sa.Column("state", sa.Text, nullable=False, server_default="pending"),
    moment("next_attempt_at"),
    text("claim_holder", nullable=True),
    moment("claim_until", nullable=True),
    sa.UniqueConstraint("batch_id", "generation", "channel"),
    sa.CheckConstraint("channel IN ('webhook', 'email')", name="channel"),
    sa.CheckConstraint("state IN ('pending', 'delivered', 'dead')", name="state"),
)
sa.Index("ix_outbox_due", outbox.c.next_attempt_at, postgresql_where=sa.text("state = 'pending'"))

delivery = sa.Table(
    "delivery",
    METADATA,
    serial(),
    parent("outbox_id", "outbox.id", sa.BigInteger),
    sa.Column("ok", sa.Boolean, nullable=False),
    sa.Column("status_code", sa.Integer),
    text("detail"),
    sa.Column("duration_s", sa.Double, nullable=False),
    moment("retry_at", nullable=True),
    moment("at"),
)
sa.Index("ix_delivery_outbox", delivery.c.outbox_id)

tenant = sa.Table("tenant", METADATA, key(), moment("created_at"))

api_key = sa.Table(
    "api_key",
    METADATA,
    key(),
    parent("tenant", "tenant.id", sa.Text),
    text("name"),
    text("role"),
    text("prefix"),
    text("hash"),
    moment("created_at"),
    moment("revoked_at", nullable=True),
    sa.Column("limits", JSONB, nullable=False),
    sa.UniqueConstraint("hash"),
)
sa.Index("ix_api_key_tenant", api_key.c.tenant)

webhook_endpoint = sa.Table(
    "webhook_endpoint",
    METADATA,
    serial(),
    parent("tenant", "tenant.id", sa.Text),
    sa.Column("secret", sa.LargeBinary, nullable=False),
    moment("created_at"),
    moment("expires_at", nullable=True),
)
sa.Index("ix_webhook_endpoint_tenant", webhook_endpoint.c.tenant)
