"""Roles that may read some tables for a while, and nothing else: what another machine is given."""

from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime

import psycopg2
from psycopg2 import sql
from sqlalchemy import Engine, text

from perpcast.database.engine import execute, transact
from perpcast.errors import DatabaseUnavailableError

READER_CONNECTIONS = 4
_STATEMENT_TIMEOUT = "10min"  # the longest is a COPY of one symbol


def grant_reader(engine: Engine, role: str, password: str, tables: Sequence[str], *, until: datetime) -> None:
    """Makes a role that can log in until `until` and read these tables; one that exists gets exactly these rights.

    Raises DatabaseUnavailableError where our own role may not make roles.
    """
    name, database = sql.Identifier(role), sql.Identifier(engine.url.database or "")
    limits = sql.SQL("LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE CONNECTION LIMIT {} VALID UNTIL {} PASSWORD {}").format(
        sql.Literal(READER_CONNECTIONS), sql.Literal(until.isoformat()), sql.Literal(password)
    )
    listed = sql.SQL(", ").join(sql.Identifier("public", table) for table in tables)
    revoke_reader(engine, role)
    try:
        _execute_all(
            engine,
            sql.SQL("CREATE ROLE {} {}").format(name, limits),
            sql.SQL("ALTER ROLE {} SET default_transaction_read_only = on").format(name),
            sql.SQL("ALTER ROLE {} SET statement_timeout = {}").format(name, sql.Literal(_STATEMENT_TIMEOUT)),
            sql.SQL("GRANT CONNECT ON DATABASE {} TO {}").format(database, name),
            sql.SQL("GRANT USAGE ON SCHEMA public TO {}").format(name),
            sql.SQL("GRANT SELECT ON {} TO {}").format(listed, name),
        )
    except psycopg2.errors.InsufficientPrivilege:
        raise DatabaseUnavailableError(
            f"the database role {engine.url.username} may not make a role that only reads: let an administrator run "
            f'ALTER ROLE "{engine.url.username}" CREATEROLE, or send the dataset instead (--data rsync)'
        ) from None


def revoke_reader(engine: Engine, role: str) -> bool:
    """Ends the role's sessions and removes it with its rights; True where there was one."""
    name = sql.Identifier(role)
    with engine.connect() as connection:
        known = connection.execute(text("SELECT 1 FROM pg_roles WHERE rolname = :role"), {"role": role})
        exists = known.one_or_none() is not None
    if exists:
        ended = sql.SQL("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = {}")
        _execute_all(
            engine,
            sql.SQL("ALTER ROLE {} NOLOGIN").format(name),
            sql.SQL("REVOKE ALL ON ALL TABLES IN SCHEMA public FROM {}").format(name),
            sql.SQL("REVOKE ALL ON SCHEMA public FROM {}").format(name),
            sql.SQL("REVOKE ALL ON DATABASE {} FROM {}").format(sql.Identifier(engine.url.database or ""), name),
        )
        # Who made a role may not always end its sessions; they can read nothing any more.
        with suppress(psycopg2.errors.InsufficientPrivilege):
            _execute_all(engine, ended.format(sql.Literal(role)))
        _execute_all(engine, sql.SQL("DROP ROLE {}").format(name))
    return exists


def _execute_all(engine: Engine, *statements: sql.Composable) -> None:
    """In one transaction."""
    transact(engine, lambda connection: execute(connection, *statements))
