"""Recorded real candles (../shared/data), which tests read where they are; what needs them skips where they are not."""

from pathlib import Path

import pandas as pd
import pytest

CANDLES = Path(__file__).parents[2] / "shared" / "data" / "candles"

needs_recorded = pytest.mark.skipif(
    not CANDLES.exists(), reason="recorded candles are kept in shared/data, which is absent"
)


def recorded_candles(name: str, first: int = 0, rows: int | None = None) -> pd.DataFrame:
    """Some rows of a recorded file, such as `okx_swap_15m/BTCUSDT`, on a RangeIndex."""
    frame = pd.read_parquet(CANDLES / f"{name}.parquet").rename(columns={"timestamp": "open_time"})
    return frame.iloc[first : None if rows is None else first + rows].reset_index(drop=True)
