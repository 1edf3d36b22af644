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

    Rows of `mean` and `var` are kinds of work, their columns instances in the snapshot's order; inf
    where not served. The rest is by class of instances (`classes` of each), times `slow` of the
    instance: `tails[tail_kind, class]` is how much later than its occupation a group's last request
    ends, `excess[kind, class]` how much later than the mean one requests end: equally likely
    values, ascending.
    """

    kind: Ints
    count: Floats
    mean: Floats
    var: Floats
    tail_kind: Ints
    tails: Floats
    excess: Floats
    classes: Ints
    slow: Floats

    @staticmethod
    def of(works: Sequence[GroupWork], instances: int) -> WorkTable:
        """A table in which every group is of its own kind, and every instance of its own class."""
        rows, each = np.arange(len(works)), np.arange(instances)
        mean, var, tail = (
            np.array([getattr(work, name) for work in works]).reshape(len(works), instances)
            for name in ("mean", "var", "tail")
        )
        excess = np.repeat(tail[:, :, None], EXCESS, axis=2)
        ones = np.ones(len(works)), np.ones(instances)
        return WorkTable(rows, ones[0], mean, var, rows, tail, excess, each, ones[1])

    def tail(self, groups: Ints, instances: Ints) -> Floats:
        """How much later than its occupation the last request of each group ends at an instance."""
        found: Floats = self.tails[self.tail_kind[groups], self.classes[instances]]
        return found * self.slow[instances]

    def ends(self, groups: Ints, instances: Ints) -> Floats:
        """The row of `excess` of each group at an instance."""
        found: Floats = self.excess[self.kind[groups], self.classes[instances]]
        return found * self.slow[instances][:, None]

    def end(self, nth: int) -> Floats:
        """The nth of `excess` of each kind at every instance."""
        # Laid out by rows, as the compiled loops expect it.
        by_class = np.ascontiguousarray(self.excess[:, :, nth])
        return np.ascontiguousarray(by_class[:, self.classes]) * self.slow
