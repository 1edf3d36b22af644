"""How good estimates are: error, bounds and their coverage, on a trace and on drifting lengths.

Work ahead is counted in output tokens, to which a saturated instance's waiting time is in
proportion. At every group the book knows what came before it and nothing else. Groups scored for
coverage follow each other without overlap, and the bound learns of a group when it is over. The
oracle is a window of 100 requests around the group's start: it sees the future on one side.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

if __name__ == "__main__":
    # Not this folder: its queue.py would hide the standard library's.
    sys.path.pop(0)

import httpx
import numpy as np
from numpy.typing import NDArray

from qlm_batch.domain.jobs import EngineKind
from qlm_batch.scheduling.calibration import LEVEL, Conformal
from qlm_batch.scheduling.lengths import LengthBook

Floats = NDArray[np.float64]
TRACE = Path(__file__).resolve().parents[2] / "shared" / "data" / "azure-llm-2023-conv.csv"
ORACLE_HALF = 50
WARM_UP = 100
LARGE = 200
SCORED = 1000
MODEL_ERROR = 0.1


def say(text: str) -> None:
    """A line for people: standard output is for the result."""
    print(text, file=sys.stderr)


def trace(path: Path) -> Floats:
    """Output lengths in order of arrival, from a CSV with Azure's columns."""
    with path.open() as file:
        return np.array(
            [max(1, int(row["GeneratedTokens"])) for row in csv.DictReader(file)], float
        )


def drifting(count: int, seed: int) -> Floats:
    """Log-normal lengths whose mean swings by 40 %, and jumps by half at three fifths."""
    rng, at = np.random.default_rng(seed), np.arange(count)
    mean = 200 * (1 + 0.4 * np.sin(at / (count / 10))) * np.where(at > 0.6 * count, 1.5, 1.0)
    return np.maximum(1.0, np.round(mean * np.exp(0.9 * rng.standard_normal(count) - 0.405)))


class Expected:
    """The mean and spread the estimator expects at each position of a sequence of lengths."""

    def __init__(self, lengths: Floats) -> None:
        self._lengths = [int(length) for length in lengths]
        self._book, self._told = LengthBook(), 0

    def at(self, start: int) -> tuple[float, float]:
        """Mean and variance of a length, knowing those before `start`; starts ascend."""
        self._book = self._book.seen(("", n) for n in self._lengths[self._told : start])
        self._told = start
        known = self._book.distribution(EngineKind.GENERATE)
        return known.mean, known.var


def score(lengths: Floats, seed: int = 0) -> dict[str, float]:
    """All figures for one sequence."""
    sums = np.concatenate(([0.0], np.cumsum(lengths)))
    return {**_errors(lengths, sums, seed), **_coverage(lengths, sums)}


def _errors(lengths: Floats, sums: Floats, seed: int) -> dict[str, float]:
    """Error of a group of 200 and R² over positions in two groups, ours and the oracle's."""
    rng, expected = np.random.default_rng(seed), Expected(lengths)
    starts = np.arange(WARM_UP, lengths.size - 2 * LARGE, 16)
    mean = np.array([expected.at(int(start))[0] for start in starts])
    oracle = (sums[starts + ORACLE_HALF] - sums[starts - ORACLE_HALF]) / (2 * ORACLE_HALF)
    actual = (sums[starts + LARGE] - sums[starts]) / LARGE
    position = rng.integers(0, 2 * LARGE + 1, size=starts.size)
    waited = sums[starts + position] - sums[starts]
    return {
        "mape_n200": float(np.mean(np.abs(mean - actual) / actual)),
        "mape_oracle": float(np.mean(np.abs(oracle - actual) / actual)),
        "r2_two_groups": _r2(position * mean, waited),
        "r2_oracle": _r2(position * oracle, waited),
    }


def _coverage(lengths: Floats, sums: Floats) -> dict[str, float]:
    """How often the 95 % bound held, and how wide it was, over at least 1,000 groups in a row."""
    size = max(1, (lengths.size - WARM_UP) // SCORED)
    expected, conformal = Expected(lengths), Conformal()
    bounds: list[float] = []
    actual: list[float] = []
    for start in range(WARM_UP, lengths.size - size + 1, size):
        mean, var = expected.at(start)
        predicted = size * mean
        factor = conformal.factor
        if factor is None:
            spread = math.sqrt(var / size) / mean
            factor = 1.0 + 1.645 * math.hypot(spread, MODEL_ERROR)
        bounds.append(factor * predicted)
        actual.append(float(sums[start + size] - sums[start]))
        conformal = conformal.after(predicted, actual[-1])
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


def live_coverage(url: str, key: str) -> float:
    """The share of a running service's promises done by their p95."""
    answer = httpx.get(
        f"{url}/v1/calibration", headers={"Authorization": f"Bearer {key}"}, trust_env=False
    )
    answer.raise_for_status()
    share: float = answer.json()["done_by_p95"]
    return share


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a table; the last line is the trace's figures, with the synthetic ones beside."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trace", type=Path, default=TRACE, help="CSV with Azure's columns")
    parser.add_argument("--live-url", help="service whose promises are scored as well")
    parser.add_argument("--live-key", default="")
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
    live = live_coverage(options.live_url, options.live_key) if options.live_url else None
    synthetic = {
        key: round(float(np.mean([found[f"drifting-{s}"][key] for s in (1, 2, 3)])), 4)
        for key in keys
    }
    print(json.dumps({**result, "live_coverage95": live, "synthetic": synthetic}))


if __name__ == "__main__":
    main()
