"""Runs cut into pieces and pieces packed into groups, as loops over flat arrays.

See `grouping` for what is cut and packed, and why so.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from qlm_batch.scheduling.compiled import compiled

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Flags = NDArray[np.bool_]


@compiled
def cut(slices: Ints, requests: Ints, limits: Floats, per_size: Ints) -> tuple[Ints, Ints]:
    """The pieces of all runs, each from head to tail: its run, and how many slices are behind it.

    A piece near the head holds at most `limits` of its run's requests, but at least one slice.
    Every `per_size` pieces further back the size doubles, aligned with the pieces so far.
    """
    runs, behind = np.empty(slices.size, dtype=np.int64), np.empty(slices.size, dtype=np.int64)
    count = 0
    for n in range(slices.size):
        each = max(1.0, requests[n] / slices[n])
        size = 1
        while size < slices[n] and 2 * size * each <= limits[n]:
            size *= 2
        position, made = slices[n], 0
        if size >= position:
            size = position
        while position > 0:
            if made == per_size[n] and position % (2 * size) == 0:
                size, made = 2 * size, 0
            made = min(per_size[n], made + 1)
            position = (math.ceil(position / size) - 1) * size
            if count == runs.size:
                room = 2 * count
                more_runs, more_behind = np.empty(room, np.int64), np.empty(room, np.int64)
                more_runs[:count], more_behind[:count] = runs, behind
                runs, behind = more_runs, more_behind
            runs[count], behind[count] = n, position
            count += 1
    return runs[:count], behind[:count]


@compiled
def packed(requests: Ints, known: Flags, bounds: Ints, limits: Floats) -> tuple[Ints, Ints]:
    """Groups of consecutive pieces: the first piece of each, and the one it is named after.

    A group lies within one family, `bounds[f] : bounds[f + 1]`, and holds at most `limits[f]`
    requests unless a single piece has more. Up to each `known` piece groups are filled from the
    back, so that what returned to the head splits off; what comes behind the last known one joins
    its group while there is room.
    """
    first, name = np.empty(requests.size, dtype=np.int64), np.empty(requests.size, dtype=np.int64)
    count = 0
    for f in range(limits.size):
        begun, start = count, bounds[f]
        for p in range(bounds[f], bounds[f + 1]):
            if not known[p]:
                continue
            section, inside = count, 0
            for q in range(p, start - 1, -1):
                if q == p or inside + requests[q] > limits[f]:
                    name[count], inside = q, 0
                    count += 1
                first[count - 1] = q
                inside += requests[q]
            first[section:count] = first[section:count][::-1].copy()
            name[section:count] = name[section:count][::-1].copy()
            start = p + 1
        named, inside = count > begun, 0
        if named:
            inside = requests[first[count - 1] : start].sum()
        for p in range(start, bounds[f + 1]):
            if p == bounds[f] or inside + requests[p] > limits[f]:
                first[count], named, inside = p, False, 0
                count += 1
            if not named:
                name[count - 1] = p
            inside += requests[p]
    return first[:count], name[:count]
