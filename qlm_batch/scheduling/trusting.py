"""How far to trust each memory of a history, as a loop: see `lengthbook.History`."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from qlm_batch.scheduling.compiled import compiled

Floats = NDArray[np.float64]


@compiled
def trusted(
    trust: Floats,
    answers: Floats,
    brought: Floats,
    first: int,
    memories: Floats,
    chunk: int,
    surprise: float,
    regime: float,
) -> Floats:
    """The trust in each memory after the answers from `first` on, judged `chunk` by chunk.

    `brought` is what each answer's prompt was known to bring. `memories[m, -n:]` is what memory m
    makes the last n answers count, the newest 1. A chunk counts at most `surprise` against one.
    """
    shares = trust.copy()
    size, most = memories.shape
    levels, against = np.empty(size), np.empty(size)
    for start in range(first, answers.size, chunk):
        low = max(0, start - most)
        if start - low < chunk:
            continue
        behind = most - start
        for m in range(size):
            told = expected = 0.0
            for n in range(low, start):
                told += memories[m, behind + n] * answers[n]
                expected += memories[m, behind + n] * brought[n]
            levels[m] = told / expected
        total = told = expected = 0.0
        for n in range(low, start):
            weight = 0.0
            for m in range(size):
                weight += shares[m] * memories[m, behind + n]
            total += weight
            told += weight * answers[n]
            expected += weight * brought[n]
        level, spread = told / expected, 0.0
        for n in range(low, start):
            weight = 0.0
            for m in range(size):
                weight += shares[m] * memories[m, behind + n]
            spread += weight * (answers[n] - level * brought[n]) ** 2
        stop = min(answers.size, start + chunk)
        new = stop - start
        mean = usual = 0.0
        for n in range(start, stop):
            mean += answers[n] / new
            usual += brought[n] / new
        for m in range(size):
            off = mean - levels[m] * usual
            against[m] = min(surprise, new * off * off / max(spread / total, 1e-9))
        least, kept = against.min(), 0.0
        for m in range(size):
            shares[m] *= math.exp(-0.5 * (against[m] - least))
            kept += shares[m]
        again = min(1.0, new / regime)
        for m in range(size):
            shares[m] = (1.0 - again) * shares[m] / kept + again / size
    return shares
