"""The leases a worker holds and the rows not stored yet: bookkeeping without I/O."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from qlm_batch.domain.jobs import ClaimedRequest, ClaimedSlice, ResultRow
from qlm_batch.domain.ledger import Directive, Held

NEVER = float("inf")


class Lease:
    """A claimed slice while this worker holds it.

    `open` are the requests without an outcome, by position; `tasks` those being served; `unsent`
    counts rows that are not stored yet. `preempted` leases are to be given back.
    """

    __slots__ = (
        "ended",
        "expires_next",
        "open",
        "preempted",
        "priority",
        "renewed_at",
        "slice",
        "tasks",
        "unsent",
    )

    def __init__(self, claimed: ClaimedSlice, priority: int, now: float) -> None:
        self.slice = claimed
        self.priority = priority
        self.renewed_at = now
        self.open: dict[int, ClaimedRequest] = {r.position: r for r in claimed.requests}
        self.tasks: dict[int, asyncio.Task[None]] = {}
        self.unsent = 0
        self.preempted = False
        self.ended = False
        self.expires_next = self._earliest_expiry()

    @property
    def complete(self) -> bool:
        """Whether every request has an outcome."""
        return not self.open

    def expires_at(self, request: ClaimedRequest) -> float:
        """When this request is given up (database time); NEVER when it is finished late."""
        if self.slice.expires_at is None:
            return NEVER
        return self.slice.expires_at if request.deadline is None else request.deadline

    def take_expired(self, now: float) -> list[ClaimedRequest]:
        """The open requests past their time at `now`."""
        if now < self.expires_next:
            return []
        expired = [r for r in self.open.values() if self.expires_at(r) <= now]
        gone = {r.position for r in expired}
        self.expires_next = min(
            (self.expires_at(r) for r in self.open.values() if r.position not in gone),
            default=NEVER,
        )
        return expired

    def cancel(self) -> None:
        """Stop its requests inside the engine."""
        for task in list(self.tasks.values()):
            task.cancel()

    def held(self, *, complete: bool = False) -> Held:
        """This lease as the store knows it."""
        return Held(self.slice.slice_id, self.slice.epoch, complete)

    def _earliest_expiry(self) -> float:
        return min(map(self.expires_at, self.open.values()), default=NEVER)


@dataclass(frozen=True, slots=True)
class Parcel:
    """What one flush carries: `rows`, and the leases it names, those in `complete` as finished.

    `bytes` is the size of the rows' bodies.
    """

    rows: Sequence[ResultRow]
    owners: Sequence[Lease]
    leases: Sequence[Lease]
    complete: frozenset[int]
    bytes: int

    @property
    def held(self) -> list[Held]:
        """The leases named, as the store knows them."""
        return [x.held(complete=x.slice.slice_id in self.complete) for x in self.leases]


class LeaseTable:
    """All leases held, and the rows on their way to the store, oldest first."""

    def __init__(self) -> None:
        self._leases: dict[int, Lease] = {}
        self._rows: deque[tuple[Lease, ResultRow]] = deque()
        self._travelling = 0
        self.in_hand = 0
        self.buffered_bytes = 0

    def __len__(self) -> int:
        return len(self._leases)

    @property
    def leases(self) -> list[Lease]:
        """Held now."""
        return list(self._leases.values())

    @property
    def buffered(self) -> int:
        """Rows not known to be stored, those on their way included."""
        return len(self._rows) + self._travelling

    @property
    def suspect(self) -> bool:
        """Whether a suspect slice is held, which nothing may join."""
        return any(lease.slice.suspect for lease in self._leases.values())

    def add(self, lease: Lease) -> Lease | None:
        """Hold a lease; returns the one of an older epoch of the same slice that it replaces."""
        before = self._leases.get(lease.slice.slice_id)
        if before is not None:
            self.drop(before)
        self._leases[lease.slice.slice_id] = lease
        self.in_hand += len(lease.open)
        return before

    def drop(self, lease: Lease) -> None:
        """Hold a lease no more; its rows are still sent, its open requests are not our matter."""
        if lease.ended:
            return
        lease.ended = True
        del self._leases[lease.slice.slice_id]
        self.in_hand -= len(lease.open)

    def settle(self, lease: Lease, row: ResultRow) -> bool:
        """Note a request's outcome; False when it had one already or the lease is gone."""
        if lease.ended or lease.open.pop(row.position, None) is None:
            return False
        self.in_hand -= 1
        self._append(lease, row)
        return True

    def parcel(self, limit: int, due: Iterable[Lease] = ()) -> Parcel:
        """Take up to `limit` rows, with the leases they finish and those `due` for renewal."""
        taken = [self._rows.popleft() for _ in range(min(limit, len(self._rows)))]
        for lease, _ in taken:
            lease.unsent -= 1
        self._travelling += len(taken)
        named = {lease.slice.slice_id: lease for lease in due if not lease.ended}
        for lease, _ in taken:
            if not lease.ended and lease.complete and not lease.unsent:
                named[lease.slice.slice_id] = lease
        return Parcel(
            rows=[row for _, row in taken],
            owners=[lease for lease, _ in taken],
            leases=list(named.values()),
            complete=frozenset(
                key for key, lease in named.items() if lease.complete and not lease.unsent
            ),
            bytes=sum(_size(row) for _, row in taken),
        )

    def put_back(self, parcel: Parcel) -> None:
        """Keep what could not be stored, in its old order."""
        for lease, row in zip(reversed(parcel.owners), reversed(parcel.rows), strict=True):
            lease.unsent += 1
            self._rows.appendleft((lease, row))
        self._travelling -= len(parcel.rows)

    def stored(
        self, parcel: Parcel, directives: Mapping[int, Directive], now: float | None
    ) -> list[Lease]:
        """Apply what the store said about a parcel; returns leases that end without being asked to.

        `now` is when the lease was renewed, None when it was not.
        """
        self._travelling -= len(parcel.rows)
        self.buffered_bytes -= parcel.bytes
        lost: list[Lease] = []
        for lease in {id(lease): lease for lease in (*parcel.leases, *parcel.owners)}.values():
            key = lease.slice.slice_id
            if self._leases.get(key) is not lease:
                continue
            order = directives.get(key, Directive.KEEP)
            if order in (Directive.CLOSED, Directive.LOST):
                self.drop(lease)
                lost.append(lease)
            elif key in parcel.complete or order is Directive.PREEMPT:
                # A slice the store did not close although all is told has to be looked at afresh.
                lease.preempted = True
        if now is not None:
            for lease in parcel.leases:
                lease.renewed_at = now
        return lost

    def _append(self, lease: Lease, row: ResultRow) -> None:
        lease.unsent += 1
        self.buffered_bytes += _size(row)
        self._rows.append((lease, row))


def _size(row: ResultRow) -> int:
    return len(row.body or "")
