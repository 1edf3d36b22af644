"""The service as `docker-compose.yml` puts it together: its processes and variables, over TCP."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import redis
import yaml

from qlm_batch.embedded.folders import Folders
from qlm_batch.embedded.postgres import DATABASE, USER, EmbeddedPostgres
from qlm_batch.embedded.process import ManagedProcess
from qlm_batch.embedded.valkey import EmbeddedValkey
from tests.ports import free_port

CHECKOUT = Path(__file__).parents[1]
COMPOSE = CHECKOUT / "docker-compose.yml"
_VARIABLE = re.compile(r"\$(?:\$|\{(?P<name>\w+)(?::(?P<kind>[-?])(?P<text>[^}]*))?\})")


def compose_file(variables: Mapping[str, str]) -> dict[str, Any]:
    """`docker-compose.yml` with its variables filled in; KeyError where a needed one is missing."""
    found: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())
    return {key: _filled(value, variables) for key, value in found.items()}


def _filled(value: Any, variables: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        return {key: _filled(inner, variables) for key, inner in value.items()}
    if isinstance(value, list):
        return [_filled(inner, variables) for inner in value]
    if not isinstance(value, str):
        return value

    def fill(match: re.Match[str]) -> str:
        name, kind, text = match["name"], match["kind"], match["text"]
        if name is None:
            return "$"
        if variables.get(name):
            return variables[name]
        if kind == "?":
            raise KeyError(text)
        return text or ""

    return _VARIABLE.sub(fill, value)


class TcpPostgres(EmbeddedPostgres):
    """The wheel's PostgreSQL as a server of its own, listening on loopback with a password."""

    def __init__(self, folders: Folders) -> None:
        super().__init__(folders)
        self.port = free_port()
        options = ["-c", "listen_addresses=127.0.0.1", "-c", f"port={self.port}"]
        spec = self.process.spec
        self.process = ManagedProcess(replace(spec, argv=[*spec.argv, *options]))

    @property
    def password(self) -> str:
        """Of its one user."""
        return (self._folders.data / "postgres.password").read_text().strip()

    def url_of(self, database: str) -> str:
        """The database's URL, over TCP."""
        return f"postgresql://{USER}:{self.password}@127.0.0.1:{self.port}/{database}"


class TcpValkey(EmbeddedValkey):
    """The wheel's Valkey as a server of its own, listening on loopback with a password."""

    password = "a-password-for-tests"

    def __init__(self, folders: Folders) -> None:
        super().__init__(folders)
        self.port = free_port()
        options = ["--port", str(self.port), "--bind", "127.0.0.1", "--requirepass", self.password]
        spec = self.process.spec
        self.process = ManagedProcess(replace(spec, argv=[*spec.argv, *options]))

    def start(self, timeout_s: float = 30.0) -> None:
        """Start and wait until it answers."""
        self.process.start()
        with redis.Redis(port=self.port, password=self.password) as client:
            wait_until(lambda: _pings(client), timeout_s)


def _pings(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.RedisError:
        return False


def wait_until(reached: Callable[[], bool], seconds: float = 60.0) -> None:
    """Return once `reached`; fail after `seconds`."""
    give_up_at = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < give_up_at, "waited in vain"
        time.sleep(0.05)


@dataclass
class Cluster:
    """Processes of the compose file on two servers of their own."""

    folder: Path
    postgres: TcpPostgres
    valkey: TcpValkey
    extra: Mapping[str, str]
    port: int = field(default_factory=free_port)
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    _specs: dict[str, tuple[str, dict[str, str]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.compose = compose_file(
            {
                "POSTGRES_PASSWORD": self.postgres.password,
                "REDIS_PASSWORD": self.valkey.password,
                "QLM_SECRET_KEY": "a long random text for tests",
                "QLM_MODELS": '["sim"]',
            }
        )

    @property
    def url(self) -> str:
        """The API's base URL, `/v1` included."""
        return f"http://127.0.0.1:{self.port}/v1"

    def environment(self, service: str, **more: str) -> dict[str, str]:
        """The service's variables as in the file, with these servers in place of its hosts."""
        given = {
            name: str(value)
            .replace("@postgres:5432", f"@127.0.0.1:{self.postgres.port}")
            .replace("@redis:6379", f"@127.0.0.1:{self.valkey.port}")
            for name, value in self.compose["services"][service]["environment"].items()
        }
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("QLM_", "DATABASE_"))}
        machine = {
            "QLM_DATA_DIR": str(self.folder / "data"),
            "QLM_LOG_JSON": "true",
            "QLM_PORT": str(self.port),
        }
        return {**kept, **given, **machine, **self.extra, **more}

    def qlm(self, *arguments: str, service: str = "api") -> str:
        """What a `qlm` command prints in a service's environment."""
        done = subprocess.run(
            [sys.executable, "-m", "qlm_cli", *arguments],
            env=self.environment(service),
            cwd=CHECKOUT,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def start(self, name: str, service: str | None = None, **more: str) -> None:
        """Start a service's command under `name`."""
        self._specs[name] = (service or name, more)
        self.begin(name)

    def begin(self, name: str) -> None:
        """Start again what was started before."""
        service, more = self._specs[name]
        command: Sequence[str] = self.compose["services"][service]["command"]
        (self.folder / "logs").mkdir(exist_ok=True)
        with (self.folder / "logs" / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [sys.executable, "-m", "qlm_cli", *command],
                env=self.environment(service, **more),
                cwd=CHECKOUT,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def end(self, name: str, seconds: float = 60.0) -> int:
        """Ask a process to end, and wait for its exit status."""
        process = self.processes[name]
        process.send_signal(signal.SIGTERM)
        return process.wait(seconds)

    def log(self, name: str) -> str:
        """What a process has written so far."""
        return (self.folder / "logs" / f"{name}.log").read_text()

    def answers(self, path: str = "/readyz") -> bool:
        """Whether the API says it is ready."""
        try:
            url = f"http://127.0.0.1:{self.port}{path}"
            return httpx.get(url, timeout=5, trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    def stop(self) -> None:
        """End everything that runs, roughly where asking does not help."""
        for process in self.processes.values():
            if process.poll() is None:
                process.terminate()
        for process in self.processes.values():
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


__all__ = ["COMPOSE", "DATABASE", "Cluster", "TcpPostgres", "TcpValkey", "compose_file"]
