"""The newest candles of every symbol in memory, as many as the model inputs of a look-back window depend on.

Recursive indicators depend on where their history starts, if only in the seventh digit. The start therefore lies on a
fixed grid of time and not so many bars before the newest: whatever comes together, late or after a restart, a bar's
inputs are the same to the bit.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from perpcast.market import Candle, CandleSeries
from perpcast.timeframe import floor_ms


class CandleHistory:
    """`bars` candles before each newest one are enough; those of one cell of `cell_bars` share their first candle."""

    def __init__(self, symbols: Sequence[str], step_ms: int, bars: int, cell_bars: int) -> None:
        self._step_ms, self._bars = step_ms, bars
        self._cell_ms = cell_bars * step_ms
        self._series = dict.fromkeys(symbols, CandleSeries.empty())

    def start_ms(self, open_time_ms: int) -> int:
        """The first candle that the inputs of the bar `open_time_ms` are computed from."""
        return self.cell_ms(open_time_ms) - (self._bars - 1) * self._step_ms

    def cell_ms(self, open_time_ms: int) -> int:
        """The cell of a bar: bars of one cell can be computed together."""
        return floor_ms(open_time_ms, self._cell_ms)

    def append(self, candles: Mapping[str, Sequence[Candle]]) -> None:
        """Adds newer candles, oldest first."""
        for symbol, new in candles.items():
            if new:
                arrived = CandleSeries.from_candles(list(new))
                self._series[symbol] = CandleSeries.concatenated(self._series[symbol], arrived)

    def forget(self, open_time_ms: int) -> None:
        """Lets go of the candles that neither the bar `open_time_ms` nor any later one needs."""
        for symbol, series in self._series.items():
            first = np.searchsorted(series.open_time_ms, self.start_ms(open_time_ms))
            self._series[symbol] = series[int(first) :]

    def series(self, symbol: str, first_ms: int, last_ms: int) -> CandleSeries:
        """The candles of a symbol from `first_ms` to `last_ms`, both included."""
        series = self._series[symbol]
        first, end = np.searchsorted(series.open_time_ms, [first_ms, last_ms + 1])
        return series[int(first) : int(end)]
