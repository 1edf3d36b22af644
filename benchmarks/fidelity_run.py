"""How well the simulated engine foretells a real one: fitted on one workload, asked of another.

A compute-bound model of random weights runs in vLLM on the CPU. A first workload gives the
coefficients: the time of a step from when tokens came (what the process around the engine takes of
each step is in it), and what a call takes outside of its steps from the mean time to the first
token. The engine model then foretells a second workload of another rate, longer prompts and other
outputs, which is run twice: the error stands beside what two real runs differ by.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

import numpy as np
import orjson
from numpy.typing import NDArray
from scipy.optimize import least_squares

from benchmarks.support import finish, load, require, say
from qlm_batch.domain.engine import EngineAnswer, EngineInfo, EngineRequest
from qlm_batch.domain.jobs import COMPLETIONS, EngineKind
from qlm_batch.scheduling.speed import StepTime
from qlm_batch.settings import Settings
from qlm_batch.simulation.engine import EngineLimits
from qlm_batch.simulation.fast_engine import FastEngine
from qlm_workers.vllm_engine import VllmEngine

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

ROOT: Final = Path(__file__).parents[1]
NAME: Final = "compute"
SLOTS: Final = 16
BUDGET: Final = 512
LENGTH: Final = 1024
TOKENS: Final = (16, 128)
"""Token ids that prompts are drawn from; the model's tokenizer has 181."""
LEARNT_SHARE: Final = 0.35
ASKED_SHARE: Final = 0.5
"""Of the time the engine has: near all of it a queue grows without end, and foretells nothing."""
PAUSE_S: Final = 0.01
"""Tokens of one step come within this of one another."""


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
    """For each request when its first token came, and its last; both from the load's start.

    `tokens` are all of them, in the order in which they came: when, and of which request.
    """

    first: Floats
    end: Floats
    tokens: Sequence[tuple[float, int]] = ()

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

    def request_s(self, prompt: float, output: float) -> float:
        """What a request of so many tokens takes of a full engine's time, in seconds."""
        slots = self.limits.slots
        step_s = self.step.seconds(slots, slots * (prompt + output / 2.0), 0.0)
        return output * step_s / slots + prompt * self.step.per_prefill

    def foretold(self, load: Load) -> Times:
        """The load on the simulated engine."""
        engine = FastEngine(self.limits, self.step)
        first, end = np.zeros(load.at.size), np.zeros(load.at.size)

        def until(seconds: float) -> None:
            for done in engine.advance(seconds):
                first[done.key], end[done.key] = done.first_token, done.end

        for key, at in enumerate(load.at.tolist()):
            until(at)
            engine.submit(key, int(load.prompts[key]), int(load.outputs[key]), 1, at)
        until(math.inf if load.at.size == 0 else float(load.at[-1]) + 3600.0)
        require(bool((end > 0.0).all()), "the simulated engine did not finish")
        return Times(first + self.outside_s, end + self.outside_s)


def fit(load: Load, real: Times, info: EngineInfo) -> Fitted:
    """The coefficients with which the model repeats this load."""
    rows, seconds = steps(load, real)
    require(len(rows) > 100, f"only {len(rows)} steps were seen")
    scale = np.abs(rows).max(axis=0)
    # A step that something else held up says nothing of the engine: it counts by its distance.
    found = least_squares(
        lambda theta: (rows / scale) @ theta - seconds,
        np.full(4, seconds.mean() / 4.0),
        bounds=(0.0, np.inf),
        loss="soft_l1",
        f_scale=0.1 * float(np.median(seconds)),
    )
    base, per_sequence, per_kv, per_prefill = (found.x / scale).tolist()
    limits = EngineLimits(info.slots, info.kv_tokens, BUDGET, prefix_caching=False)
    inside = Fitted(StepTime(base, per_sequence, per_kv, per_prefill), 0.0, limits)
    told, was = inside.foretold(load).figures(load), real.figures(load)
    # Steps held up are part of what comes next, as often as they were of this.
    inside = replace(inside, step=inside.step.times(was["tpot_mean"] / told["tpot_mean"]))
    outside_s = was["ttft_mean"] - inside.foretold(load).figures(load)["ttft_mean"]
    step = inside.step
    say(
        f"fitted on {len(rows)} steps: {1e3 * step.base:.2f} ms each,"
        f" {1e3 * step.per_sequence:.3f} ms a sequence, {1e6 * step.per_kv:.2f} µs a token held,"
        f" {1e3 * step.per_prefill:.3f} ms a prompt token; outside {1e3 * outside_s:.1f} ms"
    )
    return replace(inside, outside_s=max(0.0, outside_s))


def steps(load: Load, times: Times) -> tuple[Floats, Floats]:
    """Each step that followed another at once: its 1, sequences, KV and prompt tokens; its seconds.

    A step ends when its tokens come, at most one of each request.
    """
    rows: list[tuple[float, float, float, float]] = []
    seconds: list[float] = []
    had = np.zeros(load.at.size, dtype=np.int64)
    before: tuple[float, bool] = (0.0, False)
    for own in _together(times.tokens):
        ended = own[-1][0]
        members = [n for _, n in own]
        fresh = [n for n in members if had[n] == 0]
        had[members] += 1
        if before[1]:
            held = float((load.prompts + had)[members].sum())
            rows.append((1.0, len(members), held, float(load.prompts[fresh].sum())))
            seconds.append(ended - before[0])
        # Who was inside before this step ended and is not done keeps the engine at work.
        before = (ended, any(had[n] < load.outputs[n] for n in members))
    return np.array(rows), np.array(seconds)


def _together(tokens: Sequence[tuple[float, int]]) -> Iterator[list[tuple[float, int]]]:
    """Tokens that came of one step: none twice of one request, and with no pause between."""
    own: list[tuple[float, int]] = []
    members: set[int] = set()
    for at, n in tokens:
        if own and (n in members or at - own[-1][0] > PAUSE_S):
            yield own
            own, members = [], set()
        own.append((at, n))
        members.add(n)
    if own:
        yield own


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

    async def run(self, load: Load) -> Times:
        """Send the load as it comes, and see when what comes back."""
        first, end = np.zeros(load.at.size), np.zeros(load.at.size)
        bodies = [self._body(n, load) for n in range(load.at.size)]
        came: list[tuple[float, int]] = []
        began = time.perf_counter()

        async def one(n: int) -> None:
            await asyncio.sleep(max(0.0, began + float(load.at[n]) - time.perf_counter()))
            stream = await self.engine.open_stream(bodies[n])
            if isinstance(stream, EngineAnswer):
                raise SystemExit(f"benchmark invalid: {stream.body}")
            tokens = 0
            async for _ in stream:
                end[n] = time.perf_counter() - began
                first[n] = first[n] or end[n]
                came.append((float(end[n]), n))
                tokens += 1
            await stream.aclose()
            require(tokens > 0, "a stream without events")

        await asyncio.gather(*(one(n) for n in range(load.at.size)))
        return Times(first, end, came)

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
        burst = Load(np.zeros(4 * SLOTS), np.full(4 * SLOTS, 48), np.full(4 * SLOTS, 48))
        await bench.run(burst)
        most = (await bench.run(burst)).figures(burst)["throughput"]
        say(f"saturated: {most:.0f} output tokens a second ({load()})")
        learnt = Load.drawn(1, LEARNT_SHARE * most / 60.0, seconds, prompt=32.0, output=50.0)
        model = fit(learnt, await bench.run(learnt), info)
        asked = Load.drawn(2, ASKED_SHARE / model.request_s(67.0, 43.0), seconds, 56.0, 36.0)
        foretold = model.foretold(asked).figures(asked)
        runs = [(await bench.run(asked)).figures(asked) for _ in range(2)]
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
