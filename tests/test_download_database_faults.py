"""What befalls the database while candles are loaded: a server that stops or stands still, lost replies, full disks."""

import contextlib
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from inspect import getmembers, isfunction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psycopg2
import pytest
from sqlalchemy import Connection, create_engine, text
from sqlalchemy.exc import DBAPIError, OperationalError

from perpcast.database import (
    CandleGap,
    Database,
    DatabaseAddress,
    EmbeddedServer,
    candles,
    embedded_server,
    ensure_server,
    exclusive,
    free_port,
    open_engine,
    plain_errors,
    read_candle_gaps,
    read_candle_months,
    read_candle_revisions,
    read_candle_spans,
    read_candles,
    read_flat_runs,
    read_funding_rates,
    read_instruments,
    read_missing_ranges,
    remove_server,
    replace_candle_gaps,
    stop_server,
    upsert_candles,
    upsert_funding_rates,
    upsert_instruments,
)
from perpcast.database import engine as engine_module
from perpcast.database import server as server_module
from perpcast.database.engine import transact
from perpcast.database.schema import metadata
from perpcast.download.run import WRITERS
from perpcast.errors import PerpcastError, SetupError
from perpcast.market import FundingRate, Instrument
from perpcast.simulator import faults
from perpcast.timeframe import from_ms
from tests.download_world import (
    GAPS,
    ROOT,
    START,
    STEP_MS,
    SmallExchange,
    Stage,
    Tables,
    assert_same_tables,
    execute,
    gaps_by_bar,
    overlay,
    recorded,
    small_exchange,
    stage,
    undisturbed_tables,
)
from tests.tcp_proxy import TcpProxy

PAUSE_SECONDS = 0.3

# Where a test acts in the middle of a download: places of perpcast.kill_point.
PLACES = {
    "candles": "perpcast.database.candles._AFTER_INSERT",  # copied, and not committed yet
    "gaps": "perpcast.download.run._BEFORE_CURSOR",
    "funding": "perpcast.download.run._BEFORE_FUNDING",
}


@pytest.fixture(scope="module")
def exchange() -> Iterator[SmallExchange]:
    with small_exchange() as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(postgres: DatabaseAddress, exchange: SmallExchange, tmp_path_factory: pytest.TempPathFactory) -> Tables:
    return undisturbed_tables(postgres, tmp_path_factory.mktemp("undisturbed"), exchange)


@pytest.fixture
def own(postgres: DatabaseAddress, exchange: SmallExchange, tmp_path: Path) -> Iterator[Stage]:
    """The stage on a new database of the tests' server."""
    with stage(postgres, tmp_path, exchange.section) as new:
        yield new


@pytest.fixture(autouse=True)
def many_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Candles are written in small parts, so that several belong to one symbol."""
    monkeypatch.setattr("perpcast.download.run.STRETCH_PAGES", 2)


def run(own: Stage, *options: str) -> str:
    """A run that succeeds, and what it says."""
    result = own.run(*options)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def failure(own: Stage, exit_code: int, *options: str) -> str:
    """The line of a run that fails in a foreseen way."""
    result = own.run(*options)
    assert result.exit_code == exit_code, result.output
    (line,) = result.stderr.splitlines()
    return line


def at(patch: pytest.MonkeyPatch, place: str, passing: int, action: Callable[[], object]) -> list[int]:
    """Acts when a download of this process passes that place for the n-th time; the list grows with every pass."""
    passes: list[int] = []
    numbers = itertools.count(1)

    def passed() -> None:
        number = next(numbers)  # at once, whichever thread it is
        passes.append(number)
        if number == passing:
            action()

    patch.setattr(PLACES[place], passed)
    return passes


def pauses(patch: pytest.MonkeyPatch, on_pause: Callable[[int], object] = lambda number: None) -> list[float]:
    """The pauses between the tries of a write, in seconds; instead of being slept, each is told by its number."""
    taken: list[float] = []

    def sleep(seconds: float) -> None:
        taken.append(seconds)
        on_pause(len(taken))

    patch.setattr(engine_module, "time", SimpleNamespace(monotonic=lambda: 10.0 * len(taken), sleep=sleep))
    return taken


def session(patch: pytest.MonkeyPatch, **settings: str) -> None:
    """Sessions that are opened from now on have these settings as well."""
    words = " ".join(f"-c {name}={value}" for name, value in settings.items())
    patch.setattr(engine_module, "_SESSION", f"{engine_module._SESSION} {words}")


def address_of(database: Database) -> DatabaseAddress:
    url = database.url
    assert url.host is not None
    return DatabaseAddress(url.host, url.port or 0, url.database or "", url.username or "", str(url.password))


def value(connection: Connection, statement: str, **values: object) -> Any:
    return connection.execute(text(statement), values).scalar()


def until(condition: Callable[[], bool]) -> None:
    """Returns when it holds; looks again and again, and fails after a time that is long for any machine."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.005)


# --- a server that stops, crashes or waits ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a server that these tests stop and crash; each starts it again if it has to."""
    directory = tmp_path_factory.mktemp("home") / "postgres"
    yield directory
    remove_server(directory)


@pytest.fixture
def housed(home: Path, exchange: SmallExchange, tmp_path: Path) -> Iterator[Stage]:
    """The stage on that server."""
    running = embedded_server(home)
    port = running.port if running else free_port()
    address = ensure_server(DatabaseAddress("127.0.0.1", port, "perpcast", "perpcast"), home)
    with stage(address, tmp_path, exchange.section, database={"directory": str(home)}) as new:
        yield new
        ensure_server(address, home)


def server_of(directory: Path) -> EmbeddedServer:
    running = embedded_server(directory)
    assert running is not None
    return running


def crash(directory: Path) -> None:
    """As `pg_ctl stop -m immediate`: every process of the server ends where it is, and nothing is put in order."""
    os.kill(server_of(directory).pid, signal.SIGQUIT)
    until(lambda: embedded_server(directory) is None)


@pytest.mark.fault("B01")
def test_nothing_listens_is_told_in_a_line(own: Stage, tmp_path: Path) -> None:
    port = free_port("127.0.0.2")  # to us a host like any other: no server is started there
    nowhere = overlay(tmp_path / "nowhere.yaml", database={"host": "127.0.0.2", "port": port})
    assert failure(own, 2, *nowhere) == (
        f"error: no PostgreSQL answers at 127.0.0.2:{port}; start it, or set database.host to 127.0.0.1 for an "
        "embedded server"
    )


@pytest.mark.fault("B01")
def test_embedded_server_that_was_stopped_is_started(housed: Stage, home: Path, undisturbed: Tables) -> None:
    assert stop_server(home)
    run(housed)
    assert_same_tables(housed.tables(), undisturbed)


@pytest.mark.fault("B02")
def test_server_that_stands_still_is_waited_for(
    housed: Stage, home: Path, undisturbed: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[int] = []  # when it stopped, and when it went on

    def pause() -> None:
        postmaster = server_of(home).pid
        os.kill(postmaster, signal.SIGSTOP)  # first: it starts no other process meanwhile
        found = subprocess.run(["pgrep", "-P", str(postmaster)], capture_output=True, text=True, check=True)
        processes = [postmaster, *map(int, found.stdout.split())]

        def resume() -> None:
            passed.append(len(passes))
            for process in reversed(processes):
                os.kill(process, signal.SIGCONT)

        for process in processes[1:]:
            os.kill(process, signal.SIGSTOP)
        passed.append(len(passes))
        threading.Timer(PAUSE_SECONDS, resume).start()

    passes = at(monkeypatch, "candles", 3, pause)
    run(housed)
    assert passed[1] < passed[0] + WRITERS, "nothing was written meanwhile, but what other writers had copied already"
    assert_same_tables(housed.tables(), undisturbed)


@pytest.mark.fault("B03")
@pytest.mark.parametrize("place", PLACES)
def test_server_that_crashes_and_comes_back_loses_nothing(
    housed: Stage, home: Path, undisturbed: Tables, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def crash_and_start() -> None:
        crash(home)
        ensure_server(housed.address, home)

    at(monkeypatch, place, 3, crash_and_start)
    result = housed.run()
    if result.exit_code:  # it may also say so and end
        assert re.search(r"^error: .*run the (same )?command again", result.stderr)
        run(housed)
    assert_same_tables(housed.tables(), undisturbed)


@pytest.mark.fault("B03")
@pytest.mark.parametrize("place", PLACES)
def test_server_that_crashes_for_good_is_told_and_the_next_run_completes(
    housed: Stage, home: Path, undisturbed: Tables, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    with monkeypatch.context() as patch:
        at(patch, place, 3, lambda: crash(home))
        pauses(patch)
        line = failure(housed, 1)
    assert f"the connection to {housed.address} was lost; what was committed is kept, run the command again" in line
    run(housed)
    assert_same_tables(housed.tables(), undisturbed)


# --- lost replies ----------------------------------------------------------------------------------------------------


@pytest.mark.fault("B04")
@pytest.mark.parametrize("place", PLACES)
def test_reply_to_a_commit_that_is_lost_stores_no_row_twice_and_loses_none(
    own: Stage, undisturbed: Tables, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, place: str
) -> None:
    tries = pauses(monkeypatch)
    with TcpProxy(own.address.port) as proxy:
        at(monkeypatch, place, 2, lambda: proxy.cut_when_sent(b"COMMIT"))
        run(own, *overlay(tmp_path / "proxy.yaml", database={"port": proxy.port}))
    assert len(tries) == 1, "one write was done again"
    assert_same_tables(own.tables(), undisturbed)


def test_connection_cut_in_the_middle_of_a_page_is_survived(
    own: Stage, undisturbed: Tables, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tries = pauses(monkeypatch)
    with TcpProxy(own.address.port) as proxy:
        at(monkeypatch, "candles", 2, lambda: proxy.cut_when_sent(b"PGCOPY"))
        run(own, *overlay(tmp_path / "proxy.yaml", database={"port": proxy.port}))
    assert len(tries) == 1
    assert_same_tables(own.tables(), undisturbed)


def test_connection_cut_while_reading_is_told_and_the_next_run_completes(
    own: Stage, undisturbed: Tables, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pauses(monkeypatch)
    with TcpProxy(own.address.port) as proxy:
        at(monkeypatch, "gaps", 2, proxy.refuse)
        line = failure(own, 1, *overlay(tmp_path / "proxy.yaml", database={"port": proxy.port}))
    assert "what was committed is kept, run the command again" in line
    run(own)
    assert_same_tables(own.tables(), undisturbed)


# --- other sessions in the way ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def in_the_way(database: Database) -> Iterator[Connection]:
    """Another session that holds the candles against every writer; until it rolls back."""
    with database.connect() as other:
        other.execute(text("LOCK TABLE raw_market_data IN SHARE ROW EXCLUSIVE MODE"))
        yield other


@pytest.mark.fault("B06")
def test_download_that_waits_for_a_lock_goes_on_when_it_is_free(
    own: Stage, undisturbed: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    session(monkeypatch, lock_timeout="50ms")
    with in_the_way(own.engine) as other:
        tries = pauses(monkeypatch, lambda number: other.rollback() if number == 3 else None)
        run(own)
    assert len(tries) >= 3
    assert_same_tables(own.tables(), undisturbed)


@pytest.mark.fault("B06")
def test_download_that_never_gets_a_lock_says_what_to_do(
    own: Stage, undisturbed: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch, in_the_way(own.engine):
        session(patch, lock_timeout="50ms")
        tries = pauses(patch)
        line = failure(own, 1)
    assert line == (
        f"error: {own.address}: canceling statement due to lock timeout; end what else works on it, then run the "
        "command again"
    )
    assert set(tries) == {0.1, 0.2, 0.4, 0.8}
    assert tries.count(0.1) <= 4, "two writes, and as many at most that stood behind them"
    run(own)
    assert_same_tables(own.tables(), undisturbed)


def count_up(connection: Connection, symbol: str) -> None:
    connection.execute(text("UPDATE funding_rates SET rate = rate + 1 WHERE symbol = :symbol"), {"symbol": symbol})


@pytest.fixture
def counted(database: Database) -> Database:
    """A database with a number of AAUSDT and one of BBUSDT, both 0, kept as funding rates."""
    upsert_funding_rates(database, [FundingRate(symbol, START, 0.0) for symbol in ("AAUSDT", "BBUSDT")])
    return database


def counts(database: Database) -> list[float]:
    return [read_funding_rates(database, symbol)[0].rate for symbol in ("AAUSDT", "BBUSDT")]


@pytest.mark.fault("B06")
def test_deadlock_is_undone_and_the_whole_work_done_again(counted: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    session(monkeypatch, deadlock_timeout="50ms")  # ours gives way first: the other session waits for a second
    engine = open_engine(address_of(counted))
    tries = pauses(monkeypatch, lambda number: thread.join(30))  # long enough for the other session
    held, others = threading.Event(), threading.Event()

    def other() -> None:
        with counted.begin() as connection:
            count_up(connection, "BBUSDT")
            held.set()
            others.wait(30)
            count_up(connection, "AAUSDT")

    def other_waits() -> bool:
        with counted.connect() as connection:
            return bool(value(connection, "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"))

    def work(connection: Connection) -> None:
        count_up(connection, "AAUSDT")
        others.set()
        if not tries:
            until(other_waits)
        count_up(connection, "BBUSDT")

    thread = threading.Thread(target=other)
    thread.start()
    try:
        assert held.wait(30)
        transact(engine, work)
    finally:
        thread.join()
        engine.dispose()
    assert len(tries) == 1
    assert counts(counted) == [2, 2], "both sessions, each of them once"


@pytest.mark.fault("B06")
def test_serialization_failure_is_undone_and_the_whole_work_done_again(
    counted: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = pauses(monkeypatch)

    def work(connection: Connection) -> None:
        value(connection, "SELECT 1 FROM funding_rates")  # from here on it sees nothing that others do
        if not tries:
            with counted.begin() as other:
                count_up(other, "AAUSDT")
        count_up(connection, "AAUSDT")

    transact(counted.execution_options(isolation_level="REPEATABLE READ"), work)
    assert len(tries) == 1
    assert counts(counted) == [2, 0]


# --- one write, whatever happens -------------------------------------------------------------------------------------


def test_transact_gives_the_value_of_its_work(counted: Database) -> None:
    def work(connection: Connection) -> int:
        count_up(connection, "AAUSDT")
        return 7

    assert transact(counted, work) == 7
    assert counts(counted) == [1, 0]


@pytest.mark.parametrize(
    "statement", ["INSERT INTO candle_gaps VALUES ('AAUSDT', now(), 0, 'boredom')", "SELECT nonsense"]
)
def test_transact_does_nothing_twice_that_fails_for_good(
    counted: Database, monkeypatch: pytest.MonkeyPatch, statement: str
) -> None:
    tries = pauses(monkeypatch)

    def work(connection: Connection) -> None:
        count_up(connection, "AAUSDT")
        connection.execute(text(statement))

    with pytest.raises(DBAPIError):
        transact(counted, work)
    assert tries == []
    assert counts(counted) == [0, 0]


def test_transact_waits_longer_from_conflict_to_conflict_and_gives_up(
    counted: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = pauses(monkeypatch)

    def work(connection: Connection) -> None:
        count_up(connection, "AAUSDT")
        connection.execute(text("DO $$ BEGIN RAISE SQLSTATE '40001'; END $$"))

    with pytest.raises(OperationalError):
        transact(counted, work)
    assert tries == [0.1, 0.2, 0.4, 0.8]
    assert counts(counted) == [0, 0]


def test_transact_does_the_work_again_on_a_new_connection(counted: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    tries = pauses(monkeypatch)

    def work(connection: Connection) -> None:
        count_up(connection, "AAUSDT")
        if len(tries) < 2:
            value(connection, "SELECT pg_terminate_backend(pg_backend_pid())")

    transact(counted, work)
    assert len(tries) == 2
    assert counts(counted) == [1, 0]


def test_transact_waits_a_minute_for_a_server_that_is_gone(counted: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    with TcpProxy(address_of(counted).port) as proxy:
        engine = open_engine(replace(address_of(counted), port=proxy.port))
        tries = pauses(monkeypatch)  # each of them takes ten seconds
        proxy.refuse()
        with pytest.raises(OperationalError):
            transact(engine, lambda connection: count_up(connection, "AAUSDT"))
        assert len(tries) == 6
        tries.clear()
        pauses(monkeypatch, lambda number: proxy.accept() if number == 4 else None)
        transact(engine, lambda connection: count_up(connection, "AAUSDT"))
        engine.dispose()
    assert counts(counted) == [1, 0]


# --- one task at a time ----------------------------------------------------------------------------------------------


def is_free(database: Database, task: str) -> bool:
    try:
        with exclusive(database, task):
            return True
    except SetupError:
        return False


@pytest.mark.fault("D16")
def test_exclusive_holds_one_task_on_one_database(database: Database, postgres: DatabaseAddress) -> None:
    elsewhere = open_engine(replace(postgres, name="postgres"))
    with exclusive(database, "download"):
        expected = (
            f"another download is running on the database {database.url.database}: wait until it ends, or stop it"
        )
        with pytest.raises(SetupError, match=expected), exclusive(database, "download"):
            pass
        assert is_free(database, "preparation")
        assert is_free(elsewhere, "download")
    elsewhere.dispose()
    assert is_free(database, "download")


def test_exclusive_ends_with_an_error_and_with_a_lost_connection(database: Database) -> None:
    with pytest.raises(ZeroDivisionError), exclusive(database, "download"):
        _ = 1 / 0
    assert is_free(database, "download")
    with exclusive(database, "download"), database.connect() as connection:
        others = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> "
        connection.execute(text(f"{others} pg_backend_pid()"))
    assert is_free(database, "download")


@pytest.mark.fault("D16")
def test_exclusive_ends_with_the_process(database: Database) -> None:
    address = address_of(database)
    program = (
        "import sys; from perpcast.database import DatabaseAddress, exclusive, open_engine\n"
        "engine = open_engine(DatabaseAddress(sys.argv[1], int(sys.argv[2]), *sys.argv[3:6]))\n"
        "with exclusive(engine, 'download'):\n    print('held', flush=True); sys.stdin.read()"
    )
    words = (address.host, str(address.port), address.name, address.user, str(address.password))
    command = [sys.executable, "-c", program, *words]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert not is_free(database, "download")
        process.kill()
    until(lambda: is_free(database, "download"))


# --- full disks ------------------------------------------------------------------------------------------------------

needs_mount = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="only root on Linux mounts a small disk"
)


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of 120 MB where the server's user can reach it; `folder/disk` below a folder that is not small."""
    folder = Path(tempfile.gettempdir()) / f"perpcast-disk-{os.getpid()}"
    disk = folder / "disk"
    disk.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", "size=120m,mode=755", "tmpfs", str(disk)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        if mounted.returncode:
            pytest.skip(f"no small disk can be mounted here: {mounted.stderr.strip()}")
        yield disk
    finally:
        remove_server(disk / "postgres")
        remove_server(folder / "postgres")
        if not mounted.returncode:
            subprocess.run(["umount", str(disk)], check=True)
        shutil.rmtree(folder)


@contextlib.contextmanager
def filled(disk: Path, room: int = 0) -> Iterator[None]:
    """Meanwhile only so many bytes of the disk are free."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass
        file.truncate(file.tell() - room)
    try:
        yield
    finally:
        ballast.unlink()


@needs_mount
@pytest.mark.fault("D15")
def test_disk_that_is_full_is_told_and_the_same_command_completes_when_there_is_room(
    small_disk: Path, exchange: SmallExchange, undisturbed: Tables, tmp_path: Path
) -> None:
    directory = small_disk / "postgres"
    address = ensure_server(DatabaseAddress("127.0.0.1", free_port(), "perpcast", "perpcast"), directory)
    with stage(address, tmp_path, exchange.section) as own:
        message = f"error: the disk of the database {own.address} is full; free some space, then run the command again"
        with filled(small_disk, room=1_500_000):  # for a half of the candles
            for _ in range(2):
                assert failure(own, 1) == message
                assert 0 < own.rows() < len(undisturbed["raw_market_data"])
        run(own)
        assert_same_tables(own.tables(), undisturbed)


@needs_mount
@pytest.mark.fault("B07", "D15")
def test_disk_without_room_for_the_log_stops_the_server_and_loses_nothing(
    small_disk: Path, exchange: SmallExchange, undisturbed: Tables, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = small_disk.parent / "postgres"
    address = ensure_server(DatabaseAddress("127.0.0.1", free_port(), "perpcast", "perpcast"), directory)
    log = server_of(directory).data / "pg_wal"
    stop_server(directory)
    subprocess.run(["mv", str(log), str(small_disk / "pg_wal")], check=True)  # with its owner
    log.symlink_to(small_disk / "pg_wal")
    ensure_server(address, directory)

    def end_the_file() -> None:
        execute(address, "SELECT pg_switch_wal()")  # what comes next needs another 16 MB

    with stage(address, tmp_path, exchange.section, database={"directory": str(directory)}) as own:
        with filled(small_disk):
            with monkeypatch.context() as patch:
                at(patch, "candles", 3, end_the_file)
                pauses(patch)
                assert "(the server's log says why: stopped, crashed, disk full)" in failure(own, 1)
            until(lambda: embedded_server(directory) is None)
            with monkeypatch.context() as patch:
                jumping = SimpleNamespace(monotonic=itertools.count(0, 20).__next__, sleep=lambda seconds: None)
                patch.setattr(server_module, "time", jumping)  # it is tried for a quarter of a minute
                assert "No space left on device" in failure(own, 2)
        run(own)
        assert_same_tables(own.tables(), undisturbed)


# --- sessions, rights, clocks ----------------------------------------------------------------------------------------


@pytest.mark.fault("B10")
def test_transaction_that_was_forgotten_is_ended_by_the_server(
    counted: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    with counted.connect() as connection:
        assert value(connection, "SHOW idle_in_transaction_session_timeout") == "1min"
        assert value(connection, "SHOW lock_timeout") == "30s"
    session(monkeypatch, idle_in_transaction_session_timeout="50ms")
    address = address_of(counted)
    forgetful = open_engine(address)

    def is_gone(process: int) -> bool:
        with counted.connect() as connection:
            return not value(connection, "SELECT count(*) FROM pg_stat_activity WHERE pid = :pid", pid=process)

    with forgetful.connect() as leaked:
        count_up(leaked, "AAUSDT")
        process = value(leaked, "SELECT pg_backend_pid()")
        until(lambda: is_gone(process))
        transact(counted, lambda connection: count_up(connection, "AAUSDT"))  # its lock is gone as well
        with pytest.raises(PerpcastError, match="the connection to .* was lost"), plain_errors(address):
            value(leaked, "SELECT 1")
        leaked.invalidate()

    tries = pauses(monkeypatch)

    def work(connection: Connection) -> None:
        count_up(connection, "BBUSDT")
        process = value(connection, "SELECT pg_backend_pid()")
        if not tries:  # as where the machine sleeps between two statements
            until(lambda: is_gone(process))
        count_up(connection, "BBUSDT")

    transact(forgetful, work)
    forgetful.dispose()
    assert len(tries) == 1
    assert counts(counted) == [1, 2]


@pytest.mark.fault("B11")
def test_role_that_may_not_write_is_told_which_grant_it_needs(own: Stage, undisturbed: Tables, tmp_path: Path) -> None:
    role = f"reader_{own.address.name}"
    execute(
        own.address,
        f"CREATE ROLE {role} LOGIN PASSWORD 'only reads'",
        f"GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}",
    )
    reader = replace(own, address=replace(own.address, user=role, password="only reads"))
    options = overlay(tmp_path / "reader.yaml", database={"user": role})
    try:
        grant = f'GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO "{role}"'
        assert failure(reader, 2, *options) == (
            f"error: {reader.address}: permission denied for table instruments; connect as another user, or let the "
            f"owner of the tables run: {grant}"
        )
        assert own.rows() == 0
        execute(own.address, grant)
        run(reader, *options)
        assert_same_tables(own.tables(), undisturbed)
    finally:
        execute(own.address, f"DROP OWNED BY {role}", f"DROP ROLE {role}")


@pytest.mark.fault("B11")
def test_database_that_is_read_only_says_so(own: Stage, undisturbed: Tables) -> None:
    execute(own.address, f"ALTER DATABASE {own.address.name} SET default_transaction_read_only = on")
    assert failure(own, 2) == (
        f"error: {own.address} is read-only; connect to the primary server, or end its default_transaction_read_only"
    )
    admin = replace(own.address, name="postgres")
    execute(admin, f"ALTER DATABASE {own.address.name} SET default_transaction_read_only = off")
    run(own)
    assert_same_tables(own.tables(), undisturbed)


@pytest.mark.fault("B13")
def test_time_zones_of_server_and_process_change_no_row(own: Stage, undisturbed: Tables) -> None:
    execute(own.address, f"ALTER DATABASE {own.address.name} SET timezone = 'Asia/Kathmandu'")
    process = own.start(TZ="Asia/Kathmandu")
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert_same_tables(own.tables(), undisturbed)
    plain = create_engine(own.address.url())
    with plain.connect() as connection:
        zone, first = (
            value(connection, "SHOW timezone"),
            value(connection, "SELECT min(open_time) FROM raw_market_data"),
        )
    plain.dispose()
    assert zone == "Asia/Kathmandu"
    assert first == from_ms(START), "whoever reads without our settings sees the same instant"


# --- hostile names ---------------------------------------------------------------------------------------------------

CANDLES = recorded("AAUSDT")[549:560]  # from the last bar before the flat run on
REVISED = replace(CANDLES, turnover=CANDLES.turnover + 1)
FLAT_RUN = (int(CANDLES.open_time_ms[1]), int(CANDLES.open_time_ms[-1]))
FIRST_MS = int(CANDLES.open_time_ms[0])
ONE = Decimal(1)
TIME = datetime(2025, 6, 1, tzinfo=UTC)

NAMES = {
    "quote": "'; DROP TABLE raw_market_data; --",
    "double quote": '"; DELETE FROM candle_gaps; --',
    "always true": "x' OR '1'='1",
    "placeholders": "%s %(symbol)s %% :symbol {symbol} $1",
    "backslashes": "\\'; SELECT 1; \\\\ \\. \\N",
    "dollars": "$$; DROP TABLE instruments; $$",
    "lines": "a\tb\r\nc\x1b[2J\x07",
    "nothing": "",
    "null": "NULL",
    "emoji": "🚀🇳🇵 ÄÖ \u202e",
    "10 kB": "x" * 10_000,
}
REFUSALS = (DBAPIError, psycopg2.Error, ValueError)
# An index holds no row so long, PostgreSQL no NUL, UTF-8 no half of a character.
IMPOSSIBLE = {
    "10 kB that do not compress": "".join(map(chr, np.random.default_rng(1).integers(33, 127, 10_000))),
    "NUL": "a\0b",
    "half a character": "a\ud800b",
}


WRITES: dict[str, Callable[[Database, str], object]] = {
    "upsert_candles": lambda database, name: [upsert_candles(database, name, bars) for bars in (CANDLES, REVISED)],
    "replace_candle_gaps": lambda database, name: replace_candle_gaps(database, name, [gap_of(name)]),
    "upsert_funding_rates": lambda database, name: upsert_funding_rates(database, [rate_of(name)]),
    "upsert_instruments": lambda database, name: upsert_instruments(database, [rules_of(name)], TIME),
}
DAY = (FIRST_MS, FIRST_MS + 96 * STEP_MS, STEP_MS)
READS: dict[str, Callable[[Database, str], bool]] = {  # whether that was found which was written
    "read_candles": lambda database, name: np.array_equal(read_candles(database, name).turnover, REVISED.turnover),
    "read_candle_spans": lambda database, name: read_candle_spans(database)[name].count == len(CANDLES),
    "read_candle_months": lambda database, name: read_candle_months(database)[name][0].candles == len(CANDLES),
    "read_candle_revisions": lambda database, name: len(read_candle_revisions(database, name)) == len(CANDLES),
    "read_missing_ranges": lambda database, name: read_missing_ranges(database, name, *DAY)[0][0] > FIRST_MS,
    "read_flat_runs": lambda database, name: read_flat_runs(database)[name] == [FLAT_RUN],
    "read_candle_gaps": lambda database, name: read_candle_gaps(database, name) == [gap_of(name)],
    "read_funding_rates": lambda database, name: read_funding_rates(database, name) == [rate_of(name)],
    "read_instruments": lambda database, name: read_instruments(database)[name] == rules_of(name),
}


def gap_of(name: str) -> CandleGap:
    return CandleGap(name, FIRST_MS, 3, "rejected_row", f"because {name}")


def rate_of(name: str) -> FundingRate:
    return FundingRate(name, FIRST_MS, 0.0001)


def rules_of(name: str) -> Instrument:
    return Instrument(name, name, ONE, ONE, ONE, ONE, ONE, FIRST_MS, 480)


def write(database: Database, name: str) -> None:
    for query in WRITES.values():
        query(database, name)


def contents(database: Database) -> dict[str, set[str]]:
    """Every row of every table."""
    with database.connect() as connection:
        return {table.name: set(map(str, connection.execute(table.select()))) for table in metadata.sorted_tables}


@pytest.mark.fault("B16")
def test_hostile_names_meet_every_query() -> None:
    queries = {name for name, function in getmembers(candles, isfunction) if function.__module__ == candles.__name__}
    assert queries - {"read_spans"} == {*WRITES, *READS}, "read_spans takes a table of ours, and no name"


@pytest.mark.fault("B16")
@pytest.mark.parametrize("case", NAMES)
def test_hostile_name_is_a_value_to_every_query(database: Database, case: str) -> None:
    write(database, "BTCUSDT")
    before = contents(database)
    write(database, NAMES[case])
    for name, query in READS.items():
        assert query(database, NAMES[case]), name
    for table, rows in contents(database).items():
        assert before[table] <= rows, table


@pytest.mark.fault("B16")
@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_name_that_cannot_be_stored_is_refused_and_harms_nothing(database: Database, case: str) -> None:
    write(database, "BTCUSDT")
    before = contents(database)
    for query in WRITES.values():
        with pytest.raises(REFUSALS):
            query(database, IMPOSSIBLE[case])
    for name, query in READS.items():
        with contextlib.suppress(KeyError, *REFUSALS):
            assert not query(database, IMPOSSIBLE[case]), name
    assert contents(database) == before
    for name, query in READS.items():
        assert query(database, "BTCUSDT"), name


@pytest.mark.fault("B16")
def test_hostile_text_of_the_exchange_becomes_a_reason(
    own: Stage, exchange: SmallExchange, undisturbed: Tables
) -> None:
    spoiled = str(START + 4_000 * STEP_MS)
    hostile = "'); DROP TABLE candle_gaps; --%s\0\x1b[2J🚀" + "x" * 10_000

    def edit(rows: list[list[str]]) -> list[list[str]]:
        return [[*row[:-1], hostile] if row[0] == spoiled else row for row in rows]

    rule = exchange.faults.add(faults.rows(edit), path="kline", symbol="DDUSDT", times=None)
    try:
        said = run(own)
    finally:
        rule.times = 0
    assert "\x1b" not in said
    gaps = gaps_by_bar(own.tables())
    assert gaps - GAPS == {("DDUSDT", 4_000, 1, "rejected_row")}
    run(own, "--verify")
    assert_same_tables(own.tables(), undisturbed)
