"""How a stored indicator becomes a model input: scale-free, so that one model serves every symbol alike.

Every function takes the stored values of one stretch, the stretch, and the stored columns beside them, all [n], and
returns float64 [n]; NaN where it cannot be told, and never a value that needs a bar from before the stretch.
"""

from collections.abc import Callable, Mapping

import numpy as np
import talib

from perpcast.features.stretch import Stretch

Stored = Mapping[str, np.ndarray]
Transform = Callable[[np.ndarray, Stretch, Stored], np.ndarray]

LONG_MEAN_BARS = 200
OBV_CHANGE_BARS = 20


def unchanged(x: np.ndarray, stretch: Stretch, stored: Stored) -> np.ndarray:
    """x"""
    return x


def divided_by(divisor: float) -> Transform:
    """x / divisor"""

    def transform(x: np.ndarray, stretch: Stretch, stored: Stored) -> np.ndarray:
        return x / divisor

    transform.__doc__ = f"x / {divisor}"
    return transform


def less(subtrahend: float) -> Transform:
    """x - subtrahend"""

    def transform(x: np.ndarray, stretch: Stretch, stored: Stored) -> np.ndarray:
        return x - subtrahend

    transform.__doc__ = f"x - {subtrahend}"
    return transform


def close_above(x: np.ndarray, stretch: Stretch, stored: Stored) -> np.ndarray:
    """close / x - 1"""
    return stretch.close / x - 1


def share_of_close(x: np.ndarray, stretch: Stretch, stored: Stored) -> np.ndarray:
    """x / close"""
    return x / stretch.close


def log_one_plus(x: np.ndarray, stretch: Stretch, stored: Stored) -> np.ndarray:
    """log1p(x)"""
    return np.log1p(x)


def in_units_of_atr(x: np.ndarray, stretch: Stretch, stored: Stored) -> np.ndarray:
    """x / atr_pct"""
    return x / stored["atr_pct"]


def log_to_long_volume(x: np.ndarray, stretch: Stretch, stored: Stored) -> np.ndarray:
    """log(x / SMA 200 of volume)"""
    return np.log(x / _long_mean(stretch.volume))


def log_to_own_long_mean(x: np.ndarray, stretch: Stretch, stored: Stored) -> np.ndarray:
    """log(x / its own mean over 200 bars)"""
    return np.log(x / _long_mean(x))


def change_to_volume(x: np.ndarray, stretch: Stretch, stored: Stored) -> np.ndarray:
    """change over 20 bars / (20 * volume_sma_20)"""
    change = np.full(len(x), np.nan)
    change[OBV_CHANGE_BARS:] = x[OBV_CHANGE_BARS:] - x[:-OBV_CHANGE_BARS]
    return change / (OBV_CHANGE_BARS * stored["volume_sma_20"])


def _long_mean(values: np.ndarray) -> np.ndarray:
    """Mean over LONG_MEAN_BARS; TA-Lib is handed the rows from the first value on, one NaN would poison the rest."""
    mean = np.full(len(values), np.nan)
    known = np.isfinite(values)
    edges = np.flatnonzero(np.diff(np.concatenate(([0], known.view(np.int8), [0]))))
    for first, end in zip(edges[::2], edges[1::2], strict=True):
        mean[first:end] = talib.SMA(values[first:end], timeperiod=LONG_MEAN_BARS)
    return mean
