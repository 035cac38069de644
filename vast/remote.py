"""Trains on this machine for another one: python -m vast.remote --task regression --dataset ID

Reads the dataset folder datasets/<id>/, or with --database the tables behind a tunnel, as a role that may only read.
Writes what a training writes (logs/, plots/, trained_model/) and no database: the machine at home takes it over.
"""

import click

from perpcast.command_line import console, database_address, stage
from perpcast.config import Settings
from perpcast.errors import DataError, PerpcastError, SetupError
from perpcast.training.dataset import Dataset, load_dataset
from train_universal_transformer import make_dataset, make_model, name_of, result_folder


@click.command()
@click.option("--task", type=click.Choice(["regression", "classification"]), default="regression", show_default=True)
@click.option("--dataset", "dataset_id", metavar="ID", help="The dataset folder that was sent here.")
@click.option("--database", "from_database", is_flag=True, help="Build the dataset from the configured database.")
@click.option("--model", "expected", metavar="ID", help="The model's id at home; any other is refused.")
@click.option("--revision", metavar="HASH", help="The code's revision at home, for the card.")
@stage
def main(
    settings: Settings,
    task: str,
    dataset_id: str | None,
    from_database: bool,
    expected: str | None,
    revision: str | None,
) -> None:
    """Train, score and export without writing a database; goes on where a killed training stopped.

    \b
    Examples:
      python -m vast.remote --dataset 0123456789abcdef
      python -m vast.remote --task classification --database
    """
    if (dataset_id is None) == (not from_database):
        raise click.UsageError("name either --dataset ID or --database")
    dataset = sent_dataset(settings, dataset_id, task) if dataset_id else dataset_of_database(settings, task)
    model_id = name_of(dataset, settings)
    if expected not in (None, model_id):
        raise DataError(
            f"this machine would train {model_id}, expected {expected}: another configuration was sent, or this "
            "processor computes the inputs' last digits otherwise; send the dataset instead (--data rsync)"
        )
    if is_made(settings, dataset, model_id):
        console.print(f"model {model_id} is made already")
        return
    make_model(settings, dataset, model_id, resume=True, revision=revision)
    console.print(f"model {model_id} is made: it can be fetched")


def sent_dataset(settings: Settings, dataset_id: str, task: str) -> Dataset:
    """The dataset folder, which must be of that kind of task. Raises SetupError."""
    dataset = load_dataset(settings.path("datasets", dataset_id))
    found = dataset.task.targets[0].kind
    if found != task:
        raise SetupError(f"the dataset {dataset_id} is for {found}, not for {task}: name --task {found}")
    return dataset


def dataset_of_database(settings: Settings, task: str) -> Dataset:
    """The dataset of what the database holds. Never starts a server: at the end of a tunnel lies somebody else's."""
    from perpcast.database import check_schema, open_engine, plain_errors

    address = database_address(settings)
    with plain_errors(address):
        database = open_engine(address)
        try:
            check_schema(database)
            return make_dataset(settings, database, task, record=False)
        finally:
            database.dispose()


def is_made(settings: Settings, dataset: Dataset, model_id: str) -> bool:
    """True where bundle and result of that very model are there, whole."""
    from perpcast.bundle import load_bundle
    from perpcast.training.result import load_result

    try:
        record = load_result(result_folder(settings, model_id), dataset).record
        return load_bundle(settings.path(record.bundle_path)).sha256 == record.bundle_sha256
    except PerpcastError:
        return False


if __name__ == "__main__":
    main()
