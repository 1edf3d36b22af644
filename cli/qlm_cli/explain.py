"""`qlm explain`: the story of a batch, of one of its lines, or of an interactive call."""

from __future__ import annotations

import click

from qlm_batch.domain.durations import in_words
from qlm_cli.batches import ENDED
from qlm_cli.context import Context, service_options
from qlm_cli.output import Json, clock, counted, progress_text

_CALL = "req_"
_MOST = 10_000


@click.command()
@click.argument("id", metavar="ID")
@click.argument("custom_id", required=False)
@service_options
def explain(context: Context, id: str, custom_id: str | None) -> None:
    """Tell what was done and why, and what was promised against what came.

    ID is a batch, with CUSTOM_ID one of its lines, or the id of an interactive answer.
    """
    client = context.client()
    if _CALL in id:
        call = client.get(f"/v1/requests/{id}")
        context.output.result(call, _call_text(call))
        return
    batch = client.get(f"/v1/batches/{id}")
    outcome = _outcome(batch)
    if custom_id is not None:
        story = client.get(f"/v1/batches/{id}/story", custom_id=custom_id)
        context.output.result(
            {"batch": batch, "request": story, "outcome": outcome},
            _request_text(batch, story, outcome),
        )
        return
    told = client.get(f"/v1/batches/{id}/decisions", limit=_MOST)["data"]
    context.output.result(
        {"batch": batch, "decisions": told, "outcome": outcome}, _story_text(batch, told, outcome)
    )


def _outcome(batch: Json) -> Json | None:
    """Promised and actual durations of an ended batch, in seconds from the promise."""
    promise = (batch.get("qlm") or {}).get("promise")
    if not promise or promise["p50"] is None or batch["status"] not in ENDED:
        return None
    ended = batch["completed_at"] or batch["expired_at"]
    if ended is None:
        return None
    made = promise["made_at"]
    return {
        "p50_s": promise["p50"] - made,
        "p95_s": promise["p95"] - made,
        "actual_s": ended - made,
        "by_p50": batch["status"] == "completed" and ended <= promise["p50"],
        "by_p95": batch["status"] == "completed" and ended <= promise["p95"],
    }


def _story_text(batch: Json, story: list[Json], outcome: Json | None) -> str:
    lines = [progress_text(batch), f"deadline   {clock(batch['expires_at'])}"]
    lines += _decision_lines(story, batch["created_at"])
    return "\n".join([*lines, *_kept_line(batch, outcome)])


def _request_text(batch: Json, story: Json, outcome: Json | None) -> str:
    begin, row = batch["created_at"], story["outcome"]
    lines = [
        f"line {story['line']} ({story['custom_id']}) of {batch['id']}: {_state_text(story)}",
        f"deadline   {clock(story['deadline'])}",
    ]
    lines += _decision_lines(story["decisions"], begin)
    for loss in story["losses"]:
        lines.append(
            f"{_since(begin, loss['at'])}  lost      on {loss['instance']}: {loss['reason']}"
        )
    if row and row["started_at"] is not None:
        held = f"on {story['instance']}: " if story["instance"] else ""
        first = row["first_token_s"]
        if first is not None:
            told = f"waited {first:.2f} s in the engine for its first token"
            lines.append(f"{_since(begin, row['started_at'])}  served    {held}{told}")
        if row["duration_s"] is not None:
            ended = row["started_at"] + row["duration_s"]
            made = f"{counted(row['output_tokens'], 'token')} in {row['duration_s']:.2f} s"
            lines.append(f"{_since(begin, ended)}  answered  {held}{made}")
    return "\n".join([*lines, *_kept_line(batch, outcome)])


def _state_text(story: Json) -> str:
    row = story["outcome"]
    if row is None:
        where = f" on {story['instance']}" if story["instance"] else ""
        return f"{story['state']}{where}"
    if row["error_code"]:
        return f"failed with {row['error_code']}: {row['error_message']}"
    return f"answered with status {row['status_code']}"


def _call_text(call: Json) -> str:
    lines = [
        f"{call['id']}: {call['state']}, {call['model']} on {call['instance']}",
        f"accepted   {clock(call['created_at'])}",
    ]
    if call["routed"] > 1:
        lines.append(f"routed     {call['routed']} times: instances went away before it began")
    if call["first_token_s"] is not None:
        kept = "kept" if call["first_token_s"] <= call["ttft_target_s"] else "missed"
        lines.append(
            f"first      after {call['first_token_s']:.3f} s; "
            f"promised within {call['ttft_target_s']:g} s: {kept}"
        )
    if call["duration_s"] is not None:
        made = f"{counted(call['output_tokens'], 'token')}, status {call['status_code']}"
        lines.append(f"done       after {call['duration_s']:.3f} s: {made}")
    return "\n".join(lines)


def _since(begin: float, at: float) -> str:
    passed = at - begin
    told = in_words(passed) if round(passed) > 0 else "0 s"
    return f"{'+' + told:>12}"


def _decision_lines(story: list[Json], begin: float) -> list[str]:
    if not story:
        return ["nothing was decided about it yet"]
    lines = []
    for entry in story:
        detail = entry["detail"]
        words = [f"{_since(begin, entry['at'])}  {entry['kind']:<9}"]
        if entry["instance"]:
            moved = f" from {detail['from']}" if detail.get("from") else ""
            words.append(f"on {entry['instance']}{moved}:")
        if entry["kind"] == "promised":
            p50, p95 = detail["p50"] - entry["at"], detail["p95"] - entry["at"]
            words.append(f"in {in_words(p50)} (95 %: {in_words(p95)}):")
        words.append(str(detail.get("reason", "")))
        lines.append(" ".join(words).rstrip())
    return lines


def _kept_line(batch: Json, outcome: Json | None) -> list[str]:
    if not outcome:
        return []
    kept = "by p50" if outcome["by_p50"] else "by p95" if outcome["by_p95"] else "later than p95"
    took = in_words(outcome["actual_s"])
    # What expired says nothing of when it would have been done.
    ended = f"expired after {took}" if batch["status"] == "expired" else f"took {took}: {kept}"
    return [
        f"batch promised in {in_words(outcome['p50_s'])} (95 %: {in_words(outcome['p95_s'])}), "
        f"{ended}"
    ]
