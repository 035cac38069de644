"""Migrations: from nothing, from an older version, twice, at the same time, and refused where they do not fit."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Connection, inspect, text
from sqlalchemy.exc import DBAPIError

from perpcast.database import (
    Database,
    DatabaseAddress,
    check_schema,
    migrate,
    open_engine,
    read_row_counts,
    reset,
    schema_version,
)
from perpcast.database.migrations import MIGRATIONS, Migration
from perpcast.database.schema import INDICATORS, metadata
from perpcast.errors import DatabaseUnavailableError
from perpcast.features import indicators


def add_column(connection: Connection) -> None:
    connection.execute(text("ALTER TABLE candle_gaps ADD COLUMN note text"))


def fail(connection: Connection) -> None:
    connection.execute(text("ALTER TABLE candle_gaps ADD COLUMN half text"))
    raise RuntimeError("killed half-way")


NOW = len(MIGRATIONS)
NEXT = Migration("a note on gaps", add_column)
BROKEN = Migration("breaks", fail)


@pytest.fixture
def empty(empty_database: DatabaseAddress) -> Iterator[Database]:
    engine = open_engine(empty_database)
    yield engine
    engine.dispose()


def columns(engine: Database, table: str) -> set[str]:
    return {column["name"] for column in inspect(engine).get_columns(table)}


def test_empty_database_gets_every_table_once(empty: Database) -> None:
    assert schema_version(empty) == 0
    with pytest.raises(DatabaseUnavailableError, match=r"holds no tables yet; run: python init_database\.py"):
        check_schema(empty)
    assert migrate(empty) == [migration.name for migration in MIGRATIONS]
    assert migrate(empty) == []
    check_schema(empty)
    assert schema_version(empty) == len(MIGRATIONS)
    assert set(inspect(empty).get_table_names()) == set(metadata.tables)
    assert set(read_row_counts(empty).values()) == {0}


SHAPE = {
    "columns": "SELECT table_name, column_name, data_type, is_nullable, column_default FROM information_schema.columns "
    "WHERE table_schema = 'public'",
    "constraints": "SELECT conrelid::regclass::text, conname, pg_get_constraintdef(oid) FROM pg_constraint "
    "WHERE connamespace = 'public'::regnamespace",
    "indexes": "SELECT tablename, indexname, indexdef FROM pg_indexes WHERE schemaname IN ('public', 'bi')",
    "views": "SELECT relname, relkind, pg_get_viewdef(oid), obj_description(oid) FROM pg_class "
    "WHERE relnamespace = 'bi'::regnamespace AND relkind IN ('v', 'm')",
}


def shape(engine: Database) -> dict[str, list[str]]:
    """Columns, constraints, indexes and views, without regard to the order of columns."""
    with engine.connect() as connection:
        return {name: sorted(repr(row) for row in connection.execute(text(query))) for name, query in SHAPE.items()}


def test_schema_of_the_first_release_migrated_equals_a_fresh_one(empty: Database, database: Database) -> None:
    with empty.begin() as connection:
        connection.execute(text((Path(__file__).parent / "schema_1.sql").read_text()))
        connection.execute(text("INSERT INTO instruments VALUES ('A', 'Trading', 1, 1, 1, 1, 1, now(), 480, now())"))
    assert migrate(empty) == [migration.name for migration in MIGRATIONS[1:]]
    assert shape(empty) == shape(database)
    assert read_row_counts(empty)["instruments"] == 1


def test_models_of_the_first_release_get_their_kind_and_no_champion_without_evidence(empty: Database) -> None:
    with empty.begin() as connection:
        connection.execute(text((Path(__file__).parent / "schema_1.sql").read_text()))
        for model_id, kind, state in (
            ("a", "regression", "champion"),
            ("b", "regression", "champion"),
            ("c", "classification", "retired"),
        ):
            connection.execute(
                text(
                    "INSERT INTO model_metadata VALUES (:model_id, now(), CAST(:task AS jsonb), 'tft', '{}', 'd1', "
                    "'abc', NULL, '{}', '{}', 'trained_model', '00', :state)"
                ),
                {"model_id": model_id, "task": json.dumps({"targets": [{"kind": kind}]}), "state": state},
            )
    migrate(empty)
    with empty.connect() as connection:
        found = connection.execute(text("SELECT model_id, task_kind, state FROM model_metadata ORDER BY model_id"))
        assert found.all() == [
            ("a", "regression", "candidate"), ("b", "regression", "candidate"), ("c", "classification", "retired"),
        ]  # fmt: skip


def test_every_time_is_a_timestamptz(database: Database) -> None:
    """A time without a zone would change its meaning with the session's setting."""
    query = text("SELECT table_name || '.' || column_name FROM information_schema.columns WHERE data_type LIKE :kind")
    with database.connect() as connection:
        assert connection.execute(query, {"kind": "timestamp without%"}).all() == []
        assert len(connection.execute(query, {"kind": "timestamp with %"}).all()) > 10


def test_indicators_are_the_registered_ones() -> None:
    assert indicators.COLUMNS == INDICATORS
    assert len(INDICATORS) == len(set(INDICATORS)) == 49


def test_older_schema_is_refused_then_migrated_and_keeps_its_rows(database: Database) -> None:
    with database.begin() as connection:
        connection.execute(text("INSERT INTO candle_gaps VALUES ('BTCUSDT', now(), 3, 'exchange_outage', NULL)"))
    newer = (*MIGRATIONS, NEXT)
    with pytest.raises(
        DatabaseUnavailableError, match=rf"has schema version {NOW}, expected {NOW + 1}; run: python init_database"
    ):
        check_schema(database, newer)
    assert migrate(database, newer) == ["a note on gaps"]
    assert migrate(database, newer) == []
    check_schema(database, newer)
    assert "note" in columns(database, "candle_gaps")
    assert read_row_counts(database)["candle_gaps"] == 1


def test_views_follow_a_migration_that_changes_what_they_read(database: Database) -> None:
    def rebuild(connection: Connection) -> None:
        connection.execute(text("ALTER TABLE candle_gaps ALTER COLUMN bars TYPE bigint"))

    def views() -> list[str]:
        return shape(database)["views"]

    before = views()
    with (
        pytest.raises(DBAPIError, match="cannot alter type of a column used by a view"),
        database.begin() as connection,
    ):
        rebuild(connection)
    assert migrate(database, (*MIGRATIONS, Migration("longer gaps", rebuild))) == ["longer gaps"]
    assert len(views()) == len(before) > 20
    with pytest.raises(RuntimeError, match="killed half-way"):
        migrate(database, (*MIGRATIONS, Migration("longer gaps", rebuild), BROKEN))
    assert len(views()) == len(before)


def test_newer_schema_is_refused_and_left_alone(database: Database) -> None:
    migrate(database, (*MIGRATIONS, NEXT))
    for attempt in (check_schema, migrate):
        with pytest.raises(
            DatabaseUnavailableError, match=f"schema version {NOW + 1}, this program knows {NOW}: .* newer Perpcast"
        ):
            attempt(database)
    assert schema_version(database) == NOW + 1


def test_migration_that_fails_leaves_the_version_before_and_can_be_repeated(database: Database) -> None:
    with pytest.raises(RuntimeError, match="killed half-way"):
        migrate(database, (*MIGRATIONS, NEXT, BROKEN))
    assert schema_version(database) == NOW + 1
    assert "half" not in columns(database, "candle_gaps")
    assert migrate(database, (*MIGRATIONS, NEXT, Migration("mended", lambda connection: None))) == ["mended"]


def test_two_commands_migrate_at_the_same_time(empty: Database) -> None:
    applied: list[list[str]] = []
    threads = [threading.Thread(target=lambda: applied.append(migrate(empty))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(applied, key=len) == [[], [], [], [migration.name for migration in MIGRATIONS]]


def test_tables_of_somebody_else_are_not_taken_over(empty: Database) -> None:
    with empty.begin() as connection:
        connection.execute(text("CREATE TABLE orders (mine int)"))
    with pytest.raises(DatabaseUnavailableError, match="already holds tables that are not ours: orders"):
        migrate(empty)
    with pytest.raises(DatabaseUnavailableError, match="not ours"):
        reset(empty)
    assert columns(empty, "orders") == {"mine"}


@pytest.mark.parametrize("migrations", [MIGRATIONS, (*MIGRATIONS, NEXT)], ids=["current", "newer"])
def test_reset_empties_our_tables_and_leaves_others(database: Database, migrations: tuple[Migration, ...]) -> None:
    migrate(database, migrations)
    with database.begin() as connection:
        connection.execute(text("INSERT INTO funding_rates VALUES ('BTCUSDT', now(), 0.0001)"))
        connection.execute(text("CREATE TABLE diary (mine int)"))
    before = shape(database)["views"]
    reset(database)
    check_schema(database)
    assert shape(database)["views"] == before
    assert read_row_counts(database)["funding_rates"] == 0
    assert columns(database, "diary") == {"mine"}
