"""`train_universal_transformer.py` as a user runs it: wrong use, the model's name, and a training that was killed."""

import hashlib
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result
from sqlalchemy.engine import make_url

from perpcast.bundle import FILES, SUMS, load_bundle
from perpcast.config import Settings, load_settings
from perpcast.database import Database, read_models, upsert_candles
from perpcast.exit_policy import ExitPolicy
from perpcast.market import SIDES
from perpcast.prepare import prepare
from perpcast.training.dataset import Dataset, load_dataset
from perpcast.training.outcome import read_outcome
from tests.live_bundle import make_model
from tests.model_world import small_dataset
from tests.test_training_dataset import walk
from train_universal_transformer import is_complete, main, name_of

ROOT = Path(__file__).parents[1]
SYMBOLS = ("AAAUSDT", "BBBUSDT")
BARS = 20 * 96
SHAPE = {"sequence_length": 12, "prediction_horizon": 20, "d_model": 4, "num_heads": 2, "variable_width": 4}
TRAINING = {"epochs": 1, "samples_per_epoch": 512, "batch_size": 64}

# The script itself; only XLA stays off, whose compilation takes longer than all the rest of so small a training.
WITHOUT_XLA = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
import keras
compile = keras.Model.compile
keras.Model.compile = lambda model, **options: compile(model, **{{**options, "jit_compile": False}})
runpy.run_path({str(ROOT / "train_universal_transformer.py")!r}, run_name="__main__")
"""


@pytest.fixture
def password(database: Database) -> str:
    return make_url(database.url).password or ""


@pytest.fixture
def config(database: Database, tmp_path: Path) -> Path:
    """A configuration in a folder of its own, so that what a training writes lies there."""
    url = make_url(database.url)
    values = yaml.safe_load((ROOT / "config.yaml").read_text())
    values["database"].update(port=url.port, name=url.database, user=url.username)
    values["data_download"].update(symbols=list(SYMBOLS))
    values["model"].update(**SHAPE, **TRAINING)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture
def settings(config: Path) -> Settings:
    return load_settings([config])


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return small_dataset(tmp_path_factory.mktemp("dataset"), bars=400)


def run(config: Path, password: str, *options: str) -> Result:
    return CliRunner().invoke(main, ["--config", str(config), *options], env={"PERPCAST_DB_PASSWORD": password})


def start(config: Path, password: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WITHOUT_XLA, "--config", str(config)]
    environment = {**os.environ, "PERPCAST_DB_PASSWORD": password}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def with_model(settings: Settings, **changes: object) -> Settings:
    return settings.model_copy(update={"model": settings.model.model_copy(update=changes)})


def with_fingerprint(dataset: Dataset, fingerprint: str) -> Dataset:
    return replace(dataset, manifest={**dataset.manifest, "fingerprint": fingerprint})


def fill(database: Database, settings: Settings) -> None:
    """Random walks, prepared by the exit policy of the settings."""
    for seed, symbol in enumerate(SYMBOLS, 1):
        upsert_candles(database, symbol, walk(BARS, seed))
    horizon = settings.model.prediction_horizon
    policies = {side: ExitPolicy.from_config(settings.risk_profile, settings.fees, side, horizon) for side in SIDES}
    prepare(database, SYMBOLS, settings.data_download.interval, policies)


def wait_for(process: subprocess.Popen[str], reached: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not reached():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


# --- wrong use ------------------------------------------------------------------------------------------------------


def test_classification_is_not_there_yet(config: Path, password: str) -> None:
    refused = run(config, password, "--task", "classification")
    assert refused.exit_code == 2
    assert refused.stderr == "error: --task classification comes later: expected --task regression\n"


def test_unknown_task_is_wrong_use(config: Path, password: str) -> None:
    refused = run(config, password, "--task", "ranking")
    assert refused.exit_code == 2
    assert "'ranking' is not one of 'regression', 'classification'" in refused.stderr


def test_without_prepared_candles_the_next_step_is_named(config: Path, password: str, database: Database) -> None:
    for _ in range(2):
        refused = run(config, password)
        assert refused.exit_code == 2
        (complaint,) = refused.stderr.splitlines()
        assert "no symbol has a window with a label: run download_data.py, then prepare_dataset.py" in complaint
        upsert_candles(database, SYMBOLS[0], walk(300, 1))  # stored, not prepared
    assert read_models(database) == []
    assert [path.name for path in (config.parent / "datasets").iterdir()] == [".lock"]
    assert not (config.parent / "logs").exists()


# --- the model's name -----------------------------------------------------------------------------------------------


def test_same_data_and_settings_have_the_same_name(dataset: Dataset, settings: Settings) -> None:
    name = name_of(dataset, settings)
    assert re.fullmatch(r"tft-[0-9a-f]{12}", name)
    assert name_of(with_fingerprint(dataset, dataset.fingerprint), with_model(settings)) == name
    elsewhere = settings.model_copy(update={"files": (Path("/elsewhere/config.yaml"),)})
    assert name_of(dataset, elsewhere) == name


def test_other_data_or_settings_or_code_have_another_name(
    dataset: Dataset, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes: list[dict[str, object]] = [{}, {"seed": 8}, {"d_model": 8}, {"variable_width": None}, {"epochs": 2}]
    names = [name_of(dataset, with_model(settings, **change)) for change in changes]
    names.append(name_of(with_fingerprint(dataset, "e" * 64), settings))
    monkeypatch.setattr("perpcast.models.VERSIONS", {"tft": "tft/0"})
    names.append(name_of(dataset, settings))
    assert len(set(names)) == len(names)


# --- trained and exported already? ----------------------------------------------------------------------------------


def test_is_complete_needs_row_and_whole_bundle(
    database: Database, settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not is_complete(settings, database, "tft-1")
    make_model(database, tmp_path, SYMBOLS, {}, "tft-1")
    make_model(database, tmp_path, SYMBOLS, {}, "tft-2")
    assert is_complete(settings, database, "tft-1")
    assert not is_complete(settings, database, "tft-3")
    assert capsys.readouterr().out == ""

    network = tmp_path / "tft-1" / "model.onnx"
    content = bytearray(network.read_bytes())
    content[len(content) // 2] ^= 1
    network.write_bytes(content)
    assert not is_complete(settings, database, "tft-1")
    assert "model tft-1 is trained again: " in capsys.readouterr().out
    assert is_complete(settings, database, "tft-2")

    shutil.rmtree(tmp_path / "tft-1")
    assert not is_complete(settings, database, "tft-1")
    assert "no model bundle in" in capsys.readouterr().out
    # Whole, but not the bundle of the row: a training that was killed between the two.
    shutil.copytree(tmp_path / "tft-2", tmp_path / "tft-1")
    card = tmp_path / "tft-1" / "card.md"
    card.write_text("another card")
    hashes = [f"{hashlib.sha256((tmp_path / 'tft-1' / name).read_bytes()).hexdigest()}  {name}\n" for name in FILES]
    (tmp_path / "tft-1" / SUMS).write_text("".join(hashes))
    load_bundle(tmp_path / "tft-1")
    assert not is_complete(settings, database, "tft-1")


# --- killed and run again -------------------------------------------------------------------------------------------


def test_training_killed_and_run_again_is_one_whole_model(
    database: Database, config: Path, settings: Settings, password: str, request: pytest.FixtureRequest
) -> None:
    fill(database, settings)

    def stored() -> bool:
        with database.connect() as connection:
            return bool(connection.exec_driver_sql("SELECT count(*) FROM model_predictions").scalar())

    moments: list[Callable[[], bool]] = [lambda: any(settings.path("logs").rglob("events.out.tfevents.*"))]
    if request.config.getoption("--soak"):
        moments += [stored, settings.path("trained_model").exists]
    killed = start(config, password)
    wait_for(killed, random.choice(moments))
    time.sleep(random.random() / 4)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    (folder,) = settings.path("datasets").glob("[0-9a-f]*")
    dataset = load_dataset(folder)
    model_id = name_of(dataset, settings)
    # The row comes last: where there is one, the model is whole.
    assert bool(read_models(database)) == is_complete(settings, database, model_id)

    again = start(config, password)
    printed, complaint = again.communicate(timeout=300)
    assert again.returncode == 0, complaint
    (model,) = read_models(database)
    assert (model.model_id, model.dataset_fingerprint) == (model_id, dataset.fingerprint)
    assert f"trained_model/{model_id}, plots/{model_id}" in printed
    bundle = load_bundle(settings.path(model.bundle_path))
    assert (bundle.sha256, bundle.task) == (model.bundle_sha256, dataset.task)
    assert [path.name for path in settings.path("trained_model").iterdir()] == [model_id]
    assert [path.name for path in settings.path("datasets").glob("[!.]*")] == [folder.name]

    outcome = read_outcome(database, dataset, model_id, settings.model.seed)
    assert outcome.choice.threshold == bundle.threshold == model.metrics["threshold"]
    rows = dataset.index["test"][::50]
    symbols = [dataset.task.symbols[code] for code in dataset.symbol[rows]]
    answers = bundle.predict(*dataset.gather(rows), symbols)
    for name, values in outcome.evaluation.predicted.items():
        # The bundle and the stored predictions: within the tolerance of the export, some 1e-4 of a return of 1 %.
        np.testing.assert_allclose(answers[name], values[::50], atol=1e-5)

    third = run(config, password)
    assert third.exit_code == 0, third.stderr
    assert f"model {model_id} is trained and exported already (--force trains it again)" in " ".join(
        third.stdout.split()
    )
    assert read_models(database) == [model]
