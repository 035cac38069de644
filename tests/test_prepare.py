"""The prepare stage on a real database: the table that candles and policy make, also after a kill half-way."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from click.testing import CliRunner, Result
from sqlalchemy.engine import make_url

import prepare_dataset
from perpcast.config import load_settings
from perpcast.database import (
    Database,
    read_candles,
    read_processed,
    read_processed_months,
    read_processed_spans,
    upsert_candles,
)
from perpcast.errors import DataError, MissingInputError
from perpcast.exit_policy import ExitPolicy, Labels, label_trades
from perpcast.features.indicators import CANDLES_49, COLUMNS, compute_indicators
from perpcast.features.leak import planted_leak
from perpcast.market import SIDES, CandleSeries
from perpcast.prepare import label_candles, prepare, process_candles
from perpcast.timeframe import format_time
from tests.recorded import needs_recorded, recorded_candles
from tests.test_features_indicators import flatten, market, troubled_market

ROOT = Path(__file__).parents[1]
SETTINGS = load_settings([ROOT / "config.yaml"])
POLICIES = {side: ExitPolicy.from_config(SETTINGS.risk_profile, SETTINGS.fees, side) for side in SIDES}


def series(frame: pd.DataFrame) -> CandleSeries:
    frame = frame.dropna()
    times = pd.DatetimeIndex(frame["open_time"]).as_unit("ms").asi8
    open, high, low, close, volume = (
        frame[name].to_numpy(float) for name in ("open", "high", "low", "close", "volume")
    )
    return CandleSeries(times, open, high, low, close, volume, close * volume)


def assert_same_labels(left: Labels, right: Labels) -> None:
    for field in fields(Labels):
        np.testing.assert_array_equal(getattr(left, field.name), getattr(right, field.name), err_msg=field.name)


def table(database: Database) -> dict[str, tuple]:
    """All of `processed_market_data`, in a form that compares."""
    rows = {}
    for symbol in read_processed_spans(database):
        stored = read_processed(database, symbol)
        labels = [getattr(stored.labels[side], field.name).tobytes() for side in SIDES for field in fields(Labels)]
        rows[symbol] = (stored.open_time_ms.tobytes(), stored.indicators.tobytes(), *labels)
    return rows


# --- labels on the grid --------------------------------------------------------------------------------------------


def test_labels_of_unbroken_candles_are_those_of_the_policy() -> None:
    candles = series(market(800))
    prices = (candles.open, candles.high, candles.low, candles.close)
    for side, labels in label_candles(candles, "15", POLICIES).items():
        assert_same_labels(labels, label_trades(*prices, side, POLICIES[side]))
        assert np.isfinite(labels.expected_return[:-101]).all()
        assert np.isnan(labels.expected_return[-101:]).all()


@pytest.mark.parametrize("missing", [1, 30])
def test_no_label_reaches_over_a_gap(missing: int) -> None:
    whole = market(1000)
    candles = series(whole.drop(index=range(500, 500 + missing)))
    labels = label_candles(candles, "15", POLICIES)["buy"]
    known = np.isfinite(labels.expected_return)
    assert known[:399].all()  # bar 101 after bar 398 is bar 499, the last before the gap
    assert not known[399:500].any()
    assert known[500:-101].all()
    unbroken = label_candles(series(whole), "15", POLICIES)["buy"]
    np.testing.assert_array_equal(labels.expected_return[:399], unbroken.expected_return[:399])
    np.testing.assert_array_equal(labels.expected_return[500:], unbroken.expected_return[500 + missing :])


@pytest.mark.parametrize(("bars", "is_gap"), [(7, False), (8, True)])
def test_long_flat_run_is_a_gap_for_labels_from_its_first_bar_on(bars: int, is_gap: bool) -> None:
    candles = series(flatten(market(1000), 500, bars))
    known = np.isfinite(label_candles(candles, "15", POLICIES)["sell"].expected_return)
    assert known[:399].all()
    assert known[399 : 500 + bars].any() != is_gap
    assert known[500 + bars : -101].all()


def test_candles_off_the_grid_are_refused_with_the_next_step() -> None:
    candles = series(market(20))
    with pytest.raises(DataError, match=r"2024-01-01 00:15 is no multiple of 60 minutes.*init_database.py --reset"):
        label_candles(candles, "60", POLICIES)


def test_no_candles_give_no_rows() -> None:
    assert len(process_candles(CandleSeries.empty(), "15", POLICIES)) == 0


# --- the table -----------------------------------------------------------------------------------------------------


def test_table_holds_indicators_as_real_and_labels_exactly(database: Database) -> None:
    candles = series(troubled_market())
    upsert_candles(database, "BTCUSDT", candles)
    (prepared,) = prepare(database, ["BTCUSDT"], "15", POLICIES)
    stored = read_processed(database, "BTCUSDT")
    np.testing.assert_array_equal(stored.open_time_ms, candles.open_time_ms)
    fresh = compute_indicators(candles.frame()).to_numpy()
    single = [number for number, name in enumerate(COLUMNS) if name != "obv"]
    np.testing.assert_array_equal(stored.indicators[:, single], fresh[:, single].astype(np.float32))
    np.testing.assert_array_equal(stored.indicators[:, COLUMNS.index("obv")], fresh[:, COLUMNS.index("obv")])
    for side, labels in label_candles(candles, "15", POLICIES).items():
        assert_same_labels(stored.labels[side], labels)
        known = np.isfinite(labels.expected_return)
        counts = prepared.quality.sides[side]
        assert counts.labels == known.sum() == sum(counts.exits)
        assert counts.exits[0] == 0
        assert counts.profits == (labels.expected_return[known] > 0).sum()
        assert counts.return_sum == pytest.approx(labels.expected_return[known].sum())
        assert counts.ambiguous == labels.ambiguous.sum()
    assert prepared.quality.bars == len(candles)
    assert prepared.quality.complete == np.isfinite(stored.indicators).all(axis=1).sum()


def test_second_run_writes_nothing_and_changes_are_noticed(database: Database) -> None:
    candles = series(market(700))
    symbols = ["BTCUSDT", "ETHUSDT", "NEWUSDT"]
    upsert_candles(database, "BTCUSDT", candles[:600])
    upsert_candles(database, "ETHUSDT", series(market(650, seed=2)))

    def run(policies: dict) -> dict[str, bool]:
        return {each.symbol: each.bars_written > 0 for each in prepare(database, symbols, "15", policies)}

    assert run(POLICIES) == {"BTCUSDT": True, "ETHUSDT": True}
    assert run(POLICIES) == {"BTCUSDT": False, "ETHUSDT": False}
    upsert_candles(database, "BTCUSDT", candles)
    assert run(POLICIES) == {"BTCUSDT": True, "ETHUSDT": False}
    corrected = candles[300:301]
    upsert_candles(database, "BTCUSDT", replace(corrected, volume=corrected.volume * 2))
    assert run(POLICIES) == {"BTCUSDT": True, "ETHUSDT": False}
    assert run({side: replace(policy, stop=0.02) for side, policy in POLICIES.items()}) == {
        "BTCUSDT": True,
        "ETHUSDT": True,
    }
    assert run(POLICIES) == {"BTCUSDT": True, "ETHUSDT": True}


def test_grown_table_equals_one_made_at_once(database: Database) -> None:
    candles = series(flatten(market(900), 300, 20))
    for end in (305, 310, 600, 900):  # the first two end inside the flat run
        upsert_candles(database, "BTCUSDT", candles[:end])
        prepare(database, ["BTCUSDT"], "15", POLICIES)
    grown = table(database)
    at_once = process_candles(read_candles(database, "BTCUSDT"), "15", POLICIES)
    assert grown["BTCUSDT"][1] == at_once.indicators.tobytes()
    assert grown["BTCUSDT"][2] == at_once.labels["buy"].expected_return.tobytes()


def check_against_a_run_from_scratch(database: Database) -> None:
    """The rows and the ledger are those that a run on empty tables makes."""
    found = table(database), read_processed_months(database)
    with database.begin() as connection:
        connection.exec_driver_sql("TRUNCATE processed_market_data, processed_months")
    prepare(database, ["BTCUSDT"], "15", POLICIES)
    assert (table(database), read_processed_months(database)) == found


@pytest.mark.parametrize("seed", range(3))
def test_table_after_any_history_of_changes_is_that_of_a_run_from_scratch(database: Database, seed: int) -> None:
    """Candles are appended, inserted into holes, revised, put before the first, made flat; rows are lost."""
    random = np.random.default_rng(seed)
    whole = series(market(9_000, seed=seed))  # three months
    upsert_candles(database, "BTCUSDT", whole[2_000:5_000])
    prepare(database, ["BTCUSDT"], "15", POLICIES)
    for _ in range(6):
        first = int(random.integers(0, 8_500))
        part = whole[first : first + int(random.integers(1, 400))]
        kind = random.choice(["append", "revise", "flat", "lose"])
        if kind == "revise":
            part = replace(part, volume=part.volume * 2)
        elif kind == "flat":
            price = part.open[:1].repeat(len(part))
            part = CandleSeries(part.open_time_ms, price, price, price, price, price * 0, price * 0)
        elif kind == "lose":
            with database.begin() as connection:
                connection.exec_driver_sql(
                    "DELETE FROM processed_market_data WHERE extract(minute FROM open_time) = 45"
                )
        upsert_candles(database, "BTCUSDT", part)
        prepare(database, ["BTCUSDT"], "15", POLICIES)
    check_against_a_run_from_scratch(database)


def test_only_months_that_new_candles_touch_are_written(database: Database) -> None:
    candles = series(market(9_000))  # from 2024-01-01 on: 2976, 2784 and 2976 bars a month, then April
    upsert_candles(database, "BTCUSDT", candles[:8_000])

    def written() -> tuple[str, int]:
        (symbol,) = prepare(database, ["BTCUSDT"], "15", POLICIES)
        start_ms = symbol.written_from_ms
        return "nothing" if start_ms is None else format_time(start_ms)[:10], symbol.bars_written

    assert written() == ("2023-12-01", 8_000)
    assert written() == ("nothing", 0)
    upsert_candles(database, "BTCUSDT", candles[8_000:8_001])
    # March has changed; the labels of February's last bars look into it.
    assert written() == ("2024-02-01", 8_001 - 2_976)
    revised = candles[4_000:4_001]
    upsert_candles(database, "BTCUSDT", replace(revised, volume=revised.volume + 1))
    assert written() == ("2024-01-01", 8_001)
    check_against_a_run_from_scratch(database)


def test_another_version_of_the_indicators_is_noticed(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    upsert_candles(database, "BTCUSDT", series(market(700)))
    prepare(database, ["BTCUSDT"], "15", POLICIES)
    assert prepare(database, ["BTCUSDT"], "15", POLICIES)[0].bars_written == 0
    monkeypatch.setattr("perpcast.prepare.LABEL_VERSION", "exit_policy/2")
    assert prepare(database, ["BTCUSDT"], "15", POLICIES)[0].bars_written == 700
    assert prepare(database, ["BTCUSDT"], "15", POLICIES, max_gap_bars=1)[0].bars_written == 700


def test_progress_ends_with_all_bars(database: Database) -> None:
    upsert_candles(database, "BTCUSDT", series(market(300)))
    upsert_candles(database, "ETHUSDT", series(market(200)))
    calls: list[tuple[int, int]] = []
    prepare(database, ["BTCUSDT", "ETHUSDT"], "15", POLICIES, on_progress=lambda *call: calls.append(call))
    assert calls == [(300, 500), (500, 500)]


def test_without_candles_the_next_step_is_named(database: Database) -> None:
    with pytest.raises(MissingInputError, match=r"no candles of any of the 1 configured symbols.*download_data.py"):
        prepare(database, ["BTCUSDT"], "15", POLICIES)


# --- the script ----------------------------------------------------------------------------------------------------


def configuration(database: Database, folder: Path, symbols: list[str]) -> tuple[list[str], dict[str, str]]:
    """Arguments and environment with which a script works on a test's database."""
    url = make_url(database.url)
    folder.mkdir(exist_ok=True)
    overlay = {
        "database": {
            "host": url.host,
            "port": url.port,
            "name": url.database,
            "user": url.username,
            "directory": str(folder / "postgres"),
        },
        "data_download": {"symbols": symbols},
    }
    path = folder / "test.yaml"
    path.write_text(yaml.safe_dump(overlay))
    environment = {**os.environ, **({"PERPCAST_DB_PASSWORD": str(url.password)} if url.password else {})}
    return ["--config", str(ROOT / "config.yaml"), "--config", str(path)], environment


def start(arguments: list[str], environment: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "prepare_dataset.py"), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


RECORDED = ["BTCUSDT", "ETHUSDT", "SOLUSDT", "XRPUSDT", "DOGEUSDT", "ADAUSDT", "BNBUSDT", "TRXUSDT"]


@needs_recorded
def test_killed_run_and_its_repetition_give_the_table_of_an_undisturbed_one(database: Database, tmp_path: Path) -> None:
    for symbol in RECORDED:
        frame = recorded_candles(f"binance_usdm_15m_panel51_1y/{symbol}", 20_000, 6_000)
        upsert_candles(database, symbol, series(frame))
    arguments, environment = configuration(database, tmp_path, RECORDED)

    killed = start(arguments, environment)
    deadline = time.monotonic() + 120
    while len(read_processed_spans(database)) < 2:
        assert killed.poll() is None, killed.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert killed.returncode == -signal.SIGKILL
    half = table(database)
    assert 2 <= len(half) < len(RECORDED)

    again = start(arguments, environment)
    printed, complaint = again.communicate(timeout=300)
    assert (again.returncode, complaint) == (0, "")
    assert f"{len(RECORDED) - len(half)} symbols written, {len(half)} unchanged" in " ".join(printed.split())
    after_kill = table(database)
    assert {symbol: after_kill[symbol] for symbol in half} == half

    with database.begin() as connection:
        connection.exec_driver_sql("TRUNCATE processed_market_data")
    undisturbed = prepare(database, RECORDED, "15", POLICIES)
    assert all(each.bars_written for each in undisturbed)
    assert table(database) == after_kill


def test_script_without_candles_says_what_to_run_first(database: Database, tmp_path: Path) -> None:
    run = start(*configuration(database, tmp_path, ["BTCUSDT"]))
    _, complaint = run.communicate(timeout=120)
    assert run.returncode == 2
    assert complaint.splitlines() == [
        "error: no candles of any of the 1 configured symbols are stored: run python download_data.py first"
    ]


def test_script_reports_base_rates_and_what_is_absent(database: Database, tmp_path: Path) -> None:
    upsert_candles(database, "BTCUSDT", series(market(700)))
    run = start(*configuration(database, tmp_path, ["BTCUSDT", "ETHUSDT"]))
    printed, complaint = run.communicate(timeout=120)
    assert (run.returncode, complaint) == (0, "")
    assert "no candles yet: ETHUSDT" in printed
    assert "700 bars of 1 symbols, 667 with every indicator; 1 symbols written, 0 unchanged" in " ".join(
        printed.split()
    )
    assert "take_profit" in printed
    assert "mean return" in printed


def check(database: Database, folder: Path, monkeypatch: pytest.MonkeyPatch, symbols: list[str]) -> Result:
    """prepare_dataset.py --check in this process."""
    arguments, environment = configuration(database, folder, symbols)
    if "PERPCAST_DB_PASSWORD" in environment:
        monkeypatch.setenv("PERPCAST_DB_PASSWORD", environment["PERPCAST_DB_PASSWORD"])
    return CliRunner().invoke(prepare_dataset.main, ["--check", *arguments])


def test_check_finds_no_leak_and_the_planted_one(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upsert_candles(database, "BTCUSDT", series(market(900)))
    ran = check(database, tmp_path, monkeypatch, ["BTCUSDT", "ETHUSDT"])
    assert ran.exit_code == 0, ran.output
    assert "0 leaks; a planted leak was found on 1" in " ".join(ran.output.split())
    assert len(read_processed(database, "BTCUSDT")) == 0, "a check computes nothing"


def test_check_names_an_indicator_that_sees_the_future(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    upsert_candles(database, "BTCUSDT", series(market(900)))
    leaking = planted_leak()
    monkeypatch.setattr(prepare_dataset, "CANDLES_49", [leaking])
    ran = check(database, tmp_path, monkeypatch, ["BTCUSDT"])
    assert ran.exit_code == 1
    assert f"error: {leaking.name} depend on the future" in ran.stderr
    monkeypatch.setattr(prepare_dataset, "planted_leak", lambda: CANDLES_49[0])
    monkeypatch.setattr(prepare_dataset, "CANDLES_49", CANDLES_49[:1])
    ran = check(database, tmp_path, monkeypatch, ["BTCUSDT"])
    assert (ran.exit_code, "it has shown nothing there" in ran.stderr) == (1, True)


def test_check_without_candles_says_what_to_run_first(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = check(database, tmp_path, monkeypatch, ["BTCUSDT"])
    assert (ran.exit_code, "run python download_data.py first" in ran.stderr) == (2, True)
