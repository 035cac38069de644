"""Prepares the database: an embedded server where none listens, the database, its tables, newer migrations.

Run: python init_database.py [--metabase | --status | --stop | --reset]. Reads `config.yaml` (section database),
PERPCAST_DB_PASSWORD and PERPCAST_BI_PASSWORD; writes the tables, the views of the dashboards and their role, and below
`.perpcast/` the embedded server's data and password. With --metabase also Metabase's own database, and `metabase/.env`.
"""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

import click
from dotenv import dotenv_values

from perpcast.command_line import connect_database, database_address, open_database, secret, stage
from perpcast.config import Settings
from perpcast.database import (
    Database,
    embedded_server,
    find_listener,
    make_bi_role,
    make_metabase_database,
    read_row_counts,
    reset,
    schema_version,
    stop_server,
)
from perpcast.errors import DatabaseUnavailableError

FOLDER = "metabase"  # whose `.env` compose reads
# What the dashboards need and a person need not think of.
GENERATED = ("MB_ENCRYPTION_SECRET_KEY", "METABASE_DB_PASSWORD", "METABASE_ADMIN_PASSWORD", "PERPCAST_BI_PASSWORD")
ADMIN_EMAIL = "admin@localhost.localdomain"

EXAMPLES = """
\b
Examples:
  python init_database.py               start and prepare; safe to repeat
  python init_database.py --metabase    and what Metabase needs: its database, roles, secrets
  python init_database.py --status      what runs and what it holds; starts nothing
  python init_database.py --stop        end the embedded server; the data stay
  python init_database.py --reset       drop all tables and make them anew; asks first
"""


@click.command(epilog=EXAMPLES)
@click.option("--metabase", "for_metabase", is_flag=True, help="Also what Metabase needs; writes metabase/.env.")
@click.option("--status", "show_status", is_flag=True, help="Show what runs and what it holds.")
@click.option("--stop", "end_server", is_flag=True, help="End the embedded server; the data stay.")
@click.option("--reset", "drop_tables", is_flag=True, help="Drop all tables with their data; asks first.")
@stage
def main(settings: Settings, for_metabase: bool, show_status: bool, end_server: bool, drop_tables: bool) -> None:
    """Prepare the PostgreSQL database that every stage uses."""
    if for_metabase + show_status + end_server + drop_tables > 1:
        raise click.UsageError("--metabase, --status, --stop and --reset exclude each other")
    if end_server:
        stop(settings)
    elif show_status:
        status(settings)
    elif drop_tables:
        reset_tables(settings)
    else:
        with open_database(settings, initialize=True) as engine:
            click.echo(f"{database_address(settings)} is ready, schema version {schema_version(engine)}")
            if for_metabase:
                prepare_metabase(settings, engine)
                return
            password = secret(settings, "PERPCAST_BI_PASSWORD")
            if password is not None:
                make_bi_role(engine, password)
            click.echo("next: python download_data.py")


def prepare_metabase(settings: Settings, engine: Database) -> None:
    """The role that sees the views, Metabase's own database with its role, and `metabase/.env` with all secrets."""
    path = settings.path(FOLDER, ".env")
    values, new = complete_environment(settings, path)
    make_bi_role(engine, values["PERPCAST_BI_PASSWORD"])
    make_metabase_database(engine, values["METABASE_DB_PASSWORD"])
    write_environment(path, new)
    click.echo(f"Metabase's own database and two roles are ready; secrets: {path}")
    click.echo("next: docker compose up -d (in the folder metabase), then: python -m metabase provision")


def complete_environment(settings: Settings, path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Everything that Metabase needs, and the part of it that the file lacks: found elsewhere, or generated.

    The environment comes first, as for docker compose.
    """
    known = {key: value for key, value in dotenv_values(path).items() if value}
    values = {
        "METABASE_DB_HOST": settings.database.host,
        "METABASE_DB_PORT": str(settings.database.port),
        "METABASE_ADMIN_EMAIL": ADMIN_EMAIL,
        **{name: secrets.token_hex(16) for name in GENERATED},
    }
    for key in values:
        values[key] = secret(settings, key, FOLDER) or values[key]
    return values, {key: value for key, value in values.items() if key not in known}


def write_environment(path: Path, new: Mapping[str, str]) -> None:
    """Adds lines to the file, which nobody else can read; nothing of it is changed, and it is never half written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    before += "" if before.endswith("\n") or not before else "\n"
    aside = path.with_suffix(".part")
    aside.unlink(missing_ok=True)
    with os.fdopen(os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
        file.write(before + "".join(f"{key}={value}\n" for key, value in new.items()))
    aside.replace(path)


def stop(settings: Settings) -> None:
    """Ends this clone's embedded server, and no other."""
    stopped = stop_server(settings.path(settings.database.directory))
    click.echo("the embedded server has ended" if stopped else "no embedded server of this clone is running")


def status(settings: Settings) -> None:
    """What listens, what it holds."""
    address = database_address(settings)
    server = embedded_server(settings.path(settings.database.directory))
    if server is not None:
        click.echo(f"embedded server: port {server.port}, process {server.pid}, data in {server.data}")
    found = find_listener(address.host, address.port)
    if found != "postgres":
        holder = "nothing listens" if found == "nothing" else "another program listens"
        click.echo(f"{address.host}:{address.port}: {holder}")
        return
    if server is None:
        click.echo(f"{address.host}:{address.port}: a PostgreSQL that is not this clone's embedded server")
    with connect_database(settings) as engine:
        click.echo(f"{address}: schema version {schema_version(engine)}")
        for table, rows in read_row_counts(engine).items():
            click.echo(f"  {table:<24}{rows:>14,} rows")


def reset_tables(settings: Settings) -> None:
    """Drops our tables after a question."""
    address = database_address(settings)
    if find_listener(address.host, address.port) == "nothing":
        raise DatabaseUnavailableError(f"{address}: no server runs, nothing to reset; run: python init_database.py")
    click.confirm(f"Drop every Perpcast table in {address} with all candles, datasets and journals?", abort=True)
    with connect_database(settings, create=True) as engine:
        reset(engine)
        click.echo(f"{address}: the tables are empty")


if __name__ == "__main__":
    main()
