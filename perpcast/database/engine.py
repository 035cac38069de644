"""The connection pool, and PostgreSQL's errors in our words."""

import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg2
from psycopg2 import errorcodes
from sqlalchemy import Engine, create_engine
from sqlalchemy.exc import DBAPIError, OperationalError

from perpcast.database.address import DatabaseAddress, first_line, refusal
from perpcast.errors import DatabaseUnavailableError, PerpcastError

_STARTING = ("starting up", "not yet accepting connections", "in recovery mode", "shutting down")


# What every query takes: a pool of connections. Other rooms name it by this word and need not know SQLAlchemy.
Database = Engine


def open_engine(address: DatabaseAddress) -> Engine:
    """A pool whose sessions speak UTC, connected once. Raises DatabaseUnavailableError; dispose of it at the end."""
    engine = create_engine(
        address.url(),
        pool_pre_ping=True,
        connect_args={"connect_timeout": 10, "application_name": "perpcast", "options": "-c timezone=UTC"},
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
        return DatabaseUnavailableError(f"{address}: {first_line(error)}; grant it, or connect as another user")
    if code == errorcodes.READ_ONLY_SQL_TRANSACTION:
        return DatabaseUnavailableError(f"{address} is read-only; connect to the primary server")
    lost = isinstance(error, psycopg2.OperationalError | psycopg2.InterfaceError) and (
        not code or code.startswith(("57P", "08"))
    )
    if lost:
        return PerpcastError(f"the connection to {address} was lost; what was committed is kept, run the command again")
    return None


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
