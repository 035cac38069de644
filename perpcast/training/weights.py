"""How much each label counts: the two outcomes of a trade alike, and labels that share their bars less."""

import numpy as np

from perpcast.timeframe import interval_ms
from perpcast.training.dataset import Dataset


def class_weights(profit: np.ndarray) -> np.ndarray:
    """Weights of a loss and of a profit, float32 [targets, 2], for `profit` 0 or 1 [n, targets].

    Each outcome has half of the total weight, and the mean over labels is 1: n / (2 x labels of that outcome). Where
    one outcome never occurs both weigh 1.
    """
    share = np.mean(profit, axis=0, dtype=np.float64)
    balanced = np.stack([1 - share, share], axis=1)
    both = (balanced > 0).all(axis=1, keepdims=True)
    return np.where(both, 0.5 / np.where(both, balanced, 1), 1).astype(np.float32)


def sample_weights(dataset: Dataset, rows: np.ndarray) -> np.ndarray:
    """Uniqueness of the labels at signal rows, float32 [n], of mean 1 (López de Prado 2018, chapter 4).

    The label of a trade that was held h bars lives in the h bars after its signal bar. A label's uniqueness is the
    mean over its bars of 1 / (labels of the same symbol and side at `rows` that live in the bar), and a window's the
    mean over its sides. `rows` holds no row twice.
    """
    held = dataset.bars_held[rows].astype(np.int64)
    bar = _bar_numbers(dataset)[rows]
    unique = np.stack([_uniqueness(bar, held[:, side]) for side in range(held.shape[1])], axis=1)
    weights = unique.mean(axis=1)
    return (weights / weights.mean()).astype(np.float32)


def _bar_numbers(dataset: Dataset) -> np.ndarray:
    """Every row's place on one line of bars, on which labels of two symbols never meet: int64 [rows]."""
    bar = (dataset.open_time_ms - dataset.open_time_ms.min()) // interval_ms(dataset.task.interval)
    longest = int(dataset.bars_held.max()) + 1
    return bar + dataset.symbol.astype(np.int64) * (int(bar.max()) + 1 + longest)


def _uniqueness(bar: np.ndarray, held: np.ndarray) -> np.ndarray:
    """Mean of 1 / concurrent labels over the bars bar + 1 ... bar + held of each label: float64 [n]."""
    first, last = bar + 1, bar + held
    change = np.zeros(int(last.max()) + 2, np.int64)
    np.add.at(change, first, 1)
    np.add.at(change, last + 1, -1)
    alive = np.cumsum(change)
    inverse = np.where(alive > 0, 1 / np.maximum(alive, 1), 0.0)
    until = np.concatenate([[0.0], np.cumsum(inverse)])  # of the bars before a place
    return (until[last + 1] - until[first]) / held
