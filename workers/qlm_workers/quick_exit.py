"""Importing this makes an engine's process end at once when it has run to its end.

Python's last garbage collection walks everything torch and vLLM left behind. That takes seconds in
each of an engine's processes; meanwhile they heed no SIGTERM, so that whoever ends them waits, then
kills. What would outlive the process is given back here; the walk is left out.
"""

from __future__ import annotations

import atexit
import gc
import logging
import multiprocessing
import os
import sys
from typing import NoReturn

_status = 0


def _exit(status: object = None) -> NoReturn:
    """sys.exit, which every spawned process ends with, remembering the status."""
    global _status
    _status = status if isinstance(status, int) else int(status is not None)
    raise SystemExit(status)


def _leave() -> None:
    for each in gc.get_objects():
        if type(each).__name__ == "ShmRingBuffer":
            each.__del__()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(_status)


if multiprocessing.parent_process() is not None:
    sys.exit = _exit
    atexit.register(_leave)
