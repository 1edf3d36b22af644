"""Which of its models an instance should have awake: the agent's rule for swaps.

Called by the worker and by the simulated cluster alike. The plan speaks through what is in hand:
work of a model that is not awake is only handed out once the plan wants that model there.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final

STAY_SWAPS: Final = 4.0
"""A model that has batch work keeps its place for so many swap times before another interrupts it:
of what two swaps and a stay take, two thirds are work."""
CALLS_SWAPS: Final = 12.0
"""A model that has interactive requests yields to waiting batch work after so many swap times:
batch work keeps a quarter of the time, however many calls there are."""
DRAIN_SWAPS: Final = 2.0
"""What is inside may end by itself where that takes no longer than so many swap times."""
CALLS_DRAIN_SWAPS: Final = 0.5
"""The same where interactive requests wait for it."""
THIN: Final = 0.125
"""Batch work that fills no more than this share of the running batch gives way to work due at the
same time: to wait for its longest answers would leave the instance all but idle."""
RETRY_DELAYS_S: Final = (0.5, 3.0)
"""Waits before waking a model is tried again."""
FAILED_FOR_S: Final = 300.0
"""A model that could not be made awake is not tried again on that instance for so long."""


class Parting(StrEnum):
    """What becomes of the batch requests inside a model that goes to sleep.

    `drain`: they end first. `stop`: they wait in the sleeping engine where it keeps them, else
    they go back to the queue and start over.
    """

    DRAIN = "drain"
    STOP = "stop"


@dataclass(frozen=True, slots=True)
class Hosted:
    """One of an instance's models at one moment.

    `awake_s` is how long it has been awake, None when it is not; `swap_s` the time to make it awake
    where it is not, or again once it slept. `due` is the earliest deadline of the batch work in
    hand, inf without any, and `share` how many there are of a running batch; `calls` counts
    interactive requests; `left_s` is how long what is inside still takes.
    """

    model: str
    awake_s: float | None
    swap_s: float
    due: float = math.inf
    calls: int = 0
    left_s: float = 0.0
    share: float = 1.0

    @property
    def wanted(self) -> bool:
        """Whether there is anything to do for it."""
        return self.calls > 0 or self.due < math.inf


@dataclass(frozen=True, slots=True)
class Change:
    """One swap: `wakes` takes the place of `sleeps`, or a free one where that is None."""

    wakes: str
    sleeps: str | None
    parting: Parting = Parting.DRAIN
    drain_s: float = 0.0
    """Most time for what is inside to end by itself."""


def next_change(hosted: Sequence[Hosted], room: int) -> Change | None:
    """The swap to make now on an instance that may have `room` models awake, or None.

    Interactive requests come before batch work, and earlier deadlines before later ones. A model
    without work yields at once. One with batch work yields to calls after STAY_SWAPS swap times,
    and to work due before all of its own, or together with it where its own is THIN; one with calls
    yields to batch work after CALLS_SWAPS.
    """
    asleep = [own for own in hosted if own.awake_s is None and own.wanted]
    if not asleep:
        return None
    wakes = min(asleep, key=lambda own: (own.calls == 0, own.due, own.swap_s, own.model))
    awake = [own for own in hosted if own.awake_s is not None]
    if len(awake) < room:
        return Change(wakes.model, None)
    yielding = [own for own in awake if _yields(own, wakes)]
    if not yielding:
        return None
    sleeps = min(yielding, key=lambda own: (own.wanted, own.calls, -own.due, own.model))
    most_s = (CALLS_DRAIN_SWAPS if wakes.calls else DRAIN_SWAPS) * wakes.swap_s
    parting = Parting.DRAIN if sleeps.left_s <= most_s else Parting.STOP
    return Change(wakes.model, sleeps.model, parting, most_s)


def stay_s(hosted: Sequence[Hosted], model: str, room: int) -> float:
    """How long an interactive request for `model` would wait before the swap to it began."""
    awake = [own for own in hosted if own.awake_s is not None]
    if len(awake) < room or any(own.model == model for own in awake):
        return 0.0
    asleep = [replace(own, calls=1) for own in hosted if own.model == model]
    waits = [_turn_s(own, other) - (own.awake_s or 0.0) for own in awake for other in asleep]
    return max(0.0, min(waits, default=0.0))


def _yields(awake: Hosted, other: Hosted) -> bool:
    """Whether the awake model gives its place to the other, which has work."""
    return (awake.awake_s or 0.0) >= _turn_s(awake, other)


def _turn_s(awake: Hosted, other: Hosted) -> float:
    """How long the awake model may stay when the other, which has work, wants its place."""
    if not awake.wanted:
        return 0.0
    if awake.calls and not other.calls:
        return CALLS_SWAPS * other.swap_s
    thin = awake.share <= THIN
    if other.calls or other.due < awake.due or (thin and other.due == awake.due):
        return STAY_SWAPS * other.swap_s
    return math.inf


def retry_delay(attempts: int) -> float | None:
    """Seconds to wait after `attempts` failed tries to wake a model, None when it was the last."""
    return RETRY_DELAYS_S[attempts - 1] if attempts <= len(RETRY_DELAYS_S) else None
