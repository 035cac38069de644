"""Model inputs: what the network sees of a bar, from stored indicators and the candle; the same in batch and live.

Indicators are rounded as the database rounds them before anything is derived from them, so that a runner that has just
computed them and a training that reads them back see the same numbers.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pandas as pd

from perpcast.features.indicators import CANDLES_49, DAY_MS, Indicator, compute_indicators
from perpcast.features.stretch import Stretch, bars_of, stretches
from perpcast.features.transforms import in_units_of_atr

# The candle's own shape, in units of the average true range.
CANDLE_SHAPE = ("candle_body", "candle_upper_wick", "candle_lower_wick")
KNOWN = ("hour_sin", "hour_cos", "day_of_week_sin", "day_of_week_cos", "is_weekend")

# Bars of history, the newest included, from which every model input equals the one from all of history.
# Measured: 500 are enough to 1e-6, 571 to the bit; docs/decisions/0003, tests/test_features_warmup.py measures again.
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
    stored[np.isinf(stored)] = np.nan
    for number, indicator in enumerate(registry):
        if indicator.double:
            stored[:, number] = indicators[:, number]
    return stored


def observed_inputs(
    candles: pd.DataFrame,
    indicators: np.ndarray,
    interval: str = "15",
    max_gap_bars: int = 0,
    registry: Sequence[Indicator] = CANDLES_49,
) -> np.ndarray:
    """The observed inputs of every bar, unscaled: float32 [n, len(observed_names(registry))], NaN where unknown.

    `indicators` is [n, len(registry)] in that order, for the bars of `candles`; computed just now or read back from the
    database, the result is the same.
    """
    bars = bars_of(candles, interval)
    stored = rounded_as_stored(np.asarray(indicators, np.float64), registry).T
    inputs = np.full((len(observed_names(registry)), len(bars)), np.nan, np.float32)
    with np.errstate(all="ignore"):
        for rows, stretch in stretches(bars, max_gap_bars):
            columns = {indicator.name: stored[number, rows] for number, indicator in enumerate(registry)}
            for line, values in zip(inputs, _stretch_inputs(stretch, columns, registry), strict=True):
                line[rows] = np.where(np.abs(values) < ZERO_BELOW, 0.0, values)
    inputs[np.isinf(inputs)] = np.nan
    return np.ascontiguousarray(inputs.T)


def observed_names(registry: Sequence[Indicator] = CANDLES_49) -> tuple[str, ...]:
    """The observed inputs in their order: of every indicator but the calendar, and the candle's own shape."""
    shape = CANDLE_SHAPE if any(indicator.name == "atr_pct" for indicator in registry) else ()
    return (*(indicator.name for indicator in registry if indicator.model_input), *shape)


def _stretch_inputs(
    stretch: Stretch, stored: Mapping[str, np.ndarray], registry: Sequence[Indicator]
) -> Iterator[np.ndarray]:
    for indicator in registry:
        if indicator.model_input:
            yield indicator.model_input(stored[indicator.name], stretch, stored)
    if "atr_pct" in stored:
        top, bottom = np.maximum(stretch.open, stretch.close), np.minimum(stretch.open, stretch.close)
        for length in (stretch.close - stretch.open, stretch.high - top, bottom - stretch.low):
            yield in_units_of_atr(length / stretch.close, stretch, stored)


OBSERVED = observed_names()


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
