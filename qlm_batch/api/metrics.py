"""Prometheus metrics: those of the service, and of this process's requests; nothing per job."""

from __future__ import annotations

import collections

from prometheus_client import (
    Counter,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.registry import CollectorRegistry

from qlm_batch.api.fleet_metrics import ServiceCollector
from qlm_batch.domain.store import Store

_BUCKETS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60, 600)


class Metrics:
    """The metrics of one application."""

    def __init__(self, store: Store) -> None:
        self._registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self._registry)
        self._met: collections.Counter[bool] = collections.Counter()
        self._registry.register(ServiceCollector(store, self._met))
        self._requests = Histogram(
            "qlm_http_request_seconds",
            "Time to answer, by method, route and status.",
            ("method", "route", "status"),
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self._first_token = Histogram(
            "qlm_interactive_first_token_seconds",
            "Time to the first token of interactive requests, also where answers come whole.",
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self._per_token = Histogram(
            "qlm_interactive_seconds_per_token",
            "Mean time per further token of interactive streams.",
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self._interactive = Counter(
            "qlm_interactive_requests",
            "Interactive requests by status.",
            ("status",),
            registry=self._registry,
        )

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        """Count one request."""
        known = method if method in ("GET", "POST", "DELETE") else "other"
        self._requests.labels(known, route, str(status)).observe(seconds)

    def first_token(self, seconds: float, target_s: float) -> None:
        """A client's first token was there after so long."""
        self._first_token.observe(seconds)
        self._met[seconds <= target_s] += 1

    def per_token(self, seconds: float) -> None:
        """The mean time between the tokens of one stream."""
        self._per_token.observe(seconds)

    def interactive_ended(self, status: int) -> None:
        """A request was answered with this status."""
        self._interactive.labels(str(status)).inc()

    def text(self) -> bytes:
        """All metrics in Prometheus' text format; the store is asked now."""
        return generate_latest(self._registry)
