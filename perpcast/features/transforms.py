"""How a stored indicator becomes a model input: scale-free, so that one model serves every symbol alike.

Every function takes the stored values of one stretch, the stretch, and the stored columns beside them, all [n], and
returns float64 [n]; NaN where it cannot be told, and never a value that needs a bar from before the stretch.
"""

from collections.abc import Callable, Mapping

import numpy as np

from perpcast.features.stretch import Stretch, window_sum

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
    # From the volumes themselves: the difference of two long sums would keep the residue of what went before both.
    signs = np.sign(np.diff(stretch.close, prepend=np.nan))
    return window_sum(signs * stretch.volume, OBV_CHANGE_BARS) / (OBV_CHANGE_BARS * stored["volume_sma_20"])


def _long_mean(values: np.ndarray) -> np.ndarray:
    """Mean over LONG_MEAN_BARS, NaN where one of them is: sums of sums of 20 bars, each made anew."""
    return window_sum(window_sum(values, 20), LONG_MEAN_BARS // 20, every=20) / LONG_MEAN_BARS
