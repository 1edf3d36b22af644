"""Runs the application on a port until it is told to stop."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn
from fastapi import FastAPI

from qlm_batch.api.sse import STALL_S
from qlm_batch.domain.errors import ConfigurationError
from qlm_batch.settings import Settings

GRACE_S = 20
KEEP_ALIVE_S = 75
"""How long an idle connection stays open: longer than clients and load balancers keep one (5 to
60 s), for what is sent just as the server closes it is lost."""


def run_api(app: FastAPI, settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT, finish the requests under way, and return.

    Requests that take longer than GRACE_S to finish are cut off. A second SIGINT ends at once.
    ConfigurationError where it cannot start, as on an address that is taken or not this machine's.
    """
    try:
        api_server(app, settings).run()
    except SystemExit as ended:
        raise ConfigurationError(
            f"the API cannot start at {settings.host}:{settings.port} (QLM_HOST, QLM_PORT); the"
            " lines above say why"
        ) from ended


def api_server(app: FastAPI, settings: Settings) -> uvicorn.Server:
    """The configured server; setting `should_exit` stops it from another thread."""
    return _Server(
        uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            log_config=None,
            access_log=False,
            server_header=False,
            ws="none",
            timeout_graceful_shutdown=GRACE_S,
            timeout_keep_alive=KEEP_ALIVE_S,
        )
    )


class _Server(uvicorn.Server):
    """Returns after a signal; uvicorn's own raises it again, which would skip what comes after.

    A connection whose client takes nothing for STALL_S is cut: closed in order it would wait for
    that client for ever, with all that was not sent.
    """

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen; what is set here holds for every connection."""
        await super().startup(sockets)
        for listening in (own for server in self.servers for own in server.sockets):
            listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(STALL_S * 1000))

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {
            number: signal.signal(number, self.handle_exit)
            for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
