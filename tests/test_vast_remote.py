"""Training on one machine for another, without ssh between them: `vast.remote` there, `vast.home` here."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import yaml
from sqlalchemy.engine import make_url

from perpcast.config import Settings, load_settings
from perpcast.database import (
    Database,
    DatabaseAddress,
    create_database,
    grant_reader,
    migrate,
    open_engine,
    read_models,
    revoke_reader,
)
from perpcast.errors import DataError, MissingInputError
from perpcast.training.result import load_result, save_result
from tests.test_train_script import ROOT, SHAPE, SYMBOLS, TRAINING, fill
from train_universal_transformer import result_folder
from vast.home import TUNNEL_TABLES, Prepared, check_fetched, prepare, register

ROLE, PASSWORD = "perpcast_vast_test", "secret of a day"
RENTAL = {"gpu": "RTX 4090", "price_per_hour": 0.4, "hours": 0.5, "cost": 0.2}


@dataclass(frozen=True)
class World:
    """A home with a database, and a machine that has been sent code, configuration and dataset."""

    home: Settings
    there: Path
    database: Database
    prepared: Prepared

    def remote(
        self, *options: str, config: str = "config.yaml", **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """`vast.remote` there; it is never told a database's password but by `environment`."""
        command = [sys.executable, "-m", "vast.remote", *options, "--config", str(self.there / config)]
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PERPCAST_")}
        return subprocess.run(
            command, cwd=ROOT, env={**clean, **environment}, capture_output=True, text=True, check=False, timeout=300
        )

    def fetch(self) -> None:
        for folder in ("logs", "plots", "trained_model"):
            shutil.copytree(self.there / folder, self.home.path(folder), dirs_exist_ok=True)


@pytest.fixture(scope="module")
def world(postgres: DatabaseAddress, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    home, there = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("there")
    address = replace(postgres, name="vast_remote")
    create_database(address)
    database = open_engine(address)
    migrate(database)
    values = yaml.safe_load((ROOT / "config.yaml").read_text())
    values["database"].update(port=address.port, name=address.name, user=address.user)
    values["data_download"].update(symbols=list(SYMBOLS))
    values["model"].update(**SHAPE, **{**TRAINING, "epochs": 1})
    (home / "config.yaml").write_text(yaml.safe_dump(values))
    settings = load_settings([home / "config.yaml"])
    fill(database, settings)
    prepared = prepare(settings, database, "regression")
    values["database"].update(port=1, user="nobody")  # the machine there reaches no database
    (there / "config.yaml").write_text(yaml.safe_dump(values))
    shutil.copytree(home / "datasets", there / "datasets")
    yield World(settings, there, database, prepared)
    database.dispose()


@pytest.fixture(scope="module")
def trained(world: World) -> World:
    """The training itself, and its files back home."""
    run = world.remote(
        "--dataset", world.prepared.dataset.dataset_id, "--model", world.prepared.model_id, "--revision", "abc123"
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"model {world.prepared.model_id} is made: it can be fetched" in run.stdout
    world.fetch()
    return world


def test_model_made_elsewhere_is_registered_scored_and_reported_at_home(
    trained: World, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, prepared = trained.home, trained.prepared
    assert not prepared.is_complete
    fetched = check_fetched(settings, prepared.model_id, prepared.dataset)
    register(settings, trained.database, prepared, fetched, RENTAL)
    (model,) = read_models(trained.database)
    assert model.model_id == prepared.model_id
    assert model.metrics["rental"] == RENTAL
    assert model.code_revision == "abc123"
    assert settings.path("reports", model.model_id, "index.html").exists()
    assert "found" in capsys.readouterr().out  # the verdict
    assert prepare(settings, trained.database, "regression").is_complete


def test_second_training_there_answers_at_once(trained: World) -> None:
    before = (result_there(trained) / "record.json").stat().st_mtime_ns
    run = trained.remote("--dataset", trained.prepared.dataset.dataset_id)
    assert run.returncode == 0, run.stderr
    assert f"model {trained.prepared.model_id} is made already" in run.stdout
    assert (result_there(trained) / "record.json").stat().st_mtime_ns == before


def result_there(world: World) -> Path:
    return world.there / "logs" / f"training_{world.prepared.model_id}" / "result"


# --- what comes back from a machine that is not ours ----------------------------------------------------------------


def damage_bundle(settings: Settings, world: World) -> None:
    path = settings.path("trained_model", world.prepared.model_id, "step.onnx")
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def lose_bundle(settings: Settings, world: World) -> None:
    shutil.rmtree(settings.path("trained_model", world.prepared.model_id))


def name_another_folder(settings: Settings, world: World) -> None:
    folder = result_folder(settings, world.prepared.model_id)
    result = load_result(folder, world.prepared.dataset)
    save_result(folder, replace(result, record=replace(result.record, bundle_path="../elsewhere")))


def call_itself_champion(settings: Settings, world: World) -> None:
    folder = result_folder(settings, world.prepared.model_id)
    result = load_result(folder, world.prepared.dataset)
    save_result(folder, replace(result, record=replace(result.record, state="champion")))


def name_another_bundle(settings: Settings, world: World) -> None:
    folder = result_folder(settings, world.prepared.model_id)
    result = load_result(folder, world.prepared.dataset)
    save_result(folder, replace(result, record=replace(result.record, bundle_sha256="0" * 64)))


def trade_above_another_threshold(settings: Settings, world: World) -> None:
    """With every hash put right again."""
    path = settings.path("trained_model", world.prepared.model_id)
    described = json.loads((path / "task.json").read_text())
    before = hashlib.sha256((path / "task.json").read_bytes()).hexdigest()
    (path / "task.json").write_text(json.dumps({**described, "threshold": described["threshold"] + 0.001}))
    after = hashlib.sha256((path / "task.json").read_bytes()).hexdigest()
    sums = (path / "SHA256SUMS").read_text()
    assert before in sums
    (path / "SHA256SUMS").write_text(sums.replace(before, after))
    folder = result_folder(settings, world.prepared.model_id)
    result = load_result(folder, world.prepared.dataset)
    sha256 = hashlib.sha256((path / "SHA256SUMS").read_bytes()).hexdigest()
    save_result(folder, replace(result, record=replace(result.record, bundle_sha256=sha256)))


@pytest.mark.parametrize(
    ("tamper", "why"),
    [
        (damage_bundle, "step.onnx"),
        (lose_bundle, "no model bundle"),
        (name_another_folder, "names .*elsewhere"),
        (call_itself_champion, "names .*champion"),
        (name_another_bundle, "has the hash"),
        (trade_above_another_threshold, "its predictions on V2 choose"),
    ],
)
def test_what_was_tampered_with_is_refused(
    trained: World, tmp_path: Path, tamper: Callable[[Settings, World], None], why: str
) -> None:
    shutil.copy(trained.home.path("config.yaml"), tmp_path)
    for folder in ("logs", "trained_model"):
        shutil.copytree(trained.there / folder, tmp_path / folder)
    settings = load_settings([tmp_path / "config.yaml"])
    assert check_fetched(settings, trained.prepared.model_id, trained.prepared.dataset).record.bundle_sha256
    tamper(settings, trained)
    with pytest.raises((DataError, MissingInputError), match=why):
        check_fetched(settings, trained.prepared.model_id, trained.prepared.dataset)


# --- over the tunnel ------------------------------------------------------------------------------------------------


def test_dataset_over_the_tunnel_is_the_one_at_home(world: World, tmp_path: Path) -> None:
    """Read by a role that may do nothing else; stopped before the training by a model id that cannot be."""
    url = make_url(world.database.url)
    overlay = {"database": {"port": url.port, "user": ROLE}}
    (world.there / "tunnel.yaml").write_text(yaml.safe_dump(overlay))
    passwords = tmp_path / "pgpass"
    passwords.write_text(f"127.0.0.1:{url.port}:{url.database}:{ROLE}:{PASSWORD}\n")
    passwords.chmod(0o600)
    grant_reader(world.database, ROLE, PASSWORD, TUNNEL_TABLES, until=datetime.now(UTC) + timedelta(hours=1))
    (elsewhere := tmp_path / "there").mkdir()
    shutil.copy(world.there / "config.yaml", elsewhere)
    shutil.copy(world.there / "tunnel.yaml", elsewhere)
    tunnelled = replace(world, there=elsewhere)
    try:
        options = ("--database", "--model", "tft-other", "--config", str(elsewhere / "config.yaml"))
        run = tunnelled.remote(*options, config="tunnel.yaml", PGPASSFILE=str(passwords))
    finally:
        revoke_reader(world.database, ROLE)
    assert run.returncode == 1, run.stdout + run.stderr
    assert f"this machine would train {world.prepared.model_id}, expected tft-other" in run.stderr
    (built,) = (elsewhere / "datasets").glob("[0-9a-f]*")
    assert json.loads((built / "manifest.json").read_text())["fingerprint"] == world.prepared.dataset.fingerprint
    assert not (elsewhere / "logs").exists()


@pytest.mark.parametrize(
    ("options", "code", "why"),
    [
        ((), 2, "name either --dataset ID or --database"),
        (("--database", "--dataset", "0"), 2, "name either --dataset ID or --database"),
        (("--dataset", "0123456789abcdef"), 2, "manifest.json is not there"),
        (("--database",), 2, "Connection refused"),
    ],
)
def test_wrong_use_is_refused(world: World, options: tuple[str, ...], code: int, why: str) -> None:
    run = world.remote(*options)
    assert (run.returncode, "Traceback" in run.stderr) == (code, False), run.stderr
    assert why in run.stderr


def test_dataset_of_another_task_is_refused(world: World) -> None:
    run = world.remote("--task", "classification", "--dataset", world.prepared.dataset.dataset_id)
    assert run.returncode == 2, run.stderr
    assert "is for regression, not for classification: name --task regression" in run.stderr
