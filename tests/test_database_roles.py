"""A role that may read some tables for a while: what it can do, by attempts, and that nothing of it stays."""

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import psycopg2
import pytest
from sqlalchemy import Engine, create_engine, text

from perpcast.database import grant_reader, revoke_reader
from perpcast.errors import DatabaseUnavailableError

ROLE, PASSWORD = "perpcast_reader_test", 'it\'s "quoted" \\ 100%'
TABLES = ("raw_market_data", "schema_migrations")
LATER = datetime.now(UTC) + timedelta(hours=1)


@pytest.fixture
def reader(database: Engine) -> Iterator[Engine]:
    grant_reader(database, ROLE, PASSWORD, TABLES, until=LATER)
    yield database
    revoke_reader(database, ROLE)


def connect(database: Engine, role: str = ROLE, password: str = PASSWORD) -> psycopg2.extensions.connection:
    url = database.url
    return psycopg2.connect(host=url.host, port=url.port, dbname=url.database, user=role, password=password)


def attempt(database: Engine, statement: str) -> list[tuple]:
    connection = connect(database)
    try:
        with connection.cursor() as cursor:
            cursor.execute(statement)
            return cursor.fetchall()
    finally:
        connection.close()


def test_reader_reads_its_tables(reader: Engine) -> None:
    assert attempt(reader, "SELECT count(*) FROM raw_market_data") == [(0,)]
    assert attempt(reader, "SELECT max(version) > 0 FROM schema_migrations") == [(True,)]


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT * FROM events",
        "SELECT * FROM positions",
        "SELECT rolpassword FROM pg_authid",
        "DELETE FROM raw_market_data",
        "SET default_transaction_read_only = off; DELETE FROM raw_market_data",
        "SET default_transaction_read_only = off; CREATE TABLE mine (a int)",
        "SET default_transaction_read_only = off; CREATE ROLE other",
        "COPY raw_market_data TO PROGRAM 'cat'",
    ],
)
def test_reader_can_do_nothing_else(reader: Engine, statement: str) -> None:
    with pytest.raises((psycopg2.errors.InsufficientPrivilege, psycopg2.errors.ReadOnlySqlTransaction)):
        attempt(reader, statement)


def test_reader_of_yesterday_is_refused(database: Engine) -> None:
    grant_reader(database, ROLE, PASSWORD, TABLES, until=datetime.now(UTC) - timedelta(seconds=1))
    try:
        with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
            connect(database)
    finally:
        revoke_reader(database, ROLE)


def test_second_grant_replaces_password_and_rights(reader: Engine) -> None:
    grant_reader(reader, ROLE, "another", ("schema_migrations",), until=LATER)
    with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
        connect(reader)
    connection = connect(reader, password="another")
    try:
        with connection.cursor() as cursor, pytest.raises(psycopg2.errors.InsufficientPrivilege):
            cursor.execute("SELECT * FROM raw_market_data")
    finally:
        connection.close()


def test_revoked_reader_is_thrown_out_and_leaves_nothing(database: Engine) -> None:
    grant_reader(database, ROLE, PASSWORD, TABLES, until=LATER)
    connection = connect(database)
    assert revoke_reader(database, ROLE)
    assert not revoke_reader(database, ROLE)
    with pytest.raises((psycopg2.OperationalError, psycopg2.InterfaceError)), connection.cursor() as cursor:
        cursor.execute("SELECT 1")
    with pytest.raises(psycopg2.OperationalError):
        connect(database)
    with database.connect() as ours:
        assert not ours.execute(text("SELECT 1 FROM pg_roles WHERE rolname = :role"), {"role": ROLE}).all()


def test_who_may_not_make_roles_is_told_what_to_do(database: Engine) -> None:
    with database.begin() as connection:
        connection.execute(text("CREATE ROLE perpcast_plain_test LOGIN PASSWORD 'plain'"))
    theirs = create_engine(database.url.set(username="perpcast_plain_test", password="plain"))
    try:
        with pytest.raises(DatabaseUnavailableError, match=r"may not make a role that only reads.* CREATEROLE"):
            grant_reader(theirs, ROLE, "x", TABLES, until=LATER)
    finally:
        theirs.dispose()
        with database.begin() as connection:
            connection.execute(text("DROP ROLE perpcast_plain_test"))


def test_owner_who_is_no_superuser_can_give_and_take(database: Engine) -> None:
    """What another machine's sessions of the role could still read after it was taken: nothing."""
    name = database.url.database
    with database.begin() as connection:
        connection.execute(text("CREATE ROLE perpcast_owner_test LOGIN CREATEROLE PASSWORD 'owner'"))
        connection.execute(text(f"ALTER DATABASE {name} OWNER TO perpcast_owner_test"))
        connection.execute(text("ALTER SCHEMA public OWNER TO perpcast_owner_test"))
        for table in connection.execute(text("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")).scalars():
            connection.execute(text(f"ALTER TABLE {table} OWNER TO perpcast_owner_test"))
    owner = create_engine(database.url.set(username="perpcast_owner_test", password="owner"))
    try:
        grant_reader(owner, ROLE, PASSWORD, TABLES, until=LATER)
        session = connect(database)
        with session.cursor() as cursor:
            cursor.execute("SELECT count(*) FROM raw_market_data")
            session.commit()
            assert revoke_reader(owner, ROLE)
            with pytest.raises(psycopg2.Error):
                cursor.execute("SELECT count(*) FROM raw_market_data")
        session.close()
        with pytest.raises(psycopg2.OperationalError):
            connect(database)
    finally:
        owner.dispose()
        with database.begin() as connection:
            connection.execute(text(f"ALTER DATABASE {name} OWNER TO CURRENT_USER"))
            connection.execute(text("REASSIGN OWNED BY perpcast_owner_test TO CURRENT_USER"))
            connection.execute(text("DROP OWNED BY perpcast_owner_test"))
            connection.execute(text("DROP ROLE perpcast_owner_test"))
