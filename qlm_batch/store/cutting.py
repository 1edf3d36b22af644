"""Cutting a stream of lines into runs and slices, as rows for COPY."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from struct import Struct

import numpy as np

from qlm_batch.domain.buckets import bucket_of, prompt_bucket
from qlm_batch.domain.errors import InvalidInput
from qlm_batch.domain.jobs import RequestLine
from qlm_batch.store.copying import NULL, float8, text


@dataclass(slots=True)
class SliceCut:
    """Positions [lo, hi) of a run; `latest` is the latest deadline among them."""

    lo: int
    hi: int
    latest: float
    prompt_tokens: int = 0
    max_tokens: int = 0
    unbounded: int = 0


@dataclass(slots=True)
class RunCut:
    """Lines of one model and deadline bucket; `deadline` is the earliest among them."""

    run_id: int
    model: str
    deadline: float
    slices: list[SliceCut] = field(default_factory=list)
    prompts: dict[int, int] = field(default_factory=dict)
    """Requests by bucket of their prompt."""

    @property
    def requests(self) -> int:
        """Lines in the run."""
        return self.slices[-1].hi


class Cutter:
    """Reads lines once, keeping twelve bytes for each and nothing of their text.

    `run_ids` are free ids, as many as runs are allowed; `deadline` is that of lines without their
    own; `now` the time from which deadlines are bucketed.
    """

    def __init__(
        self, run_ids: Sequence[int], deadline: float, now: float, slice_requests: int
    ) -> None:
        self._run_ids = run_ids
        self._deadline = deadline
        self._now = now
        self._slice_requests = slice_requests
        self._hashes = array("q")
        self._lines = array("i")
        self._runs: dict[tuple[str, int], RunCut] = {}

    @property
    def runs(self) -> list[RunCut]:
        """What was cut so far, in order of first lines."""
        return list(self._runs.values())

    @property
    def total(self) -> int:
        """Lines read so far."""
        return len(self._lines)

    def rows(self, lines: Iterable[RequestLine]) -> Iterator[bytes]:
        """Rows of `request` for COPY, in the order of `COLUMNS`.

        Raises InvalidInput when the lines' models and deadlines would make too many runs.
        """
        own = bucket_of(self._deadline, self._now)
        runs, size = self._runs, self._slice_requests
        seen, numbers = self._hashes.append, self._lines.append
        for line in lines:
            deadline = line.deadline
            if deadline is None:
                until, bucket, own_deadline = self._deadline, own, NULL
            else:
                until, bucket = deadline, bucket_of(deadline, self._now)
                own_deadline = float8(deadline)
            run = runs.get((line.model, bucket))
            if run is None:
                run = self._new_run(line, bucket, until)
            if until < run.deadline:
                run.deadline = until
            part = run.slices[-1]
            if part.hi - part.lo == size:
                part = SliceCut(part.hi, part.hi, until)
                run.slices.append(part)
            position = part.hi
            part.hi = position + 1
            if until > part.latest:
                part.latest = until
            part.prompt_tokens += line.prompt_tokens
            length = prompt_bucket(line.prompt_tokens)
            run.prompts[length] = run.prompts.get(length, 0) + 1
            if line.max_tokens is None:
                part.unbounded += 1
                bound = NULL
            else:
                part.max_tokens += line.max_tokens
                bound = _INT4(4, line.max_tokens)
            # Python's own hash of text has 64 bits and a key nobody outside the process knows.
            seen(hash(line.custom_id))
            numbers(line.line)
            yield (
                _KEY(8, 8, run.run_id, 4, position, 4, line.line)
                + text(line.custom_id)
                + own_deadline
                + text(line.body)
                + _INT4(4, line.prompt_tokens)
                + bound
            )

    def suspects(self) -> list[int]:
        """Line numbers whose ids share a hash: duplicates, but for a chance of about 2^-64 each."""
        hashes = np.frombuffer(self._hashes, dtype=np.int64)
        ordered = np.sort(hashes)
        twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
        if not len(twice):
            return []
        found = np.frombuffer(self._lines, dtype=np.int32)[np.isin(hashes, twice)]
        return [int(line) for line in found]

    def _new_run(self, line: RequestLine, bucket: int, until: float) -> RunCut:
        count = len(self._runs)
        if count == len(self._run_ids):
            raise InvalidInput(
                f"Line {line.line} begins run {count + 1} of this batch, and at most {count} are"
                " allowed: use fewer different models and deadlines, or several batches.",
                code="too_many_runs",
                line=line.line,
            )
        run = RunCut(self._run_ids[count], line.model, until, [SliceCut(0, 0, until)])
        self._runs[line.model, bucket] = run
        return run


_KEY = Struct(">hiqiiii").pack
_INT4 = Struct(">ii").pack

COLUMNS = "run_id, position, line, custom_id, deadline, body, prompt_tokens, max_tokens"
