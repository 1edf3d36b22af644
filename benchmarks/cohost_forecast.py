"""What the simulated engine foretells of the co-serving benchmark, fitted away from it.

A step's time comes from what the service itself learned of the engine in the arms without a mixture
(its profile), scaled so that the simulated batch-only rate is the measured one; what a call takes
outside of the engine comes from the idle arm: a time of its own, one it shares the processor for
with the calls that came with it, and the processor time that the processes around the engine spent,
which beside a batch they take from an engine that uses every core. Nothing is fitted on the windows
foretold.
"""

from __future__ import annotations

from collections import Counter
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
MOST_HANDLING_S = 0.1
"""The longest a call is taken to need the processor before it comes to the engine."""


@dataclass(frozen=True)
class Sizes:
    """Tokens of a batch line and of an interactive request's prompt."""

    batch_prompt: int
    batch_output: int
    interactive_prompt: int


@dataclass(frozen=True)
class Forecast:
    """The engine model with its coefficients.

    `taken` is the share of the processor that serving the calls takes from the engine beside a
    batch: 0 where it runs elsewhere.
    """

    step: StepTime
    limits: EngineLimits
    sizes: Sizes
    outside_s: float = 0.0
    handling_s: float = 0.0
    taken: float = 0.0

    def told(
        self, plans: Sequence[Sequence[Arrival]], seconds: float, *, batch: bool
    ) -> dict[str, float]:
        """TTFT quantiles in seconds and output tokens a second over windows of `seconds` each."""
        windows = [self.window(plan, seconds, batch=batch) for plan in plans]
        ttft = np.array([wait for waits, _ in windows for wait in waits] or [np.nan])
        bursts = np.array([arrival.burst for plan in plans for arrival in plan] or [False])
        return {
            "ttft_p50": float(np.percentile(ttft, 50)),
            "ttft_p95": float(np.percentile(ttft, 95)),
            "ttft_alone_p50": float(np.median(ttft[~bursts])),
            "ttft_burst_p50": float(np.median(ttft[bursts])) if bursts.any() else float("nan"),
            "tokens_per_s": float(np.median([rate for _, rate in windows])),
        }

    def window(
        self, plan: Sequence[Arrival], seconds: float, *, batch: bool
    ) -> tuple[list[float], float]:
        """The time to the first token of each arrival, and the output tokens a second."""
        step = self.step.times(1.0 / (1.0 - self.taken)) if batch else self.step
        engine = FastEngine(self.limits, step)
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
        together = Counter(arrival.at for arrival in plan)
        handled = [a.at + together[a.at] * self.handling_s for a in plan]
        for key in sorted(range(len(plan)), key=handled.__getitem__):
            sent[key] = RAMP_S + plan[key].at
            until(RAMP_S + handled[key])
            engine.submit(key, sizes.interactive_prompt, TOKENS, 0, RAMP_S + handled[key])
        until(RAMP_S + seconds)
        rate = (engine.generated - before) / (engine.clock - since)
        while len(first) < len(plan):
            until(engine.clock + 1.0)
        return [first[key] + self.outside_s for key in range(len(plan))], rate


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
    idle: Sequence[Sequence[Arrival]],
    window_s: float,
    idle_alone_s: float,
    idle_burst_s: float,
    taken: float,
) -> Forecast:
    """The model as the arms without a mixture show it.

    `idle` is the load of the idle arm's windows; `idle_alone_s` and `idle_burst_s` are medians of
    its times to the first token, out of bursts and in them; `taken` is as in Forecast.
    """
    own = pace("balanced", slots, processor=device.startswith("cpu"))
    limits = EngineLimits(
        slots,
        kv_tokens,
        batched_tokens,
        block_tokens,
        headroom=own.headroom,
        alone=own.alone,
        together=own.together,
    )
    learned = Knowledge.of(profiles).speed(model, device).step_time()
    model_of_it = Forecast(learned, limits, sizes)
    simulated = model_of_it.told([()], 20.0, batch=True)["tokens_per_s"]
    scaled = replace(model_of_it, step=learned.times(simulated / batch_only_rate))

    def medians(handling_s: float) -> tuple[float, float]:
        """Of the simulated idle arm, in bursts and out of them, without what is outside."""
        told = replace(scaled, handling_s=handling_s).told(idle, window_s, batch=False)
        return told["ttft_burst_p50"], told["ttft_alone_p50"]

    low, high = 0.0, MOST_HANDLING_S
    for _ in range(12):
        middle = 0.5 * (low + high)
        burst, alone = medians(middle)
        low, high = (low, middle) if burst - alone > idle_burst_s - idle_alone_s else (middle, high)
    handling_s = 0.5 * (low + high)
    outside_s = max(0.0, idle_alone_s - medians(handling_s)[1])
    return replace(scaled, handling_s=handling_s, outside_s=outside_s, taken=taken)
