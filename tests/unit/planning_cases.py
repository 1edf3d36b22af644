"""Snapshots, groups and durations for tests of the scheduler's core."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple
from zlib import crc32

import numpy as np

from qlm_batch.domain.jobs import EngineKind, OnMiss, SloClass
from qlm_batch.domain.snapshot import (
    AssignedView,
    GroupPart,
    InstanceState,
    InstanceView,
    ModelView,
    RequestGroup,
    Residency,
    RunView,
    Snapshot,
)
from qlm_batch.scheduling.estimator import Estimator, EstimatorConfig, Ready
from qlm_batch.scheduling.fairness import Served
from qlm_batch.scheduling.worktable import EXCESS, Floats, WorkTable

DAY = 86_400.0


def run_view(
    run_id: int,
    slices: int,
    *,
    requests: int | None = None,
    deadline: float = DAY,
    created_at: float = 0.0,
    model: str = "m",
    tenant: str = "t",
    batch_id: str | None = None,
    max_tokens: int = 128,
    kind: EngineKind = EngineKind.GENERATE,
) -> RunView:
    count = slices * 64 if requests is None else requests
    return RunView(
        run_id=run_id,
        generation=1,
        batch_id=batch_id or f"batch-{run_id}",
        tenant=tenant,
        model=model,
        kind=kind,
        slo_class=SloClass.BATCH,
        deadline=deadline,
        created_at=created_at,
        on_miss=OnMiss.EXPIRE,
        slices=slices,
        requests=count,
        prompt_tokens=count * 100,
        max_tokens=count * max_tokens,
    )


def instance(
    name: str,
    models: Mapping[str, Residency] | Sequence[str] = ("m",),
    *,
    state: InstanceState = InstanceState.READY,
    slots: int = 32,
    device: str = "A100",
    assigned: tuple[AssignedView, ...] = (),
    generated: tuple[int, ...] = (),
    wake_s: float | None = None,
    boot_id: str = "boot",
    kv_tokens: int = 1_000_000,
) -> InstanceView:
    where = (
        dict(models)
        if isinstance(models, Mapping)
        else {m: Residency.ASLEEP if i else Residency.AWAKE for i, m in enumerate(models)}
    )
    return InstanceView(
        name=name,
        boot_id=boot_id,
        device=device,
        state=state,
        models=tuple(
            ModelView(model, EngineKind.GENERATE, residency, 4096, wake_s)
            for model, residency in where.items()
        ),
        slots=slots,
        kv_tokens=kv_tokens,
        running=len(generated),
        interactive_running=0,
        generated=generated,
        assigned=assigned,
    )


def assigned(
    run_id: int,
    requests: int,
    *,
    slices: int = 1,
    leased: int = 0,
    deadline: float = DAY,
    model: str = "m",
) -> AssignedView:
    return AssignedView(
        run_id,
        1,
        f"batch-{run_id}",
        "t",
        model,
        deadline,
        slices,
        leased,
        requests,
        requests * 100,
        requests * 128,
    )


def group(
    key: str, *, deadline: float, model: str = "m", requests: int = 1, arrived_at: float = 0.0
) -> RequestGroup:
    return RequestGroup(
        key=key,
        model=model,
        kind=EngineKind.GENERATE,
        slo_class=SloClass.BATCH,
        tenant="t",
        deadline=deadline,
        arrived_at=arrived_at,
        parts=(GroupPart(crc32(key.encode()), 1, 1),),
        batches=(f"batch-{key}",),
        requests=requests,
        prompt_tokens=requests * 100,
        max_tokens=requests * 128,
    )


class KnownDurations:
    """An estimator of which everything is given: `work[key]` seconds at each instance, no spread.

    `serving[i]` are the models instance i serves; every swap takes `swap`, draining nothing.
    """

    def __init__(
        self,
        work: Mapping[str, Sequence[float]],
        serving: Sequence[frozenset[str]],
        *,
        awake: Sequence[frozenset[str]] | None = None,
        swap: float = 0.0,
        ready: Sequence[float] | None = None,
        served: Served | None = None,
    ) -> None:
        self.config = EstimatorConfig(quantile=0.5, model_error=0.0)
        self._work = work
        self._serving = serving
        self._awake = awake or serving
        self._swap = swap
        self._served = served or Served()
        self._ready = ready or [0.0] * len(serving)

    def serves(self, instance: int, model: str) -> bool:
        return model in self._serving[instance]

    @property
    def served(self) -> Served:
        return self._served

    def table(self, groups: Sequence[RequestGroup]) -> WorkTable:
        many, instances = len(groups), len(self._serving)
        mean = np.array([self._takes(group) for group in groups]).reshape(many, instances)
        zero = np.where(np.isfinite(mean), 0.0, np.inf)
        rows, each = np.arange(many), np.arange(instances)
        return WorkTable(
            kind=rows,
            count=np.ones(many),
            mean=mean,
            var=zero,
            tail_kind=rows,
            tails=zero,
            excess=np.repeat(zero[:, :, None], EXCESS, axis=2),
            classes=each,
            slow=np.ones(instances),
        )

    def expected_tokens(self, group: RequestGroup) -> float:
        return float(group.max_tokens)

    def _takes(self, group: RequestGroup) -> list[float]:
        return [
            seconds if self.serves(i, group.model) else np.inf
            for i, seconds in enumerate(self._work[group.key])
        ]

    def ready(self, instance: int) -> Ready:
        return Ready(self._ready[instance], 0.0, self._awake[instance])

    def swap_s(self, instance: int, model: str) -> float:
        return self._swap

    def drain_s(self, instance: int, model: str) -> float:
        return 0.0


def snapshot(
    *, runs: Sequence[RunView] = (), instances: Sequence[InstanceView] = (), now: float = 0.0
) -> Snapshot:
    return Snapshot(now, tuple(runs), tuple(instances))


class GroupWork(NamedTuple):
    """A group's occupation (mean, variance) and tail at every instance; inf where not served."""

    mean: Floats
    var: Floats
    tail: Floats


def work_of(estimator: Estimator, group: RequestGroup) -> GroupWork:
    """What the group would take at each instance, in the snapshot's order."""
    table = estimator.table((group,))
    count, mean = table.count[0], table.mean[0]
    everywhere = np.arange(mean.size)
    tail = np.where(np.isfinite(mean), table.tail(np.zeros_like(everywhere), everywhere), np.inf)
    return GroupWork(mean * count, table.var[0] * count, tail)
