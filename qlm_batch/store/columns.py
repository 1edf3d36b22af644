"""What the tables' definitions share: naming, checks of states, and storage of hot tables.

Every point in time is a double: seconds since the Unix epoch, by the database's clock.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import sqlalchemy as sa

METADATA = sa.MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
    }
)

HOT = {
    "fillfactor": "50",
    "autovacuum_vacuum_scale_factor": "0",
    "autovacuum_vacuum_threshold": "2000",
    "autovacuum_analyze_scale_factor": "0",
    "autovacuum_analyze_threshold": "5000",
}
"""Room for updates inside a page, and vacuum by absolute counts: a share of a table that was once
large would let a small busy one bloat."""


def one_of(column: str, words: type[StrEnum]) -> sa.CheckConstraint:
    """A CHECK that `column` holds one of the enumeration's words."""
    listed = ", ".join(f"'{word.value}'" for word in words)
    return sa.CheckConstraint(f"{column} IN ({listed})", name=column)


def moment(name: str, *, nullable: bool = False) -> sa.Column[float]:
    """A point in time."""
    return sa.Column(name, sa.Double, nullable=nullable)


def text(name: str, *, nullable: bool = False) -> sa.Column[str]:
    """Text of any length."""
    return sa.Column(name, sa.Text, nullable=nullable)


def count(name: str) -> sa.Column[int]:
    """A number of things, 0 unless told."""
    return sa.Column(name, sa.BigInteger, nullable=False, server_default="0")


def flag(name: str) -> sa.Column[bool]:
    """Yes or no, no unless told."""
    return sa.Column(name, sa.Boolean, nullable=False, server_default=sa.false())


def serial(name: str = "id", *, primary_key: bool = True) -> sa.Column[int]:
    """A number given by the database in order of arrival."""
    return sa.Column(
        name, sa.BigInteger, sa.Identity(always=True), primary_key=primary_key, nullable=False
    )


def key(name: str = "id") -> sa.Column[str]:
    """A primary key that the caller names."""
    return sa.Column(name, sa.Text, primary_key=True)


def parent(name: str, target: str, kind: type[sa.types.TypeEngine[Any]]) -> sa.Column[Any]:
    """A reference that disappears with what it refers to."""
    return sa.Column(name, kind, sa.ForeignKey(target, ondelete="CASCADE"), nullable=False)
