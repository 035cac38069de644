"""Scores and trades a trained model on its untouched test span: python evaluate_model.py

Reads config.yaml, `model_metadata`, the stored predictions, the dataset folder, candles, funding and instruments.
Writes reports/<model id>/index.html with its pictures and numbers, and an event: every look at a test span is counted.
"""

from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click
import numpy as np

from perpcast.command_line import console, open_database, progress_bar, show_table, stage
from perpcast.config import Settings
from perpcast.database import Database, ModelRecord, read_models
from perpcast.errors import MissingInputError

if TYPE_CHECKING:
    from perpcast.training.fold_scores import FoldKind

# Of a fold, with the titles of their columns.
SCORES = {"rank_ic": "rank IC", "saved": "error saved"}


@click.command()
@click.option("--model", "model_id", metavar="ID", help="The model.  [default: the newest]")
@click.option(
    "--folds",
    type=click.Choice(["expanding", "sliding", "combinatorial"]),
    help="Instead of a model: the cheap baselines over purged folds of the whole history before its test span.",
)
@stage
def main(settings: Settings, model_id: str | None, folds: "FoldKind | None") -> None:
    """Score a model beside its baselines, trade it, and write the report.

    Nothing is trained: the predictions are those that were stored with the model. The test span is looked at, and the
    look is counted: the more often, the less its numbers say.

    \b
    Examples:
      python evaluate_model.py                          the newest model
      python evaluate_model.py --model tft-0123456789ab
      python evaluate_model.py --folds expanding        baselines through time, purged, no network
      python model_registry.py list                     every model
    """
    from perpcast.training.judgement import judge_model
    from perpcast.training.run_report import tables, verdict_of, write_page

    with open_database(settings) as database:
        if folds is not None:
            show_folds(settings, database, folds)
            return
        model_id = model_id or newest(database).model_id
        with console.status("baselines, accounts, intervals"):
            judgement = judge_model(settings, database, model_id, purpose="report", now=datetime.now(UTC))
            page = write_page(settings, database, judgement)
    for titles, rows in tables(judgement):
        show_table(titles, rows)
    console.print(verdict_of(judgement))
    console.print(f"report: {page}")
    console.print(f"next: python model_registry.py promote {model_id}")


def newest(database: Database) -> ModelRecord:
    """The newest model. Raises MissingInputError where none is trained yet."""
    models = read_models(database)
    if not models:
        raise MissingInputError("no model trained yet; run: python train_universal_transformer.py")
    return models[0]


def show_folds(settings: Settings, database: Database, kind: "FoldKind") -> None:
    """Instants and scores of each fold, then the spread over them; of the newest model's dataset, before its test."""
    from perpcast.training.dataset import load_dataset
    from perpcast.training.fold_scores import make_folds, score_folds

    dataset = load_dataset(settings.path("datasets", newest(database).dataset_id))
    folds = make_folds(dataset, kind)
    for number, fold in enumerate(folds, 1):
        console.print(f"fold {number}: " + "; ".join(fold.instants()))
    with progress_bar("folds") as on_progress:
        found = score_folds(dataset, folds, on_progress)
    names = list(found[0].rank_ic)[1:]  # the constant ranks nothing, and is what error is saved on
    columns = [(f"{name} {title}", score, name) for score, title in SCORES.items() for name in names]
    values = np.array([[getattr(each, score)[name] for _, score, name in columns] for each in found])
    starts = [(str(number), f"{each.windows:,}") for number, each in enumerate(found, 1)]
    lines = zip(
        [*starts, ("mean", ""), ("spread", "")], [*values, values.mean(axis=0), values.std(axis=0)], strict=True
    )
    show_table(
        ["fold", "windows", *(title for title, *_ in columns)],
        [[*start, *(f"{value:+.4f}" if np.isfinite(value) else "-" for value in line)] for start, line in lines],
    )
    console.print(f"{len(found)} {kind} folds, purge {dataset.split.purge} bars; the test span was not looked at")


if __name__ == "__main__":
    main()
