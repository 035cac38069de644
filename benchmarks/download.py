"""Three years of 51 symbols from the local exchange into PostgreSQL, beside ccxt and pandas.to_sql: one process each.

The exchange, PostgreSQL and the client share the machine; a client's time is the wall from its first question to the
last committed row, its CPU and its memory are its own process's.
"""

import asyncio
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from perpcast.config import load_settings
from perpcast.database import DatabaseAddress, ensure_server, free_port, migrate, open_engine, remove_server, reset
from perpcast.timeframe import interval_ms, parse_time, to_ms

ROOT = Path(__file__).parents[1]
SYMBOLS = load_settings([ROOT / "config.yaml"]).data_download.symbols
FEW = SYMBOLS[:2]  # of what is too slow for all
INTERVAL, DAYS = "15", 1095
BARS = DAYS * 96
NOW_MS = to_ms(parse_time("2026-09-01T00:00:10Z"))  # the youngest of the 51 symbols is three years old


@dataclass(frozen=True)
class Place:
    """Where a client finds the exchange and the database."""

    rest_url: str
    host: str
    port: int
    name: str
    user: str
    password: str

    @property
    def database(self) -> DatabaseAddress:
        """The address, as the program writes it."""
        return DatabaseAddress(self.host, self.port, self.name, self.user, self.password)


@dataclass(frozen=True)
class Cost:
    """What a client took for `symbols` of them; CPU and memory of its own process."""

    symbols: int
    wall_seconds: float
    cpu_seconds: float
    peak_mb: float

    @property
    def all_seconds(self) -> float:
        """The wall for all symbols, extrapolated where it did fewer."""
        return self.wall_seconds * len(SYMBOLS) / self.symbols

    @property
    def cpu_ms_a_page(self) -> float:
        """Per 1,000 candles."""
        return self.cpu_seconds * 1000 / (self.symbols * BARS / 1000)


def measure() -> Table:
    """Runs every client in turn on an empty database."""
    ways = [
        ("Perpcast, 51 symbols", "ours", SYMBOLS, False),
        ("Perpcast, 51 symbols, with its rate limit (100 requests/s)", "ours", SYMBOLS, True),
        ("Perpcast, 2 symbols", "ours", FEW, False),
        ("ccxt fetch_ohlcv + pandas.to_sql, 2 symbols", "ccxt", FEW, False),
    ]
    with _exchange() as rest_url, postgres() as address:
        place = Place(rest_url, address.host, address.port, address.name, address.user, address.password or "")
        costs = [_client(way, place, symbols, limited) for _, way, symbols, limited in ways]
    table = Table("three years of candles", "wall", "all 51 symbols", "CPU a page", "peak memory", "faster by")
    for (title, *_), cost in zip(ways, costs, strict=True):
        table.add_row(
            title,
            f"{cost.wall_seconds:.1f} s",
            f"{cost.all_seconds:.0f} s",
            f"{cost.cpu_ms_a_page:.2f} ms",
            f"{cost.peak_mb:.0f} MB",
            f"{costs[-1].all_seconds / cost.all_seconds:.1f} x",
        )
    return table


@contextmanager
def _exchange() -> Iterator[str]:
    """The local exchange in a process of its own, without its IP limit, every candle made before it is asked for."""
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.download", "exchange"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


@contextmanager
def postgres() -> Iterator[DatabaseAddress]:
    """A server of its own, gone at the end."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "postgres"
        try:
            yield ensure_server(DatabaseAddress("127.0.0.1", free_port(), "bench", "perpcast"), directory)
        finally:
            remove_server(directory)


def _client(way: str, place: Place, symbols: tuple[str, ...], limited: bool) -> Cost:
    """Runs one client in a process of its own and checks that every row is there."""
    engine = open_engine(place.database)
    try:
        migrate(engine)
        reset(engine)
        task = json.dumps({"place": place.__dict__, "symbols": symbols, "limited": limited})
        run = subprocess.run(
            [sys.executable, "-m", "benchmarks.download", way, task], cwd=ROOT, stdout=subprocess.PIPE, check=True
        )
        from perpcast.database import read_candle_spans

        stored = {symbol: span.count for symbol, span in read_candle_spans(engine).items()}
        assert stored == dict.fromkeys(symbols, BARS), stored
    finally:
        engine.dispose()
    return Cost(len(symbols), **json.loads(run.stdout))


# --- what the processes do --------------------------------------------------------------------------------------------


async def _serve() -> None:
    from perpcast.simulator.clock import SteppedClock
    from perpcast.simulator.server import serve
    from perpcast.simulator.synthetic import SyntheticMarket

    market = SyntheticMarket(7, 0.0, NOW_MS)
    for symbol in market.symbols:
        market.candles(symbol)
    async with serve(market, SteppedClock(NOW_MS), ip_limit=False) as address:
        print(address.rest_url, flush=True)
        await asyncio.Event().wait()


class _Stopwatch:
    """A progress that nobody watches; it notes when the candles are done, since the peer fetches nothing else."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def begin(self, phase: str, unit: str, amounts: Mapping[str, int]) -> None:
        """What is over before the funding rates is counted."""
        if phase == "funding rates":
            self.wall, self.cpu = time.perf_counter(), time.process_time()

    def advance(self, symbol: str, amount: int) -> None:
        """Nothing."""

    def notice(self, text: str) -> None:
        """To the terminal."""
        print(text, file=sys.stderr)


async def _download(place: Place, symbols: tuple[str, ...], limited: bool) -> tuple[float, float]:
    from perpcast.download import Wanted, download
    from perpcast.exchange import BybitClient, RateLimit

    random = np.random.default_rng(1)
    rate_limit = RateLimit() if limited else RateLimit(10**9)
    engine = open_engine(place.database)
    stopwatch = _Stopwatch()
    async with BybitClient(place.rest_url, jitter=random, rate_limit=rate_limit) as client:
        await download(client, engine, Wanted(symbols, INTERVAL, DAYS), stopwatch, sample=random)
    engine.dispose()
    return stopwatch.wall, stopwatch.cpu


async def _ccxt(place: Place, symbols: tuple[str, ...]) -> tuple[float, float]:
    """The way of a tutorial, at its best: symbols side by side, pages one after the other, one to_sql a symbol."""
    import ccxt.async_support as ccxt
    import pandas as pd

    engine = open_engine(place.database)
    exchange = ccxt.bybit({"enableRateLimit": False, "options": {"defaultType": "swap"}})
    exchange.urls["api"] = dict.fromkeys(exchange.urls["api"], place.rest_url)
    end_ms = NOW_MS - NOW_MS % interval_ms(INTERVAL)

    async def fetch(symbol: str) -> None:
        rows: list[list[Any]] = []
        since = end_ms - BARS * interval_ms(INTERVAL)
        while since < end_ms:
            page = await exchange.fetch_ohlcv(f"{symbol.removesuffix('USDT')}/USDT:USDT", "15m", since, 1000)
            rows += page
            since = page[-1][0] + interval_ms(INTERVAL)
        frame = pd.DataFrame(rows, columns=["open_time", "open", "high", "low", "close", "volume"])
        frame = frame[frame["open_time"] < end_ms].drop_duplicates("open_time")
        frame["open_time"] = pd.to_datetime(frame["open_time"], unit="ms", utc=True)
        frame = frame.assign(symbol=symbol, turnover=0.0)  # ccxt has no turnover
        await asyncio.to_thread(frame.to_sql, "raw_market_data", engine, if_exists="append", index=False)

    try:
        await exchange.load_markets()
        await asyncio.gather(*(fetch(symbol) for symbol in symbols))
        return time.perf_counter(), time.process_time()
    finally:
        await exchange.close()
        engine.dispose()


def peak_mb() -> float:
    """The most memory that this process has held; ru_maxrss, where /proc is, would count the parent's as well."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 1024)


def _main(way: str, task: str = "{}") -> None:
    if way == "exchange":
        asyncio.run(_serve())
        return
    told = json.loads(task)
    place, symbols = Place(**told["place"]), tuple(told["symbols"])
    if way == "ours":
        import perpcast.download  # noqa: F401 - what the imports take is not the download's

        work = _download(place, symbols, told["limited"])
    else:
        import ccxt.async_support  # noqa: F401
        import pandas  # noqa: F401

        work = _ccxt(place, symbols)
    begun, cpu = time.perf_counter(), time.process_time()
    wall_end, cpu_end = asyncio.run(work)
    cost = {"wall_seconds": wall_end - begun, "cpu_seconds": cpu_end - cpu, "peak_mb": peak_mb()}
    print(json.dumps(cost), flush=True)
    os._exit(0)  # nothing after the measurement


if __name__ == "__main__":
    _main(*sys.argv[1:])
