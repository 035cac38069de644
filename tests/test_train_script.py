"""`train_universal_transformer.py` as a user runs it: wrong use, the model's name, and a training that was killed."""

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import yaml
from click.testing import CliRunner, Result
from sqlalchemy.engine import make_url

from perpcast.bundle import FILES, SUMS, Bundle, load_bundle
from perpcast.config import Settings, load_settings
from perpcast.database import Database, read_models, upsert_candles, upsert_instruments
from perpcast.exit_policy import ExitPolicy
from perpcast.live.forecast import check_model
from perpcast.market import SIDES
from perpcast.prepare import prepare
from perpcast.simulator.instruments import instrument_of
from perpcast.training.dataset import Dataset, load_dataset
from perpcast.training.outcome import read_outcome
from tests.live_bundle import make_model
from tests.model_world import small_dataset
from tests.test_training_dataset import walk
from train_universal_transformer import is_complete, main, name_of

ROOT = Path(__file__).parents[1]
SYMBOLS = ("AAAUSDT", "BBBUSDT")
BARS = 20 * 96
SHAPE = {"sequence_length": 12, "prediction_horizon": 20, "d_model": 4, "num_heads": 2, "vsn_rank": 4}
# XLA takes longer to compile than all the rest of so small a training.
TRAINING = {"epochs": 2, "samples_per_epoch": 512, "batch_size": 64, "xla": False, "pictures_every": 2}
STEPS = 512 // 64  # of an epoch
WALKED = datetime(2025, 1, 1, tzinfo=UTC)


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


def start(config: Path, password: str, kill_point: str = "") -> subprocess.CompletedProcess[str]:
    """The script in a process of its own, which ends at the kill point."""
    command = [sys.executable, str(ROOT / "train_universal_transformer.py"), "--config", str(config)]
    environment = {**os.environ, "PERPCAST_DB_PASSWORD": password, "PERPCAST_KILL_POINT": kill_point}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)


def with_model(settings: Settings, **changes: object) -> Settings:
    return settings.model_copy(update={"model": settings.model.model_copy(update=changes)})


def with_fingerprint(dataset: Dataset, fingerprint: str) -> Dataset:
    return replace(dataset, manifest={**dataset.manifest, "fingerprint": fingerprint})


def fill(database: Database, settings: Settings) -> None:
    """Random walks, prepared by the exit policy of the settings."""
    for seed, symbol in enumerate(SYMBOLS, 1):
        upsert_candles(database, symbol, walk(BARS, seed))
    upsert_instruments(database, [instrument_of(symbol, walk(BARS, 1)) for symbol in SYMBOLS], WALKED)
    horizon = settings.model.prediction_horizon
    policies = {side: ExitPolicy.from_config(settings.risk_profile, settings.fees, side, horizon) for side in SIDES}
    prepare(database, SYMBOLS, settings.data_download.interval, policies)


# --- wrong use ------------------------------------------------------------------------------------------------------


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
    changes: list[dict[str, object]] = [{}, {"seed": 8}, {"d_model": 8}, {"vsn_rank": None}, {"epochs": 3}]
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


def test_training_ended_by_a_kill_and_run_again_is_one_whole_model(
    database: Database, config: Path, settings: Settings, password: str
) -> None:
    """Killed in the middle of its second epoch: the first one is not trained again."""
    fill(database, settings)
    killed = start(config, password, f"train.in_epoch:{STEPS + STEPS // 2}")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (folder,) = settings.path("datasets").glob("[0-9a-f]*")
    dataset = load_dataset(folder)
    model_id = name_of(dataset, settings)
    assert read_models(database) == []

    again = start(config, password)
    assert again.returncode == 0, again.stderr
    assert "epoch 2: loss" in again.stdout
    assert "epoch 1: loss" not in again.stdout
    (model,) = read_models(database)
    assert (model.model_id, model.dataset_fingerprint) == (model_id, dataset.fingerprint)
    assert len(model.metrics["history"]["loss"]) == 2
    assert f"trained_model/{model_id}, plots/{model_id}" in again.stdout
    bundle = load_bundle(settings.path(model.bundle_path))
    assert (bundle.sha256, bundle.task) == (model.bundle_sha256, dataset.task)
    assert [path.name for path in settings.path("trained_model").iterdir()] == [model_id]
    assert [path.name for path in settings.path("datasets").glob("[!.]*")] == [folder.name]
    assert {path.stem for path in settings.path("plots", model_id).iterdir()} == {
        "curves", "predicted_against_realised", "calibration", "per_symbol_error", "variable_importance",
        "attention_by_lag",
    }  # fmt: skip
    check_answers(database, settings, dataset, model_id)

    third = run(config, password)
    assert third.exit_code == 0, third.stderr
    assert f"model {model_id} is trained and exported already (--force trains it again)" in " ".join(
        third.stdout.split()
    )
    assert read_models(database) == [model]


def check_answers(database: Database, settings: Settings, dataset: Dataset, model_id: str) -> Bundle:
    """The exported bundle answers what is stored, and its threshold is the one that was judged."""
    bundle = load_bundle(settings.path("trained_model", model_id))
    outcome = read_outcome(database, dataset, model_id, settings.model.seed)
    assert outcome.choice.threshold == bundle.threshold
    rows = dataset.index["test"][::50]
    symbols = [dataset.task.symbols[code] for code in dataset.symbol[rows]]
    answers = bundle.predict(*dataset.gather(rows), symbols)
    assert set(answers) == set(dataset.task.outputs)
    for name, values in outcome.evaluation.predicted.items():
        # Within the tolerance of the export, some 1e-4 of a return of 1 %.
        np.testing.assert_allclose(answers[name], values[::50], atol=1e-5)
    return bundle


def test_classification_ends_in_calibrated_probabilities_that_can_be_traded(
    database: Database, config: Path, settings: Settings, password: str
) -> None:
    fill(database, settings)
    trained = run(config, password, "--task", "classification", "--promote")
    assert "probability of profit" in trained.stdout
    (model,) = read_models(database)
    # On random walks it earns nothing, so that it stays what it is.
    assert trained.exit_code == 1
    assert f"{model.model_id} is not promoted, it lacks" in trained.stderr
    assert model.state == "candidate"
    again = run(config, password, "--task", "classification")
    assert again.exit_code == 0, again.stderr
    assert "is trained and exported already" in " ".join(again.stdout.split())
    (folder,) = settings.path("datasets").glob("[0-9a-f]*")
    dataset = load_dataset(folder)
    bundle = check_answers(database, settings, dataset, model.model_id)
    assert bundle.task.outputs == ("buy_profit_probability", "buy_mean", "sell_profit_probability", "sell_mean")
    rows = dataset.index["v2"]
    symbols = [dataset.task.symbols[code] for code in dataset.symbol[rows]]
    answers = bundle.predict(*dataset.gather(rows), symbols)
    for side, name in enumerate(SIDES):
        won = (dataset.expected_return[rows, side] > 0).mean()
        # Platt's smoothed targets are off by at most one trade of so many.
        assert answers[f"{name}_profit_probability"].mean() == pytest.approx(won, abs=2 / len(rows) + 1e-4)
    horizon = settings.model.prediction_horizon
    policies = {side: ExitPolicy.from_config(settings.risk_profile, settings.fees, side, horizon) for side in SIDES}
    check_model(bundle, settings.data_download.interval, policies)
    card = (settings.path(model.bundle_path) / "card.md").read_text()
    assert "| probability of profit | model | base rate |" in card
    assert "--task classification" in card
