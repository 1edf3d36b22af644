"""A small process that outlives a killed worker just long enough to end what it left behind.

vLLM's engine runs in child processes that survive a SIGKILL of their parent and keep its memory.
A pipe would not tell: forked children hold its write end open. So the guardian watches the worker
itself, through a process file descriptor where the system has them.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterable

import psutil

from qlm_workers.parent import parent_died

_EAGER_S = 0.25
_CALM_S = 2.0
_EAGER_FOR_S = 60.0
"""Engines spawn their processes while they start; afterwards the tree hardly changes."""


class Guard:
    """While it stands, the death of this process ends every child it has from now on.

    Of several in one process each ends, while the process lives, the children that came between its
    own beginning and `settle`.
    """

    def __init__(self) -> None:
        spared = sorted(_children_of(os.getpid()))
        # Runs no shell and no words from outside; a session of its own keeps Ctrl-C away from it.
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, str(os.getpid()), ",".join(map(str, spared))],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        self._spared = {*spared, self._process.pid}
        self._known: dict[int, psutil.Process] = {}
        self._settled = False

    @property
    def pid(self) -> int:
        """The guardian's own process id."""
        return self._process.pid

    def children(self) -> list[psutil.Process]:
        """The processes started since the guard stands, until it settled, and theirs.

        Those seen by an earlier call stay in the list while they live, also when the process
        between died and they are nobody's any more.
        """
        if self._settled:
            found = [later for child in self._alive() for later in _family(child)]
        else:
            found = _descendants(psutil.Process(), self._spared)
        for child in found:
            self._known[child.pid] = child
        return self._alive()

    def settle(self) -> None:
        """What this process starts from now on is somebody else's."""
        self.children()
        self._settled = True

    def _alive(self) -> list[psutil.Process]:
        return [child for child in self._known.values() if child.is_running()]

    def end_children(self, patience_s: float = 5.0) -> None:
        """End the children still there: terminate, and after `patience_s` kill."""
        children = self.children()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.terminate()
        _, alive = psutil.wait_procs(children, timeout=patience_s)
        _kill(alive)
        psutil.wait_procs(alive, timeout=patience_s)

    def release(self) -> None:
        """Take the guard down; safe to call twice."""
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()


def watch(parent: int, spared: Iterable[int]) -> None:
    """Remember the descendants of `parent` until it dies, then kill those that are left.

    Processes in `spared`, and theirs, are left alone.
    """
    left_alone = {*spared, os.getpid()}
    known: dict[int, psutil.Process] = {}
    started = time.monotonic()
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(parent)
        # Otherwise the worker died before this one could look, and the id may be someone else's.
        if os.getppid() == parent:
            while True:
                for child in _descendants(process, left_alone):
                    known[child.pid] = child
                eager = time.monotonic() - started < _EAGER_FOR_S
                if parent_died(parent, _EAGER_S if eager else _CALM_S):
                    break
    orphans = [child for child in known.values() if child.is_running()]
    for child in list(orphans):
        with contextlib.suppress(psutil.NoSuchProcess):
            orphans += child.children(recursive=True)
    _kill(orphans)


def _children_of(pid: int) -> set[int]:
    return {child.pid for child in psutil.Process(pid).children()}


def _descendants(process: psutil.Process, spared: set[int]) -> list[psutil.Process]:
    found: list[psutil.Process] = []
    for child in process.children():
        if child.pid not in spared and not _is_tracker(child):
            found += [child, *_family(child)]
    return found


def _family(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return list(process.children(recursive=True))
    return []


def _is_tracker(process: psutil.Process) -> bool:
    """Python's own cleaner of shared memory: it ignores SIGTERM and leaves when its parents did."""
    with contextlib.suppress(psutil.Error):
        return any("resource_tracker" in word for word in process.cmdline())
    return False


def _kill(processes: Iterable[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


if __name__ == "__main__":
    watch(int(sys.argv[1]), [int(pid) for pid in sys.argv[2].split(",") if pid])
