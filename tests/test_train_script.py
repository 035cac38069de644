"""`train_universal_transformer.py` as a user runs it: wrong use, the model's name, and a training that was killed."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result
from sqlalchemy.engine import make_url

from perpcast.bundle import load_bundle
from perpcast.config import Settings, load_settings
from perpcast.database import Database, read_models, read_predictions, upsert_candles
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
    command = [sys.executable, str(ROOT / "train_universal_transformer.py"), "--config", str(config)]
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


def test_x(database: Database, config, password, settings):
    fill(database, settings)
    t = time.monotonic()
    p = start(config, password)
    seen = set()
    while p.poll() is None:
        rows = 0
        for s in SYMBOLS:
            rows += len(read_predictions(database, *([m for m in ["x"]]), s, ("buy_mean",))[0])
        with database.connect() as c:
            n = c.exec_driver_sql("select count(*) from model_predictions").scalar()
        now = {str(x.relative_to(config.parent)) for x in config.parent.rglob("*")} | ({f"pred{n}"} if n else set())
        if now - seen:
            print(f"{time.monotonic() - t:.2f}", sorted(now - seen)[:8])
        seen |= now
        time.sleep(0.02)
    print(time.monotonic() - t, *p.communicate())
    assert p.returncode == 0
    assert 0
