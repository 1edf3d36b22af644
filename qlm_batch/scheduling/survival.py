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
    ended: Floats,
    mass: Floats,
    assumed: Floats,
    outlived: Floats,
    weights: Floats,
    fading: float,
    rest_at: float,
) -> tuple[Floats, Floats]:
    """Values and their probabilities, from what ended and what `outlived` a value, both ascending.

    Of what ended, `mass` was seen and `assumed` is assumed. Mass at risk, but for the assumed, is
    faded by exp(-fading) for each token between it and what it is at risk of. What is left beyond
    all values is put at `rest_at`.
    """
    values = np.empty(ended.size + 1)
    chances, sure = np.zeros(ended.size + 1), np.zeros(ended.size + 1)
    count = 0
    for n in range(ended.size):
        if count == 0 or ended[n] != values[count - 1]:
            values[count] = ended[n]
            count += 1
        chances[count - 1] += mass[n]
        sure[count - 1] += assumed[n]
    at_risk = np.empty(count + 1)
    risk, held, last = 0.0, 0.0, outlived.size - 1
    for n in range(count - 1, -1, -1):
        if n < count - 1:
            risk *= math.exp(-fading * (values[n + 1] - values[n]))
        while last >= 0 and outlived[last] >= values[n]:
            risk += weights[last] * math.exp(-fading * (outlived[last] - values[n]))
            last -= 1
        risk += chances[n]
        held += sure[n]
        at_risk[n] = risk + held
    alive = 1.0
    for n in range(count):
        share = min(1.0, (chances[n] + sure[n]) / max(at_risk[n], 1e-300))
        chances[n] = alive * share
        alive *= 1.0 - share
    if alive > _NOTHING:
        values[count] = rest_at
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
