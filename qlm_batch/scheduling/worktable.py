"""What groups take at every instance, as arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

EXCESS = 8
"""Equally likely values that stand for how much later than the mean request one ends."""


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
