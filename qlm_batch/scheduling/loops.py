"""Which form of the hot loops is used: compiled, or as they are written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from qlm_batch.scheduling.compiled import AVAILABLE, plain
from qlm_batch.scheduling.cutting import cut, packed
from qlm_batch.scheduling.kernels import (
    Columns,
    Flags,
    Floats,
    Ints,
    behind,
    by_insertion,
    in_order,
    insert_late,
    insert_one,
    search,
    tidied,
    walk_all,
)
from qlm_batch.scheduling.survival import largest, survival
from qlm_batch.scheduling.trusting import trusted


class Loops(NamedTuple):
    """The loops, all compiled or all as written; they give equal results."""

    in_order: Callable[[Columns, Ints, bool], Ints]
    walk_all: Callable[[Columns, Ints, Ints], tuple[Floats, Floats, Floats, Floats, Floats]]
    tidied: Callable[[Columns, Ints, Ints, Ints], Ints]
    behind: Callable[[Columns, Ints, Floats, Ints], Ints]
    insert_one: Callable[[Columns, Ints, Ints, int, float], tuple[int, int]]
    insert_late: Callable[
        [Columns, Floats, Floats, Floats, Ints, Floats, Ints, Ints, Ints, float, float, int], Flags
    ]
    by_insertion: Callable[[Columns, Ints, Ints, Ints, float, float], Ints]
    search: Callable[[Columns, Floats, Ints, Ints, Ints, int, int, int, float, float], int]
    survival: Callable[
        [Floats, Floats, Floats, Floats, Floats, float, float], tuple[Floats, Floats]
    ]
    largest: Callable[[Floats, Floats, Ints, Ints, Floats], tuple[Floats, Floats]]
    trusted: Callable[[Floats, Floats, Floats, int, Floats, int, float, float], Floats]
    cut: Callable[[Ints, Ints, Floats, Ints], tuple[Ints, Ints]]
    packed: Callable[[Ints, Flags, Ints, Floats], tuple[Ints, Ints]]


COMPILED = Loops(
    in_order,
    walk_all,
    tidied,
    behind,
    insert_one,
    insert_late,
    by_insertion,
    search,
    survival,
    largest,
    trusted,
    cut,
    packed,
)
WRITTEN = Loops(**plain(globals(), Loops._fields))


@dataclass(slots=True)
class _Choice:
    compiled: bool = AVAILABLE


_choice = _Choice()


def loops() -> Loops:
    """The loops to use now: compiled at their first call, unless `hold_compiling` was called."""
    return COMPILED if _choice.compiled else WRITTEN


def hold_compiling() -> None:
    """Use the loops as written until `compile_all` has ended, in a thread of the caller's."""
    _choice.compiled = False


def compile_all() -> None:
    """Compile every loop, or load what was compiled before: seconds, at most a minute once."""
    if not AVAILABLE:
        return
    one, none = np.ones(1), np.zeros(1, dtype=np.int64)
    table, yes = np.ones((1, 1)), np.ones((1, 1), dtype=np.bool_)
    columns = Columns(
        model=none, due=10.0 * one, weight=one, kind=none, amount=one, mean=table, var=table,
        tails=table, before=none, serves=yes, awake=yes, ready=one, ready_var=one,
        setup=np.zeros((1, 2, 1)), z=0.5, inflation=1.0,
    )  # fmt: skip
    place, size = np.zeros((1, 2), dtype=np.int64), np.zeros(1, dtype=np.int64)
    COMPILED.in_order(columns, none, True)
    COMPILED.by_insertion(columns, none, place, size, 1.0, 0.5)
    COMPILED.walk_all(columns, none, np.array([0, 1]))
    COMPILED.tidied(columns, none, none, np.array([0, 1]))
    COMPILED.behind(columns, none, one.copy(), np.full(1, -1, dtype=np.int64))
    COMPILED.insert_one(columns, place, size, 0, 0.5)
    COMPILED.insert_late(
        columns, one.copy(), one, np.zeros((1, 1, 8)), none, one, place, size, none, 0.5, 0.5, 1
    )
    COMPILED.search(columns, one, place, size, none.copy(), 0, 1, 0, 0.5, 0.5)
    COMPILED.survival(one, one, one, one, one, 0.5, 1.0)
    COMPILED.largest(one, one[:0], size + 1, size, one)
    memories = np.ones((1, 1))
    memories.setflags(write=False)
    COMPILED.trusted(one, one, one, 0, memories, 1, 1.0, 1.0)
    COMPILED.cut(size + 1, size + 1, one, size + 1)
    COMPILED.packed(size, yes[0], np.array([0, 1]), one)
    _choice.compiled = True
