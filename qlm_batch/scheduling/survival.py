"""The product-limit estimate as one loop over sorted observations."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from qlm_batch.scheduling.compiled import compiled

Floats = NDArray[np.float64]

_NOTHING = 1e-12


@compiled
def survival(
    finished: Floats, mass: Floats, running: Floats, age_weight: float, fading: float
) -> tuple[Floats, Floats]:
    """Values and their probabilities, from what ended and what still runs, both ascending.

    Mass at risk is faded by exp(-fading) for each token between it and what it is at risk of. What
    is left when the largest observation is a running one is put there.
    """
    values = np.empty(finished.size + 1)
    chances = np.zeros(finished.size + 1)
    count = 0
    for n in range(finished.size):
        if count == 0 or finished[n] != values[count - 1]:
            values[count] = finished[n]
            count += 1
        chances[count - 1] += mass[n]
    at_risk = np.empty(count + 1)
    risk, age = 0.0, running.size - 1
    for n in range(count - 1, -1, -1):
        if n < count - 1:
            risk *= math.exp(-fading * (values[n + 1] - values[n]))
        while age >= 0 and running[age] >= values[n]:
            risk += age_weight * math.exp(-fading * (running[age] - values[n]))
            age -= 1
        risk += chances[n]
        at_risk[n] = risk
    alive = 1.0
    for n in range(count):
        ended = min(1.0, chances[n] / max(at_risk[n], 1e-300))
        chances[n] = alive * ended
        alive *= 1.0 - ended
    if alive > _NOTHING:
        last = values[count - 1] if count > 0 else 0.0
        values[count] = max(last, running[-1]) if running.size > 0 else last
        chances[count] = alive
        count += 1
    return values[:count].copy(), chances[:count] / chances[:count].sum()
