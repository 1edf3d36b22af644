"""Stores rows, renews leases and follows the store's orders."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import structlog

from qlm_batch.domain.errors import Unavailable
from qlm_batch.domain.ledger import ReleaseReason
from qlm_batch.settings import Settings
from qlm_workers import rows
from qlm_workers.leases import Lease, LeaseTable, Parcel
from qlm_workers.link import Link, backoff, pause

log = structlog.get_logger(__name__)

RENEWALS_PER_LEASE = 4
MOST_ROWS_PER_FLUSH = 2048


class Flusher:
    """Sends rows every `flush_s` or `flush_rows`, and renews each lease four times in its term.

    `flushed` is called after every flush. What cannot be stored is kept and tried again.
    """

    def __init__(
        self, link: Link, table: LeaseTable, settings: Settings, flushed: Callable[[], None]
    ) -> None:
        self._link = link
        self._table = table
        self._settings = settings
        self._flushed = flushed
        self._dirty = asyncio.Event()
        self._full = asyncio.Event()
        self._review = False
        self._most_rows = MOST_ROWS_PER_FLUSH

    def settled(self) -> None:
        """A row was added to the table."""
        self._dirty.set()
        if self._table.buffered >= self._settings.flush_rows:
            self._full.set()

    def adopted(self, lease: Lease) -> None:
        """A lease was added; one without anything to do is finished at once."""
        if lease.complete:
            self._dirty.set()

    def review(self) -> None:
        """Ask the store about all leases now."""
        self._review = True
        self._dirty.set()
        self._full.set()

    async def run(self, over: asyncio.Event) -> None:
        """Flush until it is over; the last rows are the caller's to flush."""
        failures = 0
        ending = asyncio.create_task(self._wake_at(over))
        while not over.is_set():
            await pause(self._dirty, self._renewal_in())
            await pause(self._full, self._settings.flush_s)
            self._dirty.clear()
            self._full.clear()
            most_rows = self._most_rows
            try:
                await self.flush(renew=True)
                failures = 0
            except Exception as error:  # noqa: BLE001 - no fault of the store may end the work
                failures += 1
                self._link.failed("flush", error, failures)
                await self._renew()
                self._dirty.set()
                if self._most_rows >= most_rows:
                    await pause(over, backoff(failures))
        await ending

    async def flush(self, *, renew: bool) -> None:
        """Flush once. Raises as the store does; then nothing is lost."""
        now = time.monotonic()
        review, self._review = self._review, False
        parcel = self._table.parcel(self._most_rows, self._due(now, review) if renew else [])
        if parcel.rows or parcel.leases:
            try:
                await self._send(parcel, now, renew=renew)
            except BaseException as error:
                self._table.put_back(parcel)
                self._review = self._review or review
                if isinstance(error, Exception) and not isinstance(error, Unavailable):
                    await self._isolate(parcel)
                raise
            self._most_rows = min(MOST_ROWS_PER_FLUSH, 2 * self._most_rows)
        await self._give_back_preempted()
        if self._table.buffered:
            self._dirty.set()
        self._flushed()

    async def release(self, leases: Sequence[Lease], reason: ReleaseReason) -> None:
        """Give leases back."""
        held = [lease.held() for lease in leases]
        await self._link.call(self._link.store.release, self._settings.instance, held, reason)

    async def _send(self, parcel: Parcel, now: float, *, renew: bool) -> None:
        outcome = await self._link.call(
            self._link.store.flush,
            self._settings.instance,
            parcel.rows,
            parcel.held,
            lease_s=self._settings.lease_s if renew else None,
        )
        for lease in self._table.stored(parcel, outcome.directives, now if renew else None):
            lease.cancel()
        if outcome.rejected:
            log.info("rows the store had no use for", rejected=outcome.rejected)

    async def _renew(self) -> None:
        """Renew what is due without any rows: a database whose disk is full takes that alone.

        Otherwise all leases would have run out by the time there is room, and what is finished
        would be computed again.
        """
        now = time.monotonic()
        due = self._due(now, False)
        if not due:
            return
        with contextlib.suppress(Exception):
            await self._send(Parcel((), (), due, frozenset(), 0), now, renew=True)

    async def _isolate(self, refused: Parcel) -> None:
        """Narrow down which row the store cannot take; once it stands alone, tell that instead.

        A store that does not take the plain error row either has another problem.
        """
        if len(refused.rows) != 1:
            self._most_rows = max(1, len(refused.rows) // 2)
            return
        parcel = self._table.parcel(1)
        told = rows.not_stored(parcel.rows[0])
        try:
            await self._send(replace(parcel, rows=[told]), time.monotonic(), renew=False)
        except BaseException as error:
            self._table.put_back(parcel)
            if not isinstance(error, Exception):
                raise
            # The caller reports the first failure.
        else:
            log.error("a result could not be stored", request_id=told.request_id)

    def _renewal_in(self) -> float:
        """Seconds until a lease has to be renewed."""
        every = self._settings.lease_s / RENEWALS_PER_LEASE
        oldest = min((lease.renewed_at for lease in self._table.leases), default=None)
        return every if oldest is None else max(0.0, oldest + every - time.monotonic())

    def _due(self, now: float, review: bool) -> list[Lease]:
        """The leases to be renewed or asked about."""
        oldest = now - self._settings.lease_s / RENEWALS_PER_LEASE
        return [
            lease
            for lease in self._table.leases
            if review or lease.renewed_at <= oldest or not lease.slice.requests
        ]

    async def _give_back_preempted(self) -> None:
        """Release leases the store wants back, once their rows are stored."""
        ready = []
        for lease in self._table.leases:
            if lease.preempted:
                lease.cancel()
                if lease.unsent:
                    self._dirty.set()
                else:
                    ready.append(lease)
        if ready:
            await self.release(ready, ReleaseReason.PREEMPTED)
            for lease in ready:
                self._table.drop(lease)

    async def _wake_at(self, over: asyncio.Event) -> None:
        await over.wait()
        self._dirty.set()
        self._full.set()
