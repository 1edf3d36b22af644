"""Pictures of runs: attainment against load, latencies, and who ran what when."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import LogLocator

from qlm_batch.simulation.cluster import START, Outcome
from qlm_batch.simulation.results import Json
from qlm_batch.simulation.run import Run

_SIZE = (8.0, 4.5)
_DPI = 120
_COLORS = 10
_MARKS = "os^DvP*X<"
_DASHES: tuple[Any, ...] = ("-", (0, (6, 3)), (0, (2, 2)), (0, (6, 2, 1, 2)), (0, (1, 1)))


def draw(
    runs: Sequence[Run], table: Sequence[Json], folder: Path, *, recorded: bool = False
) -> list[Path]:
    """Write the plots of these runs; the files made. With `recorded` no load set their pace."""
    folder.mkdir(parents=True, exist_ok=True)
    made = [
        _against_load(table, folder / "attainment.png", recorded=recorded),
        _latencies(runs, folder / "latency.png", recorded=recorded),
    ]
    last = {run.outcome.policy: run.outcome for run in runs}
    for policy, outcome in last.items():
        if any(tallies.spans for tallies in outcome.tallies.values()):
            made.append(_gantt(outcome, folder / f"gantt-{policy}.png"))
    return made


def _saved(figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=_DPI)
    plt.close(figure)
    return path


def _style(number: int) -> dict[str, Any]:
    """A line of its own for each policy: thinner and broken ones lie over others they cover."""
    return {
        "color": plt.get_cmap("tab10")(number % _COLORS),
        "linestyle": _DASHES[number % len(_DASHES)],
        "linewidth": max(1.2, 3.2 - 0.5 * number),
    }


def _against_load(table: Sequence[Json], path: Path, *, recorded: bool) -> Path:
    figure, axes = plt.subplots(figsize=_SIZE)
    least = 100.0
    for n, policy in enumerate(dict.fromkeys(row["policy"] for row in table)):
        own = sorted((row for row in table if row["policy"] == policy), key=lambda row: row["load"])
        axes.errorbar(
            [row["load"] for row in own],
            [100.0 * row["goodput"] for row in own],
            yerr=[100.0 * row["goodput_ci"] for row in own],
            capsize=3,
            label=policy,
            **_style(n),
            marker=_MARKS[n % len(_MARKS)],
            markersize=10.0 - min(n, 6),
        )
        least = min(least, *(100.0 * (row["goodput"] - row["goodput_ci"]) for row in own))
    # With marks: a line of a single load would not be seen.
    for name, style in (("bound", "--+"), ("bound_clairvoyant", ":x")):
        known = {row["load"]: row[name] for row in table if row[name] is not None}
        label = "length-blind bound" if name == "bound" else "clairvoyant bound"
        axes.plot(
            sorted(known),
            [100.0 * known[x] for x in sorted(known)],
            f"k{style}",
            markersize=12,
            label=label,
            zorder=5,
        )
    axes.set_xlabel("load, relative to the fleet's capacity")
    if recorded:
        axes.set_xticks([row["load"] for row in table[:1]], ["as recorded"])
        axes.set_xlabel("")
    axes.set_ylabel("weighted goodput, %")
    # Down to the next ten below the worst: policies are told apart near the top.
    axes.set_ylim(bottom=max(0.0, 10.0 * ((least - 2.0) // 10.0)), top=102.0)
    axes.set_title(f"{table[0]['workload']}: what was on time")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    axes.grid(alpha=0.3)
    return _saved(figure, path)


def _latencies(runs: Sequence[Run], path: Path, *, recorded: bool) -> Path:
    """Distributions at the highest load: time to the first token, and of whole batch requests."""
    most = max(run.load for run in runs)
    figure, both = plt.subplots(1, 2, figsize=_SIZE)
    for n, policy in enumerate(dict.fromkeys(run.outcome.policy for run in runs)):
        own = [r.outcome.requests for r in runs if r.load == most and r.outcome.policy == policy]
        waits = np.concatenate([(r.first - r.arrival)[r.interactive] for r in own])
        times = np.concatenate([(r.end - r.arrival)[~r.interactive] for r in own])
        for axes, values in zip(both, (waits, times), strict=True):
            if not len(values):
                continue
            # What never came counts as infinitely late: the curve ends below 100 %.
            known = np.sort(values[np.isfinite(values)])
            share = 100.0 * np.arange(1, len(known) + 1) / len(values)
            axes.plot(known, share, label=policy, **_style(n))
    for axes, title in zip(both, ("interactive: first token", "batch: last token"), strict=True):
        axes.set_title(title if recorded else f"{title}, load {most:g}")
        axes.set_xlabel("seconds after arrival")
        axes.set_ylabel("requests, %")
        axes.set_ylim(0.0, 100.0)
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter("")
            axes.tick_params(axis="x", labelsize=8)
            axes.legend()
        else:
            axes.text(0.5, 0.5, "none", ha="center", transform=axes.transAxes)
    return _saved(figure, path)


def _gantt(outcome: Outcome, path: Path) -> Path:
    """Slices by model over time, one lane per instance; swaps in black."""
    names = sorted(outcome.tallies)
    models = sorted({s.model for t in outcome.tallies.values() for s in t.spans})
    colors = {model: plt.get_cmap("tab10")(n % _COLORS) for n, model in enumerate(models)}
    figure, axes = plt.subplots(figsize=(_SIZE[0], 1.5 + 0.6 * len(names)))
    for lane, name in enumerate(names):
        ends: list[float] = []
        for span in sorted(outcome.tallies[name].spans, key=lambda s: s.start):
            if span.what == "swap":
                _bar(axes, span.start, span.end, lane, 0.9, "black")
                continue
            row = next((i for i, end in enumerate(ends) if end <= span.start), len(ends))
            ends[row:row] = [span.end] if row == len(ends) else []
            ends[row] = span.end
            offset = -0.4 + 0.8 * (row % 8) / 8.0
            _bar(axes, span.start, span.end, lane + offset + 0.05, 0.09, colors[span.model])
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.5, len(names) - 0.5)
    axes.set_xlim(left=0.0)
    axes.set_xlabel("seconds")
    axes.set_title(f"{outcome.workload.name}, {outcome.policy}: slices served, swaps in black")
    axes.legend(
        handles=[plt.Rectangle((0, 0), 1, 1, color=colors[m]) for m in models],
        labels=models,
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
    )
    return _saved(figure, path)


def _bar(axes: Any, start: float, end: float, y: float, height: float, color: Any) -> None:
    axes.barh(y, end - start, left=start - START, height=height, color=color)
