"""A market for the tests of the universe: contracts of any state, with candles and turnover from day to day."""

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal

import numpy as np

from perpcast.market import CandleSeries, Instrument
from perpcast.simulator.market import FundingSeries
from perpcast.timeframe import floor_ms, parse_time, to_ms

STEP_MS = 900_000
DAY_MS = 86_400_000
NOW = to_ms(parse_time("2025-07-01T06:07Z"))
DAYS = 40
START = floor_ms(NOW, STEP_MS) - DAYS * DAY_MS  # 2025-05-22 06:00, in the middle of a 12-hour bar


@dataclass(frozen=True)
class Contract:
    """Days are counted from the first training bar; the turnover in USDT a day changes at that bar."""

    first_day: float = -60
    last_day: float = DAYS + 1
    past_turnover: float = 1e6
    turnover: float = 1e6
    status: str = "Trading"
    launch_day: float | None = None  # where it is not the first day
    delivery_day: float | None = None
    missing_days: tuple[float, float] = (0, 0)  # bars that open in between are not there

    def instrument(self, symbol: str) -> Instrument:
        tick, step = Decimal("0.001"), Decimal("0.1")
        launch_day = self.first_day if self.launch_day is None else self.launch_day
        delivery_ms = None if self.delivery_day is None else on_day(self.delivery_day)
        five, fifty = Decimal(5), Decimal(50)
        return Instrument(symbol, self.status, tick, step, step, five, fifty, on_day(launch_day), 480, delivery_ms)

    def candles(self) -> CandleSeries:
        time_ms = np.arange(floor_ms(on_day(self.first_day), STEP_MS), on_day(self.last_day), STEP_MS, dtype=np.int64)
        first, end = (on_day(day) for day in self.missing_days)
        time_ms = time_ms[(time_ms < first) | (time_ms >= end)]
        price = np.full(len(time_ms), 2.0)
        turnover = np.where(time_ms < START, self.past_turnover, self.turnover) * STEP_MS / DAY_MS
        return CandleSeries(time_ms, price, price + 1, price - 1, price, turnover / 2, turnover)


def on_day(day: float) -> int:
    """Milliseconds at so many days after the first training bar."""
    return START + round(day * DAY_MS)


class ContractMarket:
    """The contracts as a market of the local exchange."""

    def __init__(self, contracts: Mapping[str, Contract]) -> None:
        self._instruments = {symbol: contract.instrument(symbol) for symbol, contract in contracts.items()}
        self._candles = {symbol: contract.candles() for symbol, contract in contracts.items()}

    @property
    def symbols(self) -> tuple[str, ...]:
        return tuple(sorted(self._instruments))

    def instrument(self, symbol: str) -> Instrument:
        return self._instruments[symbol]

    def candles(self, symbol: str) -> CandleSeries:
        return self._candles[symbol]

    def funding(self, symbol: str) -> FundingSeries:
        return FundingSeries.empty()
