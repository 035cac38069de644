"""What a forecast has to beat: four cheap ones, fitted on training rows alone and asked at the very same windows.

The linear model and the boosted trees see a window as its last bar, the mean of its newest bars and the mean of all of
them, scaled as the network's inputs are, and which symbol it is. V1 chooses the penalty of the one and how many trees
the other keeps, as it stops the training of the network.
"""

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from perpcast.features.scaler import Scaler
from perpcast.market import SIDES

if TYPE_CHECKING:
    from sklearn.ensemble import HistGradientBoostingRegressor

RECENT_BARS = 12
# In units of the variance of a scaled input: from hardly any to hardly anything left of the weights.
PENALTIES = tuple(float(penalty) for penalty in np.logspace(-4, 2, 13))
BOOSTED_WINDOWS = 200_000
BOOSTED_TREES = 100

_BLOCK_WINDOWS = 1 << 12


@dataclass(frozen=True)
class BaselineInputs:
    """All that a baseline looks at. Rows are ordered by symbol, then time; a window is `lookback` rows in a row."""

    inputs: np.ndarray  # float32 [rows, columns], unscaled
    scaler: Scaler  # over the columns
    symbol: np.ndarray  # int [rows], 0 to `symbols` - 1
    expected_return: np.ndarray  # float64 [rows, sides]
    index: Mapping[str, np.ndarray]  # by split: the last rows of its windows, int64 [windows], ascending
    lookback: int
    symbols: int

    def last_change(self, split: str) -> np.ndarray:
        """Price change of the last bars, close / close before - 1: float64 [windows]."""
        return self.inputs[self.index[split], self.scaler.columns.index("price_change_1")].astype(np.float64)

    def summaries(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Block by block: rows of windows [n], and their scaled last bar and means, float64 [n, 3 x columns].

        The middle third is missing where the look-back is not longer than RECENT_BARS.
        """
        lengths = sorted({1, min(RECENT_BARS, self.lookback), self.lookback})
        # A block reads every row between its first window and its last: it ends where many would be read for nothing.
        ends = np.flatnonzero(np.diff(rows) > self.lookback) + 1
        for block in np.split(rows, np.union1d(ends, np.arange(_BLOCK_WINDOWS, len(rows), _BLOCK_WINDOWS))):
            first = block[0] - (self.lookback - 1)
            bars = self.scaler.apply(self.inputs[first : block[-1] + 1]).astype(np.float64)
            means = [_sliding_sum(bars, length)[block - first] / length for length in lengths]
            yield block, np.concatenate(means, axis=1)


class Baseline(Protocol):
    """A cheap forecast, fitted on training rows; what there is to choose about it, it chose on V1."""

    @property
    def name(self) -> str:
        """What tables call it."""
        ...

    def predict(self, inputs: BaselineInputs, split: str) -> dict[str, np.ndarray]:
        """Expected return by side at the windows of a split, float64 [windows]."""
        ...


def fit_baselines(inputs: BaselineInputs) -> tuple[Baseline, ...]:
    """All of them, the simplest first. Minutes where there are millions of windows."""
    return Constant.fit(inputs), LastSign.fit(inputs), Ridge.fit(inputs), BoostedTrees.fit(inputs)


@dataclass(frozen=True)
class Constant:
    """Every trade earns what the average training trade earned."""

    means: np.ndarray  # float64 [sides]
    name: str = "constant"

    @classmethod
    def fit(cls, inputs: BaselineInputs) -> "Constant":
        """The mean label of each side."""
        return cls(inputs.expected_return[inputs.index["train"]].mean(axis=0))

    def predict(self, inputs: BaselineInputs, split: str) -> dict[str, np.ndarray]:
        """The training mean of each side, everywhere."""
        return _by_side(np.tile(self.means, (len(inputs.index[split]), 1)))


@dataclass(frozen=True)
class LastSign:
    """Every trade earns what the average training trade earned after a bar of the same sign."""

    means: np.ndarray  # float64 [signs, sides]: after a fall, no change, a rise
    name: str = "last sign"

    @classmethod
    def fit(cls, inputs: BaselineInputs) -> "LastSign":
        """The mean labels after each sign; one that never occurred takes the mean of all."""
        labels, sign = inputs.expected_return[inputs.index["train"]], np.sign(inputs.last_change("train"))
        after = [labels[sign == which] for which in (-1, 0, 1)]
        return cls(np.stack([(some if len(some) else labels).mean(axis=0) for some in after]))

    def predict(self, inputs: BaselineInputs, split: str) -> dict[str, np.ndarray]:
        """The training mean after that sign."""
        return _by_side(self.means[np.sign(inputs.last_change(split)).astype(np.int64) + 1])


@dataclass(frozen=True)
class Ridge:
    """Least squares with a penalty on the squared weights, in closed form, over every training window."""

    weights: np.ndarray  # float64 [summaries + symbols, sides]
    intercept: np.ndarray  # float64 [sides], not penalised
    penalty: float  # of PENALTIES the one with the least squared error on V1
    name: str = "ridge"

    @classmethod
    def fit(cls, inputs: BaselineInputs) -> "Ridge":
        """One pass over train and one over V1: what is summed there tells the error of any weights."""
        train, sides = _moments(inputs, "train"), len(SIDES)
        mean = train[0, 1:]
        here, there = _about(mean, train), _about(mean, _moments(inputs, "v1"))
        variance, axes = np.linalg.eigh(here[:-sides, :-sides])
        shared = axes.T @ here[:-sides, -sides:]

        def weights(penalty: float) -> np.ndarray:
            return axes @ (shared / (variance + penalty)[:, None])

        def error(penalty: float) -> float:
            residual = np.vstack([-weights(penalty), np.eye(sides)])  # times [features, labels]
            return float(np.trace(residual.T @ there @ residual))

        penalty = min(PENALTIES, key=error)
        best = weights(penalty)
        return cls(best, mean[-sides:] - mean[:-sides] @ best, penalty)

    def predict(self, inputs: BaselineInputs, split: str) -> dict[str, np.ndarray]:
        """What the weights make of each window."""
        blocks = inputs.summaries(inputs.index[split])
        parts = [_linear_features(inputs, *block) @ self.weights + self.intercept for block in blocks]
        return _by_side(np.concatenate(parts))


@dataclass(frozen=True)
class BoostedTrees:
    """Gradient-boosted regression trees on histograms, one sequence of them for each side; the symbol is a category."""

    models: "tuple[HistGradientBoostingRegressor, ...]"  # by side
    trees: tuple[int, ...]  # by side: how many of them are asked, the number with the least squared error on V1
    name: str = "boosted trees"

    @classmethod
    def fit(cls, inputs: BaselineInputs) -> "BoostedTrees":
        """On at most BOOSTED_WINDOWS windows of train, and as many of V1, over all symbols and the whole span.

        Asked is at least one tree: none at all would be the constant, and rank nothing.
        """
        from sklearn.ensemble import HistGradientBoostingRegressor

        train, stop = (_spread(inputs.index[split], BOOSTED_WINDOWS) for split in ("train", "v1"))
        features = np.concatenate([_tree_features(inputs, *block) for block in inputs.summaries(train)])
        growth: dict[str, Any] = {
            **_GROWTH,
            "max_iter": BOOSTED_TREES,
            "categorical_features": [features.shape[1] - 1],
        }
        with _one_thread():
            models = tuple(
                HistGradientBoostingRegressor(**growth).fit(features, inputs.expected_return[train, side])
                for side in range(len(SIDES))
            )
            errors = [_squared_errors(model, inputs, stop, side) for side, model in enumerate(models)]
        return cls(models, tuple(int(np.argmin(squared)) + 1 for squared in errors))

    def predict(self, inputs: BaselineInputs, split: str) -> dict[str, np.ndarray]:
        """What the trees that V1 left make of each window."""
        with _one_thread():
            blocks = inputs.summaries(inputs.index[split])
            return _by_side(np.concatenate([self._ask(_tree_features(inputs, *block)) for block in blocks]))

    def _ask(self, features: np.ndarray) -> np.ndarray:
        asked = zip(self.models, self.trees, strict=True)
        last = [deque(islice(model.staged_predict(features), trees), maxlen=1).pop() for model, trees in asked]
        return np.stack(last, axis=1)


# Large leaves: labels overlap for a hundred bars, so that a leaf of 200 windows is a few trades.
_GROWTH = {
    "learning_rate": 0.1,
    "max_leaf_nodes": 31,
    "min_samples_leaf": 200,
    # Rows of its own to stop by would be drawn at random among labels that overlap the others': V1 decides.
    "early_stopping": False,
    "random_state": 0,  # nothing is drawn: of up to 200,000 windows every one is binned
}


def _one_thread() -> AbstractContextManager[Any]:
    """OpenMP on one core: its threads wait for each other busily, which a core that is shared multiplies by ten."""
    from threadpoolctl import threadpool_limits

    return threadpool_limits(1, "openmp")


def _squared_errors(
    model: "HistGradientBoostingRegressor", inputs: BaselineInputs, rows: np.ndarray, side: int
) -> np.ndarray:
    """Summed over windows, after each tree: float64 [BOOSTED_TREES]."""
    total = np.zeros(BOOSTED_TREES)
    for block, summaries in inputs.summaries(rows):
        stages = model.staged_predict(_tree_features(inputs, block, summaries))
        total += [np.sum((inputs.expected_return[block, side] - guess) ** 2) for guess in stages]
    return total


def _sliding_sum(values: np.ndarray, length: int) -> np.ndarray:
    """Sum of the `length` newest rows at each row: [rows, columns]; before the first row lie zeros.

    Made of sums over 1, 2, 4 … rows, so that a missing value outside a window never enters its sum.
    """
    total, reach, part = np.zeros_like(values), 0, values
    for power in range(length.bit_length()):
        if power:
            longer = part.copy()
            longer[1 << power - 1 :] += part[: -(1 << power - 1)]
            part = longer
        if length >> power & 1:
            total[reach:] += part[: len(part) - reach]
            reach += 1 << power
    return total


def _linear_features(inputs: BaselineInputs, rows: np.ndarray, summaries: np.ndarray) -> np.ndarray:
    """Summaries, then a column for each symbol, 1 at its own windows."""
    return np.concatenate([summaries, np.eye(inputs.symbols)[inputs.symbol[rows]]], axis=1)


def _tree_features(inputs: BaselineInputs, rows: np.ndarray, summaries: np.ndarray) -> np.ndarray:
    """Summaries, then the symbol's number: float32 [n, features + 1]."""
    return np.concatenate([summaries, inputs.symbol[rows, None]], axis=1).astype(np.float32)


def _moments(inputs: BaselineInputs, split: str) -> np.ndarray:
    """Mean products of (1, linear features, labels) over the windows of a split: float64, square."""
    rows = inputs.index[split]
    total: np.ndarray | float = 0.0
    for block in inputs.summaries(rows):
        features, labels = _linear_features(inputs, *block), inputs.expected_return[block[0]]
        joined = np.concatenate([np.ones((len(labels), 1)), features, labels], axis=1)
        total = total + joined.T @ joined
    return np.asarray(total / len(rows))


def _about(mean: np.ndarray, moments: np.ndarray) -> np.ndarray:
    """The moments of (features, labels) less `mean`."""
    shift = np.eye(len(moments))
    shift[0, 1:] = -mean
    return (shift.T @ moments @ shift)[1:, 1:]


def _spread(rows: np.ndarray, most: int) -> np.ndarray:
    """All rows, or `most` of them, evenly."""
    return rows if len(rows) <= most else rows[np.linspace(0, len(rows) - 1, most).round().astype(np.int64)]


def _by_side(values: np.ndarray) -> dict[str, np.ndarray]:
    """Columns by the name of their side."""
    return {side: values[:, number] for number, side in enumerate(SIDES)}
