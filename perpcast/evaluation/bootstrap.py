"""Intervals of a score: the stationary bootstrap of Politis and Romano (1994) over whole days, all symbols together.

Labels overlap for a hundred bars and symbols move together, so single windows say far less than their number. Days are
drawn in blocks of random length; whatever happened on a day, in every symbol, is drawn with it.
"""

from collections.abc import Callable

import numpy as np

MEAN_BLOCK_DAYS = 5
REPLICATES = 2000


def sums_by_day(day: np.ndarray, *columns: np.ndarray) -> np.ndarray:
    """Sums of each column by day, over every day from the first to the last: float64 [days, columns].

    Days without rows stay as zeros, so that a block of five days is five days of the calendar.
    """
    number = day - day.min()
    return np.stack(
        [np.bincount(number, weights=column, minlength=int(number.max()) + 1) for column in columns], axis=1
    )


def stationary_draws(days: int, mean_block: float, replicates: int, rng: np.random.Generator) -> np.ndarray:
    """Day numbers of each replicate: int [replicates, days]; blocks of geometric length that wrap around the end."""
    if mean_block < 1:
        raise ValueError(f"mean_block must be at least 1 day, received {mean_block}")
    starts_block = rng.random((replicates, days)) < 1 / mean_block
    starts_block[:, 0] = True
    position = np.arange(days)
    block_start = np.maximum.accumulate(np.where(starts_block, position, 0), axis=1)
    first = rng.integers(0, days, (replicates, days))
    return (np.take_along_axis(first, block_start, axis=1) + position - block_start) % days


def confidence_interval(
    sums: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    rng: np.random.Generator,
    *,
    mean_block: float = MEAN_BLOCK_DAYS,
    level: float = 0.95,
    replicates: int = REPLICATES,
) -> tuple[float, float]:
    """Lower and upper bound of `statistic` of daily `sums` [days, columns]; the statistic maps [..., columns] to [...].

    (NaN, NaN) below two mean blocks: so few days hold no evidence about their own spread.
    """
    if len(sums) < 2 * mean_block:
        return np.nan, np.nan
    drawn = sums[stationary_draws(len(sums), mean_block, replicates, rng)].sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        values = statistic(drawn)
    values = values[np.isfinite(values)]
    if len(values) < replicates // 2:
        return np.nan, np.nan
    lower, upper = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(lower), float(upper)
