"""Which model trades: python model_registry.py list, promote, rollback or retire

Reads config.yaml (database), `model_metadata` and, to promote, the model's dataset, predictions and bundle. Writes the
states of the models and an event of the run "registry" for each step. Exit code 1 where a promotion is refused.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from perpcast.command_line import console, open_database, stage
from perpcast.config import Settings
from perpcast.database import (
    Database,
    ModelRecord,
    count_looks,
    read_model,
    read_models,
    read_previous_champion,
    retire_model,
    rollback,
)
from perpcast.errors import DataError
from perpcast.timeframe import format_time

if TYPE_CHECKING:
    from perpcast.training.judgement import Judgement

TASK_KINDS = ("regression", "classification")

EXAMPLES = """
\b
Examples:
  python model_registry.py list                       every model: state, scores, looks at its test span
  python model_registry.py promote tft-0123456789ab   make it champion, where the evidence suffices
  python model_registry.py rollback                   the champion before this one again
  python model_registry.py retire tft-0123456789ab    never trade it, never go back to it
  python model_registry.py list --config config.yaml --config mine.yaml

Each command takes --config, and tells more with --help.
"""


@click.group(epilog=EXAMPLES)
def main() -> None:
    """Show the models, and decide which one trades.

    A model begins as a candidate. Each kind of task has at most one champion, which live_runner.py trades; the champion
    before it is retired. Each step leaves an event.
    """


@main.command("list")
@stage
def list_command(settings: Settings) -> None:
    """Show every model, newest first.

    \b
    Example:
      python model_registry.py list
    """
    with open_database(settings) as database:
        show_models(database)


@main.command("promote")
@click.argument("model_id")
@click.option(
    "--force", is_flag=True, help="Allow a test span that promoted a model before; no other condition is lifted."
)
@stage
def promote_command(settings: Settings, model_id: str, force: bool) -> None:
    """Make MODEL_ID the champion of its kind of task, and retire the one before.

    It needs a leak certificate that passes, and a daily net return clearly above that of the best baseline and of the
    champion: the lower 95 % bound of the paired difference above 0, on windows after the training of both. Trying
    counts as a look at the test span. Exit code 1 where it is refused.

    \b
    Examples:
      python model_registry.py promote tft-0123456789ab
      python model_registry.py promote tft-0123456789ab --force
    """
    with open_database(settings) as database:
        promote_model(settings, database, model_id, force=force)


@main.command("rollback")
@click.option("--task", type=click.Choice(TASK_KINDS), default="regression", show_default=True)
@stage
def rollback_command(settings: Settings, task: str) -> None:
    """Make the champion before this one champion again, and retire this one.

    Given again it goes back one more. A model that was retired by hand is left out.

    \b
    Examples:
      python model_registry.py rollback
      python model_registry.py rollback --task classification
    """
    with open_database(settings) as database:
        check_bundle(settings, read_previous_champion(database, task))
        console.print(f"{rollback(database, task, datetime.now(UTC))} is the champion of {task} again")
    console.print("next: start live_runner.py again, a running session keeps its model")


@main.command("retire")
@click.argument("model_id")
@stage
def retire_command(settings: Settings, model_id: str) -> None:
    """Take MODEL_ID out of use: no session chooses it, and no rollback goes back to it.

    \b
    Example:
      python model_registry.py retire tft-0123456789ab
    """
    with open_database(settings) as database:
        was_champion = read_model(database, model_id).state == "champion"
        retire_model(database, model_id, datetime.now(UTC))
    console.print(f"{model_id} is retired")
    if was_champion:
        console.print("its place is empty; next: python model_registry.py rollback, or promote another model")


def show_models(database: Database) -> None:
    """A table of models for each kind of task."""
    models = read_models(database)
    for kind in TASK_KINDS:
        if chosen := [model for model in models if model.task_kind == kind]:
            show_table(database, kind, chosen)
    if not models:
        console.print("no model trained yet; next: python train_universal_transformer.py")
    elif not any(model.state == "champion" for model in models):
        console.print("no champion: live_runner.py takes the newest; next: python model_registry.py promote MODEL_ID")


def show_table(database: Database, title: str, models: Sequence[ModelRecord]) -> None:
    """One line for each model; its scores are those of its test span."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Column, Table

    words = (Column(name, no_wrap=True) for name in ("model", "state", "trained", "test from"))
    numbers = (Column(name, justify="right", no_wrap=True) for name in ("rank IC", "per trade", "looks"))
    table = Table(
        *words, *numbers, title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False
    )
    for model in models:
        scores, first_ms = model.metrics.get("scores", {}), model.metrics.get("first_ms")
        looks = None if first_ms is None else count_looks(database, first_ms, model.metrics["last_ms"])
        table.add_row(
            model.model_id,
            model.state,
            f"{model.created_at:%Y-%m-%d}",
            "-" if first_ms is None else format_time(first_ms)[:10],
            _score(scores, "rank_ic", "{:+.3f}"),
            _score(scores, "trade_return", "{:+.2%}"),
            "-" if looks is None else f"{looks:,}",
        )
    console.print(table)
    for model in models:
        if rental := model.metrics.get("rental"):
            console.print(
                f"{model.model_id}: {rental['hours']:.1f} h on a rented {rental['gpu']}, {rental['cost']:.2f} USD"
            )


def promote_model(
    settings: Settings,
    database: Database,
    model_id: str,
    judgement: "Judgement | None" = None,
    *,
    force: bool = False,
) -> None:
    """Makes a model champion where the evidence suffices; `judgement` is the model's, where it is at hand."""
    from perpcast.training.judgement import gather_evidence
    from perpcast.training.promotion import promote

    model = read_model(database, model_id)
    if model.state == "champion":
        console.print(f"{model_id} is the champion of {model.task_kind} already")
        return
    check_bundle(settings, model)
    evidence = gather_evidence(settings, database, model_id, judgement)
    before = promote(database, model_id, evidence, force=force, now=datetime.now(UTC))
    instead = "" if before is None else f" in place of {before}"
    console.print(f"{model_id} is the champion of {model.task_kind}{instead}")
    console.print("next: python live_runner.py --mode paper      back: python model_registry.py rollback")


def check_bundle(settings: Settings, model: ModelRecord) -> None:
    """Raises MissingInputError or DataError where the bundle that a session would load is not the one of the row."""
    from perpcast.bundle import load_bundle

    found = load_bundle(settings.path(model.bundle_path)).sha256
    if found != model.bundle_sha256:
        raise DataError(
            f"{model.bundle_path}: expected the bundle {model.bundle_sha256[:12]} that model_metadata names, found "
            f"{found[:12]}; put back the folder of {model.model_id}, or retire it: "
            f"python model_registry.py retire {model.model_id}"
        )


def _score(scores: Mapping[str, Any], name: str, form: str) -> str:
    value = scores.get(name, {}).get("value")
    return "-" if value is None else form.format(value)


if __name__ == "__main__":
    main()
