"""A seeded synthetic market: a common factor, volatility clustering, jumps, daily seasonality, a planted edge.

Every symbol is a martingale, but for the edge. The model of one bar (m: pressure, s: volatility, f: common, e: own):

    return    = s[t] * (edge * m[t-1] + sqrt(c) * f[t] + sqrt(1-c) * e[t]) + jumps - s[t]^2 / 2
    pressure  m: hidden, AR(1) with a half-life of 8 hours, variance 1, one for each symbol
    volume    of rising bars is larger while m is positive, of falling bars while it is negative, edge or not

So the pressure can be read from candles (money flow and the like), and is worth something exactly as far as `edge` is
larger than 0: `edge` is how many volatilities a bar drifts for one unit of the pressure before it, which is, jumps
aside, the best one-bar information coefficient that there is to find. With edge 0 every trade earns minus its costs.

The past does not depend on when it is looked at: bars are a function of (seed, edge, symbol, time) alone, whatever the
market's end and whichever other symbols are asked for.
"""

from dataclasses import dataclass, replace
from decimal import Decimal
from zlib import crc32

import numpy as np
import pandas as pd

from perpcast.market import CandleSeries, Instrument
from perpcast.simulator.instruments import LISTED, START_PRICES
from perpcast.simulator.market import BASE_MS, FUNDING_MS, FundingSeries, decimals_of
from perpcast.timeframe import parse_time, to_ms

START_MS = to_ms(parse_time("2022-01-01T00:00Z"))
_BARS_PER_DAY = 86_400_000 // BASE_MS

PRESSURE_HALF_LIFE_BARS = 32
PRESSURE_PERSISTENCE = 0.5 ** (1 / PRESSURE_HALF_LIFE_BARS)
PRESSURE_IN_VOLUME = 0.6  # log volume per unit of pressure in the bar's direction
COMMON_SHARE = (0.5, 0.8)  # of a symbol's variance that is the common factor's
BAR_VOLATILITY = {"BTCUSDT": 0.0020, "ETHUSDT": 0.0026}  # typical size of a 15-minute move
OTHER_VOLATILITY = (0.0028, 0.0040)
JUMPS_PER_BAR = 1 / 600
COMMON_JUMPS = 1 / 4  # of all symbols at once, for one of a symbol alone
JUMP_SIZE = 4.0  # in units of the bar's volatility
DAILY_TURNOVER = {"BTCUSDT": 5e9, "ETHUSDT": 2.5e9}
OTHER_TURNOVER = (3e7, 4e8)


@dataclass(frozen=True)
class Swing:
    """A part of log volatility that comes and goes: an AR(1) process of this stationary deviation."""

    stream: str
    deviation: float
    persistence: float


COMMON_SWINGS = (Swing("slow volatility", 0.30, 0.9995), Swing("fast volatility", 0.25, 0.98))
OWN_SWINGS = (Swing("slow volatility", 0.15, 0.999), Swing("fast volatility", 0.25, 0.95))


@dataclass(frozen=True)
class HiddenState:
    """All that a symbol's coming bars depend on, as it stands at each of its bars; known to no client."""

    pressure: np.ndarray  # [n]
    swings: np.ndarray  # [n, COMMON_SWINGS + OWN_SWINGS], in units of log volatility
    typical_volatility: float  # of a bar without swing and season


@dataclass(frozen=True)
class _Common:
    """What all symbols share: standard normal moves, log volatility, jumps in units of volatility: [n] each."""

    move: np.ndarray
    log_volatility: np.ndarray
    jump: np.ndarray


class SyntheticMarket:
    """51 symbols from 2022 (or their launch) until `end_ms`; a symbol's bars are made when it is first asked for."""

    def __init__(self, seed: int, edge: float, end_ms: int) -> None:
        if end_ms < START_MS + BASE_MS:
            raise ValueError("a synthetic market begins on 2022-01-01: its end must lie after that")
        if edge < 0:
            raise ValueError(f"edge must not be negative, received {edge}")
        self._seed, self._edge = seed, edge
        self._time_ms = np.arange(START_MS, end_ms, BASE_MS, dtype=np.int64)
        self._common: _Common | None = None
        self._series: dict[str, CandleSeries] = {}

    @property
    def symbols(self) -> tuple[str, ...]:
        """All listed symbols, sorted."""
        return tuple(sorted(LISTED))

    def instrument(self, symbol: str) -> Instrument:
        """Bybit's own rules, but with a tick that leaves the starting price at least seven digits.

        In years a price may fall to a hundredth; on Bybit's tick of 2025 it would then stand on a coarse grid.
        """
        finest = Decimal(1).scaleb(Decimal(str(START_PRICES[symbol])).adjusted() - 6)
        return replace(LISTED[symbol], tick_size=min(LISTED[symbol].tick_size, finest))

    def candles(self, symbol: str) -> CandleSeries:
        """All bars of one symbol."""
        if symbol not in self._series:
            self._series[symbol] = self._generate(symbol)
        return self._series[symbol]

    @property
    def edge(self) -> float:
        """Volatilities that a bar drifts for one unit of the pressure before it."""
        return self._edge

    def hidden_state(self, symbol: str) -> HiddenState:
        """The state of the generator at each bar of `candles`, for measuring what can be known at all."""
        swings = np.column_stack([self._swings("", COMMON_SWINGS), self._swings(symbol, OWN_SWINGS)])
        _, size, _ = self._character(symbol)
        return HiddenState(self.pressure(symbol), swings[-len(self.candles(symbol)) :], size)

    def pressure(self, symbol: str) -> np.ndarray:
        """The hidden pressure at each bar of `candles`, known to no client: float64 [n], for measuring the edge."""
        return self._pressure(symbol)[-len(self.candles(symbol)) :]

    def funding(self, symbol: str) -> FundingSeries:
        """A payment every 8 hours since the first bar: around one basis point, bounded as BTCUSDT's are."""
        if not len(self.candles(symbol)):
            return FundingSeries.empty()
        first = int(self.candles(symbol).open_time_ms[0])
        time_ms = np.arange(START_MS, self._time_ms[-1] + BASE_MS, FUNDING_MS, dtype=np.int64)
        swing = _ar1(self._random(symbol, "funding").standard_normal(len(time_ms)), 0.9)
        rate = np.round(np.clip(1e-4 + 1e-4 * swing, -5e-3, 5e-3), 8)
        known = time_ms > first
        return FundingSeries(time_ms[known], rate[known])

    def _random(self, symbol: str, stream: str) -> np.random.Generator:
        # One stream for each quantity: a longer market draws the same numbers first.
        return np.random.default_rng([self._seed, crc32(symbol.encode()), crc32(stream.encode())])

    def _normal(self, symbol: str, stream: str) -> np.ndarray:
        return self._random(symbol, stream).standard_normal(len(self._time_ms))

    def _pressure(self, symbol: str) -> np.ndarray:
        return _ar1(self._normal(symbol, "pressure"), PRESSURE_PERSISTENCE)

    def _swings(self, symbol: str, swings: tuple[Swing, ...]) -> np.ndarray:
        """[n, swings]"""
        return np.column_stack([s.deviation * _ar1(self._normal(symbol, s.stream), s.persistence) for s in swings])

    def _character(self, symbol: str) -> tuple[float, float, float]:
        """Share of the common factor, typical volatility of a bar, daily turnover."""
        random = self._random(symbol, "character")
        share, size, turnover = (random.uniform(*span) for span in (COMMON_SHARE, OTHER_VOLATILITY, (0, 1)))
        between = OTHER_TURNOVER[0] * (OTHER_TURNOVER[1] / OTHER_TURNOVER[0]) ** turnover
        return share, BAR_VOLATILITY.get(symbol, size), DAILY_TURNOVER.get(symbol, between)

    def _jumps(self, symbol: str, per_bar: float) -> np.ndarray:
        """Mostly 0, else of JUMP_SIZE on average, up as often as down."""
        happens = self._random(symbol, "jump times").random(len(self._time_ms)) < per_bar
        return np.where(happens, JUMP_SIZE * self._random(symbol, "jump sizes").laplace(size=len(happens)), 0.0)

    def _shared(self) -> _Common:
        if self._common is None:
            log_volatility = self._swings("", COMMON_SWINGS).sum(axis=1) + season(self._time_ms)
            self._common = _Common(
                self._normal("", "move"), log_volatility, self._jumps("", JUMPS_PER_BAR * COMMON_JUMPS)
            )
        return self._common

    def _generate(self, symbol: str) -> CandleSeries:
        common, (share, size, turnover) = self._shared(), self._character(symbol)
        volatility = size * np.exp(common.log_volatility + self._swings(symbol, OWN_SWINGS).sum(axis=1))
        pressure = self._pressure(symbol)
        drift = self._edge * np.concatenate(([0.0], pressure[:-1]))
        move = np.sqrt(share) * common.move + np.sqrt(1 - share) * self._normal(symbol, "move")
        jump = common.jump + self._jumps(symbol, JUMPS_PER_BAR)
        log_return = volatility * (drift + move + jump) - volatility**2 / 2

        open_, high, low, close = self._prices(symbol, log_return, volatility)
        busyness = 0.8 * np.log(volatility / size) + 0.3 * np.abs(move + jump) + 0.4 * self._normal(symbol, "volume")
        busyness += PRESSURE_IN_VOLUME * pressure * np.sign(log_return)
        volume = turnover / _BARS_PER_DAY * np.exp(busyness - 0.6) / close
        volume = np.round(volume, decimals_of(LISTED[symbol].qty_step))
        traded = np.round(volume * (open_ + high + low + close) / 4, 4)
        series = CandleSeries(self._time_ms, open_, high, low, close, volume, traded)
        return series[np.searchsorted(self._time_ms, LISTED[symbol].launch_time_ms) :]

    def _prices(
        self, symbol: str, log_return: np.ndarray, volatility: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Open, high, low, close [n] on the tick grid; a bar opens where the last one closed, as Bybit's do.

        The extremes are those of a Brownian path with the bar's ends (the law of a bridge's maximum), so that a stop
        inside a bar is met as often as a trade meets it.
        """
        tick_size = self.instrument(symbol).tick_size
        tick, decimals = float(tick_size), decimals_of(tick_size)
        path = np.log(START_PRICES[symbol]) + np.cumsum(log_return)
        uniform = self._random(symbol, "extremes").random((len(path), 2))
        reach = np.sqrt(log_return[:, None] ** 2 - 2 * volatility[:, None] ** 2 * np.log1p(-uniform))
        opens = path - log_return
        high, low = opens + (log_return + reach[:, 0]) / 2, opens + (log_return - reach[:, 1]) / 2
        close = np.maximum(np.round(np.exp(path), decimals), tick)
        open_ = np.concatenate(([START_PRICES[symbol]], close[:-1]))
        high = np.maximum.reduce([np.round(np.exp(high), decimals), open_, close])
        low = np.minimum.reduce([np.round(np.exp(low), decimals), open_, close])
        return open_, high, np.maximum(low, tick), close


def _ar1(noise: np.ndarray, persistence: float) -> np.ndarray:
    """A stationary AR(1) process of variance 1 from standard normal noise: [n]."""
    size = np.sqrt((1 - persistence) / (1 + persistence))  # of what the filter leaves of unit noise
    first = noise[:1] * size
    return (
        pd.Series(np.concatenate((first, noise[1:]))).ewm(alpha=1 - persistence, adjust=False).mean().to_numpy() / size
    )


def season(time_ms: np.ndarray) -> np.ndarray:
    """Log volatility by the hour and the day: busiest at 14:30 UTC, quieter at night and on weekends."""
    day, hour = time_ms / 86_400_000, time_ms % 86_400_000 / 3_600_000
    weekend = (day.astype(np.int64) + 3) % 7 >= 5  # 1970-01-01 was a Thursday; Monday is 0
    return 0.25 * np.cos(2 * np.pi * (hour - 14.5) / 24) - 0.2 * weekend
