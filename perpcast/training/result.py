"""What a finished training leaves beside its bundle, in a folder: its row of `model_metadata` and its predictions.

The database takes it over from there, on this machine or after a journey from the one that trained. `predictions.npz`
holds the outputs as `split/name`; `record.json`, written last, the row and the hash of the other file.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np

from perpcast.database import ModelRecord
from perpcast.errors import DataError, MissingInputError
from perpcast.training.dataset import Dataset
from perpcast.training.outcome import JUDGED, Predictions

_RECORD, _PREDICTIONS = "record.json", "predictions.npz"


@dataclass(frozen=True)
class Result:
    """A model's row, and what it predicts for V2 and test: outputs by split and name, float32 [windows]."""

    record: ModelRecord
    predicted: Mapping[str, Predictions]


def save_result(folder: Path, result: Result) -> None:
    """Writes the folder; a killed process leaves none that could be loaded."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _RECORD).unlink(missing_ok=True)
    arrays = {f"{split}/{name}": out for split, outputs in result.predicted.items() for name, out in outputs.items()}
    with (folder / _PREDICTIONS).open("wb") as stream:
        np.savez(stream, **arrays)  # type: ignore[arg-type]
    described = {
        "record": {**asdict(result.record), "created_at": result.record.created_at.isoformat()},
        "predictions_sha256": _sha256(folder / _PREDICTIONS),
    }
    part = folder / f"{_RECORD}.part"
    part.write_text(json.dumps(described), encoding="utf-8")
    os.replace(part, folder / _RECORD)


def load_result(folder: Path, dataset: Dataset) -> Result:
    """The folder's content, checked against the dataset that it must be of.

    Raises MissingInputError where there is none, DataError where it is damaged or of another dataset.
    """
    try:
        described = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        record = _record(described["record"])
        if _sha256(folder / _PREDICTIONS) != described["predictions_sha256"]:
            raise ValueError(f"the hash of {_PREDICTIONS} is not the recorded one")
        with np.load(folder / _PREDICTIONS, allow_pickle=False) as arrays:
            predicted = {split: {name: arrays[f"{split}/{name}"] for name in dataset.task.outputs} for split in JUDGED}
    except FileNotFoundError as error:
        raise MissingInputError(f"no result of a training in {folder}: {error.filename} is not there") from None
    except (OSError, LookupError, TypeError, ValueError) as error:
        raise DataError(f"the result of a training in {folder} is damaged ({error}): train again") from None
    if record.dataset_fingerprint != dataset.fingerprint:
        raise DataError(
            f"the result in {folder} is of the dataset {record.dataset_fingerprint[:16]}, expected "
            f"{dataset.fingerprint[:16]}: train again"
        )
    for split, outputs in predicted.items():
        for name, values in outputs.items():
            expected = (len(dataset.index[split]),)
            if values.shape != expected or values.dtype != np.float32 or not np.isfinite(values).all():
                raise DataError(
                    f"the result in {folder}: {split}/{name} must be {expected[0]} finite numbers, received "
                    f"{values.dtype} {list(values.shape)}: train again"
                )
    return Result(record, predicted)


def _record(described: Mapping[str, Any]) -> ModelRecord:
    expected, found = {field.name for field in fields(ModelRecord)}, set(described)
    if expected != found:
        raise ValueError(f"its record has the fields {sorted(expected ^ found)} too many or too few")
    return ModelRecord(**{**described, "created_at": datetime.fromisoformat(described["created_at"])})


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
