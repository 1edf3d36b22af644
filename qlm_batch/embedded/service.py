"""The whole service on one machine: servers, migrations, processes and a key for this user."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import IO

from qlm_batch.bootstrap import open_store
from qlm_batch.domain.errors import ConfigurationError
from qlm_batch.domain.jobs import ApiKey
from qlm_batch.embedded.folders import Folders
from qlm_batch.embedded.postgres import EmbeddedPostgres
from qlm_batch.embedded.process import ProcessSpec
from qlm_batch.embedded.supervisor import Supervisor
from qlm_batch.embedded.valkey import EmbeddedValkey
from qlm_batch.ids import KEY, new_id, new_secret
from qlm_batch.settings import Settings
from qlm_batch.store import migrate

LOCAL_TENANT = "local"
_PROCESSES = ("api", "scheduler", "files", "callbacks", "worker")


class EmbeddedService:
    """Starts and stops everything `qlm up` runs. One service per data folder at a time."""

    def __init__(
        self, settings: Settings, on_event: Callable[[str, str], None] = lambda *_: None
    ) -> None:
        self._given = settings
        self._on_event = on_event
        self._folders = Folders.under(settings.data_dir)
        self._lock: IO[str] | None = None
        self._postgres: EmbeddedPostgres | None = None
        self._valkey: EmbeddedValkey | None = None
        self._supervisor: Supervisor | None = None
        self.settings = settings

    @property
    def folders(self) -> Folders:
        """Where the service keeps its things."""
        return self._folders

    @property
    def key_file(self) -> Path:
        """The 0600 file with this user's API key."""
        return self._folders.data / "api.key"

    @property
    def url(self) -> str:
        """The API's base URL, without `/v1`."""
        return f"http://{self.settings.host}:{self.settings.port}"

    def start(self) -> None:
        """Start servers, migrate, make the local key and start the processes."""
        self._take_folder()
        try:
            self._start_servers()
            migrate.upgrade(self.settings.database_url)
            self._ensure_key()
            self._supervisor = Supervisor(self._specs(), self._on_event)
            self._supervisor.start()
        except BaseException:
            self.stop()
            raise
        self._write_state()

    def watch(self, stop: threading.Event) -> None:
        """Keep everything running until `stop` is set; ConfigurationError when it cannot be."""
        if self._supervisor is not None:
            self._supervisor.watch(stop)

    def check(self) -> None:
        """Look once after the processes; ConfigurationError when one cannot work."""
        if self._supervisor is not None:
            self._supervisor.check()

    def stop(self) -> None:
        """Stop everything; safe at any time."""
        if self._supervisor is not None:
            self._supervisor.stop()
            self._supervisor = None
        if self._valkey is not None:
            self._valkey.stop()
            self._valkey = None
        if self._postgres is not None:
            self._postgres.stop()
            self._postgres = None
            self._folders.remove_sockets()
        if self._lock is not None:
            (self._folders.data / "service.json").unlink(missing_ok=True)
            self._lock.close()
            self._lock = None

    def _take_folder(self) -> None:
        lock = (self._folders.data / "service.lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            raise ConfigurationError(
                f"a service already runs in {self._folders.data}; stop it or choose another "
                "--data-dir"
            ) from None
        self._lock = lock

    def _start_servers(self) -> None:
        changes: dict[str, object] = {"data_dir": self._folders.data}
        if not self._given.database_url:
            self._on_event("postgres", "starting")
            self._postgres = EmbeddedPostgres(self._folders)
            self._postgres.start()
            changes["database_url"] = self._postgres.url
        if not self._given.redis_url:
            self._on_event("valkey", "starting")
            self._valkey = EmbeddedValkey(self._folders)
            self._valkey.start()
            changes["redis_url"] = self._valkey.url
        if not self._given.secret_key:
            changes["secret_key"] = _secret_key(self._folders.data / "secret.key")
        self.settings = self._given.model_copy(update=changes)

    def _ensure_key(self) -> None:
        store = open_store(self.settings)
        try:
            if self.key_file.exists():
                known = store.list_keys(LOCAL_TENANT)
                prefix = self.key_file.read_text().strip()[:12]
                if any(key.prefix == prefix and key.revoked_at is None for key in known):
                    return
            secret = new_secret()
            store.add_key(
                ApiKey(
                    id=new_id(KEY),
                    tenant=LOCAL_TENANT,
                    name="local user",
                    role="admin",
                    prefix=secret[:12],
                    created_at=store.now(),
                ),
                secret,
            )
            _write_private(self.key_file, secret)
        finally:
            store.close()

    def _specs(self) -> list[ProcessSpec]:
        environment = environment_of(self.settings)
        logs = self._folders.data / "logs"
        return [
            ProcessSpec(
                name=name,
                argv=[sys.executable, "-m", "qlm_cli", name],
                log=logs / f"{name}.log",
                env=environment,
                stop_wait_s=45.0 if name == "worker" else 15.0,
            )
            for name in _PROCESSES
        ]

    def _write_state(self) -> None:
        state = {
            "url": self.url,
            "pid": os.getpid(),
            "database_url": self.settings.database_url,
            "redis_url": self.settings.redis_url,
        }
        _write_private(self._folders.data / "service.json", json.dumps(state))


def environment_of(settings: Settings) -> dict[str, str]:
    """The environment variables under which a child reads exactly these settings."""
    environment: dict[str, str] = {}
    for name, value in settings.model_dump(mode="json", exclude_unset=True).items():
        key = {"database_url": "DATABASE_URL", "redis_url": "REDIS_URL"}.get(
            name, f"QLM_{name.upper()}"
        )
        if value is None:
            continue
        environment[key] = value if isinstance(value, str) else json.dumps(value)
    return environment


def _secret_key(path: Path) -> str:
    if not path.exists():
        _write_private(path, secrets.token_urlsafe(32))
    return path.read_text().strip()


def _write_private(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".new")
    with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    partial.replace(path)
