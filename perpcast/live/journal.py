"""What a session leaves in the database, bar by bar, and its state read back: the database is the trader's memory.

Ids are functions of what they name. All records of a bar are written in one transaction, so that a session killed
at any instant stands after a whole bar; continued, it leaves the rows that it would have left unkilled.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import count, takewhile
from typing import Any, Protocol

from perpcast.database import Database
from perpcast.database.journal import (
    EquityRecord,
    EventRecord,
    PositionRecord,
    PredictionRecord,
    Record,
    SignalRecord,
    read_equity,
    read_events,
    read_positions,
    write_journal,
)
from perpcast.decision import Decision, Taken
from perpcast.live.forecast import Forecast
from perpcast.live.paper import Entry, PaperFill, PaperPosition
from perpcast.market import Signal
from perpcast.timeframe import from_ms, to_ms


class Journal(Protocol):
    """The journal of all sessions; `database.journal` in the end."""

    def write(self, records: Sequence[Record]) -> None:
        """Writes all records or none, each once however often it is written."""
        ...

    def read_events(self, run: str) -> list[EventRecord]:
        """In their order."""
        ...

    def read_positions(self, run: str) -> list[PositionRecord]:
        """By entry time."""
        ...

    def read_equity(self, run: str) -> list[EquityRecord]:
        """Oldest first."""
        ...


@dataclass(frozen=True)
class OpenEntry:
    """A position that was open when the session stopped: its entry, and the bar that it entered on."""

    entry: Entry
    entry_ms: int
    bars_held: int
    targets_filled: int


@dataclass(frozen=True)
class SessionState:
    """Where a session stands: everything that the next bar depends on."""

    first_ms: int  # its first bar
    next_ms: int  # the next bar to be processed
    events: int  # written so far
    balance: float
    peak_equity: float
    waiting: tuple[Entry, ...] = ()
    open: tuple[OpenEntry, ...] = ()


def signal_id(run: str, signal: Signal) -> str:
    """Unique for run, symbol, bar, side and source."""
    return f"{run}/{signal.symbol}/{signal.open_time_ms}/{signal.side}/{signal.source}"


def position_id(run: str, signal: Signal) -> str:
    """Unique for run, symbol and signal bar: there is never more than one."""
    return f"{run}/{signal.symbol}/{signal.open_time_ms}"


class DatabaseJournal:
    """The journal in the database."""

    def __init__(self, engine: Database) -> None:
        self._engine = engine

    def write(self, records: Sequence[Record]) -> None:
        """Writes all records in one transaction."""
        write_journal(self._engine, records)

    def read_events(self, run: str) -> list[EventRecord]:
        """In their order."""
        return read_events(self._engine, run)

    def read_positions(self, run: str) -> list[PositionRecord]:
        """By entry time."""
        return read_positions(self._engine, run)

    def read_equity(self, run: str) -> list[EquityRecord]:
        """Oldest first."""
        return read_equity(self._engine, run)


def sessions(journal: Journal, prefix: str) -> list[str]:
    """The names of the sessions `prefix-1`, `prefix-2`, … that were begun, oldest first."""
    names = takewhile(journal.read_events, (f"{prefix}-{number}" for number in count(1)))
    return list(names)


def choose_session(journal: Journal, prefix: str, terms: Mapping[str, Any], now_ms: int, bars: int | None) -> str:
    """The name of the session to carry on, else of a new one.

    The last one goes on where it ran under the same terms, did not begin after `now_ms`, and has not all its `bars`.
    """
    begun = sessions(journal, prefix)
    following = f"{prefix}-{len(begun) + 1}"
    if not begun:
        return following
    detail, done = journal.read_events(begun[-1])[0].detail, len(journal.read_equity(begun[-1]))
    same = all(detail.get(key) == value for key, value in terms.items())
    unfinished = bars is None or done < bars
    return begun[-1] if same and unfinished and detail["first_open_time_ms"] <= now_ms else following


class SessionJournal:
    """One run's records, its events numbered in their order."""

    def __init__(self, journal: Journal, run: str) -> None:
        self._journal, self.run = journal, run
        self._events = 0
        self._records: list[Record] = []

    def begin(self, first_ms: int, balance: float, terms: Mapping[str, Any]) -> SessionState:
        """A new session from the bar `first_ms` on, or where the one of this name stands.

        `terms` are what its results depend on, as JSON, `step_ms` among them; they are the session's first event.
        """
        events = self._journal.read_events(self.run)
        if not events:
            self.event(first_ms, "session", None, {"first_open_time_ms": first_ms, **terms})
            self.commit()
            return SessionState(first_ms, first_ms, 1, balance, balance)
        self._events = len(events)
        began_ms = int(events[0].detail["first_open_time_ms"])
        return self._read_state(began_ms, int(terms["step_ms"]), balance, events)

    def _read_state(self, first_ms: int, step_ms: int, balance: float, events: list[EventRecord]) -> SessionState:
        equity = self._journal.read_equity(self.run)
        positions = {record.position_id: record for record in self._journal.read_positions(self.run)}
        entries = {e.detail["position_id"]: _entry(e.detail) for e in events if e.kind == "entry"}
        cancelled = {e.detail["position_id"] for e in events if e.kind == "entry_cancelled"}
        return SessionState(
            first_ms=first_ms,
            next_ms=to_ms(equity[-1].time) + step_ms if equity else first_ms,
            events=len(events),
            balance=equity[-1].balance if equity else balance,
            peak_equity=max([balance, *(record.equity for record in equity)]),
            waiting=tuple(entry for id_, entry in entries.items() if id_ not in positions and id_ not in cancelled),
            open=tuple(
                OpenEntry(entries[id_], to_ms(record.entry_time), record.bars_held, record.targets_filled)
                for id_, record in positions.items()
                if record.exit_time is None
            ),
        )

    def decision(self, decision: Decision) -> None:
        """A signal and what was decided; for a taken one also the intent to enter, with its quantity."""
        signal = decision.signal
        taken = isinstance(decision, Taken)
        self._records.append(
            SignalRecord(
                signal_id=signal_id(self.run, signal),
                run=self.run,
                symbol=signal.symbol,
                open_time=from_ms(signal.open_time_ms),
                side=signal.side,
                score=signal.score,
                source=signal.source,
                decision="taken" if taken else "refused",
                reason=None if isinstance(decision, Taken) else decision.reason,
            )
        )
        if isinstance(decision, Taken):
            self.event(
                signal.open_time_ms,
                "entry",
                signal.symbol,
                {
                    "position_id": position_id(self.run, signal),
                    "signal_id": signal_id(self.run, signal),
                    "symbol": signal.symbol,
                    "side": signal.side,
                    "quantity": str(decision.quantity),
                    "signal_ms": signal.open_time_ms,
                },
            )

    def predictions(self, forecast: Forecast, model_id: str) -> None:
        """What the model said of every symbol at a bar, traded or not."""
        for row, symbol in enumerate(forecast.symbols):
            outputs = {name: float(values[row]) for name, values in forecast.outputs.items()}
            self._records.append(PredictionRecord(model_id, symbol, from_ms(forecast.open_time_ms), **outputs))

    def entry_of(self, decision: Taken) -> Entry:
        """The entry of a taken signal, as it would be read back."""
        signal = decision.signal
        return Entry(
            position_id(self.run, signal),
            signal_id(self.run, signal),
            signal.symbol,
            signal.side,
            decision.quantity,
            signal.open_time_ms,
        )

    def fill(self, bar_ms: int, fill: PaperFill) -> None:
        """An exit of a position, as an event of the bar in which it was processed."""
        self.event(
            bar_ms,
            "fill",
            fill.symbol,
            {
                "position_id": fill.position_id,
                "open_time_ms": fill.open_time_ms,
                "quantity": str(fill.quantity),
                "price": fill.price,
                "maker": fill.maker,
                "why": fill.why,
                "pnl": fill.pnl,
            },
        )

    def position(self, position: PaperPosition) -> None:
        """A position as it stands now."""
        trade, entry = position.trade, position.entry
        closed = position.exit_ms is not None
        self._records.append(
            PositionRecord(
                position_id=entry.position_id,
                run=self.run,
                signal_id=entry.signal_id,
                symbol=entry.symbol,
                side=entry.side,
                entry_time=from_ms(position.entry_ms),
                entry_price=trade.entry_price,
                quantity=float(entry.quantity),
                leverage=float(position.leverage),
                stop_loss=trade.stop_level,
                remaining_fraction=float(position.remaining / entry.quantity),
                targets_filled=trade.targets_filled,
                bars_held=trade.bars_held,
                realized_pnl=position.realized_pnl,
                exit_time=None if position.exit_ms is None else from_ms(position.exit_ms),
                exit_reason=position.exit_reason if closed else None,
                realized_return=trade.expected_return if closed else None,
            )
        )

    def equity(self, bar_ms: int, equity: float, balance: float, unrealized_pnl: float, open_positions: int) -> None:
        """Equity at the bar's close; the row that says that the bar is done."""
        self._records.append(EquityRecord(self.run, from_ms(bar_ms), equity, balance, unrealized_pnl, open_positions))

    def event(self, bar_ms: int, kind: str, symbol: str | None, detail: Mapping[str, Any]) -> None:
        """Anything worth keeping."""
        self._records.append(EventRecord(self.run, self._events, from_ms(bar_ms), kind, symbol, detail))
        self._events += 1

    def commit(self) -> None:
        """Writes what was recorded since the last time, in one transaction."""
        self._journal.write(self._records)
        self._records = []


def _entry(detail: Mapping[str, Any]) -> Entry:
    values = {key: detail[key] for key in ("position_id", "signal_id", "symbol", "side", "signal_ms")}
    return Entry(**values, quantity=Decimal(detail["quantity"]))
