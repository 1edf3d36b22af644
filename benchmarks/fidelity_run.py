"""How well the simulated engine foretells a real one: fitted on one workload, asked of another.

A compute-bound model of random weights runs in vLLM on the CPU. A first workload gives the
coefficients: the time of a step from the steps the engine reports, what it loses between steps from
the mean time per output token, and what a call takes outside of the engine from the mean time to
the first token. The engine model then foretells a second workload of another rate, longer prompts
and other outputs, which is run twice: the error stands beside what two real runs differ by.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import orjson
from numpy.typing import NDArray

from benchmarks.support import finish, load, require, say
from qlm_batch.domain.engine import EngineAnswer, EngineInfo, EngineRequest
from qlm_batch.domain.jobs import COMPLETIONS, EngineKind
from qlm_batch.scheduling.speed import Speed, StepTime, prior_step_time
from qlm_batch.settings import Settings
from qlm_batch.simulation.engine import EngineLimits
from qlm_batch.simulation.fast_engine import FastEngine
from qlm_workers.vllm_engine import VllmEngine

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
StepRow = tuple[int, int, int, float]

ROOT: Final = Path(__file__).parents[1]
NAME: Final = "compute"
SLOTS: Final = 16
BUDGET: Final = 512
LENGTH: Final = 1024
TOKENS: Final = (16, 128)
"""Token ids that prompts are drawn from; the model's tokenizer has 181."""


@dataclass(frozen=True, slots=True)
class Load:
    """Requests as they come: seconds from the start, and tokens."""

    at: Floats
    prompts: Ints
    outputs: Ints

    @staticmethod
    def drawn(seed: int, rate: float, seconds: float, prompt: float, output: float) -> Load:
        """Poisson arrivals with log-normal lengths of these medians."""
        rng = np.random.default_rng(seed)
        gaps = rng.exponential(1.0 / rate, size=math.ceil(3 * rate * seconds) + 10)
        at = np.cumsum(gaps)
        at = at[at < seconds]
        prompts = np.clip(prompt * np.exp(0.6 * rng.standard_normal(at.size)), 4, 400)
        outputs = np.clip(output * np.exp(0.6 * rng.standard_normal(at.size)), 2, 200)
        return Load(at, prompts.astype(np.int64), outputs.astype(np.int64))


@dataclass(frozen=True, slots=True)
class Times:
    """For each request the time to its first token, and its end; both from the load's start."""

    first: Floats
    end: Floats

    def figures(self, load: Load) -> dict[str, float]:
        """What is compared: seconds, and output tokens per second."""
        ttft = self.first - load.at
        later = load.outputs > 1
        tpot = (self.end - self.first)[later] / (load.outputs[later] - 1)
        return {
            "ttft_mean": float(ttft.mean()),
            "ttft_p95": float(np.percentile(ttft, 95)),
            "tpot_mean": float(tpot.mean()),
            "throughput": float(load.outputs.sum() / (self.end.max() - load.at.min())),
        }


@dataclass(frozen=True, slots=True)
class Fitted:
    """The engine model: a step's time, and what a call takes before and after the engine."""

    step: StepTime
    outside_s: float
    limits: EngineLimits

    def foretold(self, load: Load) -> Times:
        """The load on the simulated engine."""
        engine = FastEngine(self.limits, self.step)
        first, end = np.zeros(load.at.size), np.zeros(load.at.size)

        def until(seconds: float) -> None:
            keys, firsts, ends = engine.advance_arrays(seconds)
            first[keys], end[keys] = firsts, ends

        for key, at in enumerate(load.at.tolist()):
            until(at)
            engine.submit(key, int(load.prompts[key]), int(load.outputs[key]), 1, at)
        until(math.inf if load.at.size == 0 else float(load.at[-1]) + 3600.0)
        require(bool((end > 0.0).all()), "the simulated engine did not finish")
        return Times(first + self.outside_s, end + self.outside_s)


def fit(load: Load, real: Times, rows: Sequence[StepRow], info: EngineInfo) -> Fitted:
    """The coefficients with which the model repeats this load."""
    speed = Speed(prior_step_time(NAME, "cpu")).after_steps(rows)
    require(speed.fitted, f"only {len(rows)} steps were seen")
    limits = EngineLimits(info.slots, info.kv_tokens, BUDGET, prefix_caching=False)
    inside = Fitted(speed.step_time(), 0.0, limits)
    wanted = real.figures(load)

    def slower(factor: float) -> Fitted:
        step = inside.step
        return replace(
            inside,
            step=StepTime(
                step.base * factor,
                step.per_sequence * factor,
                step.per_kv * factor,
                step.per_prefill * factor,
            ),
        )

    factor = _root(
        lambda x: slower(x).foretold(load).figures(load)["tpot_mean"] - wanted["tpot_mean"],
        0.5,
        3.0,
    )
    fitted = slower(factor)
    outside_s = wanted["ttft_mean"] - fitted.foretold(load).figures(load)["ttft_mean"]
    step = fitted.step
    say(
        f"fitted: {1e3 * step.base:.2f} ms a step, {1e3 * step.per_sequence:.3f} ms a sequence,"
        f" {1e6 * step.per_kv:.2f} µs a token held, {1e3 * step.per_prefill:.3f} ms a prompt token;"
        f" between steps ×{factor:.3f}, outside {1e3 * outside_s:.1f} ms"
    )
    return replace(fitted, outside_s=max(0.0, outside_s))


def _root(over: Callable[[float], float], low: float, high: float) -> float:
    """Where an increasing function changes its sign, within a thousandth."""
    for _ in range(24):
        middle = 0.5 * (low + high)
        low, high = (low, middle) if over(middle) > 0.0 else (middle, high)
    return 0.5 * (low + high)


class Bench:
    """A real engine and a clock."""

    def __init__(self, folder: str) -> None:
        settings = Settings(
            slots=SLOTS,
            max_num_batched_tokens=BUDGET,
            max_model_len=LENGTH,
            kv_cache_bytes=512 * 1024**2,
            dtype="float32",
            favour="throughput",
            engine_args={"enable_prefix_caching": False},
        )
        self.engine = VllmEngine(settings, NAME, folder, EngineKind.GENERATE)
        self._rng = np.random.default_rng(0)
        self._number = 0

    async def run(self, load: Load) -> tuple[Times, list[StepRow]]:
        """Send the load as it comes; its times, and the steps the engine made."""
        first, end = np.zeros(load.at.size), np.zeros(load.at.size)
        bodies = [self._body(n, load) for n in range(load.at.size)]
        self.engine.stats()
        rows: list[StepRow] = []
        began = time.perf_counter()

        async def one(n: int) -> None:
            await asyncio.sleep(max(0.0, began + float(load.at[n]) - time.perf_counter()))
            stream = await self.engine.open_stream(bodies[n])
            if isinstance(stream, EngineAnswer):
                raise SystemExit(f"benchmark invalid: {stream.body}")
            first[n] = time.perf_counter() - began
            tokens = 0
            async for _ in stream:
                tokens += 1
            await stream.aclose()
            end[n] = time.perf_counter() - began
            require(tokens > 0, "a stream without events")

        async def watch() -> None:
            while True:
                await asyncio.sleep(0.5)
                rows.extend(self.engine.stats().steps)

        watching = asyncio.ensure_future(watch())
        await asyncio.gather(*(one(n) for n in range(load.at.size)))
        watching.cancel()
        rows.extend(self.engine.stats().steps)
        return Times(first, end), rows

    def _body(self, n: int, load: Load) -> EngineRequest:
        self._number += 1
        body = {
            "model": NAME,
            "prompt": self._rng.integers(*TOKENS, int(load.prompts[n])).tolist(),
            "max_tokens": int(load.outputs[n]),
            "min_tokens": int(load.outputs[n]),
            "ignore_eos": True,
            "temperature": 0,
        }
        return EngineRequest(f"r{self._number}", COMPLETIONS, orjson.dumps(body).decode(), 1, "")


async def measure(folder: str, seconds: float) -> dict[str, object]:
    """Fit on the first load, foretell the second, run that one twice."""
    bench = Bench(folder)
    info = await bench.engine.start()
    try:
        burst = Load(np.zeros(2 * SLOTS), np.full(2 * SLOTS, 32), np.full(2 * SLOTS, 48))
        await bench.run(burst)
        times, _ = await bench.run(burst)
        most = times.figures(burst)["throughput"]
        say(f"saturated: {most:.0f} output tokens a second ({load()})")
        learnt = Load.drawn(1, 0.35 * most / 60.0, seconds, prompt=32.0, output=50.0)
        real, rows = await bench.run(learnt)
        model = fit(learnt, real, rows, info)
        asked = Load.drawn(2, 0.55 * most / 45.0, seconds, prompt=56.0, output=36.0)
        foretold = model.foretold(asked).figures(asked)
        runs = [(await bench.run(asked))[0].figures(asked) for _ in range(2)]
    finally:
        await bench.engine.stop()
    return _compared(foretold, runs, learnt, asked)


def _compared(
    foretold: dict[str, float], runs: Sequence[dict[str, float]], learnt: Load, asked: Load
) -> dict[str, object]:
    say(f"fitted on {learnt.at.size} requests, asked of {asked.at.size} ({load()})")
    say(f"{'':<12}{'foretold':>12}{'first run':>12}{'second run':>12}{'error':>9}{'repeat':>9}")
    errors: dict[str, object] = {}
    repeat: dict[str, float] = {}
    for name, told in foretold.items():
        one, two = (run[name] for run in runs)
        middle = 0.5 * (one + two)
        error, between = abs(told - middle) / middle, abs(one - two) / middle
        say(f"{name:<12}{told:>12.4f}{one:>12.4f}{two:>12.4f}{error:>8.1%}{between:>8.1%}")
        errors[f"{name}_err"] = round(error, 4)
        repeat[f"{name}_err"] = round(between, 4)
    return {**errors, "repeat": repeat}


def main() -> None:
    """Print a table, and the errors as fractions on the last line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=90.0, help="of arrivals in each load")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="qlm-fidelity-") as folder:
        make = [sys.executable, str(ROOT / "tools/tiny_model/compute_bound.py"), folder]
        subprocess.run([*make, "--layers", "8", "--hidden", "512"], check=True, stdout=sys.stderr)
        result = asyncio.run(measure(folder, options.seconds))
    finish(result)
