"""`/v1/fleet`: instances, virtual queues, open batches and interactive requests at one look."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fastapi import APIRouter
from pydantic import BaseModel

from qlm_batch.api.auth import Admin, Parts
from qlm_batch.api.responses import errors
from qlm_batch.api.schemas import Eta
from qlm_batch.domain.jobs import Batch
from qlm_batch.domain.snapshot import InstanceView, QueueEntry

router = APIRouter(prefix="/v1/fleet", tags=["fleet"])

WINDOW_S = 300.0
"""Interactive requests answered within this time are counted."""
MOST_GROUPS = 20
"""Groups shown of a virtual queue, from its head."""
MOST_BATCHES = 50


class HostedModel(BaseModel):
    """A model on an instance; `wake_s` is what waking it takes, null where not measured.

    `swaps` counts how often it was made awake since the boot, `swap_s` the seconds that took;
    `parent` is the base model of an adapter, `fault` why loading failed last.
    """

    name: str
    kind: str
    residency: str
    wake_s: float | None
    swaps: int
    swap_s: float
    parent: str | None
    fault: str | None


class QueuedGroup(BaseModel):
    """A request group's place in a virtual queue, and why it has it."""

    group: str
    slices: int
    reason: str


class InstanceObject(BaseModel):
    """An instance as it reported last. The counts are since its boot."""

    name: str
    device: str
    state: str
    models: list[HostedModel]
    slots: int
    batch_running: int
    batch_cap: int
    interactive_running: int
    kv_tokens: int
    kv_usage: float
    tokens_per_s: float
    output_tokens: int
    evictions: int
    recomputed_tokens: int
    assigned_requests: int
    groups: int
    queue: list[QueuedGroup]


class OpenBatch(BaseModel):
    """A batch that has not ended."""

    id: str
    tenant: str
    status: str
    models: list[str]
    total: int
    done: int
    deadline: int
    eta: Eta
    miss_probability: float | None


class InteractiveObject(BaseModel):
    """Interactive requests answered within `window_s`; quantiles in seconds, null without any."""

    window_s: float
    requests: int
    ttft_p50: float | None
    ttft_p95: float | None
    ttft_p99: float | None
    tpot_p50: float | None
    met: float | None


class FleetObject(BaseModel):
    """Everything at `at`."""

    object: Literal["fleet"] = "fleet"
    at: int
    queued_requests: int
    open_slices: int
    instances: list[InstanceObject]
    batches: list[OpenBatch]
    interactive: InteractiveObject


@router.get("", operation_id="get_fleet", responses=errors())
def fleet(parts: Parts, key: Admin) -> FleetObject:
    """The fleet and its work, of all tenants."""
    store = parts.store
    totals, timeliness = store.queue_totals(), store.timeliness(WINDOW_S)
    queues: dict[str, list[QueueEntry]] = {}
    for entry in store.queues():
        queues.setdefault(entry.instance, []).append(entry)
    return FleetObject(
        at=int(store.now()),
        queued_requests=totals.requests,
        open_slices=totals.slices,
        instances=[_instance(view, queues.get(view.name, ())) for view in store.instances()],
        batches=[_batch(batch) for batch in store.open_batches(MOST_BATCHES)],
        interactive=InteractiveObject(
            window_s=WINDOW_S,
            requests=timeliness.requests,
            ttft_p50=timeliness.ttft_p50,
            ttft_p95=timeliness.ttft_p95,
            ttft_p99=timeliness.ttft_p99,
            tpot_p50=timeliness.tpot_p50,
            met=timeliness.met,
        ),
    )


def _instance(view: InstanceView, queue: Sequence[QueueEntry]) -> InstanceObject:
    return InstanceObject(
        name=view.name,
        device=view.device,
        state=view.state.value,
        models=[
            HostedModel(
                name=model.name,
                kind=model.kind.value,
                residency=model.residency.value,
                wake_s=model.wake_s,
                swaps=model.swaps,
                swap_s=model.swap_s,
                parent=model.parent or None,
                fault=model.fault or None,
            )
            for model in view.models
        ],
        slots=view.slots,
        batch_running=max(0, view.running - view.interactive_running),
        batch_cap=view.batch_cap,
        interactive_running=view.interactive_running,
        kv_tokens=view.kv_tokens,
        kv_usage=view.kv_usage,
        tokens_per_s=view.tokens_per_s,
        output_tokens=view.output_tokens,
        evictions=view.evictions,
        recomputed_tokens=view.recomputed_tokens,
        assigned_requests=sum(work.requests for work in view.assigned),
        groups=len(queue),
        queue=[
            QueuedGroup(group=entry.group_key, slices=entry.slices, reason=entry.reason)
            for entry in queue[:MOST_GROUPS]
        ],
    )


def _batch(batch: Batch) -> OpenBatch:
    estimate = batch.estimate
    p50, p95 = (estimate.p50, estimate.p95) if estimate else (None, None)
    return OpenBatch(
        id=batch.id,
        tenant=batch.spec.tenant,
        status=batch.state.value,
        models=list(batch.models),
        total=batch.counts.total,
        done=batch.counts.completed + batch.counts.failed,
        deadline=int(batch.deadline),
        eta=Eta(
            p50=None if p50 is None else int(p50),
            p95=None if p95 is None else int(p95),
        ),
        miss_probability=estimate.miss_probability if estimate else None,
    )
