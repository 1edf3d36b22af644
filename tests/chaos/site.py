"""The service as several real processes on two servers, each of which can be killed at any time."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil
import psycopg
import redis

from qlm_batch.domain.errors import ConfigurationError
from qlm_batch.embedded.folders import Folders
from qlm_batch.embedded.process import ManagedProcess, ProcessSpec
from qlm_batch.failpoints import EXIT_STATUS, VARIABLE
from qlm_batch.store import migrate
from tests.chaos.answers import MODEL
from tests.chaos.schedule import SCHEDULERS, WORKERS
from tests.cluster_support import TcpPostgres, TcpValkey
from tests.ports import free_port

CHECKOUT = Path(__file__).parents[2]
SECRET_KEY = "a long random text for tests"
LEASE_S = 5.0
TERM_S = 3.0
SILENT_S = 5.0
STALL_S = 5.0
RESTART_S = 0.2
READY_S = 20.0
"""Before it has lived so long a process may not listen to signals yet, and end by them."""
RUN = "CHAOS_RUN"
"""The variable by which every process of a run is told from all others."""
DISK_BYTES = 8 * 1024**3
MOUNTS = "CHAOS_MOUNTS"
"""Set where this run has mounts of its own, which end with it."""


@dataclass
class Member:
    """A process that is started again when it ends, unless it is not `wanted`."""

    spec: ProcessSpec
    process: ManagedProcess
    wanted: bool = True
    armed: str = ""
    """The failpoint of its next start."""
    restart_at: float = 0.0
    starts: int = 0
    began: float = 0.0


@dataclass(frozen=True, slots=True)
class Death:
    """How a process ended that was not told to."""

    name: str
    status: int
    at: float


@dataclass
class Site:
    """Everything that runs. Servers are broken and mended from one thread only."""

    folder: Path
    smtp_url: str = ""
    members: dict[str, Member] = field(default_factory=dict)
    deaths: list[Death] = field(default_factory=list)
    kills: int = 0
    worker_kills: int = 0
    database_crashes: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.run = uuid.uuid4().hex
        os.environ[RUN] = self.run
        self.folder.chmod(0o711)
        self._folders = Folders.under(self.folder / "servers")
        blobs = self.data / "blobs"
        blobs.mkdir(parents=True, mode=0o700)
        self.disks = {
            name: where
            for name, where in (("postgres", self._folders.postgres), ("blobs", blobs))
            if _mounted(where)
        }
        """Folders on small disks of their own, where this process may mount any."""
        # A fresh disk belongs to this user.
        self._folders = Folders.under(self.folder / "servers")
        self.postgres = TcpPostgres(self._folders)
        self.valkey = TcpValkey(self._folders)
        self.port = free_port()
        self.notes = self.folder / "answers"
        self._watcher = threading.Thread(target=self._watch, name="supervisor", daemon=True)

    @property
    def data(self) -> Path:
        """The service's data folder."""
        return self.folder / "data"

    @property
    def url(self) -> str:
        """The API's address, without `/v1`."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def redis_url(self) -> str:
        """The broker's address."""
        return f"redis://:{self.valkey.password}@127.0.0.1:{self.valkey.port}/0"

    def resize_disk(self, name: str, *, full: bool) -> None:
        """Leave a disk of `disks` no room at all, or give it its room back."""
        where = self.disks[name]
        size = DISK_BYTES
        if full:
            room = os.statvfs(where)
            size = max(4096, (room.f_blocks - room.f_bfree) * room.f_frsize)
        _mount(["-o", f"remount,size={size}", str(where)])

    # Processes

    def environment(self, name: str) -> dict[str, str]:
        """The variables of one process."""
        user = name.replace("-", "_") if name in SCHEDULERS else "qlm"
        database = self.postgres.url.replace("//qlm:", f"//{user}:", 1)
        return {
            "DATABASE_URL": database,
            "REDIS_URL": self.redis_url,
            "QLM_DATA_DIR": str(self.data),
            "QLM_SECRET_KEY": SECRET_KEY,
            "QLM_PORT": str(self.port),
            "QLM_LOG_JSON": "true",
            "QLM_LEASE_S": str(LEASE_S),
            "QLM_LEADER_TERM_S": str(TERM_S),
            "QLM_INSTANCE_SILENT_S": str(SILENT_S),
            "QLM_STALL_S": str(STALL_S),
            "QLM_HEARTBEAT_S": "1",
            "QLM_POLL_S": "1",
            "QLM_SLICE_REQUESTS": "32",
            "QLM_WEBHOOK_ALLOW": json.dumps(["127.0.0.0/8"]),
            "QLM_WEBHOOK_TIMEOUT_S": "5",
            "QLM_SMTP_URL": self.smtp_url,
            "QLM_MODELS": json.dumps([MODEL]),
            "QLM_ENGINE": "simulated",
            "QLM_SIMULATED_TIME_SCALE": os.environ.get("CHAOS_TIME_SCALE", "0.3"),
            "QLM_INSTANCE": name,
            "OMP_NUM_THREADS": "1",
        }

    def start(self) -> None:
        """Start servers, tables and all processes of the simulated round."""
        self.postgres.start()
        self.valkey.start()
        migrate.upgrade(self.postgres.url)
        with psycopg.connect(self.postgres.url, autocommit=True) as connection:
            for name in SCHEDULERS:
                role, password = name.replace("-", "_"), self.postgres.password
                connection.execute(f"CREATE ROLE {role} SUPERUSER LOGIN PASSWORD '{password}'")
        self._watcher.start()
        for name in ("api", *SCHEDULERS, "files", "callbacks"):
            self.add(name, [sys.executable, "-m", "qlm_cli", name.split("-")[0]])
        for name in WORKERS:
            self.add_worker(name)

    def add_worker(self, name: str) -> None:
        """Start a worker with the simulated engine."""
        self.add(name, [sys.executable, "-m", "tests.chaos.worker", str(self.notes)])

    def add(self, name: str, argv: list[str], **more: str) -> None:
        """Have one more process, kept alive from now on."""
        spec = ProcessSpec(
            name=name,
            argv=argv,
            log=self.folder / "logs" / f"{name}.log",
            env={**self.environment(name), **more},
            stop_wait_s=60.0,
            cwd=CHECKOUT,
        )
        with self._lock:
            self.members[name] = Member(spec, ManagedProcess(spec))

    def _watch(self) -> None:
        # Children are started by this one thread, whose end they would take for the driver's.
        while not self._stop.wait(0.05):
            with self._lock:
                for name, member in self.members.items():
                    if member.wanted and not member.process.alive():
                        self._revive(name, member)

    def _revive(self, name: str, member: Member) -> None:
        now = time.monotonic()
        if member.starts and not member.restart_at:
            status = member.process.poll() or 0
            self.deaths.append(Death(name, status, now))
            self.worker_kills += name.startswith("gpu") and status != 0
            self.kills += status == EXIT_STATUS
            member.restart_at = now + RESTART_S
        if now >= member.restart_at:
            self._begin(member)

    def _begin(self, member: Member) -> None:
        armed, member.armed = member.armed, ""
        member.spec = replace(member.spec, env={**member.spec.env, VARIABLE: armed})
        member.process = ManagedProcess(member.spec)
        member.process.start()
        member.starts += 1
        member.began = time.monotonic()
        member.restart_at = 0.0

    def pid(self, name: str) -> int | None:
        """The process id of a member that runs."""
        process = self.members[name].process
        return process.pid if process.alive() else None

    def signal(self, name: str, number: signal.Signals) -> bool:
        """Send a signal; False where nobody runs under this name."""
        alive = self.pid(name) is not None
        self.members[name].process.signal(number)
        self.kills += alive and number is signal.SIGKILL
        return alive

    def end(self, name: str, *, roughly: bool) -> None:
        """End a member for good."""
        member = self.members[name]
        with self._lock:
            member.wanted = False
        if roughly:
            self.signal(name, signal.SIGKILL)
        else:
            member.process.signal(signal.SIGCONT)
            member.process.signal(signal.SIGTERM)
        member.process.wait(60)
        with self._lock:
            del self.members[name]

    # Servers

    def crash_postgres(self) -> None:
        """End the whole server as a loss of power would."""
        for process in self.postgres_processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self.postgres.process.wait(10)
        self.database_crashes += 1

    def postgres_processes(self) -> list[psutil.Process]:
        """The server and everything that works for it, the server first."""
        pid = self.postgres.process.pid
        if pid is None or not self.postgres.process.alive():
            return []
        server = psutil.Process(pid)
        return [server, *server.children(recursive=True)]

    def start_postgres(self, within_s: float = 60.0) -> None:
        """Start the server again; what is left of the one before may be in the way for a moment."""
        give_up_at = time.monotonic() + within_s
        while True:
            try:
                return self.postgres.start()
            except (ConfigurationError, psycopg.OperationalError):
                if time.monotonic() > give_up_at:
                    raise
                self.postgres.process.stop()
                time.sleep(0.2)

    def connect(self) -> psycopg.Connection[tuple[object, ...]]:
        """A connection of the driver's own; a server that recovers is waited for."""
        give_up_at = time.monotonic() + 30
        while True:
            try:
                return psycopg.connect(self.postgres.url, autocommit=True, connect_timeout=5)
            except psycopg.OperationalError:
                if time.monotonic() > give_up_at:
                    raise
                time.sleep(0.1)

    def redis(self) -> redis.Redis:
        """A client of the driver's own."""
        return redis.Redis(port=self.valkey.port, password=self.valkey.password, socket_timeout=5)

    def crash_valkey(self, *, forget: bool) -> None:
        """Kill the broker, with what it kept where it is to forget."""
        self.valkey.process.signal(signal.SIGKILL)
        self.valkey.process.wait(10)
        self.kills += 1
        if forget:
            shutil.rmtree(self._folders.data / "valkey", ignore_errors=True)
            (self._folders.data / "valkey").mkdir(mode=0o700)

    # The end

    def stop(self) -> dict[str, int]:
        """End everything in order; the exit status of each process."""
        with self._lock:
            for member in self.members.values():
                member.wanted = False
        for member in self.members.values():
            member.process.signal(signal.SIGCONT)
            member.process.signal(signal.SIGTERM)
        statuses, told_at = {}, time.monotonic()
        for name, member in self.members.items():
            if not member.process.wait(60):
                member.process.signal(signal.SIGKILL)
                member.process.wait(10)
            status = member.process.poll() or 0
            unready = status == -signal.SIGTERM and told_at - member.began < READY_S
            statuses[name] = 0 if unready else status
        self._stop.set()
        return statuses

    def stop_servers(self) -> None:
        """End both servers."""
        self.valkey.stop()
        self.postgres.stop()

    def left_over(self) -> list[str]:
        """Processes of this run that still live."""
        return [
            f"{process.pid} {' '.join(process.cmdline())[:120]}"
            for process in psutil.process_iter()
            if process.pid != os.getpid() and _of_run(process, self.run)
        ]

    def remove(self) -> None:
        """Remove every trace."""
        for where in self.disks.values():
            subprocess.run(["umount", "-l", str(where)], capture_output=True)
        self._folders.remove_all()
        shutil.rmtree(self.folder, ignore_errors=True)


def _mount(arguments: list[str]) -> bool:
    return subprocess.run(["mount", *arguments], capture_output=True).returncode == 0


def _mounted(where: Path) -> bool:
    if not os.environ.get(MOUNTS):
        return False
    return _mount(["-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(where)])


def _of_run(process: psutil.Process, run: str) -> bool:
    try:
        return process.environ().get(RUN) == run and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def log_lines(folder: Path, name: str) -> Iterator[Mapping[str, object]]:
    """The structured lines a process logged in all its lives."""
    path = folder / "logs" / f"{name}.log"
    if not path.exists():
        return
    with path.open(errors="replace") as lines:
        for line in lines:
            if line.startswith("{"):
                with contextlib.suppress(json.JSONDecodeError):
                    yield json.loads(line)
