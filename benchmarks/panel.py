"""The recorded panel (51 symbols, a year of 15-minute candles) as a dataset folder, and trainings on it.

    python -m benchmarks.panel FOLDER build                  the dataset folder, from candles to windows
    python -m benchmarks.panel FOLDER train [key=value ...]  one training; a line of JSON with its V1 loss and costs

Keys are those of `model:` in config.yaml. FOLDER keeps the dataset between the commands.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from benchmarks.download import peak_mb, postgres
from perpcast.config import ModelSettings, Settings, load_settings
from perpcast.database import Database, migrate, open_engine, upsert_candles
from perpcast.exit_policy import ExitPolicy
from perpcast.market import SIDES, CandleSeries
from perpcast.prepare import prepare
from perpcast.training.dataset import Dataset, build_dataset, load_dataset, regression_task

ROOT = Path(__file__).parents[1]
CANDLES = ROOT.parent / "shared" / "data" / "candles" / "binance_usdm_15m_panel51_1y"
SETTINGS = load_settings([ROOT / "config.yaml"])


def build(folder: Path) -> Dataset:
    """The panel through the stages of the pipeline into `folder`."""
    with postgres() as address:
        engine = open_engine(address)
        migrate(engine)
        dataset = _build(engine, SETTINGS, folder)
        engine.dispose()
    return dataset


def _build(database: Database, settings: Settings, folder: Path) -> Dataset:
    import pandas as pd

    symbols = sorted(path.stem for path in CANDLES.glob("*.parquet"))
    model, cut = settings.model, settings.dataset
    policies = {
        side: ExitPolicy.from_config(settings.risk_profile, settings.fees, side, model.prediction_horizon)
        for side in SIDES
    }
    for symbol in symbols:
        frame = pd.read_parquet(CANDLES / f"{symbol}.parquet")
        times = frame["timestamp"].astype("datetime64[ms, UTC]").astype("int64").to_numpy()
        first, high, low, close = (frame[name].to_numpy() for name in ("open", "high", "low", "close"))
        volume, turnover = frame["volume"].to_numpy(), (frame["volume"] * frame["close"]).to_numpy()
        upsert_candles(database, symbol, CandleSeries(times, first, high, low, close, volume, turnover))
    prepare(database, symbols, "15", policies)
    task = regression_task("15", model.sequence_length, model.prediction_horizon, symbols, policies)
    fractions = (cut.train_fraction, cut.stop_fraction, cut.threshold_fraction, cut.test_fraction)
    return build_dataset(database, task, folder, fractions, universe_as_of="2025-10-23")


def train_once(dataset: Dataset, settings: ModelSettings, run_dir: Path) -> dict[str, Any]:
    """One training: losses by epoch, seconds, memory."""
    from perpcast.training.loop import train

    begun = time.perf_counter()
    trained = train(dataset, settings, run_dir)
    return {
        "val_loss": [round(value, 5) for value in trained.history["val_loss"]],
        "loss": [round(value, 5) for value in trained.history["loss"]],
        "samples_per_second": [round(value) for value in trained.history["samples_per_second"]],
        "seconds": round(time.perf_counter() - begun, 1),
        "peak_mb": round(peak_mb()),
        "weights": int(trained.network.count_params()),
    }


def _main(folder: Path, command: str, *changes: str) -> None:
    if command == "build":
        dataset = build(folder)
        print(dataset.path, {name: len(rows) for name, rows in dataset.index.items()})
        return
    dataset = load_dataset(next(folder.glob("[0-9a-f]*")))
    changed = {key: yaml.safe_load(value) for key, value in (change.split("=") for change in changes)}
    settings = ModelSettings(**{**SETTINGS.model.model_dump(), **changed})
    print(json.dumps({**changed, **train_once(dataset, settings, folder / "logs")}), flush=True)


if __name__ == "__main__":
    _main(Path(sys.argv[1]), *sys.argv[2:])
