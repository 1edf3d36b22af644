"""A service's log, asked again: the same plans, and its history as a workload for other fleets."""

from __future__ import annotations

import math
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qlm_batch.control.recording import (
    ArrivalEntry,
    CallsEntry,
    Entry,
    LengthsEntry,
    PlanEntry,
    plan_bytes,
    read_log,
    replayed,
)
from qlm_batch.domain.errors import InvalidInput
from qlm_batch.domain.jobs import SloClass
from qlm_batch.domain.snapshot import Call, RunView, Snapshot
from qlm_batch.scheduling.policies import POLICIES
from qlm_batch.simulation.fleet import Fleet
from qlm_batch.simulation.recorded_fleet import recorded_fleet
from qlm_batch.simulation.workload import Arrival, Ints, WorkClass, Workload

_UNKNOWN_OUTPUT = 128

_Sizes = tuple[int, int]
"""Prompt and output tokens of a request."""


@dataclass(frozen=True, slots=True)
class Replay:
    """What a log said: `same` of `plans` came back byte for byte.

    `different` is the time of the first that did not; `skipped` plans are of policies that are
    not here. `fleet` is the one that served last; None where the log tells of none.
    """

    plans: int
    same: int
    skipped: int
    different: float | None
    history: Workload
    fleet: Fleet | None


def replay(path: Path) -> Replay:
    """Ask every recorded question again. InvalidInput when the file is no log or has no work."""
    plans = same = skipped = 0
    different: float | None = None
    last: Snapshot | None = None
    runs: dict[tuple[int, int], RunView] = {}
    lengths: dict[tuple[str, str], deque[_Sizes]] = defaultdict(deque)
    calls: list[tuple[str, Call]] = []
    for entry in _entries(path):
        match entry:
            case ArrivalEntry(run):
                # A new leader sees for the first time what an old one wrote down already.
                runs.setdefault((run.run_id, run.generation), run)
            case LengthsEntry(_, model, outputs):
                for tenant, tokens, prompt, _ in outputs:
                    lengths[model, tenant].append((max(1, prompt), max(1, tokens)))
            case CallsEntry(model, answered):
                calls += [(model, call) for call in answered]
            case PlanEntry():
                last = entry.snapshot if entry.snapshot.instances else last
                policy = POLICIES.get(entry.policy)
                if policy is None:
                    skipped += 1
                    continue
                plans += 1
                if plan_bytes(replayed(entry, policy)) == plan_bytes(entry.plan):
                    same += 1
                elif different is None:
                    different = entry.snapshot.now
    if not runs and not calls:
        raise InvalidInput(f"The log {path} holds no work.", param="replay")
    history = _history(path.name.split(".")[0], list(runs.values()), lengths, calls)
    fleet = None if last is None else recorded_fleet(last)
    return Replay(plans, same, skipped, different, history, fleet)


def _entries(path: Path) -> Iterator[Entry]:
    try:
        yield from read_log(path)
    except (OSError, EOFError, ValueError) as error:
        raise InvalidInput(
            f"{path} is no log of a scheduler: {str(error).splitlines()[0]}", param="replay"
        ) from None


def _history(
    name: str,
    runs: Sequence[RunView],
    lengths: Mapping[tuple[str, str], deque[_Sizes]],
    calls: Sequence[tuple[str, Call]],
) -> Workload:
    """The runs and calls as they came.

    Requests of runs get the lengths they had, in the order they finished. Work the log does not see
    the end of gets lengths seen before; without any, a usual one.
    """
    zero = min((*(run.created_at for run in runs), *(came for _, (came, *_) in calls)))
    windows = sorted({_window(run) for run in runs})
    targets = sorted({_target(call) for _, call in calls})
    arrivals = []
    for run in sorted(runs, key=lambda run: (run.created_at, run.run_id, run.generation)):
        prompt = max(1, round(run.prompt_tokens / max(1, run.requests)))
        known = lengths[run.model, run.tenant]
        prompts, outputs = _taken(known, run.requests, (prompt, _UNKNOWN_OUTPUT))
        work_class = len(targets) + windows.index(_window(run))
        at = run.created_at - zero
        arrivals.append(Arrival(at, work_class, run.model, run.tenant, prompts, outputs))
    for model, call in sorted(calls):
        came, _, tenant, tokens, prompt = call
        prompts, outputs = np.array([[max(1, prompt)], [max(1, tokens)]], dtype=np.int64)
        target = targets.index(_target(call))
        arrivals.append(Arrival(came - zero, target, model, tenant, prompts, outputs))
    arrivals.sort(key=lambda arrival: arrival.at)
    classes = (
        *(WorkClass(f"call {t:g}s", SloClass.INTERACTIVE, t) for t in targets),
        *(WorkClass(f"{w:.0f}s", SloClass.BATCH, w) for w in windows),
    )
    most = max(
        *(-(-run.max_tokens // max(1, run.requests)) for run in runs),
        *(tokens for _, (*_, tokens, _) in calls),
        1,
    )
    return Workload(name, classes, tuple(arrivals), max(1.0, arrivals[-1].at), most)


def _target(call: Call) -> float:
    """In seconds, up to the next tenth: the way to the worker took some of it."""
    _, due_s, *_ = call
    return max(0.1, math.ceil(10.0 * due_s - 0.01) / 10.0)


def _window(run: RunView) -> float:
    return max(1.0, float(round(run.deadline - run.created_at)))


def _taken(known: deque[_Sizes], count: int, usual: _Sizes) -> tuple[Ints, Ints]:
    """The next prompts and outputs, put back behind the others: a short history begins again."""
    taken = []
    for _ in range(count):
        sizes = known.popleft() if known else usual
        taken.append(sizes)
        known.append(sizes)
    columns = np.array(taken, dtype=np.int64).reshape(-1, 2)
    return columns[:, 0].copy(), columns[:, 1].copy()
