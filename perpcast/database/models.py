"""Datasets, models and their predictions: what was trained on what, and what it said."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any

import numpy as np
from sqlalchemy import Engine, delete, select
from sqlalchemy.dialects.postgresql import insert

from perpcast.database.binary_copy import Block, copy_in, copy_out
from perpcast.database.journal import append_event, lock_events
from perpcast.database.schema import model_metadata, model_predictions, training_sequences
from perpcast.errors import MissingInputError
from perpcast.timeframe import from_ms

REGISTRY = "registry"  # the run of the events about models


@dataclass(frozen=True)
class TrainingSequence:
    """A contiguous range of valid windows of one symbol in one split, named by their last bars."""

    symbol: str
    split: str
    first_window_ms: int
    last_window_ms: int
    windows: int


@dataclass(frozen=True)
class ModelRecord:
    """A row of `model_metadata`. Dictionaries become JSON; a NaN in them becomes null."""

    model_id: str
    created_at: datetime
    task: Mapping[str, Any]
    architecture: str
    parameters: Mapping[str, Any]
    dataset_id: str
    dataset_fingerprint: str
    metrics: Mapping[str, Any]
    baselines: Mapping[str, Any]
    bundle_path: str
    bundle_sha256: str
    code_revision: str | None = None
    state: str = "candidate"  # the registry alone changes it

    @property
    def task_kind(self) -> str:
        """What the model predicts, `regression` or `classification`: each kind has its own champion."""
        return self.task["targets"][0]["kind"]


_FIELDS = tuple(field.name for field in fields(ModelRecord))


def replace_training_sequences(
    engine: Engine, dataset_id: str, sequences: Sequence[TrainingSequence], fingerprint: str, task: Mapping[str, Any]
) -> None:
    """Makes `sequences` all that is recorded of one dataset."""
    rows = [
        {
            "dataset_id": dataset_id,
            "symbol": sequence.symbol,
            "split": sequence.split,
            "first_window": from_ms(sequence.first_window_ms),
            "last_window": from_ms(sequence.last_window_ms),
            "windows": sequence.windows,
            "fingerprint": fingerprint,
            "task": dict(task),
        }
        for sequence in sequences
    ]
    with engine.begin() as connection:
        connection.execute(delete(training_sequences).where(training_sequences.c.dataset_id == dataset_id))
        if rows:
            connection.execute(training_sequences.insert(), rows)


def upsert_model(engine: Engine, model: ModelRecord) -> None:
    """Stores a model under its id; a second training of the same id leaves one row.

    A new model is a candidate. So is one whose bundle became another one: what it was promoted for is gone.
    """
    row = {name: dict(value) if isinstance(value, Mapping) else value for name, value in vars(model).items()}
    row["state"] = "candidate"
    table = model_metadata
    with engine.begin() as connection:
        lock_events(connection, REGISTRY)
        before = connection.execute(
            select(table.c.state, table.c.task_kind, table.c.bundle_sha256).where(table.c.model_id == model.model_id)
        ).one_or_none()
        if before is not None and before.bundle_sha256 == model.bundle_sha256:
            row["state"] = before.state
        elif before is not None and before.state != "candidate":
            detail = {"model_id": model.model_id, "task_kind": before.task_kind, "reason": "trained again"}
            append_event(connection, REGISTRY, model.created_at, "model_retired", detail)
        new = {name: value for name, value in row.items() if name != "model_id"}
        connection.execute(insert(table).values(row).on_conflict_do_update(index_elements=["model_id"], set_=new))


def read_models(engine: Engine, state: str | None = None) -> list[ModelRecord]:
    """The models, newest first; of one state or of all."""
    table = model_metadata
    query = select(*(table.c[name] for name in _FIELDS)).order_by(table.c.created_at.desc(), table.c.model_id)
    if state is not None:
        query = query.where(table.c.state == state)
    with engine.connect() as connection:
        return [ModelRecord(**row) for row in connection.execute(query).mappings()]


def read_model(engine: Engine, model_id: str) -> ModelRecord:
    """The model of that id. Raises MissingInputError where there is none."""
    for model in read_models(engine):
        if model.model_id == model_id:
            return model
    raise MissingInputError(f"no model {model_id} in model_metadata; python model_registry.py list shows them all")


def replace_predictions(
    engine: Engine, model_id: str, symbol: str, open_time_ms: np.ndarray, outputs: Mapping[str, np.ndarray]
) -> None:
    """Makes these all predictions of one model for one symbol.

    `outputs` by name (`buy_mean`, …), each [n]; NaN is stored as NULL.
    """
    names = tuple(outputs)
    unknown = set(names) - set(model_predictions.columns.keys())
    assert not unknown, f"not columns of model_predictions: {sorted(unknown)}"
    values = np.column_stack([outputs[name] for name in names])
    table = model_predictions
    with engine.begin() as connection:
        connection.execute(delete(table).where(table.c.model_id == model_id, table.c.symbol == symbol))
        copy_in(
            connection,
            table.name,
            [("model_id", model_id), ("symbol", symbol)],
            (Block(("open_time",), "time"), Block(names, "real")),
            (open_time_ms, values),
            (None, np.isnan(values)),
        )


def read_predictions(
    engine: Engine, model_id: str, symbol: str, names: Sequence[str]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """What one model said of one symbol: open times int64 [n], rising, and each named output, float32 [n]."""
    blocks = (Block(("open_time",), "time"), Block(tuple(names), "real"))
    with engine.connect() as connection:
        keys = {"model_id": model_id, "symbol": symbol}
        open_time_ms, values = copy_out(connection, model_predictions, keys, blocks)
    values = values.reshape(len(open_time_ms), len(names)).astype(np.float32)
    return open_time_ms, {name: values[:, column] for column, name in enumerate(names)}
