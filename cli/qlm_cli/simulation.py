"""What `qlm simulate` does with its options; needs the extra `sim`."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import structlog

from qlm_batch.control.recording import Recorder
from qlm_batch.domain.errors import ConfigurationError
from qlm_batch.domain.jobs import OnMiss
from qlm_batch.scheduling.policies import POLICIES, OraclePolicy
from qlm_batch.simulation.cluster import Choice, SimulationConfig
from qlm_batch.simulation.engine import EngineLimits, check_size
from qlm_batch.simulation.fleet import Fleet, read_fleet
from qlm_batch.simulation.plots import draw
from qlm_batch.simulation.recorded_fleet import with_more
from qlm_batch.simulation.replay import Replay, replay
from qlm_batch.simulation.results import timings
from qlm_batch.simulation.run import Builder, Run, compare, rows
from qlm_batch.simulation.traces import Split, read_trace, workload_of
from qlm_batch.simulation.workload import Workload
from qlm_batch.simulation.workloads import Scenario, build, scenario
from qlm_cli.output import Json, Output, counted

DEFAULT_WORKLOAD = "W2"
_COLUMNS = (
    "load",
    "policy",
    "goodput %",
    "± ",
    "bound %",
    "on time %",
    "TTFT p99 s",
    "busy %",
    "swaps/h",
)


@dataclass(frozen=True, slots=True)
class Question:
    """The command's options, parsed. A `trace` or a `log` takes the place of the workload.

    `workload` is None where none was named; `more` are instances added to the fleet: how many,
    and like which.
    """

    workload: str | None
    loads: Sequence[float]
    policies: Sequence[str]
    fleet: Path | None
    more: Sequence[tuple[int, str]]
    trace: Path | None
    log: Path | None
    seeds: Sequence[int]
    duration_s: float
    interactive_share: float
    windows_s: tuple[float, ...]
    as_recorded: bool
    on_miss: OnMiss
    plots: Path | None
    record: Path | None
    timings: bool

    @property
    def stretched(self) -> bool:
        """Whether the load sets the pace; the past is run as it was."""
        return self.log is None and not (self.trace is not None and self.as_recorded)

    @property
    def on_recorded(self) -> bool:
        """Whether a log is run on the fleet it tells of, perhaps with more instances."""
        return self.fleet is None and self.workload is None


def answer(asked: Question, output: Output) -> None:
    """Run what is asked and print it."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    chosen = scenario(asked.workload or DEFAULT_WORKLOAD)
    past = None if asked.log is None else replay(asked.log)
    if past is not None:
        _tell_replay(past, output)
        past = _as_served(past, output) if asked.on_recorded else past
    fleet = _fleet(asked, chosen, past)
    runs = _run(asked, fleet, _builder(asked, chosen, fleet, past), past is not None, output)
    table = rows(runs)
    value: Json = {"rows": table, "runs": [run.summary for run in runs]}
    if fleet.extrapolated:
        value["extrapolated"] = list(fleet.extrapolated)
    if past is not None:
        value["replay"] = {"plans": past.plans, "same": past.same, "skipped": past.skipped}
    if asked.timings:
        value["timings"] = [timings(run.outcome) for run in runs]
    about = "" if asked.trace or past else f" ({chosen.about})"
    requests = counted(runs[0].summary["requests"], "request")
    size = f"{requests} on {counted(len(fleet.instances), 'instance')}"
    output.note(f"{table[0]['workload']}{about}: {size}")
    several = len(asked.seeds) > 1
    shown = [_shown(row, stretched=asked.stretched, several=several) for row in table]
    output.table(shown, _COLUMNS, value)
    if fleet.extrapolated:
        output.note(f"extrapolated step times: {', '.join(fleet.extrapolated)}")
    if asked.timings:
        _tell_timings(runs, output)
    if asked.plots is not None:
        for path in draw(runs, table, asked.plots, recorded=not asked.stretched):
            output.note(f"wrote {path}")


def _fleet(asked: Question, chosen: Scenario, past: Replay | None) -> Fleet:
    if asked.fleet is not None:
        fleet = read_fleet(asked.fleet)
    elif past is not None and past.fleet is not None and asked.on_recorded:
        fleet = past.fleet
    else:
        fleet = chosen.fleet()
    for count, like in asked.more:
        fleet = with_more(fleet, count, like)
    return fleet


def _builder(asked: Question, chosen: Scenario, fleet: Fleet, past: Replay | None) -> Builder:
    if past is not None:
        history = past.history
        _check_served(history, fleet)
        return lambda load, seed: history
    if asked.trace is None:
        return lambda load, seed: build(chosen, fleet, load, asked.duration_s, seed)
    trace, name = read_trace(asked.trace), asked.trace.stem
    split = Split(interactive=asked.interactive_share, windows_s=asked.windows_s)
    return lambda load, seed: workload_of(
        name,
        trace,
        fleet,
        split,
        seed,
        load=None if asked.as_recorded else load,
        duration=asked.duration_s,
    )


def _as_served(past: Replay, output: Output) -> Replay:
    """The past without work of models that its fleet served nowhere: that failed then, too."""
    history, served = past.history, past.fleet.models if past.fleet else ()
    kept = tuple(arrival for arrival in history.arrivals if arrival.model in served)
    gone = [arrival for arrival in history.arrivals if arrival.model not in served]
    if not kept or not gone:
        return past
    requests = counted(sum(arrival.prompts.size for arrival in gone), "request")
    models = ", ".join(sorted({arrival.model for arrival in gone}))
    output.note(f"left out: {requests} for {models}, served nowhere when the log ends")
    return replace(past, history=replace(history, arrivals=kept))


def _check_served(history: Workload, fleet: Fleet) -> None:
    missing = sorted({arrival.model for arrival in history.arrivals} - set(fleet.models))
    if missing:
        raise ConfigurationError(
            f"The fleet serves none of {', '.join(missing)}, which the log asks for; name a fleet"
            " that does with --fleet.",
            param="fleet",
        )
    longest: dict[str, tuple[int, int]] = {}
    for arrival in history.arrivals:
        sizes = zip(arrival.prompts.tolist(), arrival.outputs.tolist(), strict=True)
        longest[arrival.model] = max(longest.get(arrival.model, (0, 0)), *sizes, key=sum)
    for spec in fleet.instances:
        for model in longest.keys() & set(spec.models):
            try:
                check_size(EngineLimits(spec.slots, spec.kv_tokens), *longest[model])
            except ValueError as error:
                raise ConfigurationError(
                    f"Instance {spec.name} has no room for a request of the log: {error}.",
                    param="fleet",
                ) from None


def _run(asked: Question, fleet: Fleet, build: Builder, once: bool, output: Output) -> list[Run]:
    config = SimulationConfig(on_miss=asked.on_miss, draw=asked.plots is not None)
    with ExitStack() as stack:
        recorder = None
        if asked.record is not None:
            recorder = stack.enter_context(Recorder(asked.record))
        progress = stack.enter_context(_Progress(output))
        runs = []
        for run in compare(
            fleet,
            build,
            {name: _choice(name) for name in asked.policies},
            asked.loads if asked.stretched else asked.loads[:1],
            asked.seeds[:1] if once else asked.seeds,
            config,
            progress.told,
            recorder,
        ):
            runs.append(run)
            if not output.live:
                goodput = 100.0 * run.summary["goodput"]
                name = run.outcome.policy
                load = f"load {run.load:g}" if asked.stretched else "as recorded"
                output.note(f"{load}, {name}, seed {run.seed}: {goodput:.1f} % on time")
        return runs


def _choice(name: str) -> Choice:
    if name == "oracle":
        return OraclePolicy
    if name not in POLICIES:
        raise ConfigurationError(
            f"No policy is named {name!r}; use some of {', '.join(POLICIES)} and oracle.",
            param="policy",
        )
    return POLICIES[name]


def _tell_replay(past: Replay, output: Output) -> None:
    same = f"{past.same} of {past.plans} recorded plans came back byte for byte"
    skipped = f"; {past.skipped} of policies unknown here" if past.skipped else ""
    output.note(same + skipped)
    if past.different is not None:
        output.note(f"the first that differs was made at {past.different:.3f}")


def _tell_timings(runs: Sequence[Run], output: Output) -> None:
    for run in runs:
        real = timings(run.outcome)
        output.note(
            f"{run.outcome.policy} at {run.load:g}: {real['times_real']}× real time, planning p50"
            f" {real['plan_ms_p50']} ms, p99 {real['plan_ms_p99']} ms"
        )


def _shown(row: Json, *, stretched: bool, several: bool) -> Json:
    """A row for people: no load where the past is run as it was, no interval of one seed."""

    def percent(value: float | None) -> str:
        return "" if value is None else f"{100.0 * value:.1f}"

    on_time = "  ".join(f"{name} {percent(share)}" for name, share in row["attainment"].items())
    return {
        "load": f"{row['load']:g}" if stretched else "recorded",
        "policy": row["policy"],
        "goodput %": percent(row["goodput"]),
        "± ": percent(row["goodput_ci"]) if several else "",
        "bound %": percent(row["bound"]),
        "on time %": on_time,
        "TTFT p99 s": "" if row["ttft_p99"] is None else f"{row['ttft_p99']:.2f}",
        "busy %": percent(row["busy"]),
        "swaps/h": f"{row['swaps_per_h']:.0f}",
    }


class _Progress:
    """One line on a terminal that says what runs, nothing elsewhere."""

    def __init__(self, output: Output) -> None:
        self._status: Any = output.errors.status("") if output.live else None
        self._told_at = 0.0

    def __enter__(self) -> _Progress:
        if self._status is not None:
            self._status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._status is not None:
            self._status.stop()

    def told(self, what: str, share: float) -> None:
        """Show how far a run is, a few times a second at most."""
        now = time.monotonic()
        if self._status is not None and now - self._told_at > 0.2:
            self._told_at = now
            self._status.update(f"{what}: {share:.0%}")
