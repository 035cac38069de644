"""Where a database is and who asks for it, and why a connection to it did not come about."""

from dataclasses import dataclass, field, replace

import psycopg2
import psycopg2.extensions
from psycopg2 import sql
from sqlalchemy import URL

from perpcast.errors import DatabaseUnavailableError


@dataclass(frozen=True)
class DatabaseAddress:
    """Where a database is and who asks; the password is never shown. None leaves it to `.pgpass` or to trust."""

    host: str
    port: int
    name: str
    user: str
    password: str | None = field(default=None, repr=False)

    def __str__(self) -> str:
        return f"{self.user}@{self.host}:{self.port}/{self.name}"

    def url(self) -> URL:
        """The address as SQLAlchemy takes it."""
        return URL.create("postgresql+psycopg2", self.user, self.password, self.host, self.port, self.name)


def create_database(address: DatabaseAddress) -> None:
    """Creates the database of that name where it is missing. Raises DatabaseUnavailableError."""
    try:
        _connect(address).close()
        return
    except psycopg2.OperationalError as error:
        if f'database "{address.name}" does not exist' not in str(error):
            raise refusal(address, str(error)) from None
    try:
        connection = _connect(replace(address, name="postgres"))
    except psycopg2.OperationalError as error:
        raise refusal(address, str(error)) from None
    try:
        connection.autocommit = True  # CREATE DATABASE cannot run in a transaction
        with connection.cursor() as cursor:
            cursor.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(address.name)))
    except (psycopg2.errors.DuplicateDatabase, psycopg2.errors.UniqueViolation):
        pass  # another command was faster
    except psycopg2.errors.InsufficientPrivilege:
        raise DatabaseUnavailableError(
            f"{address}: there is no such database, and user {address.user} may not create it; "
            f"create it: CREATE DATABASE {address.name} OWNER {address.user}"
        ) from None
    finally:
        connection.close()


def _connect(address: DatabaseAddress) -> psycopg2.extensions.connection:
    return psycopg2.connect(
        host=address.host,
        port=address.port,
        dbname=address.name,
        user=address.user,
        password=address.password,
        connect_timeout=10,
    )


def refusal(address: DatabaseAddress, said: str) -> DatabaseUnavailableError:
    """Why no connection came about. libpq gives text only, no code: a server in another language is quoted as it is."""
    if "password authentication failed" in said or "no password supplied" in said:
        return DatabaseUnavailableError(
            f"PostgreSQL on {address.host}:{address.port} refuses the password of user {address.user}; set "
            "PERPCAST_DB_PASSWORD in the environment or in .env; if that server is not yours, set another database.port"
        )
    if f'database "{address.name}" does not exist' in said:
        return DatabaseUnavailableError(f"{address}: there is no such database yet; run: python init_database.py")
    return DatabaseUnavailableError(f"{address}: {first_line(said)}")


def first_line(said: object) -> str:
    """The first line of what PostgreSQL said; the rest repeats the statement."""
    lines = str(said).strip().splitlines()
    return lines[0].strip() if lines else "no reason given"
