"""What the store tells of the service, as Prometheus metrics: the queue, the fleet, attainment."""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    SummaryMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from qlm_batch.domain.errors import Unavailable
from qlm_batch.domain.records import Attainment
from qlm_batch.domain.snapshot import InstanceState, InstanceView, ModelView, Residency
from qlm_batch.domain.store import Store


class ServiceCollector(Collector):
    """Asks the store when it is asked; `met` counts interactive requests by attainment."""

    def __init__(self, store: Store, met: Mapping[bool, int]) -> None:
        self._store = store
        self._met = met

    def describe(self) -> list[Metric]:
        """Nothing beforehand: that would ask the store."""
        return []

    def collect(self) -> Iterator[Metric]:
        """All of it as of now; without a database, what this process knows."""
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
        yield from _latencies(alive)
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


def _latencies(alive: Sequence[InstanceView]) -> Iterator[Metric]:
    """What answered requests took in the engines, by class."""
    labels = ["instance", "slo_class"]
    first = SummaryMetricFamily(
        "qlm_instance_first_token_seconds", "Time to the first token in the engine.", labels=labels
    )
    later = SummaryMetricFamily(
        "qlm_instance_seconds_per_token", "Time of each further token.", labels=labels
    )
    for instance in alive:
        for told in instance.latencies:
            where = [instance.name, told.slo_class.value]
            first.add_metric(where, told.requests, told.first_s)
            later.add_metric(where, told.tokens, told.tokens_s)
    yield from (first, later)


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
