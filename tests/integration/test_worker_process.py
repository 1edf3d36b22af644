"""The worker as a process of its own, with a real broker and a ledger that tells what happens."""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from qlm_batch.dispatch.dispatcher import CeleryDispatcher
from qlm_batch.domain.messages import Assigned, Stopped
from qlm_batch.domain.snapshot import InstanceState
from qlm_batch.embedded.folders import Folders
from qlm_batch.embedded.valkey import EmbeddedValkey
from qlm_workers.exits import Exit

CHECKOUT = Path(__file__).parents[2]
MODULE = "tests.integration.worker_process"
HINT = Assigned("gpu-0", "boot")

Event = dict[str, Any]


class Worker:
    """A running worker and what its ledger told so far."""

    def __init__(self, redis_url: str, **options: object) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", MODULE, redis_url, json.dumps(options)],
            cwd=CHECKOUT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def hears(self, event: str, seconds: float = 60.0, **what: object) -> Event:
        """The next such event; anything else before it is skipped."""
        give_up_at = time.monotonic() + seconds
        while True:
            told = self._events.get(timeout=max(0.001, give_up_at - time.monotonic()))
            if told["event"] == event and all(told[k] == v for k, v in what.items()):
                return told

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def ends(self, seconds: float = 60.0) -> int:
        return self.process.wait(seconds)

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("{"):
                self._events.put(json.loads(line))


@contextmanager
def started(redis_url: str, **options: object) -> Iterator[Worker]:
    worker = Worker(redis_url, **options)
    try:
        yield worker
    finally:
        worker.process.kill()
        worker.process.wait()


@pytest.fixture
def dispatcher(redis_url: str) -> Iterator[CeleryDispatcher]:
    dispatcher = CeleryDispatcher(redis_url, timeout_s=30.0)
    yield dispatcher
    dispatcher.close()


def until_heard(worker: Worker, send: Callable[[], None], event: str, **what: object) -> Event:
    """Send until it arrives: a broadcast reaches only workers already listening."""
    give_up_at = time.monotonic() + 60.0
    while True:
        send()
        try:
            return worker.hears(event, 0.5, **what)
        except queue.Empty:
            assert time.monotonic() < give_up_at, f"no {event} after sending for 60 s"


def test_a_hint_wakes_a_worker_that_would_poll_much_later(
    redis_url: str, dispatcher: CeleryDispatcher
) -> None:
    with started(redis_url, poll_s=600.0) as worker:
        worker.hears("claim", slices=[])
        dispatcher.assigned(HINT)
        worker.hears("claim")
        dispatcher.assigned(HINT)
        worker.hears("claim")


def test_a_hint_for_an_older_boot_wakes_nobody(
    redis_url: str, dispatcher: CeleryDispatcher
) -> None:
    with started(redis_url, poll_s=600.0) as worker:
        worker.hears("claim", slices=[])
        dispatcher.assigned(Assigned("gpu-0", "older"))
        dispatcher.assigned(HINT)
        worker.hears("claim")
        with pytest.raises(queue.Empty):
            worker.hears("claim", 0.3)


def test_a_stop_broadcast_makes_it_ask_about_its_leases_and_abort(
    redis_url: str, dispatcher: CeleryDispatcher
) -> None:
    with started(redis_url, slices=1, engine="hang", closed=True, poll_s=600.0) as worker:
        worker.hears("claim", slices=[1])
        until_heard(worker, lambda: dispatcher.stopped(Stopped("batch_1")), "flush", held=[1])
        worker.signal(signal.SIGTERM)
        worker.hears("retire")
        assert worker.ends() == Exit.OK


def test_a_lost_hint_is_made_up_for_by_polling(redis_url: str) -> None:
    with started(redis_url, poll_s=0.1) as worker:
        for _ in range(3):
            worker.hears("claim", slices=[])


def test_the_first_signal_lets_an_idle_worker_end_in_order(redis_url: str) -> None:
    with started(redis_url, slices=2, engine="good") as worker:
        worker.hears("flush")
        worker.signal(signal.SIGTERM)
        worker.hears("retire")
        assert worker.ends() == Exit.OK


@pytest.mark.parametrize(
    "signals", [(signal.SIGTERM, signal.SIGTERM), (signal.SIGINT, signal.SIGINT), (signal.SIGQUIT,)]
)
def test_a_second_or_hard_signal_gives_the_leases_back_at_once(
    redis_url: str, signals: tuple[signal.Signals, ...]
) -> None:
    with started(redis_url, slices=1, engine="hang") as worker:
        worker.hears("hang")
        first, *second = signals
        worker.signal(first)
        for number in second:
            # Two signals that come together count as one.
            worker.hears("beat", state=InstanceState.DRAINING)
            worker.signal(number)
        worker.hears("release", slices=[1], reason="shutdown")
        worker.hears("retire")
        assert worker.ends() == Exit.OK


def test_an_engines_death_ends_the_process_with_its_own_status(redis_url: str) -> None:
    with started(redis_url, slices=1, engine="dead") as worker:
        worker.hears("release", slices=[1], reason="engine_died")
        assert worker.ends() == Exit.ENGINE_DIED


@pytest.fixture
def own_valkey(tmp_path: Path) -> Iterator[EmbeddedValkey]:
    """A server this test may stop and start; not started yet."""
    folders = Folders.under(tmp_path)
    server = EmbeddedValkey(folders)
    yield server
    server.stop()
    folders.remove_all()


def test_a_broker_away_at_the_start_and_restarted_later_costs_only_latency(
    own_valkey: EmbeddedValkey,
) -> None:
    with started(own_valkey.url, slices=1, poll_s=600.0) as worker:
        worker.hears("flush")
        # What it asks for once its hands are empty is no answer to a hint.
        worker.hears("claim", slices=[])
        own_valkey.start()
        dispatcher = CeleryDispatcher(own_valkey.url)
        dispatcher.assigned(HINT)
        worker.hears("claim", slices=[])
        own_valkey.stop()
        dispatcher.assigned(HINT)
        own_valkey.start()
        dispatcher.assigned(HINT)
        worker.hears("claim", slices=[])
        own_valkey.stop()
        dispatcher.close()
        worker.signal(signal.SIGTERM)
        worker.hears("retire")
        assert worker.ends() == Exit.OK
