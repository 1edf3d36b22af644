"""One child process: started, watched, stopped, and never left behind."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """How to run a child and how to end it.

    `stop_signals` are sent in turn, each waited for `stop_wait_s`, before SIGKILL. The first is
    also what the kernel sends when this process dies without a word (Linux). `user` is an account
    to run as; None keeps this one.
    """

    name: str
    argv: Sequence[str]
    log: Path
    env: Mapping[str, str] = field(default_factory=dict)
    stop_signals: Sequence[signal.Signals] = (signal.SIGTERM,)
    stop_wait_s: float = 30.0
    user: str | None = None
    cwd: Path | None = None


class ManagedProcess:
    """A child started from a ProcessSpec; its output goes to the spec's log file."""

    def __init__(self, spec: ProcessSpec) -> None:
        self.spec = spec
        self._child: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int | None:
        """The child's process id; None before start."""
        return self._child.pid if self._child else None

    def start(self) -> None:
        """Start the child in a session of its own, so that a Ctrl-C reaches only the supervisor."""
        spec = self.spec
        spec.log.parent.mkdir(parents=True, exist_ok=True)
        account: dict[str, object] = {}
        if spec.user is not None:
            account = {"user": spec.user, "group": _group_of(spec.user), "extra_groups": []}
        with spec.log.open("ab") as log:
            self._child = subprocess.Popen(  # type: ignore[call-overload]
                list(spec.argv),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **spec.env},
                cwd=spec.cwd,
                start_new_session=True,
                preexec_fn=_die_with_parent(spec.stop_signals[0]),
                **account,
            )

    def poll(self) -> int | None:
        """The exit status once the child has ended; negative for a signal."""
        return self._child.poll() if self._child else None

    def alive(self) -> bool:
        """Whether the child runs."""
        return self._child is not None and self._child.poll() is None

    def wait(self, timeout_s: float) -> bool:
        """Wait for the end; False when it did not come in time."""
        if self._child is None:
            return True
        try:
            self._child.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; a child that already ended is fine."""
        if self._child is not None and self._child.poll() is None:
            self._child.send_signal(number)

    def stop(self) -> None:
        """End the child, gently first."""
        for number in self.spec.stop_signals:
            self.signal(number)
            if self.wait(self.spec.stop_wait_s):
                return
        self.signal(signal.SIGKILL)
        self.wait(10)

    def log_tail(self, lines: int = 20) -> str:
        """The end of the log, for error messages."""
        try:
            with self.spec.log.open("rb") as log:
                log.seek(0, os.SEEK_END)
                log.seek(max(0, log.tell() - 16_384))
                text = log.read().decode("utf-8", "replace")
        except FileNotFoundError:
            return ""
        return "\n".join(text.splitlines()[-lines:])


def _group_of(user: str) -> int:
    import pwd

    return pwd.getpwnam(user).pw_gid


def _die_with_parent(number: signal.Signals) -> Callable[[], None] | None:
    if not sys.platform.startswith("linux"):
        return None
    libc = ctypes.CDLL(None, use_errno=True)
    parent = os.getpid()

    def prepare() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, int(number))
        if os.getppid() != parent:
            os._exit(1)

    return prepare
