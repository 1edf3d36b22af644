"""Prometheus metrics: the queue, the fleet and this process's requests; nothing per job."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import (
    Counter,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector, CollectorRegistry

from qlm_batch.domain.errors import Unavailable
from qlm_batch.domain.ports import Attainment, Store
from qlm_batch.domain.snapshot import InstanceState, InstanceView, ModelView, Residency

_BUCKETS = (0.002, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 10, 60, 600)


class Metrics:
    """The metrics of one application."""

    def __init__(self, store: Store) -> None:
        self._registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self._registry)
        self._met: collections.Counter[bool] = collections.Counter()
        self._registry.register(_Service(store, self._met))
        self._requests = Histogram(
            "qlm_http_request_seconds",
            "Time to answer, by method, route and status.",
            ("method", "route", "status"),
            buckets=_BUCKETS,
            registry=self._registry,
        )
        self._first_token = Histogram(
            "qlm_interactive_first_token_seconds",
            "Time to the first token of interactive requests.",
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
        """A client got its first token after so long."""
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


class _Service(Collector):
    def __init__(self, store: Store, met: Mapping[bool, int]) -> None:
        self._store = store
        self._met = met

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("qlm_database_up", "Whether the database answers.")
        try:
            totals, instances = self._store.queue_totals(), self._store.instances()
            attained = self._store.attainment()
        except Unavailable:
            up.add_metric((), 0)
            yield up
            yield self._attainment(None)
            return
        up.add_metric((), 1)
        yield up
        yield self._attainment(attained)
        for name, value in (
            ("batches", totals.batches),
            ("slices", totals.slices),
            ("requests", totals.requests),
        ):
            yield GaugeMetricFamily(f"qlm_queue_{name}", f"Open {name}.", value=value)
        states = collections.Counter(instance.state for instance in instances)
        by_state = GaugeMetricFamily("qlm_instances", "Instances by state.", labels=["state"])
        for state in InstanceState:
            by_state.add_metric([state.value], states[state])
        yield by_state
        alive = [instance for instance in instances if instance.state is not InstanceState.LOST]
        for kind, name, help_text, read in _PER_INSTANCE:
            family = kind(f"qlm_instance_{name}", help_text, labels=["instance"])
            for instance in alive:
                family.add_metric([instance.name], read(instance))
            yield family
        for kind, name, help_text, told in _PER_MODEL:
            family = kind(f"qlm_{name}", help_text, labels=["instance", "model"])
            for instance in alive:
                for model in instance.models:
                    family.add_metric([instance.name, model.name], told(model))
            yield family

    def _attainment(self, batch: Attainment | None) -> Metric:
        """Interactive requests of this process, batch requests of the whole service."""
        family = CounterMetricFamily(
            "qlm_slo",
            "Requests by class, and whether their target was met.",
            labels=["slo_class", "met"],
        )
        family.add_metric(["interactive", "yes"], self._met[True])
        family.add_metric(["interactive", "no"], self._met[False])
        if batch is not None:
            family.add_metric(["batch", "yes"], batch.met)
            family.add_metric(["batch", "no"], batch.missed)
        return family


_PER_INSTANCE: tuple[
    tuple[
        type[GaugeMetricFamily] | type[CounterMetricFamily],
        str,
        str,
        Callable[[InstanceView], float],
    ],
    ...,
] = (
    (GaugeMetricFamily, "running", "Requests inside the engine.", lambda seen: seen.running),
    (
        GaugeMetricFamily,
        "interactive_running",
        "Interactive requests inside the engine.",
        lambda seen: seen.interactive_running,
    ),
    (
        GaugeMetricFamily,
        "batch_running",
        "Batch requests inside the engine.",
        lambda seen: max(0, seen.running - seen.interactive_running),
    ),
    (
        GaugeMetricFamily,
        "batch_cap",
        "Batch requests that may be inside the engine.",
        lambda seen: seen.batch_cap,
    ),
    (
        GaugeMetricFamily,
        "kv_usage",
        "Share of the key-value cache in use.",
        lambda seen: seen.kv_usage,
    ),
    (
        GaugeMetricFamily,
        "tokens_per_second",
        "Output tokens a second.",
        lambda seen: seen.tokens_per_s,
    ),
    (
        CounterMetricFamily,
        "output_tokens",
        "Output tokens of all requests, since the boot.",
        lambda seen: seen.output_tokens,
    ),
    (
        CounterMetricFamily,
        "evictions",
        "How often a running request lost its place, since the boot.",
        lambda seen: seen.evictions,
    ),
    (
        CounterMetricFamily,
        "recomputed_tokens",
        "Tokens computed again after that, since the boot.",
        lambda seen: seen.recomputed_tokens,
    ),
)

_PER_MODEL: tuple[
    tuple[
        type[GaugeMetricFamily] | type[CounterMetricFamily],
        str,
        str,
        Callable[[ModelView], float],
    ],
    ...,
] = (
    (
        GaugeMetricFamily,
        "model_awake",
        "Whether the model is awake there.",
        lambda model: model.residency is Residency.AWAKE,
    ),
    (
        CounterMetricFamily,
        "swaps",
        "How often the model was made awake there, since the boot.",
        lambda model: model.swaps,
    ),
    (
        CounterMetricFamily,
        "swap_seconds",
        "Seconds that took, with what had to leave for it.",
        lambda model: model.swap_s,
    ),
)
