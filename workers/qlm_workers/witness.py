"""A small process that outlives a killed worker just long enough to tell the store of its death.

Without it the store would wait until the heartbeat is stale. It holds nothing and imports next to
nothing until the worker is dead. Where it cannot tell, as when the whole machine died, the stale
heartbeat does.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time

from qlm_workers.parent import parent_died

_LOOK_S = 60.0
_RETRY_S = 0.5


class Witness:
    """While it stands, the store hears of this process's death, however it comes.

    A store that is away is tried for `patience_s`. Of a boot that has retired or was replaced it
    takes no notice.
    """

    def __init__(
        self, database_url: str, instance: str, boot_id: str, *, patience_s: float
    ) -> None:
        # Runs no shell and no words from outside; a session of its own keeps Ctrl-C away from it.
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
        )
        told = {
            "url": database_url,
            "instance": instance,
            "boot_id": boot_id,
            "patience_s": patience_s,
        }
        # The URL has a password in it, and anyone may read command lines.
        assert self._process.stdin is not None
        with self._process.stdin as stdin:
            stdin.write(json.dumps(told) + "\n")

    @property
    def pid(self) -> int:
        """The witness's own process id."""
        return self._process.pid

    def release(self) -> None:
        """Send it away with nothing told; safe to call twice."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()


def watch(parent: int, url: str, instance: str, boot_id: str, patience_s: float) -> None:
    """Wait for the death of `parent` and tell the store that this boot is dead."""
    # Whoever ends the rest of a service when its main process died sends this one a signal too.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    while not parent_died(parent, _LOOK_S):
        pass
    # Ends this process even where the database takes connections and never answers.
    signal.alarm(math.ceil(patience_s))
    _tell(url, instance, boot_id)


def _tell(url: str, instance: str, boot_id: str) -> None:
    """Try until the store has taken it."""
    # Half a second of the processor and 40 MiB that hardly any witness ever needs.
    from qlm_batch.domain.errors import Unavailable
    from qlm_batch.store import instances
    from qlm_batch.store.session import Database, make_engine

    database = Database(make_engine(url, application_name="qlm-witness", pool_size=1))
    while True:
        try:
            database.run(instances.died, instance, boot_id)
            return
        except Unavailable:
            time.sleep(_RETRY_S)


if __name__ == "__main__":
    watch(int(sys.argv[1]), **json.loads(sys.stdin.readline()))
