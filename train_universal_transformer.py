"""Trains one network for all symbols: python train_universal_transformer.py --task regression

Reads config.yaml (dataset, model, risk_profile, fees) and `processed_market_data`; builds the dataset folder
`datasets/<id>/`. Writes TensorBoard's events to logs/training_<model id>/, pictures to plots/<model id>/, the model
bundle to trained_model/<model id>/, and the rows of `model_metadata` and `model_predictions`.
"""

import hashlib
import json
import os
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from perpcast.command_line import ROOT, console, open_database, progress_bar, stage
from perpcast.config import Settings
from perpcast.errors import DataError, MissingInputError, SetupError

if TYPE_CHECKING:
    from perpcast.database import Database
    from perpcast.training.dataset import Dataset
    from perpcast.training.outcome import Outcome

GOLDEN_WINDOWS = 3


@click.command()
@click.option("--task", type=click.Choice(["regression", "classification"]), default="regression", show_default=True)
@click.option("--force", is_flag=True, help="Train again even if this very model exists.")
@stage
def main(settings: Settings, task: str, force: bool) -> None:
    """Train, test and export the Temporal Fusion Transformer of the configuration.

    The same data and settings give the same model id; a training that was killed starts again under it.

    \b
    Examples:
      python train_universal_transformer.py --task regression
      python train_universal_transformer.py --task regression --force
      tensorboard --logdir logs
    """
    if task == "classification":
        raise SetupError("--task classification comes later: expected --task regression")
    begun = time.monotonic()
    with open_database(settings) as database:
        dataset = make_dataset(settings, database)
        model_id = name_of(dataset, settings)
        if not force and is_complete(settings, database, model_id):
            console.print(f"model {model_id} is trained and exported already (--force trains it again)")
            return
        outcome = train_and_export(settings, database, dataset, model_id)
    show_scores(outcome)
    console.print(f"trained_model/{model_id}, plots/{model_id}, {time.monotonic() - begun:.0f} s")
    console.print("next: python live_runner.py --mode paper      curves: tensorboard --logdir logs")


def make_dataset(settings: Settings, database: "Database") -> "Dataset":
    """The dataset folder of what is stored now, built where it does not exist yet."""
    from perpcast.exit_policy import ExitPolicy
    from perpcast.market import SIDES
    from perpcast.training.dataset import build_dataset, regression_task

    model, wanted, cut = settings.model, settings.data_download, settings.dataset
    horizon = model.prediction_horizon
    policies = {side: ExitPolicy.from_config(settings.risk_profile, settings.fees, side, horizon) for side in SIDES}
    task = regression_task(wanted.interval, model.sequence_length, horizon, wanted.symbols, policies)
    fractions = (cut.train_fraction, cut.stop_fraction, cut.threshold_fraction, cut.test_fraction)
    with progress_bar("dataset") as on_progress:
        dataset = build_dataset(
            database,
            task,
            settings.path("datasets"),
            fractions,
            universe_as_of=wanted.universe_as_of,
            max_gap_bars=cut.max_gap_bars,
            on_progress=on_progress,
        )
    windows = ", ".join(f"{len(rows):,} {split}" for split, rows in dataset.index.items())
    console.print(f"dataset {dataset.dataset_id}: windows {windows}; purge {dataset.split.purge} bars")
    return dataset


def name_of(dataset: "Dataset", settings: Settings) -> str:
    """The model's id: a function of the data and of everything that shapes the network."""
    from perpcast.models import VERSIONS

    architecture = settings.model.architecture
    described = json.dumps([dataset.fingerprint, settings.model.model_dump(mode="json"), VERSIONS[architecture]])
    return f"{architecture}-{hashlib.sha256(described.encode()).hexdigest()[:12]}"


def is_complete(settings: Settings, database: "Database", model_id: str) -> bool:
    """True where the row and the bundle that it names are both there, whole."""
    from perpcast.bundle import load_bundle
    from perpcast.database import read_models

    for model in read_models(database):
        if model.model_id == model_id:
            try:
                return load_bundle(settings.path(model.bundle_path)).sha256 == model.bundle_sha256
            except (MissingInputError, DataError) as error:
                console.print(f"model {model_id} is trained again: {error}")
    return False


def train_and_export(settings: Settings, database: "Database", dataset: "Dataset", model_id: str) -> "Outcome":
    """The training itself. The row in `model_metadata` comes last: what it names is whole."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from perpcast.database import ModelRecord, upsert_model
    from perpcast.training.loop import train
    from perpcast.training.outcome import JUDGED, judge, store_predictions

    run_dir = settings.path("logs", f"training_{model_id}")
    with progress_bar("train") as on_step:
        trained = train(dataset, settings.model, run_dir, show_epoch, on_step)
    outputs = {split: trained.predict(dataset.index[split]) for split in JUDGED}
    predicted = {
        split: {name: values[:, column] for column, name in enumerate(dataset.task.outputs)}
        for split, values in outputs.items()
    }
    outcome = judge(dataset, predicted, settings.model.seed)
    store_predictions(database, dataset, model_id, predicted)
    draw(settings.path("plots", model_id), outcome, trained.history)
    provenance = Provenance(model_id, code_revision(), datetime.now(UTC))
    sha256 = export(settings, dataset, trained, outcome, provenance)
    scores = outcome.evaluation.to_json()
    model_scores = scores["scores"].pop("model")
    upsert_model(
        database,
        ModelRecord(
            model_id=model_id,
            created_at=provenance.created_at,
            task=dataset.task.to_json(),
            architecture=settings.model.architecture,
            parameters={**settings.model.model_dump(mode="json"), "weights": int(trained.network.count_params())},
            dataset_id=dataset.dataset_id,
            dataset_fingerprint=dataset.fingerprint,
            metrics={**scores, "scores": model_scores, "history": dict(trained.history)},
            baselines=scores["scores"],
            bundle_path=f"trained_model/{model_id}",
            bundle_sha256=sha256,
            code_revision=provenance.code_revision,
        ),
    )
    return outcome


@dataclass(frozen=True)
class Provenance:
    """Where a model comes from."""

    model_id: str
    code_revision: str | None
    created_at: datetime


def export(settings: Settings, dataset: "Dataset", trained: Any, outcome: "Outcome", provenance: Provenance) -> str:
    """Writes the bundle; returns the SHA-256 of its list of hashes."""
    from perpcast.bundle import BundleParts, save_bundle
    from perpcast.models.export import BATCHES, export_onnx

    # Spread over the span and the symbols: rows are ordered by symbol.
    test = dataset.index["test"]
    rows = test[np.linspace(0, len(test) - 1, max(BATCHES)).round().astype(np.int64)]
    observed, known = dataset.gather(rows)
    symbols = [dataset.task.symbols[code] for code in dataset.symbol[rows]]
    scaled = dataset.scaler.apply(np.concatenate([observed, known], axis=-1))
    inputs = {
        "observed": scaled[..., : observed.shape[-1]],
        "known": scaled[..., observed.shape[-1] :],
        "symbol": dataset.symbol[rows].astype(np.int32),
    }
    model, difference = export_onnx(trained.network, inputs)
    card = {
        "model_id": provenance.model_id,
        "created_at": provenance.created_at.isoformat(timespec="seconds"),
        "code_revision": provenance.code_revision,
        "dataset": {"id": dataset.dataset_id, "fingerprint": dataset.fingerprint, "split": dataset.split.to_json()},
        "universe_as_of": settings.data_download.universe_as_of,
        "leak_certificate": dataset.manifest["certificate"],
        "settings": settings.model.model_dump(mode="json"),
        "evaluation": outcome.evaluation.to_json(),
        "threshold": outcome.choice.to_json(),
        "onnx_difference": difference,
        "reproduce": "python train_universal_transformer.py --task regression",
    }
    few = slice(None, None, len(rows) // GOLDEN_WINDOWS)
    parts = BundleParts(
        model=model,
        task=dataset.task,
        scaler=dataset.scaler,
        target_scaler=trained.target_scaler,
        threshold=outcome.choice.threshold,
        card=card,
        card_text=card_text(card, dataset, outcome),
        golden=(observed[few], known[few], symbols[few]),
    )
    return save_bundle(settings.path("trained_model", provenance.model_id), parts).sha256


def card_text(card: Mapping[str, Any], dataset: "Dataset", outcome: "Outcome") -> str:
    """The card for a reader, in Markdown."""
    rows = "\n".join(f"| {' | '.join(row)} |" for row in score_rows(outcome))
    names = [card_.name for card_ in outcome.evaluation.cards]
    return (
        f"# {card['model_id']}\n\n{outcome.evaluation.verdict.sentence}\n\n"
        f"Trained {card['created_at']} on dataset {dataset.dataset_id} of {len(dataset.task.symbols)} symbols "
        f"(survivor-biased: chosen on {card['universe_as_of']}). "
        f"Leak certificate: {card['leak_certificate'] or 'none yet'}.\n\n"
        f"| test span | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}\n{rows}\n\n"
        f"Threshold {outcome.choice.threshold:+.4%}, chosen on V2. Reproduce: `{card['reproduce']}`\n\n"
        "    " + "\n    ".join(dataset.split.instants()) + "\n"
    )


def draw(folder: Path, outcome: "Outcome", history: Mapping[str, list[float]]) -> None:
    """The pictures of a training."""
    from perpcast.evaluation import plots

    plots.save_figure(plots.training_curve(history), folder / "training_curve.png")
    plots.save_figure(plots.predicted_against_realised(outcome.evaluation), folder / "predicted_against_realised.png")


def show_epoch(epoch: int, losses: Mapping[str, float]) -> None:
    """A line for each epoch."""
    console.print(f"epoch {epoch}: loss {losses['loss']:.4f}, V1 {losses['val_loss']:.4f}")


def show_scores(outcome: "Outcome") -> None:
    """The scores beside the baselines', and what to believe."""
    from rich.table import Column, Table

    names = [card.name for card in outcome.evaluation.cards]
    table = Table("test span", *(Column(name, justify="right") for name in names))
    for row in score_rows(outcome):
        table.add_row(*row)
    console.print(table)
    console.print(outcome.evaluation.verdict.sentence)


def score_rows(outcome: "Outcome") -> list[list[str]]:
    """A row for each metric: its name, the model, the baselines."""
    from perpcast.evaluation.scores import METRICS

    rows = []
    for metric, (title, percent) in METRICS.items():
        values = [card.scores[metric].value for card in outcome.evaluation.cards]
        text = "{:,.0f}" if metric == "trades" else "{:+.2%}" if percent else "{:+.3f}"
        rows.append([title, *(text.format(value) if np.isfinite(value) else "-" for value in values)])
    return rows


def code_revision() -> str | None:
    """The clone's git revision, None outside a clone."""
    try:
        run = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


if __name__ == "__main__":
    main()
