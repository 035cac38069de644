"""The loop learns what can be learned, draws as its seed says, stops as it should, and exports what it trained."""

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import keras
import numpy as np
import pytest

from perpcast.bundle import BundleParts, load_bundle, save_bundle
from perpcast.errors import DataError
from perpcast.features.scaler import Scaler
from perpcast.models.export import TOLERANCE, export_onnx
from perpcast.training.dataset import Dataset
from perpcast.training.loop import DrawnWindows, Trained, WindowModel, evenly_spaced, regression_loss, train
from tests.model_world import QUANTILES, SETTINGS, TASK, settings, small_dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return small_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def trained(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, Path, list[int], list[int]]:
    run_dir = tmp_path_factory.mktemp("logs") / "training_x"
    run_dir.mkdir()
    (run_dir / "left_by_a_killed_run").touch()
    epochs: list[int] = []
    steps: list[int] = []
    result = train(
        dataset,
        SETTINGS,
        run_dir,
        lambda epoch, _: epochs.append(epoch),
        lambda done, total: steps.append(total - done),
    )
    return result, run_dir, epochs, steps


def scaled_windows(dataset: Dataset, rows: np.ndarray) -> dict[str, np.ndarray]:
    windows = dataset.scaler.apply(np.concatenate(dataset.gather(rows), axis=-1))
    split = len(dataset.task.observed)
    symbol = dataset.symbol[rows].astype(np.int32)
    return {"observed": windows[..., :split], "known": windows[..., split:], "symbol": symbol}


def test_training_finds_the_planted_signal(
    trained: tuple[Trained, Path, list[int], list[int]], dataset: Dataset
) -> None:
    result, run_dir, epochs, steps = trained
    losses = result.history["val_loss"]
    # What the best constant would lose on these labels: mean 0 and their own quantiles, in scaled units.
    labels = result.target_scaler.apply(dataset.targets(dataset.index["v1"]))
    levels = [[labels[:, side].mean(), *np.quantile(labels[:, side], QUANTILES)] for side in (0, 1)]
    constant = np.tile(np.concatenate(levels).astype(np.float32), (len(labels), 1))
    assert min(losses) < 0.5 * float(keras.ops.mean(regression_loss(TASK)(labels, constant)))
    assert epochs == [1, 2, 3, 4]
    assert steps[-1] == 0
    assert len(steps) == 4 * 1024 // 64
    assert not (run_dir / "left_by_a_killed_run").exists()
    assert list(run_dir.rglob("events.out.tfevents.*"))


def test_exported_bundle_answers_as_keras(
    trained: tuple[Trained, Path, list[int], list[int]], dataset: Dataset, tmp_path: Path
) -> None:
    """By batches of 1 and 51, in scaled units and in those of the labels; and its mean follows the planted signal."""
    network, target_scaler = trained[0].network, trained[0].target_scaler
    rows = dataset.index["test"][:51]
    inputs = scaled_windows(dataset, rows)
    model, difference = export_onnx(network, inputs)
    assert difference < 1e-5 < TOLERANCE
    observed, known = dataset.gather(rows)
    names = [dataset.task.symbols[code] for code in dataset.symbol[rows]]
    parts = BundleParts(
        model,
        dataset.task,
        dataset.scaler,
        target_scaler,
        0.001,
        {"a": 1},
        "card",
        (observed[:3], known[:3], names[:3]),
    )
    save_bundle(tmp_path / "tft-1", parts)
    bundle = load_bundle(tmp_path / "tft-1")
    assert bundle.task == dataset.task
    answers = bundle.predict(observed, known, names)
    assert list(answers) == list(dataset.task.outputs)
    scaled = np.asarray(keras.ops.convert_to_numpy(network(inputs, training=False)))
    for column, name in enumerate(dataset.task.outputs):
        side = 0 if name.startswith("buy") else 1
        expected = scaled[:, column] * target_scaler.deviation[side] + target_scaler.mean[side]
        np.testing.assert_allclose(answers[name], expected, atol=1e-5)
        alone = [bundle.predict(observed[[n]], known[[n]], names[n : n + 1])[name][0] for n in range(5)]
        np.testing.assert_allclose(answers[name][:5], alone, atol=1e-5)
    assert np.corrcoef(answers["buy_mean"], dataset.expected_return[rows, 0])[0, 1] > 0.8
    assert (answers["buy_q50"] <= answers["buy_q75"]).all()
    assert (answers["sell_q75"] <= answers["sell_q90"]).all()


def test_export_that_answers_otherwise_is_refused(
    trained: tuple[Trained, Path, list[int], list[int]], dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perpcast.models.export._difference", lambda *_: float("nan"))
    with pytest.raises(DataError, match="differs from Keras by nan"):
        export_onnx(trained[0].network, scaled_windows(dataset, dataset.index["test"][:51]))


def test_window_model_gathers_the_windows_of_the_dataset(dataset: Dataset) -> None:
    """The gather inside the compiled step and `Dataset.gather` are the same windows."""
    seen: dict[str, np.ndarray] = {}

    def network(inputs: Mapping[str, object], training: bool | None) -> object:
        seen.update({name: np.asarray(keras.ops.convert_to_numpy(value)) for name, value in inputs.items()})
        return inputs["observed"]

    rows = dataset.index["v1"][::97]
    model = WindowModel(keras.Sequential(), dataset)
    model.network = network
    model.call(rows.astype(np.int32))
    for name, values in scaled_windows(dataset, rows).items():
        np.testing.assert_array_equal(seen[name], values)


def test_draws_depend_on_seed_and_epoch_alone(dataset: Dataset) -> None:
    scaler = Scaler((*(t.name for t in TASK.targets),), (0.0, 0.0), (1.0, 1.0))

    def epochs(seed: int, samples: int | None = 200) -> list[list[int]]:
        drawn, found = DrawnWindows(dataset, scaler, 64, samples, seed), []
        for _ in range(2):
            found.append([int(row) for number in range(len(drawn)) for row in drawn[number][0]])
            drawn.on_epoch_end()
        return found

    first, second = epochs(1)
    assert epochs(1) == [first, second]
    assert first != second
    assert epochs(2)[0] != first
    assert len(set(first)) == 192  # whole batches of 200, no window twice
    assert set(first) <= set(dataset.index["train"].tolist())
    assert len(epochs(1, None)[0]) == len(dataset.index["train"]) // 64 * 64


@pytest.mark.parametrize(
    ("windows", "batch", "samples", "expected"),
    [(1000, 64, None, 960), (1000, 64, 1024, 256), (1000, 64, 16, 64), (10, 64, None, 10), (10, 64, 1024, 10)],
)
def test_validation_windows_are_whole_batches_from_first_to_last(
    windows: int, batch: int, samples: int | None, expected: int
) -> None:
    rows = evenly_spaced(np.arange(windows) + 5, batch, samples)
    assert len(rows) == expected
    assert (rows[0], rows[-1]) == (5, windows + 4)
    assert (np.diff(rows) > 0).all()


def test_loss_is_squared_error_and_pinball_by_hand() -> None:
    """Buy: mean off by 1, then quantiles .5 .75 .9 below by 2, 0, -1: 1 + 1 + 0 + .1; sell exact: 0."""
    outputs = np.array([[1.0, 0.0, 2.0, 3.0, 5.0, 5.0, 5.0, 5.0]], np.float32)
    loss = regression_loss(TASK)(np.array([[2.0, 5.0]], np.float32), outputs)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(loss), [2.1], rtol=1e-6)


def test_training_twice_is_the_same_training(dataset: Dataset, tmp_path: Path) -> None:
    short = settings(epochs=1, samples_per_epoch=128, d_model=4)
    first, second = (train(dataset, short, tmp_path / "logs").history for _ in range(2))
    np.testing.assert_allclose(first["val_loss"], second["val_loss"], rtol=1e-5)


def test_loss_that_is_not_a_number_stops_with_the_cause(dataset: Dataset, tmp_path: Path) -> None:
    returns = dataset.expected_return.copy()
    returns[dataset.index["v1"]] = np.inf
    with pytest.raises(DataError, match=r"training stopped in epoch 1: .* lower model.learning_rate"):
        train(replace(dataset, expected_return=returns), settings(epochs=1, samples_per_epoch=64, d_model=4), tmp_path)


def test_tensorflow_is_the_backend_of_these_tests() -> None:
    assert importlib.util.find_spec("tensorflow")
    assert keras.backend.backend() == "tensorflow"
