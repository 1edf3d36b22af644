"""Recorded arrivals as a workload: CSV or JSON lines, in Azure's or Mooncake's columns."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Final, TextIO

import numpy as np

from qlm_batch.domain.errors import InvalidInput
from qlm_batch.domain.jobs import SloClass
from qlm_batch.simulation.bounds import capacity
from qlm_batch.simulation.fleet import Fleet
from qlm_batch.simulation.workload import Arrival, Floats, Ints, WorkClass, Workload

_AZURE: Final = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_MOONCAKE: Final = ("timestamp", "input_length", "output_length")


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Requests by time: seconds since the first, prompt and output tokens."""

    at: Floats
    prompts: Ints
    outputs: Ints


@dataclass(frozen=True, slots=True)
class Split:
    """How a trace's requests become classes.

    `interactive` of them are interactive with `ttft_s`; the rest come in batches of `lines` with a
    window drawn from `windows_s`. Lengths above `max_tokens` are cut.
    """

    interactive: float = 0.3
    ttft_s: float = 20.0
    windows_s: tuple[float, ...] = (60.0, 600.0)
    lines: int = 32
    max_tokens: int = 4096


def read_trace(path: Path) -> Trace:
    """The requests of a file. InvalidInput names the first line that cannot be read."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = _json_rows(file) if path.suffix in (".jsonl", ".json") else _csv_rows(file)
            parsed = sorted(_parsed(path, rows))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"The trace {path} cannot be read: {error}", param="trace") from None
    if not parsed:
        raise InvalidInput(f"The trace {path} has no requests.", param="trace")
    at, prompts, outputs = (np.array(column) for column in zip(*parsed, strict=True))
    return Trace(at - at[0], np.maximum(1, prompts), np.maximum(1, outputs))


def _csv_rows(file: TextIO) -> Iterator[tuple[int, Mapping[str, object]]]:
    yield from enumerate(csv.DictReader(file), start=2)


def _json_rows(file: TextIO) -> Iterator[tuple[int, Mapping[str, object]]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            yield number, row if isinstance(row, dict) else {}


def _parsed(
    path: Path, rows: Iterable[tuple[int, Mapping[str, object]]]
) -> Iterator[tuple[float, int, int]]:
    for number, row in rows:
        try:
            if all(name in row for name in _AZURE):
                at, prompt, output = (str(row[name]) for name in _AZURE)
                yield _seconds(at), int(prompt), int(output)
            else:
                # Mooncake counts milliseconds.
                at, prompt, output = (str(row[name]) for name in _MOONCAKE)
                yield float(at) / 1e3, int(prompt), int(output)
        except (KeyError, ValueError):
            raise InvalidInput(
                f"{path}, line {number}: expected {', '.join(_AZURE)} or {', '.join(_MOONCAKE)}"
                " with a time and two counts of tokens.",
                param="trace",
                line=number,
            ) from None


def _seconds(text: str) -> float:
    """A time stamp with up to seven decimals, or plain seconds."""
    try:
        return float(text)
    except ValueError:
        head, _, decimals = text.partition(".")
        whole = datetime.fromisoformat(head)
        zero = datetime(1970, 1, 1, tzinfo=whole.tzinfo)
        return (whole - zero).total_seconds() + float(f"0.{decimals or 0}")


def workload_of(
    name: str,
    trace: Trace,
    fleet: Fleet,
    split: Split,
    seed: int,
    *,
    load: float | None = None,
    duration: float | None = None,
) -> Workload:
    """The trace as a workload for the fleet's models, evenly spread over them.

    With a `load`, time is stretched so that the mean rate is that share of the fleet's capacity;
    `duration` then cuts it off.
    """
    room = min(spec.kv_tokens for spec in fleet.instances) - 64
    most = min(split.max_tokens, room // 2)
    prompts, outputs = np.minimum(trace.prompts, most), np.minimum(trace.outputs, most)
    at = trace.at
    if load is not None and at[-1] > 0.0:
        share = 1.0 / len(fleet.models)
        best = capacity(fleet, [(model, share, prompts, outputs) for model in fleet.models])
        at = at * (len(at) / at[-1]) / (load * best)
    if duration is not None:
        kept = int(np.searchsorted(at, duration))
        at, prompts, outputs = at[:kept], prompts[:kept], outputs[:kept]
    rng = np.random.default_rng(seed)
    classes = (
        WorkClass("interactive", SloClass.INTERACTIVE, split.ttft_s),
        *(
            WorkClass(f"batch-{n}", SloClass.BATCH, window_s)
            for n, window_s in enumerate(split.windows_s, start=1)
        ),
    )
    urgent = rng.random(len(at)) < split.interactive
    of_class = np.where(urgent, 0, rng.integers(1, max(2, len(classes)), len(at)))
    of_model = rng.integers(0, len(fleet.models), len(at))
    arrivals: list[Arrival] = []
    for work_class in range(len(classes)):
        size = split.lines if work_class else 1
        for number, model in enumerate(fleet.models):
            own = np.flatnonzero((of_class == work_class) & (of_model == number))
            for chunk in (own[i : i + size] for i in range(0, len(own), size)):
                # A batch is handed in when its last line is written.
                arrivals.append(
                    Arrival(
                        float(at[chunk[-1]]), work_class, model, "t", prompts[chunk], outputs[chunk]
                    )
                )
    arrivals.sort(key=lambda arrival: arrival.at)
    span = float(at[-1]) if len(at) else 0.0
    return Workload(name, classes, tuple(arrivals), duration or span, most)
