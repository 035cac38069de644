"""The backtest over a year of 51 symbols, beside the paper account, which walks its trades in Python bar by bar.

    python -m benchmarks.backtest

Candles are the recorded panel where it is, else synthetic; predictions are drawn: what is traded, and by how much it
loses, says nothing about a model.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.panel import CANDLES, SETTINGS
from perpcast.backtest import Backtest, EntrySizer, MarketPanel, Terms, backtest
from perpcast.decision import Taken, decide
from perpcast.evaluation.portfolio import evaluate_portfolio
from perpcast.exit_policy import ExitPolicy
from perpcast.live.paper import Entry, PaperAccount
from perpcast.market import SIDES, Candle, CandleSeries, Instrument, Signal
from perpcast.simulator.instruments import instrument_of
from perpcast.simulator.synthetic import SyntheticMarket
from perpcast.sizing import Sizing
from perpcast.timeframe import parse_time, to_ms

STEP_MS = 900_000
BARS = 35_040  # a year
PLAIN_BARS = 2000
SYMBOLS = 51


def year_of_panel() -> tuple[MarketPanel, dict[str, Instrument]]:
    """51 symbols, a year, funding of 1 bp every 8 hours."""
    candles = _recorded() if CANDLES.exists() else _synthetic()
    first_ms = min(int(series.open_time_ms[0]) for series in candles.values())
    times = first_ms + STEP_MS * np.arange(0, BARS, 32)
    funding = {symbol: (times, np.full(len(times), 1e-4)) for symbol in candles}
    last_ms = first_ms + (BARS - 1) * STEP_MS
    market = MarketPanel.build(tuple(candles), candles, funding, first_ms, last_ms, STEP_MS)
    return market, {symbol: instrument_of(symbol, series) for symbol, series in candles.items()}


def _recorded() -> dict[str, CandleSeries]:
    import pandas as pd

    found = {}
    for path in sorted(CANDLES.glob("*.parquet")):
        frame = pd.read_parquet(path)
        times = frame["timestamp"].astype("datetime64[ms, UTC]").astype("int64").to_numpy()
        first, high, low, close = (frame[name].to_numpy(float) for name in ("open", "high", "low", "close"))
        volume = frame["volume"].to_numpy(float)
        found[path.stem] = CandleSeries(times, first, high, low, close, volume, volume * close)
    return found


def _synthetic() -> dict[str, CandleSeries]:
    series = SyntheticMarket(7, 0.1, to_ms(parse_time("2023-01-02T00:00Z"))).candles("BTCUSDT")
    shift = (len(series) - BARS) // SYMBOLS
    times = series.open_time_ms[:BARS]
    found = {}
    for number in range(SYMBOLS):
        part = series[slice(number * shift, number * shift + BARS)]
        found[f"S{number:02}USDT"] = replace(part, open_time_ms=times)
    return found


def terms(threshold: float) -> Terms:
    """The configuration's, without the halt: every bar is to be traded."""
    capital, profile = SETTINGS.capital, SETTINGS.risk_profile
    policies = {side: ExitPolicy.from_config(profile, SETTINGS.fees, side) for side in SIDES}
    fractions = [fraction for _, fraction in policies["buy"].targets]
    sizing = Sizing.from_config(capital.per_trade_percentage, profile.leverage, fractions)
    return Terms(threshold, policies, sizing, capital.max_positions, 1.0, 1e6)


def by_paper_account(
    market: MarketPanel, score: np.ndarray, instruments: dict[str, Instrument], rules: Terms
) -> np.ndarray:
    """Equity [bars] of the same account, each trade an `OpenTrade`, as the live trader does it (before funding)."""
    steps = {symbol: instrument.qty_step for symbol, instrument in instruments.items()}
    account = PaperAccount(rules.initial, rules.policies, rules.sizing, steps, market.step_ms)
    equity, prices = np.empty(score.shape[2]), (market.open, market.high, market.low, market.close)
    for bar, now in enumerate(market.open_time_ms[: score.shape[2]].tolist()):
        closes = {}
        for row, symbol in enumerate(market.symbols):
            first, high, low, close = (float(column[row, bar]) for column in prices)
            if first == first:
                closes[symbol] = close
                account.apply_candle(Candle(symbol, now, first, high, low, close, 0.0, 0.0))
        equity[bar] = account.equity
        free = account.free_margin - float(rules.sizing.margin(equity[bar])) * len(account.waiting)
        above = np.argwhere(score[:, :, bar] > rules.threshold).tolist()
        signals = [Signal(market.symbols[row], now, SIDES[side], score[side, row, bar], "") for side, row in above]
        sizer = EntrySizer(rules.sizing, rules.policies, instruments, float(equity[bar]), closes, free)
        for decision in decide(
            [signal for signal in signals if signal.symbol in closes],
            threshold=rules.threshold,
            occupied=account.occupied,
            max_positions=rules.max_positions,
            size=sizer,
        ):
            if isinstance(decision, Taken):
                signal = decision.signal
                entry = Entry(str(bar), "", signal.symbol, signal.side, decision.quantity, now)
                account.waiting[signal.symbol] = entry
    return equity


def measure() -> Table:
    """The table of this file."""
    market, instruments = year_of_panel()
    score = np.random.default_rng(1).normal(0, 0.004, (2, *market.open.shape))
    table = Table("backtest of 51 symbols", "bars", "trades", "seconds", "bars/s", "ratio")
    warm = score[:, :, :200]
    backtest(_first(market, 200), warm, instruments, terms(0.0))

    few = terms(float(np.quantile(score, 0.999)))
    plain_seconds, equity = _timed(lambda: by_paper_account(market, score[:, :, :PLAIN_BARS], instruments, few))
    rows: list[tuple[str, Terms]] = [("every place taken", terms(-np.inf)), ("one prediction in a thousand", few)]
    for name, rules in rows:
        seconds, account = _timed(lambda rules=rules: backtest(market, score, instruments, rules))  # type: ignore[misc]
        ratio = plain_seconds / PLAIN_BARS / (seconds / BARS) if rules is few else np.nan
        table.add_row(name, *_columns(BARS, account, seconds), f"{ratio:,.0f} x" if ratio == ratio else "")
    table.add_row("the paper account, the same", f"{PLAIN_BARS:,}", "", *_speed(PLAIN_BARS, plain_seconds), "1 x")

    free = _first(market, PLAIN_BARS, funding=False)
    same = backtest(free, score[:, :, :PLAIN_BARS], instruments, few).equity
    seconds, portfolio = _timed(lambda: _portfolio(market, score, instruments, few))
    table.add_row("everything the report shows", *_columns(BARS, portfolio.model.backtest, seconds), "")
    table.caption = f"largest difference of equity between both accounts: {np.abs(same - equity).max():.1e} USDT"
    return table


def _portfolio(market: MarketPanel, score: np.ndarray, instruments: dict[str, Instrument], rules: Terms) -> Any:
    scores = {"model": score, "baseline": -score}
    return evaluate_portfolio(market, scores, instruments, rules, trials=10, seed=1)


def _first(market: MarketPanel, bars: int, *, funding: bool = True) -> MarketPanel:
    columns = [getattr(market, name)[:, :bars] for name in ("open", "high", "low", "close", "funding")]
    columns[-1] = columns[-1] * funding
    return MarketPanel(market.symbols, market.open_time_ms[:bars], market.step_ms, *columns)


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    begun = time.perf_counter()
    found = work()
    return time.perf_counter() - begun, found


def _speed(bars: int, seconds: float) -> tuple[str, str]:
    return f"{seconds:,.2f}", f"{bars / seconds:,.0f}"


def _columns(bars: int, account: Backtest, seconds: float) -> tuple[str, str, str, str]:
    return f"{bars:,}", f"{len(account.trades):,}", *_speed(bars, seconds)


if __name__ == "__main__":
    Console(width=120).print(measure())
