"""`qlm simulate`: policies side by side on a virtual clock."""

from __future__ import annotations

import importlib.util
import logging
import time
from pathlib import Path
from typing import Any

import click
import structlog

from qlm_batch.domain.durations import parse_duration
from qlm_batch.domain.errors import ConfigurationError
from qlm_batch.domain.jobs import OnMiss
from qlm_batch.scheduling.policies import POLICIES, OraclePolicy, Policy, policy
from qlm_cli.output import Json, Output

_NEEDS = ("matplotlib", "numba", "scipy", "yaml")
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


@click.command()
@click.option("--workload", "-w", default="W1", show_default=True, help="W1 to W8.")
@click.option(
    "--load",
    "loads",
    default="0.9",
    show_default=True,
    metavar="L[,L…]",
    help="Offered work relative to the fleet's capacity.",
)
@click.option(
    "--policy",
    "policies",
    default="qlm,edf-shed,edf",
    show_default=True,
    metavar="P[,P…]",
    help=f"Of {', '.join(POLICIES)} and oracle.",
)
@click.option(
    "--fleet",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help="YAML of instances; without it, the workload's own.",
)
@click.option(
    "--trace",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help="CSV or JSONL of recorded requests in place of a workload.",
)
@click.option("--seed", default=0, show_default=True, help="The first seed.")
@click.option(
    "--seeds",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="How many seeds to run; means are shown with 95 % intervals.",
)
@click.option("--duration", default="2m", show_default=True, help="Virtual time of arrivals.")
@click.option(
    "--interactive-share",
    default=0.3,
    show_default=True,
    type=click.FloatRange(0, 1),
    help="Of a trace's requests.",
)
@click.option(
    "--windows",
    default="1m,10m",
    show_default=True,
    metavar="D[,D…]",
    help="Windows of a trace's batches.",
)
@click.option("--as-recorded", is_flag=True, help="Keep a trace's own pace, whatever the load.")
@click.option(
    "--on-miss",
    type=click.Choice([miss.value for miss in OnMiss]),
    default=OnMiss.EXPIRE.value,
    show_default=True,
    help="What missed requests do.",
)
@click.option(
    "--plots",
    type=click.Path(path_type=Path, file_okay=False),
    default=None,
    help="Folder for plots.",
)
@click.option("--timings", is_flag=True, help="Show real time too; it differs from run to run.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def simulate(
    workload: str,
    loads: str,
    policies: str,
    fleet: Path | None,
    trace: Path | None,
    seed: int,
    seeds: int,
    duration: str,
    interactive_share: float,
    windows: str,
    as_recorded: bool,
    on_miss: str,
    plots: Path | None,
    timings: bool,
    as_json: bool,
) -> None:
    """Compare scheduling policies on simulated GPUs, with the service's own scheduler.

    Goodput is the share of the work that was on time, shown beside the most any policy could
    reach without knowing output lengths.
    """
    missing = [name for name in _NEEDS if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigurationError(
            f"The simulator needs {', '.join(missing)}: pip install 'qlm-batch[sim]'."
        )
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    output = Output(as_json)
    from qlm_batch.simulation import fleet as fleets
    from qlm_batch.simulation import traces, workloads
    from qlm_batch.simulation.cluster import SimulationConfig
    from qlm_batch.simulation.results import timings as real_time
    from qlm_batch.simulation.run import Run, compare, rows
    from qlm_batch.simulation.workload import Workload

    chosen = workloads.scenario(workload)
    machines = fleets.read_fleet(fleet) if fleet is not None else chosen.fleet()
    seconds = parse_duration(duration)
    recorded = None if trace is None else traces.read_trace(trace)
    split = traces.Split(
        interactive=interactive_share,
        windows_s=tuple(parse_duration(window) for window in windows.split(",")),
    )

    def build(load: float, number: int) -> Workload:
        if recorded is None:
            return workloads.build(chosen, machines, load, seconds, number)
        name = trace.stem if trace is not None else ""
        paced = None if as_recorded else load
        return traces.workload_of(
            name, recorded, machines, split, number, load=paced, duration=seconds
        )

    config = SimulationConfig(on_miss=OnMiss(on_miss), draw=plots is not None)
    runs: list[Run] = []
    with _Progress(output) as progress:
        for run in compare(
            machines,
            build,
            {name: _policy(name) for name in map(str.strip, policies.split(","))},
            _numbers(loads),
            range(seed, seed + seeds),
            config,
            progress.told,
        ):
            runs.append(run)
    table = rows(runs)
    value: Json = {"rows": table, "runs": [run.summary for run in runs]}
    if machines.extrapolated:
        value["extrapolated"] = list(machines.extrapolated)
    if timings:
        value["timings"] = [real_time(run.outcome) for run in runs]
    what = chosen.about if recorded is None else f"{len(recorded.at)} recorded requests"
    output.note(f"{table[0]['workload']}: {what}; {len(machines.instances)} instances")
    output.table([_shown(row) for row in table], _COLUMNS, value)
    if machines.extrapolated:
        output.note(f"extrapolated step times: {', '.join(machines.extrapolated)}")
    if timings:
        for run in runs:
            real = real_time(run.outcome)
            output.note(
                f"{run.outcome.policy} at {run.load:g}: {real['times_real']}× real time, planning"
                f" p50 {real['plan_ms_p50']} ms, p99 {real['plan_ms_p99']} ms"
            )
    if plots is not None:
        from qlm_batch.simulation.plots import draw

        for path in draw(runs, table, plots):
            output.note(f"wrote {path}")


def _policy(name: str) -> Policy | type[OraclePolicy]:
    return OraclePolicy if name == "oracle" else policy(name)


def _numbers(text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of numbers", param_hint="--load") from None
    if min(numbers) <= 0.0:
        raise click.BadParameter("loads are above 0", param_hint="--load")
    return numbers


def _shown(row: Json) -> Json:
    def percent(value: float | None) -> str:
        return "" if value is None else f"{100.0 * value:.1f}"

    on_time = "  ".join(f"{name} {percent(share)}" for name, share in row["attainment"].items())
    return {
        "load": f"{row['load']:g}",
        "policy": row["policy"],
        "goodput %": percent(row["goodput"]),
        "± ": percent(row["goodput_ci"]),
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
