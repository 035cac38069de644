"""Candles, gaps, funding and instruments: what the exchange told us, by symbol. Every write can be run twice."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np
import psycopg2.errors
from sqlalchemy import Connection, Engine, Table, delete, func, select, text
from sqlalchemy.dialects.postgresql import insert

from perpcast.database.binary_copy import Block, copy_in, copy_out
from perpcast.database.engine import transact
from perpcast.database.schema import candle_gaps, candle_revisions, funding_rates, instruments, raw_market_data
from perpcast.kill_point import kill_point
from perpcast.market import FLAT_RUN_BARS, CandleSeries, FundingRate, Instrument
from perpcast.timeframe import from_ms, to_ms

_PRICES = ("open", "high", "low", "close", "volume", "turnover")
_BLOCKS = (Block(("open_time",), "time"), Block(_PRICES, "double"))
_RATE_BLOCKS = (Block(("funding_time",), "time"), Block(("rate",), "double"))

_OLD = ", ".join(f"old.{name}" for name in _PRICES)
_NEW = ", ".join(f"new.{name}" for name in _PRICES)

# What a candle was and what it became: nothing that was stored changes without a trace.
_NOTE_REVISIONS = text(
    f"INSERT INTO candle_revisions SELECT symbol, open_time, clock_timestamp(), {_OLD}, {_NEW} "
    "FROM raw_market_data old JOIN incoming_candles new USING (symbol, open_time) "
    f"WHERE ({_OLD}) IS DISTINCT FROM ({_NEW}) RETURNING open_time"
)
_UPSERT = text(
    "INSERT INTO raw_market_data AS old SELECT * FROM incoming_candles ORDER BY open_time "
    "ON CONFLICT (symbol, open_time) DO UPDATE SET "
    + ", ".join(f"{name} = excluded.{name}" for name in _PRICES)
    + f" WHERE ({_OLD}) IS DISTINCT FROM ("
    + ", ".join(f"excluded.{name}" for name in _PRICES)
    + ")"
)

_AFTER_INSERT = kill_point("dl.after_insert")


@dataclass(frozen=True, slots=True)
class CandleSpan:
    """What the database holds of one symbol: first and last bar, and how many."""

    first_ms: int
    last_ms: int
    count: int


@dataclass(frozen=True, slots=True)
class CandleGap:
    """A stretch of missing or uncounted bars; `cause` is one of `schema.GAP_CAUSES`."""

    symbol: str
    first_missing_ms: int
    bars: int
    cause: str
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class StoredCandles:
    """What a write did: how many bars were new, and the opens of those that had other values before."""

    new: int
    revised_ms: tuple[int, ...]


def upsert_candles(engine: Engine, symbol: str, candles: CandleSeries) -> StoredCandles:
    """Stores the bars of one symbol in one transaction; bars already there take the new values.

    What a bar was before it was revised is kept in `candle_revisions`. Raises psycopg2's IntegrityError for a
    candle that cannot be.
    """
    if not len(candles):
        return StoredCandles(0, ())
    prices = np.column_stack([getattr(candles, name) for name in _PRICES])

    def copy(connection: Connection, table: str) -> None:
        copy_in(connection, table, [("symbol", symbol)], _BLOCKS, (candles.open_time_ms, prices), (None, None))

    def insert_new(connection: Connection) -> StoredCandles:
        copy(connection, raw_market_data.name)
        _AFTER_INSERT()
        return StoredCandles(len(candles), ())

    def merge(connection: Connection) -> StoredCandles:
        connection.execute(
            text("CREATE TEMPORARY TABLE IF NOT EXISTS incoming_candles (LIKE raw_market_data) ON COMMIT DELETE ROWS")
        )
        copy(connection, "incoming_candles")
        revised = connection.execute(_NOTE_REVISIONS).scalars().all()
        written = connection.execute(_UPSERT).rowcount
        _AFTER_INSERT()
        return StoredCandles(written - len(revised), tuple(sorted(map(to_ms, revised))))

    try:
        return transact(engine, insert_new)  # nearly always: what is missing was asked for; twice as fast
    except psycopg2.errors.UniqueViolation:
        return transact(engine, merge)


def read_candle_revisions(engine: Engine, symbol: str) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """The latest revision of each revised bar by its open in ms: prices, volume and turnover [6] before and after."""
    query = select(candle_revisions).where(candle_revisions.c.symbol == symbol).order_by(candle_revisions.c.noticed_at)
    with engine.connect() as connection:
        rows = connection.execute(query).all()
    return {to_ms(row.open_time): (np.array(row[3:9]), np.array(row[9:15])) for row in rows}


def read_candles(engine: Engine, symbol: str, start_ms: int | None = None, end_ms: int | None = None) -> CandleSeries:
    """The bars of one symbol, oldest first, from `start_ms` up to but without `end_ms`; None is unbounded."""
    with engine.connect() as connection:
        open_time_ms, prices = copy_out(connection, raw_market_data, {"symbol": symbol}, _BLOCKS, start_ms, end_ms)
    return CandleSeries(open_time_ms, *(np.ascontiguousarray(column, np.float64) for column in prices.T))


def read_candle_spans(engine: Engine) -> dict[str, CandleSpan]:
    """What is stored, by symbol."""
    return read_spans(engine, raw_market_data)


def read_spans(engine: Engine, table: Table) -> dict[str, CandleSpan]:
    """What a table of bars, keyed by symbol and open time, holds of each symbol."""
    bar = table.c
    query = select(bar.symbol, func.min(bar.open_time), func.max(bar.open_time), func.count()).group_by(bar.symbol)
    with engine.connect() as connection:
        rows = connection.execute(query.order_by(bar.symbol)).all()
    return {symbol: CandleSpan(to_ms(first), to_ms(last), count) for symbol, first, last, count in rows}


@dataclass(frozen=True, slots=True)
class CandleMonth:
    """The candles of one symbol that open in one month of UTC: how many, and a digest that any change would change."""

    month_ms: int
    candles: int
    digest: int


def read_candle_months(engine: Engine) -> dict[str, list[CandleMonth]]:
    """What is stored, by symbol and month, oldest first."""
    query = text(
        "SELECT symbol, date_trunc('month', open_time) AS month, count(*), "
        "bit_xor(hash_record_extended(ROW(open_time, open, high, low, close, volume), 0)) "
        "FROM raw_market_data GROUP BY 1, 2 ORDER BY 1, 2"
    )
    months: dict[str, list[CandleMonth]] = {}
    with engine.connect() as connection:
        for symbol, month, count, digest in connection.execute(query):
            months.setdefault(symbol, []).append(CandleMonth(to_ms(month), count, digest))
    return months


def read_missing_ranges(engine: Engine, symbol: str, start_ms: int, end_ms: int, step_ms: int) -> list[tuple[int, int]]:
    """Stretches [first, end) of milliseconds without a bar in [`start_ms`, `end_ms`), holes and both ends alike.

    Both bounds are opens of bars, `step_ms` apart from their neighbours.
    """
    query = text(
        "SELECT open_time FROM raw_market_data WHERE symbol = :symbol AND open_time >= :start AND open_time < :end "
        "ORDER BY open_time"
    )
    bounds = {"symbol": symbol, "start": from_ms(start_ms), "end": from_ms(end_ms)}
    holes = text(
        f"WITH bars AS ({query}), "
        "steps AS (SELECT open_time, lag(open_time) OVER (ORDER BY open_time) AS before FROM bars) "
        "SELECT before, open_time FROM steps "
        "WHERE before IS NULL OR open_time - before > make_interval(secs => :step_seconds) "
        "UNION ALL SELECT max(open_time), NULL FROM bars ORDER BY 1 NULLS FIRST"
    )
    with engine.connect() as connection:
        rows = connection.execute(holes, {**bounds, "step_seconds": step_ms / 1000}).all()
    ranges = [
        (start_ms if before is None else to_ms(before) + step_ms, end_ms if after is None else to_ms(after))
        for before, after in rows
    ]
    return sorted({(first, end) for first, end in ranges if first < end})


def read_flat_runs(engine: Engine) -> dict[str, list[tuple[int, int]]]:
    """First and last open in ms of each run of FLAT_RUN_BARS or more stored bars with high = low and no volume.

    By symbol; a symbol without such runs is absent.
    """
    query = text(
        "WITH suspects AS (SELECT symbol FROM raw_market_data WHERE high = low AND volume = 0 "
        "GROUP BY symbol HAVING count(*) >= :bars), "
        "bars AS (SELECT symbol, open_time, high = low AND volume = 0 AS flat, "
        "row_number() OVER (PARTITION BY symbol ORDER BY open_time) AS row "
        "FROM raw_market_data WHERE symbol IN (SELECT symbol FROM suspects)), "
        "flats AS (SELECT symbol, open_time, row - row_number() OVER (PARTITION BY symbol ORDER BY open_time) AS run "
        "FROM bars WHERE flat) "
        "SELECT symbol, min(open_time), max(open_time) FROM flats GROUP BY symbol, run HAVING count(*) >= :bars "
        "ORDER BY 1, 2"
    )
    runs: dict[str, list[tuple[int, int]]] = {}
    with engine.connect() as connection:
        for symbol, first, last in connection.execute(query, {"bars": FLAT_RUN_BARS}):
            runs.setdefault(symbol, []).append((to_ms(first), to_ms(last)))
    return runs


def replace_candle_gaps(engine: Engine, symbol: str, gaps: Sequence[CandleGap]) -> None:
    """Makes `gaps` all that is recorded of one symbol."""
    rows = [
        {
            "symbol": symbol,
            "first_missing": from_ms(gap.first_missing_ms),
            "bars": gap.bars,
            "cause": gap.cause,
            "reason": gap.reason,
        }
        for gap in gaps
    ]

    def replace(connection: Connection) -> None:
        connection.execute(delete(candle_gaps).where(candle_gaps.c.symbol == symbol))
        if rows:
            connection.execute(candle_gaps.insert(), rows)

    transact(engine, replace)


def read_candle_gaps(engine: Engine, symbol: str | None = None) -> list[CandleGap]:
    """The recorded gaps, of one symbol or of all, by symbol and time."""
    query = select(candle_gaps).order_by(candle_gaps.c.symbol, candle_gaps.c.first_missing)
    if symbol is not None:
        query = query.where(candle_gaps.c.symbol == symbol)
    with engine.connect() as connection:
        rows = connection.execute(query).all()
    return [CandleGap(row.symbol, to_ms(row.first_missing), row.bars, row.cause, row.reason) for row in rows]


def upsert_funding_rates(engine: Engine, rates: Iterable[FundingRate]) -> None:
    """Stores funding payments in one transaction; those already there take the new rate."""
    by_symbol: dict[str, list[FundingRate]] = {}
    for rate in rates:
        by_symbol.setdefault(rate.symbol, []).append(rate)
    if not by_symbol:
        return

    def merge(connection: Connection) -> None:
        connection.execute(
            text("CREATE TEMPORARY TABLE IF NOT EXISTS incoming_rates (LIKE funding_rates) ON COMMIT DELETE ROWS")
        )
        for symbol, own in by_symbol.items():
            times = np.array([rate.funding_time_ms for rate in own], np.int64)
            values = np.array([rate.rate for rate in own])
            copy_in(connection, "incoming_rates", [("symbol", symbol)], _RATE_BLOCKS, (times, values), (None, None))
        connection.execute(
            text(
                "INSERT INTO funding_rates SELECT * FROM incoming_rates ORDER BY symbol, funding_time "
                "ON CONFLICT (symbol, funding_time) DO UPDATE SET rate = excluded.rate"
            )
        )

    transact(engine, merge)


def read_funding_rates(
    engine: Engine, symbol: str, start_ms: int | None = None, end_ms: int | None = None
) -> list[FundingRate]:
    """Funding payments of one symbol, oldest first, from `start_ms` up to but without `end_ms`."""
    time = funding_rates.c.funding_time
    query = select(time, funding_rates.c.rate).where(funding_rates.c.symbol == symbol).order_by(time)
    if start_ms is not None:
        query = query.where(time >= from_ms(start_ms))
    if end_ms is not None:
        query = query.where(time < from_ms(end_ms))
    with engine.connect() as connection:
        return [FundingRate(symbol, to_ms(row.funding_time), row.rate) for row in connection.execute(query)]


def upsert_instruments(engine: Engine, found: Iterable[Instrument], fetched_at: datetime) -> None:
    """Stores the exchange's rules by symbol; the newest answer wins."""
    rows = [
        {
            "symbol": instrument.symbol,
            "status": instrument.status,
            "tick_size": instrument.tick_size,
            "qty_step": instrument.qty_step,
            "min_quantity": instrument.min_quantity,
            "min_notional": instrument.min_notional,
            "max_leverage": instrument.max_leverage,
            "launch_time": from_ms(instrument.launch_time_ms),
            "funding_interval_minutes": instrument.funding_interval_minutes,
            "delivery_time": None if instrument.delivery_time_ms is None else from_ms(instrument.delivery_time_ms),
            "fetched_at": fetched_at,
        }
        for instrument in found
    ]
    if not rows:
        return
    statement = insert(instruments)
    new = {column.name: column for column in statement.excluded if column.name != "symbol"}
    statement = statement.on_conflict_do_update(index_elements=["symbol"], set_=new)
    transact(engine, lambda connection: connection.execute(statement, rows))


def read_instruments(engine: Engine) -> dict[str, Instrument]:
    """The stored rules, by symbol."""
    with engine.connect() as connection:
        rows = connection.execute(select(instruments).order_by(instruments.c.symbol)).all()
    return {
        row.symbol: Instrument(
            symbol=row.symbol,
            status=row.status,
            tick_size=row.tick_size,
            qty_step=row.qty_step,
            min_quantity=row.min_quantity,
            min_notional=row.min_notional,
            max_leverage=row.max_leverage,
            launch_time_ms=to_ms(row.launch_time),
            funding_interval_minutes=row.funding_interval_minutes,
            delivery_time_ms=None if row.delivery_time is None else to_ms(row.delivery_time),
        )
        for row in rows
    }
