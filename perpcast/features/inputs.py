"""Model inputs: what the network sees of a bar, from stored indicators and the candle; the same in batch and live.

Indicators are rounded as the database rounds them before anything is derived from them, so that a runner that has just
computed them and a training that reads them back see the same numbers.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from perpcast.features.indicators import CANDLES_49, COLUMNS, DAY_MS, Indicator, compute_indicators
from perpcast.features.stretch import Stretch, bars_of, stretch_rows
from perpcast.features.transforms import in_units_of_atr

# The candle's own shape, in units of the average true range.
CANDLE_SHAPE = ("candle_body", "candle_upper_wick", "candle_lower_wick")
OBSERVED = (*(indicator.name for indicator in CANDLES_49 if indicator.model_input), *CANDLE_SHAPE)
KNOWN = ("hour_sin", "hour_cos", "day_of_week_sin", "day_of_week_cos", "is_weekend")

# Bars of history, the newest included, from which every model input equals the one from all of history.
# Measured: 510 are enough; docs/decisions/0003 says how, tests/test_features_inputs.py measures again.
WARMUP_BARS = 600

# What is nearer to zero than this is the residue of a library's running sum, another one for another start of history
# (stoch_k - stoch_d after three equal values, the money flow of a window that only rose): it is zero.
ZERO_BELOW = 1e-9


def rounded_as_stored(indicators: np.ndarray, registry: Sequence[Indicator] = CANDLES_49) -> np.ndarray:
    """Indicators [n, columns] as the database gives them back: REAL but for the `double` ones, in float64.

    What REAL cannot hold is NaN.
    """
    with np.errstate(over="ignore"):
        stored = indicators.astype(np.float32).astype(np.float64)
    stored[~np.isfinite(stored)] = np.nan
    for number, indicator in enumerate(registry):
        if indicator.double:
            stored[:, number] = indicators[:, number]
    return stored


def observed_inputs(
    candles: pd.DataFrame, indicators: np.ndarray, interval: str = "15", max_gap_bars: int = 0
) -> np.ndarray:
    """The observed inputs of every bar, unscaled: float32 [n, len(OBSERVED)], NaN where unknown.

    `indicators` is [n, 49] in the order of `indicators.COLUMNS`, for the bars of `candles`; computed just now or read
    back from the database, the result is the same.
    """
    bars = bars_of(candles)
    stored = rounded_as_stored(np.asarray(indicators, np.float64))
    inputs = np.full((len(bars), len(OBSERVED)), np.nan)
    with np.errstate(all="ignore"):
        for rows in stretch_rows(bars, interval, max_gap_bars):
            inputs[rows] = _stretch_inputs(bars[rows], dict(zip(COLUMNS, stored[rows].T, strict=True)))
        inputs[np.abs(inputs) < ZERO_BELOW] = 0.0
        inputs = inputs.astype(np.float32)
    inputs[~np.isfinite(inputs)] = np.nan
    return inputs


def _stretch_inputs(stretch: Stretch, stored: dict[str, np.ndarray]) -> np.ndarray:
    columns = [
        indicator.model_input(stored[indicator.name], stretch, stored)
        for indicator in CANDLES_49
        if indicator.model_input
    ]
    top, bottom = np.maximum(stretch.open, stretch.close), np.minimum(stretch.open, stretch.close)
    for length in (stretch.close - stretch.open, stretch.high - top, bottom - stretch.low):
        columns.append(in_units_of_atr(length / stretch.close, stretch, stored))
    return np.column_stack(columns)


def known_inputs(open_time_ms: np.ndarray) -> np.ndarray:
    """The calendar of bars, known in advance for any bar to come: float32 [n, len(KNOWN)]."""
    day = open_time_ms // DAY_MS
    hour_angle = open_time_ms % DAY_MS // 3_600_000 * (2 * np.pi / 24)
    weekday = (day + 3) % 7
    day_angle = weekday * (2 * np.pi / 7)
    columns = (np.sin(hour_angle), np.cos(hour_angle), np.sin(day_angle), np.cos(day_angle), weekday >= 5)
    return np.column_stack(columns).astype(np.float32)


def compute_inputs(candles: pd.DataFrame, interval: str = "15", max_gap_bars: int = 0) -> np.ndarray:
    """Observed inputs straight from candles, as a live runner wants them: float32 [n, len(OBSERVED)]."""
    indicators = compute_indicators(candles, interval, max_gap_bars).to_numpy()
    return observed_inputs(candles, indicators, interval, max_gap_bars)
