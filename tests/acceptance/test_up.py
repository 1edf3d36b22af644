"""`qlm up` starts, refuses, stops and survives as a user expects."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from qlm_workers.simulated_engine import SimulatedEngine
from tests.contract.openai_server import Server, serving
from tests.ports import free_port

from .conftest import CHECKOUT, user_environment

pytestmark = pytest.mark.slow


@dataclass
class Up:
    """A running `qlm up` and what its first line said."""

    process: subprocess.Popen[str]
    ready: dict[str, object]
    said: Path
    environment: dict[str, str]

    def qlm(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run another command as the same user."""
        return subprocess.run(
            [sys.executable, "-m", "qlm_cli", *arguments],
            env=self.environment,
            cwd=CHECKOUT,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )


@contextmanager
def _up(home: Path, *options: str) -> Iterator[Up]:
    home.mkdir(exist_ok=True)
    environment = user_environment(home, free_port())
    said = home / "up.log"
    with said.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "qlm_cli", "up", "--json", *options],
            env=environment,
            cwd=CHECKOUT,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    assert process.stdout is not None
    try:
        first = process.stdout.readline()
        assert first, said.read_text()
        yield Up(process, json.loads(first), said, environment)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(90)
        process.stdout.close()


def _descendants(process: subprocess.Popen[str]) -> list[psutil.Process]:
    return psutil.Process(process.pid).children(recursive=True)


def _wait_until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.05)


def test_it_runs_a_file_and_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    with _up(tmp_path, "--engine", "simulated") as up:
        done = up.qlm("submit", "examples/chat.jsonl", "--wait")
        assert done.returncode == 0, done.stderr
        children = _descendants(up.process)
        assert len(children) >= 7
    assert up.process.returncode == 0
    _wait_until(lambda: not any(child.is_running() for child in children))


def test_a_killed_service_leaves_nothing_and_starts_again_with_its_data(tmp_path: Path) -> None:
    with _up(tmp_path, "--engine", "simulated") as up:
        submitted = up.qlm("submit", "examples/chat.jsonl", "--wait").stdout.split()[0]
        children = _descendants(up.process)
        up.process.kill()
        _wait_until(lambda: not any(child.is_running() for child in children))
    with _up(tmp_path, "--engine", "simulated") as up:
        assert json.loads(up.qlm("status", submitted, "--json").stdout)["status"] == "completed"


def test_a_second_service_in_the_same_folder_is_refused(tmp_path: Path) -> None:
    with _up(tmp_path, "--engine", "simulated") as up:
        second = up.qlm("up", "--engine", "simulated", "--port", str(free_port()))
        assert second.returncode == 78
        assert "already runs" in second.stderr


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        outcome = subprocess.run(
            [sys.executable, "-m", "qlm_cli", "up", "--engine", "simulated", "--port", port],
            env=user_environment(tmp_path, free_port()),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert outcome.returncode == 78
    assert port in outcome.stderr and "--port" in outcome.stderr


def test_a_model_that_is_not_there_ends_the_start_with_a_clear_message(tmp_path: Path) -> None:
    outcome = subprocess.run(
        [sys.executable, "-m", "qlm_cli", "up", "--model", "./no-such-folder"],
        env=user_environment(tmp_path, free_port()),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert outcome.returncode == 78
    assert "no-such-folder" in outcome.stderr


def test_a_server_that_already_runs_gets_deadlines_and_a_ledger(tmp_path: Path) -> None:
    server = Server(SimulatedEngine("qlm-tiny", time_scale=0.0), "qlm-tiny", 8192)
    with serving(server), _up(tmp_path, "--engine", "openai", "--url", server.url) as up:
        said = up.said.read_text()
        assert "pull: yes" in said and "evict: no" in said
        done = up.qlm("submit", "examples/chat.jsonl", "--wait")
        assert done.returncode == 0, done.stderr + done.stdout
        assert len(server.bodies) >= 150
