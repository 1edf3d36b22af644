"""The tables of work: files, batches, runs, requests, slices and results."""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

from qlm_batch.domain.jobs import (
    BatchState,
    EngineKind,
    FilePurpose,
    OnMiss,
    SliceState,
    SloClass,
)
from qlm_batch.domain.transitions import OPEN_SLICE
from qlm_batch.store.columns import (
    HOT,
    METADATA,
    count,
    flag,
    key,
    moment,
    one_of,
    parent,
    serial,
    text,
)

_OPEN = ", ".join(f"'{state.value}'" for state in sorted(OPEN_SLICE))

file = sa.Table(
    "file",
    METADATA,
    key(),
    serial("seq", primary_key=False),
    text("tenant"),
    text("purpose"),
    text("filename"),
    count("bytes"),
    text("sha256"),
    text("blob_key"),
    moment("created_at"),
    moment("expires_at", nullable=True),
    one_of("purpose", FilePurpose),
)
sa.Index("ix_file_tenant", file.c.tenant, file.c.seq)
sa.Index("ix_file_expiring", file.c.expires_at, postgresql_where=sa.text("expires_at IS NOT NULL"))

# Blobs that may be there although no file owns them, yet or any more: what else would find them?
unowned_blob = sa.Table("unowned_blob", METADATA, key("key"), moment("since"))
sa.Index("ix_unowned_blob_since", unowned_blob.c.since)

batch = sa.Table(
    "batch",
    METADATA,
    key(),
    serial("seq", primary_key=False),
    text("tenant"),
    text("endpoint"),
    # No foreign key: a file may be deleted once its batch has read it.
    text("input_file_id"),
    text("completion_window"),
    sa.Column("window_s", sa.Double, nullable=False),
    sa.Column("metadata", JSONB),
    text("webhook", nullable=True),
    text("email", nullable=True),
    text("on_miss"),
    flag("strict"),
    sa.Column("output_expires_after_s", sa.Double),
    text("idempotency_key", nullable=True),
    text("fingerprint", nullable=True),
    text("state"),
    sa.Column("generation", sa.Integer, nullable=False, server_default="1"),
    moment("created_at"),
    moment("deadline"),
    sa.Column("slice_requests", sa.Integer),
    count("total"),
    count("completed"),
    count("failed"),
    count("open_slices"),
    flag("missed"),
    count("input_tokens"),
    count("cached_tokens"),
    count("output_tokens"),
    count("reasoning_tokens"),
    sa.Column("models", ARRAY(sa.Text), nullable=False, server_default="{}"),
    sa.Column("errors", JSONB, nullable=False, server_default="[]"),
    count("error_count"),
    text("output_file_id", nullable=True),
    text("error_file_id", nullable=True),
    moment("in_progress_at", nullable=True),
    moment("finalizing_at", nullable=True),
    moment("completed_at", nullable=True),
    moment("failed_at", nullable=True),
    moment("expired_at", nullable=True),
    moment("cancelling_at", nullable=True),
    moment("cancelled_at", nullable=True),
    sa.Column("promise", JSONB),
    text("claim_holder", nullable=True),
    moment("claim_until", nullable=True),
    one_of("state", BatchState),
    one_of("on_miss", OnMiss),
    sa.CheckConstraint("window_s > 0", name="window"),
    sa.CheckConstraint("generation >= 1", name="generation"),
    sa.CheckConstraint(
        "completed >= 0 AND failed >= 0 AND completed + failed <= total", name="counts"
    ),
    sa.CheckConstraint("open_slices >= 0", name="open_slices"),
    sa.CheckConstraint(
        "open_slices = 0 OR state = 'in_progress'", name="only_running_has_open_slices"
    ),
    postgresql_with=HOT,
)
sa.Index("ix_batch_tenant", batch.c.tenant, batch.c.seq)
sa.Index(
    "uq_batch_idempotency",
    batch.c.tenant,
    batch.c.idempotency_key,
    unique=True,
    postgresql_where=sa.text("idempotency_key IS NOT NULL"),
)
sa.Index(
    "ix_batch_unfinished",
    batch.c.state,
    batch.c.seq,
    postgresql_where=sa.text("state IN ('validating', 'in_progress', 'finalizing', 'cancelling')"),
)
sa.Index(
    "ix_batch_ended",
    sa.func.coalesce(
        batch.c.completed_at, batch.c.failed_at, batch.c.expired_at, batch.c.cancelled_at
    ),
)

run = sa.Table(
    "run",
    METADATA,
    serial(),
    parent("batch_id", "batch.id", sa.Text),
    text("tenant"),
    text("model"),
    text("kind"),
    text("slo_class"),
    moment("deadline"),
    count("requests"),
    count("prompt_tokens"),
    count("max_tokens"),
    count("unbounded"),
    sa.Column("prompts", ARRAY(sa.Integer), nullable=False, server_default="{}"),
    one_of("kind", EngineKind),
    one_of("slo_class", SloClass),
)
sa.Index("ix_run_batch", run.c.batch_id)
sa.Index("ix_run_model", run.c.model)

# Millions of rows, written once by COPY: no foreign key, whose check would run for every row.
request = sa.Table(
    "request",
    METADATA,
    sa.Column("run_id", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("position", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("line", sa.Integer, nullable=False),
    text("custom_id"),
    moment("deadline", nullable=True),
    text("body"),
    sa.Column("prompt_tokens", sa.Integer, nullable=False),
    sa.Column("max_tokens", sa.Integer),
)

# Of forgotten batches: the lines at positions below `requests` are still to go.
forgotten_run = sa.Table(
    "forgotten_run",
    METADATA,
    sa.Column("run_id", sa.BigInteger, primary_key=True, autoincrement=False),
    count("requests"),
)

slice_ = sa.Table(
    "slice",
    METADATA,
    serial(),
    parent("run_id", "run.id", sa.BigInteger),
    text("batch_id"),
    sa.Column("generation", sa.Integer, nullable=False),
    sa.Column("lo", sa.Integer, nullable=False),
    sa.Column("hi", sa.Integer, nullable=False),
    moment("deadline"),
    moment("expires_at", nullable=True),
    sa.Column("state", sa.Text, nullable=False, server_default="queued"),
    sa.Column("epoch", sa.Integer, nullable=False, server_default="0"),
    text("instance", nullable=True),
    text("group_key", nullable=True),
    moment("assigned_at", nullable=True),
    sa.Column("place", sa.Integer),
    moment("lease_until", nullable=True),
    sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
    flag("fruitful"),
    flag("preempt"),
    flag("missed"),
    # Lines that still need a row in this generation, and an upper bound of their tokens.
    count("remaining"),
    count("prompt_tokens"),
    count("max_tokens"),
    count("unbounded"),
    # Rows of this generation not yet added to the batch: that happens when the slice closes.
    count("completed"),
    count("failed"),
    count("input_tokens"),
    count("cached_tokens"),
    count("output_tokens"),
    count("reasoning_tokens"),
    one_of("state", SliceState),
    sa.CheckConstraint("0 <= lo AND lo < hi", name="range"),
    sa.CheckConstraint("remaining >= 0", name="remaining"),
    sa.CheckConstraint("attempts >= 0", name="attempts"),
    sa.CheckConstraint(
        "state <> 'assigned' OR (instance IS NOT NULL AND place IS NOT NULL)", name="assigned"
    ),
    sa.CheckConstraint(
        "(state = 'leased') = (lease_until IS NOT NULL)"
        " AND (state <> 'leased' OR instance IS NOT NULL)",
        name="leased",
    ),
    sa.CheckConstraint("state <> 'queued' OR instance IS NULL", name="queued"),
    postgresql_with=HOT,
)
# No index names a column that a renewal changes, so that renewals stay heap-only updates.
sa.Index(
    "ix_slice_queued",
    slice_.c.run_id,
    slice_.c.generation,
    slice_.c.attempts,
    slice_.c.id,
    postgresql_where=sa.text("state = 'queued'"),
)
sa.Index(
    "ix_slice_assigned",
    slice_.c.instance,
    slice_.c.assigned_at,
    slice_.c.place,
    postgresql_where=sa.text("state = 'assigned'"),
)
sa.Index(
    "ix_slice_leased",
    slice_.c.instance,
    slice_.c.id,
    postgresql_where=sa.text("state = 'leased'"),
)
sa.Index(
    "ix_slice_open",
    slice_.c.batch_id,
    slice_.c.id,
    postgresql_where=sa.text(f"state IN ({_OPEN})"),
)
sa.Index(
    "ix_slice_started",
    slice_.c.batch_id,
    postgresql_where=sa.text(f"epoch > 0 AND state IN ({_OPEN})"),
)
sa.Index(
    "ix_slice_expiring",
    slice_.c.expires_at,
    postgresql_where=sa.text(f"expires_at IS NOT NULL AND state IN ({_OPEN})"),
)
sa.Index("ix_slice_range", slice_.c.run_id, slice_.c.generation, slice_.c.lo)

result = sa.Table(
    "result",
    METADATA,
    sa.Column("run_id", sa.BigInteger, primary_key=True, autoincrement=False),
    sa.Column("position", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("generation", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("ok", sa.Boolean, nullable=False),
    text("request_id"),
    sa.Column("status_code", sa.Integer),
    text("body", nullable=True),
    text("error_code", nullable=True),
    text("error_message", nullable=True),
    count("input_tokens"),
    count("cached_tokens"),
    count("output_tokens"),
    count("reasoning_tokens"),
    text("instance", nullable=True),
    sa.Column("epoch", sa.Integer, nullable=False),
    moment("started_at", nullable=True),
    sa.Column("first_token_s", sa.Double),
    sa.Column("duration_s", sa.Double),
    moment("stored_at"),
    sa.CheckConstraint("ok = COALESCE(status_code >= 200 AND status_code < 300, false)", name="ok"),
)

attempt_error = sa.Table(
    "attempt_error",
    METADATA,
    serial(),
    sa.Column("run_id", sa.BigInteger, nullable=False),
    sa.Column("generation", sa.Integer, nullable=False),
    sa.Column("lo", sa.Integer, nullable=False),
    sa.Column("hi", sa.Integer, nullable=False),
    sa.Column("slice_id", sa.BigInteger, nullable=False),
    sa.Column("epoch", sa.Integer, nullable=False),
    text("instance", nullable=True),
    text("reason"),
    moment("at"),
)
sa.Index("ix_attempt_error_run", attempt_error.c.run_id)
