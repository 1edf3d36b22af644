"""Commands on batches: submit, status, results, cancel, retry, list."""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import click
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
)

from qlm_batch.domain.errors import InvalidInput
from qlm_cli.client import Client
from qlm_cli.context import EXIT_UNFINISHED, Context, on_miss_option, service_options
from qlm_cli.output import Json, Output, clock, counted, eta_text, progress_text

ENDED = ("completed", "failed", "expired", "cancelled")
_PEEK = 1 << 23
"""Bytes read ahead to find the first line, which may hold a long document or an image."""
_BEFORE_FIRST = b"\xef\xbb\xbf \t\r\n"
_MOST_FAULTS = 10


@click.command()
@click.argument("file", type=click.File("rb"))
@click.option(
    "--window", default="24h", show_default=True, help="Time until the deadline: 15m, 2h30m, 7d."
)
@click.option("--endpoint", help="Endpoint of all lines; taken from the first line otherwise.")
@click.option("--webhook", help="URL told when the batch ends.")
@click.option("--email", help="Address told when the batch ends.")
@click.option("--metadata", multiple=True, metavar="KEY=VALUE", help="Kept with the batch.")
@on_miss_option
@click.option("--strict", is_flag=True, help="Fail the batch when any line's body is malformed.")
@click.option("--idempotency-key", help="Submitting again with this key returns the same batch.")
@click.option("--wait", is_flag=True, help="Wait for the end; exit 3 unless it completes.")
@service_options
def submit(
    context: Context,
    file: BinaryIO,
    window: str,
    endpoint: str | None,
    webhook: str | None,
    email: str | None,
    metadata: tuple[str, ...],
    on_miss: str,
    strict: bool,
    idempotency_key: str | None,
    wait: bool,
) -> None:
    """Upload FILE (JSONL, `-` for standard input) and run it as a batch."""
    output = context.output
    source = peekable(file)
    endpoint = endpoint or endpoint_of(source)
    client = context.client()
    name = Path(str(getattr(file, "name", "") or "stdin.jsonl")).name
    name = "stdin.jsonl" if name in ("-", "<stdin>") else name
    record = _upload(client, source, name, output)
    callbacks = {k: v for k, v in (("webhook", webhook), ("email", email)) if v}
    body: Json = {
        "input_file_id": record["id"],
        "endpoint": endpoint,
        "completion_window": window,
        "on_miss": on_miss,
        "strict": strict,
    }
    if callbacks:
        body["callbacks"] = callbacks
    if metadata:
        body["metadata"] = dict(_pair(text) for text in metadata)
    headers = {"Idempotency-Key": idempotency_key} if idempotency_key else None
    batch = client.post("/v1/batches", body, headers)
    if not wait:
        output.result(batch, batch["id"])
        output.note(
            f"deadline {clock(batch['expires_at'])}; "
            f"follow it with: qlm status {batch['id']} --watch"
        )
        return
    batch = follow(client, batch["id"], output)
    output.result(batch, _ended(batch))
    _exit_as(batch)


@click.command()
@click.argument("batch_id", required=False)
@click.option("--watch", is_flag=True, help="Follow until the end; exit 3 unless it completes.")
@service_options
def status(context: Context, batch_id: str | None, watch: bool) -> None:
    """Show a batch: how far it is and when it should be done; without an id, the newest."""
    client, output = context.client(), context.output
    if batch_id is None:
        newest = client.get("/v1/batches", limit=1)["data"]
        if not newest:
            raise InvalidInput("there is no batch yet; `qlm submit FILE` makes one")
        batch_id = newest[0]["id"]
    batch = follow(client, batch_id, output) if watch else client.get(f"/v1/batches/{batch_id}")
    output.result(batch, describe(batch))
    if watch:
        _exit_as(batch)


@click.command()
@click.argument("batch_id")
@click.option(
    "-o",
    "--output",
    "path",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write to this file.",
)
@click.option("--partial", is_flag=True, help="What there is so far, while the batch runs.")
@click.option("--errors", is_flag=True, help="The failed lines instead of the good ones.")
@service_options
def results(
    context: Context, batch_id: str, path: Path | None, partial: bool, errors: bool
) -> None:
    """Write a batch's results as JSONL."""
    client, output = context.client(), context.output
    if partial:
        chunks = client.download(f"/v1/batches/{batch_id}/results", partial="true")
    else:
        batch = client.get(f"/v1/batches/{batch_id}")
        if batch["status"] not in ENDED:
            raise InvalidInput(
                f"{batch_id} is {batch['status']}; wait with `qlm status {batch_id} --watch`, or "
                "use --partial"
            )
        file_id = batch["error_file_id" if errors else "output_file_id"]
        if file_id is None:
            kind = "failed" if errors else "successful"
            output.note(f"{batch_id} has no {kind} lines")
            return
        chunks = client.download(f"/v1/files/{file_id}/content")
    if path is None:
        for chunk in chunks:
            sys.stdout.buffer.write(chunk)
        sys.stdout.buffer.flush()
        return
    unfinished = path.with_name(path.name + ".part")
    lines = 0
    try:
        with unfinished.open("wb") as target:
            for chunk in chunks:
                target.write(chunk)
                lines += chunk.count(b"\n")
        unfinished.replace(path)
    except OSError as error:
        raise InvalidInput(f"{path} cannot be written: {error.strerror}", param="output") from None
    output.result({"path": str(path), "lines": lines}, f"{counted(lines, 'line')} in {path}")


@click.command()
@click.argument("batch_id")
@service_options
def cancel(context: Context, batch_id: str) -> None:
    """Stop a batch; what is finished stays available."""
    batch = context.client().post(f"/v1/batches/{batch_id}/cancel", {})
    context.output.result(batch, progress_text(batch))


@click.command()
@click.argument("batch_id")
@click.option("--window", help="New time until the deadline; the first one's otherwise.")
@click.option("--wait", is_flag=True, help="Wait for the end; exit 3 unless it completes.")
@service_options
def retry(context: Context, batch_id: str, window: str | None, wait: bool) -> None:
    """Run the lines of an ended batch again that did not succeed."""
    client, output = context.client(), context.output
    body = {"completion_window": window} if window else {}
    batch = client.post(f"/v1/batches/{batch_id}/retry", body)
    if wait:
        batch = follow(client, batch_id, output)
    output.result(batch, _ended(batch))
    if wait:
        _exit_as(batch)


@click.command()
@click.argument("batch_id")
@service_options
def replay(context: Context, batch_id: str) -> None:
    """Announce an ended batch again where the webhook or e-mail was given up."""
    done = context.client().post(f"/v1/batches/{batch_id}/deliveries/replay", {})
    deliveries = counted(done["replayed"], "delivery is", "deliveries are")
    context.output.result(done, f"{deliveries} due again")


@click.command("list")
@click.option(
    "--limit", type=click.IntRange(1, 100), default=20, show_default=True, help="How many."
)
@click.option("--after", help="Start after this id.")
@service_options
def list_batches(context: Context, limit: int, after: str | None) -> None:
    """List batches, newest first."""
    page = context.client().get("/v1/batches", limit=limit, after=after)
    rows = [
        {
            "id": batch["id"],
            "status": batch["status"],
            "done": batch["request_counts"]["completed"],
            "failed": batch["request_counts"]["failed"],
            "total": batch["request_counts"]["total"],
            "deadline": clock(batch["expires_at"]),
            "estimate": eta_text(batch),
        }
        for batch in page["data"]
    ]
    columns = ("id", "status", "done", "failed", "total", "deadline", "estimate")
    context.output.table(rows, columns, page)


def follow(
    client: Client,
    batch_id: str,
    output: Output,
    on_poll: Callable[[], None] = lambda: None,
) -> Json:
    """Show a batch's progress until it has ended; returns it then."""
    if not output.live:
        return _follow_in_lines(client, batch_id, output, on_poll)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[eta]}"),
        console=output.errors,
    ) as progress:
        task = progress.add_task(batch_id, total=None, eta="")
        while True:
            batch = client.get(f"/v1/batches/{batch_id}")
            counts = batch["request_counts"]
            progress.update(
                task,
                description=f"{batch_id} {batch['status']}",
                total=counts["total"] or None,
                completed=counts["completed"] + counts["failed"],
                eta=eta_text(batch),
            )
            if batch["status"] in ENDED:
                return batch
            on_poll()
            time.sleep(0.5)


def describe(batch: Json) -> str:
    """A batch for people, in a few lines."""
    lines = [progress_text(batch), f"deadline   {clock(batch['expires_at'])}"]
    qlm = batch.get("qlm") or {}
    if qlm.get("reason"):
        lines.append(f"because    {qlm['reason']}")
    promise = qlm.get("promise") or {}
    if promise.get("p50"):
        lines.append(f"promised   {clock(promise['p50'])} (95 %: {clock(promise['p95'])})")
    for name in ("completed_at", "failed_at", "expired_at", "cancelled_at"):
        if batch.get(name):
            lines.append(f"ended      {clock(batch[name])}")
    usage = batch.get("usage")
    if usage:
        lines.append(f"tokens     {usage['input_tokens']} in, {usage['output_tokens']} out")
    lines += _faults(batch)
    for kind in ("output_file_id", "error_file_id"):
        if batch.get(kind):
            lines.append(f"{kind.replace('_file_id', ''):<10} {batch[kind]}")
    return "\n".join(lines)


def _exit_as(batch: Json) -> None:
    """End a command that waited for this batch."""
    sys.exit(0 if batch["status"] == "completed" else EXIT_UNFINISHED)


def _ended(batch: Json) -> str:
    """How a batch came out, with why it failed."""
    return "\n".join([progress_text(batch), *_faults(batch)])


def _faults(batch: Json) -> list[str]:
    faults = (batch.get("errors") or {}).get("data", [])
    return [f"error      {fault['message']} ({fault['code']})" for fault in faults[:_MOST_FAULTS]]


def _follow_in_lines(
    client: Client, batch_id: str, output: Output, on_poll: Callable[[], None]
) -> Json:
    shown, shown_at = "", 0.0
    while True:
        batch = client.get(f"/v1/batches/{batch_id}")
        text = progress_text(batch)
        now = time.monotonic()
        if text != shown and (now - shown_at >= 2 or batch["status"] in ENDED):
            output.event(batch, text)
            shown, shown_at = text, now
        if batch["status"] in ENDED:
            return batch
        on_poll()
        time.sleep(0.5)


def _upload(client: Client, source: BinaryIO, name: str, output: Output) -> Json:
    if not output.live:
        return client.upload(source, name)
    with Progress(
        TextColumn("upload"), BarColumn(), DownloadColumn(), console=output.errors, transient=True
    ) as progress:
        task = progress.add_task("upload", total=_size_of(source))
        return client.upload(source, name, lambda sent: progress.advance(task, sent))


def _size_of(source: BinaryIO) -> int | None:
    try:
        return Path(str(source.name)).stat().st_size or None
    except (OSError, AttributeError):
        return None


def peekable(file: BinaryIO) -> io.BufferedReader:
    """The same file, with a buffer that holds the whole of a first line, however it arrives."""
    # The file's own buffer is a page; and a pipe gives no more at once than was written to it.
    return io.BufferedReader(file, _PEEK)  # type: ignore[arg-type]


def endpoint_of(source: io.BufferedReader) -> str:
    """The `url` of the first line that is not blank, read without consuming it."""
    first = source.peek(_PEEK).lstrip(_BEFORE_FIRST).split(b"\n", 1)[0]
    try:
        return str(json.loads(first)["url"])
    except (ValueError, KeyError, TypeError):
        raise InvalidInput(
            "cannot tell the endpoint from the first line; pass --endpoint, for example "
            "--endpoint /v1/chat/completions"
        ) from None


def _pair(text: str) -> tuple[str, str]:
    key, found, value = text.partition("=")
    if not found:
        raise click.BadParameter(f"{text!r} is not KEY=VALUE", param_hint="--metadata")
    return key, value
