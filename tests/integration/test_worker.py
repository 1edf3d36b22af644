"""`qlm worker` with the simulated engine, on a real database and a real broker."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from qlm_batch.dispatch.dispatcher import CeleryDispatcher
from qlm_batch.domain.jobs import Batch, BatchState, SliceState
from qlm_batch.domain.messages import Assigned, Stopped
from qlm_batch.domain.snapshot import InstanceState
from qlm_workers.exits import Exit
from tests.contract.harness import MODEL, TENANT, Bench, PostgresHarness, lines_of


@pytest.fixture
def bench(postgres_url: str) -> Iterator[Bench]:
    harness = PostgresHarness(postgres_url, STALE_S)
    yield Bench(harness)
    harness.close()


@pytest.fixture
def dispatcher(redis_url: str) -> Iterator[CeleryDispatcher]:
    dispatcher = CeleryDispatcher(redis_url, timeout_s=30.0)
    yield dispatcher
    dispatcher.close()


STALE_S = 3600.0
"""When a silent instance would count as lost also without a word."""
QLM_WORKER = ("-m", "qlm_cli", "worker")
START_S = 120.0
"""Three seconds of an idle processor, most of them imports; a busy one gives few of its own."""


@contextmanager
def worker(
    bench: Bench,
    postgres_url: str,
    redis_url: str,
    data_dir: Path,
    command: Sequence[str] = QLM_WORKER,
    **settings: object,
) -> Iterator[subprocess.Popen[bytes]]:
    """A worker that is ready, killed afterwards; `command` are Python's arguments."""
    values = {
        "instance": "gpu-0",
        "engine": "simulated",
        "models": f'["{MODEL}"]',
        "secret_key": "for tests",
        "data_dir": data_dir,
        "poll_s": 0.2,
        "heartbeat_s": 0.2,
        "simulated_time_scale": 0.0,
        "slots": 8,
    } | settings
    process = subprocess.Popen(
        [sys.executable, *command],
        env=os.environ
        | {"DATABASE_URL": postgres_url, "REDIS_URL": redis_url}
        | {f"QLM_{key.upper()}": str(value) for key, value in values.items()},
    )
    try:
        until(lambda: state(bench, str(values["instance"])) is InstanceState.READY, START_S)
        yield process
    finally:
        process.kill()
        process.wait()


def until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    """Wait until it holds; fail after `seconds`."""
    give_up_at = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < give_up_at, "waited in vain"
        time.sleep(0.005)


def submit(bench: Bench, lines: int, slice_requests: int = 4) -> Batch:
    """A batch of chat lines in progress."""
    bench.file()
    batch = bench.store.create_batch("batch_1", bench.spec())
    bench.store.claim_intake("intake", 60.0)
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 16}
    bench.store.load_lines(
        batch.id, "intake", lines_of(lines, body=json.dumps(body)), slice_requests
    )
    return batch


def state(bench: Bench, name: str = "gpu-0") -> InstanceState | None:
    return next((view.state for view in bench.store.instances() if view.name == name), None)


def boot(bench: Bench) -> str:
    return next(view.boot_id for view in bench.store.instances() if view.name == "gpu-0")


def slice_states(bench: Bench) -> set[SliceState]:
    return {look.state for look in bench.harness.slices()}


def test_every_line_of_a_batch_comes_back_once(
    bench: Bench, postgres_url: str, redis_url: str, data_dir: Path
) -> None:
    batch = submit(bench, 200, 16)
    with worker(bench, postgres_url, redis_url, data_dir):
        bench.assign()
        until(lambda: bench.get(batch.id).state is BatchState.FINALIZING)
        until(lambda: any(o.requests for o in bench.store.take_observations(bench.lead())))
    assert bench.get(batch.id).counts.completed == 200
    assert len(bench.harness.rows()) == 200


def test_a_hint_is_acted_on_long_before_the_next_poll(
    bench: Bench,
    postgres_url: str,
    redis_url: str,
    data_dir: Path,
    dispatcher: CeleryDispatcher,
) -> None:
    batch = submit(bench, 4)
    with worker(bench, postgres_url, redis_url, data_dir, poll_s=600.0):
        hint = Assigned("gpu-0", boot(bench))
        # The consumer connects while the engine starts; the first hint may wait for it.
        dispatcher.assigned(hint)
        bench.assign()
        dispatcher.assigned(hint)
        until(lambda: bench.get(batch.id).state is BatchState.FINALIZING, 10.0)


def test_a_cancelled_batch_leaves_the_engine(
    bench: Bench,
    postgres_url: str,
    redis_url: str,
    data_dir: Path,
    dispatcher: CeleryDispatcher,
) -> None:
    batch = submit(bench, 8, 8)
    with worker(bench, postgres_url, redis_url, data_dir, simulated_time_scale=1e4):
        bench.assign()
        until(lambda: any(view.running for view in bench.store.instances()))
        bench.store.cancel_batch(TENANT, batch.id)
        until(
            lambda: (
                dispatcher.stopped(Stopped(batch.id))
                or not any(view.running for view in bench.store.instances())
            )
        )


def test_a_stopped_worker_gives_its_leases_back(
    bench: Bench, postgres_url: str, redis_url: str, data_dir: Path
) -> None:
    submit(bench, 8)
    with worker(bench, postgres_url, redis_url, data_dir, simulated_time_scale=1e4) as process:
        bench.assign()
        # Leased is not yet in hand, and a worker with nothing in hand does not drain.
        until(lambda: any(view.running for view in bench.store.instances()))
        process.send_signal(signal.SIGTERM)
        until(lambda: state(bench) is InstanceState.DRAINING)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == Exit.OK
    assert slice_states(bench) == {SliceState.QUEUED}
    assert {look.attempts for look in bench.harness.slices()} == {0}


def test_what_a_killed_worker_leased_is_queued_again_long_before_its_term(
    bench: Bench, postgres_url: str, redis_url: str, data_dir: Path
) -> None:
    submit(bench, 8)
    endless = {"simulated_time_scale": 1e4, "lease_s": 600.0}
    with worker(bench, postgres_url, redis_url, data_dir, **endless) as process:
        bench.assign()
        until(lambda: slice_states(bench) == {SliceState.LEASED})
        process.kill()
        until(lambda: state(bench) is InstanceState.LOST)
    assert slice_states(bench) == {SliceState.QUEUED}
    assert {look.attempts for look in bench.harness.slices()} == {1}


def test_a_worker_that_ends_with_a_hung_engine_counts_as_lost_at_once(
    bench: Bench, postgres_url: str, redis_url: str, data_dir: Path
) -> None:
    submit(bench, 8)
    command = ("-m", "tests.chaos.worker", str(data_dir / "answers"))
    hanging = {"simulated_time_scale": 1.0, "stall_s": 0.5, "lease_s": 600.0}
    with worker(bench, postgres_url, redis_url, data_dir, command, **hanging) as process:
        process.send_signal(signal.SIGUSR1)
        bench.assign()
        assert process.wait(60) == Exit.ENGINE_HUNG
        until(lambda: state(bench) is InstanceState.LOST)
    assert slice_states(bench) == {SliceState.QUEUED}


def test_a_killed_worker_leaves_no_process_and_its_next_boot_takes_over(
    bench: Bench, postgres_url: str, redis_url: str, data_dir: Path
) -> None:
    batch = submit(bench, 8)
    with worker(bench, postgres_url, redis_url, data_dir, simulated_time_scale=1e4) as process:
        bench.assign()
        until(lambda: slice_states(bench) == {SliceState.LEASED})
        children = psutil.Process(process.pid).children(recursive=True)
        first = boot(bench)
        process.kill()
        process.wait()
        until(lambda: not any(child.is_running() for child in children))
    with worker(bench, postgres_url, redis_url, data_dir):
        until(lambda: boot(bench) != first)
        bench.assign()
        until(lambda: bench.get(batch.id).state is BatchState.FINALIZING)
    assert bench.get(batch.id).counts.completed == 8
