"""Fleets: which instances there are, read from YAML.

    instances:
      - name: big          # big-0, big-1
        count: 2
        device: a100
        models: [mistral-7b, llama-2-7b]     # the first one is awake
        slots: 128         # optional, as kv_tokens and batched_tokens
    profiles:              # optional: devices and models of your own
      - {model: mine, device: mydev, base_ms: 8, per_sequence_ms: 0.01, per_kv_token_ms: 0.0002,
         per_prefill_token_ms: 0.05, kv_tokens: 60000, slots: 64, weights_gb: 14}

A model named `family@variant` behaves like its family and is another model all the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from qlm_batch.domain.errors import ConfigurationError
from qlm_batch.scheduling.speed import StepTime
from qlm_batch.simulation.devices import DeviceProfile, profile_of


@dataclass(frozen=True, slots=True)
class InstanceSpec:
    """One simulated instance; its first model is awake at the start, the others asleep."""

    name: str
    device: str
    profiles: tuple[DeviceProfile, ...]
    models: tuple[str, ...]
    slots: int
    kv_tokens: int
    batched_tokens: int = 2048

    def profile(self, model: str) -> DeviceProfile:
        """How the hosted model runs here."""
        return self.profiles[self.models.index(model)]


@dataclass(frozen=True, slots=True)
class Fleet:
    """All instances, by name."""

    instances: tuple[InstanceSpec, ...]

    @property
    def models(self) -> tuple[str, ...]:
        """Every hosted model, sorted."""
        return tuple(sorted({model for spec in self.instances for model in spec.models}))

    @property
    def extrapolated(self) -> tuple[str, ...]:
        """Pairs in use whose step times are extrapolated, as `model on device`."""
        pairs = {
            f"{profile.model} on {profile.device}"
            for spec in self.instances
            for profile in spec.profiles
            if profile.extrapolated
        }
        return tuple(sorted(pairs))


def instances(
    name: str,
    device: str,
    models: Sequence[str],
    count: int = 1,
    *,
    slots: int | None = None,
    kv_tokens: int | None = None,
    batched_tokens: int = 2048,
    own: Mapping[tuple[str, str], DeviceProfile] | None = None,
    rotate: bool = False,
) -> tuple[InstanceSpec, ...]:
    """`count` alike instances; `rotate` lets each start with another model awake."""
    specs = []
    for number in range(count):
        shift = number % len(models) if rotate else 0
        order = (*models[shift:], *models[:shift])
        profiles = tuple(profile_of(model, device, own) for model in order)
        specs.append(
            InstanceSpec(
                f"{name}-{number}",
                device,
                profiles,
                order,
                slots or min(profile.slots for profile in profiles),
                kv_tokens or min(profile.kv_tokens for profile in profiles),
                batched_tokens,
            )
        )
    return tuple(specs)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Instance(_Strict):
    name: str
    device: str
    models: tuple[str, ...] = Field(min_length=1)
    count: int = Field(default=1, ge=1)
    slots: int | None = Field(default=None, ge=1)
    kv_tokens: int | None = Field(default=None, ge=256)
    batched_tokens: int = Field(default=2048, ge=16)
    rotate: bool = False

    @field_validator("models")
    @classmethod
    def _once(cls, models: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(models)) < len(models):
            raise ValueError("a model is named twice")
        return models


class _Profile(_Strict):
    model: str
    device: str
    base_ms: float = Field(gt=0)
    per_sequence_ms: float = Field(default=0.0, ge=0)
    per_kv_token_ms: float = Field(default=0.0, ge=0)
    per_prefill_token_ms: float = Field(default=0.0, ge=0)
    kv_tokens: int = Field(ge=256)
    slots: int = Field(ge=1)
    weights_gb: float = Field(gt=0)
    gpus: int = Field(default=1, ge=1)

    def profile(self) -> DeviceProfile:
        step = StepTime(
            self.base_ms / 1e3,
            self.per_sequence_ms / 1e3,
            self.per_kv_token_ms / 1e3,
            self.per_prefill_token_ms / 1e3,
        )
        return DeviceProfile(
            self.model, self.device, step, self.kv_tokens, self.slots, self.weights_gb, self.gpus
        )


_PLAIN: Final = {
    "extra_forbidden": "there is no such field",
    "missing": "is missing",
    "model_type": "must be a mapping of fields and values",
    "too_short": "must not be empty",
    "tuple_type": "must be a list",
}
"""What pydantic's types of errors mean to who wrote the file."""


class _File(_Strict):
    instances: tuple[_Instance, ...] = Field(min_length=1)
    profiles: tuple[_Profile, ...] = ()


def read_fleet(path: Path) -> Fleet:
    """The fleet a YAML file describes. ConfigurationError names the field that is wrong."""
    try:
        # From the file rather than its text, so that a fault names it.
        with path.open(encoding="utf-8") as text:
            data = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigurationError(f"The fleet file {path} cannot be read: {error}") from None
    try:
        file = _File.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        what = _PLAIN.get(first["type"], first["msg"])
        raise ConfigurationError(f"{path}: {where}: {what}", param=where) from None
    own = {(p.model, p.device): p.profile() for p in file.profiles}
    specs = tuple(
        spec
        for entry in file.instances
        for spec in instances(
            entry.name,
            entry.device,
            entry.models,
            entry.count,
            slots=entry.slots,
            kv_tokens=entry.kv_tokens,
            batched_tokens=entry.batched_tokens,
            own=own,
            rotate=entry.rotate,
        )
    )
    names = [spec.name for spec in specs]
    if len(set(names)) < len(names):
        raise ConfigurationError(
            f"{path}: two entries of `instances` share a name; give each its own.", param="name"
        )
    return Fleet(specs)
