"""The trader's journal: signals, positions, equity and events of a run. Ids come from the caller and are functions of
what they name, so that a step that is written again leaves one row."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from itertools import groupby
from typing import Any
from zlib import crc32

from sqlalchemy import Connection, Engine, Table, func, select
from sqlalchemy.dialects.postgresql import insert

from perpcast.database.schema import equity, events, model_predictions, positions, signals
from perpcast.market import Side


@dataclass(frozen=True)
class SignalRecord:
    """A signal and what was decided about it (`taken`, or `refused` with its reason)."""

    signal_id: str
    run: str
    symbol: str
    open_time: datetime
    side: Side
    score: float
    source: str
    decision: str
    reason: str | None = None


@dataclass(frozen=True)
class PositionRecord:
    """A position as it stands; `exit_time` None while it is open. `exit_reason` is an index into EXIT_REASONS."""

    position_id: str
    run: str
    signal_id: str | None
    symbol: str
    side: Side
    entry_time: datetime
    entry_price: float
    quantity: float
    leverage: float
    stop_loss: float
    remaining_fraction: float = 1.0
    targets_filled: int = 0
    bars_held: int = 0
    realized_pnl: float = 0.0
    exit_time: datetime | None = None
    exit_reason: int | None = None
    realized_return: float | None = None


@dataclass(frozen=True)
class EquityRecord:
    """Equity at a bar's close."""

    run: str
    time: datetime
    equity: float
    balance: float
    unrealized_pnl: float
    open_positions: int


@dataclass(frozen=True)
class EventRecord:
    """Anything worth keeping; `number` counts within the run."""

    run: str
    number: int
    time: datetime
    kind: str
    symbol: str | None
    detail: Mapping[str, Any]


@dataclass(frozen=True)
class PredictionRecord:
    """What a model said of a symbol at a bar; None for what its task does not tell."""

    model_id: str
    symbol: str
    open_time: datetime
    buy_mean: float
    sell_mean: float
    buy_q50: float | None = None
    buy_q75: float | None = None
    buy_q90: float | None = None
    sell_q50: float | None = None
    sell_q75: float | None = None
    sell_q90: float | None = None
    buy_profit_probability: float | None = None
    sell_profit_probability: float | None = None


Record = SignalRecord | PositionRecord | EquityRecord | EventRecord | PredictionRecord
_TABLES: dict[type, Table] = {
    SignalRecord: signals,
    PositionRecord: positions,
    EquityRecord: equity,
    EventRecord: events,
    PredictionRecord: model_predictions,
}
_HISTORY = (signals, events, model_predictions)  # append-only: what is written stays


def write_journal(engine: Engine, records: Iterable[Record]) -> None:
    """Writes records in the order given, all of them or none.

    Signals, events and predictions are kept as first written; positions and equity take the newest values. Raises
    sqlalchemy.exc.IntegrityError where a symbol had two open positions.
    """
    with engine.begin() as connection:
        for kind, alike in groupby(records, type):
            names = [field.name for field in fields(kind)]
            rows = [{name: getattr(record, name) for name in names} for record in alike]
            _write(connection, _TABLES[kind], rows)


def lock_events(connection: Connection, run: str) -> None:
    """Until this transaction ends, no other one that asks for this lock goes on: a run's events come one by one."""
    connection.execute(select(func.pg_advisory_xact_lock(crc32(f"events of {run}".encode()))))


def append_event(connection: Connection, run: str, time: datetime, kind: str, detail: Mapping[str, Any]) -> None:
    """Adds an event within the caller's transaction, under the next number of a run that has no writer of its own."""
    lock_events(connection, run)
    newest = connection.execute(select(func.max(events.c.number)).where(events.c.run == run)).scalar_one()
    number = 0 if newest is None else newest + 1
    connection.execute(
        events.insert().values(run=run, number=number, time=time, kind=kind, symbol=None, detail=dict(detail))
    )


def read_signals(engine: Engine, run: str) -> list[SignalRecord]:
    """The signals of a run, by time, symbol and side."""
    order = (signals.c.open_time, signals.c.symbol, signals.c.side)
    return [SignalRecord(**row) for row in _read(engine, signals, run, order)]


def read_positions(engine: Engine, run: str, *, open_only: bool = False) -> list[PositionRecord]:
    """The positions of a run, by entry time and symbol."""
    rows = _read(engine, positions, run, (positions.c.entry_time, positions.c.symbol))
    return [PositionRecord(**row) for row in rows if not open_only or row["exit_time"] is None]


def read_equity(engine: Engine, run: str) -> list[EquityRecord]:
    """The equity of a run, oldest first."""
    return [EquityRecord(**row) for row in _read(engine, equity, run, (equity.c.time,))]


def read_events(engine: Engine, run: str) -> list[EventRecord]:
    """The events of a run, in their order."""
    return [EventRecord(**row) for row in _read(engine, events, run, (events.c.number,))]


def _write(connection: Connection, table: Table, rows: list[dict[str, Any]]) -> None:
    """Many rows in one round trip: a bar of twelve symbols writes dozens."""
    statement = insert(table)
    keys = [column.name for column in table.primary_key]
    if table in _HISTORY:
        connection.execute(statement.on_conflict_do_nothing(index_elements=keys), rows)
        return
    # One statement may touch a row once: of two states of a position the later one counts.
    rows = list({tuple(row[key] for key in keys): row for row in rows}.values())
    new = {name: statement.excluded[name] for name in rows[0] if name not in keys}
    connection.execute(statement.on_conflict_do_update(index_elements=keys, set_=new), rows)


def _read(engine: Engine, table: Table, run: str, order: tuple[Any, ...]) -> list[Any]:
    with engine.connect() as connection:
        return list(connection.execute(select(table).where(table.c.run == run).order_by(*order)).mappings())
