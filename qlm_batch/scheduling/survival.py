"""Distributions of lengths: the product-limit estimate, and the largest of many, as loops."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from qlm_batch.scheduling.compiled import compiled

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

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
    # One by one: an array's own sum adds in another order where it is not compiled.
    total = 0.0
    for n in range(count):
        total += chances[n]
    return values[:count].copy(), chances[:count] / total


@compiled
def largest(
    values: Floats, up_to: Floats, count: Ints, kept: Ints, limits: Floats
) -> tuple[Floats, Floats]:
    """Mean and variance of the largest of `count[n]` lengths of at most `limits[n]`; counts ascend.

    `up_to` is the chance of a length up to each of the `values` but the last, `kept[n]` how many of
    these are below the limit. E max = limit - ∫ F(x)^count dx, up to the limit, and E max² alike
    over x².
    """
    mean, var = np.empty(count.size), np.empty(count.size)
    below, below_squares = np.zeros(values.size), np.zeros(values.size)
    n = 0
    while n < count.size:
        for j in range(up_to.size):
            power, base, left = 1.0, up_to[j], count[n]
            while left > 0:
                if left % 2 == 1:
                    power *= base
                base *= base
                left //= 2
            step = values[j + 1] - values[j]
            below[j + 1] = below[j] + step * power
            square = step * (values[j + 1] + values[j])
            below_squares[j + 1] = below_squares[j] + square * power
        same = count[n]
        while n < count.size and count[n] == same:
            last, most = kept[n] - 1, limits[n]
            lost = lost_squares = 0.0
            if last == up_to.size:
                most, lost, lost_squares = values[last], below[last], below_squares[last]
            elif last >= 0:
                # The part of a step between two values that lies below the limit.
                step = values[last + 1] - values[last]
                power = (below[last + 1] - below[last]) / step
                lost = below[last] + (most - values[last]) * power
                squares = (most - values[last]) * (most + values[last])
                lost_squares = below_squares[last] + squares * power
            mean[n] = most - lost
            # That is E max² - (E max)², without taking one large number from another.
            var[n] = max(0.0, lost * (most + mean[n]) - lost_squares)
            n += 1
    return mean, var
