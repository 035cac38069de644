"""Runs every benchmark and prints a row each: python -m benchmarks (make bench). Writes nothing.

A ratio compares two ways in one run on one machine; the absolute numbers are this machine's at this moment.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import backtest, download, inference, prepare, questions, training
from perpcast.config import load_settings
from perpcast.exit_policy import ExitPolicy, label_sides
from perpcast.features.indicators import compute_indicators
from perpcast.market import SIDES, CandleSeries
from perpcast.simulator.synthetic import SyntheticMarket
from perpcast.timeframe import parse_time, to_ms

ROOT = Path(__file__).parents[1]
BARS = 35_040  # a year
SETTINGS = load_settings([ROOT / "config.yaml", ROOT / "config.demo.yaml"])


def seconds(work: Callable[[], Any], repeats: int = 3) -> float:
    """The best of a few runs, after one to warm up."""
    work()
    best = np.inf
    for _ in range(repeats):
        begun = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - begun)
    return best


def year_of_candles() -> CandleSeries:
    """One symbol, one year, synthetic."""
    market = SyntheticMarket(7, 0.1, to_ms(parse_time("2023-01-02T00:00Z")))
    return market.candles("BTCUSDT")[:BARS]


def labels(candles: CandleSeries) -> tuple[float, float]:
    """Both sides' labels: bars per second, compiled and by the plain reference of the tests."""
    from tests.exit_policy_reference import trade

    prices = (candles.open, candles.high, candles.low, candles.close)
    policies = {side: ExitPolicy.from_config(SETTINGS.risk_profile, SETTINGS.fees, side) for side in SIDES}
    ours = BARS / seconds(lambda: label_sides(*prices, policies))
    bars, plain = list(zip(*(column.tolist() for column in prices), strict=True)), 1000

    def by_reference() -> None:
        for side in SIDES:
            for signal in range(plain):
                window = bars[signal : signal + 102]
                trade(window, side, policies[side])
                trade(window, side, policies[side], adverse_first=False)

    return ours, plain / seconds(by_reference, 1)


def panel_labels(*, ambiguous: bool) -> float:
    """Bar-sides per second over a year of 51 symbols: the recorded panel where it is, else synthetic."""
    from tests.recorded import CANDLES, recorded_candles

    panel = CANDLES / "binance_usdm_15m_panel51_1y"
    if panel.exists():
        frames = [recorded_candles(f"{panel.name}/{path.stem}") for path in sorted(panel.glob("*.parquet"))]
        prices = [tuple(frame[name].to_numpy(float) for name in ("open", "high", "low", "close")) for frame in frames]
    else:
        candles = year_of_candles()
        prices = [(candles.open, candles.high, candles.low, candles.close)] * 51
    policies = {side: ExitPolicy.from_config(SETTINGS.risk_profile, SETTINGS.fees, side) for side in SIDES}

    def work() -> None:
        for opens, highs, lows, closes in prices:
            label_sides(opens, highs, lows, closes, policies, ambiguous=ambiguous)

    return 2 * sum(len(opens) for opens, *_ in prices) / seconds(work)


def indicators(candles: CandleSeries) -> tuple[float, float]:
    """The 49 indicators beside `ta` alone for those of them that it has: bars per second."""
    import ta

    frame = candles.frame()
    ours = BARS / seconds(lambda: compute_indicators(frame))
    high, low, close, volume = (frame[name] for name in ("high", "low", "close", "volume"))

    def by_ta() -> None:
        with np.errstate(all="ignore"):
            directional = ta.trend.ADXIndicator(high, low, close)
            directional.adx(), directional.adx_pos(), directional.adx_neg()
            macd = ta.trend.MACD(close)
            macd.macd(), macd.macd_signal(), macd.macd_diff()
            ta.trend.PSARIndicator(high, low, close).psar()
            aroon = ta.trend.AroonIndicator(high, low)
            aroon.aroon_up(), aroon.aroon_down()
            ta.trend.CCIIndicator(high, low, close).cci()
            ta.trend.EMAIndicator(close, 20).ema_indicator()
            ta.momentum.RSIIndicator(close).rsi()
            ta.momentum.StochasticOscillator(high, low, close).stoch()
            ta.momentum.UltimateOscillator(high, low, close).ultimate_oscillator()
            ta.volume.MFIIndicator(high, low, close, volume).money_flow_index()
            ta.volume.OnBalanceVolumeIndicator(close, volume).on_balance_volume()
            ta.volatility.AverageTrueRange(high, low, close).average_true_range()
            ta.volatility.BollingerBands(close).bollinger_hband()

    return ours, BARS / seconds(by_ta, 1)


def storage(candles: CandleSeries) -> tuple[float, float]:
    """Candles into an empty table: rows per second by binary COPY and by pandas' own `to_sql`."""
    from perpcast.database import (
        DatabaseAddress,
        ensure_server,
        free_port,
        migrate,
        open_engine,
        remove_server,
        reset,
        upsert_candles,
    )

    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "postgres"
        try:
            address = ensure_server(DatabaseAddress("127.0.0.1", free_port(), "bench", "perpcast"), directory)
            with closing_engine(open_engine(address)) as engine:
                migrate(engine)
                begun = time.perf_counter()
                upsert_candles(engine, "BTCUSDT", candles)
                ours = BARS / (time.perf_counter() - begun)
                reset(engine)
                few = candles[:5000]
                frame = few.frame().assign(symbol="BTCUSDT")
                begun = time.perf_counter()
                frame.to_sql("raw_market_data", engine, if_exists="append", index=False)
                return ours, 5000 / (time.perf_counter() - begun)
        finally:
            remove_server(directory)


def closing_engine(engine: Any) -> Any:
    """Disposes of the pool at the end."""
    engine.close = engine.dispose
    return closing(engine)


@click.command(epilog="\b\nExample:\n  make bench")
def main() -> None:
    """Measure the parts that are meant to be fast, each beside the plain way."""
    console = Console(width=None if sys.stdout.isatty() else 140)
    candles = year_of_candles()
    rows: list[tuple[str, str, str, Callable[[], tuple[float, float]]]] = [
        ("labels, both sides", "bars/s", "plain Python", lambda: labels(candles)),
        ("49 indicators", "bars/s", "ta, 18 of them", lambda: indicators(candles)),
        ("candles into PostgreSQL", "rows/s", "pandas.to_sql", lambda: storage(candles)),
    ]
    table = Table("benchmark", "unit", "ours", "peer", "peer's", "ratio")
    plain_seconds_a_bar = 0.0
    with console.status("measuring") as status:
        for name, unit, peer, measure in rows:
            status.update(f"measuring: {name}")
            ours, theirs = measure()
            table.add_row(name, unit, f"{ours:,.0f}", peer, f"{theirs:,.0f}", f"{ours / theirs:,.1f} x")
            plain_seconds_a_bar += 1 / theirs
        for ambiguous in (True, False):
            status.update("measuring: labels of 51 symbols")
            name = f"labels of 51 symbols, a year, {'with' if ambiguous else 'without'} `ambiguous`"
            table.add_row(name, "bar-sides/s", f"{panel_labels(ambiguous=ambiguous):,.0f}", "", "", "")
    console.print(table)
    for title, measure_table in (
        ("prepare (three minutes)", lambda: prepare.measure(plain_seconds_a_bar)),
        ("download (two minutes)", download.measure),
        ("backtest (a minute)", backtest.measure),
        ("prediction (three minutes)", inference.measure),
        ("dashboards (five minutes)", questions.measure),
        ("training (fifteen minutes)", training.measure),
    ):
        with console.status(f"measuring: {title}"):
            found = measure_table()
        console.print(found)


if __name__ == "__main__":
    main()
