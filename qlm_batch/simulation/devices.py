"""Devices we do not have: step times, memory and swap times per (model, device).

Step times are fits to published profiles of vLLM. Key-value room is computed from the device's
memory unless it was published; swap times from the weights, at the bandwidths below.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from qlm_batch.domain.errors import ConfigurationError
from qlm_batch.scheduling.speed import StepTime

SLEEP_GB_S: Final = 15.0
"""Weights to pinned memory and back: published sleep and wake times lie at 11–21 GB/s per GPU."""
LOAD_GB_S: Final = 1.5
"""Weights from storage, start of the engine included."""
_USABLE: Final = 0.9


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """How one model runs on one device; `gpus` share its weights.

    `extrapolated` marks step times nobody has measured. Sizes in GB are 10⁹ bytes.
    """

    model: str
    device: str
    step: StepTime
    kv_tokens: int
    slots: int
    weights_gb: float
    gpus: int = 1
    extrapolated: bool = False

    @property
    def sleep_s(self) -> float:
        """Time to move the weights out of the GPUs."""
        return self.weights_gb / self.gpus / SLEEP_GB_S

    @property
    def wake_s(self) -> float:
        """Time to move them back from host memory."""
        return self.weights_gb / self.gpus / SLEEP_GB_S

    @property
    def load_s(self) -> float:
        """Time to read them from storage."""
        return self.weights_gb / self.gpus / LOAD_GB_S


# Model: weights in GB, bytes of key-value memory per token. Device: GB per GPU, GPUs.
_MODELS: Final = {
    "llama-2-7b": (13.5, 524_288),
    "mistral-7b": (14.5, 131_072),
    "llama-3.1-8b": (16.1, 131_072),
    "opt-13b": (26.0, 819_200),
    "llama-2-70b": (138.0, 327_680),
}
_DEVICES: Final = {
    "a10": (24.0, 1),
    "a100": (80.0, 1),
    "h100": (80.0, 1),
    "a100-tp4": (80.0, 4),
    "a100-tp8": (80.0, 8),
    "h100-tp4": (80.0, 4),
    "h100-tp8": (80.0, 8),
}
# Milliseconds: base, per sequence, per key-value token, per prefill token; slots; extrapolated.
_STEPS: Final = {
    ("llama-2-7b", "a100"): (9.8, 0.0044, 0.0005, 0.063, 128, False),
    ("llama-2-7b", "h100"): (6.4, 0.0044, 0.00031, 0.020, 128, False),
    ("llama-2-7b", "a10"): (31.0, 0.0044, 0.0017, 0.154, 64, True),
    ("mistral-7b", "a100"): (10.5, 0.0044, 0.00013, 0.063, 128, False),
    ("mistral-7b", "h100"): (6.8, 0.0044, 0.00008, 0.020, 128, False),
    ("mistral-7b", "a10"): (33.0, 0.0044, 0.00043, 0.154, 64, True),
    ("llama-3.1-8b", "a100"): (10.5, 0.0044, 0.00013, 0.063, 128, False),
    ("llama-3.1-8b", "h100"): (6.8, 0.0044, 0.00008, 0.020, 128, False),
    # Above 95 sequences the published cost per sequence doubles, so the batch stays below.
    ("opt-13b", "a100"): (23.5, 0.061, 0.00059, 0.1405, 94, False),
    ("llama-2-70b", "a100-tp4"): (43.2, 0.20, 0.00039, 0.18, 128, False),
    ("llama-2-70b", "a100-tp8"): (44.0, 0.20, 0.00035, 0.12, 128, False),
    ("llama-2-70b", "h100-tp4"): (28.7, 0.27, 0.00012, 0.09, 128, False),
    ("llama-2-70b", "h100-tp8"): (29.9, 0.21, 0.00017, 0.055, 128, False),
}
_PUBLISHED_KV: Final = {("opt-13b", "a100"): 66_144}


def _built_in() -> Iterable[DeviceProfile]:
    for (model, device), (base, seq, kv, prefill, slots, extrapolated) in _STEPS.items():
        weights_gb, per_token = _MODELS[model]
        memory_gb, gpus = _DEVICES[device]
        room = _USABLE * memory_gb * gpus - weights_gb
        yield DeviceProfile(
            model,
            device,
            StepTime(base / 1e3, seq / 1e3, kv / 1e3, prefill / 1e3),
            _PUBLISHED_KV.get((model, device), int(room * 1e9 / per_token)),
            slots,
            weights_gb,
            gpus,
            extrapolated,
        )


PROFILES: Final[Mapping[tuple[str, str], DeviceProfile]] = {
    (profile.model, profile.device): profile for profile in _built_in()
}


def family(model: str) -> str:
    """What a model named `family@variant` behaves like: the part before the `@`."""
    return model.partition("@")[0]


def profile_of(
    model: str,
    device: str,
    own: Mapping[tuple[str, str], DeviceProfile] | None = None,
) -> DeviceProfile:
    """The profile of a pair, the caller's `own` first. ConfigurationError when there is none."""
    known = {**PROFILES, **(own or {})}
    found = known.get((model, device)) or known.get((family(model), device))
    if found is None:
        pairs = ", ".join(f"{m} on {d}" for m, d in sorted(known))
        raise ConfigurationError(
            f"Nothing is known of {model} on {device}; use one of {pairs}, or describe it under"
            " `profiles` in the fleet file.",
            param="device",
        )
    return found
