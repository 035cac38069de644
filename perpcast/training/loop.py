"""The training loop: Keras fits an epoch, V1 judges it, the checkpoint keeps it; the best weights on V1 stay.

It can be killed at any line and goes on from its last checkpoint. On one machine, on a CPU, the result is then the same
to the last bit, and so is that of two whole trainings: tests/test_training_killed.py shows it under TensorFlow, and it
was measured with XLA and under JAX. Sums on a GPU run in no fixed order: there the two are as alike as any two with one
seed.
"""

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from perpcast.config import ModelSettings
from perpcast.errors import DataError
from perpcast.evaluation.explanation import Explanation
from perpcast.kill_point import kill_point
from perpcast.models import VERSIONS, build_model
from perpcast.outputs import OutputReading
from perpcast.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from perpcast.training.dataset import Dataset, spread
from perpcast.training.events import EventLog
from perpcast.training.losses import task_loss
from perpcast.training.optimizer import MeasuringAdam
from perpcast.training.progress import (
    COLUMNS,
    Progress,
    State,
    append_epoch,
    peak_memory_mb,
    read_progress,
    rewrite_history,
    write_progress,
)
from perpcast.training.weights import class_weights, sample_weights
from perpcast.training.windows import (
    READ_BATCH,
    DrawnWindows,
    WindowMatrix,
    WindowModel,
    WindowReader,
    evenly_spaced,
    strided,
)

# A forecast that deviates by a share s of its labels' deviation can explain s squared of their variance: at 0.001 a
# millionth, far below what any trade costs. A network that lives is far above it (measured on labels of pure noise:
# 0.3 after twelve epochs); three epochs in a row are no accident.
CONSTANT_SHARE = 1e-3
CONSTANT_EPOCHS = 3

# The rate starts and ends so far below its peak.
_FIRST_RATE, _LAST_RATE = 1 / 25, 1 / 100
_EXPLAINED_WINDOWS = 512
_PROGRESS_SECONDS = 1.0

_in_epoch = kill_point("train.in_epoch")
_epoch_end = kill_point("train.epoch_end")


@dataclass(frozen=True)
class Trained:
    """A network, how to read it, and its training by epoch: one value an epoch for each of `progress.COLUMNS`."""

    reader: WindowReader
    reading: OutputReading
    dataset: Dataset
    history: Mapping[str, list[float]]

    @property
    def network(self) -> Any:
        """The network alone: what is exported."""
        return self.reader.model.network

    def raw(self, rows: np.ndarray) -> np.ndarray:
        """The network's columns for the windows that end at `rows`: float32 [n, columns]."""
        return self.reader.raw(rows)

    def predict(self, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Every output of the task by name, float32 [n], for the windows that end at `rows`."""
        return self.reading.read(self.raw(rows))

    def explain(self, rows: np.ndarray) -> Explanation:
        """What the network looked at in the windows that end at `rows`."""
        return self.reader.explain(rows)

    def calibrated(self, rows: np.ndarray) -> "Trained":
        """The same network with its reading calibrated on these rows: those of V2."""
        return replace(self, reading=self.reading.calibrated(self.raw(rows), self.dataset.targets(rows)))


def train(
    dataset: Dataset,
    settings: ModelSettings,
    run_dir: Path,
    *,
    resume: bool = False,
    on_epoch: Callable[[int, Mapping[str, float]], None] = lambda epoch, values: None,
    on_step: Callable[[int, int], None] = lambda done, total: None,
    on_look: Callable[[int, Trained], None] = lambda epoch, trained: None,
) -> Trained:
    """Fits the network of `settings` to the training windows; V1 decides which epoch's weights stay, and when to stop.

    `run_dir` receives the checkpoint, the history, the progress and TensorBoard's events; what lies there is removed
    first, unless `resume`: then the training goes on after the last epoch that was kept, begins where none was, and
    answers at once where it has ended. `on_epoch` hears of every epoch from 1, `on_step` of steps done and steps in
    all, `on_look` sees the network after every `settings.pictures_every` epochs, and at last the network that stays,
    with the epoch whose weights it has. Seeds the generators of Python, numpy and the backend, which are global, with
    `settings.seed`.

    Raises DataError where the loss is not a number, where the network answers the same for every window, and where the
    checkpoint is damaged or of another training.
    """
    on_gpu = _has_gpu()
    batch = settings.batch_size_gpu if on_gpu else settings.batch_size
    run = _fingerprint(dataset, settings, batch)
    checkpoint = load_checkpoint(run_dir, run) if resume else None
    if checkpoint is None:
        shutil.rmtree(run_dir, ignore_errors=True)
    elif _has_told_its_end(run_dir):
        return _Training(dataset, settings, run_dir, run, batch, checkpoint).result()
    run_dir.mkdir(parents=True, exist_ok=True)
    report = _Report(run_dir, settings.epochs, "gpu" if on_gpu else "cpu", on_step)
    try:
        training = _Training(dataset, settings, run_dir, run, batch, checkpoint)
        rewrite_history(run_dir, training.history)
        report.begin(training.epoch, len(training.drawn), training.history)
        with EventLog(run_dir, checkpoint.events_bytes if checkpoint else 0) as events:
            while not training.finished:
                values = training.train_epoch(events, report)
                if not training.finished and training.epoch % settings.pictures_every == 0:
                    on_look(training.epoch, training.trained())
                training.keep(events)
                on_epoch(training.epoch, values)
        trained = training.result()
        on_look(1 + int(np.argmin(trained.history["val_loss"])), trained)
    except KeyboardInterrupt:
        report.tell("failed", "interrupted: run train_universal_transformer.py --resume")
        raise
    except BaseException as error:
        with suppress(OSError):  # a full disk, which is what `error` says
            report.tell("failed", str(error) or type(error).__name__)
        raise
    report.tell(*training.ending)
    return trained


class _Training:
    """The state of a training between two epochs: all of it is in the checkpoint, or follows from the arguments."""

    def __init__(
        self,
        dataset: Dataset,
        settings: ModelSettings,
        run_dir: Path,
        run: str,
        batch: int,
        checkpoint: Checkpoint | None,
    ) -> None:
        keras.utils.set_random_seed(settings.seed)
        self.dataset, self.settings, self.run_dir, self.run = dataset, settings, run_dir, run
        rows = strided(dataset, dataset.index["train"], settings.window_stride)
        realised = dataset.targets(rows)
        self.reading = OutputReading.fit(dataset.task, realised)
        targets = self.reading.targets(realised)
        weights = sample_weights(dataset, rows) if settings.sample_weighting == "uniqueness" else None
        self.drawn = DrawnWindows(rows, targets, weights, batch, settings.samples_per_epoch, settings.seed)
        balanced = settings.class_weighting == "balanced"
        self.loss = task_loss(dataset.task, class_weights(targets > 0.5) if balanced else None)
        self.stop_rows = evenly_spaced(dataset.index["v1"], READ_BATCH, settings.samples_per_epoch)
        self.stop_targets = self.reading.targets(dataset.targets(self.stop_rows))
        self.matrix = WindowMatrix(dataset)
        self.network = build_model(dataset.task, settings)
        self.model, self.optimizer = self._compiled()
        self.reader = WindowReader(self.model, self.matrix)
        self.epoch, self.best_loss, self.waited, self.constant = 0, math.inf, 0, 0
        self.best = [np.asarray(value) for value in self.network.get_weights()]
        self.history: dict[str, list[float]] = {name: [] for name in COLUMNS}
        if checkpoint is not None:
            self._go_on(checkpoint)

    def _compiled(self) -> tuple[WindowModel, MeasuringAdam]:
        steps = len(self.drawn) * self.settings.epochs
        warm_up = self._warm_up_steps
        peak = self.settings.learning_rate
        schedule = keras.optimizers.schedules.CosineDecay(
            peak * _FIRST_RATE, max(1, steps - warm_up), alpha=_LAST_RATE, warmup_target=peak, warmup_steps=warm_up
        )
        # The norm of all gradients together: one variable's clipped alone would count stacked weights as one.
        optimizer = MeasuringAdam(schedule, global_clipnorm=self.settings.gradient_clip_norm)
        model = WindowModel(self.network, self.matrix)
        model.compile(optimizer=optimizer, loss=self.loss, jit_compile=_compiles(self.settings.xla))
        # Variables that appear while the step is traced make TensorFlow trace and compile it twice.
        optimizer.build(model.trainable_variables)
        return model, optimizer

    @property
    def _warm_up_steps(self) -> int:
        return max(1, int(self.settings.warm_up_share * len(self.drawn) * self.settings.epochs))

    @property
    def ending(self) -> tuple[State, str]:
        """How and why the training ended, once `finished`."""
        if self.waited >= self.settings.early_stopping_patience:
            return "stopped", f"no better loss on V1 for {self.waited} epochs"
        return "done", f"all {self.settings.epochs} epochs"

    @property
    def finished(self) -> bool:
        """True after the last epoch, and where V1 has seen nothing better for as long as patience goes."""
        return self.epoch >= self.settings.epochs or self.waited >= self.settings.early_stopping_patience

    def train_epoch(self, events: EventLog, report: "_Report") -> dict[str, float]:
        """Trains and judges one epoch and writes down what it was; returns that, by COLUMNS."""
        begun = time.perf_counter()
        rows, targets, weights = self.drawn.epoch(self.epoch)
        steps = _Steps(report, self.epoch, self.drawn)
        fitted = self.model.fit(
            rows,
            targets,
            sample_weight=weights,
            batch_size=self.drawn.batch,
            shuffle=False,
            callbacks=[steps],
            verbose=0,
        )
        raw = self.reader.raw(self.stop_rows)
        values = {
            "loss": float(fitted.history["loss"][0]),
            "val_loss": float(ops.convert_to_numpy(ops.mean(self.loss(self.stop_targets, raw)))),
            "learning_rate": float(ops.convert_to_numpy(self.optimizer.learning_rate)),
            "gradient_norm": self.optimizer.take_mean_norm(len(self.drawn)),
            "samples_per_second": steps.samples_per_second,
            "seconds": time.perf_counter() - begun,
            "memory_mb": peak_memory_mb(),
        }
        self._judge(values, raw)
        self._write_down(values, raw, events)
        _epoch_end()
        return values

    def _judge(self, values: Mapping[str, float], raw: np.ndarray) -> None:
        """Counts the epoch, and decides about it by V1. Raises DataError where going on cannot help."""
        self.epoch += 1
        _check_numbers(self.epoch, values["loss"], values["val_loss"])
        self._check_answers(raw)
        for name, value in values.items():
            self.history[name].append(value)
        if values["val_loss"] < self.best_loss:
            self.best_loss, self.waited = values["val_loss"], 0
            self.best = [np.asarray(value) for value in self.network.get_weights()]
        else:
            self.waited += 1

    def _check_answers(self, raw: np.ndarray) -> None:
        spread = float(raw.std(axis=0, dtype=np.float64).max() / max(self.stop_targets.std(), 1e-12))
        warm = self.epoch * len(self.drawn) > self._warm_up_steps
        self.constant = self.constant + 1 if warm and spread < CONSTANT_SHARE else 0
        if self.constant >= CONSTANT_EPOCHS:
            raise DataError(
                f"training stopped in epoch {self.epoch}: the network answers the same for every window (for "
                f"{self.constant} epochs its answers on V1 have differed by {spread:.1g} of what the labels do, "
                f"expected at least {CONSTANT_SHARE:g}): look whether the inputs vary, lower model.learning_rate or "
                "model.dropout"
            )

    def _write_down(self, values: Mapping[str, float], raw: np.ndarray, events: EventLog) -> None:
        written = append_epoch(self.run_dir, self.epoch, values)
        scalars = {
            "loss/train": values["loss"],
            "loss/V1": values["val_loss"],
            **{name: values[name] for name in ("learning_rate", "gradient_norm", "samples_per_second")},
        }
        outputs = {f"predictions/{name}": column for name, column in self.reading.read(raw).items()}
        pictures = {}
        if self.finished or self.epoch % self.settings.pictures_every == 0:
            from perpcast.evaluation.plots import variable_importance

            explanation = self.reader.explain(spread(self.stop_rows, min(len(self.stop_rows), _EXPLAINED_WINDOWS)))
            pictures["variable_importance"] = variable_importance(
                explanation.variables, explanation.importance(), f"V1 after epoch {self.epoch}"
            )
        events.write_epoch(self.epoch, written, scalars, outputs, pictures)

    def keep(self, events: EventLog) -> None:
        """Writes the checkpoint: from now on a killed training goes on after this epoch."""
        save_checkpoint(
            self.run_dir,
            Checkpoint(
                run=self.run,
                epoch=self.epoch,
                history=self.history,
                best_loss=self.best_loss,
                waited=self.waited,
                constant=self.constant,
                events_bytes=events.size,
                network=_values(self.network.variables),
                optimizer=_values(self.optimizer.variables),
                best=self.best,
            ),
        )

    def _go_on(self, checkpoint: Checkpoint) -> None:
        _assign(self.network.variables, checkpoint.network)
        _assign(self.optimizer.variables, checkpoint.optimizer)
        self.epoch, self.best_loss = checkpoint.epoch, checkpoint.best_loss
        self.waited, self.constant = checkpoint.waited, checkpoint.constant
        self.best = list(checkpoint.best)
        self.history = {name: list(values) for name, values in checkpoint.history.items()}

    def trained(self) -> Trained:
        """The network as it is now; the next epoch changes it."""
        return Trained(self.reader, self.reading, self.dataset, {name: list(v) for name, v in self.history.items()})

    def result(self) -> Trained:
        """The network with the weights that were the best on V1, in float32."""
        if self.settings.precision != "float32":
            self.network = build_model(self.dataset.task, self.settings, precision="float32")
            self.model = WindowModel(self.network, self.matrix)
            self.model.compile(jit_compile=_compiles(self.settings.xla))
            self.reader = WindowReader(self.model, self.matrix)
        self.network.set_weights(self.best)
        return self.trained()


class _Report:
    """Tells of a training while it runs: `progress.json`, at most once a second, and `on_step`."""

    def __init__(self, run_dir: Path, epochs: int, device: str, on_step: Callable[[int, int], None]) -> None:
        self._run_dir, self._epochs, self._device, self._on_step = run_dir, epochs, device, on_step
        self._begun = self._told = time.perf_counter()
        self._before = 0.0
        self._step = self._steps_of_epoch = 0
        self._samples_per_second = 0.0
        self._loss: float | None = None
        self.tell("running", "")

    def begin(self, epoch: int, steps_of_epoch: int, history: Mapping[str, list[float]]) -> None:
        """The training stands after `epoch` epochs, of so many steps each."""
        self._step, self._steps_of_epoch = epoch * steps_of_epoch, steps_of_epoch
        self._before = sum(history["seconds"])
        if epoch:
            self._samples_per_second, self._loss = history["samples_per_second"][-1], history["loss"][-1]
        self.tell("running", "")

    def step(self, done: int, loss: float, samples_per_second: float) -> None:
        """So many steps are done, of all epochs; `loss` is the mean of this epoch's."""
        self._step, self._loss, self._samples_per_second = done, loss, samples_per_second
        self._on_step(done, self._steps_of_epoch * self._epochs)
        if time.perf_counter() - self._told >= _PROGRESS_SECONDS:
            _check_numbers(self._epoch, loss, None)
            self.tell("running", "")

    @property
    def _epoch(self) -> int:
        """The epoch of the newest step, from 1."""
        return min(self._epochs, max(1, -(-self._step // max(1, self._steps_of_epoch))))

    def tell(self, state: State, cause: str) -> None:
        """Writes where the training stands."""
        self._told = time.perf_counter()
        write_progress(
            self._run_dir,
            Progress(
                state=state,
                cause=cause,
                epoch=self._epoch,
                epochs=self._epochs,
                step=self._step,
                steps=self._steps_of_epoch * self._epochs,
                samples_per_second=self._samples_per_second,
                elapsed_seconds=self._before + self._told - self._begun,
                memory_mb=peak_memory_mb(),
                pid=os.getpid(),
                device=self._device,
                loss=self._loss,
            ),
        )


class _Steps(keras.callbacks.Callback):
    """Counts the steps of an epoch and their speed; the first one is left out of it, where the step is compiled."""

    def __init__(self, report: _Report, epoch: int, drawn: DrawnWindows) -> None:
        super().__init__()
        self._report, self._before, self._batch = report, epoch * len(drawn), drawn.batch
        self._begun = self._first = time.perf_counter()
        self.samples_per_second = 0.0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """One step is done."""
        now, counted = time.perf_counter(), batch
        if batch == 0:
            self._first, counted = now, 1
        since = self._begun if batch == 0 else self._first
        self.samples_per_second = counted * self._batch / max(now - since, 1e-9)
        self._report.step(self._before + batch + 1, float(logs["loss"]), self.samples_per_second)
        _in_epoch()


def _check_numbers(epoch: int, loss: float, stop_loss: float | None) -> None:
    if not math.isfinite(loss) or not (stop_loss is None or math.isfinite(stop_loss)):
        on_v1 = "" if stop_loss is None else f", on V1 {stop_loss}"
        raise DataError(
            f"training stopped in epoch {epoch}: loss {loss}{on_v1}; expected numbers: lower model.learning_rate"
        )


def _compiles(xla: bool) -> bool:
    """JAX runs step by step unless it compiles, and it compiles by XLA alone."""
    return keras.backend.backend() == "jax" or (xla and keras.backend.backend() == "tensorflow")


def _values(variables: Any) -> list[np.ndarray]:
    return [np.asarray(ops.convert_to_numpy(variable)) for variable in variables]


def _assign(variables: Any, values: Any) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(value)


def _has_told_its_end(run_dir: Path) -> bool:
    """True where the process that ended the training lived to say so: then its last look was taken too."""
    progress = read_progress(run_dir)
    return progress is not None and progress.state in ("done", "stopped")


def _fingerprint(dataset: Dataset, settings: ModelSettings, batch: int) -> str:
    """Of everything that the result of a training depends on."""
    described = [
        dataset.fingerprint,
        dataset.task.to_json(),
        settings.model_dump(mode="json"),
        VERSIONS[settings.architecture],
        keras.backend.backend(),
        batch,
    ]
    return hashlib.sha256(json.dumps(described).encode()).hexdigest()


def _has_gpu() -> bool:
    # JAX raises where it was not built for one.
    return any(device.startswith(("gpu", "cuda")) for device in keras.distribution.list_devices())
