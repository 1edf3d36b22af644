"""Durations as people write them, `15m`, `2h30m`, `7d`, and as they read them, `2 h 30 min`."""

from __future__ import annotations

import re

from qlm_batch.domain.errors import InvalidInput

WINDOW_MIN_S = 10.0
WINDOW_MAX_S = 30 * 86400.0

_UNITS = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))
_NUMBER = r"(?:([0-9]{1,9}(?:\.[0-9]{1,6})?)%s)?"
_DURATION = re.compile("".join(_NUMBER % unit for unit, _ in _UNITS))


def parse_duration(text: str, *, param: str | None = None) -> float:
    """Seconds in `text`: numbers with the units d, h, m, s, largest first, each at most once.

    Raises InvalidInput, naming `param`, when it reads otherwise.
    """
    found = _DURATION.fullmatch(text.strip().lower()) if text.isascii() else None
    if found is None or not any(found.groups()):
        raise InvalidInput(
            f"{text[:40]!r} is not a duration. Write it like '15m', '2h30m', '24h' or '7d'.",
            code="invalid_duration",
            param=param,
        )
    return sum(
        float(number) * seconds
        for number, (_, seconds) in zip(found.groups(), _UNITS, strict=True)
        if number is not None
    )


def parse_window(text: str, *, param: str = "completion_window") -> float:
    """Seconds of a completion window, which lies between 10 seconds and 30 days.

    Raises InvalidInput, naming `param`.
    """
    seconds = parse_duration(text, param=param)
    if not WINDOW_MIN_S <= seconds <= WINDOW_MAX_S:
        raise InvalidInput(
            f"'{param}' must lie between {format_duration(WINDOW_MIN_S)} and "
            f"{format_duration(WINDOW_MAX_S)}, not {text[:40]!r}.",
            code="invalid_duration",
            param=param,
        )
    return seconds


def format_duration(seconds: float) -> str:
    """The shortest text that `parse_duration` reads back as `seconds`, to the whole second."""
    left = round(seconds)
    if left <= 0:
        return "0s"
    text = ""
    for unit, size in _UNITS:
        count, left = divmod(left, size)
        text += f"{count}{unit}" if count else ""
    return text


def in_words(seconds: float) -> str:
    """A duration in a sentence: `under 1 s`, `3 s`, `4 min 10 s`, `2 h 5 min`."""
    whole = round(seconds)
    if whole <= 0:
        return "under 1 s"
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"
