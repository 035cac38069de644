"""The training loop: windows gathered inside the compiled step, the best weights on V1, curves for TensorBoard."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from perpcast.config import ModelSettings
from perpcast.errors import DataError
from perpcast.features.scaler import Scaler
from perpcast.models import build_model
from perpcast.task import Task
from perpcast.training.dataset import Dataset

_BLOCK_ROWS = 1 << 18
WARM_UP_SHARE = 0.05
CLIP_NORM = 1.0


@dataclass(frozen=True)
class Trained:
    """A network with its best weights, inside the model that feeds it by rows; its losses by epoch."""

    model: "WindowModel"
    target_scaler: Scaler
    history: Mapping[str, list[float]]  # loss, val_loss, learning_rate

    @property
    def network(self) -> keras.Model:
        """The network alone: what is exported."""
        return self.model.network

    def predict(self, rows: np.ndarray, batch: int = 1024) -> np.ndarray:
        """Outputs for the windows that end at `rows`, in the units of the labels: float32 [n, outputs]."""
        # The compiled step has one batch size: the last batch is filled up with the last row.
        padded = np.pad(rows, (0, -len(rows) % batch), mode="edge").astype(np.int32)
        scaled = self.model.predict(padded, batch_size=batch, verbose=0)[: len(rows)]
        targets = self.model.task.targets
        of_output = [number for number, target in enumerate(targets) for _ in target.outputs]
        deviation, mean = np.array(self.target_scaler.deviation), np.array(self.target_scaler.mean)
        return (scaled * deviation[of_output] + mean[of_output]).astype(np.float32)


def train(
    dataset: Dataset,
    settings: ModelSettings,
    run_dir: Path,
    on_epoch: Callable[[int, Mapping[str, float]], None] = lambda epoch, logs: None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Trained:
    """Fits the network of `settings` to the training windows; V1 decides which epoch's weights stay, and when to stop.

    `run_dir` receives TensorBoard's events; what lies there is removed first. Seeds Keras with `settings.seed`. Raises
    DataError where the loss is not a number.
    """
    shutil.rmtree(run_dir, ignore_errors=True)
    keras.utils.set_random_seed(settings.seed)
    target_scaler = Scaler.fit(dataset.targets(dataset.index["train"]), [t.name for t in dataset.task.targets])
    network = build_model(
        dataset.task,
        settings.architecture,
        d_model=settings.d_model,
        num_heads=settings.num_heads,
        dropout=settings.dropout,
        variable_width=settings.variable_width,
    )
    on_gpu = bool(keras.distribution.list_devices("gpu"))
    batch = settings.batch_size_gpu if on_gpu else settings.batch_size
    drawn = DrawnWindows(dataset, target_scaler, batch, settings.samples_per_epoch, settings.seed)
    model = WindowModel(network, dataset)
    steps = len(drawn) * settings.epochs
    schedule = keras.optimizers.schedules.CosineDecay(
        settings.learning_rate / 25,
        max(1, steps - int(WARM_UP_SHARE * steps)),
        alpha=0.01,
        warmup_target=settings.learning_rate,
        warmup_steps=max(1, int(WARM_UP_SHARE * steps)),
    )
    # XLA fuses the elementwise work of the variable selection: 1.6 times the windows per second on a CPU.
    model.compile(
        optimizer=keras.optimizers.Adam(schedule, global_clipnorm=CLIP_NORM),
        loss=regression_loss(dataset.task),
        jit_compile=True,
    )
    # Variables that appear while the step is traced make TensorFlow trace and compile it twice.
    model.optimizer.build(model.trainable_variables)
    watch = _Watch(network, settings.early_stopping_patience, steps, on_epoch, on_step)
    rows = evenly_spaced(dataset.index["v1"], drawn.batch, settings.samples_per_epoch)
    model.fit(
        drawn,
        epochs=settings.epochs,
        shuffle=False,
        validation_data=(rows, target_scaler.apply(dataset.targets(rows))),
        validation_batch_size=drawn.batch,
        callbacks=[watch, keras.callbacks.TensorBoard(run_dir, write_graph=False)],
        verbose=0,
    )
    network.set_weights(watch.best_weights)
    return Trained(model, target_scaler, watch.history)


class WindowModel(keras.Model):
    """The network fed by rows: a batch is the row numbers of its signal bars, gathered from the one scaled matrix.

    The matrix is a weight of this wrapper, never of the network: it lies once in memory, on the GPU where there is one.
    """

    def __init__(self, network: keras.Model, dataset: Dataset) -> None:
        super().__init__()
        self.network, self.task = network, dataset.task
        self.observed = len(dataset.task.observed)
        self.steps = np.arange(1 - dataset.task.lookback, 1, dtype=np.int32)
        matrix = np.empty(dataset.inputs.shape, np.float32)
        for first in range(0, len(matrix), _BLOCK_ROWS):
            block = slice(first, first + _BLOCK_ROWS)
            matrix[block] = dataset.scaler.apply(dataset.inputs[block])
        # Rows without a value belong to no window.
        np.nan_to_num(matrix, copy=False)
        self.matrix = keras.Variable(matrix, trainable=False, name="matrix")
        self.symbol = keras.Variable(dataset.symbol, trainable=False, dtype="int32", name="symbol")

    def call(self, rows: Any, training: bool | None = None) -> Any:
        """[B] row numbers to [B, outputs]."""
        windows = ops.take(self.matrix, ops.expand_dims(rows, 1) + self.steps, axis=0)
        inputs = {
            "observed": windows[..., : self.observed],
            "known": windows[..., self.observed :],
            "symbol": ops.take(self.symbol, rows, axis=0),
        }
        return self.network(inputs, training=training)


class DrawnWindows(keras.utils.PyDataset):
    """Batches of (rows, scaled labels). An epoch draws `samples` of the training windows, or takes all, shuffled.

    The draw of an epoch depends on the seed and the epoch's number alone. The last batch is dropped where it is not
    full: the compiled step has one batch size.
    """

    def __init__(self, dataset: Dataset, target_scaler: Scaler, batch: int, samples: int | None, seed: int) -> None:
        super().__init__()
        self._dataset, self._scaler, self._seed = dataset, target_scaler, seed
        self._windows = dataset.index["train"].astype(np.int32)
        self._samples = min(samples or len(self._windows), len(self._windows))
        self.batch = min(batch, self._samples)
        self._epoch = -1
        self.on_epoch_end()

    def __len__(self) -> int:
        return self._samples // self.batch

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        rows = self._rows[number * self.batch : (number + 1) * self.batch]
        return rows, self._scaler.apply(self._dataset.targets(rows))

    def on_epoch_end(self) -> None:
        """Draws the next epoch."""
        self._epoch += 1
        rng = np.random.default_rng((self._seed, self._epoch))
        self._rows = rng.permutation(self._windows)[: self._samples]


def evenly_spaced(rows: np.ndarray, batch: int, samples: int | None) -> np.ndarray:
    """Rows of V1 to stop by, int32: all whole batches of them, or a quarter of `samples` where an epoch is drawn.

    Neighbouring windows share nearly their whole label interval: every third says what all of them say.
    """
    wanted = len(rows) if samples is None else min(len(rows), max(batch, samples // 4))
    wanted = max(wanted // batch * batch, min(batch, len(rows)))
    return rows[np.linspace(0, len(rows) - 1, wanted).round().astype(np.int64)].astype(np.int32)


def regression_loss(task: Task) -> Callable[[Any, Any], Any]:
    """Squared error of the mean plus pinball losses of the quantiles, summed over targets: [B, …] to [B]."""

    def loss(labels: Any, outputs: Any) -> Any:
        total, column = 0.0, 0
        for number, target in enumerate(task.targets):
            label = labels[:, number : number + 1]
            total += ops.square(label - outputs[:, column : column + 1])[:, 0]
            levels = np.array(target.quantiles, np.float32)
            error = label - outputs[:, column + 1 : column + 1 + len(levels)]
            total += ops.sum(ops.maximum(levels * error, (levels - 1) * error), axis=-1)
            column += len(target.outputs)
        return total

    return loss


class _Watch(keras.callbacks.Callback):
    """Keeps the best weights of the network alone, stops for patience or a loss that is not a number, reports."""

    def __init__(
        self,
        network: keras.Model,
        patience: int,
        steps: int,
        on_epoch: Callable[[int, Mapping[str, float]], None],
        on_step: Callable[[int, int], None],
    ) -> None:
        super().__init__()
        self._network, self._patience, self._steps = network, patience, steps
        self._on_epoch, self._on_step = on_epoch, on_step
        self._done, self._best, self._waited = 0, np.inf, 0
        self.best_weights: list[np.ndarray] = []
        self.history: dict[str, list[float]] = {"loss": [], "val_loss": [], "learning_rate": []}

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Counts steps."""
        self._done += 1
        self._on_step(self._done, self._steps)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        """Judges the epoch by V1."""
        rate = float(ops.convert_to_numpy(self.model.optimizer.learning_rate))
        losses = {"loss": float(logs["loss"]), "val_loss": float(logs["val_loss"]), "learning_rate": rate}
        for name, value in losses.items():
            self.history[name].append(value)
        if not np.isfinite([losses["loss"], losses["val_loss"]]).all():
            raise DataError(
                f"training stopped in epoch {epoch + 1}: loss {losses['loss']}, on V1 {losses['val_loss']}; "
                "expected numbers: lower model.learning_rate"
            )
        if losses["val_loss"] < self._best:
            self._best, self._waited = losses["val_loss"], 0
            self.best_weights = self._network.get_weights()
        else:
            self._waited += 1
            if self._waited >= self._patience:
                self.model.stop_training = True
        self._on_epoch(epoch + 1, losses)
