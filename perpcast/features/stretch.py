"""Gap-free stretches of candles: where indicators start again, and what several of them share.

A bar without a finite positive price, or with a negative volume, is a missing bar. So is every bar of a flat run (no
movement, no volume) from its FLAT_RUN_BARS-th on: the bars before it cannot know yet that the run will be a long one,
and a value at bar t may not depend on what comes after t.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise

import numpy as np
import pandas as pd
import talib
from ta.trend import IchimokuIndicator, VortexIndicator
from ta.volatility import DonchianChannel

from perpcast.errors import DataError
from perpcast.market import FLAT_RUN_BARS
from perpcast.timeframe import format_time, interval_ms

# To be raised when another bar counts as missing, or as the first of a stretch (`indicators.feature_version`).
STRETCH_VERSION = 1

PRICES = ("open", "high", "low", "close")

# Typical prices are sums: relative differences below this are their rounding. TA-Lib's MFI too takes them for none.
ROUNDING = 1e-12

# TA-Lib's running sums begin anew at every multiple of this many bars of the calendar.
BLOCK_BARS = 512

Rows = slice | np.ndarray  # a slice where the rows are neighbours: numpy then copies nothing


@dataclass(frozen=True)
class Stretch:
    """Consecutive bars of one symbol, arrays [n] without NaN, and the results that several indicators share.

    The `flat_` and `no_` masks, bool [n], are True where that held for every one of the last `bars` bars.
    """

    step_ms: int
    open_time_ms: np.ndarray  # int64
    open: np.ndarray  # float64, as the rest
    high: np.ndarray
    low: np.ndarray
    close: np.ndarray
    volume: np.ndarray

    def __len__(self) -> int:
        return len(self.close)

    def __getitem__(self, rows: Rows) -> "Stretch":
        return Stretch(self.step_ms, *(getattr(self, field.name)[rows] for field in fields(self)[1:]))

    @cached_property
    def series(self) -> dict[str, pd.Series]:
        """high, low, close, volume for `ta`, on a RangeIndex: on a DatetimeIndex it is wrong without saying so."""
        return {name: pd.Series(getattr(self, name)) for name in ("high", "low", "close", "volume")}

    @cached_property
    def macd(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """MACD line, signal, difference (12/26/9)."""
        return talib.MACD(self.close, fastperiod=12, slowperiod=26, signalperiod=9)

    @cached_property
    def bollinger(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Upper, middle, lower band (20, 2 population deviations); one line where the closes are flat."""
        flat = self.flat_closes(20)
        bands = in_blocks(self, 19, lambda part: talib.BBANDS(part.close, timeperiod=20, nbdevup=2, nbdevdn=2))
        upper, middle, lower = (np.where(flat, self.close, band) for band in bands)
        return upper, middle, lower

    @cached_property
    def aroon(self) -> tuple[np.ndarray, np.ndarray]:
        """Aroon up, down (25)."""
        flat = self.flat_prices(26)
        down, up = talib.AROON(self.high, self.low, timeperiod=25)
        return _unless(flat, up), _unless(flat, down)

    @cached_property
    def stochastic(self) -> tuple[np.ndarray, np.ndarray]:
        """%K and %D (14, 3); TA-Lib gives both from the bar on at which %D exists."""
        k, d = in_blocks(self, 15, lambda part: talib.STOCHF(part.high, part.low, part.close, 14, 3, 0))
        flat = self.flat_prices(14)
        before = np.concatenate(([False, False], flat))[: len(flat) + 2]
        return _unless(flat, k), _unless(flat | before[1:-1] | before[:-2], d)

    @cached_property
    def directional(self) -> np.ndarray:
        """(+DI) - (-DI), Wilder 14."""
        plus = talib.PLUS_DI(self.high, self.low, self.close, timeperiod=14)
        minus = talib.MINUS_DI(self.high, self.low, self.close, timeperiod=14)
        return _unless(self.no_range(14), plus - minus)

    @cached_property
    def ichimoku(self) -> tuple[np.ndarray, np.ndarray]:
        """Conversion line, base line (9/26), not displaced."""
        lines = IchimokuIndicator(self.series["high"], self.series["low"], window1=9, window2=26, window3=52)
        return lines.ichimoku_conversion_line().to_numpy(), lines.ichimoku_base_line().to_numpy()

    @cached_property
    def donchian(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Highest high, middle, lowest low of 20 bars."""
        channel = DonchianChannel(self.series["high"], self.series["low"], self.series["close"], window=20)
        high, low = channel.donchian_channel_hband(), channel.donchian_channel_lband()
        return high.to_numpy(), channel.donchian_channel_mband().to_numpy(), low.to_numpy()

    @cached_property
    def vortex(self) -> tuple[np.ndarray, np.ndarray]:
        """VI+ and VI- (14), behind one unknown bar: for the close before the first, `ta` takes the mean of all closes,
        future ones too."""
        unknown = pd.Series([np.nan])
        bars = (pd.concat([unknown, self.series[name]], ignore_index=True) for name in ("high", "low", "close"))
        lines = VortexIndicator(*bars, window=14)
        flat = self.no_range(14)
        both = (lines.vortex_indicator_pos(), lines.vortex_indicator_neg())
        positive, negative = (_unless(flat, line.to_numpy()[1:]) for line in both)
        return positive, negative

    @cached_property
    def atr(self) -> np.ndarray:
        """Average true range, Wilder 14."""
        return talib.ATR(self.high, self.low, self.close, timeperiod=14)

    @cached_property
    def ema_20(self) -> np.ndarray:
        """Exponential moving average of close, span 20."""
        return talib.EMA(self.close, timeperiod=20)

    @cached_property
    def volume_sma_20(self) -> np.ndarray:
        """Mean volume of 20 bars."""
        return window_sum(self.volume, 20) / 20

    @cached_property
    def true_range(self) -> np.ndarray:
        """The larger of high - low and the distances of both to the close before; NaN at the first bar."""
        return talib.TRANGE(self.high, self.low, self.close)

    @cached_property
    def typical_price(self) -> np.ndarray:
        """(high + low + close) / 3"""
        return (self.high + self.low + self.close) / 3.0

    def flat_closes(self, bars: int) -> np.ndarray:
        """All closes are the same price."""
        return _highest(self.close, bars) == _lowest(self.close, bars)

    def flat_prices(self, bars: int) -> np.ndarray:
        """Highs and lows are the same price throughout."""
        return _highest(self.high, bars) == _lowest(self.low, bars)

    def flat_typical(self, bars: int) -> np.ndarray:
        """All typical prices are the same."""
        highest = _highest(self.typical_price, bars)
        return highest - _lowest(self.typical_price, bars) <= ROUNDING * highest

    def no_range(self, bars: int) -> np.ndarray:
        """Every true range is 0."""
        return _highest(np.nan_to_num(self.true_range, nan=np.inf), bars) == 0

    def no_volume(self, bars: int) -> np.ndarray:
        """No bar traded."""
        return _highest(self.volume, bars) == 0

    def no_money_flow(self, bars: int) -> np.ndarray:
        """No bar traded at a typical price other than the one before: neither positive nor negative flow."""
        moved = np.abs(np.diff(self.typical_price, prepend=np.nan)) > ROUNDING * self.typical_price
        return _highest(np.where(moved, self.volume, 0.0), bars) == 0


def in_blocks(stretch: Stretch, warmup: int, compute: Callable[[Stretch], np.ndarray]) -> np.ndarray:
    """What `compute` makes of a stretch, [outputs, n], with a fresh start at every BLOCK_BARS bars of the calendar.

    For results that need the `warmup` bars before their own and no others, which TA-Lib nevertheless computes from sums
    that run through the whole history: each bar that ever passed leaves a residue of 1e-14 or so, and now and then that
    decides how a REAL is rounded. In blocks live and batch have the same residue, however far back their history goes.
    """
    block = stretch.open_time_ms // (BLOCK_BARS * stretch.step_ms)
    edges = [0, *(np.flatnonzero(np.diff(block)) + 1), len(stretch)]
    parts = []
    for first, end in pairwise(edges):
        begin = max(first - warmup, 0)
        parts.append(np.atleast_2d(compute(stretch[begin:end]))[:, first - begin :])
    return np.concatenate(parts, axis=1)


def window_sum(values: np.ndarray, bars: int, every: int = 1) -> np.ndarray:
    """Sum of the newest of `values`, the one `every` bars before it, and so on: `bars` of them, float64 [n].

    NaN where one of them is. Each sum is made anew, in one order: as no running sum is, it is the same to the bit
    whatever stands before it. That counts most for volumes: they have few digits, their mean often lies half-way
    between two REAL values, and there a residue would decide.
    """
    total = np.full(len(values), np.nan)
    reach = (bars - 1) * every
    if len(values) > reach:
        total[reach:] = values[: len(values) - reach]
        for back in range(reach - every, -1, -every):
            total[reach:] += values[reach - back : len(values) - back]
    return total


def _highest(values: np.ndarray, bars: int) -> np.ndarray:
    return talib.MAX(values, timeperiod=bars)


def _lowest(values: np.ndarray, bars: int) -> np.ndarray:
    return talib.MIN(values, timeperiod=bars)


def _unless(mask: np.ndarray, values: np.ndarray) -> np.ndarray:
    return np.where(mask, np.nan, values)


def unless(mask: Callable[[Stretch], np.ndarray], compute: Callable[[Stretch], np.ndarray]) -> Callable:
    """`compute`, but NaN where `mask` holds: what a library calls 0 or 100 there is unknown."""
    return lambda stretch: _unless(mask(stretch), compute(stretch))


def bars_of(candles: pd.DataFrame, interval: str) -> Stretch:
    """The columns of a DataFrame of candles as arrays, gaps and all, whatever its index.

    `open_time` is a column (or the index of that name): timestamps, without a zone taken as UTC, or integer
    milliseconds. Raises DataError where it does not rise from row to row, ValueError for an unknown interval.
    """
    step_ms = interval_ms(interval)
    times = candles.get("open_time", candles.index)
    if pd.api.types.is_integer_dtype(times.dtype) and len(times):
        open_time_ms = times.to_numpy(np.int64)
    else:
        open_time_ms = pd.DatetimeIndex(pd.to_datetime(times, utc=True)).as_unit("ms").asi8
    unordered = np.flatnonzero(np.diff(open_time_ms) <= 0)
    if len(unordered):
        row = int(unordered[0]) + 1
        raise DataError(
            f"candles must be in order of open_time, each bar once: row {row} is {_name_time(open_time_ms[row])}, "
            f"the row before it is {_name_time(open_time_ms[row - 1])}"
        )
    columns = (candles[name].to_numpy(np.float64) for name in (*PRICES, "volume"))
    return Stretch(step_ms, open_time_ms, *columns)


def _name_time(time_ms: int) -> str:
    return "no time" if time_ms < 0 else format_time(int(time_ms))


def stretches(bars: Stretch, max_gap_bars: int = 0) -> list[tuple[Rows, Stretch]]:
    """Each gap-free stretch of `bars` and its rows there, oldest first; rows that are in none are missing bars."""
    sound = np.isfinite(bars.volume) & (bars.volume >= 0)
    for name in PRICES:
        price = getattr(bars, name)
        sound &= np.isfinite(price) & (price > 0)
    flat = sound & (bars.high == bars.low) & (bars.volume == 0)
    rows = np.arange(len(bars))
    flat_bars = rows - np.maximum.accumulate(np.where(flat, -1, rows)) if len(rows) else rows
    run_over = flat & (flat_bars >= FLAT_RUN_BARS)
    kept = np.flatnonzero(sound & ~run_over)
    far = np.diff(bars.open_time_ms[kept]) > bars.step_ms * (1 + max_gap_bars)
    runs_before = np.cumsum(run_over)[kept]
    parts = np.split(kept, np.flatnonzero(far | (np.diff(runs_before) > 0)) + 1)
    places = [_neighbours(part) for part in parts if len(part)]
    return [(place, bars[place]) for place in places]


def _neighbours(rows: np.ndarray) -> Rows:
    first, last = int(rows[0]), int(rows[-1])
    return slice(first, last + 1) if last - first == len(rows) - 1 else rows
