"""What the simulated engine foretells of the co-serving benchmark, fitted away from it.

A step's time comes from what the service itself learned of the engine in the arms without a mixture
(its profile), scaled so that the simulated batch-only rate is the measured one; what a call takes
outside of the engine comes from the idle arm. Nothing is fitted on the windows foretold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.interactive_load import TOKENS, Arrival
from qlm_batch.domain.snapshot import Profile
from qlm_batch.scheduling.eviction import URGENT_BELOW, pace
from qlm_batch.scheduling.profile import Knowledge
from qlm_batch.scheduling.speed import StepTime
from qlm_batch.simulation.engine import EngineLimits
from qlm_batch.simulation.fast_engine import FastEngine

RAMP_S = 3.0
"""Before this the batch fills up; nothing is counted."""


@dataclass(frozen=True)
class Sizes:
    """Tokens of a batch line and of an interactive request's prompt."""

    batch_prompt: int
    batch_output: int
    interactive_prompt: int


@dataclass(frozen=True)
class Forecast:
    """The engine model with its coefficients."""

    step: StepTime
    limits: EngineLimits
    sizes: Sizes
    outside_s: float = 0.0

    def told(
        self, plans: Sequence[Sequence[Arrival]], seconds: float, *, batch: bool
    ) -> dict[str, float]:
        """TTFT quantiles in seconds and output tokens a second over windows of `seconds` each."""
        ttft: list[float] = []
        rates: list[float] = []
        for plan in plans:
            waits, rate = self._window(plan, seconds, batch=batch)
            ttft += waits
            rates.append(rate)
        seen = np.array(ttft or [np.nan]) + self.outside_s
        return {
            "ttft_p50": float(np.percentile(seen, 50)),
            "ttft_p95": float(np.percentile(seen, 95)),
            "tokens_per_s": float(np.median(rates)),
        }

    def _window(
        self, plan: Sequence[Arrival], seconds: float, *, batch: bool
    ) -> tuple[list[float], float]:
        """The times to first tokens inside the engine, and its rate."""
        engine = FastEngine(self.limits, self.step)
        sizes, lines = self.sizes, 0
        first: dict[int, float] = {}
        sent: dict[int, float] = {}

        def until(at: float) -> None:
            nonlocal lines
            while engine.clock < at:
                while batch and engine.waiting < self.limits.slots:
                    lines += 1
                    due = URGENT_BELOW + lines
                    engine.submit(-lines, sizes.batch_prompt, sizes.batch_output, due, engine.clock)
                for done in engine.advance(min(at, engine.clock + 0.5)):
                    if done.key >= 0:
                        first[done.key] = done.first_token - sent[done.key]

        until(RAMP_S)
        before, since = engine.generated, engine.clock
        for key, arrival in enumerate(plan):
            at = RAMP_S + arrival.at
            until(at)
            sent[key] = at
            engine.submit(key, sizes.interactive_prompt, TOKENS, 0, at)
        until(RAMP_S + seconds)
        rate = (engine.generated - before) / (engine.clock - since)
        until(engine.clock + 5.0)
        return [*first.values()], rate


def fitted(
    profiles: Sequence[Profile],
    model: str,
    device: str,
    *,
    slots: int,
    kv_tokens: int,
    batched_tokens: int,
    block_tokens: int,
    sizes: Sizes,
    batch_only_rate: float,
    idle_plan: Sequence[Arrival],
    idle_seconds: float,
    idle_ttft_p50: float,
) -> Forecast:
    """The model as the arms without a mixture show it."""
    own = pace("balanced", slots)
    limits = EngineLimits(
        slots,
        kv_tokens,
        batched_tokens,
        block_tokens,
        headroom=own.headroom,
        alone=own.alone,
    )
    learned = Knowledge.of(profiles).speed(model, device).step_time()
    model_of_it = Forecast(learned, limits, sizes)
    simulated = model_of_it.told([()], 20.0, batch=True)["tokens_per_s"]
    factor = simulated / batch_only_rate
    step = StepTime(
        learned.base * factor,
        learned.per_sequence * factor,
        learned.per_kv * factor,
        learned.per_prefill * factor,
    )
    scaled = replace(model_of_it, step=step)
    inside = scaled.told([idle_plan], idle_seconds, batch=False)["ttft_p50"]
    return replace(scaled, outside_s=max(0.0, idle_ttft_p50 - inside))
