"""Half-written files, each locked by who writes it, so that what a crash left is known at once."""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from pathlib import Path


def make_scratch(folder: Path, suffix: str = "") -> tuple[int, Path]:
    """A fresh file in `folder`, open for writing and locked until it is closed. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        handle, name = tempfile.mkstemp(dir=folder, suffix=suffix)
        with contextlib.suppress(OSError):
            # Where files cannot be locked nothing is swept either.
            fcntl.flock(handle, fcntl.LOCK_EX)
        if os.fstat(handle).st_nlink:
            return handle, Path(name)
        # A sweep came between its making and its lock.
        os.close(handle)


def sweep_scratch(folder: Path) -> int:
    """Remove the files of `folder` that nobody writes any more; how many."""
    if not folder.is_dir():
        return 0
    return sum(_removed(path) for path in folder.iterdir() if path.is_file())


def _removed(path: Path) -> bool:
    try:
        handle = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.unlink()
    except OSError:
        return False
    finally:
        os.close(handle)
    return True
