"""A dataset as the stages make it, certified; then each planted fault on it: certified no more."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perpcast.database import (
    Database,
    DatabaseAddress,
    create_database,
    migrate,
    open_engine,
    read_processed,
    replace_processed,
)
from perpcast.errors import DataError, MissingInputError
from perpcast.evaluation.certificate import DATASET_CHECKS, MODEL_CHECKS, Certificate
from perpcast.evaluation.splits import split_by_time
from perpcast.evaluation.threshold import choose_threshold
from perpcast.features.indicators import COLUMNS
from perpcast.features.scaler import Scaler
from perpcast.market import SIDES, CandleSeries
from perpcast.outputs import OutputReading
from perpcast.training.certify import certify_dataset, certify_model, read_certificate
from perpcast.training.dataset import Dataset, build_dataset, classification_task, load_dataset
from tests.test_training_dataset import FRACTIONS, POLICIES, POLICY, STEP, build, fill, walk

BARS = 65 * 96  # days enough to be shifted by 30


@dataclass(frozen=True)
class World:
    """A certified dataset, and the candles that it was made of."""

    dataset: Dataset
    candles: dict[str, CandleSeries]

    def certify(self, **changes: Any) -> Certificate:
        return certify_dataset(replace(self.dataset, **changes), self.candles.__getitem__)


@pytest.fixture(scope="module")
def world(postgres: DatabaseAddress, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    address = replace(postgres, name="certify")
    create_database(address)
    database = open_engine(address)
    migrate(database)
    hole = np.r_[0:1900, 1930:BARS]
    candles = {"AUSDT": walk(BARS, 1), "BUSDT": walk(BARS, 2)[hole], "CUSDT": walk(BARS, 3)}
    yield World(build(database, fill(database, candles), tmp_path_factory.mktemp("datasets")), candles)
    database.dispose()


def failed(certificate: Certificate) -> list[str]:
    return [check.name for check in certificate.checks if not check.passed]


def test_dataset_is_certified_when_it_is_built_and_again_when_it_is_loaded(world: World) -> None:
    certificate = load_dataset(world.dataset.path).certificate
    assert certificate is not None
    assert certificate.passed
    assert certificate == world.dataset.certificate == world.certify()
    assert [check.name for check in certificate.checks] == list(DATASET_CHECKS)
    assert certificate.fingerprint == world.dataset.fingerprint
    inputs = certificate.checks[DATASET_CHECKS.index("inputs")]
    # Two windows of each of the four splits of each symbol.
    assert inputs.detail.startswith("24 windows of 3 symbols from candles without their future")
    assert "all rows of AUSDT, BUSDT, CUSDT" in inputs.detail
    assert certificate.null.shifts
    assert 30 <= min(certificate.null.shifts) <= max(certificate.null.shifts) <= 65 - 30
    assert np.abs(certificate.null.rank_ic).max() < 0.5


# --- the four planted faults ----------------------------------------------------------------------------------------


def test_planted_future_column_is_caught_and_nothing_is_kept(database: Database, tmp_path: Path) -> None:
    """The stored RSI of one symbol is that of the next bar."""
    candles = {"AUSDT": walk(2500, 1), "BUSDT": walk(2500, 2)}
    task = fill(database, candles)
    processed = read_processed(database, "BUSDT")
    ahead = processed.indicators.copy()
    column = COLUMNS.index("rsi_14")
    ahead[:-1, column] = ahead[1:, column]
    replace_processed(database, "BUSDT", replace(processed, indicators=ahead))
    with pytest.raises(DataError, match=r"leaks: .*inputs: .*BUSDT rsi_14 .* run prepare_dataset.py again") as error:
        build(database, task, tmp_path)
    assert "label reach" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


@pytest.mark.parametrize("ahead", [1, 50])
def test_planted_future_column_in_the_rows_is_caught(world: World, ahead: int) -> None:
    """One column of all symbols, as an indicator that looks ahead leaves it: here, the change some bars later."""
    column = world.dataset.task.observed.index("price_change_1")
    inputs = np.array(world.dataset.inputs)
    later = np.append(inputs[ahead:, column], inputs[:ahead, column])
    inputs[:, column] = np.where(np.isfinite(later), later, inputs[:, column])
    scaler = Scaler.fit(inputs[training_rows(world.dataset)], world.dataset.scaler.columns)
    certificate = world.certify(inputs=inputs, scaler=scaler)
    assert failed(certificate) == ["inputs"]
    assert "AUSDT price_change_1 of " in certificate.failures()[0]


def test_unpurged_split_is_caught(world: World) -> None:
    dataset, lookback = world.dataset, world.dataset.task.lookback
    known = np.isfinite(dataset.inputs).all(axis=1)
    whole = np.convolve(known, np.ones(lookback))[: len(known)] == lookback
    valid = whole & np.isfinite(dataset.expected_return).all(axis=1)
    span = dataset.split.train.first_ms, dataset.split.test.last_ms
    unpurged = split_by_time(*span, STEP, FRACTIONS, purge=0)
    codes = np.where(valid, unpurged.codes(dataset.open_time_ms), -1)
    index = {name: np.flatnonzero(codes == code) for code, name in enumerate(unpurged.spans)}
    leaking = replace(dataset, split=unpurged, index=index)
    scaler = Scaler.fit(dataset.inputs[training_rows(leaking)], dataset.scaler.columns)
    assert failed(world.certify(split=unpurged, index=index, scaler=scaler)) == ["label reach"]
    # Where the instants are as they should be, and the windows are not.
    assert failed(world.certify(index=index, scaler=scaler)) == ["label reach"]


def training_rows(dataset: Dataset) -> np.ndarray:
    return np.unique(dataset.index["train"][:, None] + np.arange(1 - dataset.task.lookback, 1))


def test_scaler_fitted_on_everything_is_caught(world: World) -> None:
    whole = Scaler.fit(world.dataset.inputs, world.dataset.scaler.columns)
    assert failed(world.certify(scaler=whole)) == ["scaler"]


def test_threshold_chosen_on_test_is_caught(world: World) -> None:
    dataset, predicted = world.dataset, {split: guess(world.dataset, split) for split in ("v2", "test")}
    reading = OutputReading.fit(dataset.task, dataset.targets(dataset.index["train"]))
    thresholds = {split: chosen(dataset, split, predicted[split]) for split in predicted}
    assert thresholds["v2"] != thresholds["test"]

    def certified(split: str) -> Certificate:
        return certify_model(
            dataset, reading, thresholds[split], predicted["v2"], 0.05, trained_on=dataset.index["train"]
        )

    honest = certified("v2")
    assert not honest.failures((*DATASET_CHECKS, *MODEL_CHECKS))
    assert honest.null == replace(certificate_of(dataset).null, candidate=0.05)
    assert failed(certified("test")) == ["threshold"]


def guess(dataset: Dataset, split: str) -> dict[str, np.ndarray]:
    """A forecast that knows something: what came true, and noise."""
    rng = np.random.default_rng(1)
    realised = dataset.windows(split).realised
    return {
        f"{side}_mean": (0.3 * realised[side] + rng.normal(0.004, 0.01, len(realised[side]))).astype(np.float32)
        for side in SIDES
    }


def chosen(dataset: Dataset, split: str, predicted: dict[str, np.ndarray]) -> float:
    means: dict[str, np.ndarray] = {side: predicted[f"{side}_mean"] for side in SIDES}
    return choose_threshold(means, dataset.windows(split)).threshold


def certificate_of(dataset: Dataset) -> Certificate:
    assert dataset.certificate is not None
    return dataset.certificate


# --- what else a model's certificate shows --------------------------------------------------------------------------


def test_classifier_calibrated_on_test_or_trained_on_other_windows_is_caught(world: World) -> None:
    task = world.dataset.task
    profits = classification_task("15", task.lookback, POLICY.horizon, task.symbols, POLICIES)
    dataset = replace(world.dataset, task=profits)
    rng = np.random.default_rng(2)
    raw = {
        split: 30 * dataset.targets(dataset.index[split]) + rng.normal(size=(len(dataset.index[split]), 2))
        for split in ("v2", "test")
    }
    train = dataset.index["train"][::3]

    def certified(calibrated_on: str, fitted_on: np.ndarray, trained_on: np.ndarray, rank_ic: float) -> Certificate:
        reading = OutputReading.fit(profits, dataset.targets(fitted_on))
        reading = reading.calibrated(raw[calibrated_on], dataset.targets(dataset.index[calibrated_on]))
        predicted = reading.read(raw["v2"])
        threshold = chosen(dataset, "v2", predicted)
        return certify_model(dataset, reading, threshold, predicted, rank_ic, trained_on)

    honest = certified("v2", train, train, np.nan)
    assert failed(honest) == []
    assert honest.null.candidate is None
    assert failed(certified("test", train, train, 0.1)) == ["calibration"]
    everything = np.concatenate(list(dataset.index.values()))
    assert failed(certified("v2", everything, train, 0.1)) == ["reading"]
    assert failed(certified("v2", everything, everything, 0.1)) == ["training rows"]


def test_model_of_a_dataset_without_certificate_is_none(world: World) -> None:
    dataset, rows = replace(world.dataset, certificate=None), world.dataset.index["train"]
    reading = OutputReading.fit(dataset.task, dataset.targets(rows))
    with pytest.raises(MissingInputError, match="has no leak certificate: build it again"):
        certify_model(dataset, reading, 0.0, guess(dataset, "v2"), 0.0, rows)


def test_candles_of_another_market_are_caught(world: World) -> None:
    other = {**world.candles, "CUSDT": walk(BARS, 9)}
    assert failed(certify_dataset(world.dataset, other.__getitem__)) == ["inputs"]
    fewer = {**world.candles, "AUSDT": world.candles["AUSDT"][1:]}
    certificate = certify_dataset(world.dataset, fewer.__getitem__)
    assert "AUSDT has other candles than rows" in certificate.failures()[0]


# --- the folder -----------------------------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], None]


def fail_the_scaler(data: dict[str, Any]) -> None:
    data["checks"][1]["passed"] = False


@pytest.mark.parametrize(
    ("change", "error", "told"),
    [
        (lambda data: data.update(fingerprint="0" * 64), DataError, "is that of dataset 0000000000000000, expected"),
        (fail_the_scaler, DataError, r"leaks: its certificate failed \(scaler: mean and deviation"),
        (lambda data: data["checks"].pop(), DataError, "planted future: was not checked"),
        (lambda data: data.update(version="leak_certificate/0"), MissingInputError, "is leak_certificate/0, expected"),
        (lambda data: data.pop("null"), MissingInputError, "cannot be read"),
    ],
    ids=["another dataset's", "failed", "not whole", "another version", "damaged"],
)
def test_load_dataset_refuses_another_certificate(
    world: World, tmp_path: Path, change: Change, error: type[Exception], told: str
) -> None:
    path = Path(shutil.copytree(world.dataset.path, tmp_path / "copy"))
    data = json.loads((path / "certificate.json").read_text())
    change(data)
    (path / "certificate.json").write_text(json.dumps(data))
    with pytest.raises(error, match=rf"{told}.*run train_universal_transformer.py"):
        load_dataset(path)


def test_load_dataset_refuses_a_folder_without_certificate(world: World, tmp_path: Path) -> None:
    path = Path(shutil.copytree(world.dataset.path, tmp_path / "copy"))
    (path / "certificate.json").unlink()
    with pytest.raises(MissingInputError, match=r"has no leak certificate \(certificate.json\): run train_universal"):
        load_dataset(path)


def test_build_dataset_certifies_a_folder_of_an_older_version_and_leaves_a_certified_one(
    database: Database, tmp_path: Path
) -> None:
    task = fill(database, {"AUSDT": walk(2500, 1)})
    first = build(database, task, tmp_path)
    written = (first.path / "certificate.json").stat().st_mtime_ns
    build(database, task, tmp_path)
    assert (first.path / "certificate.json").stat().st_mtime_ns == written
    (first.path / "certificate.json").unlink()
    again = build_dataset(database, task, tmp_path, FRACTIONS, universe_as_of="2025-07-01")
    assert again.path == first.path
    assert read_certificate(again.path, again.fingerprint).passed
