"""Puts requests into engines and turns what becomes of them into rows."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from functools import lru_cache, partial

import structlog

from qlm_batch.domain.engine import EngineAnswer, EngineRequest
from qlm_batch.domain.errors import EngineDead
from qlm_batch.domain.jobs import ClaimedRequest, ResultRow, SloClass
from qlm_batch.domain.snapshot import Output
from qlm_batch.ids import id_series
from qlm_batch.scheduling import agent
from qlm_workers import rows
from qlm_workers.hosts import Host
from qlm_workers.leases import Lease
from qlm_workers.link import Link

log = structlog.get_logger(__name__)


class Feeder:
    """Keeps engines filled to their cap.

    `settle` takes each outcome, `died` an engine's death, `crashed` any fault of our own.
    """

    def __init__(
        self,
        link: Link,
        settle: Callable[[Lease, ResultRow], None],
        died: Callable[[Host, EngineDead], None],
        crashed: Callable[[], None],
    ) -> None:
        self._link = link
        self._settle = settle
        self._died = died
        self._crashed = crashed
        self._open = True
        self._new_id = id_series(rows.REQUEST)

    def feed(self, host: Host) -> None:
        """Put in what fits."""
        while self._open and (item := host.take()) is not None:
            lease, request = item
            host.inside += 1
            task = asyncio.create_task(self._serve(host, lease, request))
            lease.tasks[request.position] = task
            task.add_done_callback(partial(self._left, host, lease, request.position))

    def close(self) -> None:
        """Put nothing in any more."""
        self._open = False

    async def _serve(self, host: Host, lease: Lease, request: ClaimedRequest) -> None:
        try:
            self._settle(lease, await self._answer(host, lease, request))
        except EngineDead as death:
            self._died(host, death)
        except Exception:
            log.exception("serving a request crashed", slice=lease.slice.slice_id)
            self._crashed()
        finally:
            self._left(host, lease, request.position, asyncio.current_task())

    def _left(
        self, host: Host, lease: Lease, position: int, task: asyncio.Task[None] | None
    ) -> None:
        """Give its place to the next; once, also for a task cancelled before it had begun."""
        if lease.tasks.get(position) is task:
            del lease.tasks[position]
            host.inside -= 1
            self.feed(host)

    async def _answer(self, host: Host, lease: Lease, request: ClaimedRequest) -> ResultRow:
        """Serve a request, trying again where that may help, and make its row."""
        claimed = lease.slice
        request_id = self._new_id()
        began, started_at = time.monotonic(), self._link.now()
        wanted = EngineRequest(
            request_id=request_id,
            endpoint=claimed.endpoint,
            body=request.body,
            priority=lease.priority,
            cache_salt=salt_of(claimed.tenant),
        )
        attempts = 0
        while True:
            attempts += 1
            answer, fault = await self._attempt(host, wanted)
            again = answer is None or agent.worth_retrying(answer.status_code)
            delay = agent.retry_delay(attempts) if again else None
            if delay is None:
                break
            await asyncio.sleep(delay)
        if answer is None:
            log.warning("engine failed on a request", request_id=request_id, error=repr(fault))
            return rows.failed(
                claimed,
                request,
                "engine_timeout" if isinstance(fault, TimeoutError) else "engine_error",
                f"The engine failed on this request {attempts} times: {fault!r}",
                request_id=request_id,
                started_at=started_at,
            )
        if 200 <= answer.status_code < 300:
            output_tokens = answer.usage.output_tokens
            host.finished(
                claimed.model,
                Output(claimed.tenant, output_tokens, request.prompt_tokens, answer.cut),
            )
            host.timed(SloClass.BATCH, answer.first_token_s, answer.duration_s, output_tokens)
        duration_s = time.monotonic() - began
        return rows.answered(claimed, request, request_id, answer, started_at, duration_s)

    async def _attempt(
        self, host: Host, wanted: EngineRequest
    ) -> tuple[EngineAnswer | None, Exception | None]:
        """One try: the answer, or what the engine raised instead."""
        try:
            return await host.engine.answer(wanted), None
        except EngineDead:
            raise
        except Exception as fault:  # noqa: BLE001 - one request's fault must not end the others
            return None, fault
        finally:
            host.moved(time.monotonic())


@lru_cache(maxsize=4096)
def salt_of(tenant: str) -> str:
    """What keeps this tenant's prefix cache apart from the others'."""
    return hashlib.blake2b(tenant.encode(), digest_size=16).hexdigest()
