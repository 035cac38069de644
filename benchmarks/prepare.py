"""The whole prepare stage at full size, database in and out: one process for each number of symbols.

Beside it the same table the plain way: 18 of the 49 indicators through `ta`, both labels by a loop over bars in Python,
rows by pandas.to_sql; timed on a part of one symbol, extrapolated.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from rich.table import Table

from benchmarks.download import BARS, NOW_MS, SYMBOLS, Place, peak_mb, postgres
from perpcast.config import load_settings
from perpcast.database import migrate, open_engine, upsert_candles
from perpcast.exit_policy import ExitPolicy
from perpcast.market import SIDES, CandleSeries
from perpcast.simulator.synthetic import SyntheticMarket

ROOT = Path(__file__).parents[1]
SETTINGS = load_settings([ROOT / "config.yaml"])
POLICIES = {side: ExitPolicy.from_config(SETTINGS.risk_profile, SETTINGS.fees, side) for side in SIDES}
COUNTS = (5, len(SYMBOLS))


def measure(plain_seconds_a_bar: float) -> Table:
    """Prepares a few symbols, then all, then all again; `plain_seconds_a_bar` is what the plain way takes."""
    table = Table("prepare, 105,120 bars a symbol", "wall", "bars/s", "CPU", "peak memory", "faster than the plain way")
    market = SyntheticMarket(7, 0.0, NOW_MS)
    with postgres() as address:
        place = Place("", address.host, address.port, address.name, address.user, address.password or "")
        engine = open_engine(place.database)
        migrate(engine)
        for symbol in SYMBOLS:
            upsert_candles(engine, symbol, last_bars(market, symbol))
        engine.dispose()
        for title, count in (*((f"{count} symbols", count) for count in COUNTS), ("51 symbols, again", len(SYMBOLS))):
            task = json.dumps({"place": place.__dict__, "symbols": SYMBOLS[:count]})
            run = subprocess.run(
                [sys.executable, "-m", "benchmarks.prepare", task], cwd=ROOT, stdout=subprocess.PIPE, check=True
            )
            cost = json.loads(run.stdout)
            bars = count * BARS
            table.add_row(
                title,
                f"{cost['wall']:.1f} s",
                f"{bars / cost['wall']:,.0f}",
                f"{cost['cpu']:.1f} s",
                f"{cost['peak_mb']:.0f} MB",
                f"{plain_seconds_a_bar * bars / cost['wall']:,.0f} x",
            )
    return table


def last_bars(market: SyntheticMarket, symbol: str) -> CandleSeries:
    """Three years of one symbol, up to NOW_MS."""
    candles = market.candles(symbol)
    return candles[np.flatnonzero(candles.open_time_ms < NOW_MS - 900_000)[-BARS:]]


def _main(task: str) -> None:
    from perpcast.prepare import prepare

    told = json.loads(task)
    engine = open_engine(Place(**told["place"]).database)
    begun, cpu = time.perf_counter(), time.process_time()
    prepared = prepare(engine, told["symbols"], "15", POLICIES)
    assert sum(each.quality.bars for each in prepared) == len(told["symbols"]) * BARS
    cost = {
        "wall": time.perf_counter() - begun,
        "cpu": time.process_time() - cpu,
        "peak_mb": peak_mb(),
    }
    print(json.dumps(cost))
    engine.dispose()


if __name__ == "__main__":
    _main(sys.argv[1])
