"""The fleet a log tells of, at the speeds learned there, and fleets with more instances."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from qlm_batch.domain.errors import ConfigurationError
from qlm_batch.domain.snapshot import InstanceView, ModelView, Residency, Snapshot
from qlm_batch.scheduling.fleet import SERVING
from qlm_batch.scheduling.profile import Knowledge
from qlm_batch.scheduling.speed import StepTime, prior_step_time
from qlm_batch.simulation.devices import PROFILES, SLEEP_GB_S, DeviceProfile, family
from qlm_batch.simulation.fleet import Fleet, InstanceSpec

_LEAST_EFFICIENCY: Final = 0.05
_LEAST_BASE_S: Final = 1e-5
_LEAST_GB: Final = 1e-3
_TOKENS_A_SLOT: Final = 4096
"""Key-value room of an instance that does not tell its own."""


def recorded_fleet(snapshot: Snapshot) -> Fleet | None:
    """The instances that served when the snapshot was taken; None where none did.

    Devices of the simulator keep their own step times, others get those learned.
    """
    known = Knowledge.of(snapshot.profiles)
    specs = [
        _spec(view, known)
        for view in sorted(snapshot.instances, key=lambda view: view.name)
        if view.state in SERVING and _hosted(view)
    ]
    return Fleet(tuple(specs)) if specs else None


def with_more(fleet: Fleet, count: int, like: str = "") -> Fleet:
    """The fleet and `count` more instances.

    `like` names an instance of it, or a device that then hosts what the first instance does; empty
    means that first one. ConfigurationError for a device of which nothing is known.
    """
    first = fleet.instances[0]
    alike = next((spec for spec in fleet.instances if spec.name == like), first)
    if like and alike.name != like:
        alike = _on_device(fleet, first, like)
    taken = {spec.name for spec in fleet.instances}
    names = (name for n in range(count + len(taken)) if (name := f"added-{n}") not in taken)
    added = (replace(alike, name=name) for name, _ in zip(names, range(count), strict=False))
    return Fleet((*fleet.instances, *added))


def _hosted(view: InstanceView) -> list[ModelView]:
    """Its models, the awake one first."""
    usable = [model for model in view.models if model.residency is not Residency.FAILED]
    return sorted(usable, key=lambda model: model.residency is not Residency.AWAKE)


def _spec(view: InstanceView, known: Knowledge) -> InstanceSpec:
    models = _hosted(view)
    slots = max(1, view.slots)
    kv_tokens = view.kv_tokens or slots * _TOKENS_A_SLOT
    profiles = tuple(_profile(model, view.device, kv_tokens, slots, known) for model in models)
    names = tuple(model.name for model in models)
    return InstanceSpec(view.name, view.device, profiles, names, slots, kv_tokens)


def _profile(
    model: ModelView, device: str, kv_tokens: int, slots: int, known: Knowledge
) -> DeviceProfile:
    built_in = PROFILES.get((family(model.name), device))
    if built_in is not None:
        return built_in
    speed = known.speed(model.root, device)
    step = speed.step_time().times(1.0 / max(_LEAST_EFFICIENCY, speed.efficiency))
    # What was measured is a whole swap; here its halves are one model's sleep and another's waking.
    measured_s = 0.0 if model.parent else (model.wake_s or 0.0)
    return DeviceProfile(
        model.name,
        device,
        replace(step, base=max(_LEAST_BASE_S, step.base)),
        kv_tokens,
        slots,
        max(_LEAST_GB, measured_s / 2.0 * SLEEP_GB_S),
        extrapolated=not (speed.fitted or speed.measured),
    )


def _on_device(fleet: Fleet, like: InstanceSpec, device: str) -> InstanceSpec:
    own = {(p.model, p.device): p for spec in fleet.instances for p in spec.profiles}
    profiles = []
    for model in like.models:
        found = own.get((model, device)) or PROFILES.get((family(model), device))
        profiles.append(found or _expected(like.profile(model), device))
    slots = min(profile.slots for profile in profiles)
    kv_tokens = min(profile.kv_tokens for profile in profiles)
    return InstanceSpec(device, device, tuple(profiles), like.models, slots, kv_tokens)


def _expected(seen: DeviceProfile, device: str) -> DeviceProfile:
    """The model where nobody measured it: the step times expected of the device, else alike."""
    step: StepTime = prior_step_time(seen.model, device)
    if step == prior_step_time(seen.model, ""):
        raise ConfigurationError(
            f"Nothing is known of a device {device!r}; name an instance of the fleet, a device"
            " such as a10, a100 or h100, or describe yours in a --fleet file.",
            param="add",
        )
    return replace(seen, device=device, step=step, extrapolated=True)
