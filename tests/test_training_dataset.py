"""The dataset folder, over candles in a real PostgreSQL: windows, purge, scaler, fingerprint, and what it refuses."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from perpcast.database import Database, upsert_candles
from perpcast.errors import DataError, MissingInputError
from perpcast.evaluation.splits import SPLITS, label_overlaps
from perpcast.exit_policy import ExitPolicy
from perpcast.features.inputs import compute_inputs, known_inputs
from perpcast.market import SIDES, CandleSeries, Side
from perpcast.prepare import prepare
from perpcast.task import Task
from perpcast.training.dataset import Dataset, build_dataset, classification_task, load_dataset, regression_task
from perpcast.training.outcome import baseline_inputs

STEP = 900_000
START = 1_700_000_100_000 // STEP * STEP
FRACTIONS = (0.6, 0.1, 0.1, 0.2)
POLICY = ExitPolicy(0.011, 0.058, ((0.012, 0.2), (0.024, 0.3), (0.035, 0.3)), (0.0, 0.012, 0.024), 20, 5e-4, 2e-4, 2e-4)
POLICIES: dict[Side, ExitPolicy] = {"buy": POLICY, "sell": POLICY}
RECORDED = Path(__file__).parents[2] / "shared" / "data" / "candles" / "okx_swap_15m"


def walk(bars: int, seed: int, start_ms: int = START) -> CandleSeries:
    """A random walk whose bars hold their own open and close."""
    rng = np.random.default_rng(seed)
    close = 100 * np.exp(np.cumsum(rng.normal(0, 0.004, bars)))
    open_ = np.concatenate(([100.0], close[:-1]))
    spread = rng.uniform(0.0005, 0.003, (2, bars))
    high, low = np.maximum(open_, close) * (1 + spread[0]), np.minimum(open_, close) * (1 - spread[1])
    volume = rng.uniform(1, 10, bars)
    return CandleSeries(np.arange(bars) * STEP + start_ms, open_, high, low, close, volume, volume * close)


def task_of(*symbols: str) -> Task:
    return regression_task("15", 12, POLICY.horizon, symbols, POLICIES)


def fill(database: Database, candles: dict[str, CandleSeries]) -> Task:
    for symbol, series in candles.items():
        upsert_candles(database, symbol, series)
    prepare(database, tuple(candles), "15", POLICIES)
    return task_of(*candles)


def build(database: Database, task: Task, folder: Path) -> Dataset:
    return build_dataset(database, task, folder, FRACTIONS, universe_as_of="2025-07-01")


@pytest.fixture
def candles() -> dict[str, CandleSeries]:
    """AAA whole, BBB with a hole of 30 bars."""
    hole = np.r_[0:900, 930:2500]
    return {"AAAUSDT": walk(2500, 1), "BBBUSDT": walk(2500, 2)[hole]}


def test_build_dataset_windows_are_whole_labelled_and_purged(
    database: Database, candles: dict[str, CandleSeries], tmp_path: Path
) -> None:
    dataset = build(database, fill(database, candles), tmp_path)
    assert label_overlaps(dataset.split, STEP, POLICY.horizon) == 0
    assert dataset.manifest["universe_as_of"] == "2025-07-01"
    for name in SPLITS:
        rows = dataset.index[name]
        observed, known = dataset.gather(rows)
        assert observed.shape == (len(rows), 12, len(dataset.task.observed))
        assert np.isfinite(observed).all()
        assert np.isfinite(known).all()
        steps = dataset.open_time_ms[rows[:, None] + np.arange(-11, 1)]
        assert (np.diff(steps, axis=1) == STEP).all()
        assert np.isfinite(dataset.windows(name).realised["buy"]).all()
    bbb = dataset.open_time_ms[(dataset.symbol == 1)]
    after_hole = START + 930 * STEP
    ends = np.concatenate([dataset.open_time_ms[r[dataset.symbol[r] == 1]] for r in dataset.index.values()])
    # Indicators start again after the hole, so no window ends near it; before it, labels would reach into it.
    assert not ((ends > START + (899 - 21) * STEP) & (ends < after_hole + 11 * STEP)).any()
    assert bbb[900] == after_hole


def test_dataset_inputs_are_those_of_the_runner(
    database: Database, candles: dict[str, CandleSeries], tmp_path: Path
) -> None:
    dataset = build(database, fill(database, candles), tmp_path)
    series = candles["AAAUSDT"]
    own = dataset.inputs[dataset.symbol == 0]
    expected = np.hstack([compute_inputs(series.frame()), known_inputs(series.open_time_ms)])
    assert np.array_equal(own, expected, equal_nan=True)
    change = series.close[1:] / series.close[:-1] - 1
    rows = dataset.index["test"]
    first = rows[dataset.symbol[rows] == 0]
    assert baseline_inputs(dataset).last_change("test")[: len(first)] == pytest.approx(change[first - 1], rel=1e-5)


def test_scaler_knows_training_rows_alone(database: Database, candles: dict[str, CandleSeries], tmp_path: Path) -> None:
    dataset = build(database, fill(database, candles), tmp_path)
    rows = np.unique(dataset.index["train"][:, None] + np.arange(-11, 1))
    assert np.array(dataset.scaler.mean) == pytest.approx(dataset.inputs[rows].astype(float).mean(axis=0), abs=1e-9)
    assert dataset.open_time_ms[rows].max() == dataset.split.train.last_ms
    # The same history with another future: the scaler does not move.
    later = dataset.split.v1.first_ms + 21 * STEP
    changed = {}
    for name, series in candles.items():
        factor = np.where(series.open_time_ms > later, 2, 1)
        prices = {column: factor * getattr(series, column) for column in ("open", "high", "low", "close")}
        changed[name] = replace(series, **prices)
    again = build(database, fill(database, changed), tmp_path)
    assert again.fingerprint != dataset.fingerprint
    assert again.scaler == dataset.scaler


def test_build_dataset_twice_is_the_same_folder_and_leaves_nothing_aside(
    database: Database, candles: dict[str, CandleSeries], tmp_path: Path
) -> None:
    task = fill(database, candles)
    first = build(database, task, tmp_path)
    (tmp_path / ".building").mkdir()  # what a killed build leaves behind
    (tmp_path / ".building" / "inputs.f32").write_bytes(b"half")
    second = build(database, task, tmp_path)
    assert second.path == first.path
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([".lock", first.dataset_id])
    assert first.fingerprint.startswith(first.dataset_id)
    assert sum(s.windows for s in first.sequences) == sum(first.manifest["windows"].values())
    other = build_dataset(database, task, tmp_path, FRACTIONS, universe_as_of="2025-08-01")
    assert other.fingerprint != first.fingerprint


def test_build_dataset_symbol_without_training_windows_is_left_out(
    database: Database, candles: dict[str, CandleSeries], tmp_path: Path
) -> None:
    late = walk(400, 3, START + 2100 * STEP)
    task = fill(database, {"LATEUSDT": late, **candles})
    dataset = build(database, replace(task, symbols=(*task.symbols, "NONEUSDT")), tmp_path)
    assert dataset.task.symbols == ("AAAUSDT", "BBBUSDT")
    assert dataset.manifest["left_out"] == ["LATEUSDT", "NONEUSDT"]


def test_build_dataset_nothing_prepared_says_what_to_run(database: Database, tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match=r"run download_data.py, then prepare_dataset.py"):
        build(database, task_of("AAAUSDT"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_build_dataset_candles_changed_since_prepared(
    database: Database, candles: dict[str, CandleSeries], tmp_path: Path
) -> None:
    task = fill(database, candles)
    upsert_candles(database, "BBBUSDT", walk(2500, 2)[np.arange(895, 935)])
    with pytest.raises(MissingInputError, match=r"BBBUSDT: the candles changed .* run prepare_dataset.py"):
        build(database, task, tmp_path)


def test_build_dataset_labels_of_another_policy_are_refused(
    database: Database, candles: dict[str, CandleSeries], tmp_path: Path
) -> None:
    task = fill(database, candles)
    wider = {**task.exit_policies, "sell": replace(POLICY, stop=0.02).to_json()}
    with pytest.raises(MissingInputError, match="another exit policy"):
        build(database, replace(task, exit_policies=wider), tmp_path)


def test_build_dataset_purge_below_the_labels_reach_is_refused(database: Database, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least the label's reach of 21 bars, received 0"):
        build_dataset(database, task_of("AAAUSDT"), tmp_path, FRACTIONS, universe_as_of="2025", purge=0)


def test_classification_task_is_another_dataset_of_the_same_rows(
    database: Database, candles: dict[str, CandleSeries], tmp_path: Path
) -> None:
    task = fill(database, candles)
    dataset = build(database, task, tmp_path)
    profits = classification_task("15", 12, POLICY.horizon, task.symbols, POLICIES)
    assert profits.outputs == ("buy_profit_probability", "buy_mean", "sell_profit_probability", "sell_mean")
    assert replace(profits, targets=task.targets) == task
    other = build(database, profits, tmp_path)
    assert load_dataset(other.path).task == other.task == profits
    assert other.fingerprint != dataset.fingerprint
    np.testing.assert_array_equal(other.inputs, dataset.inputs)
    rows = dataset.index["v1"]
    np.testing.assert_array_equal(other.targets(rows), dataset.targets(rows))


def test_load_dataset_refuses_a_damaged_or_leaking_folder(
    database: Database, candles: dict[str, CandleSeries], tmp_path: Path
) -> None:
    path = build(database, fill(database, candles), tmp_path).path
    assert load_dataset(path).task == build(database, task_of(*candles), tmp_path).task

    def copy(name: str) -> Path:
        return Path(shutil.copytree(path, tmp_path / name))

    cut = copy("cut")
    (cut / "inputs.f32").write_bytes(b"1234")
    with pytest.raises(DataError, match="is damaged"):
        load_dataset(cut)
    leaking = copy("leaking")
    manifest = json.loads((leaking / "manifest.json").read_text())
    manifest["split"]["train"]["last_ms"] = manifest["split"]["v1"]["first_ms"] - STEP
    (leaking / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="labels of one split reach into the next"):
        load_dataset(leaking)
    moved = copy("moved")
    with np.load(moved / "index.npz") as index:
        arrays = {name: index[name] for name in SPLITS}
    np.savez(moved / "index.npz", allow_pickle=False, **{**arrays, "v1": arrays["test"]})
    with pytest.raises(DataError, match="v1 holds windows that are not valid"):
        load_dataset(moved)
    gone = copy("gone")
    (gone / "rows.npz").unlink()
    with pytest.raises(MissingInputError, match=r"rows\.npz is not there"):
        load_dataset(gone)


@pytest.mark.skipif(not RECORDED.exists(), reason=f"recorded candles are not at {RECORDED}")
def test_build_dataset_recorded_candles(database: Database, tmp_path: Path) -> None:
    """60 days of three real symbols, the policy and the look-back of the configuration's size."""
    policy = replace(POLICY, horizon=100)
    policies: dict[Side, ExitPolicy] = dict.fromkeys(SIDES, policy)
    symbols = ("BTCUSDT", "ETHUSDT", "SOLUSDT")
    for symbol in symbols:
        frame = pd.read_parquet(RECORDED / f"{symbol}.parquet").head(60 * 96 + 800)
        times = frame["timestamp"].dt.as_unit("ms").astype("int64").to_numpy()
        open_, high, low, close, volume = (
            frame[name].to_numpy(float) for name in ("open", "high", "low", "close", "volume")
        )
        upsert_candles(database, symbol, CandleSeries(times, open_, high, low, close, volume, close * volume))
    prepare(database, symbols, "15", policies)
    task = regression_task("15", 60, 100, symbols, policies)
    dataset = build_dataset(
        database, task, tmp_path, (0.7, 0.075, 0.075, 0.15), universe_as_of="recorded: symbols listed in 2025"
    )
    assert dataset.task.symbols == symbols
    assert min(dataset.manifest["windows"].values()) > 500
    assert label_overlaps(dataset.split, STEP, 100) == 0
