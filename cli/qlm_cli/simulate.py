"""`qlm simulate`: policies side by side on a virtual clock."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import click

from qlm_batch.domain.durations import parse_duration
from qlm_batch.domain.errors import ConfigurationError, InvalidInput
from qlm_batch.domain.jobs import OnMiss
from qlm_batch.scheduling.policies import POLICIES
from qlm_cli.output import Output

_NEEDS = ("matplotlib", "numba", "scipy", "yaml")
_MOST_ADDED = 10_000


@click.command()
@click.option("--workload", "-w", default=None, show_default="W2", help="W1 to W8.")
@click.option(
    "--load",
    "loads",
    default="1.5",
    show_default=True,
    metavar="L[,L…]",
    help="Offered work relative to the fleet's capacity; above 1 the queues grow.",
)
@click.option(
    "--policy",
    "policies",
    default="qlm,edf,fcfs",
    show_default=True,
    metavar="P[,P…]",
    help=f"Of {', '.join(POLICIES)} and oracle.",
)
@click.option(
    "--fleet",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help="YAML of instances; without it, the workload's own, or the one a log tells of.",
)
@click.option(
    "--add",
    "more",
    multiple=True,
    metavar="N[:LIKE]",
    help="N more instances, like the first, an instance by its name, or on a device; repeatable.",
)
@click.option(
    "--trace",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help="CSV or JSONL of recorded requests in place of a workload.",
)
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(0), help="The first seed."
)
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
@click.option(
    "--record",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help="Write what the scheduler of the first run saw and planned here (.jsonl or .jsonl.gz).",
)
@click.option(
    "--replay",
    "log",
    type=click.Path(path_type=Path, dir_okay=False),
    default=None,
    help="Ask the questions of such a log again, then run its history.",
)
@click.option("--timings", is_flag=True, help="Show real time too; it differs from run to run.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def simulate(
    workload: str | None,
    loads: str,
    policies: str,
    fleet: Path | None,
    more: tuple[str, ...],
    trace: Path | None,
    seed: int,
    seeds: int,
    duration: str,
    interactive_share: float,
    windows: str,
    as_recorded: bool,
    on_miss: str,
    plots: Path | None,
    record: Path | None,
    log: Path | None,
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
            f"The simulator needs {', '.join(missing)}: pip install '.[sim]' in a checkout."
        )
    # Only now: these modules need what may be missing.
    from qlm_cli.simulation import Question, answer

    answer(
        Question(
            workload=workload,
            loads=_numbers(loads),
            policies=tuple(name.strip() for name in policies.split(",")),
            fleet=fleet,
            more=[_more(text) for text in more],
            trace=trace,
            log=log,
            seeds=range(seed, seed + seeds),
            duration_s=_seconds(duration, "--duration"),
            interactive_share=interactive_share,
            windows_s=tuple(_seconds(w, "--windows") for w in windows.split(",")),
            as_recorded=as_recorded,
            on_miss=OnMiss(on_miss),
            plots=plots,
            record=record,
            timings=timings,
        ),
        Output(as_json),
    )


def _numbers(text: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"{text!r} is no list of numbers", param_hint="--load") from None
    if not all(0.0 < number < math.inf for number in numbers):
        raise click.BadParameter("loads are finite and above 0", param_hint="--load")
    return numbers


def _more(text: str) -> tuple[int, str]:
    count, _, like = text.partition(":")
    if not count.isdecimal() or not 0 < int(count) <= _MOST_ADDED:
        raise click.BadParameter(
            f"{text!r} is not N or N:LIKE, for example 2 or 2:h100", param_hint="--add"
        )
    return int(count), like.strip()


def _seconds(text: str, option: str) -> float:
    try:
        seconds = parse_duration(text.strip(), param=option)
    except InvalidInput as error:
        raise click.BadParameter(error.message, param_hint=option) from None
    if seconds <= 0.0:
        raise click.BadParameter(f"{text!r} is no time at all", param_hint=option)
    return seconds
