"""Durations as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qlm_batch.domain.durations import format_duration, in_words, parse_duration, parse_window
from qlm_batch.domain.errors import InvalidInput


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("15m", 900),
        ("2h30m", 9000),
        ("24h", 86400),
        ("7d", 604800),
        ("1d2h3m4s", 93784),
        ("1.5h", 5400),
        ("90s", 90),
        (" 24H ", 86400),
    ],
)
def test_a_duration_is_read_as_seconds(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text",
    ["", " ", "h", "24", "-1h", "1h1h", "30m2h", "1h 30m", "1w", "1e9h", "٣h", "1h\x00", "∞"],
)
def test_anything_else_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InvalidInput, match="2h30m") as refused:
        parse_duration(text, param="completion_window")
    assert refused.value.param == "completion_window"


@given(st.integers(min_value=1, max_value=60 * 86400))
def test_a_formatted_duration_reads_back_as_itself(seconds: int) -> None:
    assert parse_duration(format_duration(seconds)) == seconds


@given(st.text(max_size=20))
def test_no_text_breaks_the_parser(text: str) -> None:
    try:
        assert parse_duration(text) >= 0
    except InvalidInput as refused:
        assert refused.message


@pytest.mark.parametrize("text", ["9s", "0s", "31d", "999999999d"])
def test_a_window_outside_its_bounds_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="between 10s and 30d"):
        parse_window(text)


@pytest.mark.parametrize("text", ["10s", "30d"])
def test_a_window_at_its_bounds_is_taken(text: str) -> None:
    assert parse_window(text) > 0


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (-3.0, "under 1 s"),
        (0.4, "under 1 s"),
        (0.6, "1 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (250, "4 min 10 s"),
        (3600, "1 h"),
        (7500, "2 h 5 min"),
    ],
)
def test_a_duration_is_told_in_words(seconds: float, told: str) -> None:
    assert in_words(seconds) == told
