"""Where an interactive request starts soonest."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from qlm_batch.domain.snapshot import InstanceState, InstanceView, ModelView, Residency

UNKNOWN_WAKE_S = 60.0
"""Assumed for a model that has to be loaded where nobody has measured that."""
QUEUE_DEPTH = 4.0
"""Most interactive requests sent to an instance, in running batches."""

Boot = tuple[str, str]
"""An instance's name and boot id."""


@dataclass(frozen=True, slots=True)
class Route:
    """An instance, and in how many seconds it is expected to start the request."""

    instance: str
    boot_id: str
    start_s: float


@dataclass(frozen=True, slots=True)
class Full:
    """Every instance that serves the model has as much interactive work as it may queue."""

    retry_after_s: float


def route(
    instances: Sequence[InstanceView],
    model: str,
    *,
    sent: Mapping[Boot, int],
    service_s: float,
    avoid: Collection[Boot] = (),
) -> Route | Full | None:
    """The instance that starts a request for `model` soonest; None when nobody serves it.

    `sent` are interactive requests the caller has under way at each boot, `service_s` how long one
    takes on average. Batch work is no obstacle: it gives way. Boots to `avoid` are passed over.
    """
    best: tuple[float, int, int, str] | None = None
    chosen: Route | None = None
    room_in: float | None = None
    for view in instances:
        boot = (view.name, view.boot_id)
        hosted = next((m for m in view.models if m.name == model), None)
        if hosted is None or boot in avoid or not _serves(view, hosted):
            continue
        ahead = max(view.interactive_running, sent.get(boot, 0))
        slots = max(1, view.slots)
        start_s = _wake_s(view, hosted) + start_in(ahead, slots, service_s)
        most = QUEUE_DEPTH * slots
        if ahead >= most:
            wait_s = _wake_s(view, hosted) + (ahead - most + 1) * service_s / slots
            room_in = wait_s if room_in is None else min(room_in, wait_s)
            continue
        # Among equals the one with the least interactive work, for there batch work has to give
        # way; then the one with the least to do for anybody, then by name. Where all sleep the
        # calls stay together: one swap is enough.
        spread = ahead * 1000 // slots if hosted.residency is Residency.AWAKE else 0
        rank = (start_s, spread, view.running * 1000 // slots, view.name)
        if best is None or rank < best:
            best, chosen = rank, Route(view.name, view.boot_id, start_s)
    if chosen is not None:
        return chosen
    return None if room_in is None else Full(room_in)


def start_in(ahead: int, slots: int, service_s: float) -> float:
    """Seconds until a request starts behind `ahead` others that take `service_s` each."""
    return max(0, ahead - slots + 1) * service_s / slots


def _serves(view: InstanceView, model: ModelView) -> bool:
    gone = view.state in (InstanceState.DRAINING, InstanceState.LOST)
    return not gone and model.residency is not Residency.FAILED


def _wake_s(view: InstanceView, model: ModelView) -> float:
    ready = view.state is not InstanceState.STARTING and model.residency is Residency.AWAKE
    if ready:
        return 0.0
    return model.stay_s + (UNKNOWN_WAKE_S if model.wake_s is None else model.wake_s)
