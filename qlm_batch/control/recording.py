"""A log of what the scheduler saw and decided, for the simulator: no bodies, no prompts.

JSON lines. `arrival`: a run appeared in the queue. `lengths`: requests finished. `calls`:
interactive requests were answered. `plan`: a policy was asked; the snapshot, the groups and the
plan it gave are all there, so asking it again must give the same bytes.
"""

from __future__ import annotations

import errno
import fcntl
import gzip
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import BufferedReader, BufferedWriter
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Final, Literal, Self, cast

import structlog
from pydantic import SerializerFunctionWrapHandler, TypeAdapter, WrapSerializer

from qlm_batch.domain.snapshot import (
    Call,
    Observation,
    Output,
    Plan,
    RequestGroup,
    RunView,
    Snapshot,
)
from qlm_batch.domain.store import Planning
from qlm_batch.scheduling.estimator import Estimator, EstimatorConfig
from qlm_batch.scheduling.policies import Policy
from qlm_batch.scheduling.problem import Durations


def _in_order(snapshot: Snapshot, told: SerializerFunctionWrapHandler) -> dict[str, Any]:
    """A snapshot with its sets in order: else equal runs of two processes give different bytes."""
    found: dict[str, Any] = told(snapshot)
    return {
        name: sorted(value) if isinstance(getattr(snapshot, name), frozenset) else value
        for name, value in found.items()
    }


@dataclass(frozen=True, slots=True)
class ArrivalEntry:
    """A run seen for the first time."""

    run: RunView
    type: Literal["arrival"] = "arrival"


@dataclass(frozen=True, slots=True)
class LengthsEntry:
    """Requests of `model` that finished."""

    at: float
    model: str
    outputs: tuple[Output, ...]
    type: Literal["lengths"] = "lengths"


@dataclass(frozen=True, slots=True)
class CallsEntry:
    """Interactive requests to `model` that were answered."""

    model: str
    calls: tuple[Call, ...]
    type: Literal["calls"] = "calls"


@dataclass(frozen=True, slots=True)
class PlanEntry:
    """A question to a policy and its answer."""

    policy: str
    snapshot: Annotated[Snapshot, WrapSerializer(_in_order)]
    groups: tuple[RequestGroup, ...]
    estimator: EstimatorConfig
    moves: int
    seed: int
    plan: Plan
    type: Literal["plan"] = "plan"


log = structlog.get_logger(__name__)

_Writing = Literal["ab", "wb"]
Entry = ArrivalEntry | LengthsEntry | CallsEntry | PlanEntry

_ENTRY: Final[TypeAdapter[Entry]] = TypeAdapter(Entry)
_PLAN: Final[TypeAdapter[Plan]] = TypeAdapter(Plan)


def plan_bytes(plan: Plan) -> bytes:
    """The plan as the log has it."""
    return _PLAN.dump_json(plan)


class Recorder:
    """Writes a log, each plan at once; a path ending in `.gz` is compressed. Use it as a context.

    With `append`, what an earlier process wrote stays, up to where it was killed. OSError or
    ValueError where the file cannot be opened or carried on, or another process writes it; a disk
    that is full later ends the log, not the service.
    """

    def __init__(self, path: Path, *, append: bool = False) -> None:
        self._path = path
        if append and path.is_file():
            with path.open("rb") as before:
                # What somebody writes to ends in half a line too.
                _claim(before)
                if not _whole(path):
                    _mend(path)
        mode: _Writing = "ab" if append else "wb"
        # Closed by `close`: a recorder lives as long as its process.
        self._file: gzip.GzipFile | BufferedWriter = _opened(path, mode)
        _claim(self._file)
        self._seen: set[tuple[int, int]] = set()
        self._full = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Write what is left."""
        self._guarded(self._file.close)

    def flush(self) -> None:
        """Make what was written readable for others."""
        if not self._full:
            self._guarded(self._file.flush)

    def planned(self, entry: PlanEntry) -> None:
        """A policy was asked."""
        self._write(entry)
        self.flush()

    def saw(self, snapshot: Snapshot) -> None:
        """A pass saw this queue."""
        for run in snapshot.runs:
            if (run.run_id, run.generation) not in self._seen:
                self._seen.add((run.run_id, run.generation))
                self._write(ArrivalEntry(run))

    def learned(self, observations: Sequence[Observation]) -> None:
        """A pass took these reports."""
        for seen in observations:
            if seen.outputs:
                self._write(LengthsEntry(seen.at, seen.model, seen.outputs))
            if seen.calls:
                self._write(CallsEntry(seen.model, seen.calls))

    def _write(self, entry: Entry) -> None:
        if not self._full:
            line = _ENTRY.dump_json(entry) + b"\n"
            self._guarded(lambda: self._file.write(line))

    def _guarded(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError as error:
            if not self._full:
                log.warning("recording_ended", file=str(self._path), error=error.strerror)
            self._full = True


class RecordedPolicy:
    """A policy whose questions and answers are written down."""

    def __init__(self, policy: Policy, recorder: Recorder) -> None:
        self._policy, self._recorder = policy, recorder

    @property
    def name(self) -> str:
        """The policy's own."""
        return self._policy.name

    def plan(
        self,
        snapshot: Snapshot,
        groups: Sequence[RequestGroup],
        estimator: Durations,
        moves: int,
        seed: int,
    ) -> Plan:
        """See Policy."""
        plan = self._policy.plan(snapshot, groups, estimator, moves, seed)
        self._recorder.planned(
            PlanEntry(self.name, snapshot, tuple(groups), estimator.config, moves, seed, plan)
        )
        return plan


class _RecordedPlanning:
    """All but the queue and the reports is the store's."""

    def __init__(self, store: Planning, recorder: Recorder) -> None:
        self._store, self._recorder = store, recorder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def snapshot(self) -> Snapshot:
        """See Planning."""
        snapshot = self._store.snapshot()
        self._recorder.saw(snapshot)
        return snapshot

    def take_observations(self, epoch: int, limit: int = 1000) -> Sequence[Observation]:
        """See Planning."""
        seen = self._store.take_observations(epoch, limit)
        self._recorder.learned(seen)
        return seen


def recorded(store: Planning, recorder: Recorder) -> Planning:
    """The scheduler's side of a store, with the queues and reports it hands out written down."""
    return cast("Planning", _RecordedPlanning(store, recorder))


def read_log(path: Path) -> Iterator[Entry]:
    """The entries of a log in order; a line cut off by a crash ends it. ValueError for others."""
    with _reading(path) as file:
        for line in _lines(file):
            if not line.endswith(b"\n"):
                return
            yield _ENTRY.validate_json(line)


def _lines(file: Iterable[bytes]) -> Iterator[bytes]:
    try:
        yield from file
    except EOFError:
        # A compressed log that is still written to, or whose writer crashed, has no end mark.
        return
    except zlib.error as error:
        raise _damaged(error) from None


def _damaged(error: zlib.error) -> ValueError:
    return ValueError(f"its compression is damaged: {error}")


def _reading(path: Path) -> gzip.GzipFile | BufferedReader:
    return gzip.GzipFile(path, "rb") if path.suffix == ".gz" else path.open("rb")


def _opened(path: Path, mode: _Writing) -> gzip.GzipFile | BufferedWriter:
    return gzip.GzipFile(path, mode) if path.suffix == ".gz" else path.open(mode)


def _claim(file: gzip.GzipFile | BufferedReader | BufferedWriter) -> None:
    """Hold the file until it is closed, by a kill too. OSError where another holds it."""
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(errno.EBUSY, "another scheduler writes it") from None


def _whole(path: Path) -> bool:
    """Whether a log ends as one does whose writer was not killed."""
    last = b"\n"
    with _reading(path) as file:
        try:
            for line in file:
                last = line
        except EOFError:
            return False
        except zlib.error as error:
            raise _damaged(error) from None
    return last.endswith(b"\n")


def _mend(path: Path) -> None:
    """Write a log anew up to its last whole line: nothing could be read behind half a one."""
    target = path.resolve()
    mended = target.with_name(f"mended-{path.name}")
    with _reading(path) as file, _opened(mended, "wb") as out:
        out.writelines(line for line in _lines(file) if line.endswith(b"\n"))
    mended.replace(target)


def replayed(entry: PlanEntry, policy: Policy) -> Plan:
    """What the policy says to a recorded question now."""
    estimator = Estimator(entry.snapshot, entry.estimator)
    return policy.plan(entry.snapshot, entry.groups, estimator, entry.moves, entry.seed)
