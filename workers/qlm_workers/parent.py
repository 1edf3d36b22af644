"""How a process learns that its parent has died."""

from __future__ import annotations

import os
import select
import time

_POLL_S = 0.25


def parent_died(parent: int, within_s: float) -> bool:
    """Whether `parent`, the id of the caller's parent, is dead.

    Waits for that at most `within_s`, in a process file descriptor where the system has them;
    elsewhere at most a quarter of a second.
    """
    try:
        descriptor = os.pidfd_open(parent)
    except (AttributeError, OSError):
        time.sleep(min(within_s, _POLL_S))
        return os.getppid() != parent
    try:
        # Asked with the descriptor at hand: else the id might be somebody else's by now.
        if os.getppid() != parent:
            return True
        readable, _, _ = select.select([descriptor], [], [], within_s)
        return bool(readable)
    finally:
        os.close(descriptor)
