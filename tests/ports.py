"""Ports for servers that tests start."""

from __future__ import annotations

import contextlib
import random
import socket

_PORTS = range(15_000, 30_000)
"""Below those that systems give to connections, which may come before the server does."""
_draw = random.SystemRandom()
_given: set[int] = set()


def free_port() -> int:
    """A port of the loopback that nobody has, and that nobody else here is given."""
    while True:
        port = _draw.choice(_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            if port not in _given:
                _given.add(port)
                return port
