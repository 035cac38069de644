"""The market's words as frozen values: candles, instruments, funding, and what a trader does with them.

Times are the open of the bar, in UTC milliseconds (`open_time_ms`). Research arrays are float64; prices and quantities
that are sent to an exchange are Decimal.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from decimal import Decimal
from typing import Literal

import numpy as np
import pandas as pd

Side = Literal["buy", "sell"]
SIDES: tuple[Side, Side] = ("buy", "sell")

# A run of at least this many bars without movement and volume hides an outage: it counts as a gap (DESIGN 7).
FLAT_RUN_BARS = 8


@dataclass(frozen=True, slots=True)
class Candle:
    """One closed bar of one symbol; volume in base coins, turnover in USDT."""

    symbol: str
    open_time_ms: int
    open: float
    high: float
    low: float
    close: float
    volume: float
    turnover: float


@dataclass(frozen=True)
class CandleSeries:
    """Bars of one symbol, oldest first, strictly increasing times; columns are arrays of one length [n]."""

    open_time_ms: np.ndarray  # int64
    open: np.ndarray  # float64, as the rest
    high: np.ndarray
    low: np.ndarray
    close: np.ndarray
    volume: np.ndarray
    turnover: np.ndarray

    def __len__(self) -> int:
        return len(self.open_time_ms)

    def __getitem__(self, rows: slice | np.ndarray) -> "CandleSeries":
        return CandleSeries(*(getattr(self, field.name)[rows] for field in fields(self)))

    @classmethod
    def empty(cls) -> "CandleSeries":
        """A series without bars."""
        return cls(np.empty(0, np.int64), *(np.empty(0) for _ in range(6)))

    @classmethod
    def from_candles(cls, candles: list[Candle]) -> "CandleSeries":
        """Columns from single candles, in the order given."""
        rows = [(c.open_time_ms, c.open, c.high, c.low, c.close, c.volume, c.turnover) for c in candles]
        columns = list(zip(*rows, strict=True)) if rows else [()] * 7
        return cls(np.array(columns[0], np.int64), *(np.array(column, np.float64) for column in columns[1:]))

    @classmethod
    def concatenated(cls, *parts: "CandleSeries") -> "CandleSeries":
        """The bars of all parts, in the order given."""
        names = [field.name for field in fields(cls)]
        return cls(*(np.concatenate([getattr(part, name) for part in (cls.empty(), *parts)]) for name in names))

    def candles(self, symbol: str) -> Iterator[Candle]:
        """The bars one by one."""
        columns = (getattr(self, field.name).tolist() for field in fields(self))
        return (Candle(symbol, *row) for row in zip(*columns, strict=True))

    def frame(self) -> pd.DataFrame:
        """A DataFrame on a RangeIndex, `open_time` as aware UTC timestamps, the other columns by their names."""
        columns = {field.name: getattr(self, field.name) for field in fields(self)[1:]}
        open_time = pd.to_datetime(self.open_time_ms, unit="ms", utc=True)
        return pd.DataFrame({"open_time": open_time, **columns})


def flat_run_mask(high: np.ndarray, low: np.ndarray, volume: np.ndarray) -> np.ndarray:
    """True for bars inside a run of FLAT_RUN_BARS or more bars with high = low and no volume: bool [n]."""
    flat = (high == low) & (volume == 0)
    edges = np.diff(np.concatenate(([0], flat.view(np.int8), [0])))
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    mask = np.zeros(len(flat), bool)
    for start, end in zip(starts, ends, strict=True):
        if end - start >= FLAT_RUN_BARS:
            mask[start:end] = True
    return mask


def is_of_other_interval(open_time_ms: np.ndarray, step_ms: int) -> bool:
    """Whether bars at these times [n], in order, are those of another interval: most of their distances are shorter
    than `step_ms`, or all of eight and more are longer. Bars do not name their interval; a few odd ones prove nothing.
    """
    steps = np.diff(open_time_ms)
    steps = steps[steps > 0]
    return bool((len(steps) > 0 and np.median(steps) < step_ms) or (len(steps) >= 8 and (steps > step_ms).all()))


@dataclass(frozen=True, slots=True)
class Instrument:
    """The exchange's rules for one symbol; they change, and are read again before they are relied on."""

    symbol: str
    status: str
    tick_size: Decimal
    qty_step: Decimal
    min_quantity: Decimal
    min_notional: Decimal
    max_leverage: Decimal
    launch_time_ms: int  # sometimes a placeholder: never the proof of a first candle
    funding_interval_minutes: int
    delivery_time_ms: int | None = None  # of its last trade, once it is being delisted


USDT_PERPETUAL = "USDT perpetual"


@dataclass(frozen=True, slots=True)
class Listing:
    """One linear contract of the exchange, of any kind and state: what it is, before its rules matter.

    `kind` is USDT_PERPETUAL, or what it is instead (`dated future`, `USDC perpetual`, `stock perpetual`).
    """

    symbol: str
    kind: str
    status: str  # Trading, PreLaunch, Delivering, Closed
    launch_time_ms: int
    delivery_time_ms: int | None

    @property
    def is_usdt_perpetual(self) -> bool:
        """Whether it is the kind of contract that this program is about."""
        return self.kind == USDT_PERPETUAL


@dataclass(frozen=True, slots=True)
class Ticker:
    """The present state of one contract; None where the exchange has no such number (an empty book, no funding)."""

    symbol: str
    last_price: Decimal
    mark_price: Decimal
    bid_price: Decimal | None
    ask_price: Decimal | None
    turnover_24h: Decimal  # USDT
    volume_24h: Decimal  # base coins
    funding_rate: Decimal | None
    next_funding_time_ms: int | None


@dataclass(frozen=True, slots=True)
class FundingRate:
    """One funding payment: positive means longs pay shorts, as a fraction of the position's value."""

    symbol: str
    funding_time_ms: int
    rate: float


@dataclass(frozen=True, slots=True)
class Signal:
    """What a producer (a model, later a rule) expects of a trade that enters after the bar `open_time_ms`."""

    symbol: str
    open_time_ms: int
    side: Side
    score: float
    source: str
