"""The composition root: builds the real parts from settings, for the entry points alone."""

from __future__ import annotations

import base64
import hashlib

from qlm_batch.domain.errors import ConfigurationError
from qlm_batch.settings import Settings
from qlm_batch.store.postgres import PostgresStore


def open_store(settings: Settings) -> PostgresStore:
    """The Postgres store; ConfigurationError when no database is named."""
    if not settings.database_url:
        raise ConfigurationError(
            "no database: set DATABASE_URL, or use `qlm up`, which starts one of its own"
        )
    return PostgresStore(
        settings.database_url,
        secret_key=encryption_key(settings),
        instance_silent_s=settings.instance_silent_s,
    )


def encryption_key(settings: Settings) -> bytes:
    """The Fernet key for secrets at rest, derived from `secret_key`."""
    if not settings.secret_key:
        raise ConfigurationError("no secret key: set QLM_SECRET_KEY to a long random text")
    return base64.urlsafe_b64encode(hashlib.sha256(settings.secret_key.encode()).digest())
