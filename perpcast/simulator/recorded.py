"""A market of recorded candles: one parquet file a symbol (SYMBOL.parquet), served as it was recorded, gaps and all."""

from pathlib import Path

import numpy as np
import pandas as pd

from perpcast.errors import DataError, MissingInputError
from perpcast.market import CandleSeries, Instrument
from perpcast.simulator.instruments import instrument_of
from perpcast.simulator.market import BASE_MS, FundingSeries
from perpcast.timeframe import format_time

_COLUMNS = ("open", "high", "low", "close", "volume")


class RecordedMarket:
    """Candles of a folder, all read at once. Funding was not recorded with them.

    Raises MissingInputError where the folder holds no candles, DataError where a file is not what it has to be.
    """

    def __init__(self, folder: Path) -> None:
        self._series = {path.stem: _read(path) for path in sorted(folder.glob("*.parquet"))}
        if not self._series:
            raise MissingInputError(f"no candles in {folder}: expected files named SYMBOL.parquet, as BTCUSDT.parquet")
        self._instruments = {symbol: instrument_of(symbol, series) for symbol, series in self._series.items()}

    @property
    def symbols(self) -> tuple[str, ...]:
        """All listed symbols, sorted."""
        return tuple(self._series)

    @property
    def end_ms(self) -> int:
        """The close of the newest bar of all symbols."""
        return max(int(series.open_time_ms[-1]) for series in self._series.values()) + BASE_MS

    def instrument(self, symbol: str) -> Instrument:
        """Bybit's own rules where the symbol is one of the 51, else derived from the candles."""
        return self._instruments[symbol]

    def candles(self, symbol: str) -> CandleSeries:
        """All bars of one symbol."""
        return self._series[symbol]

    def funding(self, symbol: str) -> FundingSeries:
        """None: the files hold candles only, and nothing is invented for them."""
        return FundingSeries.empty()


def _read(path: Path) -> CandleSeries:
    try:
        frame = pd.read_parquet(path, columns=["timestamp", *_COLUMNS])
        open_time_ms = pd.to_datetime(frame["timestamp"], utc=True).dt.as_unit("ms").astype("int64").to_numpy()
        open_, high, low, close, volume = (frame[name].to_numpy(np.float64) for name in _COLUMNS)
    except (OSError, ValueError, KeyError, TypeError) as error:
        columns = ", ".join(("timestamp", *_COLUMNS))
        raise DataError(f"{path} cannot be read: expected parquet with {columns} ({_line(error)})") from None
    if not len(frame):
        raise DataError(f"{path} holds no bars")
    wrong = np.flatnonzero(np.diff(open_time_ms) <= 0)
    if len(wrong):
        raise DataError(f"{path}: times must increase, they do not after {format_time(open_time_ms[wrong[0]])}")
    wrong = np.flatnonzero(open_time_ms % BASE_MS)
    if len(wrong):
        raise DataError(f"{path}: expected opens of 15-minute bars, found {format_time(open_time_ms[wrong[0]])}")
    # Turnover was not recorded: the volume at the bar's mean price stands in for it.
    return CandleSeries(open_time_ms, open_, high, low, close, volume, volume * (open_ + high + low + close) / 4)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
