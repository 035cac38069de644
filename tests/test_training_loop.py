"""The loop learns what can be learned, draws as its seed says, stops as it should and says why, and tells of it."""

import importlib.util
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import keras
import numpy as np
import pytest

from perpcast.errors import DataError
from perpcast.outputs import OutputReading
from perpcast.training.dataset import Dataset
from perpcast.training.events import EventLog
from perpcast.training.loop import CONSTANT_EPOCHS, Trained, train
from perpcast.training.losses import task_loss
from perpcast.training.optimizer import MeasuringAdam
from perpcast.training.progress import COLUMNS, append_epoch, read_history, read_progress
from perpcast.training.windows import READ_BATCH, DrawnWindows, WindowMatrix, WindowModel, evenly_spaced, strided
from tests.model_world import QUANTILES, TASK, classification_of, settings, small_dataset
from tests.tensorboard_events import points_of, summaries_of

PNG = b"\x89PNG"
SHORT = {"epochs": 1, "samples_per_epoch": 128, "d_model": 4}
RUN = settings(pictures_every=2, epochs=5, warm_up_share=0.2)


@dataclass
class Run:
    """A training and all that it told."""

    trained: Trained
    run_dir: Path
    epochs: list[tuple[int, float]]
    steps: list[int]
    looks: list[tuple[int, float]]  # epoch, mean of the answers on some windows


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return small_dataset(tmp_path_factory.mktemp("dataset"))


@pytest.fixture(scope="module")
def run(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Run:
    run_dir = tmp_path_factory.mktemp("logs") / "training_x"
    run_dir.mkdir()
    (run_dir / "left_by_a_killed_run").touch()
    told = Run(None, run_dir, [], [], [])  # type: ignore[arg-type]
    told.trained = train(
        dataset,
        RUN,
        run_dir,
        on_epoch=lambda epoch, values: told.epochs.append((epoch, values["val_loss"])),
        on_step=lambda done, total: told.steps.append(total - done),
        on_look=lambda epoch, trained: told.looks.append((epoch, answers_of(trained))),
    )
    return told


def answers_of(trained: Trained) -> float:
    return float(trained.raw(trained.dataset.index["test"][:64]).mean())


def loss_of(dataset: Dataset, reading: OutputReading, raw: np.ndarray, rows: np.ndarray | None = None) -> float:
    """On V1, or the rows given."""
    labels = reading.targets(dataset.targets(dataset.index["v1"] if rows is None else rows))
    return float(keras.ops.mean(task_loss(dataset.task)(labels, raw)))


def test_training_finds_the_planted_signal(run: Run, dataset: Dataset) -> None:
    # What the best constant would lose on these labels: mean 0 and their own quantiles, in scaled units.
    labels = run.trained.reading.targets(dataset.targets(dataset.index["v1"]))
    levels = [[labels[:, side].mean(), *np.quantile(labels[:, side], QUANTILES)] for side in (0, 1)]
    constant = np.tile(np.concatenate(levels).astype(np.float32), (len(labels), 1))
    found = loss_of(dataset, run.trained.reading, run.trained.raw(dataset.index["v1"]))
    assert found < 0.5 * loss_of(dataset, run.trained.reading, constant)


def test_training_tells_every_step_epoch_and_look_once(run: Run) -> None:
    assert not (run.run_dir / "left_by_a_killed_run").exists()
    assert run.steps == list(range(5 * 16 - 1, -1, -1))  # 1024 windows in batches of 64, five times
    assert run.epochs == list(enumerate(run.trained.history["val_loss"], 1))
    assert [epoch for epoch, _ in run.looks] == [2, 4, 1 + int(np.argmin(run.trained.history["val_loss"]))]
    assert run.looks[-1][1] == answers_of(run.trained)
    assert run.looks[0][1] != run.looks[1][1]


def test_run_folder_holds_history_and_progress(run: Run) -> None:
    assert read_history(run.run_dir) == dict(run.trained.history)
    assert list(run.trained.history) == list(COLUMNS)
    assert {len(values) for values in run.trained.history.values()} == {5}
    lines = [json.loads(line) for line in (run.run_dir / "history.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4, 5]
    progress = read_progress(run.run_dir)
    assert progress is not None
    assert (progress.state, progress.epoch, progress.epochs, progress.step, progress.steps) == ("done", 5, 5, 80, 80)
    assert progress.cause == "all 5 epochs"
    assert progress.device == "cpu"
    assert progress.memory_mb > 100
    assert progress.elapsed_seconds > sum(run.trained.history["seconds"])
    assert min(run.trained.history["samples_per_second"]) > 0


def test_learning_rate_warms_up_and_falls_along_a_cosine(run: Run) -> None:
    """80 steps, 16 of them warm-up: after epoch e, 0.01 + 0.99 (1 + cos(pi (16 e - 16) / 64)) / 2 of the peak."""
    shares = [0.01 + 0.99 * (1 + math.cos(math.pi * (16 * epoch - 16) / 64)) / 2 for epoch in range(1, 6)]
    assert shares[0] == 1
    np.testing.assert_allclose(run.trained.history["learning_rate"], 0.01 * np.array(shares), rtol=1e-5)


def test_predictions_are_read_from_the_raw_columns(run: Run, dataset: Dataset) -> None:
    """300 rows take two batches of 256, the second one filled up; few rows answer as many do."""
    rows = dataset.index["test"][:300]
    raw, predicted = run.trained.raw(rows), run.trained.predict(rows)
    assert raw.shape == (300, 8)
    assert list(predicted) == list(TASK.outputs)
    for name, values in run.trained.reading.read(raw).items():
        np.testing.assert_array_equal(predicted[name], values)
    np.testing.assert_array_equal(run.trained.raw(rows[290:]), raw[290:])
    assert np.corrcoef(predicted["buy_mean"], dataset.expected_return[rows, 0])[0, 1] > 0.8
    assert run.trained.calibrated(rows).reading == run.trained.reading
    with pytest.raises(ValueError, match="no window to read"):
        run.trained.raw(rows[:0])


def test_explanation_names_the_planted_variable(run: Run, dataset: Dataset) -> None:
    explanation = run.trained.explain(dataset.index["test"][:300])
    assert explanation.variables == (*TASK.observed, *TASK.known)
    assert explanation.selection.shape == (300, 6, 5)
    np.testing.assert_allclose(explanation.selection.sum(axis=-1), 1, rtol=1e-5)
    np.testing.assert_allclose(explanation.attention.sum(axis=-1), 1, rtol=1e-5)
    assert explanation.variables[int(explanation.importance().argmax())] == "level"


def test_tensorboard_reads_curves_histograms_and_pictures(run: Run) -> None:
    points, history = points_of(run.run_dir), run.trained.history
    tags = {"loss/train": "loss", "loss/V1": "val_loss"}
    tags |= {name: name for name in ("learning_rate", "gradient_norm", "samples_per_second")}
    for tag, column in tags.items():
        assert points.pop(tag) == list(enumerate(map(np.float32, history[column]), 1))
    found = summaries_of(run.run_dir)
    pictures = found.pop("variable_importance")
    assert [step for step, _, _ in pictures] == [2, 4, 5]
    assert all(value.image.encoded_image_string.startswith(PNG) for _, _, value in pictures)
    histograms = {tag.removeprefix("predictions/"): found[tag] for tag in found if tag not in tags}
    assert set(histograms) == set(TASK.outputs)
    for values in histograms.values():
        assert [step for step, _, _ in values] == [1, 2, 3, 4, 5]
        assert {value.histo.num for _, _, value in values} == {256}  # a quarter of 1024
        assert {sum(value.histo.bucket) for _, _, value in values} == {256}
    times = [time for _, time, _ in found["loss/V1"]]
    assert times == sorted(times)
    assert abs(times[-1] - (run.run_dir / "history.jsonl").stat().st_mtime) < 1


def test_event_log_goes_on_without_a_point_twice(tmp_path: Path) -> None:
    """Epoch 2 was written, but its checkpoint was not: cut off and written again, under another name."""
    with EventLog(tmp_path) as events:
        events.write_epoch(1, 10.0, {"loss/V1": 0.5}, {"p": np.arange(3.0)}, {})
        kept = events.size
        events.write_epoch(2, 20.0, {"loss/V1": 0.4}, {}, {})
    (before,) = tmp_path.iterdir()
    with EventLog(tmp_path, kept) as events:
        assert events.size == kept
        events.write_epoch(2, 30.0, {"loss/V1": 0.25}, {}, {})
    (after,) = tmp_path.iterdir()
    assert before.name < after.name
    assert points_of(tmp_path)["loss/V1"] == [(1, 0.5), (2, 0.25)]
    assert [time for _, time, _ in summaries_of(tmp_path)["loss/V1"]] == [10.0, 30.0]


def test_history_ends_before_a_line_that_is_half_there(tmp_path: Path) -> None:
    assert read_history(tmp_path) == {name: [] for name in COLUMNS}
    assert read_progress(tmp_path) is None
    for epoch in (1, 2):
        append_epoch(tmp_path, epoch, dict.fromkeys(COLUMNS, 0.5 * epoch))
    path = tmp_path / "history.jsonl"
    path.write_text(path.read_text()[:-20])
    assert read_history(tmp_path) == {name: [0.5] for name in COLUMNS}


def test_probabilities_are_learnt_with_both_weightings_and_calibrated(dataset: Dataset, tmp_path: Path) -> None:
    """The signal tells most profits; with balanced classes a raw probability is too high by design, until V2."""
    classification = classification_of(dataset)
    weighted = settings(class_weighting="balanced", sample_weighting="uniqueness", epochs=3, learning_rate=0.02)
    trained = train(classification, weighted, tmp_path / "run")
    rows, v2 = classification.index["test"], classification.index["v2"]
    profit = classification.expected_return[rows] > 0
    calibrated = trained.calibrated(v2)
    predicted = calibrated.predict(rows)
    assert list(predicted) == ["buy_profit_probability", "buy_mean", "sell_profit_probability", "sell_mean"]
    for side, name in enumerate(("buy", "sell")):
        probability = predicted[f"{name}_profit_probability"]
        assert np.mean((probability > 0.5) == profit[:, side]) > 0.8
        share = np.mean(classification.expected_return[v2, side] > 0)
        assert abs(calibrated.predict(v2)[f"{name}_profit_probability"].mean() - share) < 0.01


def test_training_twice_is_the_same_training(run: Run, dataset: Dataset, tmp_path: Path) -> None:
    """To the last bit, whatever was trained in this process before."""
    again = train(dataset, RUN, tmp_path / "run")
    for column in ("loss", "val_loss", "gradient_norm"):
        assert again.history[column] == run.trained.history[column]
    for one, two in zip(again.network.get_weights(), run.trained.network.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)


def test_mixed_precision_trains_a_network_that_is_exported_in_float32(dataset: Dataset, tmp_path: Path) -> None:
    trained = train(dataset, settings(**{**SHORT, "epochs": 2}, precision="mixed_bfloat16"), tmp_path)
    assert trained.network.precision == "float32"
    assert {weight.dtype for weight in trained.network.get_weights()} == {np.dtype(np.float32)}
    rows = evenly_spaced(dataset.index["v1"], READ_BATCH, 128)
    found = loss_of(dataset, trained.reading, trained.raw(rows), rows)
    # What V1 lost was measured in bfloat16, with 8 bits of mantissa.
    assert found == pytest.approx(min(trained.history["val_loss"]), rel=0.02)
    assert keras.config.dtype_policy().name == "float32"


def test_training_stops_where_v1_gets_no_better_and_keeps_the_best(tmp_path: Path) -> None:
    """Nothing to learn but the noise: V1 gets worse, and the weights of its best epoch are those that stay."""
    dataset = small_dataset(tmp_path, bars=400, edge=0.0)
    greedy = settings(epochs=30, samples_per_epoch=None, d_model=4, early_stopping_patience=2, learning_rate=0.05)
    looks: list[int] = []
    trained = train(dataset, greedy, tmp_path / "run", on_look=lambda epoch, _: looks.append(epoch))
    losses = trained.history["val_loss"]
    assert len(losses) == int(np.argmin(losses)) + 1 + 2 < 30
    found = loss_of(dataset, trained.reading, trained.raw(dataset.index["v1"]))
    assert found == pytest.approx(min(losses), rel=1e-6)
    assert looks[-1] == 1 + int(np.argmin(losses))
    progress = read_progress(tmp_path / "run")
    assert progress is not None
    assert (progress.state, progress.cause) == ("stopped", "no better loss on V1 for 2 epochs")


def test_loss_that_is_not_a_number_stops_with_the_cause(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"training stopped in epoch 1: loss nan.* lower model.learning_rate"):
        train(dataset, settings(**SHORT, learning_rate=1e30), tmp_path / "run")
    progress = read_progress(tmp_path / "run")
    assert progress is not None
    assert progress.state == "failed"
    assert progress.cause.startswith("training stopped in epoch 1: loss nan")
    assert progress.loss is None


def test_network_that_answers_the_same_for_every_window_stops_with_the_cause(dataset: Dataset, tmp_path: Path) -> None:
    """Inputs that never vary, of one symbol: there is nothing to tell one window from another by."""
    dead = replace(dataset, inputs=np.ones_like(dataset.inputs), symbol=np.zeros_like(dataset.symbol))
    patient = settings(**{**SHORT, "epochs": 20}, warm_up_share=0.1, early_stopping_patience=20)
    with pytest.raises(DataError, match=r"in epoch \d+: the network answers the same for every window .*inputs vary"):
        train(dead, patient, tmp_path / "run")
    # 40 steps, 4 of warm-up: the third epoch is the first after it.
    assert len(read_history(tmp_path / "run")["loss"]) == 2 + CONSTANT_EPOCHS - 1


def test_checkpoint_of_other_settings_or_data_is_refused(run: Run, dataset: Dataset) -> None:
    before = {path.name: path.read_bytes() for path in run.run_dir.iterdir()}
    other = replace(dataset, manifest={**dataset.manifest, "fingerprint": "e" * 64})
    for data, changed in ((dataset, settings(**{**RUN.model_dump(), "seed": 8})), (other, RUN)):
        with pytest.raises(DataError, match="another training"):
            train(data, changed, run.run_dir, resume=True)
    assert {path.name: path.read_bytes() for path in run.run_dir.iterdir()} == before


def test_window_model_gathers_the_windows_of_the_dataset(dataset: Dataset) -> None:
    """The gather inside the compiled step and `Dataset.gather` are the same windows."""
    seen: dict[str, np.ndarray] = {}

    def network(inputs: Mapping[str, object], training: bool | None) -> object:
        seen.update({name: np.asarray(keras.ops.convert_to_numpy(value)) for name, value in inputs.items()})
        return inputs["observed"]

    rows = dataset.index["v1"][::97]
    model = WindowModel(keras.Sequential(), WindowMatrix(dataset))
    model.network = network
    model.call(rows.astype(np.int32))
    windows = dataset.scaler.apply(np.concatenate(dataset.gather(rows), axis=-1))
    np.testing.assert_array_equal(seen["observed"], windows[..., :3])
    np.testing.assert_array_equal(seen["known"], windows[..., 3:])
    np.testing.assert_array_equal(seen["static_categories"], dataset.symbol[rows, None])


def test_draws_depend_on_seed_and_epoch_alone(dataset: Dataset) -> None:
    rows = dataset.index["train"]
    targets = dataset.targets(rows)
    weights = np.arange(len(rows), dtype=np.float32)

    def draw(seed: int, epoch: int, samples: int | None = 200) -> list[int]:
        drawn = DrawnWindows(rows, targets, weights, 64, samples, seed)
        drawn.epoch(5)
        found, labels, share = drawn.epoch(epoch)
        assert share is not None
        np.testing.assert_array_equal(rows[share.astype(int)], found)
        np.testing.assert_array_equal(dataset.targets(found), labels)
        return found.tolist()

    first = draw(1, 0)
    assert draw(1, 0) == first
    assert draw(1, 1) != first
    assert draw(2, 0) != first
    assert len(set(first)) == 192  # whole batches of 200, no window twice
    assert set(first) <= set(rows.tolist())
    assert len(draw(1, 0, None)) == len(rows) // 64 * 64
    assert DrawnWindows(rows[:10], targets[:10], None, 64, None, 1).epoch(0)[2] is None


def test_stride_takes_every_third_window_of_each_symbol_each_in_a_phase_of_its_own(dataset: Dataset) -> None:
    rows = dataset.index["train"]
    kept = strided(dataset, rows, 3)
    for code in range(3):
        own, mine = rows[dataset.symbol[rows] == code], kept[dataset.symbol[kept] == code]
        np.testing.assert_array_equal(mine, own[code::3])
    np.testing.assert_array_equal(strided(dataset, rows, 1), rows)


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


def test_optimizer_measures_the_norm_of_all_gradients_before_it_clips_them() -> None:
    """Gradients (3, 0) and 4: norm 5, clipped to 1 as (0.6, 0) and 0.8; Adam's moment is a tenth of that."""
    variables = [keras.Variable([0.0, 0.0]), keras.Variable([0.0])]
    optimizer = MeasuringAdam(0.1, global_clipnorm=1.0)
    optimizer.build(variables)
    for _ in range(2):
        optimizer.apply([keras.ops.array([3.0, 0.0]), keras.ops.array([4.0])], variables)
    moments = {variable.path: keras.ops.convert_to_numpy(variable) for variable in optimizer.variables}
    found = np.concatenate([value for path, value in moments.items() if "momentum" in path])
    np.testing.assert_allclose(found, [0.06 * 1.9, 0, 0.08 * 1.9], rtol=1e-6)
    assert optimizer.take_mean_norm(2) == 5
    assert optimizer.take_mean_norm(2) == 0


def test_tensorflow_is_the_backend_of_these_tests() -> None:
    assert importlib.util.find_spec("tensorflow")
    assert keras.backend.backend() == "tensorflow"
