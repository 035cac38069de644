"""The views of the dashboards, with the arithmetic beside their numbers; and what the role that reads them tries."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from psycopg2 import errorcodes
from sqlalchemy import Connection, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError

from perpcast.database import (
    CandleGap,
    Database,
    DatabaseAddress,
    EquityRecord,
    EventRecord,
    PositionRecord,
    SignalRecord,
    TrainingSequence,
    make_bi_role,
    make_metabase_database,
    migrate,
    open_engine,
    read_defaults,
    read_question,
    read_signals,
    refresh_bi,
    replace_candle_gaps,
    replace_predictions,
    replace_training_sequences,
    reset,
    upsert_candles,
    upsert_model,
    write_journal,
)
from perpcast.database.bi import BI_CONNECTIONS, BI_ROLE, METABASE
from perpcast.database.bi_views import DRIFTING, VIEWS
from perpcast.database.schema import INDICATORS, metadata
from perpcast.decision import decide, signals_from_returns
from perpcast.errors import DatabaseUnavailableError
from perpcast.evaluation.metrics import quantile_bin
from perpcast.live.journal import DatabaseJournal, SessionJournal
from perpcast.market import CandleSeries
from perpcast.timeframe import from_ms, parse_time, to_ms
from tests.test_database_registry import model

STEP = 900_000
NEW_YEAR = to_ms(parse_time("2024-01-01T00:00Z"))
PASSWORD = "reads2024"


def candles(first_ms: int, closes: Sequence[float]) -> CandleSeries:
    """Bars of no height, one after the other."""
    close = np.array(closes, float)
    return CandleSeries(first_ms + STEP * np.arange(len(close)), close, close, close, close, close, close)


def rows(engine: Database, query: str) -> list[tuple[Any, ...]]:
    with engine.connect() as connection:
        return [tuple(row) for row in connection.execute(text(query))]


def insert(engine: Database, table: str, **values: Any) -> None:
    names = ", ".join(values)
    with engine.begin() as connection:
        connection.execute(text(f"INSERT INTO {table} ({names}) VALUES (:{', :'.join(values)})"), values)


# --- market data ------------------------------------------------------------------------------------------------------


def test_gap_over_new_year_is_counted_in_both_months(database: Database) -> None:
    """Ten bars missing: the last four of December (23:00 to 23:45), six of January (00:00 to 01:15)."""
    upsert_candles(database, "AAAUSDT", candles(NEW_YEAR - 20 * STEP, [1.0] * 16))
    upsert_candles(database, "AAAUSDT", candles(NEW_YEAR + 6 * STEP, [1.0] * 10))
    missing = CandleGap("AAAUSDT", NEW_YEAR - 4 * STEP, 10, "exchange_outage")
    flat = CandleGap("AAAUSDT", NEW_YEAR + 8 * STEP, 8, "flat_run")
    before = CandleGap("AAAUSDT", NEW_YEAR - 120 * STEP, 100, "not_listed_yet")
    replace_candle_gaps(database, "AAAUSDT", [before, missing, flat])
    refresh_bi(database)
    assert rows(database, "SELECT month, cause, bars FROM bi.gap_months ORDER BY 1, 2") == [
        (date(2023, 12, 1), "exchange_outage", 4),
        (date(2023, 12, 1), "not_listed_yet", 100),
        (date(2024, 1, 1), "exchange_outage", 6),
        (date(2024, 1, 1), "flat_run", 8),
    ]
    # 16 of 16 + 4; of January's 10 + 6 two are not flat.
    assert rows(database, "SELECT month, bars, missing, flat, usable FROM bi.coverage ORDER BY 1") == [
        (date(2023, 12, 1), 16, 4, 0, 16 / 20),
        (date(2024, 1, 1), 10, 6, 8, 2 / 16),
    ]
    assert rows(database, "SELECT last_missing, hours FROM bi.gaps WHERE cause = 'exchange_outage'") == [
        (from_ms(NEW_YEAR + 5 * STEP), 2.5)
    ]


@pytest.mark.parametrize("zone", ["UTC", "America/New_York", "Asia/Tokyo"])
def test_months_are_of_utc_in_every_session(database: Database, zone: str) -> None:
    upsert_candles(database, "AAAUSDT", candles(NEW_YEAR - 2 * STEP, [1.0] * 6))
    replace_candle_gaps(database, "AAAUSDT", [CandleGap("AAAUSDT", NEW_YEAR + 4 * STEP, 3, "not_yet_fetched")])
    refresh_bi(database)
    with database.connect() as connection:
        connection.execute(text(f"SET TIME ZONE '{zone}'"))
        found = connection.execute(text("SELECT month, bars, missing FROM bi.coverage ORDER BY 1")).all()
        days = connection.execute(text("SELECT day FROM bi.gaps")).scalars().all()
    assert [tuple(row) for row in found] == [(date(2023, 12, 1), 2, 0), (date(2024, 1, 1), 4, 3)]
    assert days == [date(2024, 1, 1)]


def test_freshness_is_as_of_now_and_coverage_as_of_the_refresh(database: Database) -> None:
    now = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    newest = to_ms(now) - 2 * STEP
    upsert_candles(database, "AAAUSDT", candles(newest - 9 * STEP, [1.0] * 10))
    upsert_candles(database, "BBBUSDT", candles(newest - 17 * STEP, [1.0] * 10))
    found = rows(database, "SELECT symbol, newest_bar, hours_behind, hours_old FROM bi.freshness ORDER BY 1")
    assert [row[:3] for row in found] == [("AAAUSDT", from_ms(newest), 0.0), ("BBBUSDT", from_ms(newest - 8 * STEP), 2)]
    assert 0.25 <= found[0][3] <= 1.5  # its close is a quarter of an hour before the full hour
    assert rows(database, "SELECT count(*) FROM bi.coverage") == [(0,)]
    refresh_bi(database)
    assert rows(database, "SELECT sum(bars)::int FROM bi.coverage") == [(20,)]


# --- labels and features ----------------------------------------------------------------------------------------------


def fill_indicator(database: Database, symbol: str, name: str, values: Sequence[tuple[str, float]]) -> None:
    for time, value in values:
        insert(database, "processed_market_data", symbol=symbol, open_time=parse_time(time), **{name: value})


def test_drift_is_the_shift_of_the_mean_in_deviations_of_the_first_year_or_of_training(database: Database) -> None:
    """Bars on the sample's grid of 255 minutes. 2023: 40 and 60, so 50 with a deviation of 10; 2024: 65, so 1.5."""
    begin, grid = parse_time("2023-01-02T00:00Z"), timedelta(minutes=255)
    begin += (-begin.timestamp() % (255 * 60)) * timedelta(seconds=1)
    later = begin + 2200 * grid  # 389 days
    times = [begin, begin + grid, later, later + grid]
    sampled = [(f"{at:%Y-%m-%dT%H:%MZ}", value) for at, value in zip(times, (40, 60, 60, 70), strict=True)]
    unseen = (f"{begin + grid / 3:%Y-%m-%dT%H:%MZ}", 1000.0)
    fill_indicator(database, "AAAUSDT", "rsi_14", [*sampled, unseen])
    refresh_bi(database)
    query = "SELECT month, bars, mean, reference_mean, reference_deviation, shift FROM bi.indicator_drift ORDER BY 1"
    first, last = begin.date().replace(day=1), later.date().replace(day=1)
    assert rows(database, query) == [(first, 2, 50, 50, 10, 0), (last, 2, 65, 50, 10, 1.5)]

    upsert_model(database, model("a"))
    trained = TrainingSequence("AAAUSDT", "train", to_ms(later), to_ms(later + grid), 2)
    tested = TrainingSequence("AAAUSDT", "test", to_ms(begin), to_ms(begin + grid), 2)
    replace_training_sequences(database, "d1", [trained, tested], "abc", {})
    # Now 60 and 70 are what the model knows: 65 with a deviation of 5.
    assert rows(database, query) == [(first, 2, 50, 65, 5, -3), (last, 2, 65, 65, 5, 0)]


def test_drift_leaves_out_what_follows_the_price_or_the_calendar() -> None:
    assert set(DRIFTING) < set(INDICATORS)
    assert len(DRIFTING) == 29
    assert not {"ema_20", "obv", "atr_14", "hour"} & set(DRIFTING)


# --- models -----------------------------------------------------------------------------------------------------------


def test_forecasts_fall_into_tenths_of_their_model_and_side(database: Database) -> None:
    """Twenty forecasts 0 to 19 % of a buy that each came true by half: a tenth holds two, the lowest 0 and 1 %."""
    bars = np.arange(20)
    times = NEW_YEAR + STEP * bars
    for at, realised in zip(times, bars / 200, strict=True):
        insert(
            database, "processed_market_data", symbol="AAAUSDT", open_time=from_ms(int(at)),
            buy_expected_return=float(realised),
        )  # fmt: skip
    unfinished = np.append(times, times[-1] + STEP)  # the last one has no label yet
    means = np.append(bars, 50) / 100
    outputs = {"buy_mean": means, "sell_mean": -means, "buy_q50": means / 2, "buy_q75": means, "buy_q90": means + 1}
    replace_predictions(database, "m", "AAAUSDT", unfinished, outputs)
    refresh_bi(database)
    found = rows(
        database,
        "SELECT decile, forecasts, round(predicted_sum::numeric, 4), round(realised_sum::numeric, 4), profits "
        "FROM bi.forecast_bins ORDER BY 1",
    )
    assert [tuple(map(float, row)) for row in found[:2]] == [(1, 2, 0.01, 0.005, 1), (2, 2, 0.05, 0.025, 2)]
    assert [row[0] for row in found] == list(range(1, 11))
    assert float(found[-1][2]) == 0.37  # 18 and 19 %
    # q50 is what came true, but for REAL's rounding; q75 twice that, equal at 0 alone.
    sums = "sum(within_q75), sum(below_q75), sum(below_q90), sum(with_quantiles)"
    assert rows(database, f"SELECT {sums} FROM bi.forecast_bins") == [(20, 19, 20, 20)]
    assert rows(database, "SELECT DISTINCT probability_bin, probability_sum FROM bi.forecast_bins") == [(0, None)]


def test_tenths_are_those_of_the_report(database: Database) -> None:
    """The same edges as `evaluation.metrics.quantile_bin` draws, equal forecasts in one bin."""
    predicted = np.round(np.random.default_rng(2).normal(0, 0.01, 203), 3).astype(np.float32)
    times = NEW_YEAR + STEP * np.arange(len(predicted))
    with database.begin() as connection:
        connection.execute(
            text("INSERT INTO processed_market_data (symbol, open_time, buy_expected_return) VALUES ('A', :at, 0.01)"),
            [{"at": from_ms(int(at))} for at in times],
        )
    replace_predictions(database, "m", "A", times, {"buy_mean": predicted})
    refresh_bi(database)
    decile, count = np.unique(quantile_bin(predicted.astype(float)), return_counts=True)
    expected = list(zip((decile + 1).tolist(), count.tolist(), strict=True))
    assert rows(database, "SELECT decile, forecasts FROM bi.forecast_bins ORDER BY 1") == expected


def test_probabilities_fall_into_steps_of_five_percent(database: Database) -> None:
    """0.02, 0.07 and 1.0 lie in the 1st, 2nd and 20th; the trades of the first two lost."""
    given, came = np.array([0.02, 0.07, 1.0]), (-0.01, -0.01, 0.02)
    times = NEW_YEAR + STEP * np.arange(3)
    for at, realised in zip(times, came, strict=True):
        insert(database, "processed_market_data", symbol="A", open_time=from_ms(int(at)), sell_expected_return=realised)
    replace_predictions(database, "m", "A", times, {"sell_mean": given, "sell_profit_probability": given})
    refresh_bi(database)
    assert rows(database, "SELECT side, probability_bin, forecasts, profits FROM bi.forecast_bins ORDER BY 2") == [
        ("sell", 1, 1, 0), ("sell", 2, 1, 0), ("sell", 20, 1, 1),
    ]  # fmt: skip


def test_scores_of_model_and_baselines_are_rows(database: Database) -> None:
    record = replace(
        model("a"),
        metrics={"scores": {"rank_ic": {"value": 0.02, "lower": 0.01, "upper": 0.03}}, "windows": 10},
        baselines={"ridge": {"rank_ic": {"value": 0.01, "lower": None, "upper": None}}},
    )
    upsert_model(database, record)
    upsert_model(database, model("without scores"))
    assert rows(database, "SELECT forecast, metric, value, lower, upper FROM bi.model_scores ORDER BY 1") == [
        ("model", "rank_ic", 0.02, 0.01, 0.03), ("ridge", "rank_ic", 0.01, None, None),
    ]  # fmt: skip


def test_nothing_is_present_in_an_empty_database(database: Database) -> None:
    assert read_defaults(database) == {"model": None, "run": None}
    for view in VIEWS:
        expected = [(None,)] if view.name == "bar_interval" else []
        assert rows(database, f"SELECT * FROM bi.{view.name}") == expected


# --- trading ----------------------------------------------------------------------------------------------------------


def session(run: str, initial: float = 1000.0) -> EventRecord:
    detail = {"mode": "paper", "model_id": "m", "capital": {"initial": initial}, "threshold": 0.002}
    return EventRecord(run, 0, from_ms(NEW_YEAR), "session", None, detail)


def position(run: str, side: Any = "buy", **changes: Any) -> PositionRecord:
    values: dict[str, Any] = {
        "position_id": f"{run}/{side}", "signal_id": f"{run}/{side}", "symbol": "AAAUSDT",
        "entry_time": from_ms(NEW_YEAR + STEP), "entry_price": 100.0, "quantity": 4.0, "leverage": 10.0,
        "stop_loss": 98.0, "realized_pnl": -1.0,
    }  # fmt: skip
    return PositionRecord(run=run, side=side, **{**values, **changes})


def signal(run: str, side: Any = "buy", symbol: str = "AAAUSDT") -> SignalRecord:
    return SignalRecord(f"{run}/{side}", run, symbol, from_ms(NEW_YEAR), side, 0.005, "m", "taken")


def test_drawdown_is_below_the_highest_and_counts_the_initial_capital(database: Database) -> None:
    """990, 1100, 1045 after 1000: 1 % below the beginning, at the top, 5 % below the top."""
    equity = [
        EquityRecord("r", from_ms(NEW_YEAR + bar * STEP), value, value, 0.0, 0)
        for bar, value in enumerate((990.0, 1100.0, 1045.0))
    ]
    write_journal(database, [session("r"), *equity])
    found = rows(database, "SELECT drawdown FROM bi.equity_curve ORDER BY time")
    assert [value for (value,) in found] == pytest.approx([-0.01, 0, -0.05])
    ((bars, last, total, deepest),) = rows(
        database, "SELECT bars, equity, total_return, max_drawdown FROM bi.sessions WHERE run = 'r'"
    )
    assert (bars, last) == (3, 1045)
    assert (total, deepest) == pytest.approx((0.045, -0.05))


def test_newest_session_is_the_one_with_the_newest_bar_and_the_higher_number(database: Database) -> None:
    bar = from_ms(NEW_YEAR)
    write_journal(database, [session("paper-9"), session("paper-10"), session("replay-1"), session("begun-2")])
    assert read_defaults(database)["run"] == "replay-1"  # none has a bar
    write_journal(database, [EquityRecord(run, bar, 1, 1, 0, 0) for run in ("paper-9", "paper-10")])
    assert read_defaults(database)["run"] == "paper-10"
    write_journal(database, [EquityRecord("paper-9", bar + timedelta(hours=1), 1, 1, 0, 0)])
    assert read_defaults(database)["run"] == "paper-9"


def test_open_positions_tell_what_their_stops_cost(database: Database) -> None:
    """A buy of 4 at 100, half closed, stop at 98: 1 lost so far, 2 x 2 more at the stop.

    A sell of 4 at 100 with its stop pulled to 99: 4 gained there. The price is that of the session's newest bar.
    """
    upsert_candles(database, "AAAUSDT", candles(NEW_YEAR, [100, 100, 103, 150]))
    upsert_candles(database, "BBBUSDT", candles(NEW_YEAR, [100, 100, 95, 50]))
    records: list[Any] = [
        session("r"), signal("r"), signal("r", "sell", "BBBUSDT"),
        position("r", remaining_fraction=0.5),
        position("r", "sell", symbol="BBBUSDT", stop_loss=99.0, realized_pnl=0.0),
        position("r", "sell", symbol="CCCUSDT", position_id="closed", exit_time=from_ms(NEW_YEAR + 2 * STEP)),
        EquityRecord("r", from_ms(NEW_YEAR + 2 * STEP), 1000, 1000, 0, 2),
    ]  # fmt: skip
    write_journal(database, records)
    columns = "symbol, quantity_left, stop_distance, pnl_at_stop, price, pnl_now, expected_return"
    found = rows(database, f"SELECT {columns} FROM bi.open_positions ORDER BY 1")
    assert [row[0] for row in found] == ["AAAUSDT", "BBBUSDT"]
    assert found[0][1:] == pytest.approx((2, -0.02, -1 - 2 * 2, 103, -1 + 2 * 3, 0.005))
    assert found[1][1:] == pytest.approx((4, 0.01, 4 * 1, 95, 4 * 5, 0.005))


def test_slippage_is_positive_where_it_is_worse_for_us(database: Database) -> None:
    """Against a signal bar's close of 100: a buy at 100.1 and a sell at 99.9 lose 10 bp; stops likewise."""
    upsert_candles(database, "AAAUSDT", candles(NEW_YEAR, [100.0]))
    exits = [("buy", 98.0, 97.902), ("sell", 102.0, 102.102)]  # 0.1 % beyond the stop
    records: list[Any] = [session("r")]
    for number, (side, stop, price) in enumerate(exits, 1):
        entry = 100.1 if side == "buy" else 99.9
        closed = {"exit_time": from_ms(NEW_YEAR + 3 * STEP), "exit_reason": 1}
        detail = {"position_id": f"r/{side}", "price": price, "quantity": "4", "why": "stop"}
        records += [
            signal("r", side), position("r", side, entry_price=entry, stop_loss=stop, **closed),
            EventRecord("r", number, from_ms(NEW_YEAR + 3 * STEP), "fill", "AAAUSDT", detail),
        ]  # fmt: skip
    target = {"position_id": "r/buy", "price": 101.2, "quantity": "1", "why": "target"}
    write_journal(database, [*records, EventRecord("r", 3, from_ms(NEW_YEAR), "fill", "AAAUSDT", target)])
    found = rows(database, "SELECT leg, side, slippage_bps, slippage_usdt FROM bi.slippage ORDER BY 1, 2")
    assert [row[:2] for row in found] == [("entry", "buy"), ("entry", "sell"), ("stop", "buy"), ("stop", "sell")]
    assert [row[2] for row in found] == pytest.approx([10] * 4)
    assert [row[3] for row in found] == pytest.approx([0.4, 0.4, 4 * 0.098, 4 * 0.102])


def test_orders_of_the_exchange_have_slippage_latency_and_rejections(database: Database) -> None:
    """An entry at market in two parts at 100.1 and 100.3, so 100.2 against a close of 100: 20 bp; a stop 0.5 lower."""
    upsert_candles(database, "AAAUSDT", candles(NEW_YEAR, [100.0]))
    write_journal(database, [session("r"), signal("r"), position("r")])
    sent = from_ms(NEW_YEAR + STEP)
    order: dict[str, Any] = {
        "run": "r", "position_id": "r/buy", "symbol": "AAAUSDT", "side": "buy", "leg": "entry", "attempt": 1,
        "order_type": "Market", "reduce_only": False, "quantity": 4, "price": None, "trigger_price": None,
        "status": "filled", "reason": None, "created_at": sent, "updated_at": sent,
    }  # fmt: skip
    stop = {"side": "sell", "leg": "stop", "reduce_only": True, "trigger_price": 98}
    insert(database, "orders", order_link_id="entry", **order)
    insert(database, "orders", order_link_id="stop", **{**order, **stop})
    insert(database, "orders", order_link_id="no", **{**order, "status": "rejected", "reason": "110007"})
    fills = [
        ("1", "entry", "buy", 100.1, 2, 80),
        ("2", "entry", "buy", 100.3, 2, 200),
        ("3", "stop", "sell", 97.5, 4, 9),
    ]
    for number, link, side, price, quantity, milliseconds in fills:
        insert(
            database, "executions", execution_id=number, run="r", order_link_id=link, symbol="AAAUSDT", side=side,
            quantity=quantity, price=price, fee=0.1, maker=False,
            executed_at=sent + timedelta(milliseconds=milliseconds),
        )  # fmt: skip
    found = rows(database, "SELECT leg, side, origin, slippage_bps, slippage_usdt FROM bi.slippage ORDER BY 1")
    assert [row[:3] for row in found] == [("entry", "buy", "exchange"), ("stop", "buy", "exchange")]
    assert [row[3] for row in found] == pytest.approx([20, 0.5 / 98 * 10_000])
    assert [row[4] for row in found] == pytest.approx([0.8, 2.0])
    assert rows(database, "SELECT milliseconds_to_fill FROM bi.orders WHERE leg = 'entry' ORDER BY 1") == [
        (80,),
        (None,),
    ]
    assert rows(database, "SELECT reason, leg FROM bi.orders WHERE status = 'rejected'") == [("110007", "entry")]


def test_decisions_are_on_signals_above_the_threshold(database: Database) -> None:
    """Scores of one bar as `decide` judges them: one taken, one in its place, the rest below 0.4 %."""
    scores = {"AAAUSDT": 0.009, "BBBUSDT": 0.008, "CCCUSDT": 0.001}
    outputs = {"buy_mean": np.array([*scores.values()]), "sell_mean": -np.array([*scores.values()])}
    decisions = decide(
        signals_from_returns(outputs, list(scores), NEW_YEAR, "m"),
        threshold=0.004, occupied=(), max_positions=1, size=lambda signal: Decimal(1),
    )  # fmt: skip
    journal = SessionJournal(DatabaseJournal(database), "r")
    for decision in decisions:
        journal.decision(decision)
    journal.commit()
    assert rows(database, "SELECT day, symbol, side, decision, reason, signals FROM bi.decisions ORDER BY symbol") == [
        (date(2024, 1, 1), "AAAUSDT", "buy", "taken", None, 1),
        (date(2024, 1, 1), "BBBUSDT", "buy", "refused", "max_positions reached", 1),
    ]
    assert len(read_signals(database, "r")) == 6


# --- the schema -------------------------------------------------------------------------------------------------------


def test_every_view_says_what_a_row_is(database: Database) -> None:
    query = (
        "SELECT relname, obj_description(oid) FROM pg_class WHERE relnamespace = 'bi'::regnamespace AND relkind IN "
        "('v', 'm')"
    )
    described = dict(rows(database, query))
    assert described == {view.name: view.row for view in VIEWS}
    assert all(row.startswith(("A row is ", "The one row is ")) and row.endswith(".") for row in described.values())


def test_reset_makes_the_views_anew(database: Database) -> None:
    upsert_candles(database, "AAAUSDT", candles(NEW_YEAR, [1.0]))
    make_bi_role(database, PASSWORD)
    refresh_bi(database)
    reset(database)
    assert rows(database, "SELECT count(*) FROM bi.candle_months") == [(0,)]
    assert rows(database, f"SELECT has_table_privilege('{BI_ROLE}', 'bi.candle_months', 'SELECT')") == [(True,)]


def test_schema_of_somebody_else_is_left_alone(empty_database: DatabaseAddress) -> None:
    engine = open_engine(empty_database)
    with engine.begin() as connection:
        connection.execute(text("CREATE SCHEMA bi"))
        connection.execute(text("CREATE TABLE bi.mine (x int)"))
    with pytest.raises(DatabaseUnavailableError, match="already holds a schema bi that is not ours; rename it"):
        migrate(engine)
    assert rows(engine, "SELECT count(*) FROM bi.mine") == [(0,)]
    engine.dispose()


def test_refresh_of_what_was_written_leaves_the_rest(database: Database) -> None:
    upsert_candles(database, "AAAUSDT", candles(NEW_YEAR, [1.0]))
    refresh_bi(database, "model_predictions")
    assert rows(database, "SELECT count(*) FROM bi.candle_months") == [(0,)]
    refresh_bi(database, "raw_market_data", "model_predictions")
    assert rows(database, "SELECT count(*) FROM bi.candle_months") == [(1,)]
    assert {table for view in VIEWS for table in view.tables} <= set(metadata.tables)
    assert all(bool(view.key) == bool(view.tables) for view in VIEWS)


def test_refresh_lets_a_reader_go_on_reading(database: Database) -> None:
    with database.connect() as reader:
        reader.execute(text("SELECT count(*) FROM bi.candle_months"))  # its lock is held until the end
        upsert_candles(database, "AAAUSDT", candles(NEW_YEAR, [1.0]))
        refresh_bi(database)
    assert rows(database, "SELECT bars FROM bi.candle_months") == [(1,)]


def test_a_question_cannot_write(database: Database) -> None:
    with pytest.raises(DBAPIError, match="read-only transaction"):
        read_question(database, "DELETE FROM candle_gaps RETURNING symbol", {})


# --- the role ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def reader(database: Database) -> Iterator[Database]:
    """The database as the role sees it; it says that it writes, for nothing that it sets itself counts."""
    make_bi_role(database, PASSWORD)
    engine = open_engine(replace(address_of(database), user=BI_ROLE, password=PASSWORD))
    yield engine
    engine.dispose()


def address_of(database: Database) -> DatabaseAddress:
    url = make_url(database.url)
    return DatabaseAddress(url.host or "", url.port or 0, url.database or "", url.username or "", url.password)


def test_role_reads_every_view(reader: Database) -> None:
    for view in VIEWS:
        rows(reader, f"SELECT * FROM bi.{view.name}")
        rows(reader, f"SELECT * FROM {view.name}")  # by its search path


ATTEMPTS = {
    "read a table": "SELECT * FROM public.model_metadata",
    "read another schema": "SELECT * FROM private.diary",
    "read passwords": "SELECT rolpassword FROM pg_authid",
    "write through a view": "INSERT INTO bi.session_events (run, number, time, kind) VALUES ('r', 1, now(), 'k')",
    "delete through a view": "DELETE FROM bi.session_events",
    "write a table": "INSERT INTO public.candle_gaps VALUES ('A', now(), 1, 'flat_run', NULL)",
    "create a table": "CREATE TABLE public.mine (x int)",
    "create a table among the views": "CREATE TABLE bi.mine (x int)",
    "create a temporary table": "CREATE TEMPORARY TABLE mine (x int)",
    "create a schema": "CREATE SCHEMA mine",
    "refresh": "REFRESH MATERIALIZED VIEW bi.candle_months",
    "drop a view": "DROP VIEW bi.gaps",
    "make a role": "CREATE ROLE other",
    "become another": "SET ROLE perpcast",
    "read a file": "COPY (SELECT 1) TO PROGRAM 'true'",
    "read the server's files": "SELECT pg_read_file('postgresql.conf')",
    "take more connections": f"ALTER ROLE {BI_ROLE} CONNECTION LIMIT 1000",
}


def test_role_can_do_nothing_else(database: Database, reader: Database) -> None:
    """Also where it takes back what its sessions start with: what it lacks are rights."""
    with database.begin() as connection:
        connection.execute(text("CREATE SCHEMA private"))
        connection.execute(text("CREATE TABLE private.diary (x int)"))
    with reader.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("SET SESSION CHARACTERISTICS AS TRANSACTION READ WRITE"))
        assert {what: outcome(connection, attempt) for what, attempt in ATTEMPTS.items()} == dict.fromkeys(
            ATTEMPTS, errorcodes.INSUFFICIENT_PRIVILEGE
        )


def outcome(connection: Connection, statement: str) -> str:
    """The code of the error that a statement ends with."""
    try:
        connection.execute(text(statement))
    except DBAPIError as error:
        return getattr(error.orig, "pgcode", "")
    return "done"


def test_role_starts_read_only_with_a_time_limit(reader: Database) -> None:
    with pytest.raises(DBAPIError, match="read-only transaction"), reader.connect() as connection:
        connection.execute(text("CREATE TEMPORARY TABLE mine (x int)"))
    shown = {name: rows(reader, f"SHOW {name}")[0][0] for name in ("statement_timeout", "search_path")}
    assert shown == {"statement_timeout": "30s", "search_path": "bi"}
    limit = f"SELECT rolconnlimit, rolsuper OR rolcreatedb OR rolcreaterole FROM pg_roles WHERE rolname = '{BI_ROLE}'"
    assert rows(reader, limit) == [(BI_CONNECTIONS, False)]


def test_role_is_made_again_with_another_password_and_loses_what_it_was_given_by_hand(database: Database) -> None:
    make_bi_role(database, "before2024")
    with database.begin() as connection:
        connection.execute(text(f"GRANT SELECT ON public.candle_gaps TO {BI_ROLE}"))
        connection.execute(text(f"ALTER ROLE {BI_ROLE} CREATEDB"))
    make_bi_role(database, PASSWORD)
    address = replace(address_of(database), user=BI_ROLE)
    engine = open_engine(replace(address, password=PASSWORD))
    with pytest.raises(DBAPIError, match="permission denied"):
        rows(engine, "SELECT * FROM public.candle_gaps")
    assert rows(engine, f"SELECT rolcreatedb FROM pg_roles WHERE rolname = '{BI_ROLE}'") == [(False,)]
    engine.dispose()
    with pytest.raises(DatabaseUnavailableError, match="refuses the password"):
        open_engine(replace(address, password="before2024"))


def test_stages_may_still_make_temporary_tables(database: Database, reader: Database) -> None:
    upsert_candles(database, "AAAUSDT", candles(NEW_YEAR, [1.0, 2.0]))
    upsert_candles(database, "AAAUSDT", candles(NEW_YEAR, [1.0, 3.0]))  # goes by a temporary table
    assert rows(reader, "SELECT close_before, close_after FROM bi.revisions") == [(2, 3)]


def test_who_may_not_make_roles_is_told_what_to_ask_for(database: Database) -> None:
    with database.begin() as connection:
        connection.execute(text("DROP ROLE IF EXISTS plain"))
        connection.execute(text("CREATE ROLE plain LOGIN PASSWORD 'plain2024'"))
    engine = open_engine(replace(address_of(database), user="plain", password="plain2024"))
    for attempt in (make_bi_role, make_metabase_database):
        with pytest.raises(DatabaseUnavailableError, match='run: ALTER ROLE "plain" CREATEROLE CREATEDB'):
            attempt(engine, PASSWORD)
    engine.dispose()


def test_who_may_make_roles_and_databases_need_not_be_a_superuser(
    database: Database, empty_database: DatabaseAddress, without_metabase: None
) -> None:
    make_bi_role(database, "before2024")
    with database.begin() as connection:
        connection.execute(text("DROP ROLE IF EXISTS maker"))
        connection.execute(text("CREATE ROLE maker LOGIN CREATEROLE CREATEDB PASSWORD 'maker2024'"))
        # Other databases of this server know the role already: it cannot be dropped and made by another.
        connection.execute(text(f"GRANT {BI_ROLE} TO maker WITH ADMIN OPTION"))
        connection.execute(text(f"ALTER DATABASE {empty_database.name} OWNER TO maker"))
    engine = open_engine(replace(empty_database, user="maker", password="maker2024"))
    migrate(engine)
    for _ in range(2):
        make_bi_role(engine, PASSWORD)
        make_metabase_database(engine, PASSWORD)
    engine.dispose()
    reader = open_engine(replace(empty_database, user=BI_ROLE, password=PASSWORD))
    assert rows(reader, "SELECT count(*) FROM models") == [(0,)]
    reader.dispose()
    open_engine(replace(empty_database, name=METABASE, user=METABASE, password=PASSWORD)).dispose()


@pytest.mark.parametrize("theirs", ["CREATE ROLE metabase LOGIN PASSWORD 'theirs'", "CREATE DATABASE metabase"])
def test_metabase_of_somebody_else_is_left_alone(database: Database, without_metabase: None, theirs: str) -> None:
    with database.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text(theirs))
    with pytest.raises(DatabaseUnavailableError, match="already has a role or a database metabase that is not ours"):
        make_metabase_database(database, PASSWORD)


@pytest.fixture
def without_metabase(database: Database) -> Iterator[None]:
    """The server of the tests without what is not of one database alone, before and after."""

    def drop() -> None:
        with database.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text(f"DROP DATABASE IF EXISTS {METABASE} WITH (FORCE)"))
            connection.execute(text(f"DROP ROLE IF EXISTS {METABASE}"))

    drop()
    yield
    drop()


def test_metabase_gets_a_database_that_nobody_else_enters(
    database: Database, reader: Database, without_metabase: None
) -> None:
    for password in ("first2024", "second2024"):
        make_metabase_database(database, password)
        own = open_engine(replace(address_of(database), name=METABASE, user=METABASE, password=password))
        with own.begin() as connection:
            connection.execute(text("CREATE TABLE IF NOT EXISTS core_user (id int)"))
            connection.execute(text("INSERT INTO core_user VALUES (1)"))
            assert connection.execute(text("SELECT count(*) FROM core_user")).scalar_one() in (1, 2)
        own.dispose()
    with pytest.raises(DatabaseUnavailableError, match="permission denied for database"):
        open_engine(replace(address_of(reader), name=METABASE, password=PASSWORD))
