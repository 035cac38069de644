"""A small dataset for the tests of networks, training and bundle: random inputs, one of which moves the labels."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from perpcast.config import ModelSettings
from perpcast.evaluation.splits import split_by_time
from perpcast.features.scaler import Scaler
from perpcast.task import Target, Task
from perpcast.training.dataset import Dataset

STEP_MS = 900_000
BEGIN_MS = 1_700_000_100_000 // STEP_MS * STEP_MS
LOOKBACK, HORIZON = 6, 8
QUANTILES = (0.5, 0.75, 0.9)

TASK = Task(
    interval="15",
    lookback=LOOKBACK,
    feature_set="test/1",
    static=("symbol",),
    known=("hour_sin", "hour_cos"),
    observed=("price_change_1", "level", "noise"),
    targets=tuple(Target(side, "regression", HORIZON, QUANTILES) for side in ("buy", "sell")),
    exit_policies={"buy": {"stop": 0.011}, "sell": {"stop": 0.011}},
    symbols=("AUSDT", "BUSDT", "CUSDT"),
)

SETTINGS = ModelSettings(
    architecture="tft",
    sequence_length=LOOKBACK,
    prediction_horizon=HORIZON,
    d_model=8,
    num_heads=2,
    variable_selection="fused",
    vsn_rank=None,
    dropout=0.1,
    batch_size=64,
    batch_size_gpu=64,
    epochs=4,
    samples_per_epoch=1024,
    window_stride=1,
    learning_rate=0.01,
    warm_up_share=0.05,
    gradient_clip_norm=1.0,
    early_stopping_patience=3,
    class_weighting="none",
    sample_weighting="none",
    xla=False,
    precision="float32",
    pictures_every=5,
    seed=7,
)


def small_dataset(path: Path, bars: int = 2000, edge: float = 1.0, seed: int = 3) -> Dataset:
    """`bars` bars of three symbols; a share `edge` of each label is the newest `level`, buy and sell opposite."""
    rng = np.random.default_rng(seed)
    symbols = len(TASK.symbols)
    rows = symbols * bars
    inputs = rng.normal(size=(rows, 5)).astype(np.float32)
    inputs[:, 1] = 1000 + 50 * inputs[:, 1]  # only a scaler that is applied makes this readable
    times = np.tile(BEGIN_MS + STEP_MS * np.arange(bars), symbols)
    symbol = np.repeat(np.arange(symbols, dtype=np.int16), bars)
    signal = edge * (inputs[:, 1] - 1000) / 50
    noise = 0.3 * rng.normal(size=(rows, 2))
    returns = 0.01 * (np.stack([signal, -signal], axis=1) + noise) - 0.003
    split = split_by_time(BEGIN_MS, int(times.max()), STEP_MS, (0.6, 0.15, 0.1, 0.15), HORIZON + 1)
    usable = np.tile(np.arange(bars) >= LOOKBACK - 1, symbols)
    codes = np.where(usable, split.codes(times), -1)
    index = {name: np.flatnonzero(codes == code) for code, name in enumerate(split.spans)}
    return Dataset(
        path=path / "0123456789abcdef",
        task=TASK,
        scaler=Scaler.fit(inputs[index["train"]], (*TASK.observed, *TASK.known)),
        split=split,
        manifest={"fingerprint": "f" * 64, "universe_as_of": "2023-11-14"},
        inputs=inputs,
        symbol=symbol,
        open_time_ms=times,
        expected_return=returns,
        bars_held=np.full((rows, 2), 3, np.int16),
        index=index,
    )


def settings(**changes: object) -> ModelSettings:
    """The small settings with other values."""
    return ModelSettings(**{**SETTINGS.model_dump(), **changes})


def task_of(**changes: object) -> Task:
    """The small task with other values."""
    return replace(TASK, **changes)  # type: ignore[arg-type]


def classification_of(dataset: Dataset) -> Dataset:
    """The same rows with the task of telling profits from losses."""
    targets = tuple(replace(target, kind="classification", quantiles=()) for target in dataset.task.targets)
    return replace(dataset, task=replace(dataset.task, targets=targets))
