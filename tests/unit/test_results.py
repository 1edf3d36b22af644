"""How one line's outcome is written, row or no row."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlm_batch.domain.jobs import ExportLine, SliceState
from qlm_batch.intake.results import render_line

LINE = ExportLine(7, 3, "a", SliceState.DONE, ok=False)
KEYS = ["id", "custom_id", "response", "error"]


def rendered(**changes: Any) -> tuple[bool, dict[str, Any]]:
    ok, text = render_line(replace(LINE, **changes))
    assert text.endswith(b"\n")
    assert text.count(b"\n") == 1
    return ok, json.loads(text)


def test_a_success_carries_the_stored_body() -> None:
    ok, line = rendered(ok=True, status_code=200, request_id="r-1", body='{"x": [1.10, "é"]}')
    assert ok
    assert list(line) == KEYS
    assert line["id"].startswith("batch_req_")
    assert line["response"] == {
        "status_code": 200,
        "request_id": "r-1",
        "body": {"x": [1.1, "é"]},
    }
    assert line["error"] is None


def test_the_body_is_not_written_anew() -> None:
    body = '{"n": 1.10, "big": 123456789012345678901234567890}'
    _, text = render_line(replace(LINE, ok=True, status_code=200, request_id="r", body=body))
    assert body.encode() in text


def test_an_http_failure_keeps_its_body_and_has_no_error_of_its_own() -> None:
    ok, line = rendered(status_code=400, request_id="r-1", body='{"error": {"message": "no"}}')
    assert not ok
    assert line["response"]["body"]["error"]["message"] == "no"
    assert line["error"] is None


def test_any_other_failure_has_no_response() -> None:
    ok, line = rendered(error_code="request_timeout", error_message="too slow")
    assert not ok
    assert line["response"] is None
    assert line["error"] == {"code": "request_timeout", "message": "too slow"}


@pytest.mark.parametrize(
    ("closed_as", "code"),
    [
        (SliceState.EXPIRED, "batch_expired"),
        (SliceState.CANCELLED, "batch_cancelled"),
        (SliceState.DONE, "server_error"),
    ],
)
def test_a_line_without_a_row_says_how_its_slice_ended(closed_as: SliceState, code: str) -> None:
    ok, line = rendered(closed_as=closed_as)
    assert not ok
    assert list(line) == KEYS
    assert line["response"] is None
    assert line["error"]["code"] == code
    assert line["error"]["message"]


@settings(deadline=None)
@given(
    custom_id=st.text(), body=st.dictionaries(st.text(), st.text()), indent=st.none() | st.just(2)
)
def test_any_text_stays_on_one_line(
    custom_id: str, body: dict[str, str], indent: int | None
) -> None:
    text = json.dumps(body, indent=indent, ensure_ascii=False)
    _, line = rendered(custom_id=custom_id, ok=True, status_code=200, request_id="r", body=text)
    assert (line["custom_id"], line["response"]["body"]) == (custom_id, body)


def test_ids_are_stable_and_differ_between_lines() -> None:
    ids = [rendered(run_id=r, position=p)[1]["id"] for r in (1, 11) for p in (1, 11)]
    assert len(set(ids)) == 4
    assert rendered()[1]["id"] == rendered(custom_id="b")[1]["id"]


@pytest.mark.parametrize("mark", ["\x85", "\u2028", "\u2029"])
def test_a_line_is_one_line_for_readers_that_know_more_line_ends(mark: str) -> None:
    said = f"é{mark}b"
    for changes in (
        {"ok": True, "status_code": 200, "request_id": "r", "body": f'{{"text": "{said}"}}'},
        {"error_code": "server_error", "error_message": said},
    ):
        _, raw = render_line(replace(LINE, custom_id=said, **changes))  # type: ignore[arg-type]
        (line,) = raw.decode().splitlines()
        read = json.loads(line)
        assert read["custom_id"] == said
        assert said in (read["error"] or read["response"]["body"]).values()
