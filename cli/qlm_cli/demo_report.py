"""What the demo found out, scored against the known answers and shown as one screen."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.panel import Panel
from rich.table import Table

from qlm_batch.domain.durations import in_words
from qlm_cli.output import Json, Output

_SHOWN_ANSWERS = 6
_RIGHT_ENOUGH = 0.9


@dataclass(slots=True)
class DemoBatch:
    """One example file on its way."""

    source: Path
    started: float
    state: Json
    promised: float | None = None
    ended: float | None = None
    results: Path | None = None
    errors: Path | None = None


@dataclass(slots=True)
class Report:
    """What the demo found out."""

    batches: list[DemoBatch]
    scores: list[tuple[str, str, str, bool]]
    webhook: str
    webhook_ok: bool
    mail: str
    mail_ok: bool
    check_answers: bool = True
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def right(self) -> float:
        """Share of right answers, 0 without any."""
        return sum(ok for *_, ok in self.scores) / len(self.scores) if self.scores else 0.0

    @property
    def passed(self) -> bool:
        """Whether everything the demo shows really happened."""
        completed = all(
            batch.state["status"] == "completed" and not batch.state["request_counts"]["failed"]
            for batch in self.batches
        )
        answers = not self.check_answers or self.right >= _RIGHT_ENOUGH
        return completed and answers and self.webhook_ok and self.mail_ok and not self.problems

    def show(self, output: Output) -> None:
        """Print the summary."""
        value = self.as_json()
        if output.as_json:
            output.result(value, "")
            return
        console = output.console
        table = Table("", *(batch.source.name for batch in self.batches), box=None, pad_edge=False)
        columns = [_cells(row) for row in value["batches"]]
        for name in columns[0]:
            table.add_row(name, *(cells[name] for cells in columns))
        console.print()
        console.print(Panel(table, title="What came back", expand=False))
        if self.scores:
            shown = Table("question", "answer", "", box=None, pad_edge=False)
            for question, answer, expected, ok in _varied(self.scores):
                mark = "✓" if ok else f"✗ ({_shorten(expected, 24)})"
                shown.add_row(_shorten(question), _shorten(answer), mark)
            title = f"Answers: {self.right:.1%} of {len(self.scores)} right"
            console.print(Panel(shown, title=title, expand=False))
        console.print(f"webhook  {self.webhook}", highlight=False)
        console.print(f"e-mail   {self.mail}", highlight=False)
        for problem in self.problems:
            console.print(f"problem  {problem}", highlight=False)
        verdict = "Everything worked" if self.passed else "Something failed"
        console.print(f"\n{verdict}; {in_words(self.seconds)} in all.", highlight=False)

    def as_json(self) -> Json:
        """The summary as data."""
        rows = []
        for batch in self.batches:
            counts, usage = batch.state["request_counts"], batch.state.get("usage") or {}
            seconds = (batch.ended or batch.started) - batch.started
            rows.append(
                {
                    "file": str(batch.source),
                    "id": batch.state["id"],
                    "status": batch.state["status"],
                    "lines": counts["total"],
                    "completed": counts["completed"],
                    "failed": counts["failed"],
                    "input_tokens": usage.get("input_tokens", 0),
                    "output_tokens": usage.get("output_tokens", 0),
                    "seconds": round(seconds, 2),
                    "tokens_per_s": round(usage.get("output_tokens", 0) / max(seconds, 1e-3), 1),
                    "estimated_s": (
                        None if batch.promised is None else round(batch.promised - batch.started, 2)
                    ),
                    "results": str(batch.results or batch.errors or ""),
                }
            )
        return {
            "passed": self.passed,
            "batches": rows,
            "answers": len(self.scores),
            "right": round(self.right, 4),
            "webhook_verified": self.webhook_ok,
            "email_arrived": self.mail_ok,
            "seconds": round(self.seconds, 1),
            "problems": self.problems,
        }


def score(
    batches: Sequence[DemoBatch], expected: dict[str, Json]
) -> list[tuple[str, str, str, bool]]:
    """(question, answer, expected, right) of every line that came back."""
    scores = []
    for batch in batches:
        if batch.results is None:
            continue
        for line in batch.results.read_text().splitlines():
            row = json.loads(line)
            choice = row["response"]["body"]["choices"][0]
            answer = choice.get("text") or (choice.get("message") or {}).get("content") or ""
            known = expected[row["custom_id"]]
            right = _plain(answer) == _plain(known["answer"])
            scores.append((known["question"], answer.strip(), known["answer"], right))
    return scores


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip()


def _varied(
    scores: Sequence[tuple[str, str, str, bool]],
) -> list[tuple[str, str, str, bool]]:
    """A few that differ: spread over the list, and a wrong one when there is any."""
    step = max(1, len(scores) // _SHOWN_ANSWERS)
    chosen = list(scores[::step][:_SHOWN_ANSWERS])
    wrong = next((score for score in scores if not score[3]), None)
    if wrong is not None and wrong not in chosen:
        chosen[-1] = wrong
    return chosen


def _shorten(text: str, width: int = 60) -> str:
    flat = _plain(text)
    return flat if len(flat) <= width else flat[: width - 1] + "…"


def _cells(row: Json) -> dict[str, str]:
    """One batch's column of the summary, by the name of the line."""
    return {
        "lines": str(row["lines"]),
        "completed / failed": f"{row['completed']} / {row['failed']}",
        "tokens in / out": f"{row['input_tokens']} / {row['output_tokens']}",
        "time": f"{row['seconds']:.1f} s",
        "output tokens/s": f"{row['tokens_per_s']:.0f}",
        "first estimate": _finish_text(row["estimated_s"]),
        "actually done": _finish_text(row["seconds"]),
        "results": _relative(row["results"]),
    }


def _relative(path: str) -> str:
    return os.path.relpath(path) if path else "none"


def _finish_text(seconds: float | None) -> str:
    return "none yet" if seconds is None else f"after {seconds:.1f} s"
