"""One bar, from its candles to its records: positions first, then equity, forecast, decisions, and the commit."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from perpcast.backtest import EntrySizer
from perpcast.decision import Taken, decide, signals_from_returns
from perpcast.errors import DataError, PerpcastError
from perpcast.exit_policy import ExitPolicy
from perpcast.live.feed import ClosedBar
from perpcast.live.forecast import Forecast, Forecaster
from perpcast.live.history import CandleHistory
from perpcast.live.journal import SessionJournal, SessionState
from perpcast.live.paper import PaperAccount
from perpcast.market import Candle, Instrument, Side
from perpcast.sizing import Sizing
from perpcast.timeframe import format_time


@dataclass(frozen=True)
class Rules:
    """By what a session trades."""

    source: str  # of its signals: the model's id
    threshold: float
    policies: Mapping[Side, ExitPolicy]
    sizing: Sizing
    max_positions: int
    max_drawdown: float  # fraction of the highest equity; below it there are no entries


@dataclass(frozen=True)
class BarSummary:
    """What a bar brought, for whoever watches."""

    open_time_ms: int
    predicted: int
    entries: int
    exits: int
    open_positions: int
    equity: float


class Trader:
    """Applies closed bars in their order; after each its journal is committed, so that it can stop anywhere."""

    def __init__(
        self,
        rules: Rules,
        instruments: Mapping[str, Instrument],
        forecaster: Forecaster,
        history: CandleHistory,
        journal: SessionJournal,
        state: SessionState,
        step_ms: int,
    ) -> None:
        self._rules, self._instruments = rules, dict(instruments)
        self._forecaster, self._history, self._journal = forecaster, history, journal
        self._step_ms, self._state = step_ms, state
        self._peak_equity = state.peak_equity
        steps = {symbol: instrument.qty_step for symbol, instrument in instruments.items()}
        self.account = PaperAccount(state.balance, rules.policies, rules.sizing, steps, step_ms)
        self.account.waiting = {entry.symbol: entry for entry in state.waiting}
        self._unrestored = {open_.entry.symbol: open_ for open_ in state.open}

    def apply(self, bars: Sequence[ClosedBar], expired: frozenset[int] = frozenset()) -> Iterator[BarSummary]:
        """Processes consecutive bars. Signals of bars in `expired` (by open time) came too late to be entered."""
        self._history.forget(bars[0].open_time_ms)
        for bar in bars:
            self._history.append(bar.candles)
        for cell_ms, cell in groupby(bars, lambda bar: self._history.cell_ms(bar.open_time_ms)):
            together = list(cell)
            first_ms, last_ms = self._history.start_ms(cell_ms), together[-1].open_time_ms
            histories = {s: self._history.series(s, first_ms, last_ms) for s in self._instruments}
            forecasts = self._forecaster.forecast(histories, [(bar.open_time_ms, bar.present) for bar in together])
            for bar, forecast in zip(together, forecasts, strict=True):
                yield self._apply(bar, forecast, bar.open_time_ms in expired)

    def _apply(self, bar: ClosedBar, forecast: Forecast, expired: bool) -> BarSummary:
        now = bar.open_time_ms
        exits = sum([self._apply_candles(now, symbol, bar.candles[symbol]) for symbol in sorted(bar.candles)])
        if self._unrestored:
            raise PerpcastError(
                f"no candles of {', '.join(sorted(self._unrestored))}, which have open positions: "
                "run the same command again to continue the session"
            )
        account = self.account
        equity = account.equity
        self._peak_equity = max(self._peak_equity, equity)
        halted = "bar came too late" if expired else self._drawdown(equity)
        decisions = decide(
            signals_from_returns(forecast.outputs, forecast.symbols, now, self._rules.source),
            threshold=self._rules.threshold,
            occupied=account.occupied,
            max_positions=self._rules.max_positions,
            size=self._sizer(equity, {symbol: new[-1].close for symbol, new in bar.candles.items()}),
            halted=halted,
        )
        self._journal.predictions(forecast, self._rules.source)
        for decision in decisions:
            self._journal.decision(decision)
            if isinstance(decision, Taken):
                account.waiting[decision.signal.symbol] = self._journal.entry_of(decision)
        if forecast.missing:
            self._journal.event(now, "not_predicted", None, dict(sorted(forecast.missing.items())))
        for failure in bar.failures:
            self._journal.event(now, "fetch_failed", None, {"message": failure})
        open_positions = len(account.positions)
        self._journal.equity(now, equity, account.balance, account.unrealized_pnl, open_positions)
        self._journal.commit()
        entries = sum(isinstance(decision, Taken) for decision in decisions)
        return BarSummary(now, len(forecast.symbols), entries, exits, open_positions, equity)

    def _apply_candles(self, now: int, symbol: str, candles: Sequence[Candle]) -> int:
        """Entries, exits and position of one symbol; returns the number of positions that ended."""
        if symbol in self._unrestored:
            self._restore(symbol, candles)
        exits = 0
        for candle in candles:
            if candle.open_time_ms < self._state.next_ms:
                continue  # history, from before the session or before it was interrupted
            if candle.open_time_ms < now:
                self._journal.event(now, "late_candle", symbol, {"open_time_ms": candle.open_time_ms})
            position = self.account.positions.get(symbol)
            missing_before = position.missing_bars if position else 0
            outcome = self.account.apply_candle(candle)
            position = outcome.opened[0] if outcome.opened else position
            for entry in outcome.cancelled:
                detail = {"position_id": entry.position_id, "reason": "the bar to enter on never came"}
                self._journal.event(now, "entry_cancelled", symbol, detail)
            for fill in outcome.fills:
                self._journal.fill(now, fill)
            if position is None:
                continue
            if position.missing_bars > missing_before:
                missed = {"position_id": position.entry.position_id, "bars": position.missing_bars - missing_before}
                self._journal.event(now, "bars_missing", symbol, missed)
            self._journal.position(position)
            exits += position.trade.closed
        return exits

    def _restore(self, symbol: str, candles: Sequence[Candle]) -> None:
        """Carries a position that was open at the interruption up to there again, and checks that it is the same."""
        open_ = self._unrestored.pop(symbol)
        since = [c for c in candles if open_.entry_ms <= c.open_time_ms < self._state.next_ms]
        position = (
            self.account.restore(open_.entry, since) if since and since[0].open_time_ms == open_.entry_ms else None
        )
        found = None if position is None else (position.trade.bars_held, position.trade.targets_filled)
        if found != (open_.bars_held, open_.targets_filled):
            raise DataError(
                f"position {open_.entry.position_id} entered at {format_time(open_.entry_ms)}: expected "
                f"(bars held, targets filled) {(open_.bars_held, open_.targets_filled)} from the exchange's candles, "
                f"received {found}; they are not those it was opened on: is this the exchange of the session?"
            )

    def _drawdown(self, equity: float) -> str:
        lost = 1 - equity / self._peak_equity
        return "max_drawdown reached" if lost >= self._rules.max_drawdown else ""

    def _sizer(self, equity: float, closes: Mapping[str, float]) -> EntrySizer:
        free = self.account.free_margin - float(self._rules.sizing.margin(equity)) * len(self.account.waiting)
        return EntrySizer(self._rules.sizing, self._rules.policies, self._instruments, equity, closes, free)
