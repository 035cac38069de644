"""Trains one network for all symbols: python train_universal_transformer.py --task regression

Reads config.yaml (dataset, model, risk_profile, fees) and `processed_market_data`; builds the dataset folder
`datasets/<id>/`, with its leak certificate. Writes checkpoints, history, TensorBoard's events and its result to
logs/training_<model id>/, pictures to plots/<model id>/, the model bundle to trained_model/<model id>/, the report to
reports/<model id>/, rows of `model_metadata` and `model_predictions`, and an event of the look at the test span.
"""

import hashlib
import json
import os
import subprocess
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np

from perpcast.command_line import ROOT, console, open_database, progress_bar, refresh_dashboards, show_table, stage
from perpcast.config import Settings
from perpcast.errors import DataError, MissingInputError

if TYPE_CHECKING:
    from perpcast.database import Database
    from perpcast.evaluation.certificate import Certificate
    from perpcast.models.export import Exported
    from perpcast.training.card import Provenance
    from perpcast.training.dataset import Dataset
    from perpcast.training.judgement import Judgement
    from perpcast.training.loop import Trained
    from perpcast.training.outcome import Outcome
    from perpcast.training.result import Result

GOLDEN_WINDOWS = 3
# Windows of V1 that the pictures of a training are drawn from, and those of them whose insides are looked at.
PICTURED_WINDOWS, EXPLAINED_WINDOWS = 4096, 512


@click.command()
@click.option("--task", type=click.Choice(["regression", "classification"]), default="regression", show_default=True)
@click.option(
    "--resume/--restart",
    default=True,
    show_default=True,
    help="Go on from the last checkpoint of this very model, to the same result; or begin at its first epoch.",
)
@click.option("--force", is_flag=True, help="Train again, from the first epoch, even if this very model exists.")
@click.option("--promote", is_flag=True, help="Then make it champion, where the evidence suffices.")
@stage
def main(settings: Settings, task: str, resume: bool, force: bool, promote: bool) -> None:
    """Train, test and export the Temporal Fusion Transformer of the configuration.

    The same data and settings give the same model id; a training that was killed goes on under it. At the end stand
    its scores on the untouched test span, beside those of its baselines.

    \b
    Examples:
      python train_universal_transformer.py --task regression       expected returns, with quantiles
      python train_universal_transformer.py --task classification   calibrated probabilities of profit
      python train_universal_transformer.py --force
      python train_universal_transformer.py --promote               then champion, if it clearly earns more
      python monitor_training.py                                    watch it in another terminal
      tensorboard --logdir logs
    """
    begun = time.monotonic()
    with open_database(settings) as database:
        dataset = make_dataset(settings, database, task)
        model_id = name_of(dataset, settings)
        judgement = None
        if not force and is_complete(settings, database, model_id):
            console.print(f"model {model_id} is trained and exported already (--force trains it again)")
        else:
            going_on = resume and not force
            result, outcome = make_model(settings, dataset, model_id, resume=going_on, revision=code_revision())
            register(database, dataset, result)
            judgement = judge(settings, database, model_id, outcome)
            console.print(f"trained_model/{model_id}, plots/{model_id}, {time.monotonic() - begun:.0f} s")
        if promote:
            from model_registry import promote_model

            promote_model(settings, database, model_id, judgement)
    console.print("next: python live_runner.py --mode paper      curves: tensorboard --logdir logs")


def make_dataset(settings: Settings, database: "Database", kind: str, *, record: bool = True) -> "Dataset":
    """The dataset folder of what is stored now for a kind of task, built where it does not exist yet.

    `record` is for a database that can be written.
    """
    from perpcast.exit_policy import ExitPolicy
    from perpcast.market import SIDES
    from perpcast.training.dataset import build_dataset, classification_task, regression_task

    model, wanted, cut = settings.model, settings.data_download, settings.dataset
    horizon = model.prediction_horizon
    policies = {side: ExitPolicy.from_config(settings.risk_profile, settings.fees, side, horizon) for side in SIDES}
    make_task = {"regression": regression_task, "classification": classification_task}[kind]
    task = make_task(wanted.interval, model.sequence_length, horizon, wanted.symbols, policies)
    fractions = (cut.train_fraction, cut.stop_fraction, cut.threshold_fraction, cut.test_fraction)
    with progress_bar("dataset") as on_progress:
        dataset = build_dataset(
            database,
            task,
            settings.path("datasets"),
            fractions,
            universe_as_of=wanted.universe_as_of,
            max_gap_bars=cut.max_gap_bars,
            record=record,
            on_progress=on_progress,
        )
    console.print(f"dataset {dataset.dataset_id}, leak certificate passed; purge {dataset.split.purge} bars")
    for line, rows in zip(dataset.split.instants(), dataset.index.values(), strict=True):
        console.print(f"  {line}, {len(rows):,} windows")
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


def make_model(
    settings: Settings, dataset: "Dataset", model_id: str, *, resume: bool, revision: str | None
) -> tuple["Result", "Outcome"]:
    """Trains, scores, certifies and exports; needs no database. The result comes last: what it names is whole."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    from perpcast.database import ModelRecord
    from perpcast.training.card import Provenance
    from perpcast.training.outcome import JUDGED
    from perpcast.training.outcome import judge as judge_predictions
    from perpcast.training.result import Result, save_result

    trained = train(settings, dataset, model_id, resume=resume)
    predicted = {split: trained.predict(dataset.index[split]) for split in JUDGED}
    with console.status("fitting the baselines, scoring all on the same windows"):
        outcome = judge_predictions(dataset, predicted, settings.model.seed)
    certificate = certify(settings, dataset, trained, outcome, predicted["v2"])
    reproduce = f"python train_universal_transformer.py --task {dataset.task.targets[0].kind}"
    provenance = Provenance(model_id, revision, datetime.now(UTC), reproduce)
    with console.status("exporting: ONNX, compared with Keras, timed"):
        exported = export(dataset, trained, outcome)
        sha256 = save(settings, dataset, trained, outcome, exported, certificate, provenance)
    scores = outcome.evaluation.to_json()
    model_scores = scores["scores"].pop("model")
    record = ModelRecord(
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
    )
    result = Result(record, predicted)
    save_result(result_folder(settings, model_id), result)
    return result, outcome


def result_folder(settings: Settings, model_id: str) -> Path:
    """Where a training leaves its row and its predictions."""
    return settings.path("logs", f"training_{model_id}", "result")


def register(database: "Database", dataset: "Dataset", result: "Result") -> None:
    """Stores predictions, then the row of `model_metadata`: what that names is whole."""
    from perpcast.database import upsert_model
    from perpcast.training.outcome import store_predictions

    store_predictions(database, dataset, result.record.model_id, result.predicted)
    upsert_model(database, result.record)
    refresh_dashboards(database, "model_predictions")


def train(settings: Settings, dataset: "Dataset", model_id: str, *, resume: bool) -> "Trained":
    """The trained network, its probabilities calibrated on V2; draws the pictures on the way."""
    from perpcast.training.loop import train

    run_dir = settings.path("logs", f"training_{model_id}")
    with progress_bar("train") as on_step:
        trained = train(
            dataset,
            settings.model,
            run_dir,
            resume=resume,
            on_epoch=show_epoch,
            on_step=on_step,
            on_look=lambda epoch, seen: draw(settings.path("plots", model_id), dataset, epoch, seen),
        )
    return trained.calibrated(dataset.index["v2"])


def certify(
    settings: Settings,
    dataset: "Dataset",
    trained: "Trained",
    outcome: "Outcome",
    predicted: Mapping[str, np.ndarray],
) -> "Certificate":
    """The model's leak certificate, from its predictions on V2; refused where it does not pass."""
    from perpcast.training.certify import certify_model
    from perpcast.training.windows import strided

    certificate = certify_model(
        dataset,
        trained.reading,
        outcome.choice.threshold,
        predicted,
        outcome.evaluation.model.scores["rank_ic"].value,
        strided(dataset, dataset.index["train"], settings.model.window_stride),
    )
    if failures := certificate.failures():
        raise DataError(f"the model is not certified ({'; '.join(failures)}): train it again with --force")
    return certificate


def export(dataset: "Dataset", trained: "Trained", outcome: "Outcome") -> "Exported":
    """The network as ONNX, which must decide as Keras does."""
    from perpcast.models.export import BATCHES, export_onnx
    from perpcast.training.dataset import spread

    rows = spread(dataset.index["test"], max(BATCHES))
    windows = dataset.scaler.apply(np.concatenate(dataset.gather(rows), axis=-1))
    split = len(dataset.task.observed)
    inputs = {
        "observed": windows[..., :split],
        "known": windows[..., split:],
        "static_categories": dataset.symbol[rows, None].astype(np.int32),
    }

    def decide(raw: np.ndarray) -> np.ndarray:
        """The side that would be traded: 0 or 1, -1 where neither is above the threshold."""
        expected = trained.reading.read(raw)
        sides = np.stack([expected[f"{target.name}_mean"] for target in dataset.task.targets])
        return np.where(sides.max(axis=0) > outcome.choice.threshold, sides.argmax(axis=0), -1)

    return export_onnx(trained.network, inputs, decide, symbols=len(dataset.task.symbols))


def save(
    settings: Settings,
    dataset: "Dataset",
    trained: "Trained",
    outcome: "Outcome",
    exported: "Exported",
    certificate: "Certificate",
    provenance: "Provenance",
) -> str:
    """Writes the bundle; returns the SHA-256 of its list of hashes."""
    from perpcast.bundle import BundleParts, save_bundle
    from perpcast.training.card import card_text, describe
    from perpcast.training.dataset import spread

    rows = spread(dataset.index["test"], GOLDEN_WINDOWS)
    card = describe(provenance, dataset, settings.model, outcome, exported, certificate)
    parts = BundleParts(
        model=exported.model,
        step=exported.step,
        readout=exported.readout,
        task=dataset.task,
        scaler=dataset.scaler,
        reading=trained.reading,
        threshold=outcome.choice.threshold,
        card=card,
        card_text=card_text(card, dataset, outcome, exported),
        golden=(*dataset.gather(rows), [dataset.task.symbols[code] for code in dataset.symbol[rows]]),
    )
    return save_bundle(settings.path("trained_model", provenance.model_id), parts).sha256


def draw(folder: Path, dataset: "Dataset", epoch: int, trained: "Trained") -> None:
    """The pictures of a network in training, from a sample of V1."""
    from perpcast.training.dataset import spread
    from perpcast.training.pictures import Look, draw_pictures

    stop = np.arange(len(dataset.index["v1"]))
    places = np.unique(spread(stop, PICTURED_WINDOWS))
    rows = dataset.index["v1"][places]
    look = Look(
        epoch=epoch,
        history=trained.history,
        windows=dataset.windows("v1")[places],
        predicted=trained.predict(rows),
        explanation=trained.explain(np.unique(spread(rows, EXPLAINED_WINDOWS))),
        kind=dataset.task.targets[0].kind,
    )
    draw_pictures(folder, look)


def show_epoch(epoch: int, values: Mapping[str, float]) -> None:
    """A line for each epoch."""
    console.print(
        f"epoch {epoch}: loss {values['loss']:.4f}, V1 {values['val_loss']:.4f}, "
        f"{values['samples_per_second']:,.0f} windows/s"
    )


def judge(settings: Settings, database: "Database", model_id: str, outcome: "Outcome | None" = None) -> "Judgement":
    """Trades the new model on the test span, shows its scores and accounts, and writes the report.

    `outcome` are the scores where they are at hand.
    """
    from perpcast.training.judgement import judge_model
    from perpcast.training.run_report import tables, verdict_of, write_page

    with console.status("trading the test span"):
        judgement = judge_model(
            settings, database, model_id, purpose="training", now=datetime.now(UTC), outcome=outcome
        )
        page = write_page(settings, database, judgement)
    for titles, rows in tables(judgement):
        show_table(titles, rows)
    console.print(verdict_of(judgement))
    console.print(f"report: {page}")
    return judgement


def code_revision() -> str | None:
    """The clone's git revision, None outside a clone."""
    try:
        run = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


if __name__ == "__main__":
    main()
