"""The windows of a span as a value: which symbol, which bar, and what a trade signalled there came to."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from perpcast.timeframe import DAY_MS


@dataclass(frozen=True)
class Windows:
    """The windows of one span with what came true: arrays [n], one row for a symbol's signal bar."""

    symbols: tuple[str, ...]
    symbol: np.ndarray  # int, index into `symbols`
    open_time_ms: np.ndarray  # int64
    realised: Mapping[str, np.ndarray]  # by side, net return of the trade, a fraction
    bars_held: Mapping[str, np.ndarray]  # by side
    step_ms: int

    def __len__(self) -> int:
        return len(self.symbol)

    @property
    def day(self) -> np.ndarray:
        """Number of the UTC day since the epoch."""
        return self.open_time_ms // DAY_MS

    def __getitem__(self, rows: np.ndarray) -> "Windows":
        return Windows(
            self.symbols,
            self.symbol[rows],
            self.open_time_ms[rows],
            {side: values[rows] for side, values in self.realised.items()},
            {side: values[rows] for side, values in self.bars_held.items()},
            self.step_ms,
        )
