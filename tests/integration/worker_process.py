"""A real worker process around a ledger that tells, line by line, what is asked of it.

Run as `python -m tests.integration.worker_process REDIS_URL '{"slices": 1, "engine": "hang"}'`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from qlm_batch.dispatch.celery_app import make_app
from qlm_batch.domain.jobs import ClaimedSlice, EngineKind, ResultRow
from qlm_batch.domain.ledger import Directive, FlushOutcome, Held, ReleaseReason
from qlm_batch.domain.records import Heartbeat
from qlm_batch.settings import Settings
from qlm_workers.hosts import Host
from qlm_workers.lifecycle import EngineThread, end_on_signals
from qlm_workers.meter import Meter
from qlm_workers.runner import Runner
from qlm_workers.worker import ended, serve
from tests.unit.worker_fakes import FakeEngine, FakeStore, dead, good, make_slice

RESPONSES = {"hang": lambda _: tell("hang"), "good": lambda _: good(), "dead": dead}


def tell(event: str, **what: object) -> None:
    # One write a line: several threads tell.
    sys.stdout.write(json.dumps({"event": event, **what}) + "\n")
    sys.stdout.flush()


class TellingStore(FakeStore):
    def claim_slices(self, *args: Any, **kwargs: Any) -> Sequence[ClaimedSlice]:
        claimed = super().claim_slices(*args, **kwargs)
        tell("claim", slices=[slice_.slice_id for slice_ in claimed])
        return claimed

    def flush(
        self, instance: str, rows: Sequence[ResultRow], held: Sequence[Held], **kwargs: Any
    ) -> FlushOutcome:
        outcome = super().flush(instance, rows, held, **kwargs)
        tell("flush", rows=len(rows), held=[lease.slice_id for lease in held])
        return outcome

    def release(self, instance: str, held: Sequence[Held], reason: ReleaseReason) -> None:
        super().release(instance, held, reason)
        tell("release", slices=[lease.slice_id for lease in held], reason=reason)

    def heartbeat(self, beat: Heartbeat) -> bool:
        tell("beat", state=beat.state)
        return super().heartbeat(beat)

    def retire(self, name: str, boot_id: str) -> None:
        super().retire(name, boot_id)
        tell("retire")


def main(redis_url: str, options: dict[str, Any]) -> int:
    settings = Settings(
        models=("m",),
        poll_s=options.get("poll_s", 60.0),
        heartbeat_s=0.1,
        lease_s=600.0,
        redis_url=redis_url,
    )
    store = TellingStore(*(make_slice(n + 1) for n in range(options.get("slices", 0))))
    if options.get("closed"):
        store.orders[1] = Directive.CLOSED
    engine = FakeEngine(RESPONSES[options.get("engine", "good")])
    host = Host("m", EngineKind.GENERATE, engine, Meter("gpu-0", "cpu", "m"))
    runner = Runner(store, [host], settings, boot_id="boot", device="cpu")
    celery = make_app(redis_url, instance="gpu-0")
    engines = EngineThread(runner, on_end=ended)
    end_on_signals(engines)
    serve(celery, engines, "gpu-0")
    return -1 if engines.verdict is None else int(engines.verdict)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], json.loads(sys.argv[2])))
