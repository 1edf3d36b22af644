"""Engines and transactions: bounds on time and connections, and what their failures mean."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable, Iterator
from typing import Any, Concatenate, ParamSpec, TypeVar

import psycopg
import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.engine.interfaces import IsolationLevel

from qlm_batch.domain.errors import ConfigurationError, Unavailable
from qlm_batch.failpoints import failpoint

P = ParamSpec("P")
T = TypeVar("T")

RETRIES = 5
RETRY_AFTER_S = 1.0
_SAID_CHARS = 500

_CONFLICTS = frozenset({"40001", "40P01"})
_STALE_PLAN = "RevalidateCachedQuery"
"""Where the server refuses a prepared statement whose table has got a column since, as in a rolling
upgrade. The roll-back forgets the statement."""
_AWAY = (
    "08",  # connection exceptions
    "25P03",  # ended for idling inside a transaction
    "53",  # out of connections, memory or disk
    "55P03",  # a lock was not to be had in time
    "57",  # shut down, starting up, or a statement that ran too long
    "58",  # the system under the database failed
)

_FROM_DRIVER = (
    exc.OperationalError,
    exc.InterfaceError,
    psycopg.OperationalError,
    psycopg.InterfaceError,
)


def normalised(url: str) -> sa.URL:
    """The URL for SQLAlchemy with psycopg 3, from any of PostgreSQL's usual forms.

    `postgres://` and `postgresql://` are the same; `postgresql:///db?host=/folder` names a socket.
    Raises ConfigurationError when it is not a PostgreSQL URL.
    """
    try:
        parsed = sa.make_url(url)
    except (exc.ArgumentError, ValueError):
        parsed = None
    if parsed is None or parsed.drivername.partition("+")[0] not in ("postgres", "postgresql"):
        raise ConfigurationError(
            "DATABASE_URL must look like postgresql://user:password@host:5432/database"
            " or postgresql:///database?host=/socket/folder; in a password @ is written %40 and"
            " / %2F.",
            param="database_url",
        )
    return parsed.set(drivername="postgresql+psycopg")


def make_engine(
    url: str,
    *,
    application_name: str = "qlm-batch",
    pool_size: int = 8,
    connect_timeout_s: float = 5.0,
    statement_timeout_s: float = 60.0,
    idle_in_transaction_s: float = 10.0,
) -> Engine:
    """A pool of at most `pool_size` connections; nothing is connected yet.

    A client stopped inside a transaction loses it after `idle_in_transaction_s`, so that its locks
    do not outlive it by more.
    """
    options = {
        "statement_timeout": int(statement_timeout_s * 1000),
        "idle_in_transaction_session_timeout": int(idle_in_transaction_s * 1000),
        "client_connection_check_interval": 5000,
        # A plan made for no list of ids in particular reads whole tables for a few of them.
        "plan_cache_mode": "force_custom_plan",
        "jit": "off",
    }
    return sa.create_engine(
        normalised(url),
        pool_size=pool_size,
        max_overflow=0,
        pool_timeout=10.0,
        pool_pre_ping=False,
        pool_use_lifo=True,
        # Errors are logged, and parameters are what users wrote.
        hide_parameters=True,
        connect_args={
            "application_name": application_name,
            "connect_timeout": max(2, round(connect_timeout_s)),
            "options": " ".join(f"-c {name}={value}" for name, value in options.items()),
            "keepalives_idle": 10,
            "tcp_user_timeout": 15_000,
        },
    )


def sqlstate(error: BaseException | None) -> str:
    """PostgreSQL's five-character code; empty when the server never answered."""
    cause = error.orig if isinstance(error, exc.DBAPIError) else error
    return str(getattr(cause, "sqlstate", None) or "")


def _meaning(error: Exception) -> Exception:
    """The domain's error for a failure of the database, or the failure itself.

    COPY goes past SQLAlchemy, so the driver's own errors come here as well.
    """
    if isinstance(error, exc.TimeoutError):
        return Unavailable(
            "All database connections are busy; try again.", retry_after_s=RETRY_AFTER_S
        )
    code = sqlstate(error)
    if code in ("42P01", "42703", "3F000"):
        return Unavailable(
            "The database's tables are missing or old; run `qlm db upgrade`.",
            code="schema_not_current",
            retry_after_s=RETRY_AFTER_S,
        )
    unanswered = not code and isinstance(error, _FROM_DRIVER)
    if unanswered or _in_conflict(error) or code.startswith(_AWAY):
        return Unavailable(
            "The database is away; try again.", retry_after_s=RETRY_AFTER_S, why=_said(error)
        )
    return error


def _said(error: Exception) -> str:
    """The server's or the driver's own words, without the details, which hold what users wrote."""
    cause = error.orig if isinstance(error, exc.DBAPIError) else error
    primary = cause.diag.message_primary if isinstance(cause, psycopg.Error) else None
    return " ".join((primary or str(cause)).split())[:_SAID_CHARS]


class Database:
    """Transactions on one PostgreSQL database; safe to share between threads."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._engines: dict[IsolationLevel | None, Engine] = {
            level: engine.execution_options(isolation_level=level)
            for level in ("REPEATABLE READ", "AUTOCOMMIT")
        }

    @contextlib.contextmanager
    def transaction(self, isolation: IsolationLevel | None = None) -> Iterator[Connection]:
        """One transaction, committed when the block ends and rolled back when it raises.

        Raises Unavailable when the database is away, out of room, or in conflict.
        """
        engine = self._engines.get(isolation, self.engine)
        try:
            with engine.begin() as connection:
                yield connection
        except (exc.SQLAlchemyError, psycopg.Error) as error:
            meaning = _meaning(error)
            if meaning is error:
                raise
            raise meaning from error

    def run(
        self, work: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """`work` in one transaction, repeated when it lost a deadlock or a serialization race."""
        return self._repeated(None, work, *args, **kwargs)

    def read(
        self, work: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """As `run`, on one consistent view of everything."""
        return self._repeated("REPEATABLE READ", work, *args, **kwargs)

    def run_statement(
        self, work: Callable[Concatenate[Connection, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """As `run`, for work of one statement: it is committed in the same round trip."""
        return self._repeated("AUTOCOMMIT", work, *args, **kwargs)

    def _repeated(
        self,
        isolation: IsolationLevel | None,
        work: Callable[Concatenate[Connection, P], T],
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> T:
        for trial in range(RETRIES):
            try:
                with self.transaction(isolation) as connection:
                    outcome = work(connection, *args, **kwargs)
                    failpoint(work.__name__, "before_commit")
                failpoint(work.__name__, "after_commit")
                return outcome
            except Unavailable as error:
                if trial + 1 == RETRIES or not _in_conflict(error.__cause__):
                    raise
                # Spread, so that two that met do not meet again.
                time.sleep(random.uniform(0.0, 0.02) * (trial + 1))  # noqa: S311
        raise AssertionError("unreachable")

    def close(self) -> None:
        """Give the connections back."""
        self.engine.dispose()


_NO_TIMEOUTS = sa.text(
    "SELECT set_config('statement_timeout', '0', true),"
    " set_config('idle_in_transaction_session_timeout', '0', true)"
)


def lift_timeouts(connection: Connection) -> None:
    """Let the rest of this transaction take as long as a batch has lines.

    Else the same work would be begun again and again, and never be done.
    """
    connection.execute(_NO_TIMEOUTS)


def _in_conflict(cause: BaseException | None) -> bool:
    """Whether the same may succeed if it is done again at once."""
    if sqlstate(cause) in _CONFLICTS:
        return True
    told = cause.orig if isinstance(cause, exc.DBAPIError) else cause
    return isinstance(told, psycopg.Error) and told.diag.source_function == _STALE_PLAN


def driver_cursor(connection: Connection) -> Any:
    """A psycopg cursor inside the connection's transaction, for COPY."""
    return connection.connection.cursor()
