"""The account of a sequence of decisions: predictions over all symbols, traded by the exit policy, to the cent.

Decisions and sizes are those of `decision.py` and `sizing.py`, trades those of the label kernel; in between, a compiled
pass carries every open position from bar to bar. It does what the paper account does, and adds funding.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from decimal import Decimal
from functools import cached_property
from pathlib import Path

import numpy as np
from numba import njit

from perpcast import exit_policy
from perpcast.decision import Refused, Taken, decide
from perpcast.errors import DataError, MissingInputError
from perpcast.exit_policy import (
    BREAKEVEN,
    LOCK,
    NONE,
    PLAN_LEVEL,
    STOP,
    TAKE_PROFIT,
    ExitPolicy,
    compiled_rules,
    contribution,
    earned,
    set_bar,
    set_plan,
    walk_bars,
)
from perpcast.market import SIDES, CandleSeries, Instrument, Side, Signal
from perpcast.sizing import Sizing, entry_quantity, slice_quantities
from perpcast.timeframe import format_time


@dataclass(frozen=True)
class MarketPanel:
    """Candles and funding of all symbols on one grid of bars; a price is NaN where its candle is missing."""

    symbols: tuple[str, ...]
    open_time_ms: np.ndarray  # int64 [bars], every step, no hole
    step_ms: int
    open: np.ndarray  # float64 [symbols, bars], as the rest
    high: np.ndarray
    low: np.ndarray
    close: np.ndarray
    funding: np.ndarray  # rate settled at a bar's open, positive where longs pay; 0 where none

    @classmethod
    def build(
        cls,
        symbols: tuple[str, ...],
        candles: Mapping[str, CandleSeries],
        funding: Mapping[str, tuple[np.ndarray, np.ndarray]],
        first_ms: int,
        last_ms: int,
        step_ms: int,
    ) -> "MarketPanel":
        """The panel from the bar `first_ms` to the bar `last_ms`, both included.

        `funding` holds (times, rates) by symbol, absent where there is none; a rate belongs to the bar that holds its
        time, and several of one bar add up. Raises DataError for candles of another grid.
        """
        times = np.arange(first_ms, last_ms + step_ms, step_ms)
        prices = np.full((4, len(symbols), len(times)), np.nan)
        rates = np.zeros((len(symbols), len(times)))
        for row, symbol in enumerate(symbols):
            series = candles[symbol]
            inside = (series.open_time_ms >= first_ms) & (series.open_time_ms <= last_ms)
            place, off = np.divmod(series.open_time_ms[inside] - first_ms, step_ms)
            if off.any():
                raise DataError(
                    f"{symbol}: expected candles every {step_ms} ms from {format_time(first_ms)}, received others "
                    "in between; download them again"
                )
            for column, name in zip(prices, ("open", "high", "low", "close"), strict=True):
                column[row, place] = getattr(series, name)[inside]
            paid_ms, rate = funding.get(symbol, (np.empty(0, np.int64), np.empty(0)))
            bar = (np.asarray(paid_ms, np.int64) - first_ms) // step_ms
            known = (bar >= 0) & (bar < len(times))
            np.add.at(rates[row], bar[known], np.asarray(rate, np.float64)[known])
        opens, highs, lows, closes = prices
        return cls(tuple(symbols), times, step_ms, opens, highs, lows, closes, rates)

    @cached_property
    def present(self) -> np.ndarray:
        """True where there is a candle: bool [symbols, bars]. Prices that are not above 0 or infinite are none."""
        prices = (self.open, self.high, self.low, self.close)
        return np.logical_and.reduce([np.isfinite(column) & (column > 0) for column in prices])


@dataclass(frozen=True)
class Terms:
    """By what a sequence of predictions is traded."""

    threshold: float
    policies: Mapping[Side, ExitPolicy]
    sizing: Sizing
    max_positions: int
    max_drawdown: float  # fraction of the highest equity; below it there are no entries
    initial: float  # USDT


@dataclass(frozen=True)
class TradeTable:
    """Trades in order of their entry, then symbol: arrays [trades]. Money in USDT.

    What is still open at the end has `closed` False, `exit_ms` -1, reason `none` and NaN as `expected_return`.
    """

    symbol: np.ndarray  # int64, index into the account's symbols
    side: np.ndarray  # int64, index into SIDES
    signal_ms: np.ndarray  # int64
    entry_ms: np.ndarray  # int64
    exit_ms: np.ndarray  # int64, the bar in which it ended
    entry_price: np.ndarray  # float64, slippage included
    quantity: np.ndarray  # float64, base coins
    notional: np.ndarray  # float64, at the entry
    expected_return: np.ndarray  # float64, the label: a fraction of the notional, before funding and rounding
    pnl: np.ndarray  # float64, realised, net of fees and slippage, before funding
    fees: np.ndarray  # float64, paid
    funding: np.ndarray  # float64, received; below 0 where paid
    exit_reason: np.ndarray  # int64, index into EXIT_REASONS
    bars_held: np.ndarray  # int64
    targets_filled: np.ndarray  # int64
    closed: np.ndarray  # bool

    def __len__(self) -> int:
        return len(self.symbol)

    def __getitem__(self, rows: np.ndarray) -> "TradeTable":
        return TradeTable(*(getattr(self, field.name)[rows] for field in fields(self)))


@dataclass(frozen=True)
class Backtest:
    """An account over a panel, at the close of every bar [bars]; money in USDT, cumulated where it flows.

    At every bar equity = initial + realised - fees + funding + unrealised, and balance = equity - unrealised.
    """

    symbols: tuple[str, ...]
    open_time_ms: np.ndarray  # int64
    initial: float
    equity: np.ndarray
    balance: np.ndarray
    realised: np.ndarray  # of fills, slippage included, before fees
    fees: np.ndarray  # paid
    funding: np.ndarray  # received; below 0 where paid
    unrealised: np.ndarray  # of what is open, at the last close, before the exit's costs
    open_positions: np.ndarray  # int64
    trades: TradeTable
    refused: Mapping[str, int]  # signals that were not traded, by reason
    cancelled: int  # entries whose very bar never came


def backtest(
    market: MarketPanel,
    score: np.ndarray,
    instruments: Mapping[str, Instrument],
    terms: Terms,
    *,
    stop_slide: float = 0.0,
    entries_until: np.ndarray | None = None,
) -> Backtest:
    """The account that trades `score`: expected net returns, float64 [2 sides, symbols, bars], NaN where unknown.

    Signals of bar k enter at the open of bar k + 1; an entry whose bar is missing is cancelled. Equity is taken once,
    at the close of every bar. A bar that is missing while a position is open passes at the last close. Funding is paid
    on what is open before a bar's open, at that open: an entry at the same moment comes after it.

    `stop_slide` is a stress: stops fill this share of the way from where the policy fills them to their bar's adverse
    extreme. `entries_until` [bars] allows so many entries, cumulated, until each bar. Raises MissingInputError where a
    symbol has no instrument.
    """
    _check(market, score, instruments, terms)
    book = _Book(market, score, instruments, terms, stop_slide, entries_until)
    bar = 0
    while (bar := book.advance(bar)) < len(market.open_time_ms):
        book.decide(bar)
        bar += 1
    return book.result()


def buy_and_hold(market: MarketPanel, terms: Terms) -> Backtest:
    """The account that buys every symbol for an equal share of `initial` at its first bar and keeps it, unlevered.

    Slippage, the taker fee and funding are paid as by any long; quantities are not rounded.
    """
    present, column = market.present, np.arange(len(market.open_time_ms))
    bought = np.flatnonzero(present.any(axis=1))
    first = np.argmax(present[bought], axis=1)
    price = market.open[bought, first] * (1 + terms.policies["buy"].slippage)
    taker_fee = terms.policies["buy"].taker_fee
    quantity = terms.initial / len(market.symbols) / (1 + taker_fee) / price
    held, after = column >= first[:, None], column > first[:, None]
    # A missing bar stands at the last close, its funding too.
    last = np.maximum.accumulate(np.where(present[bought], column, 0), axis=1)
    close = np.where(held, market.close[bought[:, None], last], price[:, None])
    at = np.where(present[bought], market.open[bought], close)
    paid = np.where(after, market.funding[bought] * quantity[:, None] * at, 0.0)
    fee = quantity * price * taker_fee
    fees, funding = fee @ held, -np.cumsum(paid.sum(axis=0))
    unrealised, balance = quantity @ (close - price[:, None]), terms.initial - fees + funding
    return Backtest(
        symbols=market.symbols,
        open_time_ms=market.open_time_ms,
        initial=terms.initial,
        equity=balance + unrealised,
        balance=balance,
        realised=np.zeros(len(column)),
        fees=fees,
        funding=funding,
        unrealised=unrealised,
        open_positions=held.sum(axis=0),
        trades=_holdings(market, bought, first, price, quantity, fee, -paid.sum(axis=1)),
        refused={},
        cancelled=0,
    )


def _holdings(
    market: MarketPanel,
    symbol: np.ndarray,
    first: np.ndarray,
    price: np.ndarray,
    quantity: np.ndarray,
    fee: np.ndarray,
    funding: np.ndarray,
) -> TradeTable:
    """One buy of each symbol at its first bar, still open: arrays [bought]."""
    none = np.zeros(len(symbol), np.int64)
    entry_ms = market.open_time_ms[first]
    return TradeTable(
        symbol=symbol,
        side=none,
        signal_ms=entry_ms - market.step_ms,
        entry_ms=entry_ms,
        exit_ms=none - 1,
        entry_price=price,
        quantity=quantity,
        notional=quantity * price,
        expected_return=np.full(len(symbol), np.nan),
        pnl=-fee,
        fees=fee,
        funding=funding,
        exit_reason=none + NONE,
        bars_held=len(market.open_time_ms) - first,
        targets_filled=none,
        closed=none > 0,
    )


@dataclass
class EntrySizer:
    """Sizes the entries of one bar, best first; each ties up margin that the next does not have."""

    sizing: Sizing
    policies: Mapping[Side, ExitPolicy]
    instruments: Mapping[str, Instrument]
    equity: float
    closes: Mapping[str, float]  # of the signal bar
    free_margin: float

    def __call__(self, signal: Signal) -> Decimal | str:
        """The quantity, or why there is none."""
        margin = float(self.sizing.margin(self.equity))
        if margin > self.free_margin:
            return "not enough free margin"
        price, policy = self.closes[signal.symbol], self.policies[signal.side]
        lowest = price * (1 - (policy.stop if signal.side == "buy" else policy.take_profit))
        quantity = entry_quantity(self.sizing, self.equity, price, lowest, self.instruments[signal.symbol])
        if isinstance(quantity, Decimal):
            self.free_margin -= margin
        return quantity


# --- the book: what Python decides, between the bars that compiled code carries ---------------------------------------

# Why a signal was refused, where the compiled pass counts it; the words are those of `decide` and the trader.
_REFUSALS = ("not above the threshold", "position open", "max_positions reached", "max_drawdown reached")
_BELOW, _OPEN, _FULL, _HALTED = range(4)
_OTHER_SIDE = "the other side ranks higher"

# A trade from its decision on. Bars are indices into the panel; money is cumulated over the trade's life.
_TRADE = np.dtype(
    [
        ("symbol", np.int64),
        ("side", np.int64),
        ("signal_bar", np.int64),
        ("entry_bar", np.int64),  # -1 while it waits for its bar
        ("walked", np.int64),  # the last bar that it was carried through
        ("bars_held", np.int64),
        ("targets_filled", np.int64),
        ("exit_reason", np.int64),
        ("entry_price", np.float64),
        ("quantity", np.float64),
        ("notional", np.float64),
        ("last_close", np.float64),
        ("expected_return", np.float64),
        ("pnl", np.float64),
        ("fees", np.float64),
        ("funding", np.float64),
    ],
    align=True,
)
_CANCELLED = -1

# What a position's slices are once k of them are filled: the share of the quantity that the next level closes, the
# share that is still open, and that in base coins.
_SHARE, _SHARE_LEFT, _QUANTITY_LEFT = range(3)

# Columns of the ledger, one row a bar.
_BALANCE, _REALISED, _FEES, _FUNDING, _UNREALISED, _POSITIONS = range(6)

_LIMITS = np.dtype(
    [
        ("threshold", np.float64),
        ("max_positions", np.int64),
        ("max_drawdown", np.float64),
        ("stop_slide", np.float64),
    ],
    align=True,
)


class _Book:
    """All trades and the ledger of one account."""

    def __init__(
        self,
        market: MarketPanel,
        score: np.ndarray,
        instruments: Mapping[str, Instrument],
        terms: Terms,
        stop_slide: float,
        entries_until: np.ndarray | None,
    ) -> None:
        bars, symbols = len(market.open_time_ms), len(market.symbols)
        self._market, self._instruments, self._terms = market, instruments, terms
        self._score = np.where(np.isfinite(score) & market.present, score, np.nan)
        self._entries_until = np.full(bars, bars * symbols) if entries_until is None else entries_until
        self._by_name = np.array(sorted(range(symbols), key=market.symbols.__getitem__))
        self._rank = np.argsort(self._by_name)
        self._rules, self._steps = compiled_rules({side: terms.policies[side] for side in SIDES})
        limits = (terms.threshold, terms.max_positions, terms.max_drawdown, stop_slide)
        self._limits = np.array([limits], _LIMITS)
        self._trades, self._count = np.zeros(64, _TRADE), 0
        self._slot = np.full(symbols, -1)  # number of a symbol's trade, -1 where it has none
        self._plans = np.zeros((symbols, *self._steps.shape[1:]))
        self._slices = np.zeros((symbols, self._steps.shape[1], 3))
        self._ledger = np.zeros((bars + 1, 6))  # the row before the first bar comes last
        self._ledger[-1, _BALANCE] = terms.initial
        self._peak = np.array([terms.initial])
        self._counted = np.zeros(len(_REFUSALS), np.int64)
        self._refused: Counter[str] = Counter()

    def advance(self, bar: int) -> int:
        """Carries the account through `bar` and on, to the first bar that has something to decide."""
        market = self._market
        return int(
            _advance(
                bar,
                (market.open, market.high, market.low, market.close, market.funding),
                self._score,
                self._by_name,
                (self._rules, self._steps, self._limits),
                (self._entries_until, self._count),
                (self._trades, self._slot, self._plans, self._slices),
                (self._ledger, self._peak, self._counted),
            )
        )

    def decide(self, bar: int) -> None:
        """Decides on the signals of `bar` that are above the threshold and whose symbols are free."""
        score, terms = self._score[:, :, bar], self._terms
        side, symbol = np.nonzero((score > terms.threshold) & (self._slot < 0))
        order = np.lexsort((side, self._rank[symbol], -score[side, symbol]))
        side, symbol = side[order], symbol[order]
        held = np.flatnonzero(self._slot >= 0)
        places = min(terms.max_positions - len(held), int(self._entries_until[bar]) - self._count)
        names, now = self._market.symbols, int(self._market.open_time_ms[bar])

        def decisions_on(first: int) -> list[Taken | Refused]:
            pairs = list(zip(side[:first].tolist(), symbol[:first].tolist(), strict=True))
            return decide(
                [Signal(names[s], now, SIDES[d], float(score[d, s]), "") for d, s in pairs],
                threshold=terms.threshold,
                occupied=[names[s] for s in held],
                max_positions=len(held) + places,
                size=self._sizer(bar, held, symbol[:first]),
            )

        looked_at = min(2 * places + 2, len(side))  # ranked already: so many usually fill all places
        decisions = decisions_on(looked_at)
        if sum(isinstance(decision, Taken) for decision in decisions) < places:
            looked_at = len(side)
            decisions = decisions_on(looked_at)
        for decision in decisions:
            if isinstance(decision, Taken):
                self._place(bar, decision)
            else:
                self._refused[decision.reason] += 1
        taken = self._slot[symbol[looked_at:]] >= 0
        self._refused[_OTHER_SIDE] += int(taken.sum())
        self._refused[_REFUSALS[_FULL]] += int((~taken).sum())

    def _sizer(self, bar: int, held: np.ndarray, wanted: np.ndarray) -> EntrySizer:
        terms, names = self._terms, self._market.symbols
        equity = float(self._ledger[bar, _BALANCE] + self._ledger[bar, _UNREALISED])
        free = equity
        for symbol in held:
            trade = self._trades[self._slot[symbol]]
            if trade["entry_bar"] < 0:  # waits for a candle that is missing
                free -= float(terms.sizing.margin(equity))
            else:
                quantity = self._slices[symbol, trade["targets_filled"], _QUANTITY_LEFT]
                free -= quantity * trade["entry_price"] / terms.sizing.leverage
        closes = {names[symbol]: float(self._market.close[symbol, bar]) for symbol in wanted}
        return EntrySizer(terms.sizing, terms.policies, self._instruments, equity, closes, float(free))

    def _place(self, bar: int, decision: Taken) -> None:
        """Lets a trade wait for the open of the next bar."""
        if self._count == len(self._trades):
            self._trades = np.concatenate([self._trades, np.zeros_like(self._trades)])
        signal, quantity = decision.signal, decision.quantity
        symbol = self._market.symbols.index(signal.symbol)
        trade = self._trades[self._count]
        trade["symbol"], trade["side"] = symbol, SIDES.index(signal.side)
        trade["signal_bar"], trade["entry_bar"] = bar, -1
        trade["quantity"], trade["expected_return"] = float(quantity), np.nan
        step = self._instruments[signal.symbol].qty_step
        parts = slice_quantities(quantity, self._terms.sizing.fractions, step)
        for filled, closes in enumerate((*parts, Decimal(0))):
            left = quantity - sum(parts[:filled], Decimal(0))
            self._slices[symbol, filled] = float(closes / quantity), float(left / quantity), float(left)
        self._slot[symbol] = self._count
        self._count += 1

    def result(self) -> Backtest:
        """The account, once every bar is carried."""
        market, ledger, found = self._market, self._ledger[:-1], self._trades[: self._count]
        for reason, count in zip(_REFUSALS, self._counted.tolist(), strict=True):
            self._refused[reason] += count
        return Backtest(
            symbols=market.symbols,
            open_time_ms=market.open_time_ms,
            initial=self._terms.initial,
            equity=ledger[:, _BALANCE] + ledger[:, _UNREALISED],
            balance=ledger[:, _BALANCE].copy(),
            realised=ledger[:, _REALISED].copy(),
            fees=ledger[:, _FEES].copy(),
            funding=ledger[:, _FUNDING].copy(),
            unrealised=ledger[:, _UNREALISED].copy(),
            open_positions=ledger[:, _POSITIONS].astype(np.int64),
            trades=self._table(found[found["entry_bar"] >= 0]),
            refused={reason: count for reason, count in sorted(self._refused.items()) if count},
            cancelled=int(np.sum(found["exit_reason"] == _CANCELLED)),
        )

    def _table(self, found: np.ndarray) -> TradeTable:
        found = found[np.lexsort((self._rank[found["symbol"]], found["entry_bar"]))]
        closed, times = found["exit_reason"] != NONE, self._market.open_time_ms
        return TradeTable(
            signal_ms=times[found["signal_bar"]],
            entry_ms=times[found["entry_bar"]],
            exit_ms=np.where(closed, times[found["walked"]], -1),
            closed=closed,
            **{name: found[name].copy() for name in TradeTable.__annotations__ if name in (_TRADE.fields or {})},
        )


def _check(market: MarketPanel, score: np.ndarray, instruments: Mapping[str, Instrument], terms: Terms) -> None:
    shape = (len(SIDES), *market.open.shape)
    if score.shape != shape:
        raise ValueError(f"score must have shape {shape} (sides, symbols, bars), received {score.shape}")
    unknown = [symbol for symbol in market.symbols if symbol not in instruments]
    if unknown:
        raise MissingInputError(
            f"no instrument for {', '.join(unknown)}: sizes need the exchange's steps and minimums; "
            "run download_data.py again"
        )
    fractions = tuple(float(part) for part in terms.sizing.fractions)
    for side, policy in terms.policies.items():
        if tuple(fraction for _, fraction in policy.targets) != fractions:
            raise ValueError(f"sizes are sliced by {fractions}, the {side} policy by {policy.targets}")


# --- the compiled pass -----------------------------------------------------------------------------------------------


def _compiled(rule_source: bytes) -> Callable[..., int]:
    """The pass over the bars. Its machine code is kept on disk, where numba tells by this file alone whether it is
    still good; values closed over are part of its key, so the rule's own source, in another file, is one."""

    @njit(cache=os.access(Path(__file__).parent, os.W_OK), error_model="numpy")
    def advance(bar, prices, score, by_name, rule, entries, book, account):
        """Carries the book from `bar` on to the first bar whose close leaves something to decide; returns that bar."""
        assert len(rule_source)
        rules, steps, limits = rule[0], rule[1], rule[2][0]
        trades, slot, plans, slices = book
        ledger, peak, counted = account
        rows = np.empty((2, 6))
        end = score.shape[2]
        while bar < end:
            line = ledger[bar]
            line[:_UNREALISED] = ledger[bar - 1, :_UNREALISED]
            for symbol in by_name:
                number = slot[symbol]
                if number >= 0:
                    plan, parts = plans[symbol], slices[symbol]
                    _carry(
                        bar, symbol, prices, rules, steps, limits.stop_slide, trades, number, plan, parts, rows, line
                    )
                    if trades[number].exit_reason != NONE:
                        slot[symbol] = -1
            occupied = _mark(by_name, slot, trades, rules, slices, line)
            equity = line[_BALANCE] + line[_UNREALISED]
            peak[0] = max(peak[0], equity)
            wanted = _count(bar, score, slot, limits.threshold, counted)
            if wanted > 0:
                if occupied >= limits.max_positions or entries[1] >= entries[0][bar]:
                    counted[_FULL] += wanted
                elif 1 - equity / peak[0] >= limits.max_drawdown:
                    counted[_HALTED] += wanted
                else:
                    break
            bar += 1
        return bar

    return advance


@njit(error_model="numpy")
def _carry(bar, symbol, prices, rules, steps, stop_slide, trades, number, plan, slices, rows, line):
    """One symbol's trade through one bar: entry, funding, fills."""
    open, high, low, close, funding = prices
    present = set_bar(rows, 0, open[symbol, bar], high[symbol, bar], low[symbol, bar], close[symbol, bar])
    trade = trades[number]
    rule = rules[trade.side]
    if trade.entry_bar >= 0:
        if bar - trade.entry_bar <= rule.horizon:  # else it ended in a bar that was missing
            price = open[symbol, bar] if present else trade.last_close
            received = -rule.sign * funding[symbol, bar] * slices[trade.targets_filled, _QUANTITY_LEFT] * price
            trade.funding += received
            line[_FUNDING] += received
            line[_BALANCE] += received
    elif present and bar == trade.signal_bar + 1:
        _enter(bar, open[symbol, bar], rule, steps, trade, plan, line)
    elif present:
        trade.exit_reason = _CANCELLED
    if present and trade.entry_bar >= 0:
        adverse = low[symbol, bar] if rule.sign > 0 else high[symbol, bar]
        before = trade.pnl
        while trade.exit_reason == NONE and trade.walked < bar:
            missing = trade.walked + 1 < bar
            if missing:
                set_bar(rows, 1, trade.last_close, trade.last_close, trade.last_close, trade.last_close)
            _walk(1 if missing else 0, adverse, stop_slide, rule, trade, plan, slices, rows, line)
            if not missing:
                trade.last_close = close[symbol, bar]
        line[_BALANCE] += trade.pnl - before


@njit(error_model="numpy")
def _enter(bar, open, rule, steps, trade, plan, line):
    trade.entry_bar, trade.walked = bar, bar - 1
    trade.entry_price = open * (1 + rule.sign * rule.slippage)
    set_plan(plan, steps, trade.side, trade.entry_price)
    trade.last_close = trade.entry_price
    trade.notional = trade.quantity * trade.entry_price
    fee = trade.notional * rule.taker_fee
    trade.pnl, trade.fees = -fee, fee
    line[_FEES] += fee
    line[_BALANCE] -= fee


@njit(error_model="numpy")
def _walk(row, adverse, stop_slide, rule, trade, plan, slices, rows, line):
    """The fills of the next bar, which stands in `rows[row]`."""
    filled, reason, price, held, _ = walk_bars(
        rows, row, row + 1, row - trade.bars_held, rule, plan, trade.targets_filled, True
    )
    if reason in (STOP, BREAKEVEN, LOCK):
        price += stop_slide * (adverse - price)
    for level in range(trade.targets_filled, filled):
        _fill(slices[level, _SHARE], plan[level, PLAN_LEVEL], rule.sign, rule.maker_fee, 0.0, trade, line)
    if reason != NONE:
        trade.expected_return = earned(filled, price, rule, plan, trade.entry_price)
        if reason != TAKE_PROFIT:
            share = slices[filled, _SHARE_LEFT]
            _fill(share, price, rule.sign, rule.taker_fee, rule.slippage, trade, line)
    trade.targets_filled, trade.exit_reason, trade.bars_held = filled, reason, held
    trade.walked += 1


@njit(error_model="numpy")
def _fill(share, price, sign, fee, slippage, trade, line):
    """Books one fill: the rule's own arithmetic, for the share that the quantity's step allows."""
    entry, notional = trade.entry_price, trade.notional
    paid = price * (1 - sign * slippage)
    paid_fee = share * fee * paid / entry * notional
    trade.pnl += contribution(share, price, sign, entry, fee, slippage) * notional
    trade.fees += paid_fee
    line[_FEES] += paid_fee
    line[_REALISED] += share * sign * (paid / entry - 1) * notional


@njit(error_model="numpy")
def _mark(by_name, slot, trades, rules, slices, line):
    """Writes what is open at the last close; returns how many symbols are occupied, by a position or an entry."""
    occupied, positions, unrealised = 0, 0, 0.0
    for symbol in by_name:
        if slot[symbol] >= 0:
            occupied += 1
            trade = trades[slot[symbol]]
            if trade.entry_bar >= 0:
                positions += 1
                left = slices[symbol, trade.targets_filled, _QUANTITY_LEFT]
                unrealised += rules[trade.side].sign * left * (trade.last_close - trade.entry_price)
    line[_UNREALISED], line[_POSITIONS] = unrealised, positions
    return occupied


@njit(error_model="numpy")
def _count(bar, score, slot, threshold, counted):
    """Counts the signals that need no decision; returns how many are left, above the threshold on free symbols."""
    wanted = 0
    for side in range(score.shape[0]):
        for symbol in range(score.shape[1]):
            value = score[side, symbol, bar]
            if value > threshold:
                if slot[symbol] >= 0:
                    counted[_OPEN] += 1
                else:
                    wanted += 1
            elif value <= threshold:
                counted[_BELOW] += 1
    return wanted


_advance = _compiled(hashlib.sha256(Path(exit_policy.__file__).read_bytes()).digest())
