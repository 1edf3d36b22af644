"""The garbage collector, held while a plan is made.

A plan makes tens of thousands of objects that all live until it is saved, so to look for rubbish
among them is in vain; to look through all there is takes longer than the plan itself. What was made
is then taken for old: else the first collection afterwards would look through it after all.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_held() -> Iterator[None]:
    """Nothing is collected inside, unless another thread's ends first; reference counts still work.

    Where the collector is off already it stays off. Whoever froze objects has them unfrozen.
    """
    held = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if held:
            # Together these put all there is into the oldest generation, looking at none of it.
            gc.freeze()
            gc.unfreeze()
            gc.enable()
