"""Windows on the device: the scaled matrix of all symbols lies once in memory, a batch is row numbers gathered inside
the compiled step; which rows an epoch draws, and which rows of V1 judge it."""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import ops

from perpcast.evaluation.explanation import Explanation
from perpcast.training.dataset import Dataset, spread

# Windows that are judged, predicted or explained at once: one compiled size for them all, whatever training's batch is.
READ_BATCH = 256
_BLOCK_ROWS = 1 << 18


class WindowMatrix:
    """The scaled inputs and symbols of every row of a dataset, on the GPU where there is one: float32 [rows, F + K].

    It belongs to no network, so that several can read it, and none is saved or exported with it.
    """

    def __init__(self, dataset: Dataset) -> None:
        self.task = dataset.task
        matrix = np.empty(dataset.inputs.shape, np.float32)
        for first in range(0, len(matrix), _BLOCK_ROWS):
            block = slice(first, first + _BLOCK_ROWS)
            matrix[block] = dataset.scaler.apply(dataset.inputs[block])
        # Rows without a value belong to no window.
        np.nan_to_num(matrix, copy=False)
        self.inputs = keras.Variable(matrix, trainable=False, name="matrix")
        self.symbol = keras.Variable(dataset.symbol, trainable=False, dtype="int32", name="symbol")


class WindowModel(keras.Model):
    """A network fed by rows: a batch is the row numbers of its signal bars, int32 [B]; answers as the network does.

    Whatever precision the network computes in, the answer is float32.
    """

    def __init__(self, network: Any, matrix: WindowMatrix) -> None:
        super().__init__()
        self.network, self.matrix_inputs, self.matrix_symbol = network, matrix.inputs, matrix.symbol
        self.observed = len(matrix.task.observed)
        self.steps = np.arange(1 - matrix.task.lookback, 1, dtype=np.int32)

    def call(self, rows: Any, training: bool | None = None) -> Any:
        """[B] row numbers to [B, columns], or what else the network answers."""
        windows = ops.take(self.matrix_inputs, ops.expand_dims(rows, 1) + self.steps, axis=0)
        inputs = {
            "observed": windows[..., : self.observed],
            "known": windows[..., self.observed :],
            "static_categories": ops.expand_dims(ops.take(self.matrix_symbol, rows, axis=0), 1),
        }
        answer = self.network(inputs, training=training)
        return keras.tree.map_structure(lambda value: ops.cast(value, "float32"), answer)


class WindowReader:
    """Asks a network about windows by their rows, in batches of one size: the last one is filled up.

    `model` is compiled already, so that reading is compiled as training is.
    """

    def __init__(self, model: WindowModel, matrix: WindowMatrix, batch: int = READ_BATCH) -> None:
        self.model, self._matrix, self._batch = model, matrix, batch
        self._explaining: WindowModel | None = None

    def raw(self, rows: np.ndarray) -> np.ndarray:
        """What the network answers for the windows that end at `rows`: float32 [n, columns]."""
        return np.asarray(self._read(self.model, rows), np.float32)

    def explain(self, rows: np.ndarray) -> Explanation:
        """What the network looked at in the windows that end at `rows`: n x T x V floats, so for some thousands."""
        if self._explaining is None:
            self._explaining = WindowModel(self.model.network.explanation(), self._matrix)
            self._explaining.compile(jit_compile=self.model.jit_compile)
        weights: Mapping[str, np.ndarray] = self._read(self._explaining, rows)
        task = self._matrix.task
        return Explanation((*task.observed, *task.known), weights["selection"], weights["attention"])

    def _read(self, model: WindowModel, rows: np.ndarray) -> Any:
        if not len(rows):
            raise ValueError("there is no window to read: rows is empty")
        padded = np.pad(rows, (0, -len(rows) % self._batch), mode="edge").astype(np.int32)
        answer = model.predict(padded, batch_size=self._batch, verbose=0)
        return keras.tree.map_structure(lambda values: values[: len(rows)], answer)


class DrawnWindows:
    """What an epoch trains on: `samples` of the training rows, or all of them, shuffled; whole batches only.

    The draw of an epoch depends on the seed and the epoch's number alone, so that a training can go on anywhere. The
    windows that fill no whole batch are left to another epoch: the compiled step has one size.
    """

    def __init__(
        self,
        rows: np.ndarray,
        targets: np.ndarray,
        weights: np.ndarray | None,
        batch: int,
        samples: int | None,
        seed: int,
    ) -> None:
        """`targets` [n, targets] and `weights` [n] or None, of the training rows [n]."""
        self._rows, self._targets, self._weights = rows.astype(np.int32), targets, weights
        self._samples, self._seed = min(samples or len(rows), len(rows)), seed
        self.batch = min(batch, self._samples)

    def __len__(self) -> int:
        return self._samples // self.batch

    def epoch(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """Rows int32 [len x batch], their targets and their weights, of the epoch with this number, from 0."""
        rng = np.random.default_rng((self._seed, number))
        drawn = rng.permutation(len(self._rows))[: len(self) * self.batch]
        weights = None if self._weights is None else self._weights[drawn]
        return self._rows[drawn], self._targets[drawn], weights


def strided(dataset: Dataset, rows: np.ndarray, stride: int) -> np.ndarray:
    """Of each symbol's windows every `stride`-th. Neighbours share nearly all of their bars and of their label's.

    A symbol begins one window later than the one before it: so all symbols together show every quarter of an hour,
    which one phase for all would not.
    """
    symbol = dataset.symbol[rows].astype(np.int64)
    codes, first = np.unique(symbol, return_index=True)
    number = np.arange(len(rows)) - first[np.searchsorted(codes, symbol)]
    return rows[(number - symbol) % stride == 0]


def evenly_spaced(rows: np.ndarray, batch: int, samples: int | None) -> np.ndarray:
    """Rows of V1 to stop by, int32: all whole batches of them, or a quarter of `samples` where an epoch is drawn.

    Neighbouring windows share nearly their whole label interval: every third says what all of them say.
    """
    wanted = len(rows) if samples is None else min(len(rows), max(batch, samples // 4))
    wanted = max(wanted // batch * batch, min(batch, len(rows)))
    return spread(rows, wanted).astype(np.int32)
