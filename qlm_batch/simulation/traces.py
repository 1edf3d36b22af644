"""Recorded arrivals as a workload: CSV or JSON lines, in Azure's or Mooncake's columns."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
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
_STAMP: Final = re.compile(r"(?P<whole>[^.]+)(?:\.(?P<decimals>\d+))?(?P<zone>Z|[+-]\d\d:?\d\d)?")
_MOST_TOKENS: Final = 10**9


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
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InvalidInput(f"The trace {path} cannot be read: {error}", param="trace") from None
    if not parsed:
        raise InvalidInput(f"The trace {path} has no requests.", param="trace")
    at, prompts, outputs = (np.array(column) for column in zip(*parsed, strict=True))
    return Trace(at - at[0], np.maximum(1, prompts), np.maximum(1, outputs))


def _csv_rows(file: TextIO) -> Iterator[tuple[int, Mapping[str, object]]]:
    rows = csv.DictReader(file)
    for row in rows:
        yield rows.reader.line_num, row


def _json_rows(file: TextIO) -> Iterator[tuple[int, Mapping[str, object]]]:
    for number, line in enumerate(file, start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield number, row if isinstance(row, dict) else {}


def _parsed(
    path: Path, rows: Iterable[tuple[int, Mapping[str, object]]]
) -> Iterator[tuple[float, int, int]]:
    for number, row in rows:
        # Mooncake counts milliseconds.
        names, unit = (_AZURE, 1.0) if all(name in row for name in _AZURE) else (_MOONCAKE, 1e-3)
        if not all(row.get(name) not in (None, "") for name in names):
            raise _fault(
                path, number, f"expected {', '.join(_AZURE)} or {', '.join(_MOONCAKE)}, none empty"
            )
        name = names[0]
        try:
            at = unit * _seconds(str(row[name]))
            name = names[1]
            prompt = _tokens(str(row[name]))
            name = names[2]
            output = _tokens(str(row[name]))
        except ValueError as error:
            raise _fault(path, number, f"{name} is {str(row[name])[:80]!r}, {error}") from None
        yield at, prompt, output


def _fault(path: Path, line: int, what: str) -> InvalidInput:
    return InvalidInput(f"{path}, line {line}: {what}.", param="trace", line=line)


def _tokens(text: str) -> int:
    """A count of tokens; ValueError says what it is not."""
    if not text.isdecimal() or int(text) > _MOST_TOKENS:
        raise ValueError("no count of tokens")
    return int(text)


def _seconds(text: str) -> float:
    """A time stamp with any number of decimals, or a plain number; ValueError says what it is not.

    Those without a zone are UTC.
    """
    try:
        number = float(text)
    except ValueError:
        stamp = _STAMP.fullmatch(text)
        try:
            whole = (
                datetime.fromisoformat(stamp["whole"] + (stamp["zone"] or "")) if stamp else None
            )
        except ValueError:
            whole = None
        if stamp is None or whole is None:
            raise ValueError("no time") from None
        zone = whole.tzinfo or UTC
        zero = datetime(1970, 1, 1, tzinfo=UTC)
        return (whole.replace(tzinfo=zone) - zero).total_seconds() + float(
            f"0.{stamp['decimals'] or 0}"
        )
    if not math.isfinite(number):
        raise ValueError("no time")
    return number


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
