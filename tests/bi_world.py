"""A small world for the dashboards: a database in which every stage has left what it leaves, by the stages' own code.

Three symbols over two months, one of them with gaps of every cause; a regression that became champion and a classifier
that was refused; two paper sessions of which the second met late, missing and broken bars.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from perpcast.database import (
    CandleGap,
    Database,
    DatabaseAddress,
    ModelRecord,
    create_database,
    migrate,
    open_engine,
    promote_model,
    record_look,
    record_refusal,
    refresh_bi,
    replace_candle_gaps,
    upsert_candles,
    upsert_instruments,
    upsert_model,
)
from perpcast.live.forecast import Forecaster
from perpcast.live.history import CandleHistory
from perpcast.live.journal import DatabaseJournal, SessionJournal
from perpcast.live.session import run_session
from perpcast.live.trader import Trader
from perpcast.market import SIDES, Candle, CandleSeries, Side
from perpcast.prepare import prepare
from perpcast.task import Task
from perpcast.timeframe import from_ms
from perpcast.training.dataset import Dataset, build_dataset, classification_task, regression_task
from perpcast.training.outcome import JUDGED, judge, store_predictions
from tests.live_world import BEGIN, POLICY, RULES, STEP, Exchange, Momentum, close_inputs, hour_inputs, instrument
from tests.live_world import random_market as market_of

SYMBOLS = ("AAAUSDT", "BBBUSDT", "CCCUSDT")
BARS = 2500
HOLE, REJECTED, FLAT = range(900, 930), range(1000, 1001), range(1100, 1120)  # of BBBUSDT
REVISED = 1200  # of CCCUSDT
REGRESSION, CLASSIFICATION = "tft-of-returns", "tft-of-profits"
FIRST, SECOND = "paper-local-tft-1", "paper-local-tft-2"
NOW = datetime(2025, 7, 1, 12, tzinfo=UTC)
POLICIES: dict[Side, Any] = {"buy": POLICY, "sell": POLICY}


def fill(database: Database, folder: Path, *, sessions: bool = True) -> None:
    """Everything; the dataset folders lie in `folder`."""
    market = market_of(SYMBOLS, BARS, seed=5)
    download(database, market)
    prepare(database, SYMBOLS, "15", POLICIES)
    train(database, folder)
    if sessions:
        trade(database, market, FIRST, BEGIN + 1800 * STEP, 1990)
        trade(database, market, SECOND, BEGIN + 2000 * STEP, 2190, troubled=True)
    refresh_bi(database)


def download(database: Database, market: Mapping[str, list[Candle]]) -> None:
    """Candles, gaps of every cause, a candle that the exchange changed, and the rules of the instruments."""
    series = {symbol: CandleSeries.from_candles(candles) for symbol, candles in market.items()}
    bbb = series["BBBUSDT"]
    flat = np.isin(np.arange(BARS), FLAT)
    still = {name: np.where(flat, bbb.open, getattr(bbb, name)) for name in ("high", "low", "close")}
    bbb = replace(bbb, **still, volume=np.where(flat, 0.0, bbb.volume), turnover=np.where(flat, 0.0, bbb.turnover))
    stored = {**series, "BBBUSDT": bbb[np.setdiff1d(np.arange(BARS - 4), [*HOLE, *REJECTED])]}
    for symbol, candles in stored.items():
        upsert_candles(database, symbol, candles)
    gaps = [(-96, 96, "not_listed_yet"), (HOLE[0], len(HOLE), "exchange_outage"), (FLAT[0], len(FLAT), "flat_run")]
    found = [CandleGap("BBBUSDT", BEGIN + first * STEP, bars, cause) for first, bars, cause in gaps]
    found.append(CandleGap("BBBUSDT", BEGIN + REJECTED[0] * STEP, 1, "rejected_row", "high below low"))
    found.append(CandleGap("BBBUSDT", BEGIN + (BARS - 4) * STEP, 4, "not_yet_fetched"))
    replace_candle_gaps(database, "BBBUSDT", found)
    ccc = series["CCCUSDT"][slice(REVISED, REVISED + 1)]
    upsert_candles(database, "CCCUSDT", replace(ccc, volume=ccc.volume + 1))
    upsert_instruments(database, map(instrument, SYMBOLS), from_ms(BEGIN + BARS * STEP))


def train(database: Database, folder: Path) -> None:
    """Two models of drawn forecasts with some skill, scored as a training scores them, and what the registry did."""
    for model_id, make in ((REGRESSION, regression_task), (CLASSIFICATION, classification_task)):
        task = make("15", 12, POLICY.horizon, SYMBOLS, POLICIES)
        dataset = build_dataset(database, task, folder, (0.6, 0.1, 0.1, 0.2), universe_as_of="2025-07-01")
        register(database, dataset, model_id)
    test = dataset.split.spans["test"]
    gain = {"gain_over_best_baseline": {"gain": {"value": 0.002, "lower": 0.001, "upper": 0.003}}}
    record_look(database, dataset.fingerprint, test.first_ms, test.last_ms, REGRESSION, "promotion", NOW)
    promote_model(database, REGRESSION, over=None, first_ms=test.first_ms, last_ms=test.last_ms, evidence=gain, now=NOW)
    record_refusal(database, CLASSIFICATION, ["a leak certificate that passes", "a daily net return above"], {}, NOW)


def register(database: Database, dataset: Dataset, model_id: str) -> None:
    """Predictions that hold a fifth of what came true, their scores, and the model's row."""
    rng = np.random.default_rng(3)
    predicted = {split: drawn(rng, dataset.task, dataset.windows(split).realised) for split in JUDGED}
    store_predictions(database, dataset, model_id, predicted)
    scores = judge(dataset, predicted, seed=1).evaluation.to_json()
    of_model = scores["scores"].pop("model")
    upsert_model(
        database,
        ModelRecord(
            model_id=model_id,
            created_at=NOW,
            task=dataset.task.to_json(),
            architecture="tft",
            parameters={},
            dataset_id=dataset.dataset_id,
            dataset_fingerprint=dataset.fingerprint,
            metrics={**scores, "scores": of_model},
            baselines=scores["scores"],
            bundle_path="trained_model/none",
            bundle_sha256="00",
        ),
    )


def drawn(rng: np.random.Generator, task: Task, realised: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Every output of the task, [windows] each."""
    outputs: dict[str, np.ndarray] = {}
    for side in SIDES:
        mean = 0.2 * realised[side] + 0.004 * rng.normal(size=len(realised[side]))
        levels = {"mean": mean, "q50": mean - 0.004, "q75": mean + 0.008, "q90": mean + 0.02}
        levels["profit_probability"] = 1 / (1 + np.exp(-100 * mean))
        outputs |= {f"{side}_{name}": values.astype(np.float32) for name, values in levels.items()}
    return {name: outputs[name] for name in task.outputs}


def trade(
    database: Database,
    market: dict[str, list[Candle]],
    run: str,
    first_ms: int,
    last_bar: int,
    *,
    troubled: bool = False,
) -> None:
    """A paper session from `first_ms` to the bar `last_bar`; a troubled one misses bars and meets a dead exchange."""
    terms = {
        "mode": "paper",
        "environment": "local",
        "model_id": REGRESSION,
        "threshold": RULES.threshold,
        "step_ms": STEP,
        "capital": {"initial": 10_000.0},
    }
    journal = SessionJournal(DatabaseJournal(database), run)
    state = journal.begin(first_ms, 10_000.0, terms)
    history = CandleHistory(list(market), STEP, 25, 8)
    forecaster = Forecaster(Momentum(), close_inputs, hour_inputs, lookback=5, step_ms=STEP)
    instruments = {symbol: instrument(symbol) for symbol in market}
    rules = replace(RULES, source=REGRESSION)
    trader = Trader(rules, instruments, forecaster, history, journal, state, STEP)
    exchange = Exchange(market, first_ms)

    def disturb(bar: int, candles: list[Candle]) -> list[Candle]:
        """Two bars of CCCUSDT in forty do not come, and the exchange does not answer for them until later."""
        exchange.failing = bar % 40 in range(7, 12)
        return [candle for candle in candles if bar % 40 not in (7, 8) or candle.symbol != "CCCUSDT"]

    if troubled:
        exchange.edit = disturb
    feed = exchange.feed(
        first_ms,
        history_ms=history.start_ms(first_ms),
        block_bars=8,
        last_ms=BEGIN + last_bar * STEP,
    )
    asyncio.run(run_session(feed, trader, STEP, lambda bar: None))


_filled: dict[DatabaseAddress, DatabaseAddress] = {}


def filled_world(server: DatabaseAddress, folder: Path) -> DatabaseAddress:
    """A database of that server with everything in it, made once and gone with the server."""
    if server not in _filled:
        address = replace(server, name="bi_world")
        create_database(address)
        engine = open_engine(address)
        migrate(engine)
        fill(engine, folder)
        engine.dispose()
        _filled[server] = address
    return _filled[server]
