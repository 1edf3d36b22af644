"""Named places at which a test breaks a process on purpose; without QLM_FAILPOINTS they are empty.

`QLM_FAILPOINTS="flush.after_commit=exit@3; outbox.sent=sleep:2%0.1"` ends the process the third
time it has committed a flush, and sleeps for two seconds after one delivery in ten.
"""

from __future__ import annotations

import errno
import os
import random
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass

from qlm_batch.domain.errors import ConfigurationError, Unavailable

VARIABLE = "QLM_FAILPOINTS"
EXIT_STATUS = 70
"""With which `exit` ends the process, at once and without any clean-up."""

_POINT = re.compile(
    r"(?P<name>[a-z_.]+)=(?P<action>exit|raise|full|sleep:(?P<seconds>\d+(\.\d+)?))"
    r"(@(?P<at>[1-9]\d*)|%(?P<chance>0?\.\d+|1))?"
)


@dataclass(slots=True)
class _Point:
    action: str
    seconds: float
    at: int | None
    """Acts at this hit alone; None acts at every hit that `chance` picks."""
    chance: float
    hits: int = 0

    def due(self) -> bool:
        self.hits += 1
        if self.at is not None:
            return self.hits == self.at
        return random.random() < self.chance  # noqa: S311 - breaks tests, guards nothing


def parse(text: str) -> Mapping[str, _Point]:
    """The points that `text` arms, by name. ConfigurationError names what cannot be read."""
    points = {}
    for part in filter(None, (each.strip() for each in text.split(";"))):
        found = _POINT.fullmatch(part)
        if found is None:
            raise ConfigurationError(
                f"{VARIABLE}: '{part}' is not NAME=ACTION with an action exit, raise, full or "
                "sleep:SECONDS and after it nothing, @HIT or %CHANCE"
            )
        points[found["name"]] = _Point(
            action=found["action"].partition(":")[0],
            seconds=float(found["seconds"] or 0),
            at=int(found["at"]) if found["at"] else None,
            chance=float(found["chance"] or 1),
        )
    return points


_armed = parse(os.environ.get(VARIABLE, ""))
_lock = threading.Lock()


def failpoint(name: str, when: str = "") -> None:
    """Do what the environment asks for at the point `name`, or `name.when`; usually nothing.

    `raise` raises Unavailable and `full` the OSError of a full disk; `exit` does not return.
    """
    if not _armed:
        return
    point = _armed.get(f"{name}.{when}" if when else name)
    if point is None:
        return
    with _lock:
        due = point.due()
    if not due:
        return
    match point.action:
        case "exit":
            os._exit(EXIT_STATUS)
        case "sleep":
            time.sleep(point.seconds)
        case "full":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        case _:
            raise Unavailable(f"The failpoint '{name}' was told to fail.", retry_after_s=1.0)
