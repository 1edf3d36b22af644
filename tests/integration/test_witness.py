"""Who tells the store that a worker was killed, and that it does nothing else."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from sqlalchemy import make_url

from qlm_batch.domain.snapshot import InstanceState
from tests.contract.harness import Bench, PostgresHarness
from tests.integration.test_guardian import alive
from tests.integration.test_worker import STALE_S, state, until

# A worker in a terminal of its own, which ends in order when it is told a word.
WORKER = """
import os, sys
from qlm_workers.witness import Witness
witness = Witness(os.environ["URL"], "gpu-0", "boot-1", patience_s=float(os.environ["PATIENCE"]))
print(witness.pid, flush=True)
sys.stdin.readline()
witness.release()
witness.release()
"""


@pytest.fixture
def bench(postgres_url: str) -> Iterator[Bench]:
    harness = PostgresHarness(postgres_url, STALE_S)
    yield Bench(harness)
    harness.close()


@contextmanager
def watched(
    url: str, patience_s: float = 60.0
) -> Iterator[tuple[subprocess.Popen[str], psutil.Process]]:
    """A worker and its witness, which is at its post."""
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER],
        env=os.environ | {"URL": url, "PATIENCE": str(patience_s)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert worker.stdout is not None
    witness = psutil.Process(int(worker.stdout.readline()))
    until(lambda: _ignores(witness, signal.SIGTERM))
    try:
        yield worker, witness
    finally:
        worker.kill()
        worker.communicate()
        if alive(witness.pid):
            witness.kill()


def _ignores(process: psutil.Process, number: signal.Signals) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text()
    told = dict(line.split(":\t", 1) for line in status.splitlines())
    return bool(int(told["SigIgn"], 16) & 1 << (number - 1))


def test_it_tells_of_a_kill_and_leaves(bench: Bench, postgres_url: str) -> None:
    bench.beat()
    with watched(postgres_url) as (worker, witness):
        worker.kill()
        until(lambda: state(bench) is InstanceState.LOST)
        until(lambda: not alive(witness.pid))


def test_signals_to_all_of_a_service_do_not_end_it_before_it_has_told(
    bench: Bench, postgres_url: str
) -> None:
    bench.beat()
    with watched(postgres_url) as (worker, witness):
        os.killpg(worker.pid, signal.SIGINT)
        witness.send_signal(signal.SIGTERM)
        until(lambda: state(bench) is InstanceState.LOST)


def test_it_is_gone_with_a_worker_that_ends_in_order_and_tells_nothing(
    bench: Bench, postgres_url: str
) -> None:
    bench.beat()
    with watched(postgres_url) as (worker, witness):
        worker.communicate("end\n", 30)
        assert worker.returncode == 0
        assert not alive(witness.pid)
    assert state(bench) is InstanceState.READY


def test_it_shows_no_password_to_others_and_holds_little(
    postgres_url: str,
) -> None:
    with watched(postgres_url) as (_, witness):
        assert postgres_url not in " ".join(witness.cmdline())
        assert witness.memory_info().rss < 32 * 1024**2


def test_a_database_that_is_away_is_tried_again(
    bench: Bench, postgres_url: str, tmp_path: Path
) -> None:
    bench.beat()
    url = make_url(postgres_url)
    (real,) = Path(str(url.query["host"])).glob(".s.PGSQL.*[0-9]")
    moved = url.update_query_dict({"host": str(tmp_path)}).render_as_string(hide_password=False)
    here = tmp_path / real.name
    with socket.socket(socket.AF_UNIX) as away, watched(moved) as (worker, _):
        away.settimeout(60)
        away.bind(str(here))
        away.listen()
        worker.kill()
        away.accept()[0].close()
        here.unlink()
        here.symlink_to(real)
        until(lambda: state(bench) is InstanceState.LOST)


@pytest.mark.parametrize("mute", [False, True])
def test_a_database_that_stays_away_is_given_up(mute: bool) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if mute:
            # The kernel takes connections, and nobody ever says a word.
            server.listen()
        url = f"postgresql://qlm@127.0.0.1:{server.getsockname()[1]}/qlm"
        with watched(url, patience_s=1.0) as (worker, witness):
            worker.kill()
            until(lambda: not alive(witness.pid), 4.0)
