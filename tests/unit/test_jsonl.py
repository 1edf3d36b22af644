"""The reader of input files: what it takes, what it refuses, and how it says so."""

from __future__ import annotations

import io
import json
import math
import tracemalloc
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlm_batch.domain.jobs import CHAT, COMPLETIONS, EMBEDDINGS, LineError, RequestLine
from qlm_batch.intake.jsonl import (
    COUNTED_ERRORS,
    LISTED_ERRORS,
    FileRefused,
    LineRules,
    read_requests,
)
from qlm_batch.intake.lines import chunks_of

RULES = LineRules(CHAT, accepted_at=1_000.0, batch_deadline=90_000.0, max_line_bytes=2_000)
BODY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}


HALVED = BODY | {"messages": [{"role": "user", "content": "cut in an emoji: \ud83d"}]}


def line(**changes: Any) -> bytes:
    """A good line with some members changed, or dropped where the change is `...`."""
    members = {"custom_id": "a", "method": "POST", "url": CHAT, "body": BODY} | changes
    return json.dumps({k: v for k, v in members.items() if v is not ...}).encode()


def read(data: bytes, rules: LineRules = RULES) -> list[RequestLine]:
    return list(read_requests(chunks_of(io.BytesIO(data)), rules))


def faults(data: bytes, rules: LineRules = RULES) -> tuple[LineError, ...]:
    with pytest.raises(FileRefused) as caught:
        read(data, rules)
    return caught.value.errors


def test_a_good_line_becomes_a_request_with_its_body_as_compact_json() -> None:
    (request,) = read(line(custom_id="é-1") + b"\n")
    assert (request.line, request.custom_id, request.model) == (1, "é-1", "m")
    assert json.loads(request.body) == BODY
    assert "\n" not in request.body
    assert (request.prompt_tokens, request.max_tokens, request.deadline) == (5, None, None)


@pytest.mark.parametrize(
    "data",
    [
        b"\xef\xbb\xbf" + line() + b"\n" + line(),
        line() + b"\r\n" + line() + b"\r\n",
        line() + b"\n" + line() + b"\n\n",
        line() + b"\n  \t\n" + line() + b"\n\r\n",
        b"\n\n" + line() + b"\n" + line(extra={"ignored": True}),
        line() + b"\n" + line(body=BODY | {"metadata": "nul \0 inside"}),
    ],
    ids=["mark", "crlf", "blank last line", "blank lines between", "blank first", "nul escape"],
)
def test_harmless_oddities_are_accepted(data: bytes) -> None:
    assert len(read(data)) == 2


@pytest.mark.parametrize(
    ("bad", "code", "param", "says"),
    [
        (b"{", "invalid_json_line", None, "not valid JSON"),
        (b'{"custom_id": "\xff"}', "invalid_json_line", None, "not UTF-8 at byte 16"),
        (b"\xff\xfe{\0}\0", "invalid_json_line", None, "NUL byte at byte 4"),
        (line()[:-1] + b"\0}", "invalid_json_line", None, "NUL byte"),
        (b'{"a": "\\ud800"}', "invalid_json_line", None, "surrogate"),
        (line(custom_id="\ud800"), "invalid_json_line", None, "surrogate"),
        (line(body={"model": "m\udc00"}), "invalid_json_line", None, "surrogate"),
        (line(body=BODY | {"a": "\ud800", "b": math.inf}), "invalid_json_line", None, "surrogate"),
        (line(body=HALVED)[:-1], "invalid_json_line", None, "surrogate"),
        (b'{"a": 1e999}', "invalid_json_line", None, "infinity"),
        (b'{"a": ' + b"9" * 500 + b"}", "invalid_json_line", None, "infinity"),
        (b'{"a": NaN}', "invalid_json_line", None, "not valid JSON"),
        (b"[" * 900 + b"]" * 900, "invalid_json_line", None, "must be a JSON object"),
        (b'{"a":' + b"[" * 70 + b"]" * 70 + b"}", "invalid_json_line", None, "more than 64 levels"),
        (b'{"a":' * 300, "invalid_json_line", None, "not valid JSON"),
        (b"{} " + b"x" * 2_000, "line_too_long", None, "2,000 bytes"),
        (b"{} " + b"x" * 2_000, "line_too_long", None, "QLM_MAX_LINE_BYTES"),
        (b"[]", "invalid_json_line", None, "must be a JSON object"),
        (b'"text"', "invalid_json_line", None, "must be a JSON object"),
        (line(custom_id=...), "missing_required_parameter", "custom_id", "missing"),
        (line(custom_id=None), "missing_required_parameter", "custom_id", "missing"),
        (line(custom_id=""), "missing_required_parameter", "custom_id", "not empty"),
        (line(custom_id=7), "invalid_type", "custom_id", "text"),
        (line(custom_id="x" * 513), "invalid_custom_id", "custom_id", "512"),
        (line(custom_id="a\0b"), "invalid_custom_id", "custom_id", "NUL"),
        (line(method=...), "missing_required_parameter", "method", "POST"),
        (line(method="GET"), "invalid_method", "method", "POST"),
        (line(method=["POST"]), "invalid_method", "method", "POST"),
        (line(url=...), "missing_required_parameter", "url", CHAT),
        (line(url=EMBEDDINGS), "url_mismatch", "url", CHAT),
        (line(url={}), "url_mismatch", "url", CHAT),
        (line(body=...), "missing_required_parameter", "body", "object"),
        (line(body="{}"), "invalid_type", "body", "object"),
        (line(body={}), "missing_required_parameter", "body.model", "model"),
        (line(body={"model": 1}), "invalid_type", "body.model", "model"),
        (line(body={"model": "a\0"}), "invalid_type", "body.model", "NUL"),
        (line(deadline="soon"), "invalid_deadline", "deadline", "15m"),
        (line(deadline="2030-01-01T00:00:00"), "invalid_deadline", "deadline", "zone"),
        (line(deadline=True), "invalid_deadline", "deadline", "15m"),
        (line(deadline=999), "invalid_deadline", "deadline", "after the batch's creation"),
        (line(deadline=1_900_000_000_000), "invalid_deadline", "deadline", "seconds"),
        (line(deadline="0s"), "invalid_deadline", "deadline", "after"),
    ],
)
def test_a_bad_line_is_refused_with_its_number_and_the_reason(
    bad: bytes, code: str, param: str | None, says: str
) -> None:
    (fault,) = faults(line() + b"\n\n" + bad + b"\n" + line())
    assert (fault.code, fault.line, fault.param) == (code, 3, param)
    assert fault.message.startswith("Line 3: ")
    assert says in fault.message


def test_half_of_a_surrogate_pair_in_a_body_is_left_to_the_engine() -> None:
    kept, halved, _ = read(b"\n".join([line(), line(body=HALVED), line()]))
    assert (halved.line, halved.custom_id, halved.model) == (2, "a", "m")
    assert json.loads(halved.body) == HALVED
    assert halved.body.isascii()
    assert halved.prompt_tokens > kept.prompt_tokens


def test_half_of_a_surrogate_pair_fails_a_file_that_is_to_be_checked_first() -> None:
    (fault,) = faults(line() + b"\n" + line(body=HALVED), replace(RULES, strict=True))
    assert (fault.code, fault.line, fault.param) == ("invalid_request", 2, "body")


@pytest.mark.parametrize("data", [b"", b"\n\n", b"\xef\xbb\xbf", b" \r\n\t"])
def test_a_file_without_requests_is_empty(data: bytes) -> None:
    (fault,) = faults(data)
    assert (fault.code, fault.line) == ("empty_file", None)


def test_too_many_lines_are_refused_without_reading_the_rest() -> None:
    def chunks() -> Iterator[bytes]:
        yield (line() + b"\n") * 4
        raise AssertionError("read past the limit")

    requests = read_requests(chunks(), replace(RULES, max_lines=3))
    with pytest.raises(FileRefused) as caught:
        list(requests)
    (fault,) = caught.value.errors
    assert (fault.code, fault.line) == ("too_many_tasks", 4)


def test_a_file_with_exactly_the_limit_of_lines_is_taken() -> None:
    assert len(read((line() + b"\n") * 3, replace(RULES, max_lines=3))) == 3


def test_the_first_hundred_faults_are_listed_and_the_others_counted() -> None:
    with pytest.raises(FileRefused) as caught:
        read(b"{\n" * 150)
    assert len(caught.value.errors) == LISTED_ERRORS
    assert caught.value.total == 150
    assert [e.line for e in caught.value.errors] == list(range(1, 101))


def test_a_hopeless_file_is_given_up_on_early() -> None:
    def chunks() -> Iterator[bytes]:
        yield b"{\n" * COUNTED_ERRORS
        raise AssertionError("read past the limit")

    with pytest.raises(FileRefused) as caught:
        list(read_requests(chunks(), RULES))
    assert caught.value.total == COUNTED_ERRORS


@pytest.mark.parametrize(
    ("given_deadline", "expected"),
    [
        ("15m", 1_900.0),
        (5_000, 5_000.0),
        (5_000.5, 5_000.5),
        ("1970-01-01T01:00:00Z", 3_600.0),
        ("1970-01-01T02:00:00+01:00", 3_600.0),
        ("30d", None),
        (None, None),
    ],
)
def test_a_line_keeps_its_deadline_only_where_it_is_before_the_batchs(
    given_deadline: object, expected: float | None
) -> None:
    assert read(line(deadline=given_deadline))[0].deadline == expected


@pytest.mark.parametrize(
    ("endpoint", "body", "expected"),
    [
        (CHAT, {"max_tokens": 7}, 7),
        (CHAT, {"max_tokens": 7, "max_completion_tokens": 9}, 9),
        (CHAT, {"max_tokens": 7, "n": 3}, 21),
        (CHAT, {"max_tokens": "7"}, None),
        (CHAT, {"max_tokens": 10**15}, 2**31 - 1),
        (COMPLETIONS, {}, 16),
        (COMPLETIONS, {"max_tokens": None}, None),
        (EMBEDDINGS, {"max_tokens": 7}, 0),
    ],
)
def test_the_bound_on_generation_follows_the_endpoint(
    endpoint: str, body: dict[str, object], expected: int | None
) -> None:
    data = line(url=endpoint, body={"model": "m"} | body)
    assert read(data, replace(RULES, endpoint=endpoint))[0].max_tokens == expected


@pytest.mark.parametrize(
    ("endpoint", "body", "expected"),
    [
        (CHAT, {"messages": [{"role": "user", "content": "x" * 400}] * 2}, 209),
        (CHAT, {"messages": [{"content": [{"type": "text", "text": "x" * 40}, {}]}]}, 271),
        (CHAT, {"messages": "?"}, 1),
        (COMPLETIONS, {"prompt": "x" * 400}, 101),
        (COMPLETIONS, {"prompt": [1, 2, 3]}, 3),
        (EMBEDDINGS, {"input": ["x" * 40, "y" * 40]}, 22),
        (EMBEDDINGS, {"input": [[1, 2], [3]]}, 3),
        (EMBEDDINGS, {}, 1),
    ],
)
def test_the_prompt_is_estimated_from_its_text(
    endpoint: str, body: dict[str, object], expected: int
) -> None:
    data = line(url=endpoint, body={"model": "m"} | body)
    assert read(data, replace(RULES, endpoint=endpoint))[0].prompt_tokens == expected


@pytest.mark.parametrize(
    ("endpoint", "change", "param"),
    [
        (CHAT, {"messages": []}, "body.messages"),
        (CHAT, {"messages": [{"role": "king", "content": "x"}]}, "body.messages[0].role"),
        (CHAT, {"messages": [{"role": ["user"], "content": "x"}]}, "body.messages[0].role"),
        (CHAT, {"messages": [{"role": "user"}]}, "body.messages[0].content"),
        (CHAT, {"messages": ["x"]}, "body.messages[0]"),
        (CHAT, {"temperature": "hot"}, "body.temperature"),
        (CHAT, {"temperature": 3}, "body.temperature"),
        (CHAT, {"top_p": True}, "body.top_p"),
        (CHAT, {"n": 17}, "body.n"),
        (CHAT, {"n": 0}, "body.n"),
        (CHAT, {"max_tokens": 1.5}, "body.max_tokens"),
        (CHAT, {"stream": True}, "body.stream"),
        (COMPLETIONS, {}, "body.prompt"),
        (COMPLETIONS, {"prompt": [1, "x"]}, "body.prompt"),
        (EMBEDDINGS, {"input": [[]]}, "body.input"),
    ],
)
def test_strict_refuses_what_the_endpoint_would_and_lenient_leaves_it_to_the_engine(
    endpoint: str, change: dict[str, object], param: str
) -> None:
    data = line(url=endpoint, body=BODY | change)
    rules = replace(RULES, endpoint=endpoint)
    assert len(read(data, rules)) == 1
    (fault,) = faults(data, replace(rules, strict=True))
    assert (fault.code, fault.param, fault.line) == ("invalid_request", param, 1)


def test_strict_takes_a_tool_conversation() -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "Weather?"}]},
        {"role": "assistant", "content": None, "tool_calls": []},
        {"role": "tool", "tool_call_id": "1", "content": "Rain"},
    ]
    assert read(line(body=BODY | {"messages": messages}), replace(RULES, strict=True))


def test_a_line_far_past_the_limit_is_never_held() -> None:
    def chunks() -> Iterator[bytes]:
        piece = b"x" * 65_536
        for _ in range(512):
            yield piece
        yield b"\n" + line()

    tracemalloc.start()
    with pytest.raises(FileRefused) as caught:
        list(read_requests(chunks(), RULES))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert caught.value.errors[0].code == "line_too_long"
    assert peak < 1_000_000


def outcome(chunks: Iterable[bytes], rules: LineRules) -> tuple[list[RequestLine], object]:
    """All that was yielded, then how it ended: anything but FileRefused escapes."""
    yielded: list[RequestLine] = []
    try:
        for request in read_requests(chunks, rules):
            yielded.append(request)
    except FileRefused as refused:
        return yielded, (refused.errors, refused.total)
    return yielded, None


pieces = st.sampled_from(
    [
        line(),
        line(custom_id="b"),
        b"\n",
        b"\n",
        b"\r\n",
        b" ",
        b"{",
        b"\xff",
        b"\0",
        b"\xef\xbb\xbf",
        b"x" * 150,
        b"x" * 151,
        b"[" * 80,
        line(body=1),
    ]
)
files = st.one_of(st.binary(max_size=600), st.lists(pieces, max_size=12).map(b"".join))


@settings(deadline=None)
@given(data=files, cuts=st.lists(st.integers(0, 2_000), max_size=10), strict=st.booleans())
def test_the_cut_into_chunks_never_matters(data: bytes, cuts: list[int], strict: bool) -> None:
    rules = replace(RULES, max_line_bytes=150, strict=strict)
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    chunks = [data[a:b] for a, b in pairwise(edges)]
    assert outcome(chunks, rules) == outcome([data], rules)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)


@settings(deadline=None)
@given(
    member=st.sampled_from(["custom_id", "method", "url", "body", "deadline"]),
    value=json_values,
    strict=st.booleans(),
)
def test_any_value_anywhere_in_a_line_is_taken_or_refused(
    member: str, value: object, strict: bool
) -> None:
    outcome([line(**{member: value})], replace(RULES, strict=strict))


@settings(deadline=None)
@given(
    endpoint=st.sampled_from([CHAT, COMPLETIONS, EMBEDDINGS]),
    member=st.sampled_from(
        ["messages", "prompt", "input", "n", "max_tokens", "temperature", "model", "stream"]
    ),
    value=json_values,
    strict=st.booleans(),
)
def test_any_value_anywhere_in_a_body_is_taken_or_refused(
    endpoint: str, member: str, value: object, strict: bool
) -> None:
    rules = replace(RULES, endpoint=endpoint, strict=strict)
    outcome([line(url=endpoint, body=BODY | {member: value})], rules)
