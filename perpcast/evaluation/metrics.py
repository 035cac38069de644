"""The scores of a forecast of returns, and of profits: pure functions, arrays in, numbers out; NaN where not defined.

Realised and predicted are arrays [n] without NaN, in one unit (fractions here). `profit` is bool [n], True where the
trade earned, `probability` what was given for it, 0 to 1.
"""

import numpy as np
import pandas as pd

from perpcast.timeframe import DAY_MS

# Probabilities are float32: one that was rounded to 0 or 1 was no surer than this.
_SUREST = float(np.finfo(np.float32).eps)


def mae(realised: np.ndarray, predicted: np.ndarray) -> float:
    """Mean absolute error."""
    return float(np.mean(np.abs(realised - predicted)))


def rmse(realised: np.ndarray, predicted: np.ndarray) -> float:
    """Root of the mean squared error."""
    return float(np.sqrt(np.mean((realised - predicted) ** 2)))


def r2(realised: np.ndarray, predicted: np.ndarray) -> float:
    """Share of the variance about the realised mean that is explained; below 0 is worse than knowing that mean."""
    total = float(np.sum((realised - np.mean(realised)) ** 2))
    return 1 - float(np.sum((realised - predicted) ** 2)) / total if total > 0 else np.nan


def direction_accuracy(realised: np.ndarray, predicted: np.ndarray) -> float:
    """Share of forecasts on the right side of 0. Where most trades lose, always saying so scores high."""
    return float(np.mean((realised > 0) == (predicted > 0)))


def pinball_loss(realised: np.ndarray, predicted: np.ndarray, quantile: float) -> float:
    """Mean loss that the true `quantile` minimises."""
    error = realised - predicted
    return float(np.mean(np.maximum(quantile * error, (quantile - 1) * error)))


def quantile_coverage(realised: np.ndarray, predicted: np.ndarray) -> tuple[float, float]:
    """Share of outcomes strictly below the predicted quantile, and at or below it.

    Labels have an atom (the first stop), so both are needed: q is a right quantile where below <= q <= at or below.
    """
    return float(np.mean(realised < predicted)), float(np.mean(realised <= predicted))


def rank_ic_by_day(
    realised: np.ndarray, predicted: np.ndarray, symbol: np.ndarray, open_time_ms: np.ndarray, min_symbols: int = 3
) -> pd.Series:
    """Spearman correlation across symbols at every bar, averaged by UTC day: a Series indexed by day number.

    Ties share their mean rank. A bar with fewer than `min_symbols` symbols, or where either side is all ties, has
    no cross-section and is left out; a day without any such bar is not in the result.
    """
    true_rank, guess_rank = (
        pd.DataFrame({"time": open_time_ms, "symbol": symbol, "value": values})
        .pivot(index="time", columns="symbol", values="value")
        .rank(axis=1)
        for values in (realised, predicted)
    )
    by_bar = _row_correlation(true_rank.to_numpy(), guess_rank.to_numpy(), min_symbols)
    known = ~np.isnan(by_bar)
    days = true_rank.index.to_numpy()[known] // DAY_MS
    return pd.Series(by_bar[known]).groupby(days).mean()


def rank_ic_by_symbol(realised: np.ndarray, predicted: np.ndarray, symbol: np.ndarray) -> pd.Series:
    """Spearman correlation through time within each symbol: a Series indexed by symbol, NaN where all ties."""
    frame = pd.DataFrame({"symbol": symbol, "realised": realised, "predicted": predicted})
    ranks = frame.groupby("symbol")[["realised", "predicted"]].rank()
    values = {
        code: _row_correlation(group[["realised"]].to_numpy().T, group[["predicted"]].to_numpy().T, 2)[0]
        for code, group in ranks.groupby(frame["symbol"])
    }
    return pd.Series(values, dtype=float)


def classified(profit: np.ndarray, probability: np.ndarray, cut: float = 0.5) -> dict[str, float]:
    """Accuracy, precision, recall and F1 of calling a profit wherever `probability` is above `cut`.

    Where most trades lose, never calling one is accurate: then precision is not defined, recall and F1 are 0.
    """
    called = probability > cut
    right, calls, profits = (int(np.sum(rows)) for rows in (called & profit, called, profit))
    return {
        "accuracy": float(np.mean(called == profit)),
        "precision": right / calls if calls else np.nan,
        "recall": right / profits if profits else np.nan,
        "f1": 2 * right / (calls + profits) if calls + profits else np.nan,
    }


def auc(profit: np.ndarray, probability: np.ndarray) -> float:
    """The chance that a profit was given a higher probability than a loss; equal ones count half."""
    wins, losses = int(np.sum(profit)), int(np.sum(~profit))
    if not wins or not losses:
        return np.nan
    ranks = pd.Series(probability).rank().to_numpy()  # ties share their mean rank
    return float((np.sum(ranks[profit]) - wins * (wins + 1) / 2) / (wins * losses))


def brier(profit: np.ndarray, probability: np.ndarray | float) -> float:
    """Mean squared distance of the probability from what came true, 1 or 0."""
    return float(np.mean((probability - profit.astype(np.float64)) ** 2))


def log_loss(profit: np.ndarray, probability: np.ndarray | float) -> float:
    """Mean surprise, -log of the probability given to what came true."""
    sure = np.clip(np.asarray(probability, np.float64), _SUREST, 1 - _SUREST)
    return float(-np.mean(np.where(profit, np.log(sure), np.log(1 - sure))))


def calibration_bins(profit: np.ndarray, probability: np.ndarray, bins: int = 10) -> list[dict[str, float]]:
    """Given and realised frequency by quantile of the probability, lowest first: `count`, `predicted`, `realised`.

    Equal probabilities share a bin, so that there may be fewer than `bins`.
    """
    frame = pd.DataFrame({"predicted": probability, "realised": profit}, dtype=np.float64)
    means = frame.groupby(quantile_bin(probability, bins)).agg(
        count=("realised", "size"), predicted=("predicted", "mean"), realised=("realised", "mean")
    )
    return [{str(name): float(value) for name, value in row.items()} for row in means.to_dict("records")]


def quantile_bin(values: np.ndarray, bins: int = 10) -> np.ndarray:
    """Which of `bins` equally full bins each value lies in, 0 the lowest: int [n].

    Equal values share a bin: it is the fuller for it, and others stay empty.
    """
    return np.searchsorted(np.quantile(values, np.arange(1, bins) / bins), values, side="right")


def _row_correlation(left: np.ndarray, right: np.ndarray, min_count: int) -> np.ndarray:
    """Pearson correlation of each row over the columns known in both; NaN below `min_count` or without variance."""
    known = ~(np.isnan(left) | np.isnan(right))
    count = known.sum(axis=1)
    divisor = np.maximum(count, 1)[:, None]
    left, right = (
        np.where(known, side - np.where(known, side, 0).sum(axis=1, keepdims=True) / divisor, 0)
        for side in (left, right)
    )
    scale = np.sqrt((left**2).sum(axis=1) * (right**2).sum(axis=1))
    defined = (count >= min_count) & (scale > 0)
    return np.where(defined, (left * right).sum(axis=1) / np.where(defined, scale, 1), np.nan)
