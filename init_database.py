"""Prepares the database: an embedded server where none listens, the database, its tables, newer migrations.

Run: python init_database.py [--status | --stop | --reset]. Reads `config.yaml` (section database) and
PERPCAST_DB_PASSWORD; writes the tables, and below `.perpcast/` the embedded server's data and password.
"""

import click

from perpcast.command_line import connect_database, database_address, open_database, stage
from perpcast.config import Settings
from perpcast.database import embedded_server, find_listener, read_row_counts, reset, schema_version, stop_server
from perpcast.errors import DatabaseUnavailableError

EXAMPLES = """
\b
Examples:
  python init_database.py             start and prepare; safe to repeat
  python init_database.py --status    what runs and what it holds; starts nothing
  python init_database.py --stop      end the embedded server; the data stay
  python init_database.py --reset     drop all tables and make them anew; asks first
"""


@click.command(epilog=EXAMPLES)
@click.option("--status", "show_status", is_flag=True, help="Show what runs and what it holds.")
@click.option("--stop", "end_server", is_flag=True, help="End the embedded server; the data stay.")
@click.option("--reset", "drop_tables", is_flag=True, help="Drop all tables with their data; asks first.")
@stage
def main(settings: Settings, show_status: bool, end_server: bool, drop_tables: bool) -> None:
    """Prepare the PostgreSQL database that every stage uses."""
    if show_status + end_server + drop_tables > 1:
        raise click.UsageError("--status, --stop and --reset exclude each other")
    if end_server:
        stop(settings)
    elif show_status:
        status(settings)
    elif drop_tables:
        reset_tables(settings)
    else:
        with open_database(settings, initialize=True) as engine:
            click.echo(f"{database_address(settings)} is ready, schema version {schema_version(engine)}")
            click.echo("next: python download_data.py")


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
