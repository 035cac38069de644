"""The schema's history: numbered migrations, each in one transaction, safe to repeat.

An empty database gets the tables as `schema.py` declares them, all migrations marked as done; an older one gets the
migrations that it lacks. Version numbers only rise, and a migration that has landed is never edited. The views of the
dashboards are no history: they are dropped before a migration and made as `bi.py` declares them after the last.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, Engine, func, inspect, select, text

from perpcast.database.bi import create_views, drop_views
from perpcast.database.schema import candle_revisions, metadata, processed_months, schema_migrations
from perpcast.errors import DatabaseUnavailableError

_LOCK = 0x70657270  # "perp": one migrating or resetting command at a time


@dataclass(frozen=True)
class Migration:
    """One step: what it is called, and what it does to a database of the version before."""

    name: str
    apply: Callable[[Connection], None]


def _add_revisions(connection: Connection) -> None:
    candle_revisions.create(connection)
    connection.execute(text("ALTER TABLE instruments ADD COLUMN delivery_time timestamptz"))


def _add_champions(connection: Connection) -> None:
    """Nothing could promote before: a row that was marked as champion by hand has no evidence behind it."""
    for statement in (
        "UPDATE model_metadata SET state = 'candidate' WHERE state = 'champion'",
        "ALTER TABLE model_metadata ADD COLUMN task_kind text "
        "GENERATED ALWAYS AS (task #>> '{targets,0,kind}') STORED NOT NULL",
        "CREATE UNIQUE INDEX one_champion ON model_metadata (task_kind) WHERE state = 'champion'",
    ):
        connection.execute(text(statement))


def _add_index_of_signals(connection: Connection) -> None:
    connection.execute(
        text(
            "CREATE INDEX signals_above_threshold ON signals (run, open_time) "
            "WHERE reason IS DISTINCT FROM 'not above the threshold'"
        )
    )


# Number = place in the list, from 1. The first is the schema itself.
MIGRATIONS: tuple[Migration, ...] = (
    Migration("tables of the first release", metadata.create_all),
    Migration("revisions of candles, and when a contract ends", _add_revisions),
    Migration("what processed rows were made of", processed_months.create),
    Migration("one champion for each kind of task", _add_champions),
    Migration("views of the dashboards, and the index that they ask for", _add_index_of_signals),
)


def schema_version(engine: Engine) -> int:
    """The newest migration in the database, 0 where it holds none of our tables."""
    with engine.connect() as connection:
        return _version(connection)


def check_schema(engine: Engine, migrations: Sequence[Migration] = MIGRATIONS) -> None:
    """Raises DatabaseUnavailableError unless the database has exactly the schema that this program was written for."""
    _check_not_newer(found := schema_version(engine), len(migrations))
    if found < len(migrations):
        state = "holds no tables yet" if found == 0 else f"has schema version {found}, expected {len(migrations)}"
        raise DatabaseUnavailableError(f"the database {engine.url.database} {state}; run: python init_database.py")


def migrate(engine: Engine, migrations: Sequence[Migration] = MIGRATIONS) -> list[str]:
    """Brings the schema to the newest version; returns the names of the migrations applied, none the second time."""
    applied: list[str] = []
    while True:
        with engine.begin() as connection:
            connection.execute(text(f"SELECT pg_advisory_xact_lock({_LOCK})"))
            version = _version(connection)
            _check_not_newer(version, len(migrations))
            if version == len(migrations):
                return applied
            if version == 0:
                _check_empty(connection)
                metadata.create_all(connection)
                done = list(range(1, len(migrations) + 1))
            else:
                connection.execute(text("SET LOCAL lock_timeout = '30s'"))
                drop_views(connection)
                migrations[version].apply(connection)
                done = [version + 1]
            if done[-1] == len(migrations):
                create_views(connection)
            rows = [{"version": number, "name": migrations[number - 1].name} for number in done]
            connection.execute(schema_migrations.insert(), rows)
        applied += [str(row["name"]) for row in rows]


def reset(engine: Engine) -> None:
    """Drops our tables and views with all they hold, and makes them anew; other tables stay."""
    with engine.begin() as connection:
        connection.execute(text(f"SELECT pg_advisory_xact_lock({_LOCK})"))
        if _version(connection):
            drop_views(connection)
            metadata.drop_all(connection)
    migrate(engine)


def read_row_counts(engine: Engine) -> dict[str, int]:
    """Rows of each of our tables that exists, in the order of the schema."""
    with engine.connect() as connection:
        present = set(inspect(connection).get_table_names())
        tables = [
            table for table in metadata.tables.values() if table.name in present and table is not schema_migrations
        ]
        return {
            table.name: connection.execute(select(func.count()).select_from(table)).scalar_one() for table in tables
        }


def _version(connection: Connection) -> int:
    if not inspect(connection).has_table(schema_migrations.name):
        return 0
    versions = connection.execute(select(schema_migrations.c.version)).scalars().all()
    return max(versions, default=0)


def _check_not_newer(found: int, expected: int) -> None:
    if found > expected:
        raise DatabaseUnavailableError(
            f"the database has schema version {found}, this program knows {expected}: it was made by a newer Perpcast; "
            "update this clone, or name another database in database.name"
        )


def _check_empty(connection: Connection) -> None:
    foreign = sorted(set(inspect(connection).get_table_names()) & set(metadata.tables))
    if foreign:
        raise DatabaseUnavailableError(
            f"the database already holds tables that are not ours: {', '.join(foreign[:5])}; "
            "name an empty database in database.name"
        )
