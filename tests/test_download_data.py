"""download_data.py as its users run it: a process, against the local exchange and a real PostgreSQL."""

import asyncio
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from aiohttp.web import Request, StreamResponse
from sqlalchemy import text

import download_data
from perpcast.database import CandleGap, Database, DatabaseAddress, read_candle_gaps, read_candles, read_instruments
from perpcast.market import CandleSeries
from perpcast.simulator import faults
from perpcast.timeframe import format_time, parse_time, to_ms
from tests import download_world
from tests.download_world import (
    ROOT,
    STEP_MS,
    SmallExchange,
    Stage,
    Tables,
    assert_part_of,
    assert_same_tables,
    small_exchange,
    stage,
)

DAYS = 100
BARS = DAYS * 96
END = to_ms(parse_time("2024-03-01T12:00Z"))
START = END - BARS * STEP_MS

# Bars of each symbol that the exchange never had: one whole, one listed late, one with outages, one that begins before.
MISSING = {
    "AAUSDT": [],
    "BBUSDT": [(0, 4_345)],
    "CCUSDT": [(5_000, 5_007), (7_000, 8_500)],
    "DDUSDT": [(BARS - 50, BARS - 49)],
    "EEUSDT": [],
    "FFUSDT": [],
}
TOTAL = sum(BARS - sum(end - first for first, end in holes) for holes in MISSING.values())


def recorded(symbol: str) -> pd.DataFrame:
    """A random walk of the symbol with its holes, from 50 bars before the wanted span to the running bar."""
    generator = np.random.default_rng(sum(symbol.encode()))
    bars = np.arange(-50, BARS + 1)
    close = np.round(100 * np.exp(np.cumsum(generator.normal(0, 0.002, len(bars)))), 4)
    open_ = np.concatenate(([100.0], close[:-1]))
    frame = pd.DataFrame(
        {
            "timestamp": pd.to_datetime(START + bars * STEP_MS, unit="ms", utc=True),
            "open": open_,
            "high": np.round(np.maximum(open_, close) * 1.001, 4),
            "low": np.round(np.minimum(open_, close) * 0.999, 4),
            "close": close,
            "volume": np.round(generator.uniform(1, 1000, len(bars)), 3),
        }
    )
    first_listed = max([end for first, end in MISSING[symbol] if first == 0], default=-50)
    lost = [bar for first, end in MISSING[symbol] for bar in range(first, end)]
    return frame[(bars >= first_listed) & ~np.isin(bars, lost)]


# --- killed at any moment, the exchange a process as well ------------------------------------------------------------


@pytest.fixture(scope="module")
def simulator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The URLs of a running `python -m perpcast.simulator`, whose clock stands in the middle of a bar."""
    folder = tmp_path_factory.mktemp("candles")
    for symbol in MISSING:
        recorded(symbol).to_parquet(folder / f"{symbol}.parquet")
    command = [sys.executable, "-m", "perpcast.simulator", "--candles", str(folder), "--now", "2024-03-01T12:02Z"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            words = process.stdout.readline().split()
            yield {"environment": "local", "rest_url": words[2], "ws_url": words[4]}
        finally:
            process.terminate()


def stored(engine: Database) -> tuple[dict[str, CandleSeries], list[CandleGap], Any]:
    return (
        {symbol: read_candles(engine, symbol) for symbol in MISSING},
        read_candle_gaps(engine),
        read_instruments(engine),
    )


def assert_same(left: CandleSeries, right: CandleSeries) -> None:
    for field in fields(CandleSeries):
        np.testing.assert_array_equal(getattr(left, field.name), getattr(right, field.name))


def test_download_data_killed_half_way_and_run_again_gives_the_same_tables(
    postgres: DatabaseAddress, simulator: dict[str, str], tmp_path: Path
) -> None:
    wanted = {"days": DAYS, "symbols": list(MISSING)}
    with (
        stage(postgres, tmp_path, simulator, data_download=wanted) as whole,
        stage(postgres, tmp_path, simulator, data_download=wanted) as killed,
    ):
        finished = whole.run()
        assert finished.exit_code == 0, finished.stderr
        assert f"{TOTAL:,} of 6 symbols" in finished.stdout

        # Each symbol is one write, three of them at a time: of the first four two at least are committed, one is not.
        process = killed.start(PERPCAST_KILL_POINT="dl.after_insert:5")
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        rows = killed.rows()
        assert 0 < rows < TOTAL
        assert read_candle_gaps(killed.engine) == []
        finished = killed.run()
        assert finished.exit_code == 0, finished.stderr
        assert f"{TOTAL - rows:,} of 6 symbols" in finished.stdout  # only what was missing

        candles, gaps, instruments = stored(whole.engine)
        again, gaps_again, instruments_again = stored(killed.engine)
    for symbol in MISSING:
        assert_same(candles[symbol], again[symbol])
        truth = recorded(symbol)
        times = truth["timestamp"].dt.as_unit("ms").astype("int64").to_numpy()
        truth = truth[(times >= START) & (times < END)]
        for name in ("open", "high", "low", "close", "volume"):
            np.testing.assert_array_equal(getattr(candles[symbol], name), truth[name].to_numpy())
    assert gaps == gaps_again
    assert [(gap.symbol, (gap.first_missing_ms - START) // STEP_MS, gap.bars, gap.cause) for gap in gaps] == [
        ("BBUSDT", 0, 4_345, "not_listed_yet"),
        ("CCUSDT", 5_000, 7, "exchange_outage"),
        ("CCUSDT", 7_000, 1_500, "exchange_outage"),
        ("DDUSDT", BARS - 50, 1, "exchange_outage"),
    ]
    assert instruments == instruments_again
    assert set(instruments) == set(MISSING)


# --- the small market of the tests -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exchange() -> Iterator[SmallExchange]:
    with small_exchange() as running:
        yield running


@pytest.fixture(scope="module")
def whole(
    postgres: DatabaseAddress, exchange: SmallExchange, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Tables]]:
    """What a run says and stores that asks for all."""
    with stage(postgres, tmp_path_factory.mktemp("whole"), exchange.section) as own:
        said = run(own)
        yield said, own.tables()


@pytest.fixture
def own(postgres: DatabaseAddress, exchange: SmallExchange, tmp_path: Path) -> Iterator[Stage]:
    with stage(postgres, tmp_path, exchange.section) as new:
        yield new


def run(own: Stage, *options: str) -> str:
    """A run that succeeds, and what it says."""
    result = own.run(*options)
    assert result.exit_code == 0, result.stderr
    return result.stdout


def table_of(said: str) -> dict[str, str]:
    """The rows of the summary."""
    rows = [line.split("│") for line in said.splitlines() if line.startswith("│")]
    return {row[1].strip(): row[2].strip() for row in rows}


def bars_of(own: Stage, symbol: str) -> list[int]:
    """The numbers of the stored bars."""
    times: list[int] = read_candles(own.engine, symbol).open_time_ms.tolist()
    return [(time_ms - download_world.START) // STEP_MS for time_ms in times]


def test_download_data_ends_with_a_table_and_the_next_step(whole: tuple[str, Tables]) -> None:
    said, tables = whole
    rows = table_of(said)
    assert re.fullmatch(r"\d:\d\d:\d\d \([\d,]+ candles/s\)", rows.pop("time"))
    assert re.fullmatch(r"\d+, of them repeated 0", rows.pop("requests"))
    assert rows == {
        "span": "2023-12-22 12:00 to 2024-03-01 12:00 UTC",
        "candles stored": f"{len(tables['raw_market_data']):,} of 4 symbols",
        "funding rates stored": f"{len(tables['funding_rates']):,}",
        "missing at the exchange": "307 bars",
        "missing, not listed yet": "3,000 bars",
        "not counted, no trade": "20 bars",
        "not yet fetched": "1 bars",
        "rejected": "3 bars",
    }
    assert said.count("rejected: CCUSDT ") == 3
    assert said.splitlines()[-2:] == [
        "newest bars not there yet, run again later: CCUSDT",
        "next: python prepare_dataset.py",
    ]


def test_download_data_without_a_terminal_tells_its_progress_in_plain_lines(
    own: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download_data, "LINE_SECONDS", -1.0)  # otherwise it is done before a line is due
    said = run(own)
    assert "\x1b" not in said
    assert "\r" not in said
    done = re.findall(r"^candles: ([\d,]+) of 26,880 bars, [\d,]+/s, \d:\d\d:\d\d left$", said, re.MULTILINE)
    counts = [int(number.replace(",", "")) for number in done]
    assert counts == sorted(counts)
    assert 5 <= len(counts) <= 10
    assert counts[-1] == 26_880
    assert re.search(r"^funding rates: 4 of 4 symbols, ", said, re.MULTILINE)


def test_download_data_run_again_stores_nothing_and_says_so(own: Stage, whole: tuple[str, Tables]) -> None:
    run(own)
    rows = table_of(run(own))
    assert rows["candles stored"] == "0 of 4 symbols"
    assert rows["funding rates stored"] == "0"
    assert_same_tables(own.tables(), whole[1])


def test_download_data_of_a_span_and_then_of_all_gives_the_same_tables(own: Stage, whole: tuple[str, Tables]) -> None:
    rows = table_of(run(own, "--from", "2024-01-31T18:07", "--to", "2024-02-02", "--symbols", "AAUSDT, DDUSDT"))
    assert rows["span"] == "2024-01-31 18:00 to 2024-02-02 00:00 UTC"
    assert rows["candles stored"] == "240 of 2 symbols"
    first = (to_ms(parse_time("2024-01-31T18:00Z")) - download_world.START) // STEP_MS
    for symbol in ("AAUSDT", "DDUSDT"):
        assert bars_of(own, symbol) == list(range(first, first + 120))
    assert bars_of(own, "BBUSDT") == []
    run(own)
    assert_same_tables(own.tables(), whole[1])


@pytest.mark.parametrize(
    ("options", "first", "end"),
    [
        (("--days", "3"), download_world.BARS - 3 * 96, download_world.BARS),
        (("--days", "3", "--to", "2024-02-01"), 3_888 - 3 * 96, 3_888),
        (("--from", "2024-03-01"), download_world.BARS - 48, download_world.BARS),
        (("--from", "2024-03-01T00:00+05:45", "--to", "2030-01-01"), download_world.BARS - 71, download_world.BARS),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_download_data_fetches_the_bars_that_were_asked_for(
    own: Stage, options: tuple[str, ...], first: int, end: int
) -> None:
    run(own, "--symbols", "AAUSDT", *options)
    assert bars_of(own, "AAUSDT") == list(range(first, end))


@pytest.mark.fault("D09")
def test_download_data_verify_compares_and_names_what_differs(own: Stage, whole: tuple[str, Tables]) -> None:
    run(own)
    changed = download_world.START + 6_000 * STEP_MS
    with own.engine.begin() as connection:
        statement = (
            "UPDATE raw_market_data SET volume = volume + 1 WHERE symbol = 'DDUSDT' AND open_time = to_timestamp(:s)"
        )
        connection.execute(text(statement), {"s": changed // 1000})
    assert "revised" not in run(own)
    said = run(own, "--verify")
    assert table_of(said)["verified"] == f"{len(whole[1]['raw_market_data']):,} candles compared, 1 differed"
    assert f"revised by the exchange: DDUSDT {format_time(changed)}" in said
    assert "candles have changed since they were stored: what they were is in the table candle_revisions" in said
    tables = own.tables()
    assert len(tables.pop("candle_revisions")) == 1
    assert_part_of(tables, whole[1])
    assert table_of(run(own, "--verify"))["verified"].endswith(" 0 differed")


def test_download_data_symbol_that_the_exchange_refuses_harms_no_other_and_is_named_at_the_end(
    own: Stage, exchange: SmallExchange, whole: tuple[str, Tables]
) -> None:
    rule = exchange.faults.add(faults.ret_code(10001, "not now"), path="kline", symbol="BBUSDT", times=None)
    try:
        result = own.run()
    finally:
        rule.times = 0
    assert result.exit_code == 1
    assert re.fullmatch(
        r"error: 1 symbols are not complete \(BBUSDT: candles of BBUSDT from [-:\d ]+: .*not now.*\); "
        r"run the same command again\n",
        result.stderr,
    )
    assert bars_of(own, "BBUSDT") == []
    assert len(bars_of(own, "AAUSDT")) == download_world.BARS
    run(own)
    assert_same_tables(own.tables(), whole[1])


# --- stopped, and two at once ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HalfWay:
    """A download as a process that waits for the rest of its pages until they are `released`."""

    process: subprocess.Popen[str]
    released: threading.Event

    def end(self) -> tuple[int, str]:
        """Its exit code and what it said on stderr."""
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors


@pytest.fixture
def half_way(own: Stage, exchange: SmallExchange) -> Iterator[HalfWay]:
    released = threading.Event()

    async def hold(request: Request, honest: faults.Honest) -> StreamResponse:
        while not released.is_set():
            await asyncio.sleep(0.01)
        return await honest()

    rule = exchange.faults.add(hold, path="kline", skip=10, times=None)
    process = own.start()
    try:
        deadline = time.monotonic() + 60
        while not rule.fired and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        yield HalfWay(process, released)
    finally:
        rule.times = 0
        released.set()
        process.kill()
        process.communicate()


@pytest.mark.fault("D17")
@pytest.mark.parametrize(
    ("number", "exit_code", "line"),
    [
        (signal.SIGINT, 130, "error: interrupted; run the same command again to go on"),
        (signal.SIGTERM, 143, "error: terminated; run the same command again to go on"),
    ],
)
def test_download_data_stopped_says_so_in_a_line_and_goes_on_when_run_again(
    own: Stage,
    half_way: HalfWay,
    whole: tuple[str, Tables],
    number: signal.Signals,
    exit_code: int,
    line: str,
) -> None:
    half_way.process.send_signal(number)
    assert half_way.end() == (exit_code, line + "\n")
    assert_part_of(own.tables(), whole[1])
    half_way.released.set()
    run(own)
    assert_same_tables(own.tables(), whole[1])


@pytest.mark.fault("D16")
def test_download_data_second_one_at_once_ends_with_a_line_and_does_not_disturb_the_first(
    own: Stage, half_way: HalfWay, whole: tuple[str, Tables]
) -> None:
    result = own.run()
    assert result.exit_code == 2
    assert result.stderr == (
        f"error: another download is running on the database {own.address.name}: wait until it ends, or stop it\n"
    )
    half_way.released.set()
    assert half_way.end() == (0, "")
    assert_same_tables(own.tables(), whole[1])


# --- wrong use -------------------------------------------------------------------------------------------------------

A_TIME = "expected a date or time such as 2024-01-01 or 2024-01-01T06:00, received"
A_SYMBOL = "is not a USDT perpetual: expected a name such as BTCUSDT"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (("--from", "2024-01-01", "--days", "3"), "Error: give either --from or --days, not both"),
        (("--from", "yesterday"), f"Error: Invalid value for '--from': {A_TIME} 'yesterday'"),
        (("--to", "2024-13-01"), f"Error: Invalid value for '--to': {A_TIME} '2024-13-01'"),
        (("--days", "0"), "Error: Invalid value for '--days': 0 is not in the range x>=1."),
        (("--days", "many"), "Error: Invalid value for '--days': 'many' is not a valid integer range."),
        (("--interval", "5"), "Error: No such option"),
        (("--symbols", "aausdt"), f"error: --symbols: 'aausdt' {A_SYMBOL}"),
        (("--symbols", "AAUSDT,"), f"error: --symbols: '' {A_SYMBOL}"),
        (("--symbols", "AAUSDC"), f"error: --symbols: 'AAUSDC' {A_SYMBOL}"),
        (("--symbols", "AAUSDT,BBUSDT,AAUSDT"), "error: --symbols: listed twice: AAUSDT"),
        pytest.param(
            ("--symbols", "'; DROP TABLE x; --USDT"),
            f'error: --symbols: "\'; DROP TABLE x; --USDT" {A_SYMBOL}',
            marks=pytest.mark.fault("B16"),
        ),
        (
            ("--symbols", "AAUSDT,MATICUSDT"),
            "error: data_download.symbols: MATICUSDT not among the 4 USDT perpetuals of this exchange; "
            "python validate_futures_symbols.py tells which name to use",
        ),
        (
            ("--from", "2024-02-01", "--to", "2024-01-01"),
            "error: expected a stretch of closed bars, received 2024-02-01 00:00 to 2024-01-01 00:00 UTC, where the "
            "newest closed bar ends at 2024-03-01 12:00",
        ),
        (
            ("--from", "2024-03-01T12:01"),
            "error: expected a stretch of closed bars, received 2024-03-01 12:00 to 2024-03-01 12:00 UTC, where the "
            "newest closed bar ends at 2024-03-01 12:00",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_download_data_wrong_option_is_a_line_and_exit_code_2(own: Stage, options: tuple[str, ...], line: str) -> None:
    result = own.run(*options)
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert lines[-1].startswith(line)
    assert len(lines) == 1 or lines[0].startswith("Usage: "), "click shows the usage before its own errors"
    assert own.rows() == 0


@pytest.mark.parametrize("case", ["no URL", "unreachable"])
def test_download_data_wrong_exchange_is_a_line_and_exit_code_2(
    own: Stage, exchange: SmallExchange, tmp_path: Path, case: str
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
    url, message = {
        "no URL": ("127.0.0.1", "exchange.rest_url: expected http(s)"),
        "unreachable": (closed, f"exchange unreachable: {closed} gave no answer"),
    }[case]
    result = own.run(*download_world.overlay(tmp_path / "wrong.yaml", exchange={"rest_url": url}))
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()
    assert message in line
    assert own.rows() == 0
