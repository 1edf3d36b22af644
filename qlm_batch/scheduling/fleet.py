"""The instances of one snapshot: who serves what, and which are alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qlm_batch.domain.snapshot import InstanceState, InstanceView, Residency
from qlm_batch.scheduling.worktable import Floats, Ints

SERVING = frozenset({InstanceState.READY, InstanceState.STARTING, InstanceState.SWAPPING})
"""States in which an instance has, or will shortly have, time to give."""


class Fleet:
    """Instances are named by their index, in the snapshot's order.

    Those of one class are alike in device, slots and memory, and told apart only by `slow`: how
    much longer everything takes there while interactive work is served first.
    """

    def __init__(self, instances: Sequence[InstanceView]) -> None:
        self.instances = instances
        self.views = [{model.name: model for model in view.models} for view in instances]
        self.roots = {name: model.root for own in self.views for name, model in own.items()}
        self._served = [
            frozenset(name for name, own in models.items() if own.residency is not Residency.FAILED)
            if view.state in SERVING
            else frozenset()
            for view, models in zip(instances, self.views, strict=True)
        ]
        self.slow: Floats = np.array([_slowdown(view) for view in instances], dtype=np.float64)
        alike: dict[tuple[str, int, int], int] = {}
        self.class_of = [
            alike.setdefault((view.device, view.slots, view.kv_tokens), len(alike))
            for view in instances
        ]
        self.classes: Ints = np.array(self.class_of, dtype=np.int64)
        self.members: list[Ints] = [np.flatnonzero(self.classes == n) for n in range(len(alike))]
        """The instances of each class."""
        self._hosts: dict[str, NDArray[np.bool_]] = {}
        self._servers: dict[str, list[Ints]] = {}

    def serves(self, instance: int, model: str) -> bool:
        """Whether this instance takes work of `model`."""
        return model in self._served[instance]

    def hosting(self, model: str) -> NDArray[np.bool_]:
        """Which instances serve the model."""
        found = self._hosts.get(model)
        if found is None:
            serving = [model in own for own in self._served]
            found = self._hosts[model] = np.array(serving, dtype=np.bool_)
        return found

    def servers(self, model: str) -> list[Ints]:
        """The instances that serve the model, those of one class together."""
        found = self._servers.get(model)
        if found is None:
            hosts = self.hosting(model)
            found = self._servers[model] = [
                own for members in self.members if (own := members[hosts[members]]).size
            ]
        return found


def _slowdown(view: InstanceView) -> float:
    return 1.0 / (1.0 - min(0.95, max(0.0, view.interactive_share)))
