"""What must survive, by who asks for it.

The store is synchronous and every method is one transaction. Each method of an id that belongs to
another tenant behaves as if the object did not exist (NotFound). All methods may raise Unavailable
while the database is away.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

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


class FileStore(Protocol):
    """Records of files; the bytes are in a BlobStore."""

    def expect_blob(self, key: str) -> None:
        """Note that a blob is about to be stored: no file owns it until one with this key is added.

        Blobs of files that were deleted or expired are noted likewise.
        """
        ...

    def unowned_blobs(self, noted_s: float, limit: int = 100) -> Sequence[str]:
        """Keys that were noted over `noted_s` ago and that no file owns."""
        ...

    def blobs_removed(self, keys: Sequence[str]) -> None:
        """Drop the notes of blobs that are gone."""
        ...

    def add_file(self, record: FileRecord) -> None:
        """Record a file whose bytes are already in the blob store."""
        ...

    def file(self, tenant: str, file_id: str) -> FileRecord:
        """The file; NotFound when absent, deleted or expired."""
        ...

    def list_files(
        self,
        tenant: str,
        *,
        purpose: FilePurpose | None = None,
        after: str | None = None,
        limit: int = 10_000,
        newest_first: bool = True,
    ) -> Page[FileRecord]:
        """A page of the tenant's files; `after` is the last id of the page before."""
        ...

    def delete_file(self, tenant: str, file_id: str) -> FileRecord:
        """Forget a file; returns it so that its bytes can be removed.

        A batch that still has to read it fails with a clear error; one that already did goes on.
        """
        ...

    def expired_files(self, limit: int) -> Sequence[FileRecord]:
        """Forget and return files past their expiry."""
        ...


class BatchStore(Protocol):
    """Batches as their owners see them."""

    def create_batch(self, batch_id: str, spec: BatchSpec) -> Batch:
        """Accept a batch in state `validating`; its deadline is now plus the window.

        With an idempotency key seen before, returns the first batch, or raises Unprocessable when
        the fingerprint differs. NotFound when the input file is not there.
        """
        ...

    def batch(self, tenant: str, batch_id: str) -> Batch:
        """The batch with live counts (rows in open slices included) and its newest estimate."""
        ...

    def list_batches(
        self, tenant: str, *, after: str | None = None, limit: int = 20
    ) -> Page[Batch]:
        """A page of the tenant's batches, newest first."""
        ...

    def open_batches(self, limit: int = 100) -> Sequence[Batch]:
        """Batches of all tenants that have not ended, earliest deadline first."""
        ...

    def cancel_batch(self, tenant: str, batch_id: str) -> Batch:
        """Close every open slice as cancelled and turn the batch `cancelling`.

        Cancelling twice is fine. Conflict when it has already ended or is finalizing.
        """
        ...

    def retry_batch(self, tenant: str, batch_id: str, window_s: float | None = None) -> Batch:
        """Start the next generation over the lines without a success; `window_s` from now.

        None repeats the batch's window. Conflict unless the batch ended and has such lines.
        """
        ...

    def decisions(self, tenant: str, batch_id: str, limit: int = 1000) -> Sequence[Decision]:
        """The batch's story, oldest first."""
        ...

    def request_story(self, tenant: str, batch_id: str, custom_id: str) -> RequestStory:
        """What happened to one request of the batch. NotFound for an id that is not in its file."""
        ...

    def queue_totals(self, tenant: str | None = None) -> QueueTotals:
        """Open work of one tenant, or of all."""
        ...

    def attainment(self) -> Attainment:
        """How deadlines held so far; never falls."""
        ...


class IntakeStore(Protocol):
    """Reading files in."""

    def claim_intake(self, holder: str, lease_s: float) -> IntakeTask | None:
        """The oldest validating batch nobody is reading; None when there is none."""
        ...

    def renew_intake(self, batch_id: str, holder: str, lease_s: float) -> bool:
        """Keep the claim; False when it was lost or the batch was cancelled."""
        ...

    def load_lines(
        self,
        batch_id: str,
        holder: str,
        lines: Iterable[RequestLine],
        slice_requests: int,
    ) -> int:
        """Store all lines, cut runs and slices and turn the batch `in_progress`, all at once.

        Lines stream through; errors raised by the iterable roll everything back. A custom_id used
        twice raises InvalidInput with code `duplicate_custom_id` and the later line. Returns the
        number of lines. Nothing is visible unless this returns.
        """
        ...

    def fail_intake(
        self, batch_id: str, holder: str, errors: Sequence[LineError], total: int
    ) -> None:
        """Turn the batch `failed` with the errors found (`total` may exceed those listed)."""
        ...


class ExportStore(Protocol):
    """Writing results out."""

    def claim_export(self, holder: str, lease_s: float) -> ExportTask | None:
        """A batch whose slices are all closed and whose files are not written yet."""
        ...

    def renew_export(self, batch_id: str, holder: str, lease_s: float) -> bool:
        """Keep the claim; False when it was lost."""
        ...

    def export_lines(self, batch_id: str, *, partial: bool = False) -> Iterator[ExportLine]:
        """One entry per line in file order, paged by key; `partial` yields only rows there are."""
        ...

    def finish_export(
        self,
        batch_id: str,
        holder: str,
        output: FileRecord | None,
        errors: FileRecord | None,
    ) -> Batch | None:
        """Record the files, end the batch, insert its outbox rows; None when the claim is lost."""
        ...


class Ledger(Protocol):
    """Leases on slices and the results they bring. Rules: design, "The ledger's rules"."""

    def claim_slices(
        self, instance: str, boot_id: str, *, max_requests: int, lease_s: float, holding: int = 0
    ) -> Sequence[ClaimedSlice]:
        """Lease slices assigned to this boot, in assignment order, up to about `max_requests`.

        At least one slice is leased when any is assigned and `max_requests` > 0. A suspect slice is
        leased only alone, when `holding` is 0. Slices that turn out to have nothing left to do are
        closed on the spot.
        """
        ...

    def flush(
        self,
        instance: str,
        rows: Sequence[ResultRow],
        held: Sequence[Held],
        *,
        lease_s: float | None,
    ) -> FlushOutcome:
        """Store results, close complete slices and renew the rest (None: do not renew), at once."""
        ...

    def release(self, instance: str, held: Sequence[Held], reason: ReleaseReason) -> None:
        """Give leases back; their unfinished requests are queued again at once."""
        ...

    def preempt(self, epoch: int, instance: str, slices: int) -> int:
        """Ask an instance for `slices` back, latest deadline first; unclaimed ones go at once.

        Fenced by the leader's epoch. Returns how many were marked or requeued.
        """
        ...

    def reap(self, epoch: int) -> Reaped:
        """Requeue lost leases, expire slices past their time, and end batches left fully closed.

        Fenced by the leader's epoch; call only when the database was reachable for a lease term.
        """
        ...


class Planning(Protocol):
    """The scheduler's side: leadership, snapshots, plans and dispatch."""

    def lead(self, holder: str, term_s: float) -> int | None:
        """Take or renew leadership; the epoch while this holder leads, else None."""
        ...

    def resign(self, holder: str) -> None:
        """Give leadership up so that a standby takes over at once."""
        ...

    def snapshot(self) -> Snapshot:
        """Queue and fleet as of one moment; instances silent for too long appear as lost."""
        ...

    def save_plan(self, epoch: int, plan: Plan, decisions: Sequence[Decision]) -> None:
        """Write the difference to the saved virtual queues, the estimates, the first promises and
        the decisions. An estimate without a p50 promises nothing. NotLeader when the epoch is old.
        """
        ...

    def assign(self, epoch: int, assignments: Sequence[Assignment]) -> Mapping[str, int]:
        """Turn queued slices into assigned ones, in order; slices per instance actually assigned.

        NotLeader when the epoch is old.
        """
        ...

    def unassign(self, epoch: int, instance: str) -> int:
        """Take back what an instance was assigned but has not claimed. NotLeader as above."""
        ...

    def take_observations(self, epoch: int, limit: int = 1000) -> Sequence[Observation]:
        """Remove and return reports not yet folded in, oldest first. NotLeader as above."""
        ...

    def keep_forecasts(self, epoch: int, forecasts: Mapping[str, Mapping[str, object]]) -> None:
        """Keep what was foreseen of batches as they were promised, plain JSON values by batch.

        Only of batches with an estimate. NotLeader as above.
        """
        ...

    def forecasts(self) -> Mapping[str, Mapping[str, object]]:
        """What was kept of batches that have not ended, in the generation they are in."""
        ...

    def save_profiles(self, epoch: int, profiles: Sequence[Profile]) -> None:
        """Remember what was learned. NotLeader as above."""
        ...

    def fail_unservable(self, epoch: int, model: str, message: str, *, limit: int = 256) -> int:
        """Fail queued work of a model that nobody serves; slices closed, at most `limit`.

        Takes queued slices of `model` in id order. Each line still to be done gets an error row:
        status 404 with OpenAI's error envelope as body (`message`, type `invalid_request_error`,
        param `model`, code `model_not_found`). The slice closes as done and batches left fully
        closed end, as in a flush. NotLeader as above.
        """
        ...

    def queues(self) -> Sequence[QueueEntry]:
        """The saved virtual queues."""
        ...


class InstanceStore(Protocol):
    """The fleet."""

    def heartbeat(self, beat: Heartbeat) -> bool:
        """Report life; False when a newer boot of this name took over, and this one must end.

        The first beat of a new boot takes the name over and requeues what the old boot held.
        """
        ...

    def retire(self, name: str, boot_id: str) -> None:
        """Leave in good order: nothing may be held any more."""
        ...

    def died(self, name: str, boot_id: str) -> None:
        """Take a boot whose process is dead for lost at once; it cannot come back.

        What it was assigned is queued again, and what it leased as after a lost lease: an attempt
        is counted. Nothing changes where the boot has retired or was replaced.
        """
        ...

    def instances(self) -> Sequence[InstanceView]:
        """All instances seen lately, lost ones included."""
        ...

    def served_lately(self, model: str, within_s: float) -> bool:
        """Whether an instance with `model` was seen within `within_s`, though it may have left."""
        ...


class InteractiveStore(Protocol):
    """Interactive requests; one is leased to the instance it was routed to, fenced by its epoch."""

    def add_interactive(self, new: NewInteractive) -> float:
        """Store a call as leased by its instance; the time it was accepted at."""
        ...

    def reroute_interactive(
        self, request_id: str, epoch: int, instance: str, boot_id: str
    ) -> int | None:
        """Lease an open request to another boot; its next epoch, None where it is not ours to move.

        What the holder of the epoch before still reports is void from here on.
        """
        ...

    def mark_interactive(self, marks: Sequence[InteractiveMark]) -> int:
        """Record what holders report, the last mark of each request; how many were taken.

        Marks of an old epoch or of an ended request change nothing.
        """
        ...

    def interactive(self, tenant: str, request_id: str) -> InteractiveRequest:
        """The request. NotFound."""
        ...

    def timeliness(self, window_s: float) -> Timeliness:
        """How the requests fared that were answered within the last `window_s`."""
        ...

    def sweep_interactive(self, grace_s: float, limit: int = 1000) -> int:
        """Fail open requests accepted over `grace_s` ago whose boot has been gone; how many.

        Whoever waits for one moves it sooner; this ends those nobody waits for any more, and those
        that for much longer have not reached their boot although it is there.
        """
        ...

    def forget_interactive(self, bodies_s: float, rows_s: float, limit: int = 1000) -> int:
        """Empty bodies `bodies_s` after their end and drop rows after `rows_s`; how many."""
        ...


class OutboxStore(Protocol):
    """Completion events on their way out."""

    def claim_outbox(self, holder: str, limit: int, lease_s: float) -> Sequence[OutboxItem]:
        """Due items, leased so that nobody else sends them meanwhile."""
        ...

    def record_delivery(self, attempt: DeliveryAttempt) -> None:
        """Log an attempt and set what is next for its item."""
        ...

    def deliveries(
        self, tenant: str, batch_id: str
    ) -> Sequence[tuple[OutboxItem, DeliveryAttempt]]:
        """The delivery log of a batch, oldest first."""
        ...

    def replay_dead(self, tenant: str, batch_id: str) -> int:
        """Make the batch's dead deliveries due again, their attempts counted anew; how many."""
        ...

    def webhook_secrets(self, tenant: str) -> Sequence[str]:
        """The tenant's `whsec_…` secrets, newest first; the first call makes one."""
        ...

    def rotate_webhook_secret(self, tenant: str) -> str:
        """Add a fresh secret; the one before stays valid for a day. Returns the new one."""
        ...


class RetentionStore(Protocol):
    """Forgetting what is past its time, a bounded part at a time; all tell how much went."""

    def forget_batches(self, rows_s: float, limit: int = 10) -> int:
        """Drop batches that ended over `rows_s` ago, unless a delivery is still under way.

        To their owners they are gone at once, with their lines, story and deliveries, and their
        idempotency keys are free; their files stay.
        """
        ...

    def forget_lines(self, limit: int = 5000) -> int:
        """Drop what forgotten batches leave to be dropped bit by bit: lines and their results."""
        ...

    def forget_instances(self, silent_s: float) -> int:
        """Drop instances that were not heard of for `silent_s` and hold nothing."""
        ...


class KeyStore(Protocol):
    """Tenants and their API keys."""

    def add_key(self, key: ApiKey, secret: str) -> None:
        """Store a key by the hash of its secret, making the tenant when new."""
        ...

    def key_for(self, secret: str) -> ApiKey:
        """The key with this secret; Unauthenticated when unknown or revoked."""
        ...

    def list_keys(self, tenant: str | None = None) -> Sequence[ApiKey]:
        """Keys of one tenant, or of all."""
        ...

    def revoke_key(self, key_id: str) -> ApiKey:
        """End a key at once. NotFound when unknown."""
        ...


class Store(
    FileStore,
    BatchStore,
    IntakeStore,
    ExportStore,
    Ledger,
    Planning,
    InstanceStore,
    InteractiveStore,
    OutboxStore,
    RetentionStore,
    KeyStore,
    Protocol,
):
    """Everything that must survive, behind one object."""

    def ping(self) -> None:
        """Raise Unavailable unless the database answers and its schema is current."""
        ...

    def now(self) -> float:
        """The database's clock."""
        ...

    def close(self) -> None:
        """Give connections back."""
        ...
