"""One real service, started by `qlm up` as a user would, shared by the acceptance tests."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.ports import free_port

CHECKOUT = Path(__file__).parents[2]


@dataclass(frozen=True)
class RunningService:
    """A service and the environment in which a user's commands find it."""

    url: str
    key: str
    port: int
    home: Path
    environment: Mapping[str, str]

    def qlm(self, *arguments: str, stdin: bytes | None = None) -> subprocess.CompletedProcess[str]:
        """Run the command line and return what it printed."""
        done = subprocess.run(
            [sys.executable, "-m", "qlm_cli", *arguments],
            input=stdin,
            capture_output=True,
            env=dict(self.environment),
            cwd=CHECKOUT,
            timeout=240,
            check=False,
        )
        return subprocess.CompletedProcess(
            done.args, done.returncode, done.stdout.decode(), done.stderr.decode()
        )


def user_environment(home: Path, port: int) -> dict[str, str]:
    """The environment of a user with an empty home and this Python's programs on the path."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("QLM_", "XDG_", "DATABASE"))}
    programs = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', os.defpath)}"
    return {**kept, "HOME": str(home), "PATH": programs, "QLM_PORT": str(port)}


@contextmanager
def running_service(
    home: Path, *options: str, settings: Mapping[str, str]
) -> Iterator[RunningService]:
    """`qlm up` of a user whose home is `home`, stopped by a Ctrl-C; its log is `up.log` there."""
    port = free_port()
    environment = {**user_environment(home, port), **settings}
    with (home / "up.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "qlm_cli", "up", "--json", *options],
            env=environment,
            cwd=CHECKOUT,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    assert process.stdout is not None
    first = process.stdout.readline()
    if not first:
        process.wait()
        pytest.fail(f"qlm up ended: {(home / 'up.log').read_text()}")
    ready = json.loads(first)
    yield RunningService(
        url=ready["url"],
        key=Path(ready["key_file"]).read_text().strip(),
        port=port,
        home=home,
        environment=environment,
    )
    process.send_signal(signal.SIGINT)
    assert process.wait(90) == 0
    process.stdout.close()


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningService]:
    """`qlm up` with a real vLLM engine and the shipped model."""
    home = tmp_path_factory.mktemp("home")
    record = {"QLM_RECORD": str(home / "log.jsonl.gz")}
    with running_service(home, settings=record) as running:
        yield running
