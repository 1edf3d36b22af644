"""Everything an installation starts with."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
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
        "attempt_error",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("run_id", sa.BigInteger(), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("lo", sa.Integer(), nullable=False),
        sa.Column("hi", sa.Integer(), nullable=False),
        sa.Column("slice_id", sa.BigInteger(), nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("instance", sa.Text(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_attempt_error")),
    )
    op.create_index("ix_attempt_error_run", "attempt_error", ["run_id"])
    op.create_table(
        "batch",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("seq", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("endpoint", sa.Text(), nullable=False),
        sa.Column("input_file_id", sa.Text(), nullable=False),
        sa.Column("completion_window", sa.Text(), nullable=False),
        sa.Column("window_s", sa.Double(), nullable=False),
        sa.Column("metadata", postgresql.JSONB(), nullable=True),
        sa.Column("webhook", sa.Text(), nullable=True),
        sa.Column("email", sa.Text(), nullable=True),
        sa.Column("on_miss", sa.Text(), nullable=False),
        sa.Column("strict", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("output_expires_after_s", sa.Double(), nullable=True),
        sa.Column("idempotency_key", sa.Text(), nullable=True),
        sa.Column("fingerprint", sa.Text(), nullable=True),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("generation", sa.Integer(), server_default="1", nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("deadline", sa.Double(), nullable=False),
        sa.Column("slice_requests", sa.Integer(), nullable=True),
        sa.Column("total", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("completed", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("failed", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("open_slices", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("missed", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("input_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("cached_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("output_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("reasoning_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("models", postgresql.ARRAY(sa.Text()), server_default="{}", nullable=False),
        sa.Column("errors", postgresql.JSONB(), server_default="[]", nullable=False),
        sa.Column("error_count", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("output_file_id", sa.Text(), nullable=True),
        sa.Column("error_file_id", sa.Text(), nullable=True),
        sa.Column("in_progress_at", sa.Double(), nullable=True),
        sa.Column("finalizing_at", sa.Double(), nullable=True),
        sa.Column("completed_at", sa.Double(), nullable=True),
        sa.Column("failed_at", sa.Double(), nullable=True),
        sa.Column("expired_at", sa.Double(), nullable=True),
        sa.Column("cancelling_at", sa.Double(), nullable=True),
        sa.Column("cancelled_at", sa.Double(), nullable=True),
        sa.Column("promise", postgresql.JSONB(), nullable=True),
        sa.Column("claim_holder", sa.Text(), nullable=True),
        sa.Column("claim_until", sa.Double(), nullable=True),
        sa.CheckConstraint("on_miss IN ('expire', 'finish_late')", name=op.f("ck_batch_on_miss")),
        sa.CheckConstraint(
            "open_slices = 0 OR state = 'in_progress'",
            name=op.f("ck_batch_only_running_has_open_slices"),
        ),
        sa.CheckConstraint(
            "state IN ('validating', 'in_progress', 'finalizing', 'completed',"
            " 'failed', 'expired', 'cancelling', 'cancelled')",
            name=op.f("ck_batch_state"),
        ),
        sa.CheckConstraint(
            "completed >= 0 AND failed >= 0 AND completed + failed <= total",
            name=op.f("ck_batch_counts"),
        ),
        sa.CheckConstraint("generation >= 1", name=op.f("ck_batch_generation")),
        sa.CheckConstraint("open_slices >= 0", name=op.f("ck_batch_open_slices")),
        sa.CheckConstraint("window_s > 0", name=op.f("ck_batch_window")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_batch")),
        postgresql_with=_HOT,
    )
    op.create_index("ix_batch_tenant", "batch", ["tenant", "seq"])
    op.create_index(
        "ix_batch_unfinished",
        "batch",
        ["state", "seq"],
        postgresql_where=sa.text(
            "state IN ('validating', 'in_progress', 'finalizing', 'cancelling')"
        ),
    )
    op.create_index(
        "uq_batch_idempotency",
        "batch",
        ["tenant", "idempotency_key"],
        unique=True,
        postgresql_where=sa.text("idempotency_key IS NOT NULL"),
    )
    op.create_table(
        "decision",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.Column("batch_id", sa.Text(), nullable=True),
        sa.Column("group_key", sa.Text(), nullable=True),
        sa.Column("instance", sa.Text(), nullable=True),
        sa.Column("detail", postgresql.JSONB(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_decision")),
    )
    op.create_index("ix_decision_batch", "decision", ["batch_id", "id"])
    op.create_table(
        "file",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("seq", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("purpose", sa.Text(), nullable=False),
        sa.Column("filename", sa.Text(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("blob_key", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=True),
        sa.CheckConstraint("purpose IN ('batch', 'batch_output')", name=op.f("ck_file_purpose")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_file")),
    )
    op.create_index(
        "ix_file_expiring",
        "file",
        ["expires_at"],
        postgresql_where=sa.text("expires_at IS NOT NULL"),
    )
    op.create_index("ix_file_tenant", "file", ["tenant", "seq"])
    op.create_table(
        "instance",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("boot_id", sa.Text(), nullable=False),
        sa.Column("past_boots", postgresql.ARRAY(sa.Text()), server_default="{}", nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("models", postgresql.JSONB(), nullable=False),
        sa.Column("slots", sa.Integer(), nullable=False),
        sa.Column("kv_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("running", sa.Integer(), nullable=False),
        sa.Column("interactive_running", sa.Integer(), nullable=False),
        sa.Column("generated", postgresql.ARRAY(sa.Integer()), nullable=False),
        sa.Column("tokens_per_s", sa.Double(), nullable=False),
        sa.Column("phase", sa.Text(), nullable=False),
        sa.Column("beat_at", sa.Double(), nullable=False),
        sa.Column("retired_at", sa.Double(), nullable=True),
        sa.CheckConstraint(
            "state IN ('starting', 'ready', 'swapping', 'draining', 'lost')",
            name=op.f("ck_instance_state"),
        ),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_instance")),
        postgresql_with=_HOT,
    )
    op.create_table(
        "leader",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("holder", sa.Text(), nullable=True),
        sa.Column("epoch", sa.BigInteger(), nullable=False),
        sa.Column("until", sa.Double(), nullable=False),
        sa.CheckConstraint("id = 1", name=op.f("ck_leader_one_row")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_leader")),
        postgresql_with=_HOT,
    )
    op.create_table(
        "observation",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("data", postgresql.JSONB(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_observation")),
    )
    op.create_table(
        "profile",
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("data", postgresql.JSONB(), nullable=False),
        sa.Column("updated_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("model", "device", name=op.f("pk_profile")),
    )
    op.create_table(
        "request",
        sa.Column("run_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("position", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("line", sa.Integer(), nullable=False),
        sa.Column("custom_id", sa.Text(), nullable=False),
        sa.Column("deadline", sa.Double(), nullable=True),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("prompt_tokens", sa.Integer(), nullable=False),
        sa.Column("max_tokens", sa.Integer(), nullable=True),
        sa.PrimaryKeyConstraint("run_id", "position", name=op.f("pk_request")),
    )
    op.create_table(
        "result",
        sa.Column("run_id", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("position", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("generation", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("ok", sa.Boolean(), nullable=False),
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("status_code", sa.Integer(), nullable=True),
        sa.Column("body", sa.Text(), nullable=True),
        sa.Column("error_code", sa.Text(), nullable=True),
        sa.Column("error_message", sa.Text(), nullable=True),
        sa.Column("input_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("cached_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("output_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("reasoning_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("instance", sa.Text(), nullable=True),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("started_at", sa.Double(), nullable=True),
        sa.Column("first_token_s", sa.Double(), nullable=True),
        sa.Column("duration_s", sa.Double(), nullable=True),
        sa.Column("stored_at", sa.Double(), nullable=False),
        sa.CheckConstraint(
            "ok = COALESCE(status_code >= 200 AND status_code < 300, false)",
            name=op.f("ck_result_ok"),
        ),
        sa.PrimaryKeyConstraint("run_id", "position", "generation", name=op.f("pk_result")),
    )
    op.create_table(
        "tenant",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tenant")),
    )
    op.create_table(
        "virtual_queue",
        sa.Column("instance", sa.Text(), nullable=False),
        sa.Column("position", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("group_key", sa.Text(), nullable=False),
        sa.Column("slices", sa.Integer(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("instance", "position", name=op.f("pk_virtual_queue")),
        postgresql_with=_HOT,
    )
    op.create_table(
        "api_key",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("role", sa.Text(), nullable=False),
        sa.Column("prefix", sa.Text(), nullable=False),
        sa.Column("hash", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("revoked_at", sa.Double(), nullable=True),
        sa.Column("limits", postgresql.JSONB(), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant"], ["tenant.id"], name=op.f("fk_api_key_tenant"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_key")),
        sa.UniqueConstraint("hash", name=op.f("uq_api_key_hash")),
    )
    op.create_index("ix_api_key_tenant", "api_key", ["tenant"])
    op.create_table(
        "estimate",
        sa.Column("batch_id", sa.Text(), nullable=False),
        sa.Column("p50", sa.Double(), nullable=True),
        sa.Column("p95", sa.Double(), nullable=True),
        sa.Column("miss", sa.Double(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("made_at", sa.Double(), nullable=False),
        sa.CheckConstraint("miss >= 0 AND miss <= 1", name=op.f("ck_estimate_miss")),
        sa.ForeignKeyConstraint(
            ["batch_id"], ["batch.id"], name=op.f("fk_estimate_batch_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("batch_id", name=op.f("pk_estimate")),
        postgresql_with=_HOT,
    )
    op.create_table(
        "outbox",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("event_id", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("batch_id", sa.Text(), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("channel", sa.Text(), nullable=False),
        sa.Column("target", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("attempts", sa.Integer(), server_default="0", nullable=False),
        sa.Column("state", sa.Text(), server_default="pending", nullable=False),
        sa.Column("next_attempt_at", sa.Double(), nullable=False),
        sa.Column("claim_holder", sa.Text(), nullable=True),
        sa.Column("claim_until", sa.Double(), nullable=True),
        sa.CheckConstraint("channel IN ('webhook', 'email')", name=op.f("ck_outbox_channel")),
        sa.CheckConstraint(
            "state IN ('pending', 'delivered', 'dead')", name=op.f("ck_outbox_state")
        ),
        sa.ForeignKeyConstraint(
            ["batch_id"], ["batch.id"], name=op.f("fk_outbox_batch_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_outbox")),
        sa.UniqueConstraint(
            "batch_id", "generation", "channel", name=op.f("uq_outbox_batch_id_generation_channel")
        ),
    )
    op.create_index(
        "ix_outbox_due",
        "outbox",
        ["next_attempt_at"],
        postgresql_where=sa.text("state = 'pending'"),
    )
    op.create_table(
        "run",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("batch_id", sa.Text(), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("slo_class", sa.Text(), nullable=False),
        sa.Column("deadline", sa.Double(), nullable=False),
        sa.Column("requests", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("max_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("unbounded", sa.BigInteger(), server_default="0", nullable=False),
        sa.CheckConstraint("kind IN ('generate', 'embed')", name=op.f("ck_run_kind")),
        sa.CheckConstraint("slo_class IN ('interactive', 'batch')", name=op.f("ck_run_slo_class")),
        sa.ForeignKeyConstraint(
            ["batch_id"], ["batch.id"], name=op.f("fk_run_batch_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_run")),
    )
    op.create_index("ix_run_batch", "run", ["batch_id"])
    op.create_index("ix_run_model", "run", ["model"])
    op.create_table(
        "webhook_endpoint",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("tenant", sa.Text(), nullable=False),
        sa.Column("secret", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(
            ["tenant"], ["tenant.id"], name=op.f("fk_webhook_endpoint_tenant"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_webhook_endpoint")),
    )
    op.create_index("ix_webhook_endpoint_tenant", "webhook_endpoint", ["tenant"])
    op.create_table(
        "delivery",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("outbox_id", sa.BigInteger(), nullable=False),
        sa.Column("ok", sa.Boolean(), nullable=False),
        sa.Column("status_code", sa.Integer(), nullable=True),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("duration_s", sa.Double(), nullable=False),
        sa.Column("retry_at", sa.Double(), nullable=True),
        sa.Column("at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(
            ["outbox_id"], ["outbox.id"], name=op.f("fk_delivery_outbox_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_delivery")),
    )
    op.create_index("ix_delivery_outbox", "delivery", ["outbox_id"])
    op.create_table(
        "slice",
        sa.Column("id", sa.BigInteger(), sa.Identity(always=True), nullable=False),
        sa.Column("run_id", sa.BigInteger(), nullable=False),
        sa.Column("batch_id", sa.Text(), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("lo", sa.Integer(), nullable=False),
        sa.Column("hi", sa.Integer(), nullable=False),
        sa.Column("deadline", sa.Double(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=True),
        sa.Column("state", sa.Text(), server_default="queued", nullable=False),
        sa.Column("epoch", sa.Integer(), server_default="0", nullable=False),
        sa.Column("instance", sa.Text(), nullable=True),
        sa.Column("group_key", sa.Text(), nullable=True),
        sa.Column("assigned_at", sa.Double(), nullable=True),
        sa.Column("place", sa.Integer(), nullable=True),
        sa.Column("lease_until", sa.Double(), nullable=True),
        sa.Column("attempts", sa.Integer(), server_default="0", nullable=False),
        sa.Column("fruitful", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("preempt", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("missed", sa.Boolean(), server_default=sa.text("false"), nullable=False),
        sa.Column("remaining", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("max_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("unbounded", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("completed", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("failed", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("input_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("cached_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("output_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("reasoning_tokens", sa.BigInteger(), server_default="0", nullable=False),
        sa.CheckConstraint(
            "(state = 'leased') = (lease_until IS NOT NULL)"
            " AND (state <> 'leased' OR instance IS NOT NULL)",
            name=op.f("ck_slice_leased"),
        ),
        sa.CheckConstraint(
            "state <> 'assigned' OR (instance IS NOT NULL AND place IS NOT NULL)",
            name=op.f("ck_slice_assigned"),
        ),
        sa.CheckConstraint("state <> 'queued' OR instance IS NULL", name=op.f("ck_slice_queued")),
        sa.CheckConstraint(
            "state IN ('queued', 'assigned', 'leased', 'done', 'expired', 'cancelled')",
            name=op.f("ck_slice_state"),
        ),
        sa.CheckConstraint("0 <= lo AND lo < hi", name=op.f("ck_slice_range")),
        sa.CheckConstraint("attempts >= 0", name=op.f("ck_slice_attempts")),
        sa.CheckConstraint("remaining >= 0", name=op.f("ck_slice_remaining")),
        sa.ForeignKeyConstraint(
            ["run_id"], ["run.id"], name=op.f("fk_slice_run_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_slice")),
        postgresql_with=_HOT,
    )
    op.create_index(
        "ix_slice_assigned",
        "slice",
        ["instance", "assigned_at", "place"],
        postgresql_where=sa.text("state = 'assigned'"),
    )
    op.create_index(
        "ix_slice_expiring",
        "slice",
        ["expires_at"],
        postgresql_where=sa.text(
            "expires_at IS NOT NULL AND state IN ('assigned', 'leased', 'queued')"
        ),
    )
    op.create_index(
        "ix_slice_leased", "slice", ["instance", "id"], postgresql_where=sa.text("state = 'leased'")
    )
    op.create_index(
        "ix_slice_open",
        "slice",
        ["batch_id", "id"],
        postgresql_where=sa.text("state IN ('assigned', 'leased', 'queued')"),
    )
    op.create_index(
        "ix_slice_queued",
        "slice",
        ["run_id", "generation", "attempts", "id"],
        postgresql_where=sa.text("state = 'queued'"),
    )
    op.create_index("ix_slice_range", "slice", ["run_id", "generation", "lo"])
    op.create_index(
        "ix_slice_started",
        "slice",
        ["batch_id"],
        postgresql_where=sa.text("epoch > 0 AND state IN ('assigned', 'leased', 'queued')"),
    )


def downgrade() -> None:
    op.drop_table("slice")
    op.drop_table("delivery")
    op.drop_table("webhook_endpoint")
    op.drop_table("run")
    op.drop_table("outbox")
    op.drop_table("estimate")
    op.drop_table("api_key")
    op.drop_table("virtual_queue")
    op.drop_table("tenant")
    op.drop_table("result")
    op.drop_table("request")
    op.drop_table("profile")
    op.drop_table("observation")
    op.drop_table("leader")
    op.drop_table("instance")
    op.drop_table("file")
    op.drop_table("decision")
    op.drop_table("batch")
    op.drop_table("attempt_error")
