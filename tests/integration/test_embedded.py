"""The embedded servers start anywhere, survive crashes and leave nothing behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import psycopg
import pytest

from qlm_batch.domain.errors import ConfigurationError
from qlm_batch.embedded.folders import Folders
from qlm_batch.embedded.postgres import EmbeddedPostgres
from qlm_batch.embedded.process import ManagedProcess, ProcessSpec
from qlm_batch.embedded.supervisor import EXIT_CONFIGURATION, Supervisor
from qlm_batch.embedded.valkey import EmbeddedValkey

_HOLD = """
    import sys, time
    from pathlib import Path
    from qlm_batch.embedded.folders import Folders
    from qlm_batch.embedded.postgres import EmbeddedPostgres
    from qlm_batch.embedded.valkey import EmbeddedValkey

    folders = Folders.under(Path(sys.argv[1]))
    postgres, valkey = EmbeddedPostgres(folders), EmbeddedValkey(folders)
    postgres.start()
    valkey.start()
    print(postgres.process.pid, valkey.process.pid, flush=True)
    time.sleep(600)
"""


_START_AND_STOP = """
    import sys
    from pathlib import Path
    from qlm_batch.embedded.folders import Folders
    from qlm_batch.embedded.postgres import EmbeddedPostgres

    folders = Folders.under(Path(sys.argv[1]))
    assert folders.account is None
    postgres = EmbeddedPostgres(folders)
    postgres.start()
    postgres.stop()
    folders.remove_all()
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """A scratch folder outside pytest's own, which may be deep."""
    path = Path(tempfile.mkdtemp(prefix="qlm-test-"))
    yield path
    shutil.rmtree(path, ignore_errors=True)


def _wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.02)


def _one_row(folders: Folders) -> int:
    server = EmbeddedPostgres(folders)
    server.start()
    try:
        with psycopg.connect(server.url) as connection:
            connection.execute("CREATE TABLE IF NOT EXISTS kept (n int)")
            connection.execute("INSERT INTO kept VALUES (1)")
            row = connection.execute("SELECT count(*) FROM kept").fetchone()
            assert row is not None
            return int(row[0])
    finally:
        server.stop()


def test_postgres_keeps_its_data_from_one_start_to_the_next(folder: Path) -> None:
    folders = Folders.under(folder / "data")
    assert [_one_row(folders), _one_row(folders)] == [1, 2]
    folders.remove_all()


def test_it_starts_in_a_private_folder_with_a_very_long_path(folder: Path) -> None:
    private = folder / "private"
    private.mkdir(mode=0o700)
    folders = Folders.under(private / ("deep-" * 30))
    assert _one_row(folders) == 1
    folders.remove_all()


def test_two_services_run_side_by_side(folder: Path) -> None:
    both = [Folders.under(folder / name) for name in ("one", "two")]
    servers = [EmbeddedPostgres(folders) for folders in both]
    for server in servers:
        server.start()
    assert servers[0].url != servers[1].url
    for server in servers:
        psycopg.connect(server.url).close()
        server.stop()
    for folders in both:
        folders.remove_all()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_plain_user_can_run_it_too(folder: Path) -> None:
    folder.chmod(0o777)
    python = _python_for_everybody()
    outcome = subprocess.run(
        [python, "-c", textwrap.dedent(_START_AND_STOP), str(folder / "data")],
        user="nobody",
        group="nogroup",
        extra_groups=[],
        env={"PATH": os.defpath, "HOME": str(folder), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        cwd="/",
        check=False,
    )
    assert outcome.returncode == 0, outcome.stderr


def _python_for_everybody() -> str:
    """A Python of this version that another user can run, with this one's packages."""
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    for candidate in (sys.executable, f"/usr/bin/{version}", f"/usr/local/bin/{version}"):
        try:
            reached = subprocess.run(
                [candidate, "-c", "import psycopg, psutil, qlm_batch.embedded"],
                user="nobody",
                env={"PYTHONPATH": os.pathsep.join(sys.path)},
                capture_output=True,
                cwd="/",
                check=False,
            )
        except OSError:
            continue
        if reached.returncode == 0:
            return candidate
    pytest.skip("another user can reach neither this Python nor one like it")


def test_a_killed_supervisor_leaves_no_server_and_the_next_start_works(folder: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(_HOLD), str(folder / "data")],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None
    servers = [psutil.Process(int(pid)) for pid in holder.stdout.readline().split()]
    holder.kill()
    holder.wait()
    holder.stdout.close()
    _wait_until(lambda: not any(server.is_running() for server in servers))
    folders = Folders.under(folder / "data")
    assert _one_row(folders) == 1
    folders.remove_all()


def test_a_server_left_over_by_a_crash_is_ended_first(folder: Path) -> None:
    folders = Folders.under(folder / "data")
    left_over = EmbeddedPostgres(folders)
    left_over.start()
    assert _one_row(folders) == 1
    assert left_over.process.wait(10)
    folders.remove_all()


def test_valkey_answers_and_removes_its_socket(folder: Path) -> None:
    folders = Folders.under(folder / "data")
    server = EmbeddedValkey(folders)
    server.start()
    socket = folders.data_socket("valkey.sock")
    assert socket.is_socket()
    server.stop()
    assert not socket.exists()
    folders.remove_all()


def test_a_folder_of_somebody_else_is_refused(folder: Path) -> None:
    folders = Folders.under(folder / "data")
    shutil.rmtree(folders.sockets)
    folders.sockets.symlink_to(folder)
    with pytest.raises(ConfigurationError, match="belongs to somebody else"):
        Folders.under(folder / "data")
    folders.sockets.unlink()
    folders.remove_all()


def _python(name: str, code: str, folder: Path) -> ProcessSpec:
    return ProcessSpec(name, [sys.executable, "-c", code], folder / f"{name}.log", stop_wait_s=5.0)


def test_the_supervisor_restarts_what_ends(folder: Path) -> None:
    mark = folder / "starts"
    code = f"open({str(mark)!r}, 'a').write('x')"
    supervisor = Supervisor([_python("quick", code, folder)])
    supervisor.start()

    def started_twice() -> bool:
        supervisor.check()
        return mark.exists() and len(mark.read_text()) >= 2

    _wait_until(started_twice)
    supervisor.stop()


def test_a_child_that_cannot_work_ends_the_watch_with_its_last_words(folder: Path) -> None:
    code = f"print('the model is missing'); raise SystemExit({EXIT_CONFIGURATION})"
    supervisor = Supervisor([_python("worker", code, folder)])
    supervisor.start()

    def check_forever() -> bool:
        supervisor.check()
        return False

    with pytest.raises(ConfigurationError, match="the model is missing"):
        _wait_until(check_forever)
    supervisor.stop()


def test_stopping_kills_a_child_that_ignores_the_signal(folder: Path) -> None:
    code = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "print('ready', flush=True); time.sleep(600)"
    )
    spec = ProcessSpec("deaf", [sys.executable, "-c", code], folder / "deaf.log", stop_wait_s=0.2)
    process = ManagedProcess(spec)
    process.start()
    _wait_until(lambda: "ready" in process.log_tail())
    process.stop()
    assert process.poll() == -signal.SIGKILL
