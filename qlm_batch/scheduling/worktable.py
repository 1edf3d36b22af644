"""What groups take at every instance, as arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

EXCESS = 8
"""Equally likely values that stand for how much later than the mean request one ends."""


@dataclass(frozen=True, slots=True, eq=False)
class GroupWork:
    """A group's occupation (mean, variance) and tail at every instance; inf where not served."""

    mean: Floats
    var: Floats
    tail: Floats


@dataclass(frozen=True, slots=True, eq=False)
class WorkTable:
    """What many groups take everywhere: occupation is `mean[kind] · count`, variance alike.

    Tails are `tails[tail_kind]`. Rows of `mean`, `var` and `tails` are kinds of work, their columns
    instances in the snapshot's order; inf where not served. `excess[kind, instance]` tells how much
    later than the mean one requests end: equally likely values, ascending.
    """

    kind: Ints
    count: Floats
    mean: Floats
    var: Floats
    tail_kind: Ints
    tails: Floats
    excess: Floats

    @staticmethod
    def of(works: Sequence[GroupWork], instances: int) -> WorkTable:
        """A table in which every group is of its own kind."""
        rows = np.arange(len(works), dtype=np.int64)
        mean, var, tail = (
            np.array([getattr(work, name) for work in works]).reshape(len(works), instances)
            for name in ("mean", "var", "tail")
        )
        excess = np.repeat(tail[:, :, None], EXCESS, axis=2)
        return WorkTable(rows, np.ones(len(works)), mean, var, rows, tail, excess)
