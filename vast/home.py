"""What happens at home: the dataset and the model's name before a training elsewhere, its result afterwards."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from perpcast.bundle import load_bundle
from perpcast.config import Settings
from perpcast.database import Database
from perpcast.errors import DataError
from perpcast.evaluation.threshold import choose_threshold
from perpcast.market import SIDES
from perpcast.training.dataset import Dataset
from perpcast.training.result import Result, load_result
from train_universal_transformer import is_complete, judge, make_dataset, name_of, result_folder
from train_universal_transformer import register as store

# What a training over the tunnel reads.
TUNNEL_TABLES = ("schema_migrations", "raw_market_data", "processed_market_data")


@dataclass(frozen=True)
class Prepared:
    """What is to be trained; `is_complete` where it was, and is registered."""

    dataset: Dataset
    model_id: str
    is_complete: bool


def prepare(settings: Settings, database: Database, task: str) -> Prepared:
    """Builds the dataset folder where it does not exist yet. Raises MissingInputError where there is nothing stored."""
    dataset = make_dataset(settings, database, task)
    model_id = name_of(dataset, settings)
    return Prepared(dataset, model_id, is_complete(settings, database, model_id))


def check_fetched(settings: Settings, model_id: str, dataset: Dataset) -> Result:
    """Bundle and result as they came from a machine that is not ours: whole, of this model, of this dataset.

    Raises DataError, MissingInputError where something is not there.
    """
    result = load_result(result_folder(settings, model_id), dataset)
    bundle_path = f"trained_model/{model_id}"
    named = (result.record.model_id, result.record.bundle_path, result.record.state)
    if named != (model_id, bundle_path, "candidate"):
        raise DataError(f"the result fetched for {model_id} names {', '.join(named)}: fetch it again")
    bundle = load_bundle(settings.path(bundle_path))
    if bundle.sha256 != result.record.bundle_sha256:
        raise DataError(
            f"{bundle_path} has the hash {bundle.sha256[:16]}, its result says {result.record.bundle_sha256[:16]}: "
            "fetch both again"
        )
    if bundle.task != dataset.task or bundle.scaler != dataset.scaler:
        raise DataError(f"{bundle_path} is of another task or scaler than the dataset {dataset.dataset_id}")
    v2: dict[str, np.ndarray] = {side: result.predicted["v2"][f"{side}_mean"] for side in SIDES}
    threshold = choose_threshold(v2, dataset.windows("v2")).threshold
    if not math.isclose(bundle.threshold, threshold, rel_tol=1e-9, abs_tol=1e-12):
        raise DataError(
            f"{bundle_path} trades above {bundle.threshold:+.4%}, its predictions on V2 choose {threshold:+.4%}: "
            "do not use it; train again"
        )
    return result


def register(
    settings: Settings, database: Database, prepared: Prepared, result: Result, rental: Mapping[str, Any] | None
) -> None:
    """Stores a checked result, with what its machine cost, then scores and trades it here and writes its report."""
    if rental is not None:
        record = replace(result.record, metrics={**result.record.metrics, "rental": dict(rental)})
        result = replace(result, record=record)
    store(database, prepared.dataset, result)
    judge(settings, database, prepared.model_id)
