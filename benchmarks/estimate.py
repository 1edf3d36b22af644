"""How good estimates are: error, bounds and their coverage, on a trace and on drifting lengths.

Work ahead is counted in output tokens, to which a saturated instance's waiting time is in
proportion. At every group the book knows what came before it, and the group's prompts. Groups
scored for coverage follow each other without overlap, and the bound learns of one when it is over.
The oracle is a window of 100 requests around the start: it sees the future on one side.

Then the service itself runs for a while, and its promises are scored.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Not this folder first: its queue.py would hide the standard library's.
sys.path[0] = str(ROOT)

import numpy as np
from numpy.typing import NDArray

from benchmarks.live_estimates import live_coverage
from qlm_batch.domain.buckets import prompt_mix
from qlm_batch.domain.jobs import EngineKind
from qlm_batch.domain.snapshot import Output
from qlm_batch.scheduling import calibration
from qlm_batch.scheduling.calibration import LEVEL, Conformal
from qlm_batch.scheduling.lengthbook import LengthBook
from qlm_batch.simulation.traces import read_trace

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
TRACE = ROOT.parent / "shared" / "data" / "azure-llm-2023-conv.csv"
ORACLE_HALF = 50
WARM_UP = 100
LARGE = 200
SCORED = 1000
ERROR = 0.15
"""The relative error told to the calibration: groups are of one size, so one does for all."""


def say(text: str) -> None:
    """A line for people: standard output is for the result."""
    print(text, file=sys.stderr)


Lengths = tuple[Floats, Ints]
"""Output lengths in order of arrival, and the tokens of their prompts."""


def trace(path: Path) -> Lengths:
    """What the simulator reads too: CSV or JSON lines, in Azure's or Mooncake's columns."""
    found = read_trace(path)
    return found.outputs.astype(float), found.prompts.astype(np.int64)


def drifting(count: int, seed: int) -> Lengths:
    """Log-normal lengths whose mean swings by 40 %, and jumps by half at three fifths.

    Prompts are log-normal too and say nothing.
    """
    rng, at = np.random.default_rng(seed), np.arange(count)
    mean = 200 * (1 + 0.4 * np.sin(at / (count / 10))) * np.where(at > 0.6 * count, 1.5, 1.0)
    lengths = np.maximum(1.0, np.round(mean * np.exp(0.9 * rng.standard_normal(count) - 0.405)))
    return lengths, np.maximum(1, rng.lognormal(5.5, 1.0, count)).astype(np.int64)


class Expected:
    """The mean and spread the estimator expects of groups along a sequence of requests."""

    def __init__(self, lengths: Lengths) -> None:
        self._outputs = lengths[0].astype(int).tolist()
        self._prompts = lengths[1].tolist()
        self._book, self._told = LengthBook(), 0

    def at(self, start: int, *ends: int) -> list[tuple[float, float]]:
        """Mean and variance of a length in the groups from `start` to each end; starts ascend.

        Known are the requests before `start`, and the prompts of the groups.
        """
        new = slice(self._told, start)
        self._book = self._book.seen(
            Output("", output, prompt)
            for output, prompt in zip(self._outputs[new], self._prompts[new], strict=True)
        )
        self._told = start
        known, answers = self._book.distribution(EngineKind.GENERATE), self._book.answers()
        found = []
        for end in ends:
            factor = answers.factor(prompt_mix(self._prompts[start:end]))
            found.append((known.mean * factor, known.var * factor))
        return found


def score(lengths: Lengths, seed: int = 0) -> dict[str, float]:
    """All figures for one sequence."""
    sums = np.concatenate(([0.0], np.cumsum(lengths[0])))
    return {**_errors(lengths, sums, seed), **_coverage(lengths, sums)}


def _errors(lengths: Lengths, sums: Floats, seed: int) -> dict[str, float]:
    """Error of a group of 200 and R² over positions in two groups, ours and the oracle's."""
    rng, expected = np.random.default_rng(seed), Expected(lengths)
    starts = np.arange(WARM_UP, lengths[0].size - 2 * LARGE, 16)
    position = rng.integers(0, 2 * LARGE + 1, size=starts.size)
    found = [
        expected.at(start, start + LARGE, start + place)
        for start, place in zip(starts.tolist(), position.tolist(), strict=True)
    ]
    mean, ahead = (np.array([one[n][0] for one in found]) for n in range(2))
    oracle = (sums[starts + ORACLE_HALF] - sums[starts - ORACLE_HALF]) / (2 * ORACLE_HALF)
    actual = (sums[starts + LARGE] - sums[starts]) / LARGE
    waited = sums[starts + position] - sums[starts]
    return {
        "mape_n200": float(np.mean(np.abs(mean - actual) / actual)),
        "mape_oracle": float(np.mean(np.abs(oracle - actual) / actual)),
        "r2_two_groups": _r2(position * ahead, waited),
        "r2_oracle": _r2(position * oracle, waited),
    }


def _coverage(lengths: Lengths, sums: Floats) -> dict[str, float]:
    """How often the 95 % bound held, and how wide it was, over at least 1,000 groups in a row."""
    size = max(1, (lengths[0].size - WARM_UP) // SCORED)
    expected, conformal = Expected(lengths), Conformal()
    bounds: list[float] = []
    actual: list[float] = []
    for start in range(WARM_UP, lengths[0].size - size + 1, size):
        ((mean, _),) = expected.at(start, start + size)
        predicted = size * mean
        bounds.append(conformal.quantiles().foreseen(predicted, ERROR).p95_s)
        actual.append(float(sums[start + size] - sums[start]))
        conformal = conformal.after(calibration.score(predicted, ERROR, actual[-1]))
    bound, real = np.array(bounds), np.array(actual)
    if not (np.isfinite(bound).all() and (bound > 0.0).all()):
        raise SystemExit("a bound was infinite or not positive")
    held = real <= bound
    tenths = [float(part.mean()) for part in np.array_split(held, 10)]
    worst = max(tenths, key=lambda share: abs(share - LEVEL))
    over = real - bound
    pinball = float(np.mean(np.maximum(LEVEL * over, (LEVEL - 1.0) * over)) / real.mean())
    return {
        "groups": float(held.size),
        "group_size": float(size),
        "coverage95": float(held.mean()),
        "coverage95_worst_tenth": worst,
        "width95": float(np.median(bound / real)),
        "pinball": pinball,
    }


def _r2(predicted: Floats, actual: Floats) -> float:
    return float(1.0 - ((predicted - actual) ** 2).sum() / ((actual - actual.mean()) ** 2).sum())


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table; the last line is the trace's figures, with the synthetic ones beside."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", type=Path, default=TRACE, help="CSV or JSON lines")
    parser.add_argument(
        "--live-seconds",
        type=float,
        default=180.0,
        help="how long batches are submitted to a service of its own; 0 leaves it out",
    )
    options = parser.parse_args(arguments)
    found: dict[str, dict[str, float]] = {}
    if options.trace.exists():
        found[options.trace.stem] = score(trace(options.trace))
    else:
        say(f"skipped: there is no trace at {options.trace}; name one with --trace")
    first = next(iter(found.values()), {})
    for seed in (1, 2, 3):
        found[f"drifting-{seed}"] = score(drifting(48_000, seed), seed)
    names = list(next(iter(found.values())))
    say(f"{'':<24}" + "".join(f"{name[:13]:>14}" for name in names))
    for label, figures in found.items():
        say(f"{label:<24}" + "".join(f"{figures[name]:>14.4f}" for name in names))
    keys = (
        "mape_n200", "mape_oracle", "coverage95", "coverage95_worst_tenth", "width95", "pinball",
        "r2_two_groups", "r2_oracle",
    )  # fmt: skip
    result: dict[str, object] = {
        key: round(first[key], 4) if key in first else None for key in keys
    }
    live = live_coverage(options.live_seconds) if options.live_seconds > 0.0 else {}
    synthetic = {
        key: round(float(np.mean([found[f"drifting-{s}"][key] for s in (1, 2, 3)])), 4)
        for key in keys
    }
    print(json.dumps({"live_coverage95": None, **result, **live, "synthetic": synthetic}))


if __name__ == "__main__":
    main()
