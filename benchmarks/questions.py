"""Every question of the dashboards on three years of 51 symbols, without and with each of its filters.

A server of its own is filled with drawn rows by the program's own COPY: 5.4 million candles and as many rows of
indicators and labels, a model's predictions of a fifth of them, and half a year of a paper session. The questions are
asked as the role that Metabase uses; each way twice, the slower one counts.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, date, datetime
from itertools import pairwise
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from sqlalchemy import Engine, text

from benchmarks.download import BARS, NOW_MS, SYMBOLS, postgres
from metabase.questions import Question, bound_sql, load_dashboards
from perpcast.database import (
    CandleMonth,
    DatabaseAddress,
    ModelRecord,
    ProcessedMonth,
    ProcessedSeries,
    make_bi_role,
    migrate,
    open_engine,
    read_question,
    read_row_counts,
    refresh_bi,
    replace_predictions,
    replace_processed,
    upsert_candles,
    upsert_instruments,
    upsert_model,
)
from perpcast.database.bi import BI_ROLE
from perpcast.database.schema import INDICATORS
from perpcast.exit_policy import EXIT_REASONS, Labels
from perpcast.market import SIDES, CandleSeries
from perpcast.quality import measure as measure_quality
from perpcast.simulator.instruments import instrument_of
from perpcast.timeframe import floor_ms, month_ms

STEP = 900_000
FIRST_MS = floor_ms(NOW_MS, STEP) - BARS * STEP
PREDICTED = round(0.225 * BARS)  # bars of V2 and test
SESSION_BARS = 96 * 182
SLOWEST = 2.0  # seconds that a question may take

CHOICES: dict[str, Any] = {
    "symbol": "BTCUSDT",
    "side": "buy",
    "model": "model-1",
    "run": "paper-1",
    "first_day": date(2025, 6, 15),
    "last_day": date(2026, 6, 15),
}

# The paper session, as it would have been journalled: a signal of each symbol and side at every bar, a position now and
# then, an event for each of its fills.
_SESSION = """
INSERT INTO events SELECT 'paper-1', 0, :first, 'session', NULL,
    '{"mode": "paper", "model_id": "model-1", "capital": {"initial": 10000}, "threshold": 0.002}'::jsonb;
INSERT INTO equity SELECT 'paper-1', :first + bar * interval '15 minutes', 10000 + 300 * sin(bar / 900.0) + bar / 50.0,
    10000, 0, 3 FROM generate_series(0, :bars - 1) AS bar;
INSERT INTO signals
    SELECT 'paper-1/' || symbol || '/' || bar || '/' || side, 'paper-1', symbol, :first + bar * interval '15 minutes',
        side, random() * 0.01, 'model-1', CASE WHEN random() < 0.002 THEN 'taken' ELSE 'refused' END,
        (ARRAY['not above the threshold', 'position open', 'max_positions reached'])[1 + floor(random() ^ 4 * 3)::int]
    FROM generate_series(0, :bars - 1) AS bar, unnest(CAST(:symbols AS text[])) AS symbol, unnest('{buy,sell}'::text[])
        AS side;
INSERT INTO positions
    SELECT signal_id, run, signal_id, symbol, side, open_time + interval '15 minutes', 100, 20, 10, 98.9, 0, 1, 12,
        random() * 60 - 30, open_time + interval '4 hours', 1 + floor(random() * 5)::int, random() * 0.03 - 0.015
    FROM signals WHERE decision = 'taken';
INSERT INTO events
    SELECT run, row_number() OVER (ORDER BY exit_time), exit_time, 'fill', symbol, jsonb_build_object('position_id',
        position_id, 'quantity', '20', 'price', 98.88, 'maker', false, 'why', 'stop', 'pnl', realized_pnl)
    FROM positions;
ANALYZE;
"""


def measure() -> Table:
    """Fills the database, refreshes the views, asks every question."""
    with postgres() as address:
        owner = open_engine(address)
        migrate(owner)
        filling = seconds(lambda: fill(owner))
        rows = sum(read_row_counts(owner).values())
        tables = ("raw_market_data", "processed_market_data", "model_predictions")
        refreshing = {table: seconds(lambda table=table: refresh_bi(owner, table)) for table in tables}  # type: ignore[misc]
        make_bi_role(owner, "reads2024")
        owner.dispose()
        refreshed = ", ".join(f"{table} {took:.1f} s" for table, took in refreshing.items())
        title = f"{rows:,} rows, filled in {filling:.0f} s; refreshing the materialized views of {refreshed}"
        return ask_all(address, title)


def ask_all(address: DatabaseAddress, title: str) -> Table:
    """A row for each question: seconds without filters, with the filter that takes longest, and with all of them."""
    table = Table("question", "rows", "no filter", "slowest filter", "", "all filters", title=title)
    engine = open_engine(replace(address, user=BI_ROLE, password="reads2024"))
    worst = 0.0
    for question in (question for dashboard in load_dashboards() for question in dashboard.questions):
        plain, rows = ask(engine, question, ())
        single = {tag: ask(engine, question, (tag,))[0] for tag in question.tags}
        whole, _ = ask(engine, question, question.tags)
        slowest = max(single, key=lambda tag: single[tag], default="")
        worst = max(worst, plain, whole, *single.values())
        cells = (f"{plain:.3f} s", f"{single[slowest]:.3f} s" if slowest else "", slowest, f"{whole:.3f} s")
        table.add_row(question.key, str(rows), *cells)
    engine.dispose()
    table.caption = f"slowest {worst:.3f} s, allowed are {SLOWEST} s"
    return table


def ask(engine: Engine, question: Question, tags: tuple[str, ...]) -> tuple[float, int]:
    """Seconds of the slower of two times, and the rows of the answer."""
    query, parameters = bound_sql(question, {tag: CHOICES[tag] for tag in tags})
    found: list[int] = []
    times = [seconds(lambda: found.append(len(read_question(engine, query, parameters)))) for _ in range(2)]
    return max(times), found[-1]


def seconds(work: Callable[[], Any]) -> float:
    """How long it takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def fill(database: Engine) -> None:
    """All tables that the questions read."""
    rng = np.random.default_rng(1)
    indicators = rng.normal(size=(BARS, len(INDICATORS)))
    labels = {side: drawn_labels(rng) for side in SIDES}
    for symbol in SYMBOLS:
        candles = drawn_candles(rng)
        upsert_candles(database, symbol, candles)
        processed = ProcessedSeries(candles.open_time_ms, indicators, labels)
        replace_processed(database, symbol, processed, months_of(candles, indicators, labels))
        newest = candles.open_time_ms[-PREDICTED:]
        outputs = {
            f"{side}_{name}": rng.normal(0, 0.01, PREDICTED) for side in SIDES for name in ("mean", "q50", "q75")
        }
        probabilities = {f"{side}_profit_probability": rng.random(PREDICTED) for side in SIDES}
        replace_predictions(database, "model-1", symbol, newest, {**outputs, **probabilities})
    now = datetime.fromtimestamp(NOW_MS / 1000, UTC)
    upsert_instruments(database, [instrument_of(symbol, drawn_candles(rng)[:10]) for symbol in SYMBOLS], now)
    upsert_model(database, model(now))
    begun = datetime.fromtimestamp((FIRST_MS + (BARS - SESSION_BARS) * STEP) / 1000, UTC)
    with database.begin() as connection:
        parameters = {"first": begun, "bars": SESSION_BARS, "symbols": list(SYMBOLS)}
        connection.execute(text(_SESSION), parameters)


def drawn_candles(rng: np.random.Generator) -> CandleSeries:
    """A random walk whose bars hold their own open and close."""
    close = 100 * np.exp(np.cumsum(rng.normal(0, 0.003, BARS)))
    open_ = np.concatenate(([100.0], close[:-1]))
    high, low = np.maximum(open_, close) * 1.001, np.minimum(open_, close) * 0.999
    volume = rng.uniform(1, 10, BARS)
    return CandleSeries(FIRST_MS + STEP * np.arange(BARS), open_, high, low, close, volume, volume * close)


def drawn_labels(rng: np.random.Generator) -> Labels:
    """Outcomes without any meaning."""
    returns = rng.normal(0, 0.01, BARS)
    reasons = rng.integers(1, len(EXIT_REASONS), BARS).astype(np.int8)
    held = rng.integers(1, 100, BARS).astype(np.int16)
    return Labels(returns, reasons, held, np.zeros(BARS, np.int8), rng.random(BARS) < 0.02)


def months_of(candles: CandleSeries, indicators: np.ndarray, labels: dict[Any, Labels]) -> list[ProcessedMonth]:
    """The ledger of the rows, counted as the prepare stage counts them."""
    month = np.array([month_ms(int(at)) for at in candles.open_time_ms[::96]]).repeat(96)[: len(candles)]
    firsts = [*np.unique(month, return_index=True)[1].tolist(), len(candles)]
    found = []
    for first, end in pairwise(firsts):
        quality = measure_quality(candles, indicators, labels, slice(first, end))
        found.append(ProcessedMonth(CandleMonth(int(month[first]), end - first, 0), "drawn", quality.to_json()))
    return found


def model(now: datetime) -> ModelRecord:
    """A model with the scores that a training keeps."""
    scores = {name: {"value": 0.01, "lower": 0.0, "upper": 0.02} for name in ("rank_ic", "mae", "trade_return")}
    return ModelRecord(
        model_id="model-1",
        created_at=now,
        task={"targets": [{"name": side, "kind": "regression"} for side in SIDES]},
        architecture="tft",
        parameters={},
        dataset_id="none",
        dataset_fingerprint="none",
        metrics={"scores": scores},
        baselines=dict.fromkeys(("ridge", "boosted trees", "constant", "last sign"), scores),
        bundle_path="none",
        bundle_sha256="00",
    )


if __name__ == "__main__":
    Console(width=140).print(measure())
