"""The result of a training on disk: what is saved is what is loaded, and nothing damaged or foreign is."""

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from perpcast.database import ModelRecord
from perpcast.errors import DataError, MissingInputError
from perpcast.training.dataset import Dataset
from perpcast.training.outcome import JUDGED
from perpcast.training.result import Result, load_result, save_result
from tests.model_world import small_dataset


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return small_dataset(tmp_path, bars=400)


@pytest.fixture
def result(dataset: Dataset) -> Result:
    record = ModelRecord(
        model_id="tft-0123456789ab",
        created_at=datetime(2025, 1, 2, 3, 4, 5, 678, tzinfo=UTC),
        task=json.loads(json.dumps(dataset.task.to_json())),  # as it comes back from any JSON
        architecture="tft",
        parameters={"d_model": 8},
        dataset_id=dataset.dataset_id,
        dataset_fingerprint=dataset.fingerprint,
        metrics={"rank_ic": 0.1, "r2": float("inf")},
        baselines={},
        bundle_path="trained_model/tft-0123456789ab",
        bundle_sha256="0" * 64,
    )
    draw = np.random.default_rng(1)
    predicted = {
        split: {name: draw.normal(size=len(dataset.index[split])).astype(np.float32) for name in dataset.task.outputs}
        for split in JUDGED
    }
    return Result(record, predicted)


def test_loaded_is_what_was_saved(tmp_path: Path, dataset: Dataset, result: Result) -> None:
    for _ in range(2):
        save_result(tmp_path / "result", result)
        loaded = load_result(tmp_path / "result", dataset)
        assert loaded.record == result.record
        for split in JUDGED:
            assert set(loaded.predicted[split]) == set(dataset.task.outputs)
            for name, values in result.predicted[split].items():
                np.testing.assert_array_equal(loaded.predicted[split][name], values)


def test_half_a_result_is_none(tmp_path: Path, dataset: Dataset, result: Result) -> None:
    folder = tmp_path / "result"
    with pytest.raises(MissingInputError, match=r"no result of a training in .*record\.json is not there"):
        load_result(folder, dataset)
    save_result(folder, result)
    (folder / "predictions.npz").unlink()
    with pytest.raises(MissingInputError, match=r"predictions\.npz is not there"):
        load_result(folder, dataset)


def damage_predictions(folder: Path) -> None:
    content = bytearray((folder / "predictions.npz").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "predictions.npz").write_bytes(bytes(content))


def cut_record(folder: Path) -> None:
    (folder / "record.json").write_bytes((folder / "record.json").read_bytes()[:-9])


def add_a_field(folder: Path) -> None:
    described = json.loads((folder / "record.json").read_text())
    described["record"]["owner"] = "somebody"
    (folder / "record.json").write_text(json.dumps(described))


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (damage_predictions, "the hash of predictions.npz is not the recorded one"),
        (cut_record, "damaged"),
        (add_a_field, r"its record has the fields \['owner'\] too many or too few"),
    ],
)
def test_damaged_result_is_refused(
    tmp_path: Path, dataset: Dataset, result: Result, damage: Callable[[Path], None], why: str
) -> None:
    save_result(tmp_path / "result", result)
    damage(tmp_path / "result")
    with pytest.raises(DataError, match=why):
        load_result(tmp_path / "result", dataset)


def test_result_of_another_dataset_is_refused(tmp_path: Path, dataset: Dataset, result: Result) -> None:
    foreign = replace(result, record=replace(result.record, dataset_fingerprint="a" * 64))
    save_result(tmp_path / "result", foreign)
    with pytest.raises(DataError, match="is of the dataset aaaaaaaaaaaaaaaa, expected"):
        load_result(tmp_path / "result", dataset)


@pytest.mark.parametrize("wrong", ["short", "nan", "double"])
def test_predictions_that_do_not_fit_are_refused(tmp_path: Path, dataset: Dataset, result: Result, wrong: str) -> None:
    values = result.predicted["test"]["buy_mean"]
    changed = {"short": values[1:], "nan": np.full_like(values, np.nan), "double": values.astype(np.float64)}[wrong]
    predicted = {**result.predicted, "test": {**result.predicted["test"], "buy_mean": changed}}
    save_result(tmp_path / "result", replace(result, predicted=predicted))
    with pytest.raises(DataError, match=r"test/buy_mean must be \d+ finite numbers"):
        load_result(tmp_path / "result", dataset)
