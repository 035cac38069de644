"""Candles, gaps, funding and instruments: what the exchange told us, by symbol. Every write can be run twice."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime

import numpy as np
from sqlalchemy import Engine, Table, delete, func, select, text
from sqlalchemy.dialects.postgresql import insert

from perpcast.database.binary_copy import Block, copy_in, copy_out
from perpcast.database.schema import candle_gaps, funding_rates, instruments, raw_market_data
from perpcast.market import CandleSeries, FundingRate, Instrument
from perpcast.timeframe import from_ms, to_ms

_PRICES = ("open", "high", "low", "close", "volume", "turnover")
_BLOCKS = (Block(("open_time",), "time"), Block(_PRICES, "double"))

_UPSERT = text(
    "INSERT INTO raw_market_data SELECT * FROM incoming_candles ORDER BY open_time "
    "ON CONFLICT (symbol, open_time) DO UPDATE SET "
    + ", ".join(f"{name} = excluded.{name}" for name in _PRICES)
    + " WHERE ("
    + ", ".join(f"raw_market_data.{name}" for name in _PRICES)
    + ") IS DISTINCT FROM ("
    + ", ".join(f"excluded.{name}" for name in _PRICES)
    + ")"
)


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


def upsert_candles(engine: Engine, symbol: str, candles: CandleSeries) -> int:
    """Stores the bars of one symbol in one transaction; bars already there take the new values.

    Returns how many rows were new or changed. Raises sqlalchemy.exc.IntegrityError for a candle that cannot be.
    """
    if not len(candles):
        return 0
    prices = np.column_stack([getattr(candles, name) for name in _PRICES])
    with engine.begin() as connection:
        connection.execute(
            text("CREATE TEMPORARY TABLE IF NOT EXISTS incoming_candles (LIKE raw_market_data) ON COMMIT DELETE ROWS")
        )
        copy_in(
            connection, "incoming_candles", [("symbol", symbol)], _BLOCKS, (candles.open_time_ms, prices), (None, None)
        )
        return connection.execute(_UPSERT).rowcount


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
    with engine.begin() as connection:
        connection.execute(delete(candle_gaps).where(candle_gaps.c.symbol == symbol))
        if rows:
            connection.execute(candle_gaps.insert(), rows)


def read_candle_gaps(engine: Engine, symbol: str | None = None) -> list[CandleGap]:
    """The recorded gaps, of one symbol or of all, by symbol and time."""
    query = select(candle_gaps).order_by(candle_gaps.c.symbol, candle_gaps.c.first_missing)
    if symbol is not None:
        query = query.where(candle_gaps.c.symbol == symbol)
    with engine.connect() as connection:
        rows = connection.execute(query).all()
    return [CandleGap(row.symbol, to_ms(row.first_missing), row.bars, row.cause, row.reason) for row in rows]


def upsert_funding_rates(engine: Engine, rates: Iterable[FundingRate]) -> None:
    """Stores funding payments; those already there take the new rate."""
    rows = [{"symbol": rate.symbol, "funding_time": from_ms(rate.funding_time_ms), "rate": rate.rate} for rate in rates]
    if not rows:
        return
    statement = insert(funding_rates)
    statement = statement.on_conflict_do_update(
        index_elements=["symbol", "funding_time"], set_={"rate": statement.excluded.rate}
    )
    with engine.begin() as connection:
        connection.execute(statement, rows)


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
            "fetched_at": fetched_at,
        }
        for instrument in found
    ]
    if not rows:
        return
    statement = insert(instruments)
    new = {column.name: column for column in statement.excluded if column.name != "symbol"}
    with engine.begin() as connection:
        connection.execute(statement.on_conflict_do_update(index_elements=["symbol"], set_=new), rows)


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
        )
        for row in rows
    }
