"""The whole evaluation on recorded candles, from the command line: downloaded, prepared, trained, scored, traded.

    python -m benchmarks.evaluation FOLDER panel [key=value ...]    51 symbols, a year
    python -m benchmarks.evaluation FOLDER years [key=value ...]    8 symbols, three years

The local exchange serves the recorded candles, and every stage is the script that a user runs. Keys are those of
`model:` in config.yaml; the training is short unless they say otherwise. FOLDER keeps database, model and report, so
that a stage that was done is skipped. Funding is paid by the five symbols whose rates were recorded over years.
"""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from perpcast.command_line import open_database
from perpcast.config import load_settings
from perpcast.database import free_port, stop_server, upsert_funding_rates
from perpcast.market import FundingRate
from perpcast.simulator.clock import RunningClock
from perpcast.simulator.recorded import RecordedMarket
from perpcast.simulator.server import serve_in_thread

ROOT = Path(__file__).parents[1]
RECORDED = ROOT.parent / "shared" / "data"
CANDLES = RECORDED / "candles"
EIGHT = {
    "okx_swap_15m": ("BTCUSDT", "ETHUSDT", "SOLUSDT", "DOGEUSDT", "XRPUSDT"),
    "binance_usdm_15m_long": ("ADAUSDT", "BNBUSDT", "TRXUSDT"),
}
FILES = {
    "panel": sorted((CANDLES / "binance_usdm_15m_panel51_1y").glob("*.parquet")),
    "years": [CANDLES / folder / f"{symbol}.parquet" for folder, symbols in EIGHT.items() for symbol in symbols],
}
# When each set's symbols were chosen, and the time at which it is downloaded: the end of what all symbols have.
CHOSEN = {"panel": "2025-10-23", "years": "2025-01-14"}
DAYS = {"panel": 365, "years": 1109}
FUNDING_HOURS = (0, 8, 16)
SHORT = {"d_model": 64, "batch_size": 256, "samples_per_epoch": 50_000, "epochs": 12, "early_stopping_patience": 4}
STAGES = ("init_database.py", "download_data.py", "prepare_dataset.py", "train_universal_transformer.py")


def evaluate(folder: Path, which: str, changes: dict[str, Any]) -> None:
    """Every stage on one set of candles, then the report."""
    with _world(folder, which, changes) as config:
        for script in STAGES:
            _run(script, "--config", str(config))
            if script == "download_data.py":
                _store_funding(config)
        _run("evaluate_model.py", "--config", str(config))
        _run("evaluate_model.py", "--folds", "expanding", "--config", str(config))


@contextmanager
def _world(folder: Path, which: str, changes: dict[str, Any]) -> Iterator[Path]:
    """The exchange with the recorded candles, and a configuration that points there, at a database in `folder`."""
    candles = folder / "candles"
    candles.mkdir(parents=True, exist_ok=True)
    for path in FILES[which]:
        if not (candles / path.name).exists():
            (candles / path.name).symlink_to(path)
    now_ms = int(pd.Timestamp(CHOSEN[which], tz="UTC").as_unit("ms").value // 1_000_000)
    with serve_in_thread(RecordedMarket(candles), RunningClock(now_ms, 1.0, time.monotonic)) as exchange:
        values = yaml.safe_load((ROOT / "config.yaml").read_text(encoding="utf-8"))
        values["database"].update(port=free_port(), directory=str(folder / "postgres"))
        values["exchange"].update(environment="local", rest_url=exchange.rest_url, ws_url=exchange.ws_url)
        symbols = [path.stem for path in FILES[which]]
        values["data_download"].update(days=DAYS[which], symbols=symbols, universe_as_of=CHOSEN[which])
        values["model"].update({**SHORT, **changes})
        config = folder / "config.yaml"
        config.write_text(yaml.safe_dump(values), encoding="utf-8")
        try:
            yield config
        finally:
            stop_server(folder / "postgres")


def _run(script: str, *options: str) -> None:
    print(f"--- {script} {options[0] if options[0] != '--config' else ''}", flush=True)
    begun = time.perf_counter()
    subprocess.run([sys.executable, str(ROOT / script), *options], check=True)
    print(f"{script}: {time.perf_counter() - begun:.0f} s", flush=True)


def _store_funding(config: Path) -> None:
    settings = load_settings([config])
    with open_database(settings) as database:
        for path in sorted((RECORDED / "bybit_4h_oi_funding").glob("*.parquet")):
            frame = pd.read_parquet(path, columns=["timestamp", "funding_rate"]).dropna()
            frame = frame[frame["timestamp"].dt.hour.isin(FUNDING_HOURS)]
            times = frame["timestamp"].dt.as_unit("ms").astype("int64")
            pairs = zip(times.tolist(), frame["funding_rate"].tolist(), strict=True)
            upsert_funding_rates(database, [FundingRate(path.stem, when, rate) for when, rate in pairs])


if __name__ == "__main__":
    told = dict(change.split("=") for change in sys.argv[3:])
    evaluate(Path(sys.argv[1]).resolve(), sys.argv[2], {key: yaml.safe_load(value) for key, value in told.items()})
