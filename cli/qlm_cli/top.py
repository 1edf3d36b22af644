"""`qlm top`: instances, virtual queues, batches and interactive requests, drawn live."""

from __future__ import annotations

import contextlib
import time

import click
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from qlm_batch.domain.durations import in_words
from qlm_cli.context import Context, service_options
from qlm_cli.output import Json, coming, counted, table_of

_GROUPS_SHOWN = 5
_REASON_WIDTH = 60
_PIPE_WIDTH = 200


@click.command()
@click.option(
    "--every",
    type=click.FloatRange(0.2, 60.0),
    default=1.0,
    show_default=True,
    help="Seconds between two looks.",
)
@click.option("--once", is_flag=True, help="Show it once and end.")
@service_options
def top(context: Context, every: float, once: bool) -> None:
    """Show what runs where, what waits, and how interactive requests fare. Needs an admin key.

    On a terminal it is redrawn until Ctrl-C; in a pipe, or with --json, each look is printed.
    """
    client, output = context.client(), context.output
    on_terminal = output.console.is_terminal
    if not on_terminal:
        output.console.width = _PIPE_WIDTH

    def look() -> Json:
        return client.get("/v1/fleet")

    def tell(seen: Json) -> None:
        if output.as_json:
            output.event(seen, "")
        else:
            output.console.print(screen(seen))

    with contextlib.suppress(KeyboardInterrupt):
        in_lines = once or output.as_json or not on_terminal
        while in_lines:
            tell(look())
            if once:
                return
            time.sleep(every)
        with Live(screen(look()), console=output.console, screen=True, auto_refresh=False) as live:
            while True:
                time.sleep(every)
                live.update(screen(look()), refresh=True)


def screen(seen: Json) -> RenderableType:
    """Everything `/v1/fleet` told, for a terminal."""
    return Group(
        _headline(seen),
        Text(),
        _instances(seen["instances"]),
        Text(),
        _queues(seen["instances"]),
        Text(),
        _batches(seen["batches"], seen["at"]),
    )


def _headline(seen: Json) -> Text:
    interactive = seen["interactive"]
    lately = f"in the last {in_words(interactive['window_s'])}"
    words = [f"{counted(seen['queued_requests'], 'batch request')} waiting or running"]
    if interactive["requests"]:
        words.append(
            f"{counted(interactive['requests'], 'interactive request')} answered {lately}: "
            f"first token {_ms(interactive['ttft_p50'])} (95 %: {_ms(interactive['ttft_p95'])}, "
            f"99 %: {_ms(interactive['ttft_p99'])}), {_ms(interactive['tpot_p50'])} per further "
            f"token, {100 * interactive['met']:.1f} % met their target"
        )
    else:
        words.append(f"no interactive request answered {lately}")
    return Text("; ".join(words))


def _instances(instances: list[Json]) -> RenderableType:
    if not instances:
        return Text("no instance has reported yet")
    table = table_of(
        "instance",
        "state",
        "models",
        "batch requests",
        "interactive",
        "KV used",
        "tokens/s",
        "evictions",
        "tokens recomputed",
    )
    for each in instances:
        table.add_row(
            each["name"],
            each["state"],
            ", ".join(_model(model) for model in each["models"]),
            f"{each['batch_running']} of {each['batch_cap']}",
            str(each["interactive_running"]),
            f"{100 * each['kv_usage']:.0f} %",
            f"{each['tokens_per_s']:.0f}",
            str(each["evictions"]),
            str(each["recomputed_tokens"]),
        )
    return table


def _model(model: Json) -> str:
    if model["parent"]:
        return f"{model['name']} (adapter of {model['parent']})"
    if model["residency"] == "awake":
        swaps = f", swapped in {_times(model['swaps'])}" if model["swaps"] else ""
        return f"{model['name']} (awake{swaps})"
    if model["residency"] == "failed":
        return f"{model['name']} (failed: {_short(model['fault'] or '')})"
    wake = "" if model["wake_s"] is None else f", {in_words(model['wake_s'])} to wake"
    return f"{model['name']} ({model['residency']}{wake})"


def _queues(instances: list[Json]) -> RenderableType:
    table = table_of("virtual queue", "group", "slices", "why there")
    for each in instances:
        for group in each["queue"][:_GROUPS_SHOWN]:
            reason = group["reason"]
            table.add_row(each["name"], group["group"], str(group["slices"]), _short(reason))
        if each["groups"] > _GROUPS_SHOWN:
            more = counted(each["groups"] - _GROUPS_SHOWN, "more group")
            table.add_row(each["name"], f"and {more}", "", "")
    return table if table.row_count else Text("the virtual queues are empty")


def _batches(batches: list[Json], now: float) -> RenderableType:
    if not batches:
        return Text("no open batches")
    table = table_of("batch", "tenant", "status", "lines done", "deadline", "expected", "late")
    for each in batches:
        eta, left_s, miss = each["eta"], each["deadline"] - now, each["miss_probability"]
        table.add_row(
            each["id"],
            each["tenant"],
            each["status"],
            f"{each['done']}/{each['total']}",
            f"in {in_words(left_s)}" if left_s > 0 else f"passed {in_words(-left_s)} ago",
            "not known yet" if eta["p50"] is None else coming(eta, now),
            "" if miss is None else f"{100 * miss:.0f} % likely",
        )
    return table


def _short(text: str) -> str:
    return text if len(text) <= _REASON_WIDTH else text[: _REASON_WIDTH - 1] + "…"


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{1000 * seconds:.0f} ms"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
