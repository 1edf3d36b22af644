"""The store on PostgreSQL: each method is one transaction around the queries of its module."""
# ruff: noqa: D102 - the contract of each method is in domain.store

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from cryptography.fernet import Fernet
from sqlalchemy.engine import Connection

from qlm_batch.domain.errors import Unavailable
from qlm_batch.domain.interactive import (
    InteractiveMark,
    InteractiveRequest,
    NewInteractive,
    Timeliness,
)
from qlm_batch.domain.jobs import (
    ApiKey,
    Batch,
    BatchSpec,
    ClaimedSlice,
    DeliveryAttempt,
    ExportLine,
    FilePurpose,
    FileRecord,
    LineError,
    OutboxItem,
    RequestLine,
    ResultRow,
)
from qlm_batch.domain.ledger import FlushOutcome, Held, Reaped, ReleaseReason
from qlm_batch.domain.records import (
    Attainment,
    ExportTask,
    Heartbeat,
    IntakeTask,
    Page,
    QueueTotals,
)
from qlm_batch.domain.snapshot import (
    Assignment,
    Decision,
    InstanceView,
    Observation,
    Plan,
    Profile,
    QueueEntry,
    Snapshot,
)
from qlm_batch.domain.stories import RequestStory
from qlm_batch.store import (
    attainments,
    batches,
    claims,
    export,
    files,
    instances,
    intake,
    interactive,
    keys,
    leadership,
    ledger,
    migrate,
    outbox,
    planning,
    reaping,
    retention,
    snapshots,
    stories,
)
from qlm_batch.store.session import Database, make_engine
from qlm_batch.store.sql import sql

_NOW = sql("SELECT {now}")


class PostgresStore:
    """`domain.store.Store` on the database at `url`; its tables must be current.

    `secret_key` is a Fernet key that encrypts webhook secrets. An instance without a heartbeat for
    `instance_silent_s` counts as lost. At most `pool_size` connections are open at once. Nothing
    is connected before the first call.
    """

    def __init__(
        self,
        url: str,
        *,
        secret_key: bytes,
        instance_silent_s: float = 15.0,
        pool_size: int = 8,
        application_name: str = "qlm-batch",
        statement_timeout_s: float = 60.0,
    ) -> None:
        self._database = Database(
            make_engine(
                url,
                application_name=application_name,
                pool_size=pool_size,
                statement_timeout_s=statement_timeout_s,
            )
        )
        self._run = self._database.run
        self._box = Fernet(secret_key)
        self._silent_s = instance_silent_s

    def ping(self) -> None:
        """Raise Unavailable unless the database answers and its schema is current."""
        found = self._run(migrate.revision_of)
        if found != migrate.head():
            raise Unavailable(
                f"The database's tables are at revision {found or 'none'}, this program needs"
                f" {migrate.head()}; run `qlm db upgrade`.",
                code="schema_not_current",
                retry_after_s=5.0,
            )

    def now(self) -> float:
        """The database's clock."""
        return self._run(_now)

    def close(self) -> None:
        """Give connections back."""
        self._database.close()

    # Files

    def expect_blob(self, key: str) -> None:
        self._run(files.expect_blob, key)

    def unowned_blobs(self, noted_s: float, limit: int = 100) -> Sequence[str]:
        return self._run(files.unowned_blobs, noted_s, limit)

    def blobs_removed(self, keys: Sequence[str]) -> None:
        self._run(files.blobs_removed, keys)

    def add_file(self, record: FileRecord) -> None:
        self._run(files.add_file, record)

    def file(self, tenant: str, file_id: str) -> FileRecord:
        return self._run(files.get_file, tenant, file_id)

    def list_files(
        self,
        tenant: str,
        *,
        purpose: FilePurpose | None = None,
        after: str | None = None,
        limit: int = 10_000,
        newest_first: bool = True,
    ) -> Page[FileRecord]:
        return self._run(files.list_files, tenant, purpose, after, limit, newest_first)

    def delete_file(self, tenant: str, file_id: str) -> FileRecord:
        return self._run(files.delete_file, tenant, file_id)

    def expired_files(self, limit: int) -> Sequence[FileRecord]:
        return self._run(files.expired_files, limit)

    # Batches

    def create_batch(self, batch_id: str, spec: BatchSpec) -> Batch:
        return self._run(batches.create_batch, batch_id, spec)

    def batch(self, tenant: str, batch_id: str) -> Batch:
        return self._run(batches.get_batch, tenant, batch_id)

    def list_batches(
        self, tenant: str, *, after: str | None = None, limit: int = 20
    ) -> Page[Batch]:
        return self._run(batches.list_batches, tenant, after, limit)

    def open_batches(self, limit: int = 100) -> Sequence[Batch]:
        return self._run(batches.open_batches, limit)

    def cancel_batch(self, tenant: str, batch_id: str) -> Batch:
        return self._run(batches.cancel_batch, tenant, batch_id)

    def retry_batch(self, tenant: str, batch_id: str, window_s: float | None = None) -> Batch:
        return self._run(batches.retry_batch, tenant, batch_id, window_s)

    def decisions(self, tenant: str, batch_id: str, limit: int = 1000) -> Sequence[Decision]:
        return self._run(batches.decisions, tenant, batch_id, limit)

    def request_story(self, tenant: str, batch_id: str, custom_id: str) -> RequestStory:
        return self._run(stories.request_story, tenant, batch_id, custom_id)

    def queue_totals(self, tenant: str | None = None) -> QueueTotals:
        return self._run(batches.queue_totals, tenant)

    def attainment(self) -> Attainment:
        return self._run(attainments.attainment)

    # Intake

    def claim_intake(self, holder: str, lease_s: float) -> IntakeTask | None:
        return self._run(intake.claim_intake, holder, lease_s)

    def renew_intake(self, batch_id: str, holder: str, lease_s: float) -> bool:
        return self._run(intake.renew_intake, batch_id, holder, lease_s)

    def load_lines(
        self, batch_id: str, holder: str, lines: Iterable[RequestLine], slice_requests: int
    ) -> int:
        # Not repeated on a conflict: the lines can be read only once.
        with self._database.transaction() as connection:
            return intake.load_lines(connection, batch_id, holder, lines, slice_requests)

    def fail_intake(
        self, batch_id: str, holder: str, errors: Sequence[LineError], total: int
    ) -> None:
        self._run(intake.fail_intake, batch_id, holder, errors, total)

    # Export

    def claim_export(self, holder: str, lease_s: float) -> ExportTask | None:
        return self._run(export.claim_export, holder, lease_s)

    def renew_export(self, batch_id: str, holder: str, lease_s: float) -> bool:
        return self._run(export.renew_export, batch_id, holder, lease_s)

    def export_lines(self, batch_id: str, *, partial: bool = False) -> Iterator[ExportLine]:
        return export.export_lines(self._run, batch_id, partial)

    def finish_export(
        self,
        batch_id: str,
        holder: str,
        output: FileRecord | None,
        errors: FileRecord | None,
    ) -> Batch | None:
        return self._run(export.finish_export, batch_id, holder, output, errors)

    # Ledger

    def claim_slices(
        self, instance: str, boot_id: str, *, max_requests: int, lease_s: float, holding: int = 0
    ) -> Sequence[ClaimedSlice]:
        return self._run(claims.claim_slices, instance, boot_id, max_requests, lease_s, holding)

    def flush(
        self,
        instance: str,
        rows: Sequence[ResultRow],
        held: Sequence[Held],
        *,
        lease_s: float | None,
    ) -> FlushOutcome:
        return self._run(ledger.flush, instance, rows, held, lease_s)

    def release(self, instance: str, held: Sequence[Held], reason: ReleaseReason) -> None:
        self._run(ledger.release, instance, held, reason)

    def preempt(self, epoch: int, instance: str, slices: int) -> int:
        return self._run(planning.preempt, epoch, instance, slices)

    def reap(self, epoch: int) -> Reaped:
        return self._run(reaping.reap, epoch, self._silent_s)

    # Planning

    def lead(self, holder: str, term_s: float) -> int | None:
        return self._run(leadership.lead, holder, term_s)

    def resign(self, holder: str) -> None:
        self._run(leadership.resign, holder)

    def snapshot(self) -> Snapshot:
        return self._database.read(snapshots.snapshot, self._silent_s)

    def save_plan(self, epoch: int, plan: Plan, decisions: Sequence[Decision]) -> None:
        self._run(planning.save_plan, epoch, plan, decisions)

    def assign(self, epoch: int, assignments: Sequence[Assignment]) -> Mapping[str, int]:
        return self._run(planning.assign, epoch, assignments)

    def unassign(self, epoch: int, instance: str) -> int:
        return self._run(planning.unassign, epoch, instance)

    def take_observations(self, epoch: int, limit: int = 1000) -> Sequence[Observation]:
        return self._run(planning.take_observations, epoch, limit)

    def keep_forecasts(self, epoch: int, forecasts: Mapping[str, Mapping[str, object]]) -> None:
        self._run(planning.keep_forecasts, epoch, forecasts)

    def forecasts(self) -> Mapping[str, Mapping[str, object]]:
        return self._run(planning.forecasts)

    def save_profiles(self, epoch: int, profiles: Sequence[Profile]) -> None:
        self._run(planning.save_profiles, epoch, profiles)

    def fail_unservable(self, epoch: int, model: str, message: str, *, limit: int = 256) -> int:
        return self._run(reaping.fail_unservable, epoch, model, message, limit)

    def queues(self) -> Sequence[QueueEntry]:
        return self._run(planning.queues)

    # Instances

    def heartbeat(self, beat: Heartbeat) -> bool:
        return self._run(instances.heartbeat, beat)

    def retire(self, name: str, boot_id: str) -> None:
        self._run(instances.retire, name, boot_id)

    def died(self, name: str, boot_id: str) -> None:
        self._run(instances.died, name, boot_id)

    def instances(self) -> Sequence[InstanceView]:
        return self._database.read(instances.instances, self._silent_s)

    def served_lately(self, model: str, within_s: float) -> bool:
        return self._run(instances.served_lately, model, within_s)

    # Interactive

    def add_interactive(self, new: NewInteractive) -> float:
        return self._database.run_statement(interactive.add_interactive, new)

    def reroute_interactive(
        self, request_id: str, epoch: int, instance: str, boot_id: str
    ) -> int | None:
        return self._run(interactive.reroute_interactive, request_id, epoch, instance, boot_id)

    def mark_interactive(self, marks: Sequence[InteractiveMark]) -> int:
        run = self._database.run_statement if len(marks) == 1 else self._run
        return run(interactive.mark_interactive, marks)

    def interactive(self, tenant: str, request_id: str) -> InteractiveRequest:
        return self._run(interactive.get_interactive, tenant, request_id)

    def timeliness(self, window_s: float) -> Timeliness:
        return self._run(interactive.timeliness, window_s)

    def sweep_interactive(self, grace_s: float, limit: int = 1000) -> int:
        return self._run(interactive.sweep_interactive, self._silent_s, grace_s, limit)

    def forget_interactive(self, bodies_s: float, rows_s: float, limit: int = 1000) -> int:
        return self._run(interactive.forget_interactive, bodies_s, rows_s, limit)

    # Outbox

    def claim_outbox(self, holder: str, limit: int, lease_s: float) -> Sequence[OutboxItem]:
        return self._run(outbox.claim_outbox, holder, limit, lease_s)

    def record_delivery(self, attempt: DeliveryAttempt) -> None:
        self._run(outbox.record_delivery, attempt)

    def deliveries(
        self, tenant: str, batch_id: str
    ) -> Sequence[tuple[OutboxItem, DeliveryAttempt]]:
        return self._run(outbox.deliveries, tenant, batch_id)

    def replay_dead(self, tenant: str, batch_id: str) -> int:
        return self._run(outbox.replay_dead, tenant, batch_id)

    def webhook_secrets(self, tenant: str) -> Sequence[str]:
        return self._run(outbox.webhook_secrets, tenant, self._box)

    def rotate_webhook_secret(self, tenant: str) -> str:
        return self._run(outbox.rotate_webhook_secret, tenant, self._box)

    # Retention

    def forget_batches(self, rows_s: float, limit: int = 10) -> int:
        return self._run(retention.forget_batches, rows_s, limit)

    def forget_lines(self, limit: int = 5000) -> int:
        return self._run(retention.forget_lines, limit)

    def forget_instances(self, silent_s: float) -> int:
        return self._run(retention.forget_instances, silent_s)

    # Keys

    def add_key(self, key: ApiKey, secret: str) -> None:
        self._run(keys.add_key, key, secret)

    def key_for(self, secret: str) -> ApiKey:
        return self._run(keys.key_for, secret)

    def list_keys(self, tenant: str | None = None) -> Sequence[ApiKey]:
        return self._run(keys.list_keys, tenant)

    def revoke_key(self, key_id: str) -> ApiKey:
        return self._run(keys.revoke_key, key_id)


def _now(connection: Connection) -> float:
    return float(connection.execute(_NOW).scalar_one())
