"""Candles, labels, models and the journal: what goes in comes out, twice the same, and what cannot be is refused."""

from collections.abc import Callable
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import numpy as np
import psycopg2
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError, IntegrityError

from perpcast.database import (
    CandleGap,
    CandleSpan,
    Database,
    EquityRecord,
    EventRecord,
    ModelRecord,
    PositionRecord,
    ProcessedSeries,
    SignalRecord,
    StoredCandles,
    TrainingSequence,
    read_candle_gaps,
    read_candle_revisions,
    read_candle_spans,
    read_candles,
    read_equity,
    read_events,
    read_flat_runs,
    read_funding_rates,
    read_instruments,
    read_missing_ranges,
    read_model,
    read_models,
    read_positions,
    read_processed,
    read_processed_spans,
    read_row_counts,
    read_signals,
    replace_candle_gaps,
    replace_predictions,
    replace_processed,
    replace_training_sequences,
    upsert_candles,
    upsert_funding_rates,
    upsert_instruments,
    upsert_model,
    write_journal,
)
from perpcast.database.schema import INDICATORS
from perpcast.exit_policy import Labels
from perpcast.market import SIDES, CandleSeries, FundingRate, Instrument, flat_run_mask

STEP = 900_000
START = 1_672_531_200_000  # 2023-01-01
TIME = datetime(2025, 6, 1, tzinfo=UTC)


def random_candles(bars: int, seed: int = 1, start_ms: int = START) -> CandleSeries:
    random = np.random.default_rng(seed)
    open_, close = random.lognormal(0, 3, (2, bars))
    high = np.maximum(open_, close) * (1 + random.random(bars))
    low = np.minimum(open_, close) * (1 - 0.9 * random.random(bars))
    volume, turnover = random.lognormal(0, 9, (2, bars))
    return CandleSeries(start_ms + np.arange(bars) * STEP, open_, high, low, close, volume, turnover)


def assert_equal_columns(found: Any, expected: Any) -> None:
    for field in fields(expected):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        assert one.dtype == other.dtype, field.name
        np.testing.assert_array_equal(one, other, err_msg=field.name)


def query(database: Database, statement: str, **values: object) -> Any:
    with database.connect() as connection:
        return connection.execute(text(statement), values).scalar()


# --- candles ---------------------------------------------------------------------------------------------------------


def test_candles_come_back_to_the_bit(database: Database) -> None:
    candles = random_candles(40_000)  # more than two chunks of the copy
    assert upsert_candles(database, "1000PEPEUSDT", candles) == StoredCandles(40_000, ())
    assert_equal_columns(read_candles(database, "1000PEPEUSDT"), candles)
    assert read_candle_spans(database) == {
        "1000PEPEUSDT": CandleSpan(START, int(candles.open_time_ms[-1]), 40_000),
    }
    assert_equal_columns(read_candles(database, "BTCUSDT"), CandleSeries.empty())


def test_candles_are_stored_at_the_time_that_people_read(database: Database) -> None:
    upsert_candles(database, "BTCUSDT", random_candles(2))
    assert query(database, "SELECT max(open_time) FROM raw_market_data") == datetime(2023, 1, 1, 0, 15, tzinfo=UTC)


def test_candles_written_twice_change_nothing_and_a_revision_wins_with_a_trace(database: Database) -> None:
    candles = random_candles(1_000)
    upsert_candles(database, "BTCUSDT", candles[:700])
    assert upsert_candles(database, "BTCUSDT", candles[:700]) == StoredCandles(0, ())
    assert upsert_candles(database, "BTCUSDT", candles) == StoredCandles(300, ())
    assert upsert_candles(database, "BTCUSDT", CandleSeries.empty()) == StoredCandles(0, ())
    assert read_candle_revisions(database, "BTCUSDT") == {}
    revised = replace(candles, volume=np.where(np.arange(1_000) == 500, 7.0, candles.volume))
    assert upsert_candles(database, "BTCUSDT", revised[400:600]) == StoredCandles(0, (START + 500 * STEP,))
    assert_equal_columns(read_candles(database, "BTCUSDT"), revised)
    ((time_ms, (before, after)),) = read_candle_revisions(database, "BTCUSDT").items()
    assert time_ms == START + 500 * STEP
    columns = ("open", "high", "low", "close", "volume", "turnover")
    assert before.tolist() == [getattr(candles, name)[500] for name in columns]
    assert after.tolist() == [getattr(revised, name)[500] for name in columns]


def test_candles_of_a_range_hold_its_start_and_not_its_end(database: Database) -> None:
    candles = random_candles(100)
    upsert_candles(database, "BTCUSDT", candles)
    upsert_candles(database, "ETHUSDT", random_candles(100, seed=2))
    found = read_candles(database, "BTCUSDT", START + 10 * STEP, START + 20 * STEP)
    assert_equal_columns(found, candles[10:20])
    assert_equal_columns(
        read_candles(database, "BTCUSDT", START + 10 * STEP + 1, START + 20 * STEP + 1), candles[11:21]
    )


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("low", 0.0),
        ("low", -1.0),
        ("low", np.nan),
        ("high", np.nan),
        ("high", np.inf),
        ("high", 1e-9),
        ("open", np.nan),
        ("close", np.inf),
        ("volume", -1.0),
        ("volume", np.nan),
        ("turnover", np.inf),
    ],
)
def test_candle_that_cannot_be_is_refused_with_its_whole_page(database: Database, column: str, value: float) -> None:
    candles = random_candles(10)
    bad = replace(candles, **{column: np.where(np.arange(10) == 5, value, getattr(candles, column))})
    with pytest.raises(psycopg2.IntegrityError, match="candle_possible"):
        upsert_candles(database, "BTCUSDT", bad)
    assert len(read_candles(database, "BTCUSDT")) == 0
    assert upsert_candles(database, "BTCUSDT", candles) == StoredCandles(10, ()), "the connection is usable again"


def test_names_are_values_never_sql(database: Database) -> None:
    name = "'; DROP TABLE raw_market_data; --%s%(x)s ü"
    upsert_candles(database, name, random_candles(3))
    assert len(read_candles(database, name)) == 3
    with pytest.raises((DBAPIError, ValueError)):
        read_candles(database, "a\0b")


def test_missing_ranges_are_both_ends_and_the_holes(database: Database) -> None:
    candles = random_candles(100)
    day = (START, START + 100 * STEP, STEP)
    assert read_missing_ranges(database, "BTCUSDT", *day) == [(START, START + 100 * STEP)]
    present = np.ones(100, bool)
    present[[0, 1, 40, 60, 61, 62, 99]] = False
    upsert_candles(database, "BTCUSDT", candles[present])
    bars = [(0, 2), (40, 41), (60, 63), (99, 100)]
    assert read_missing_ranges(database, "BTCUSDT", *day) == [(START + a * STEP, START + b * STEP) for a, b in bars]
    upsert_candles(database, "BTCUSDT", candles)
    assert read_missing_ranges(database, "BTCUSDT", *day) == []
    assert read_missing_ranges(database, "BTCUSDT", START + 98 * STEP, START + 102 * STEP, STEP) == [
        (START + 100 * STEP, START + 102 * STEP)
    ]


@given(st.lists(st.tuples(st.booleans(), st.booleans()), max_size=40))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flat_runs_are_those_of_the_features(database: Database, bars: list[tuple[bool, bool]]) -> None:
    """Of neighbouring stored bars, as `market.flat_run_mask` sees them, whatever lies between."""
    with database.begin() as connection:
        connection.execute(text("TRUNCATE raw_market_data"))
    candles = random_candles(len(bars))
    still = np.array([flat for flat, _ in bars], bool)
    times = START + STEP * np.cumsum([1 + gap for _, gap in bars], dtype=np.int64)
    prices = {name: np.where(still, 1.0, getattr(candles, name)) for name in ("open", "high", "low", "close")}
    candles = replace(candles, open_time_ms=times, volume=np.where(still, 0.0, candles.volume), **prices)
    upsert_candles(database, "BTCUSDT", candles)
    inside = np.zeros(len(bars), bool)
    for first_ms, last_ms in read_flat_runs(database).get("BTCUSDT", []):
        inside |= (times >= first_ms) & (times <= last_ms)
    np.testing.assert_array_equal(inside, flat_run_mask(candles.high, candles.low, candles.volume))


def test_gaps_of_a_symbol_are_replaced(database: Database) -> None:
    first = [
        CandleGap("BTCUSDT", START, 3, "exchange_outage"),
        CandleGap("BTCUSDT", START + 9 * STEP, 1, "rejected_row", "high below low"),
    ]
    other = [CandleGap("ADAUSDT", START, 8, "flat_run")]
    for _ in range(2):
        replace_candle_gaps(database, "BTCUSDT", first)
        replace_candle_gaps(database, "ADAUSDT", other)
    assert read_candle_gaps(database) == other + first
    replace_candle_gaps(database, "BTCUSDT", [])
    assert read_candle_gaps(database, "BTCUSDT") == []
    with pytest.raises(IntegrityError, match="cause_known"):
        replace_candle_gaps(database, "BTCUSDT", [CandleGap("BTCUSDT", START, 1, "boredom")])


def test_funding_and_instruments_take_the_newest_answer(database: Database) -> None:
    rates = [FundingRate("BTCUSDT", START + hours * 3_600_000, 0.0001 * hours) for hours in (0, 8, 16)]
    upsert_funding_rates(database, rates)
    rates[1] = replace(rates[1], rate=-0.00375)
    upsert_funding_rates(database, rates)
    assert read_funding_rates(database, "BTCUSDT") == rates
    assert read_funding_rates(database, "BTCUSDT", rates[1].funding_time_ms, rates[2].funding_time_ms) == rates[1:2]
    upsert_funding_rates(database, [])

    old = Instrument(
        *("1000PEPEUSDT", "Trading", Decimal("0.0000001"), Decimal(100), Decimal(100), Decimal(5), Decimal("75.00")),
        launch_time_ms=START,
        funding_interval_minutes=480,
    )
    upsert_instruments(database, [old], TIME)
    new = replace(old, status="Closed", tick_size=Decimal("0.0000010"))
    upsert_instruments(database, [new], TIME + timedelta(days=1))
    assert read_instruments(database) == {"1000PEPEUSDT": new}
    assert str(read_instruments(database)["1000PEPEUSDT"].tick_size) == "0.0000010", "decimals keep their digits"


# --- indicators and labels -------------------------------------------------------------------------------------------


def random_processed(bars: int, seed: int = 1) -> ProcessedSeries:
    """As `prepare_dataset.py` makes it: a warm-up, single unknown values, no labels at the end."""
    random = np.random.default_rng(seed)
    indicators = random.normal(0, 1, (bars, len(INDICATORS))) * 10.0 ** random.integers(-9, 9, len(INDICATORS))
    indicators[:, INDICATORS.index("obv")] = random.normal(0, 1e14, bars)
    indicators[:33] = np.nan
    indicators[random.random(indicators.shape) < 0.001] = np.nan
    labels = {}
    for side in SIDES:
        known = np.arange(bars) < bars - 101
        expected_return = np.where(known, random.normal(0, 0.01, bars), np.nan)
        reason, targets = random.integers(1, 6, bars) * known, random.integers(0, 5, bars) * known
        held = random.integers(1, 102, bars) * known
        ambiguous = (random.random(bars) < 0.1) & known
        labels[side] = Labels(
            expected_return, reason.astype(np.int8), held.astype(np.int16), targets.astype(np.int8), ambiguous
        )
    return ProcessedSeries(START + np.arange(bars) * STEP, indicators, labels)


def as_stored(processed: ProcessedSeries) -> ProcessedSeries:
    """Rounded to REAL but for obv."""
    rounded = processed.indicators.astype(np.float32).astype(np.float64)
    obv = INDICATORS.index("obv")
    rounded[:, obv] = processed.indicators[:, obv]
    return replace(processed, indicators=rounded)


def assert_equal_processed(found: ProcessedSeries, expected: ProcessedSeries) -> None:
    np.testing.assert_array_equal(found.open_time_ms, expected.open_time_ms)
    np.testing.assert_array_equal(found.indicators, expected.indicators)
    for side in SIDES:
        assert_equal_columns(found.labels[side], expected.labels[side])


def test_processed_rows_come_back_as_the_database_rounds_them(database: Database) -> None:
    processed = random_processed(40_000)
    replace_processed(database, "BTCUSDT", processed)
    assert_equal_processed(read_processed(database, "BTCUSDT"), as_stored(processed))
    assert read_processed_spans(database)["BTCUSDT"].count == 40_000
    assert len(read_processed(database, "ETHUSDT")) == 0


def test_unknown_values_are_null_for_whoever_asks_in_sql(database: Database) -> None:
    processed = random_processed(500)
    replace_processed(database, "BTCUSDT", processed)
    for number, name in enumerate(INDICATORS):
        unknown = query(database, f"SELECT count(*) FROM processed_market_data WHERE {name} IS NULL")
        assert unknown == np.isnan(processed.indicators[:, number]).sum(), name
        assert query(database, f"SELECT count(*) FROM processed_market_data WHERE {name} = 'NaN'") == 0
    for side in SIDES:
        for name in ("expected_return", "exit_reason", "bars_held", "targets_filled", "ambiguous"):
            unknown = query(database, f"SELECT count(*) FROM processed_market_data WHERE {side}_{name} IS NULL")
            assert unknown == 101, name
    stored = query(
        database,
        "SELECT rsi_14 FROM processed_market_data WHERE open_time = :time",
        time=datetime.fromtimestamp((START + 200 * STEP) / 1000, UTC),
    )
    assert np.float32(stored) == np.float32(processed.indicators[200, INDICATORS.index("rsi_14")])


def test_processed_range_is_replaced_as_a_whole(database: Database) -> None:
    old, new = random_processed(1_000), random_processed(1_000, seed=2)
    replace_processed(database, "BTCUSDT", old)
    replace_processed(database, "ETHUSDT", old)
    for _ in range(2):
        replace_processed(database, "BTCUSDT", new)
    assert_equal_processed(read_processed(database, "BTCUSDT"), as_stored(new))
    assert_equal_processed(read_processed(database, "ETHUSDT"), as_stored(old))

    tail = ProcessedSeries(
        old.open_time_ms[600:900],
        old.indicators[600:900],
        {side: Labels(*(getattr(old.labels[side], f.name)[600:900] for f in fields(Labels))) for side in SIDES},
    )
    replace_processed(database, "BTCUSDT", tail, start_ms=START + 600 * STEP)
    found = read_processed(database, "BTCUSDT")
    assert len(found) == 900, "rows of the earlier run beyond the new end are gone"
    np.testing.assert_array_equal(found.indicators[:600], as_stored(new).indicators[:600])
    np.testing.assert_array_equal(found.indicators[600:], as_stored(old).indicators[600:900])


def test_processed_write_that_fails_leaves_the_rows_before(database: Database) -> None:
    old = random_processed(200)
    replace_processed(database, "BTCUSDT", old)
    twice = replace(random_processed(200, seed=2), open_time_ms=np.full(200, START))
    with pytest.raises((DBAPIError, Exception), match="duplicate key"):
        replace_processed(database, "BTCUSDT", twice)
    assert_equal_processed(read_processed(database, "BTCUSDT"), as_stored(old))


# --- models and journal ----------------------------------------------------------------------------------------------


def test_model_trained_again_leaves_one_row(database: Database) -> None:
    model = ModelRecord(
        model_id="tft-1",
        created_at=TIME,
        task={"lookback": 60, "targets": [{"name": "buy", "kind": "regression"}]},
        architecture="tft",
        parameters={"d_model": 32},
        dataset_id="d1",
        dataset_fingerprint="abc",
        metrics={"mae": 0.01, "rank_ic": float("nan")},
        baselines={"zero": {"mae": float("inf")}},
        bundle_path="trained_model/tft-1",
        bundle_sha256="00",
    )
    upsert_model(database, model)
    upsert_model(database, replace(model, parameters={"d_model": 64}))
    upsert_model(database, replace(model, model_id="tft-2", created_at=TIME + timedelta(hours=1)))
    found = read_models(database)
    assert [record.model_id for record in found] == ["tft-2", "tft-1"]
    assert found[1].parameters == {"d_model": 64}
    assert found[1].metrics == {"mae": 0.01, "rank_ic": None}
    assert read_model(database, "tft-1") == found[1]
    assert [len(read_models(database, state)) for state in ("candidate", "champion")] == [2, 0]


def test_predictions_and_sequences_are_replaced(database: Database) -> None:
    times = START + np.arange(50) * STEP
    values = {"buy_mean": np.linspace(-1, 1, 50), "sell_q90": np.where(np.arange(50) < 5, np.nan, 0.5)}
    for _ in range(2):
        replace_predictions(database, "tft-1", "BTCUSDT", times, values)
        replace_training_sequences(
            database, "d1", [TrainingSequence("BTCUSDT", "train", START, START + STEP, 2)], "abc", {"lookback": 60}
        )
    counts = read_row_counts(database)
    assert (counts["model_predictions"], counts["training_sequences"]) == (50, 1)
    assert query(database, "SELECT count(*) FROM model_predictions WHERE sell_q90 IS NULL AND buy_q50 IS NULL") == 5


SIGNAL = SignalRecord("s1", "paper-1", "BTCUSDT", TIME, "buy", 0.004, "tft-1", "taken")
POSITION = PositionRecord("p1", "paper-1", "s1", "BTCUSDT", "buy", TIME, 100.0, 2.0, 10.0, 98.9)
EQUITY = EquityRecord("paper-1", TIME, 10_000.0, 10_000.0, 0.0, 1)
EVENT = EventRecord("paper-1", 0, TIME, "started", None, {"mode": "paper"})


@pytest.mark.parametrize(
    ("record", "read"),
    [(SIGNAL, read_signals), (POSITION, read_positions), (EQUITY, read_equity), (EVENT, read_events)],
    ids=["signal", "position", "equity", "event"],
)
def test_journal_keeps_one_row_of_what_is_written_twice(
    database: Database, record: Any, read: Callable[[Database, str], list]
) -> None:
    for _ in range(2):
        write_journal(database, [record])
    assert read(database, "paper-1") == [record]
    assert read(database, "paper-2") == []


def test_journal_history_stays_as_first_written_and_state_moves_on(database: Database) -> None:
    write_journal(database, [SIGNAL, EVENT, POSITION])
    closed = replace(POSITION, exit_time=TIME + timedelta(hours=1), exit_reason=1, remaining_fraction=0.0)
    write_journal(database, [replace(SIGNAL, score=9.0), replace(EVENT, kind="rewritten"), closed])
    assert read_signals(database, "paper-1") == [SIGNAL]
    assert read_events(database, "paper-1") == [EVENT]
    assert read_positions(database, "paper-1") == [closed]
    assert read_positions(database, "paper-1", open_only=True) == []


def test_journal_refuses_a_second_open_position_of_a_symbol_and_writes_nothing_of_the_step(database: Database) -> None:
    write_journal(database, [POSITION])
    with pytest.raises(IntegrityError, match="one_open_position"):
        write_journal(database, [EVENT, replace(POSITION, position_id="p2")])
    assert read_events(database, "paper-1") == []
    write_journal(database, [replace(POSITION, position_id="p3", run="paper-2")])
