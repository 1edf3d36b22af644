"""What an engine did since the last report, kept small."""

from __future__ import annotations

import time
from collections import deque

from qlm_batch.domain.engine import EngineStats
from qlm_batch.domain.snapshot import Call, Observation, Output

MOST_OUTPUTS = 1000
MOST_STEPS = 200
_FORGETS = 0.05
"""Weight of the newest request in the typical one."""


class Meter:
    """Adds up finished requests, engine steps and busy time of one model."""

    def __init__(self, instance: str, device: str, model: str) -> None:
        self._instance, self._device, self.model = instance, device, model
        self._outputs: deque[Output] = deque(maxlen=MOST_OUTPUTS)
        self._calls: deque[Call] = deque(maxlen=MOST_OUTPUTS)
        self._steps: deque[tuple[int, int, int, float]] = deque(maxlen=MOST_STEPS)
        self._finished = 0
        self._finished_tokens = 0
        self._generated = 0
        self._generated_before = 0
        self._busy_s = 0.0
        self._looked_at = time.monotonic()
        self._busy = False
        self.tokens_per_s = 0.0
        self.typical_output = 0.0
        """Mean output tokens of the last requests that ended."""

    def resumed(self, now: float) -> None:
        """The engine begins to serve: what went before was no time of work."""
        self._busy, self._looked_at = False, now

    def finished(self, output: Output) -> None:
        """A request ended with an answer; its prompt is as intake counted it."""
        self._finished += 1
        self._finished_tokens += output.tokens
        self._outputs.append(output)
        self._typical(output.tokens)

    def called(self, call: Call) -> None:
        """An interactive request was answered."""
        self._calls.append(call)

    def of_adapter(self, output_tokens: int) -> None:
        """A request to an adapter of this model ended: work of the engine, told on its own."""
        self._finished += 1
        self._finished_tokens += output_tokens
        self._typical(output_tokens)

    def _typical(self, output_tokens: int) -> None:
        share = _FORGETS if self.typical_output else 1.0
        self.typical_output += share * (output_tokens - self.typical_output)

    def look(self, stats: EngineStats, busy: bool, now: float) -> None:
        """Fold in a look at the engine; `busy` says whether it has work now."""
        if busy or self._busy:
            self._busy_s += now - self._looked_at
        self._busy, self._looked_at = busy, now
        # An engine that restarts its counter has generated at least what it counts now.
        grown = stats.generated_tokens - self._generated_before
        self._generated += grown if grown >= 0 else stats.generated_tokens
        self._generated_before = stats.generated_tokens
        self._steps.extend(stats.steps)

    def report(self, at: float) -> Observation | None:
        """What was seen since the last report, dated `at` (Unix time); None when nothing was."""
        tokens = self._generated or self._finished_tokens
        self.tokens_per_s = tokens / self._busy_s if self._busy_s else 0.0
        if not (self._finished or self._calls or self._steps or tokens):
            self._busy_s = 0.0
            return None
        seen = Observation(
            instance=self._instance,
            device=self._device,
            model=self.model,
            at=at,
            outputs=tuple(self._outputs),
            steps=tuple(self._steps),
            tokens=tokens,
            requests=self._finished,
            seconds=self._busy_s,
            calls=tuple(self._calls),
        )
        self._outputs.clear()
        self._calls.clear()
        self._steps.clear()
        self._finished = self._finished_tokens = self._generated = 0
        self._busy_s = 0.0
        return seen
