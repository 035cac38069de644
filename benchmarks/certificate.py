"""Seconds of the leak certificate of a panel of the full size: python -m benchmarks.certificate [SYMBOLS [DAYS]]

Random walks, by default 51 symbols of three years, their inputs and labels as a dataset holds them; the inputs lie in a
temporary file, as in a dataset folder (1.2 GB). Writes nothing else.
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.download import peak_mb
from perpcast.config import load_settings
from perpcast.evaluation.splits import rows_of_windows, split_by_time
from perpcast.exit_policy import ExitPolicy, label_sides
from perpcast.features.inputs import KNOWN, OBSERVED, compute_inputs, known_inputs
from perpcast.features.scaler import Scaler
from perpcast.market import SIDES, CandleSeries
from perpcast.timeframe import parse_time, to_ms
from perpcast.training.certify import certify_dataset
from perpcast.training.dataset import Dataset, regression_task

SETTINGS = load_settings([Path(__file__).parents[1] / "config.yaml"])
STEP_MS, BARS_PER_DAY = 900_000, 96
START_MS = to_ms(parse_time("2022-11-01T00:00Z"))


def walk(symbol: int, bars: int) -> CandleSeries:
    """A random walk of 0.3 % a bar, another one for each symbol."""
    rng = np.random.default_rng(symbol)
    close = 100 * np.exp(np.cumsum(rng.normal(0, 0.003, bars)))
    open_ = np.concatenate(([100.0], close[:-1]))
    up, down = rng.exponential(0.001, (2, bars))
    high, low = np.maximum(open_, close) * (1 + up), np.minimum(open_, close) * (1 - down)
    volume = rng.lognormal(0, 1, bars)
    return CandleSeries(np.arange(bars) * STEP_MS + START_MS, open_, high, low, close, volume, volume * close)


def panel(folder: Path, symbols: int, bars: int) -> Dataset:
    """A dataset of so many walks, as `build_dataset` makes one from the database."""
    names, model, cut = tuple(f"S{number:02d}USDT" for number in range(symbols)), SETTINGS.model, SETTINGS.dataset
    horizon = model.prediction_horizon
    policies = {side: ExitPolicy.from_config(SETTINGS.risk_profile, SETTINGS.fees, side, horizon) for side in SIDES}
    task = regression_task("15", model.sequence_length, horizon, names, policies)
    shape = (symbols * bars, len(OBSERVED) + len(KNOWN))
    inputs = np.memmap(folder / "inputs.f32", np.float32, "w+", shape=shape)
    returns, held = np.empty((len(inputs), 2)), np.empty((len(inputs), 2), np.int16)
    for number in range(symbols):
        own, candles = slice(number * bars, (number + 1) * bars), walk(number, bars)
        inputs[own] = np.hstack([compute_inputs(candles.frame()), known_inputs(candles.open_time_ms)])
        prices = candles.open, candles.high, candles.low, candles.close
        labels = label_sides(*prices, policies, ambiguous=False)
        returns[own] = np.column_stack([labels[side].expected_return for side in SIDES])
        held[own] = np.column_stack([labels[side].bars_held for side in SIDES])
    times = np.tile(np.arange(bars) * STEP_MS + START_MS, symbols)
    place = np.tile(np.arange(bars), symbols)
    valid = (place >= 400) & (place < bars - horizon - 1)
    fractions = (cut.train_fraction, cut.stop_fraction, cut.threshold_fraction, cut.test_fraction)
    split = split_by_time(int(times[valid].min()), int(times[valid].max()), STEP_MS, fractions, horizon + 1)
    codes = np.where(valid, split.codes(times), -1)
    index = {name: np.flatnonzero(codes == code) for code, name in enumerate(split.spans)}
    train = rows_of_windows(index["train"], task.lookback, len(inputs))
    return Dataset(
        path=folder,
        task=task,
        scaler=Scaler.fit(inputs[train], (*OBSERVED, *KNOWN)),
        split=split,
        manifest={"fingerprint": "0" * 64, "max_gap_bars": 0},
        inputs=inputs,
        symbol=np.repeat(np.arange(symbols, dtype=np.int16), bars),
        open_time_ms=times,
        expected_return=returns,
        bars_held=held,
        index=index,
    )


def _main(symbols: int = 51, days: int = 1095) -> None:
    bars = days * BARS_PER_DAY
    with tempfile.TemporaryDirectory() as folder:
        dataset = panel(Path(folder), symbols, bars)
        begun = time.perf_counter()
        certificate = certify_dataset(dataset, lambda symbol: walk(dataset.task.symbols.index(symbol), bars))
        seconds = time.perf_counter() - begun
    for check in certificate.checks:
        print("passed" if check.passed else "failed", check.name, "-", check.detail)
    null = certificate.null
    print(f"null: {len(null.shifts)} shifts, rank IC {min(null.rank_ic):+.4f} to {max(null.rank_ic):+.4f}")
    print(f"{symbols} symbols x {days:,} days: {seconds:.1f} s, at most 60; the process took {peak_mb():,.0f} MB")


if __name__ == "__main__":
    _main(*map(int, sys.argv[1:]))
