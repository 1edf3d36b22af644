"""Reads a batch's input file: bytes in, requests or a list of named faults out."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import orjson

from qlm_batch.domain.bodies import MAX_MODEL_CHARS
from qlm_batch.domain.durations import parse_duration
from qlm_batch.domain.errors import InvalidInput
from qlm_batch.domain.jobs import LineError, RequestLine
from qlm_batch.intake.estimates import max_tokens, prompt_tokens
from qlm_batch.intake.lines import split_lines
from qlm_batch.intake.schema import check_body

LISTED_ERRORS = 100
COUNTED_ERRORS = 10_000
"""Reading stops after this many faults: the file is hopeless and the count says enough."""

_CUSTOM_ID_CHARS = 512
_DUMPABLE_DEPTH = 250
"""orjson writes at most 254 levels."""
_LATEST_EPOCH_S = 1e11
"""Above this a number is taken for milliseconds."""
_HALF_OF_A_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, slots=True)
class LineRules:
    """What a file's lines are held to. `accepted_at` is when the batch was created.

    Lines keep their own deadline only where it is earlier than `batch_deadline`.
    """

    endpoint: str
    accepted_at: float
    batch_deadline: float
    max_line_bytes: int = 1024**2
    max_lines: int = 5_000_000
    max_depth: int = 64
    max_n: int = 16
    strict: bool = False


class FileRefused(InvalidInput):
    """The file cannot run as a batch: `errors` lists the first faults, `total` counts them all."""

    def __init__(self, errors: tuple[LineError, ...], total: int) -> None:
        first = errors[0]
        super().__init__(first.message, code=first.code, line=first.line, param=first.param)
        self.errors = errors
        self.total = total


class _Fault(Exception):
    """Why one line is refused."""

    def __init__(self, code: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param


def read_requests(chunks: Iterable[bytes], rules: LineRules) -> Iterator[RequestLine]:
    """The file's requests, streamed; FileRefused at the end when any line had a fault.

    After the first fault nothing more is yielded, but reading goes on to find the others.
    """
    errors: list[LineError] = []
    total = 0
    lines = 0
    parse = _parse
    for number, raw in split_lines(chunks, rules.max_line_bytes):
        lines += 1
        if lines > rules.max_lines:
            message = f"The file has more than {rules.max_lines:,} requests; split it."
            errors.insert(0, LineError("too_many_tasks", message, number))
            total += 1
            break
        try:
            request = parse(number, raw, rules)
        except _Fault as fault:
            total += 1
            if total <= LISTED_ERRORS:
                message = f"Line {number}: {fault.message}"
                errors.append(LineError(fault.code, message, number, fault.param))
            if total >= COUNTED_ERRORS:
                break
            continue
        if not total:
            yield request
    if not lines:
        errors.append(LineError("empty_file", "The file has no requests; write one per line."))
        total = 1
    if errors:
        raise FileRefused(tuple(errors[:LISTED_ERRORS]), total)


def _parse(number: int, raw: bytes | None, rules: LineRules) -> RequestLine:
    if raw is None:
        limit = rules.max_line_bytes
        message = (
            f"it is longer than the {limit:,} bytes a line may have; shorten it, or have "
            "QLM_MAX_LINE_BYTES raised by whoever runs this service."
        )
        raise _Fault("line_too_long", message)
    halved = False
    try:
        line = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        line, halved = _with_halves(raw), True
        if line is None:
            raise _json_fault(raw, error) from None
    if type(line) is not dict:
        raise _Fault("invalid_json_line", "it must be a JSON object ({…}).")
    if _may_be_deeper(raw, rules.max_depth):
        _check_depth(line, min(rules.max_depth, _DUMPABLE_DEPTH))

    custom_id = line.get("custom_id")
    if type(custom_id) is not str or not custom_id:
        raise _missing_or_wrong(line, "custom_id", custom_id, "a text that is not empty")
    if len(custom_id) > _CUSTOM_ID_CHARS or "\0" in custom_id:
        message = f"'custom_id' must have at most {_CUSTOM_ID_CHARS} characters and no NUL."
        raise _Fault("invalid_custom_id", message, "custom_id")
    if line.get("method") != "POST":
        if line.get("method") is None:
            raise _missing("method", '"POST"')
        raise _Fault("invalid_method", "'method' must be \"POST\".", "method")
    url = line.get("url")
    if url != rules.endpoint:
        if url is None:
            raise _missing("url", f'"{rules.endpoint}"')
        message = f"'url' must be the batch's endpoint, {rules.endpoint}."
        raise _Fault("url_mismatch", message, "url")
    body = line.get("body")
    if type(body) is not dict:
        raise _missing_or_wrong(line, "body", body, "an object")
    model = body.get("model")
    if type(model) is not str or not model:
        raise _missing_or_wrong(body, "body.model", model, "a text that names the model")
    if len(model) > MAX_MODEL_CHARS or "\0" in model:
        message = f"'body.model' must have at most {MAX_MODEL_CHARS} characters and no NUL."
        raise _Fault("invalid_type", message, "body.model")
    if rules.strict and halved:
        raise _Fault("invalid_request", "'body' holds half of a surrogate pair.", "body")
    if rules.strict and (found := check_body(rules.endpoint, body, rules.max_n)):
        param, wrong = found
        raise _Fault("invalid_request", f"'body.{param}' {wrong}.", f"body.{param}")

    deadline = line.get("deadline")
    return RequestLine(
        number,
        custom_id,
        model,
        json.dumps(body) if halved else orjson.dumps(body).decode(),
        prompt_tokens(rules.endpoint, body),
        max_tokens(rules.endpoint, body),
        None if deadline is None else _deadline(deadline, rules),
    )


def _missing(param: str, expected: str) -> _Fault:
    return _Fault("missing_required_parameter", f"'{param}' is missing; give {expected}.", param)


def _missing_or_wrong(owner: dict[str, Any], param: str, value: object, expected: str) -> _Fault:
    if value is None or value == "":
        return _missing(param, expected)
    return _Fault("invalid_type", f"'{param}' must be {expected}.", param)


def _with_halves(raw: bytes) -> Any:
    """The line that orjson refuses only for halves of surrogate pairs in its body, else None.

    JSON can spell them, as where a text was cut in the middle of an emoji; what to say of such a
    body is the engine's.
    """
    if not _HALF_OF_A_PAIR.search(raw):
        return None
    try:
        line = json.loads(raw.decode())
        around = {**line, "body": line["body"]["model"]}
        json.dumps(around, ensure_ascii=False).encode()
        json.dumps(line, allow_nan=False)
    except (ValueError, RecursionError, TypeError, KeyError):
        return None
    return line


def _json_fault(raw: bytes, error: orjson.JSONDecodeError) -> _Fault:
    """Why the bytes are no JSON, in words that help to find the place."""
    if b"\0" in raw:
        reason = f"it holds a NUL byte at byte {raw.index(0) + 1}; remove it."
    else:
        try:
            raw.decode()
        except UnicodeDecodeError as undecodable:
            reason = f"it is not UTF-8 at byte {undecodable.start + 1}; save the file as UTF-8."
        else:
            reason = f"it is not valid JSON: {error.msg} (column {error.colno})."
    return _Fault("invalid_json_line", reason)


def _may_be_deeper(raw: bytes, limit: int) -> bool:
    """Whether there are brackets enough; unlike count(), find() skips fast over what is between."""
    openings = 0
    for bracket in (b"{", b"["):
        at = raw.find(bracket)
        while at >= 0:
            openings += 1
            if openings > limit:
                return True
            at = raw.find(bracket, at + 1)
    return False


def _check_depth(value: object, limit: int) -> None:
    level: list[object] = [value]
    for _ in range(limit):
        inner: list[object] = []
        for item in level:
            if type(item) is dict:
                inner.extend(v for v in item.values() if type(v) in (dict, list))
            elif type(item) is list:
                inner.extend(v for v in item if type(v) in (dict, list))
        if not inner:
            return
        level = inner
    raise _Fault("invalid_json_line", f"it is nested more than {limit} levels deep.")


def _deadline(value: object, rules: LineRules) -> float | None:
    """The line's own absolute deadline, None where the batch's comes first."""
    if isinstance(value, str):
        seconds = _from_text(value, rules.accepted_at)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        seconds = float(value)
    else:
        raise _bad_deadline()
    if not rules.accepted_at < seconds < _LATEST_EPOCH_S:
        message = "'deadline' must lie after the batch's creation and be in seconds."
        raise _Fault("invalid_deadline", message, "deadline")
    return seconds if seconds < rules.batch_deadline else None


def _from_text(value: str, accepted_at: float) -> float:
    try:
        return accepted_at + parse_duration(value)
    except InvalidInput:
        pass
    try:
        moment = datetime.fromisoformat(value)
        if moment.tzinfo is None:
            raise _bad_deadline()
        return moment.timestamp()
    except (ValueError, OverflowError):
        raise _bad_deadline() from None


def _bad_deadline() -> _Fault:
    message = (
        "'deadline' must be a duration (\"15m\"), a time with its zone "
        '("2030-01-31T12:00:00Z") or seconds since 1970.'
    )
    return _Fault("invalid_deadline", message, "deadline")
