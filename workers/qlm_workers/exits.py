"""The exit statuses of a worker, in one place; a supervisor restarts it after any but 0 and 78."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """Why a worker ended."""

    OK = 0
    """Asked to stop; nothing is held any more."""
    CRASHED = 1
    """A fault of the worker itself; the log has it."""
    MISCONFIGURED = 78
    """It cannot work as configured, and would not after a restart."""
    ENGINE_DIED = 80
    """An engine stopped, or did not start in time."""
    ENGINE_HUNG = 81
    """An engine held work and made no progress for `stall_s`."""
    REPLACED = 82
    """A newer boot runs under this instance's name."""
