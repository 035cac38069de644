"""Paper positions: entered at the open of the bar after their signal, carried by the exit policy from closed bars.

Quantities are those of the instrument (slices rounded to its step), prices those of the rule. No orders are sent.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal

from perpcast.exit_policy import EXIT_REASONS, ExitPolicy, Fill, OpenTrade
from perpcast.market import Candle, Side
from perpcast.sizing import Sizing, slice_quantities


@dataclass(frozen=True)
class Entry:
    """A decided entry that waits for its bar."""

    position_id: str
    signal_id: str
    symbol: str
    side: Side
    quantity: Decimal
    signal_ms: int


@dataclass(frozen=True)
class PaperFill:
    """One exit as it is journalled: `price` is what was paid, slippage included; `pnl` is net of its fee."""

    position_id: str
    symbol: str
    open_time_ms: int  # of the bar that filled it
    quantity: Decimal
    price: float
    maker: bool
    why: str
    pnl: float


@dataclass
class PaperPosition:
    """An open (or just closed) position; `slices` are what its targets and its take profit close."""

    entry: Entry
    entry_ms: int
    trade: OpenTrade
    slices: tuple[Decimal, ...]
    leverage: int
    realized_pnl: float
    remaining: Decimal
    last_close: float
    walked_ms: int
    exit_ms: int | None = None
    missing_bars: int = 0  # bars that never came while it was open

    @property
    def notional(self) -> float:
        """Value at the entry, in USDT."""
        return float(self.entry.quantity) * self.trade.entry_price

    @property
    def margin(self) -> float:
        """What it still ties up, in USDT."""
        return float(self.remaining) * self.trade.entry_price / self.leverage

    @property
    def unrealized_pnl(self) -> float:
        """Of what is left, at the last close, before the exit's costs, in USDT."""
        sign = 1 if self.entry.side == "buy" else -1
        return sign * float(self.remaining) * (self.last_close - self.trade.entry_price)

    def walk(self, candle: Candle, step_ms: int) -> list[PaperFill]:
        """The fills of the next closed candle. Bars that are missing before it pass at the last close, so that the
        time-out keeps its time; the price they had is unknown."""
        fills: list[PaperFill] = []
        while not self.trade.closed and self.walked_ms + step_ms < candle.open_time_ms:
            self.missing_bars += 1
            fills += self._walk(self.walked_ms + step_ms, *[self.last_close] * 4)
        if not self.trade.closed:
            fills += self._walk(candle.open_time_ms, candle.open, candle.high, candle.low, candle.close)
        return fills

    def _walk(self, open_time_ms: int, open: float, high: float, low: float, close: float) -> list[PaperFill]:
        filled_before = self.trade.targets_filled
        fills = self.trade.walk(open, high, low, close)
        self.walked_ms, self.last_close = open_time_ms, close
        if self.trade.closed:
            self.exit_ms = open_time_ms
        return [self._book(fill, filled_before + number, open_time_ms) for number, fill in enumerate(fills)]

    def _book(self, fill: Fill, number: int, open_time_ms: int) -> PaperFill:
        quantity = self.slices[number] if fill.maker else self.remaining
        self.remaining -= quantity
        # The rule's own arithmetic, for the fraction that the step allows.
        share = replace(fill, fraction=float(quantity / self.entry.quantity))
        pnl = self.trade.fill_return(share) * self.notional
        self.realized_pnl += pnl
        sign = 1 if self.entry.side == "buy" else -1
        price = fill.price if fill.maker else fill.price * (1 - sign * self.trade.policy.slippage)
        return PaperFill(
            self.entry.position_id, self.entry.symbol, open_time_ms, quantity, price, fill.maker, fill.why, pnl
        )

    @property
    def exit_reason(self) -> int:
        """Index into EXIT_REASONS."""
        return EXIT_REASONS.index(self.trade.exit_reason)


@dataclass
class BarOutcome:
    """What one symbol's candles did to its position."""

    opened: list[PaperPosition] = field(default_factory=list)
    fills: list[PaperFill] = field(default_factory=list)
    cancelled: list[Entry] = field(default_factory=list)


class PaperAccount:
    """Balance, waiting entries and open positions, at most one of either per symbol."""

    def __init__(
        self,
        balance: float,
        policies: Mapping[Side, ExitPolicy],
        sizing: Sizing,
        qty_steps: Mapping[str, Decimal],
        step_ms: int,
    ) -> None:
        self.balance = balance
        self.positions: dict[str, PaperPosition] = {}
        self.waiting: dict[str, Entry] = {}
        self._policies, self._sizing, self._qty_steps, self._step_ms = policies, sizing, qty_steps, step_ms

    @property
    def occupied(self) -> frozenset[str]:
        """Symbols with a position or a waiting entry."""
        return frozenset(self.positions) | frozenset(self.waiting)

    @property
    def unrealized_pnl(self) -> float:
        """Over all open positions, in order of their symbols."""
        return sum(self.positions[symbol].unrealized_pnl for symbol in sorted(self.positions))

    @property
    def equity(self) -> float:
        """Balance and what the open positions stand at."""
        return self.balance + self.unrealized_pnl

    @property
    def free_margin(self) -> float:
        """What new positions may tie up; entries that wait count at their last price's notional elsewhere."""
        return self.equity - sum(position.margin for position in self.positions.values())

    def apply_candle(self, candle: Candle) -> BarOutcome:
        """Lets a waiting entry in at the candle's open, walks the position through it; a closed one is let go.

        An entry whose very bar never came is cancelled: the price it would have had is unknown.
        """
        outcome = BarOutcome()
        entry = self.waiting.get(candle.symbol)
        if entry is not None and candle.open_time_ms > entry.signal_ms:
            del self.waiting[candle.symbol]
            if candle.open_time_ms == entry.signal_ms + self._step_ms:
                outcome.opened.append(self._open(entry, candle))
            else:
                outcome.cancelled.append(entry)
        position = self.positions.get(candle.symbol)
        if position is not None and candle.open_time_ms > position.walked_ms:
            before = position.realized_pnl
            outcome.fills = position.walk(candle, self._step_ms)
            self.balance += position.realized_pnl - before
            if position.trade.closed:
                del self.positions[candle.symbol]
        return outcome

    def restore(self, entry: Entry, candles: list[Candle]) -> PaperPosition:
        """An open position as it was, from its entry and the candles since; the balance holds its fills already."""
        balance = self.balance
        position = self._open(entry, candles[0])
        for candle in candles:
            position.walk(candle, self._step_ms)
        self.balance = balance
        return position

    def _open(self, entry: Entry, candle: Candle) -> PaperPosition:
        policy = self._policies[entry.side]
        trade = OpenTrade(entry.side, policy, candle.open)
        fee = float(entry.quantity) * trade.entry_price * policy.taker_fee
        position = PaperPosition(
            entry=entry,
            entry_ms=candle.open_time_ms,
            trade=trade,
            slices=slice_quantities(entry.quantity, self._sizing.fractions, self._qty_steps[entry.symbol]),
            leverage=self._sizing.leverage,
            realized_pnl=-fee,
            remaining=entry.quantity,
            last_close=trade.entry_price,
            walked_ms=candle.open_time_ms - self._step_ms,
        )
        self.balance -= fee
        self.positions[entry.symbol] = position
        return position
