"""The engine model for many requests: `ReferenceEngine`'s behaviour over the compiled kernel."""

from __future__ import annotations

import numpy as np

from qlm_batch.scheduling.eviction import MAX_EVICTIONS, MOST_ALONE, URGENT_BELOW
from qlm_batch.scheduling.speed import StepTime
from qlm_batch.simulation import kernel as k
from qlm_batch.simulation.engine import EngineLimits, Finished, check_size
from qlm_batch.simulation.kernel import Ints


class FastEngine:
    """One engine; see ReferenceEngine for what its methods mean.

    Times agree with the reference's within rounding: stretches of decoding are added up at once.
    """

    def __init__(self, limits: EngineLimits, speed: StepTime, clock: float = 0.0) -> None:
        self.limits = limits
        self._times = np.array([clock, 0.0])
        self._totals = np.zeros(k.TOTALS, dtype=np.int64)
        self._totals[k.FREE_BLOCKS] = limits.blocks
        self._limits = np.array(
            [
                limits.slots,
                limits.batched_tokens,
                limits.block_tokens,
                URGENT_BELOW,
                limits.size,
                limits.alone,
                MAX_EVICTIONS,
                MOST_ALONE,
                limits.prefix_caching,
                -1 if limits.together is None else limits.together,
            ],
            dtype=np.int64,
        )
        self._speed = np.array(
            [speed.base, speed.per_sequence, speed.per_kv, speed.per_prefill], dtype=np.float64
        )
        self._order = np.zeros(0, dtype=np.int64)
        self._samples = np.zeros((k.SAMPLES, 4))
        self._sampled = 0
        self._submitted = 0
        self._rows: dict[int, int] = {}
        self._ints = np.zeros((0, k.ROW), dtype=np.int64, order="F")
        self._floats = np.zeros((0, 3), order="F")
        self._done = np.zeros(0, dtype=np.int64)
        self._spare: list[int] = []
        self._room(2 * limits.size + 64)

    def _room(self, rows: int) -> None:
        """Grow to so many rows."""
        before = len(self._ints)
        more = rows - before
        # By column: a step reads a few columns of many rows.
        self._ints = np.asfortranarray(
            np.concatenate((self._ints, np.zeros((more, k.ROW), dtype=np.int64)))
        )
        self._floats = np.asfortranarray(np.concatenate((self._floats, np.zeros((more, 3)))))
        self._done = np.zeros(rows, dtype=np.int64)
        self._order = np.concatenate((self._order, np.zeros(more, dtype=np.int64)))
        self._spare = [*range(rows - 1, before - 1, -1), *self._spare]
        self._totals[k.ROWS] = rows

    @property
    def clock(self) -> float:
        """When the last step ended."""
        return float(self._times[k.CLOCK])

    @property
    def busy_s(self) -> float:
        """Seconds spent in steps."""
        return float(self._times[k.BUSY])

    @property
    def running(self) -> int:
        """Requests in the running batch."""
        return int(self._totals[k.RUNS])

    @property
    def waiting(self) -> int:
        """Requests that wait for the running batch, those that rest among them."""
        return int(self._totals[k.WAITS] + self._totals[k.RESTS])

    @property
    def steps(self) -> int:
        """Steps so far."""
        return int(self._totals[k.STEPS])

    @property
    def generated(self) -> int:
        """Output tokens so far."""
        return int(self._totals[k.TOKENS])

    @property
    def preemptions(self) -> int:
        """Times a running request gave way."""
        return int(self._totals[k.PREEMPTIONS])

    @property
    def recomputed(self) -> int:
        """Tokens whose computation preemption threw away."""
        return int(self._totals[k.RECOMPUTED])

    def submit(self, key: int, prompt: int, output: int, priority: int, arrival: float) -> None:
        """Hand in a request; it joins the next step that begins at or after its arrival.

        ValueError when it is empty or could never fit.
        """
        check_size(self.limits, prompt, output)
        if not self._spare:
            self._room(2 * len(self._ints))
        row = self._spare.pop()
        self._rows[key] = row
        self._ints[row] = 0
        self._ints[row, : k.GENERATED] = (
            k.WAITING,
            key,
            prompt,
            output,
            priority,
            self._submitted,
        )
        self._floats[row] = (arrival, -1.0, -1.0)
        self._submitted += 1
        self._totals[k.WAITS] += 1

    def submit_all(
        self, keys: Ints, prompts: Ints, outputs: Ints, priority: int, arrival: float
    ) -> None:
        """Hand in many requests that come together, as `submit` would one after another.

        ValueError, and none is taken, when one is empty or could never fit.
        """
        count = len(keys)
        if not count:
            return
        needed = -(-(prompts + outputs) // self.limits.block_tokens)
        wrong = (prompts < 1) | (outputs < 1) | (needed > self.limits.blocks)
        if wrong.any():
            first = int(np.argmax(wrong))
            check_size(self.limits, int(prompts[first]), int(outputs[first]))
        while len(self._spare) < count:
            self._room(2 * len(self._ints))
        rows = self._spare[: -count - 1 : -1]
        del self._spare[-count:]
        self._rows.update(zip(keys.tolist(), rows, strict=True))
        fresh = np.zeros((count, k.ROW), dtype=np.int64)
        fresh[:, k.STATE], fresh[:, k.PRIORITY] = k.WAITING, priority
        fresh[:, k.KEY], fresh[:, k.PROMPT], fresh[:, k.OUTPUT] = keys, prompts, outputs
        fresh[:, k.NUMBER] = np.arange(self._submitted, self._submitted + count)
        self._ints[rows] = fresh
        self._floats[rows] = (arrival, -1.0, -1.0)
        self._submitted += count
        self._totals[k.WAITS] += count

    def abort(self, key: int) -> bool:
        """Drop a request; False when it is not here."""
        row = self._rows.pop(key, None)
        if row is None:
            return False
        if self._ints[row, k.STATE] == k.WAITING:
            self._totals[k.WAITS] -= 1
        else:
            inside = self._order[: self._totals[k.RUNS] + self._totals[k.RESTS]]
            at = int(np.flatnonzero(inside == row)[0])
            inside[at:-1] = inside[at + 1 :].copy()
            self._totals[k.RUNS if at < self.running else k.RESTS] -= 1
            self._totals[k.FREE_BLOCKS] += self._ints[row, k.BLOCKS]
        self._ints[row, k.STATE] = k.FREE
        self._spare.append(row)
        return True

    def advance(self, until: float) -> list[Finished]:
        """Run every step that begins before `until`; what ended, in order."""
        return [Finished(*column) for column in zip(*self.advance_columns(until), strict=True)]

    def advance_columns(self, until: float) -> tuple[list[int], list[float], list[float]]:
        """As `advance`: keys, times of first tokens, and ends."""
        ended = k.advance(
            self._ints,
            self._floats,
            self._order,
            self._totals,
            self._times,
            self._limits,
            self._speed,
            self._samples,
            self._done,
            until,
        )
        if not ended:
            return [], [], []
        rows = self._done[:ended]
        keys: list[int] = self._ints[rows, k.KEY].tolist()
        self._spare += [self._rows.pop(key) for key in keys]
        times = self._floats[rows]
        return keys, times[:, k.FIRST].tolist(), times[:, k.END].tolist()

    def ages(self, most: int) -> tuple[int, ...]:
        """Output tokens so far of up to `most` running requests."""
        rows = self._order[: min(most, self.running)]
        return tuple(self._ints[rows, k.GENERATED].tolist())

    def took_steps(self) -> tuple[tuple[int, int, int, float], ...]:
        """A sample of the steps since the last call: (sequences, kv, prefill tokens, seconds)."""
        count = int(self._totals[k.SAMPLED])
        seen = np.arange(max(self._sampled, count - k.SAMPLES), count)
        self._sampled = count
        rows = self._samples[seen % k.SAMPLES].tolist()
        return tuple((int(n), int(kv), int(p), s) for n, kv, p, s in rows)

    def begun(self) -> frozenset[int]:
        """Keys of the requests inside that have had their first token."""
        inside = (self._ints[:, k.STATE] != k.FREE) & (self._floats[:, k.FIRST] >= 0.0)
        return frozenset(self._ints[inside, k.KEY].tolist())
