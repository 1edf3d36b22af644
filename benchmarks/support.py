"""What the benchmarks share: the service's own processes on servers of their own, and audits."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import psutil
import psycopg

from qlm_batch.bootstrap import open_store
from qlm_batch.domain.jobs import ApiKey
from qlm_batch.embedded.folders import Folders
from qlm_batch.embedded.postgres import EmbeddedPostgres
from qlm_batch.embedded.process import ManagedProcess, ProcessSpec
from qlm_batch.embedded.service import environment_of
from qlm_batch.embedded.valkey import EmbeddedValkey
from qlm_batch.ids import KEY, new_id, new_secret
from qlm_batch.settings import Settings
from qlm_batch.store import migrate
from qlm_batch.store.postgres import PostgresStore

TENANT = "bench"
CHAT = "/v1/chat/completions"
MODEL = "bench-model"

_CALM_S = 0.25
"""A process that takes less of a second than this has nothing to do."""


def say(text: str) -> None:
    """Progress, on standard error: the last line of standard output is the result."""
    print(text, file=sys.stderr, flush=True)


def finish(result: dict[str, object]) -> None:
    """The benchmark's one line of JSON."""
    print(json.dumps(result), flush=True)


@dataclass
class Stand:
    """Servers with a current schema, a store, a key, and the processes started so far."""

    settings: Settings
    store: PostgresStore
    key: str
    postgres_pid: int
    processes: dict[str, ManagedProcess] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """The API's base URL, `/v1` included."""
        return f"http://{self.settings.host}:{self.settings.port}/v1"

    def start(self, command: str, *, name: str = "", **changes: object) -> None:
        """Start `qlm COMMAND` as a process of its own, with these settings changed."""
        name = name or command
        settings = self.settings.model_copy(update=changes)
        process = ManagedProcess(
            ProcessSpec(
                name=name,
                argv=[sys.executable, "-m", "qlm_cli", command],
                log=settings.data_dir / "logs" / f"{name}.log",
                env=environment_of(settings),
            )
        )
        process.start()
        self.processes[name] = process

    def peak_rss_mb(self) -> dict[str, float]:
        """The largest resident size each process ever had."""
        return {
            name: _high_water_mb(process.pid)
            for name, process in self.processes.items()
            if process.pid is not None
        }

    def cpu_s(self) -> dict[str, float]:
        """User and system seconds of each process so far, and of Postgres's living backends."""
        spent = {
            name: _cpu_s(psutil.Process(process.pid))
            for name, process in self.processes.items()
            if process.pid is not None and process.alive()
        }
        backends = psutil.Process(self.postgres_pid).children()
        spent["postgres"] = sum(map(_cpu_s, backends))
        return {name: round(seconds, 2) for name, seconds in spent.items()}

    def settle(self, seconds: float = 120.0) -> None:
        """Wait until the processes have done what they do once after their start."""
        before: dict[str, float] = {}

        def calm() -> bool:
            nonlocal before
            now = self.cpu_s()
            busiest = max(cpu - before.get(name, 0.0) for name, cpu in now.items())
            before = now
            return busiest < _CALM_S

        wait_until(calm, "the processes to settle", seconds, every_s=1.0)

    def query(self, statement: str) -> tuple[Any, ...]:
        """The one row of a query."""
        with psycopg.connect(self.settings.database_url, autocommit=True) as connection:
            row = connection.execute(statement.encode()).fetchone()
        assert row is not None
        return row

    def require_durable(self) -> None:
        """End the benchmark unless every commit waits for the disk."""
        for name in ("synchronous_commit", "fsync", "full_page_writes"):
            (value,) = self.query(f"SHOW {name}")
            require(value == "on", f"{name} is {value}")


@contextlib.contextmanager
def stand(**settings: object) -> Iterator[Stand]:
    """A fresh Postgres and Valkey with nothing else running; all of it gone afterwards."""
    home = Path(tempfile.mkdtemp(prefix="qlm-bench-"))
    home.chmod(0o711)
    folders = Folders.under(home / "data")
    postgres, valkey = EmbeddedPostgres(folders), EmbeddedValkey(folders)
    made: Stand | None = None
    try:
        postgres.start()
        valkey.start()
        migrate.upgrade(postgres.url)
        given = Settings(
            **{
                "data_dir": folders.data,
                "database_url": postgres.url,
                "redis_url": valkey.url,
                "secret_key": "a key for a benchmark and nothing else",
                "host": "127.0.0.1",
                "port": free_port(),
                **settings,
            }  # type: ignore[arg-type]
        )
        store = open_store(given)
        assert postgres.process.pid is not None
        made = Stand(given, store, _make_key(store), postgres.process.pid)
        made.require_durable()
        yield made
    finally:
        if made is not None:
            for process in reversed(made.processes.values()):
                process.stop()
            made.store.close()
        valkey.stop()
        postgres.stop()
        folders.remove_all()
        shutil.rmtree(home, ignore_errors=True)


def free_port() -> int:
    """A port nobody listens on right now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until(
    reached: Callable[[], bool], what: str, seconds: float, every_s: float = 0.05
) -> None:
    """Return once `reached`; end the benchmark after `seconds`."""
    give_up_at = time.monotonic() + seconds
    while not reached():
        require(time.monotonic() < give_up_at, f"gave up after {seconds:.0f} s: {what}")
        time.sleep(every_s)


def require(condition: bool, complaint: str) -> None:
    """End the benchmark with a complaint unless the condition holds."""
    if not condition:
        raise SystemExit(f"benchmark invalid: {complaint}")


def write_requests(path: Path, lines: int, line_bytes: int) -> int:
    """Write a file of different chat requests of about `line_bytes`; returns its fingerprint."""
    seal = 0
    filler = "The quick brown fox jumps over the lazy dog and runs away into the wood. " * 40
    with path.open("wb", buffering=1 << 20) as file:
        empty = len(_line("r00000000", _body(0, "")))
        text = filler[: max(0, line_bytes - empty)]
        for number in range(lines):
            name, body = f"r{number:08d}", _body(number, text)
            seal ^= fingerprint(name, body)
            file.write(_line(name, body))
    return seal


def _body(number: int, text: str) -> bytes:
    question = f"Question {number:08d}: {text}"
    return orjson.dumps(
        {
            "model": MODEL,
            "messages": [{"role": "user", "content": question}],
            "max_tokens": 128,
            "ignore_eos": True,
        }
    )


def _line(name: str, body: bytes) -> bytes:
    return b'{"custom_id":"%s","method":"POST","url":"%s","body":%s}\n' % (
        name.encode(),
        CHAT.encode(),
        body,
    )


def fingerprint(name: str, body: bytes) -> int:
    """64 bits of a line's id and body; exclusive-or of them is the same in any order."""
    digest = hashlib.md5(name.encode() + body, usedforsecurity=False).digest()
    return int.from_bytes(digest[:8], "big", signed=True)


SEAL = "bit_xor(('x' || left(md5(custom_id || body), 16))::bit(64)::bigint)"
"""`fingerprint` of all rows of `request`, in SQL."""


def _make_key(store: PostgresStore) -> str:
    secret = new_secret()
    store.add_key(
        ApiKey(
            id=new_id(KEY),
            tenant=TENANT,
            name="benchmark",
            role="admin",
            prefix=secret[:12],
            created_at=store.now(),
        ),
        secret,
    )
    return secret


def _high_water_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return round(int(line.split()[1]) / 1024, 1)
    return 0.0


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def load() -> str:
    """How busy the machine is, for the reader of a figure."""
    return f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
