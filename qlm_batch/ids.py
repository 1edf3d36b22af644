"""Identifiers as clients see them: a prefix that says what it is, then 24 random hex digits."""

from __future__ import annotations

import secrets

FILE, BATCH, EVENT, KEY = "file-", "batch_", "evt_", "key_"


def new_id(prefix: str) -> str:
    """A fresh id with `prefix`; 96 random bits, so that ids cannot be guessed."""
    return prefix + secrets.token_hex(12)


def new_secret(prefix: str = "sk-qlm-") -> str:
    """A fresh API key, shown once; 256 random bits, so that a plain hash protects it."""
    return prefix + secrets.token_urlsafe(32)
