"""Small fleets, workloads and runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qlm_batch.domain.jobs import SloClass
from qlm_batch.scheduling.policies import policy
from qlm_batch.scheduling.speed import StepTime
from qlm_batch.simulation.cluster import Cluster, Outcome, SimulationConfig
from qlm_batch.simulation.devices import DeviceProfile
from qlm_batch.simulation.fleet import Fleet, InstanceSpec
from qlm_batch.simulation.workload import Arrival, Outage, WorkClass, Workload

STEP = StepTime(0.02, 0.0, 0.0, 1e-5)
INTERACTIVE = WorkClass("interactive", SloClass.INTERACTIVE, 1.0)


def batch_class(window_s: float, name: str = "batch") -> WorkClass:
    return WorkClass(name, SloClass.BATCH, window_s)


def fleet(
    count: int = 1, models: Sequence[str] = ("m",), *, slots: int = 8, weights_gb: float = 15.0
) -> Fleet:
    profiles = tuple(
        DeviceProfile(model, "test", STEP, 16_000, slots, weights_gb) for model in models
    )
    return Fleet(
        tuple(
            InstanceSpec(f"i-{n}", "test", profiles, tuple(models), slots, 16_000)
            for n in range(count)
        )
    )


def arrival(
    at: float,
    work_class: int = 0,
    *,
    lines: int = 1,
    output: int = 50,
    model: str = "m",
    tenant: str = "t",
) -> Arrival:
    return Arrival(at, work_class, model, tenant, np.full(lines, 100), np.full(lines, output))


def workload(
    classes: Sequence[WorkClass],
    arrivals: Sequence[Arrival],
    duration: float = 60.0,
    outages: tuple[Outage, ...] = (),
    swap_failures: float = 0.0,
) -> Workload:
    ordered = tuple(sorted(arrivals, key=lambda a: a.at))
    return Workload("test", tuple(classes), ordered, duration, 256, outages, swap_failures)


def run(
    on: Fleet, work: Workload, name: str = "edf-shed", config: SimulationConfig | None = None
) -> tuple[Cluster, Outcome]:
    cluster = Cluster(on, work, policy(name), config or SimulationConfig(drain_s=3600.0))
    return cluster, cluster.run()
