"""What every market offers, and what of it can be seen at an instant: closed bars, the running bar, coarser bars."""

from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Protocol

import numpy as np

from perpcast.market import Candle, CandleSeries, Instrument
from perpcast.timeframe import floor_ms, interval_ms

# Bars are kept at this interval; coarser ones are put together from them, finer ones do not exist.
BASE_INTERVAL = "15"
BASE_MS = interval_ms(BASE_INTERVAL)
FUNDING_MS = 8 * 3_600_000


@dataclass(frozen=True)
class FundingSeries:
    """Funding payments of one symbol, oldest first: instants in ms (int64 [n]) and rates as fractions (float64 [n])."""

    time_ms: np.ndarray
    rate: np.ndarray

    @classmethod
    def empty(cls) -> "FundingSeries":
        """No payments."""
        return cls(np.empty(0, np.int64), np.empty(0))


class Market(Protocol):
    """The whole of a market, its future included; `visible_candles` and the clock decide what is shown of it."""

    @property
    def symbols(self) -> tuple[str, ...]:
        """All listed symbols, sorted."""
        ...

    def instrument(self, symbol: str) -> Instrument:
        """The rules of one listed symbol."""
        ...

    def candles(self, symbol: str) -> CandleSeries:
        """All bars of one listed symbol, at the base interval."""
        ...

    def funding(self, symbol: str) -> FundingSeries:
        """All funding payments of one listed symbol; empty where a market does not know them."""
        ...


@dataclass(frozen=True)
class Window:
    """Which bars are asked for, by their opens, both ends included; None leaves an end open.

    With more than `limit` bars inside, the newest are returned; with a first but no last, the oldest. Bybit's documents
    leave both open: a client does well to ask for no more than `limit` bars, with both ends.
    """

    first_ms: int | None = None
    last_ms: int | None = None
    limit: int = 1000


def visible_candles(
    market: Market,
    symbol: str,
    step_ms: int,
    now_ms: int,
    window: Window = Window(),
) -> CandleSeries:
    """Bars of `step_ms` (a multiple of the base) that a trader sees at `now_ms`, the running bar included."""
    series, ratio = market.candles(symbol), step_ms // BASE_MS
    last_ms = now_ms if window.last_ms is None else min(now_ms, floor_ms(window.last_ms, step_ms) + step_ms - 1)
    start = 0
    if window.first_ms is not None:
        start = int(np.searchsorted(series.open_time_ms, floor_ms(window.first_ms, step_ms)))
    stop = int(np.searchsorted(series.open_time_ms, last_ms, side="right"))
    # One coarse bar more than needed: the one at the cut may be incomplete.
    most = (window.limit + (ratio > 1)) * ratio
    oldest = window.first_ms is not None and window.last_ms is None
    rows = slice(start, min(stop, start + most)) if oldest else slice(max(start, stop - most), stop)
    bars = _resample(_cut_running(market, symbol, series[rows], now_ms), step_ms)
    return bars[: window.limit] if oldest else bars[max(0, len(bars) - window.limit) :]


def running_candle(candle: Candle, elapsed: float, decimals: int) -> Candle:
    """The bar as it looks when the fraction `elapsed` (0 to 1) of it has passed.

    Inside a bar the price goes in straight lines, a third of the time each: open, the extreme against the bar's
    direction, the extreme with it, close. Nothing of the rest of the bar shows.
    """
    rising = candle.close >= candle.open
    first, second = (candle.low, candle.high) if rising else (candle.high, candle.low)
    price = float(np.interp(elapsed, (0, 1 / 3, 2 / 3, 1), (candle.open, first, second, candle.close)))
    price = min(max(round(price, decimals), candle.low), candle.high)
    passed = [candle.open, *([first] if elapsed >= 1 / 3 else []), *([second] if elapsed >= 2 / 3 else []), price]
    return replace(
        candle,
        high=max(passed),
        low=min(passed),
        close=price,
        volume=round(candle.volume * elapsed, 6),
        turnover=round(candle.turnover * elapsed, 6),
    )


def decimals_of(step: Decimal) -> int:
    """Decimal places of multiples of a power of ten: 1 for 0.10, -1 for 10."""
    return -int(step.normalize().as_tuple().exponent)


def _cut_running(market: Market, symbol: str, series: CandleSeries, now_ms: int) -> CandleSeries:
    if not len(series) or series.open_time_ms[-1] + BASE_MS <= now_ms:
        return series
    (last,) = series[-1:].candles(symbol)
    running = running_candle(
        last, (now_ms - last.open_time_ms) / BASE_MS, decimals_of(market.instrument(symbol).tick_size)
    )
    return CandleSeries.concatenated(series[:-1], CandleSeries.from_candles([running]))


def _resample(series: CandleSeries, step_ms: int) -> CandleSeries:
    """Coarser bars, each from whatever base bars there are inside it."""
    if step_ms == BASE_MS or not len(series):
        return series
    opens = series.open_time_ms - series.open_time_ms % step_ms
    first = np.flatnonzero(np.diff(opens, prepend=opens[0] - 1))
    last = np.append(first[1:], len(opens)) - 1
    return CandleSeries(
        open_time_ms=opens[first],
        open=series.open[first],
        high=np.maximum.reduceat(series.high, first),
        low=np.minimum.reduceat(series.low, first),
        close=series.close[last],
        volume=np.add.reduceat(series.volume, first),
        turnover=np.add.reduceat(series.turnover, first),
    )
