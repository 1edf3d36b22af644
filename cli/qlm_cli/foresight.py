"""Commands on estimates: what would be, and how well promises held."""

from __future__ import annotations

import time
from typing import BinaryIO

import click

from qlm_batch.domain.buckets import PROMPT_RATIO, prompt_bucket
from qlm_batch.domain.durations import parse_window
from qlm_batch.intake.jsonl import LineRules, read_requests
from qlm_batch.intake.lines import chunks_of
from qlm_cli.batches import endpoint_of, peekable
from qlm_cli.context import EXIT_UNFINISHED, Context, on_miss_option, service_options
from qlm_cli.output import Json, clock, coming, counted

_WIDTH = 40
_TELLING = 20
"""Promises below which shares say little."""


@click.command()
@click.argument("file", type=click.File("rb"))
@click.option(
    "--window", default="24h", show_default=True, help="Time until the deadline: 15m, 2h30m, 7d."
)
@click.option("--endpoint", help="Endpoint of all lines; taken from the first line otherwise.")
@on_miss_option
@service_options
def estimate(
    context: Context, file: BinaryIO, window: str, endpoint: str | None, on_miss: str
) -> None:
    """Tell when FILE (JSONL) would be done if it were submitted now.

    The answer is accept, warn (it may be late, or makes others late) or refuse: it would not be in
    time, and the exit status is 3. Only counts are sent, per model; the file stays here and
    nothing is stored.
    """
    source = peekable(file)
    work = _work(source, endpoint or endpoint_of(source), window)
    answer = context.client().post(
        "/v1/estimates", {"completion_window": window, "on_miss": on_miss, "work": work}
    )
    context.output.result(answer, _estimate_text(answer))
    if answer["verdict"] == "refuse":
        raise SystemExit(EXIT_UNFINISHED)


@click.command()
@click.option(
    "--batches",
    type=click.IntRange(1, 10_000),
    default=1000,
    show_default=True,
    help="How many ended ones to look at, the newest first.",
)
@service_options
def calibration(context: Context, batches: int) -> None:
    """Show how well promised times held: of what was said to be 90 % sure, was 90 % done?"""
    found = context.client().get("/v1/calibration", batches=batches)
    context.output.result(found, _diagram(found))


def _work(source: BinaryIO, endpoint: str, window: str) -> list[Json]:
    """The file's requests summed by model. FileRefused with the first fault."""
    now = time.time()
    rules = LineRules(endpoint, now, now + parse_window(window))
    sums: dict[str, Json] = {}
    prompts: dict[str, dict[int, int]] = {}
    for line in read_requests(chunks_of(source), rules):
        own = sums.setdefault(
            line.model,
            {
                "model": line.model,
                "requests": 0,
                "prompt_tokens": 0,
                "max_tokens": 0,
                "unbounded": 0,
            },
        )
        own["requests"] += 1
        own["prompt_tokens"] += line.prompt_tokens
        own["max_tokens"] += line.max_tokens or 0
        own["unbounded"] += line.max_tokens is None
        mix = prompts.setdefault(line.model, {})
        bucket = prompt_bucket(line.prompt_tokens)
        mix[bucket] = mix.get(bucket, 0) + 1
    for model, mix in prompts.items():
        sums[model]["prompts"] = [
            [round(PROMPT_RATIO**bucket), count] for bucket, count in sorted(mix.items())
        ]
    return list(sums.values())


def _estimate_text(answer: Json) -> str:
    now, eta = time.time(), answer["eta"]
    words = {
        "accept": "would be in time",
        "warn": "may not be in time, or makes others late",
        "refuse": "would not be in time",
    }
    lines = [f"{answer['verdict']}: {words[answer['verdict']]}"]
    lines.append(f"deadline   {clock(answer['deadline'])}")
    if eta["p50"] is not None:
        lines.append(f"done       {coming(eta, now)}")
        lines.append(f"late       {100 * answer['miss_probability']:.1f} % likely")
    lines.append(f"because    {answer['reason']}")
    if answer["late_batches"]:
        others = counted(answer["late_batches"], "batch", "batches")
        lines.append(f"others     {others} would become late")
    if answer["verdict"] != "accept" and answer["earliest_window"]:
        lines.append(f"would hold --window {answer['earliest_window']}")
    return "\n".join(lines)


def _diagram(found: Json) -> str:
    if not found["promises"]:
        return "no batch has ended yet that had a promise"
    count = found["promises"]
    batches = counted(count, "ended batch", "ended batches")
    few = "" if count >= _TELLING else f"; too few to tell, {_TELLING} or more say something"
    lines = [
        f"promises to {batches}{few}",
        f"done by p50  {100 * found['done_by_p50']:5.1f} %  (50 % promised)",
        f"done by p95  {100 * found['done_by_p95']:5.1f} %  (95 % promised)",
        "",
        "promised  came true",
    ]
    for point in found["curve"]:
        bar = "█" * round(_WIDTH * point["share"])
        mark = round(_WIDTH * point["level"])
        drawn = list(bar.ljust(_WIDTH + 1, "·"))
        drawn[mark] = "│"
        lines.append(
            f"{100 * point['level']:6.0f} %  {''.join(drawn)} {100 * point['share']:.0f} %"
        )
    lines.append(f"greatest distance from the line: {100 * found['error']:.1f} points")
    return "\n".join(lines)
