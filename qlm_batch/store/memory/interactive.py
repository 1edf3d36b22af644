"""Interactive requests of the in-memory store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

import numpy as np

from qlm_batch.domain.errors import NotFound
from qlm_batch.domain.interactive import (
    OPEN_INTERACTIVE,
    InteractiveMark,
    InteractiveRequest,
    InteractiveState,
    NewInteractive,
    Timeliness,
)
from qlm_batch.store.interactive import LOST, UNSENT_GRACES
from qlm_batch.store.memory.state import Facet, locked


class MemoryInteractive(Facet):
    """InteractiveStore in memory."""

    @locked
    def add_interactive(self, new: NewInteractive) -> float:
        """Store a call as leased by its instance; the time it was accepted at."""
        now = self.state.clock()
        self.state.interactive[new.id] = InteractiveRequest(
            **asdict(new), epoch=1, state=InteractiveState.SENT, created_at=now
        )
        return now

    @locked
    def reroute_interactive(
        self, request_id: str, epoch: int, instance: str, boot_id: str
    ) -> int | None:
        """Lease an open request to another boot; its next epoch."""
        found = self._open(request_id, epoch)
        if found is None:
            return None
        self.state.interactive[request_id] = replace(
            found,
            instance=instance,
            boot_id=boot_id,
            epoch=epoch + 1,
            state=InteractiveState.SENT,
        )
        return epoch + 1

    @locked
    def mark_interactive(self, marks: Sequence[InteractiveMark]) -> int:
        """Record the last mark of each request; how many were taken."""
        taken = 0
        for mark in {mark.id: mark for mark in marks}.values():
            found = self._open(mark.id, mark.epoch)
            if found is None:
                continue
            taken += 1
            self.state.interactive[mark.id] = replace(
                found,
                state=mark.state,
                ended_at=None if mark.state in OPEN_INTERACTIVE else self.state.clock(),
                status_code=mark.status_code,
                result=mark.result,
                usage=mark.usage,
                first_token_s=mark.first_token_s,
                duration_s=mark.duration_s,
            )
        return taken

    @locked
    def interactive(self, tenant: str, request_id: str) -> InteractiveRequest:
        """The request. Raises NotFound."""
        found = self.state.interactive.get(request_id)
        if found is None or found.tenant != tenant:
            raise NotFound(
                f"No request found with id '{request_id}'.", code="request_not_found", param="id"
            )
        return found

    @locked
    def timeliness(self, window_s: float) -> Timeliness:
        """How the requests fared that were answered within the last `window_s`."""
        since = self.state.clock() - window_s
        ended = [
            (request, request.first_token_s)
            for request in self.state.interactive.values()
            if (request.ended_at or 0.0) > since
            and request.state is InteractiveState.DONE
            and request.first_token_s is not None
        ]
        if not ended:
            return Timeliness()
        first = [first_s for _, first_s in ended]
        per_token = [
            ((request.duration_s or 0.0) - first_s) / (request.usage.output_tokens - 1)
            for request, first_s in ended
            if request.usage.output_tokens > 1
        ]
        p50, p95, p99 = (float(np.percentile(first, level)) for level in (50, 95, 99))
        return Timeliness(
            requests=len(ended),
            ttft_p50=p50,
            ttft_p95=p95,
            ttft_p99=p99,
            tpot_p50=float(np.median(per_token)) if per_token else None,
            met=sum(first_s <= request.ttft_s for request, first_s in ended) / len(ended),
        )

    @locked
    def sweep_interactive(self, grace_s: float, limit: int = 1000) -> int:
        """As the Postgres store does."""
        now = self.state.clock()
        lost = [
            request
            for request in self.state.interactive.values()
            if request.state in OPEN_INTERACTIVE
            and request.created_at < now - grace_s
            and (
                not self._present(request, now - grace_s)
                or (
                    request.state is InteractiveState.SENT
                    and request.created_at < now - UNSENT_GRACES * grace_s
                )
            )
        ][:limit]
        for request in lost:
            self.state.interactive[request.id] = replace(
                request, state=InteractiveState.FAILED, ended_at=now, status_code=500, result=LOST
            )
        return len(lost)

    @locked
    def forget_interactive(self, bodies_s: float, rows_s: float, limit: int = 1000) -> int:
        """Empty bodies and results, and drop rows, whose time is over; how many."""
        now = self.state.clock()
        ended = [r for r in self.state.interactive.values() if r.ended_at is not None]
        kept = [r for r in ended if r.body is not None or r.result is not None]
        old = [r for r in kept if (r.ended_at or now) < now - bodies_s][:limit]
        for request in old:
            self.state.interactive[request.id] = replace(request, body=None, result=None)
        gone = [r.id for r in ended if (r.ended_at or now) < now - rows_s][:limit]
        for request_id in gone:
            del self.state.interactive[request_id]
        return len(old) + len(gone)

    def _open(self, request_id: str, epoch: int) -> InteractiveRequest | None:
        found = self.state.interactive.get(request_id)
        if found is None or found.epoch != epoch or found.state not in OPEN_INTERACTIVE:
            return None
        return found

    def _present(self, request: InteractiveRequest, since: float) -> bool:
        """Whether the request's boot was there after `since`."""
        known = self.state.instances.get(request.instance)
        if known is None or known.beat.boot_id != request.boot_id or known.retired:
            return False
        return known.at + self.state.silent_s > since
