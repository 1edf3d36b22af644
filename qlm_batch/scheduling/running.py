"""What running requests tell: how far they are, and how much each instance still has before it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qlm_batch.domain.jobs import EngineKind
from qlm_batch.domain.snapshot import InstanceView, ModelView, Residency
from qlm_batch.scheduling.lengths import Ages, LengthDistribution

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

MOST_AGES = 1024
"""Ages that stand for all of a model's running requests."""


class Running:
    """Output tokens so far of running requests, where only one model can be meant."""

    def __init__(self, instances: Sequence[InstanceView]) -> None:
        self._instances = instances
        self._where: dict[str, list[int]] = {}
        self.sole: list[str | None] = []
        """By instance, the model its running requests are of; None where that is open."""
        self.counts: list[int] = []
        """By instance, how many of them have begun."""
        for i, view in enumerate(instances):
            model = _sole(view)
            self.sole.append(model.name if model else None)
            self.counts.append(len(view.generated) - view.generated.count(0) if model else 0)
            if model is not None and model.kind is EngineKind.GENERATE:
                self._where.setdefault(model.name, []).append(i)
        self._flat: dict[str, tuple[Floats, Ints]] = {}

    def _of(self, model: str) -> tuple[Floats, Ints]:
        """All ages of the model, and the instance of each."""
        found = self._flat.get(model)
        if found is None:
            where = self._where.get(model, ())
            sizes = [len(self._instances[i].generated) for i in where]
            ages = [age for i in where for age in self._instances[i].generated]
            owner = np.repeat(np.array(where, dtype=np.int64), sizes)
            found = self._flat[model] = (np.array(ages, dtype=np.float64), owner)
        return found

    def ages(self, model: str) -> Ages:
        """Of the model's running requests everywhere."""
        all_ages, _ = self._of(model)
        told = np.sort(all_ages[all_ages > 0.0])
        step = -(-told.size // MOST_AGES) or 1
        kept = told[step // 2 :: step]
        return Ages(kept, told.size / kept.size if kept.size else 1.0, all_ages.size)

    def left(self, model: str, lengths: LengthDistribution) -> tuple[Floats, Floats]:
        """By instance, the tokens its begun requests still have before them: mean and variance."""
        ages, owner = self._of(model)
        begun = ages > 0.0
        sums = np.zeros((2, len(self._instances)))
        for row, values in zip(sums, lengths.residuals(ages[begun]), strict=True):
            np.add.at(row, owner[begun], values)
        return sums[0], sums[1]


def _sole(view: InstanceView) -> ModelView | None:
    awake = [model for model in view.models if model.residency is Residency.AWAKE]
    return awake[0] if len(awake) == 1 else None
