"""Recorded real candles through every script as a user runs them: served, stored, prepared, learned from, traded."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from metabase.questions import bound_sql, load_dashboards
from perpcast.bundle import load_bundle
from perpcast.database import (
    Database,
    DatabaseAddress,
    create_database,
    open_engine,
    read_candles,
    read_equity,
    read_events,
    read_models,
    read_predictions,
    read_processed,
    read_question,
)
from perpcast.simulator.clock import RunningClock
from perpcast.simulator.recorded import RecordedMarket
from perpcast.simulator.server import serve_in_thread
from perpcast.timeframe import parse_time, to_ms

ROOT = Path(__file__).parents[1]
RECORDED = ROOT.parent / "shared" / "data" / "candles" / "bybit_linear_15m_2024"
SYMBOLS = ["BTCUSDT", "DOGEUSDT", "XRPUSDT"]
NOW = to_ms(parse_time("2024-12-20T00:00Z"))
DAYS, STEP_MS, REPLAY_BARS = 60, 900_000, 24

pytestmark = pytest.mark.skipif(
    not RECORDED.exists(), reason="recorded candles are kept in shared/data, which is absent"
)


@dataclass(frozen=True)
class World:
    """A folder with a configuration of its own, a database, and the local exchange behind it."""

    folder: Path
    database: Database
    password: str

    def run(self, script: str, *options: str) -> str:
        """What the script printed."""
        run = self._run(script, *options)
        assert run.returncode == 0, run.stdout + run.stderr
        return run.stdout

    def refused(self, script: str, *options: str) -> str:
        """Why the script ended with exit code 1."""
        run = self._run(script, *options)
        assert run.returncode == 1, run.stdout + run.stderr
        assert "Traceback" not in run.stderr
        return run.stderr

    def _run(self, script: str, *options: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / script), *options, "--config", str(self.folder / "config.yaml")]
        environment = {**os.environ, "PERPCAST_DB_PASSWORD": self.password}
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=300)


@pytest.fixture(scope="module")
def world(postgres: DatabaseAddress, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("end_to_end")
    (folder / "candles").mkdir()
    for symbol in SYMBOLS:
        shutil.copy(RECORDED / f"{symbol}.parquet", folder / "candles")
    address = replace(postgres, name="end_to_end")
    create_database(address)
    database = open_engine(address)
    market = RecordedMarket(folder / "candles")
    with serve_in_thread(market, RunningClock(NOW, 20_000, time.monotonic)) as exchange:
        values = yaml.safe_load((ROOT / "config.yaml").read_text())
        values["database"].update(port=address.port, name=address.name, user=address.user)
        values["exchange"].update(environment="local", rest_url=exchange.rest_url, ws_url=exchange.ws_url)
        values["data_download"].update(days=DAYS, symbols=SYMBOLS)
        values["model"].update(d_model=8, num_heads=2, batch_size=128, epochs=1, samples_per_epoch=2048)
        (folder / "config.yaml").write_text(yaml.safe_dump(values))
        yield World(folder, database, str(address.password))
    database.dispose()


def test_recorded_candles_pass_through_every_stage(world: World) -> None:
    world.run("init_database.py")
    world.run("download_data.py")
    first = NOW - DAYS * 96 * STEP_MS
    for symbol in SYMBOLS:
        frame = pd.read_parquet(RECORDED / f"{symbol}.parquet")
        times = pd.DatetimeIndex(frame["timestamp"]).as_unit("ms").asi8
        stored = read_candles(world.database, symbol)
        wanted = (times >= stored.open_time_ms[0]) & (times <= stored.open_time_ms[-1])
        # 60 days of 96 bars; the newest bar settles for five seconds before it is believed.
        assert abs(stored.open_time_ms[0] - first) <= STEP_MS
        assert len(stored) in (DAYS * 96 - 1, DAYS * 96)
        np.testing.assert_array_equal(stored.open_time_ms, times[wanted])
        for column in ("open", "high", "low", "close", "volume"):
            np.testing.assert_array_equal(getattr(stored, column), frame[column].to_numpy()[wanted])

    world.run("prepare_dataset.py")
    for symbol in SYMBOLS:
        processed = read_processed(world.database, symbol)
        # Without a label: the newest 101 bars, whose trades could still be open.
        assert np.isnan(processed.labels["buy"].expected_return).sum() == 101
        assert np.isfinite(processed.indicators).all(axis=1).mean() > 0.98

    world.run("train_universal_transformer.py", "--task", "regression")
    (model,) = read_models(world.database)
    folder = world.folder / model.bundle_path
    bundle = load_bundle(folder)
    assert bundle.task.symbols == tuple(SYMBOLS)
    assert (bundle.task.lookback, bundle.task.horizon) == (60, 100)
    rng = np.random.default_rng(0)
    shape = (5, bundle.task.lookback)
    answers = bundle.predict(
        rng.normal(size=(*shape, len(bundle.task.observed))),
        rng.normal(size=(*shape, len(bundle.task.known))),
        ["BTCUSDT"] * 5,
    )
    names = [f"{side}_{output}" for side in ("buy", "sell") for output in ("mean", "q50", "q75", "q90")]
    assert list(answers) == names
    assert all(np.isfinite(values).all() and values.shape == (5,) for values in answers.values())
    assert json.loads((folder / "task.json").read_text())["task"]["observed"] == list(bundle.task.observed)

    again = world.run("train_universal_transformer.py", "--task", "regression")
    assert len(read_models(world.database)) == 1, again

    told = world.run("evaluate_model.py")
    page = (world.folder / "reports" / model.model_id / "index.html").read_text()
    assert "This test span was looked at 2 times." in " ".join(told.split())  # once by the training
    assert "symbols chosen on 2026-06-16" in page
    assert all(name in told for name in ("ridge", "boosted trees", "buy and hold", "stops slide"))
    told = world.run("evaluate_model.py", "--folds", "combinatorial")
    assert "fold 15: train" in told
    assert "15 combinatorial folds, purge 101 bars" in " ".join(told.split())
    assert model.model_id in world.run("model_registry.py", "list")
    # A training of one epoch earns no more than the others.
    refused = world.refused("model_registry.py", "promote", model.model_id)
    assert "a daily net return above that of the best baseline" in refused
    assert "expected a lower 95 % bound above 0" in refused

    world.run("live_runner.py", "--mode", "replay", "--bars", str(REPLAY_BARS))
    run = f"replay-local-{model.model_id}-1"
    equity = read_equity(world.database, run)
    assert len(equity) == REPLAY_BARS
    assert [to_ms(b.time) - to_ms(a.time) for a, b in pairwise(equity)] == [STEP_MS] * (REPLAY_BARS - 1)
    # What was said live stands beside what was said of the test span.
    said, _ = read_predictions(world.database, model.model_id, "BTCUSDT", ("buy_mean",))
    assert {to_ms(bar.time) for bar in equity} <= set(said.tolist())
    assert read_events(world.database, run)[0].kind == "session"

    # Every question of the dashboards has an answer, most of them rows, from what these stages left.
    answered = {
        question.key: read_question(world.database, *bound_sql(question, {}))
        for dashboard in load_dashboards()
        for question in dashboard.questions
    }
    assert sum(len(answer) > 0 for answer in answered.values()) > len(answered) / 2
    assert answered["equity"]["equity"].iloc[-1] == equity[-1].equity
