"""download_data.py on a small market that has every kind of trouble in its data, and on a database of its own."""

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from click.testing import CliRunner, Result
from sqlalchemy import text

from download_data import main
from perpcast.database import Database, DatabaseAddress, migrate, open_engine
from perpcast.market import CandleSeries, Instrument
from perpcast.simulator import faults
from perpcast.simulator.clock import SteppedClock
from perpcast.simulator.faults import Faults
from perpcast.simulator.instruments import instrument_of
from perpcast.simulator.market import FUNDING_MS, FundingSeries
from perpcast.simulator.server import serve_in_thread
from perpcast.timeframe import parse_time, to_ms

ROOT = Path(__file__).parents[1]
STEP_MS = 900_000
DAYS = 70  # seven pages of candles and two of funding for each symbol
BARS = DAYS * 96
END = to_ms(parse_time("2024-03-01T12:00Z"))
START = END - BARS * STEP_MS

# Bars that the exchange does not have: an outage or two, a newest bar that is late, a late listing.
MISSING = {
    "AAUSDT": [],
    "BBUSDT": [(2_000, 2_007), (4_000, 4_300)],
    "CCUSDT": [(BARS - 1, BARS + 1)],
    "DDUSDT": [(-50, 3_000)],
}
FLAT = {"AAUSDT": (500, 520)}  # no trade at all
REJECTED = {"CCUSDT": (100, 101, 2_500)}  # bars whose high lies below their low
SYMBOLS = tuple(MISSING)

GAPS = {
    ("AAUSDT", 500, 20, "flat_run"),
    ("BBUSDT", 2_000, 7, "exchange_outage"),
    ("BBUSDT", 4_000, 300, "exchange_outage"),
    ("CCUSDT", 100, 2, "rejected_row"),
    ("CCUSDT", 2_500, 1, "rejected_row"),
    ("CCUSDT", BARS - 1, 1, "not_yet_fetched"),
    ("DDUSDT", 0, 3_000, "not_listed_yet"),
}

# Every row by table; when the instruments were fetched does not count.
Tables = dict[str, set[tuple[Any, ...]]]
_TABLES = {
    "raw_market_data": "*",
    "candle_gaps": "*",
    "candle_revisions": "*",
    "funding_rates": "*",
    "instruments": "symbol, status, tick_size, qty_step, min_quantity, min_notional, max_leverage, launch_time, "
    "funding_interval_minutes, delivery_time",
}
_numbers = count()


@cache
def recorded(symbol: str) -> CandleSeries:
    """A random walk of the symbol with its troubles, from 50 bars before the wanted span to the running bar."""
    generator = np.random.default_rng(sum(symbol.encode()))
    bars = np.arange(-50, BARS + 1)
    close = np.round(100 * np.exp(np.cumsum(generator.normal(0, 0.002, len(bars)))), 4)
    open_ = np.concatenate(([100.0], close[:-1]))
    high, low = np.round(np.maximum(open_, close) * 1.001, 4), np.round(np.minimum(open_, close) * 0.999, 4)
    volume = np.round(generator.uniform(1, 1000, len(bars)), 3)
    first, end = FLAT.get(symbol, (0, 0))
    still = (bars >= first) & (bars < end)
    open_, high, low, close = (np.where(still, open_[first + 50], prices) for prices in (open_, high, low, close))
    volume = np.where(still, 0.0, volume)
    turnover = np.round(volume * (open_ + close) / 2, 4)
    lost = [bar for first, end in MISSING[symbol] for bar in range(first, end)]
    return CandleSeries(START + bars * STEP_MS, open_, high, low, close, volume, turnover)[~np.isin(bars, lost)]


class SmallMarket:
    """The four symbols as a market of the local exchange, with funding every eight hours."""

    @property
    def symbols(self) -> tuple[str, ...]:
        return SYMBOLS

    def instrument(self, symbol: str) -> Instrument:
        return instrument_of(symbol, recorded(symbol))

    def candles(self, symbol: str) -> CandleSeries:
        return recorded(symbol)

    def funding(self, symbol: str) -> FundingSeries:
        first_ms = int(recorded(symbol).open_time_ms[0])
        time_ms = np.arange(first_ms - first_ms % FUNDING_MS + FUNDING_MS, END + 1, FUNDING_MS, dtype=np.int64)
        return FundingSeries(time_ms, np.round(np.sin(time_ms / FUNDING_MS + len(symbol)) / 1000, 6))


@dataclass(frozen=True)
class SmallExchange:
    """The running exchange: its section of the configuration, and its faults. Some rows of it are always spoiled."""

    section: dict[str, str]
    faults: Faults


@contextmanager
def small_exchange() -> Iterator[SmallExchange]:
    """Serves the market from a thread; its clock stands in the middle of a bar."""
    own = Faults()
    spoiling = {symbol: faults.rows(_spoiled(bars)) for symbol, bars in REJECTED.items()}
    # One test after the other asks from the same IP, as no single downloader would.
    with serve_in_thread(SmallMarket(), SteppedClock(END + 120_000), faults=own, ip_limit=False) as address:
        for symbol, spoil in spoiling.items():
            own.add(spoil, path="kline", symbol=symbol, times=None)
        yield SmallExchange({"environment": "local", "rest_url": address.rest_url, "ws_url": address.ws_url}, own)


def _spoiled(bars: tuple[int, ...]) -> Any:
    times = {str(START + bar * STEP_MS) for bar in bars}

    def edit(rows: list[list[str]]) -> list[list[str]]:
        return [[row[0], row[1], row[3], row[2], *row[4:]] if row[0] in times else row for row in rows]

    return edit


@dataclass(frozen=True)
class Stage:
    """download_data.py with a configuration and a database of its own."""

    address: DatabaseAddress
    engine: Database
    configuration: tuple[str, ...]

    def environment(self, **variables: str) -> dict[str, str]:
        return {**os.environ, "PERPCAST_DB_PASSWORD": self.address.password or "", **variables}

    def start(self, *options: str, **variables: str) -> subprocess.Popen[str]:
        """As a process, with these environment variables on top."""
        command = [sys.executable, str(ROOT / "download_data.py"), *self.configuration, *options]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=self.environment(**variables), stdout=pipe, stderr=pipe, text=True)

    def run(self, *options: str) -> Result:
        """In this process, which saves two seconds of imports; an error that is no exit is raised."""
        result = CliRunner(env=self.environment()).invoke(main, [*self.configuration, *options])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    def rows(self) -> int:
        """Candles that are stored."""
        with self.engine.connect() as connection:
            return connection.execute(text("SELECT count(*) FROM raw_market_data")).scalar_one()

    def tables(self) -> Tables:
        """All that a download writes."""
        with self.engine.connect() as connection:
            return {
                name: {tuple(row) for row in connection.execute(text(f"SELECT {columns} FROM {name}"))}
                for name, columns in _TABLES.items()
            }


def undisturbed_tables(server: DatabaseAddress, folder: Path, exchange: "SmallExchange") -> Tables:
    """What one run on a new database stores."""
    with stage(server, folder, exchange.section) as own:
        result = own.run()
        assert result.exit_code == 0, result.stderr
        tables = own.tables()
    assert gaps_by_bar(tables) == GAPS
    assert tables["funding_rates"]
    return tables


@contextmanager
def stage(
    server: DatabaseAddress, folder: Path, exchange: Mapping[str, str], **sections: dict[str, Any]
) -> Iterator[Stage]:
    """The stage on a new database of that server, with these sections over `config.yaml`; gone at the end."""
    name = f"download_{next(_numbers)}"
    execute(replace(server, name="postgres"), f"CREATE DATABASE {name} TEMPLATE template0")
    address = replace(server, name=name)
    place = {field: getattr(address, field) for field in ("host", "port", "name", "user")}
    configuration = (
        *("--config", str(ROOT / "config.yaml")),
        *overlay(
            folder / f"{name}.yaml",
            database={**place, "directory": str(folder / "none")},
            exchange=dict(exchange),
            data_download={"interval": "15", "days": DAYS, "symbols": list(SYMBOLS)},
        ),
        *overlay(folder / f"{name}_sections.yaml", **sections),
    )
    engine = open_engine(address)
    try:
        migrate(engine)
        yield Stage(address, engine, configuration)
    finally:
        engine.dispose()
        execute(replace(server, name="postgres"), f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


def overlay(path: Path, **sections: dict[str, Any]) -> tuple[str, str]:
    """Options that lay these sections over the configuration before them."""
    path.write_text(yaml.safe_dump(sections))
    return "--config", str(path)


def execute(address: DatabaseAddress, *statements: str) -> None:
    """Each statement in a transaction of its own, in a session without our settings."""
    engine = open_engine(address)
    try:
        with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
            for statement in statements:
                connection.execute(text(statement))
    finally:
        engine.dispose()


def assert_same_tables(found: Tables, expected: Tables) -> None:
    """Row for row; shows a few of the rows that differ, not all."""
    assert_part_of(found, expected)
    assert_part_of(expected, found)


def assert_part_of(found: Tables, whole: Tables) -> None:
    """Nothing was found that does not belong there."""
    for name, rows in found.items():
        differing = sorted(rows - whole[name], key=str)[:4]
        assert not differing, (name, differing)


def gaps_by_bar(tables: Tables) -> set[tuple[str, int, int, str]]:
    """The recorded gaps as GAPS has them."""
    return {
        (symbol, (to_ms(first) - START) // STEP_MS, bars, cause)
        for symbol, first, bars, cause, _ in tables["candle_gaps"]
    }
