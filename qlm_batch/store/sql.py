"""SQL text with the database's clock in it."""

from __future__ import annotations

import sqlalchemy as sa

_NOW = "(SELECT extract(epoch FROM clock_timestamp())::float8)"


def sql(statement: str) -> sa.TextClause:
    """A statement with `:name` parameters, in which `{now}` is the time in seconds.

    It is read when the statement runs, not when its transaction began: a transaction that waited
    for a lock must not take a lease for younger than it is.
    """
    return sa.text(statement.replace("{now}", _NOW))
