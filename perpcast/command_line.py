"""The door: what every script shares. Configuration, secrets, error messages and exit codes; nothing below reads these.

Exit codes: 0 done, 2 wrong use or configuration, 1 failed; the cause and the next step are on the last lines.
"""

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from types import FrameType
from typing import Any

import click
from dotenv import dotenv_values
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table

from perpcast.config import Settings, load_settings
from perpcast.database import (
    Database,
    DatabaseAddress,
    check_schema,
    create_database,
    ensure_server,
    migrate,
    open_engine,
    plain_errors,
    refresh_bi,
)
from perpcast.errors import PerpcastError
from perpcast.kill_point import arm
from perpcast.timeframe import parse_time, to_ms

ROOT = Path(__file__).resolve().parent.parent
console = Console(highlight=False, soft_wrap=not sys.stdout.isatty())


def stage(function: Callable[..., None]) -> Callable[..., None]:
    """Gives a click command its `--config` option and hands it `settings`; turns our errors into messages."""

    @click.option(
        "--config",
        "config_paths",
        type=click.Path(path_type=Path),
        multiple=True,
        default=[ROOT / "config.yaml"],
        show_default="config.yaml",
        help="Configuration file; given again, each later file overrides keys of the ones before.",
    )
    @wraps(function)
    def command(config_paths: tuple[Path, ...], **options: Any) -> None:
        _arm_kill_point()
        with clean_exit():
            function(settings=load_settings(config_paths), **options)

    return command


def show_table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """A table whose first column names things and whose others are numbers."""
    table = Table(Column(titles[0], no_wrap=True), *(Column(title, justify="right") for title in titles[1:]))
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _arm_kill_point() -> None:
    """PERPCAST_KILL_POINT=NAME:N ends this process when it passes that place for the N-th time: for the tests."""
    name, _, passing = os.environ.get("PERPCAST_KILL_POINT", "").partition(":")
    if name:
        arm(name, int(passing))


@contextmanager
def clean_exit() -> Iterator[None]:
    """Ends the process with a message instead of a traceback for whatever can be foreseen; so do SIGINT and SIGTERM."""
    terminated = False

    def terminate(number: int, frame: FrameType | None) -> None:
        nonlocal terminated
        terminated = True
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # started in the background by a script
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGINT)  # an event loop ends its tasks in order on this one alone

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    except PerpcastError as error:
        _stop(str(error), error.exit_code)
    except KeyboardInterrupt:
        how, exit_code = ("terminated", 143) if terminated else ("interrupted", 130)
        _stop(f"{how}; run the same command again to go on", exit_code)
    except BrokenPipeError:  # whoever read our output has seen enough, as in `… | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.errno is None:
            raise
        _stop(f"{error.filename or 'system'}: {error.strerror}", 1)
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(message: str, exit_code: int) -> None:
    print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(exit_code)


def secret(settings: Settings, name: str, *folders: str) -> str | None:
    """A secret from the environment, else from `.env` in these folders, then beside the configuration; None without."""
    files = [settings.path(folder, ".env") for folder in (*folders, "")]
    return os.environ.get(name) or next((found for file in files if (found := dotenv_values(file).get(name))), None)


def database_address(settings: Settings) -> DatabaseAddress:
    """Where the configuration says that PostgreSQL is; the password from the environment, if it has one."""
    database = settings.database
    password = secret(settings, "PERPCAST_DB_PASSWORD")
    return DatabaseAddress(database.host, database.port, database.name, database.user, password)


@contextmanager
def connect_database(settings: Settings, *, create: bool = False) -> Iterator[Database]:
    """A connection to the configured database, whatever it holds; an embedded server is started where none listens.

    Inside, a lost connection or a full disk becomes a message. `create` makes the database itself where it is missing.
    """
    address = ensure_server(database_address(settings), settings.path(settings.database.directory))
    with plain_errors(address):
        if create:
            create_database(address)
        engine = open_engine(address)
        try:
            yield engine
        finally:
            engine.dispose()


@contextmanager
def open_database(settings: Settings, *, initialize: bool = False) -> Iterator[Database]:
    """The configured database with the schema that this program was written for.

    `initialize` makes what is missing (the database, its tables, newer migrations) instead of asking for it.
    """
    with connect_database(settings, create=initialize) as engine:
        if initialize:
            migrate(engine)
        check_schema(engine)
        yield engine


def refresh_dashboards(database: Database, *written: str) -> None:
    """Brings what the dashboards show of these tables up to date, where our role may."""
    with console.status("bringing the dashboards' summaries up to date"):
        has_refreshed = refresh_bi(database, *written)
    if not has_refreshed:
        notice(
            "the dashboards' summaries stay as they were: only the owner of the tables may bring them up to date; "
            "what is stored is complete"
        )


def instant(expected: str) -> Callable[[click.Context, click.Parameter, str | None], int | None]:
    """A callback for a click option that takes a time of UTC, in milliseconds; `expected` is how one looks."""

    def to_instant(context: click.Context, parameter: click.Parameter, text: str | None) -> int | None:
        try:
            return None if text is None else to_ms(parse_time(text))
        except ValueError:
            raise click.BadParameter(f"expected {expected}, received {text!r}") from None

    return to_instant


def notice(text: str) -> None:
    """Something that a person should know meanwhile, on a line of its own."""
    console.print(f"note: {text}", markup=False)


@contextmanager
def progress_bar(title: str) -> Iterator[Callable[[int, int], None]]:
    """Hands out `on_progress(done, total)`: a bar with ETA on a terminal, a line every tenth elsewhere."""
    if not sys.stdout.isatty():
        yield _line_printer(title)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _line_printer(title: str) -> Callable[[int, int], None]:
    printed = 0

    def on_progress(done: int, total: int) -> None:
        nonlocal printed
        tenth = done * 10 // max(total, 1)
        if tenth > printed:
            printed = tenth
            print(f"{title}: {done:,} of {total:,}", flush=True)

    return on_progress
