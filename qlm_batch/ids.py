"""Identifiers as clients see them: a prefix that says what it is, then 24 random hex digits."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable

FILE, BATCH, EVENT, KEY, REQUEST = "file-", "batch_", "evt_", "key_", "req_"


def new_id(prefix: str) -> str:
    """A fresh id with `prefix`; 96 random bits, so that ids cannot be guessed."""
    return prefix + secrets.token_hex(12)


def id_series(prefix: str) -> Callable[[], str]:
    """Makes fresh ids that look like `new_id`'s at a tenth of its cost, for where guessing is idle.

    A random stem keeps series apart; the count that follows it shows their order.
    """
    stem, numbers = prefix + secrets.token_hex(8), itertools.count()
    return lambda: f"{stem}{next(numbers):08x}"


def new_secret(prefix: str = "sk-qlm-") -> str:
    """A fresh API key, shown once; 256 random bits, so that a plain hash protects it."""
    return prefix + secrets.token_urlsafe(32)
