"""What commands print: Rich on a terminal, plain lines in a pipe, JSON when asked."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any

import click
from rich.console import Console
from rich.table import Column, Table

from qlm_batch.domain.durations import in_words

Json = dict[str, Any]


class Output:
    """Where a command's result goes. Results go to standard output, all else to standard error."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.console = Console()
        self.errors = Console(stderr=True)

    @property
    def live(self) -> bool:
        """Whether progress may be drawn in place."""
        return self.errors.is_terminal and not self.as_json

    def result(self, value: Json, text: str) -> None:
        """The command's result: `value` as JSON, or `text` for people."""
        if self.as_json:
            click.echo(json.dumps(value))
        else:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def table(self, rows: Iterable[Json], columns: Sequence[str], value: object) -> None:
        """Rows as a table; in a pipe as tab-separated lines; as JSON `value`."""
        if self.as_json:
            click.echo(json.dumps(value))
            return
        if not self.console.is_terminal:
            click.echo("\t".join(columns))
            for row in rows:
                click.echo("\t".join(str(row.get(column, "")) for column in columns))
            return
        shown = table_of(*columns)
        for row in rows:
            shown.add_row(*(str(row.get(column, "")) for column in columns))
        self.console.print(shown)

    def note(self, text: str) -> None:
        """Something worth knowing that is not the result."""
        self.errors.print(text, highlight=False, markup=False, soft_wrap=True)

    def event(self, value: Json, text: str) -> None:
        """One step of long work: a JSON line or a plain line."""
        if self.as_json:
            click.echo(json.dumps(value))
            sys.stdout.flush()
        else:
            self.note(text)


def table_of(*columns: str) -> Table:
    """An empty table that loses nothing on a narrow terminal; names, in front, stay on one line."""
    first, *others = columns
    return Table(
        Column(first, no_wrap=True),
        *(Column(name, overflow="fold") for name in others),
        box=None,
        pad_edge=False,
        header_style="bold",
    )


def counted(count: int, one: str, more: str = "") -> str:
    """A count and its noun: `1 line`, `2 lines`; `more` is the plural where it is irregular."""
    return f"{count} {one if count == 1 else more or one + 's'}"


def clock(at: float | None) -> str:
    """A time of day for people; empty for None."""
    if at is None:
        return ""
    return datetime.fromtimestamp(at, UTC).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def coming(eta: Json, now: float) -> str:
    """When something will be: `in about 3 s (95 % sure: 5 s)`; of an estimate that has a p50."""
    left_s, most_s = eta["p50"] - now, eta["p95"]
    if left_s < -1:
        told = "any moment"
    elif round(left_s) <= 0:
        told = "within a second"
    else:
        told = f"in about {in_words(left_s)}"
    if most_s is None or most_s - now < 1:
        return told
    return f"{told} (95 % sure: {in_words(most_s - now)})"


def eta_text(batch: Json) -> str:
    """When the batch should be done, as one phrase."""
    eta = (batch.get("qlm") or {}).get("eta") or {}
    if batch["status"] == "finalizing":
        return "writing its files"
    if batch["status"] not in ("in_progress", "validating"):
        return ""
    if eta.get("p50") is None:
        return (batch.get("qlm") or {}).get("reason") or "no estimate yet"
    return f"done {coming(eta, time.time())}"


def progress_text(batch: Json) -> str:
    """One line that says how far a batch is."""
    counts = batch["request_counts"]
    done = counts["completed"] + counts["failed"]
    failed = f", {counts['failed']} failed" if counts["failed"] else ""
    eta = eta_text(batch)
    return f"{batch['id']}  {batch['status']}  {done}/{counts['total']}{failed}" + (
        f"  {eta}" if eta else ""
    )
