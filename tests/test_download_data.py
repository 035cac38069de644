"""download_data.py as its users run it: a process, against the local exchange as a process and a real PostgreSQL."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from click.testing import CliRunner
from sqlalchemy import text

from download_data import main
from perpcast.database import (
    CandleGap,
    Database,
    DatabaseAddress,
    migrate,
    open_engine,
    read_candle_gaps,
    read_candles,
    read_instruments,
)
from perpcast.market import CandleSeries
from perpcast.timeframe import parse_time, to_ms

ROOT = Path(__file__).parents[1]
STEP_MS = 900_000
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


@pytest.fixture(scope="module")
def exchange(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
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


@dataclass(frozen=True)
class Stage:
    """download_data.py with a configuration and a database of its own."""

    command: list[str]
    environment: dict[str, str]
    engine: Database

    def start(self) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen(self.command, env=self.environment, stdout=pipe, stderr=pipe, text=True)

    def run(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command, env=self.environment, capture_output=True, text=True, check=False, timeout=120
        )

    def rows(self) -> int:
        with self.engine.connect() as connection:
            return connection.execute(text("SELECT count(*) FROM raw_market_data")).scalar_one()


def stage(address: DatabaseAddress, folder: Path, name: str, **sections: dict[str, Any]) -> Stage:
    """The stage on a new database of that name, with these sections over `config.yaml`."""
    engine = open_engine(DatabaseAddress(address.host, address.port, "postgres", address.user, address.password))
    with engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        connection.execute(text(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)"))
        connection.execute(text(f"CREATE DATABASE {name} TEMPLATE template0"))
    engine.dispose()
    own = DatabaseAddress(address.host, address.port, name, address.user, address.password)
    database = {"host": own.host, "port": own.port, "name": name, "user": own.user, "directory": str(folder / "none")}
    wanted = {"interval": "15", "days": DAYS, "symbols": list(MISSING)}
    overlay = folder / f"{name}.yaml"
    overlay.write_text(yaml.safe_dump({"database": database, "data_download": wanted} | sections))
    engine = open_engine(own)
    migrate(engine)
    environment = {**os.environ, "PERPCAST_DB_PASSWORD": own.password or ""}
    command = [sys.executable, str(ROOT / "download_data.py")]
    for path in (ROOT / "config.yaml", overlay):
        command += ["--config", str(path)]
    return Stage(command, environment, engine)


def tables(engine: Database) -> tuple[dict[str, CandleSeries], list[CandleGap], Any]:
    return (
        {symbol: read_candles(engine, symbol) for symbol in MISSING},
        read_candle_gaps(engine),
        read_instruments(engine),
    )


def assert_same(left: CandleSeries, right: CandleSeries) -> None:
    for field in fields(CandleSeries):
        np.testing.assert_array_equal(getattr(left, field.name), getattr(right, field.name))


def wait_for_rows(stage: Stage, process: subprocess.Popen[str], rows: int) -> None:
    """Until the other process has stored that many."""
    deadline = time.monotonic() + 60
    while stage.rows() < rows and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)  # between two looks


def test_download_data_killed_half_way_and_run_again_gives_the_same_tables(
    postgres: DatabaseAddress, exchange: dict[str, str], tmp_path: Path
) -> None:
    whole = stage(postgres, tmp_path, "download_whole", exchange=exchange)
    killed = stage(postgres, tmp_path, "download_killed", exchange=exchange)
    try:
        finished = whole.run()
        assert finished.returncode == 0, finished.stderr
        assert f"{TOTAL:,} candles stored of 6 symbols" in finished.stdout

        process = killed.start()
        wait_for_rows(killed, process, TOTAL // 2)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        stored = killed.rows()
        assert 0 < stored < TOTAL
        assert read_candle_gaps(killed.engine) == []
        finished = killed.run()
        assert finished.returncode == 0, finished.stderr
        assert f"{TOTAL - stored:,} candles stored" in finished.stdout  # only what was missing

        candles, gaps, instruments = tables(whole.engine)
        again, gaps_again, instruments_again = tables(killed.engine)
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
    finally:
        whole.engine.dispose()
        killed.engine.dispose()


def test_download_data_interrupted_says_so_in_a_line(
    postgres: DatabaseAddress, exchange: dict[str, str], tmp_path: Path
) -> None:
    own = stage(postgres, tmp_path, "download_interrupted", exchange=exchange)
    try:
        process = own.start()
        wait_for_rows(own, process, 1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
        assert process.returncode == 130
        assert errors.strip() == "error: interrupted; run the same command again to go on"
    finally:
        own.engine.dispose()


@pytest.mark.parametrize("case", ["unknown symbol", "no URL", "unreachable"])
def test_download_data_wrong_use_is_one_line_and_exit_code_2(
    postgres: DatabaseAddress, exchange: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = f"http://127.0.0.1:{free.getsockname()[1]}"
    cases: dict[str, tuple[dict[str, Any], str]] = {
        "unknown symbol": ({"data_download": {"symbols": ["AAUSDT", "MATICUSDT"]}}, "data_download.symbols: MATICUSDT"),
        "no URL": ({"exchange": exchange | {"rest_url": "127.0.0.1"}}, "exchange.rest_url: expected http(s)"),
        "unreachable": (
            {"exchange": exchange | {"rest_url": closed}},
            f"exchange unreachable: {closed} gave no answer",
        ),
    }
    sections, message = cases[case]
    own = stage(postgres, tmp_path, "download_wrong", **{"exchange": exchange, **sections})
    try:
        monkeypatch.setenv("PERPCAST_DB_PASSWORD", own.environment["PERPCAST_DB_PASSWORD"])
        finished = CliRunner().invoke(main, own.command[2:])
        assert finished.exit_code == 2
        assert message in finished.stderr
        assert len(finished.stderr.strip().splitlines()) == 1
        assert own.rows() == 0
    finally:
        own.engine.dispose()
