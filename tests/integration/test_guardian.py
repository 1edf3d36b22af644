from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from qlm_workers.guardian import Guard

# A worker whose child forks a grandchild; both would sleep on for minutes.
WORKER = """
import os, subprocess, sys, time
from pathlib import Path
from qlm_workers.guardian import Guard
spared = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
guard = Guard()
child = subprocess.Popen([sys.executable, "-c",
    "import os, time; pid = os.fork(); "
    "open(os.environ['NOTE'], 'a').write(f'{os.getpid()}\\\\n') ; time.sleep(300)"])
Path(os.environ["SPARED"]).write_text(f"{spared.pid} {guard.pid}")
time.sleep(300)
"""


def wait_until(condition: Callable[[], bool], what: str, within_s: float = 60) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not in {within_s} s: {what}"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def watches(guardian: int) -> bool:
    """Whether it holds the descriptor that tells of a death, as it does between two looks."""
    for link in Path(f"/proc/{guardian}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            if "pidfd" in str(link.readlink()):
                return True
    return False


def looks_again(guardian: int) -> None:
    """Return once the guardian has looked, from the beginning to the end, after now."""
    process = psutil.Process(guardian)
    wait_until(lambda: watches(guardian), "guardian up")
    # It waits after each look; the look before its next wait may be under way already.
    waits = process.num_ctx_switches().voluntary
    wait_until(lambda: process.num_ctx_switches().voluntary >= waits + 2, "guardian looks again")


@pytest.fixture
def dead_worker(tmp_path: Path) -> Iterator[tuple[list[int], int, int]]:
    """The engine processes, the spared child and the guardian of a worker just SIGKILLed."""
    note, spared_note = tmp_path / "pids", tmp_path / "spared"
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER],
        env=os.environ | {"NOTE": str(note), "SPARED": str(spared_note)},
    )
    wait_until(lambda: note.exists() and len(note.read_text().split()) == 2, "children started")
    wait_until(lambda: spared_note.exists() and len(spared_note.read_text().split()) == 2, "spared")
    spared, guardian = map(int, spared_note.read_text().split())
    engine = [int(pid) for pid in note.read_text().split()]
    # The first look may have come before the children.
    looks_again(guardian)
    worker.send_signal(signal.SIGKILL)
    worker.wait()
    yield engine, spared, guardian
    for pid in (*engine, spared, guardian):
        if psutil.pid_exists(pid):
            psutil.Process(pid).kill()


def test_a_killed_worker_leaves_no_engine_process(
    dead_worker: tuple[list[int], int, int],
) -> None:
    engine, _, guardian = dead_worker
    wait_until(lambda: not any(map(alive, engine)), "engine processes gone")
    wait_until(lambda: not alive(guardian), "guardian gone")


def test_what_ran_before_the_guard_stood_is_left_alone(
    dead_worker: tuple[list[int], int, int],
) -> None:
    engine, spared, guardian = dead_worker
    wait_until(lambda: not alive(guardian), "guardian gone")
    assert alive(spared)
    assert not any(map(alive, engine))


def test_a_released_guard_ends_nothing() -> None:
    guard = Guard()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    guard.release()
    guard.release()
    assert child.poll() is None
    child.kill()
    child.wait()


def test_ending_children_spares_the_guardian_and_what_ran_before() -> None:
    before = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    guard = Guard()
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
    guard.end_children()
    assert not alive(child.pid)
    assert before.poll() is None
    assert alive(guard.pid)
    guard.release()
    before.kill()
    before.wait()


def test_a_grandchild_whose_parent_died_is_ended_too() -> None:
    guard = Guard()
    child = subprocess.Popen(
        [sys.executable, "-c", "import os, time; os.fork(); time.sleep(300)"],
    )
    wait_until(lambda: len(guard.children()) == 2, "both seen")
    grandchild = next(process for process in guard.children() if process.pid != child.pid)
    child.kill()
    child.wait()
    assert alive(grandchild.pid)
    guard.end_children()
    assert not alive(grandchild.pid)
    guard.release()


def test_what_another_engine_started_later_is_left_alone() -> None:
    sleeps = [sys.executable, "-c", "import time; time.sleep(300)"]
    first = Guard()
    own = subprocess.Popen([sys.executable, "-c", "import os, time; os.fork(); time.sleep(300)"])
    wait_until(lambda: len(first.children()) == 2, "both seen")
    first.settle()
    second = Guard()
    other = subprocess.Popen(sleeps)
    wait_until(lambda: len(second.children()) == 1, "the other seen")
    second.settle()
    grown = {process.pid for process in first.children()}
    first.end_children()
    assert not any(alive(pid) for pid in (own.pid, *grown))
    assert other.poll() is None
    assert alive(second.pid)
    second.end_children()
    assert not alive(other.pid)
    first.release()
    second.release()


def test_a_process_that_an_engine_starts_late_is_ended_with_it(tmp_path: Path) -> None:
    guard = Guard()
    go = tmp_path / "go"
    late = (
        "import pathlib, subprocess, sys, time\n"
        f"while not pathlib.Path({str(go)!r}).exists(): time.sleep(0.02)\n"
        "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])\n"
        "time.sleep(300)"
    )
    subprocess.Popen([sys.executable, "-c", late])
    wait_until(lambda: len(guard.children()) == 1, "the engine seen")
    guard.settle()
    go.touch()
    wait_until(lambda: len(guard.children()) == 2, "what it started seen")
    pids = [process.pid for process in guard.children()]
    guard.end_children()
    assert not any(map(alive, pids))
    guard.release()
