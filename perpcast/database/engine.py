"""The connection pool, and PostgreSQL's errors in our words."""

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TypeVar
from zlib import crc32

import psycopg2
from psycopg2 import errorcodes, sql
from sqlalchemy import Connection, Engine, create_engine, text
from sqlalchemy.exc import DBAPIError, OperationalError

from perpcast.database.address import DatabaseAddress, first_line, refusal
from perpcast.errors import DatabaseUnavailableError, PerpcastError, SetupError

Value = TypeVar("Value")

# What PostgreSQL asks to be tried again, in its own words: two sessions stood in each other's way.
_CONFLICTS = (errorcodes.SERIALIZATION_FAILURE, errorcodes.DEADLOCK_DETECTED, errorcodes.LOCK_NOT_AVAILABLE)
_CONFLICT_TRIES = 5
_RESTART_SECONDS = 60.0  # how long a server that went away is waited for

# Of every session: aware times, no transaction forgotten open, nobody waited for without an end.
_SESSION = "-c timezone=UTC -c idle_in_transaction_session_timeout=60s -c lock_timeout=30s"

# How the server says that it ends a session: it stops, the line broke, a transaction was idle for too long (as after a
# laptop's sleep).
_ENDED = ("57P", "08", errorcodes.IDLE_IN_TRANSACTION_SESSION_TIMEOUT)

_STARTING = ("starting up", "not yet accepting connections", "in recovery mode", "shutting down")


# What every query takes: a pool of connections. Other rooms name it by this word and need not know SQLAlchemy.
Database = Engine


def open_engine(address: DatabaseAddress) -> Engine:
    """A pool whose sessions speak UTC, connected once. Raises DatabaseUnavailableError; dispose of it at the end."""
    engine = create_engine(
        address.url(),
        pool_pre_ping=True,
        connect_args={"connect_timeout": 10, "application_name": "perpcast", "options": _SESSION},
        json_serializer=_to_json,
    )
    deadline = time.monotonic() + 60
    while True:
        try:
            with engine.connect():
                return engine
        except OperationalError as error:
            if not any(word in str(error) for word in _STARTING) or time.monotonic() > deadline:
                engine.dispose()
                raise refusal(address, str(error.orig)) from None
            time.sleep(0.2)


def transact(engine: Engine, work: Callable[[Connection], Value]) -> Value:
    """Does `work` in one transaction, again where another session was in the way or the connection was lost.

    `work` must be safe to do twice: where the answer to a COMMIT was lost, it may have been done. Raises what
    PostgreSQL raised last, and psycopg2's IntegrityError as it is.
    """
    deadline = time.monotonic() + _RESTART_SECONDS
    conflicts = 0
    while True:
        try:
            with engine.begin() as connection:
                return work(connection)
        except (DBAPIError, psycopg2.Error) as error:
            cause = error.orig if isinstance(error, DBAPIError) else error
            conflict = getattr(cause, "pgcode", None) in _CONFLICTS
            conflicts += conflict
            if not (conflicts < _CONFLICT_TRIES if conflict else _is_lost(cause) and time.monotonic() < deadline):
                raise
            time.sleep(0.05 * 2**conflicts if conflict else 0.5)


def execute(connection: Connection, *statements: sql.Composable) -> None:
    """Statements whose names and secrets cannot be bound as parameters: they are composed. Raises psycopg2's errors."""
    cursor = connection.connection.cursor()
    for statement in statements:
        cursor.execute(statement)
    cursor.close()


@contextmanager
def exclusive(engine: Engine, task: str) -> Iterator[None]:
    """One `task` at a time on this database; the lock ends with the process, however it ends. Raises SetupError."""
    key = {"key": crc32(task.encode())}
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        if not connection.execute(text("SELECT pg_try_advisory_lock(:key)"), key).scalar_one():
            raise SetupError(
                f"another {task} is running on the database {engine.url.database}: wait until it ends, or stop it"
            )
        try:
            yield
        finally:
            with suppress(DBAPIError):  # a lost connection has lost its lock
                connection.execute(text("SELECT pg_advisory_unlock(:key)"), key)


@contextmanager
def plain_errors(address: DatabaseAddress) -> Iterator[None]:
    """Turns what may happen to any statement (server gone, disk full, no rights) into a message; a bug stays a bug."""
    try:
        yield
    except (DBAPIError, psycopg2.Error) as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        explained = _explain_failure(address, cause)
        if explained is None:
            raise
        raise explained from error


def _explain_failure(address: DatabaseAddress, error: BaseException | None) -> PerpcastError | None:
    code = getattr(error, "pgcode", None) or ""
    if code == errorcodes.DISK_FULL:
        return PerpcastError(f"the disk of the database {address} is full; free some space, then run the command again")
    if code == errorcodes.INSUFFICIENT_PRIVILEGE:
        return DatabaseUnavailableError(
            f"{address}: {first_line(error)}; connect as another user, or let the owner of the tables run: "
            f'GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO "{address.user}"'
        )
    if code == errorcodes.READ_ONLY_SQL_TRANSACTION:
        return DatabaseUnavailableError(
            f"{address} is read-only; connect to the primary server, or end its default_transaction_read_only"
        )
    if code in _CONFLICTS:
        return PerpcastError(f"{address}: {first_line(error)}; end what else works on it, then run the command again")
    if _is_lost(error):
        return PerpcastError(
            f"the connection to {address} was lost; what was committed is kept, run the command again (the server's "
            "log says why: stopped, crashed, disk full)"
        )
    return None


def _is_lost(error: BaseException | None) -> bool:
    """Whether the server, or the way to it, is gone for now."""
    code = getattr(error, "pgcode", None)
    if code:
        return code.startswith(_ENDED)
    return isinstance(error, psycopg2.OperationalError | psycopg2.InterfaceError)


def _to_json(value: Any) -> str:
    """JSON knows no NaN and no infinity: they become null."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
