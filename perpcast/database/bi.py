"""What the dashboards read: the schema `bi` with its views, the roles that see it, and a question's answer.

The views are declared in `bi_views.py` and made anew after every migration. The materialized ones stand still until
`refresh_bi`, which the stages that write call at their end.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import psycopg2
import psycopg2.extensions
from psycopg2 import sql
from sqlalchemy import Connection, Engine, text

from perpcast.database.address import first_line
from perpcast.database.bi_views import VIEWS, View
from perpcast.database.engine import execute, transact
from perpcast.errors import DatabaseUnavailableError

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = "bi"
BI_ROLE = "perpcast_bi"
METABASE = "metabase"  # its application database, and the role that owns it

BI_CONNECTIONS = 12
_ANSWER_SECONDS = 30  # of a question; Metabase itself waits for minutes

# By this comment the schema is known as ours, to be dropped and made anew.
_OURS = "Perpcast: what the dashboards read; made anew by init_database.py, keep nothing of your own here"

# By this one Metabase's role.
_OUR_ROLE = "Perpcast: owns the database of the Metabase of metabase/docker-compose.yml"

# What a session of the role starts with; its rights, not these, are what it cannot change.
_BI_SETTINGS = {
    "default_transaction_read_only": "on",
    "statement_timeout": f"{_ANSWER_SECONDS}s",
    "idle_in_transaction_session_timeout": "60s",
    "search_path": SCHEMA,
    "TimeZone": "UTC",
}

_ROOM = sql.SQL("SET LOCAL work_mem = '64MB'")  # sorts of millions of rows


def create_views(connection: Connection) -> None:
    """Makes the schema `bi` anew within the caller's transaction; its role, where there is one, reads it again."""
    drop_views(connection)
    schema = sql.Identifier(SCHEMA)
    execute(
        connection,
        sql.SQL("CREATE SCHEMA {}").format(schema),
        sql.SQL("COMMENT ON SCHEMA {} IS {}").format(schema, sql.Literal(_OURS)),
    )
    for view in VIEWS:
        name = sql.Identifier(SCHEMA, view.name)
        kind = sql.SQL("MATERIALIZED VIEW" if view.key else "VIEW")
        execute(
            connection,
            sql.SQL("CREATE {} {} AS {}").format(kind, name, sql.SQL(view.query)),
            sql.SQL("COMMENT ON {} {} IS {}").format(kind, name, sql.Literal(view.row)),
        )
        if view.key:  # also what a refresh beside readers needs
            columns = sql.SQL(", ").join(map(sql.Identifier, view.key))
            execute(connection, sql.SQL("CREATE UNIQUE INDEX ON {} ({})").format(name, columns))
    if _role_exists(connection, BI_ROLE):
        _grant(connection)


def drop_views(connection: Connection) -> None:
    """Within the caller's transaction: the tables beneath can be changed then.

    Raises DatabaseUnavailableError where the schema is somebody else's.
    """
    described = text("SELECT obj_description(oid) FROM pg_namespace WHERE nspname = :name")
    found = connection.execute(described, {"name": SCHEMA}).all()
    if found and found != [(_OURS,)]:
        raise DatabaseUnavailableError(
            f"the database already holds a schema {SCHEMA} that is not ours; rename it, or name another database in "
            "database.name"
        )
    execute(connection, sql.SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(sql.Identifier(SCHEMA)))


def refresh_bi(engine: Engine, *written: str) -> bool:
    """Brings the materialized views in line with the tables: those that read one of the `written` ones, or all.

    Who reads them meanwhile reads what they held before. False where our role may not: they are their owner's.
    """
    try:
        for view in VIEWS:
            if view.key and (not written or set(written) & set(view.tables)):
                transact(engine, partial(_refresh, view))
    except psycopg2.errors.InsufficientPrivilege:
        return False
    return True


def read_question(engine: Engine, query: str, parameters: Mapping[str, object]) -> "pd.DataFrame":
    """The answer to a query with named parameters (`%(symbol)s`), in a transaction that cannot write."""
    import pandas as pd

    with engine.connect() as connection:
        execute(connection, sql.SQL("SET TRANSACTION READ ONLY"))
        execute(connection, sql.SQL("SET LOCAL statement_timeout = {}").format(sql.Literal(f"{_ANSWER_SECONDS}s")))
        answer = connection.exec_driver_sql(query, dict(parameters))
        return pd.DataFrame(answer.all(), columns=list(answer.keys()))


def read_filter_values(engine: Engine) -> dict[str, list[str]]:
    """What the filters of the dashboards choose from: `symbols` and `models` by name, `runs` newest first."""
    queries = {
        "symbols": "SELECT symbol FROM bi.freshness ORDER BY symbol",
        "models": "SELECT model_id FROM bi.models ORDER BY created_at DESC, model_id",
        "runs": "SELECT run FROM bi.sessions ORDER BY last_bar DESC NULLS LAST, length(run) DESC, run DESC",
    }
    with engine.connect() as connection:
        return {name: list(connection.execute(text(query)).scalars()) for name, query in queries.items()}


def read_defaults(engine: Engine) -> dict[str, str | None]:
    """What a question is about where nothing is chosen: `model` and `run`, None where there is none."""
    with engine.connect() as connection:
        model = connection.execute(text("SELECT model_id FROM bi.present_model")).scalar_one_or_none()
        run = connection.execute(text("SELECT run FROM bi.newest_session")).scalar_one_or_none()
    return {"model": model, "run": run}


def make_bi_role(engine: Engine, password: str) -> None:
    """Makes the role that reads the views of `bi` and nothing else, or brings it in line; safe to repeat.

    Raises DatabaseUnavailableError where our own role may not make roles.
    """

    def work(connection: Connection) -> None:
        _make_role(connection, BI_ROLE, password, BI_CONNECTIONS)
        role, database = sql.Identifier(BI_ROLE), sql.Identifier(engine.url.database or "")
        for name, value in _BI_SETTINGS.items():
            execute(
                connection, sql.SQL("ALTER ROLE {} SET {} = {}").format(role, sql.Identifier(name), sql.Literal(value))
            )
        execute(
            connection,
            sql.SQL("GRANT CONNECT ON DATABASE {} TO {}").format(database, role),
            # Everybody may make temporary tables unless this is taken back; whoever runs the stages needs them.
            sql.SQL("GRANT TEMPORARY ON DATABASE {} TO CURRENT_USER").format(database),
            sql.SQL("REVOKE TEMPORARY ON DATABASE {} FROM PUBLIC").format(database),
        )
        _grant(connection)

    _with_rights(engine, BI_ROLE, lambda: transact(engine, work))


def make_metabase_database(engine: Engine, password: str) -> None:
    """Makes Metabase's own database on the same server, which nobody may enter but the role that owns it.

    Safe to repeat; what the database holds stays. Raises DatabaseUnavailableError where our own role may not, and where
    the server has a Metabase of somebody else's.
    """

    def make_role(connection: Connection) -> None:
        _check_metabase_is_ours(connection)
        _make_role(connection, METABASE, password, connections=-1)
        role = sql.Identifier(METABASE)
        execute(
            connection,
            sql.SQL("COMMENT ON ROLE {} IS {}").format(role, sql.Literal(_OUR_ROLE)),
            # Who is no superuser may give a database only to a role that he belongs to.
            sql.SQL("GRANT {} TO CURRENT_USER").format(role),
        )

    def make_database() -> None:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            known = text("SELECT 1 FROM pg_database WHERE datname = :name")
            name = sql.Identifier(METABASE)
            if connection.execute(known, {"name": METABASE}).one_or_none() is None:
                execute(connection, sql.SQL("CREATE DATABASE {} OWNER {}").format(name, name))
            execute(connection, sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(name))

    _with_rights(engine, METABASE, lambda: transact(engine, make_role))
    _with_rights(engine, METABASE, make_database)


def _check_metabase_is_ours(connection: Connection) -> None:
    """Another Metabase on the server would lose its password and its tables to ours."""
    role = text("SELECT shobj_description(oid, 'pg_authid') FROM pg_roles WHERE rolname = :name")
    owner = text("SELECT pg_get_userbyid(datdba) FROM pg_database WHERE datname = :name")
    names = {"name": METABASE}
    described, owned = (connection.execute(query, names).scalars().all() for query in (role, owner))
    if described not in ([], [_OUR_ROLE]) or (owned and (owned != [METABASE] or not described)):
        raise DatabaseUnavailableError(
            f"the server already has a role or a database {METABASE} that is not ours; use another server for Perpcast "
            "(database.port), or keep that Metabase and run: python -m metabase provision --url …"
        )


def _refresh(view: View, connection: Connection) -> None:
    name = sql.Identifier(SCHEMA, view.name)
    execute(connection, _ROOM, sql.SQL("REFRESH MATERIALIZED VIEW CONCURRENTLY {}").format(name))


def _grant(connection: Connection) -> None:
    """USAGE and SELECT, and whatever else it had in this database is taken away."""
    schema, role = sql.Identifier(SCHEMA), sql.Identifier(BI_ROLE)
    execute(
        connection,
        sql.SQL("REVOKE ALL ON ALL TABLES IN SCHEMA public FROM {}").format(role),
        sql.SQL("REVOKE ALL ON SCHEMA public FROM {}").format(role),
        sql.SQL("GRANT USAGE ON SCHEMA {} TO {}").format(schema, role),
        sql.SQL("GRANT SELECT ON ALL TABLES IN SCHEMA {} TO {}").format(schema, role),
    )


def _make_role(connection: Connection, name: str, password: str, connections: int) -> None:
    """The server is given the password as it keeps it: in no log does it stand plain."""
    role, raw = sql.Identifier(name), connection.connection.dbapi_connection
    verifier = psycopg2.extensions.encrypt_password(password, name, raw, "scram-sha-256")  # type: ignore[arg-type]
    if not _role_exists(connection, name):
        execute(connection, sql.SQL("CREATE ROLE {}").format(role))
    execute(
        connection,
        sql.SQL("ALTER ROLE {} LOGIN NOCREATEDB NOCREATEROLE CONNECTION LIMIT {} PASSWORD {}").format(
            role, sql.Literal(connections), sql.Literal(verifier)
        ),
    )


def _role_exists(connection: Connection, name: str) -> bool:
    known = connection.execute(text("SELECT 1 FROM pg_roles WHERE rolname = :name"), {"name": name})
    return known.one_or_none() is not None


def _with_rights(engine: Engine, role: str, work: Callable[[], None]) -> None:
    try:
        work()
    except psycopg2.errors.InsufficientPrivilege as error:
        raise DatabaseUnavailableError(
            f"the database role {engine.url.username} may not make the role {role}: {first_line(error)}; let an "
            f'administrator run: ALTER ROLE "{engine.url.username}" CREATEROLE CREATEDB'
        ) from None
