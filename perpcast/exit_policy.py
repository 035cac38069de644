"""What a trade earns: one rule for labels, backtest, paper and live.

A trade enters at the open of the bar after its signal bar, rests partial targets and a take profit, and moves its stop
as targets fill; what is left after `horizon` bars closes at the next open. Inside a bar the price is taken to go open,
extreme against the position, extreme in its favour, close. One compiled walk of one bar carries the rule: labels run it
over every bar of history, `OpenTrade` runs it bar by bar.

All distances and returns are fractions of the entry price; float64 without fast-math, so that equal inputs give equal
results everywhere.
"""

import os
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numba import njit

from perpcast.market import Side

# Index = the code in arrays and tables. A stop is `stop` before any target, `breakeven` after one, `lock` after more.
EXIT_REASONS = ("none", "stop", "breakeven", "lock", "take_profit", "timeout")
NONE, STOP, BREAKEVEN, LOCK, TAKE_PROFIT, TIMEOUT = range(6)

# Machine code is kept beside this file for the next process; numba refuses to import where that cannot be written.
_CACHED = os.access(Path(__file__).parent, os.W_OK)

# Labels that differ by less than this under the other order inside the bar are not ambiguous.
AMBIGUOUS_ABOVE = 1e-12


class _RiskProfile(Protocol):
    """The part of `config.RiskProfile` that a policy is made of."""

    stop_loss_pct_buy: Decimal
    take_profit_pct_buy: Decimal
    stop_loss_pct_sell: Decimal
    take_profit_pct_sell: Decimal
    partial_closes: Any


class _Fees(Protocol):
    """The part of `config.FeeSettings` that a policy is made of."""

    taker: Decimal
    maker: Decimal
    slippage: Decimal


@dataclass(frozen=True)
class ExitPolicy:
    """One side's rule: `targets` are (distance, fraction of the entry size), `stop_after[i]` the stop after target i.

    Distances are positive in the position's favour, except `stop`, which is the first stop's distance against it.
    """

    stop: float
    take_profit: float
    targets: tuple[tuple[float, float], ...]
    stop_after: tuple[float, ...]
    horizon: int
    taker_fee: float
    maker_fee: float
    slippage: float

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple((float(d), float(f)) for d, f in self.targets))
        object.__setattr__(self, "stop_after", tuple(float(d) for d in self.stop_after))
        distances = [distance for distance, _ in self.targets]
        if not 0 < self.stop < 1:
            raise ValueError(f"stop must lie between 0 and 1, received {self.stop}")
        if self.horizon < 1:
            raise ValueError(f"horizon must be at least 1 bar, received {self.horizon}")
        if distances != sorted(set(distances)) or any(not 0 < d < self.take_profit for d in distances):
            raise ValueError(f"targets must rise from 0 to the take profit {self.take_profit}, received {distances}")
        if len(self.stop_after) != len(self.targets) or any(
            s >= d for s, d in zip(self.stop_after, distances, strict=True)
        ):
            raise ValueError(f"stop_after needs one stop below each target {distances}, received {self.stop_after}")
        if any(fraction <= 0 for _, fraction in self.targets) or sum(f for _, f in self.targets) > 1 + AMBIGUOUS_ABOVE:
            raise ValueError(f"fractions must be positive and add up to at most 1, received {self.targets}")

    @classmethod
    def from_config(cls, risk_profile: _RiskProfile, fees: _Fees, side: Side, horizon: int = 100) -> "ExitPolicy":
        """The policy of one side from the user's numbers, taken in Decimal: 1 - 0.989 is exactly 0.011."""
        one = Decimal(1)
        if side == "buy":
            stop, profit = one - risk_profile.stop_loss_pct_buy, risk_profile.take_profit_pct_buy - one
        else:
            stop, profit = risk_profile.stop_loss_pct_sell - one, one - risk_profile.take_profit_pct_sell
        closes = risk_profile.partial_closes
        return cls(
            stop=float(stop),
            take_profit=float(profit),
            targets=tuple((float(close.target_pct / 100), float(close.close_fraction)) for close in closes),
            stop_after=tuple(float(close.stop_pct / 100) for close in closes),
            horizon=horizon,
            taker_fee=float(fees.taker),
            maker_fee=float(fees.maker),
            slippage=float(fees.slippage),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain numbers and lists; `ExitPolicy(**data)` is the inverse."""
        return {
            **asdict(self),
            "targets": [list(target) for target in self.targets],
            "stop_after": list(self.stop_after),
        }


@dataclass(frozen=True)
class Labels:
    """Outcome of a trade signalled at every bar [n]; no label is NaN in `expected_return` and 0 in the others."""

    expected_return: np.ndarray  # float64, net of fees and slippage, unlevered, before funding
    exit_reason: np.ndarray  # int8, index into EXIT_REASONS
    bars_held: np.ndarray  # int16, 1 = ended in the entry bar, horizon + 1 = time-out
    targets_filled: np.ndarray  # int8, the take profit counts as the last
    ambiguous: np.ndarray  # bool, the return depends on the order of the extremes inside a bar


@dataclass(frozen=True, slots=True)
class Fill:
    """One exit: which fraction of the entry size, at which level (before slippage where a taker), and why."""

    fraction: float
    price: float
    maker: bool
    why: str


class _Rule(NamedTuple):
    """A policy as the compiled walk takes it. Levels are the targets, then the take profit for what they leave."""

    sign: float
    distances: np.ndarray  # [levels]
    fractions: np.ndarray  # [levels] of the entry size
    left: np.ndarray  # [levels] fraction still open after so many filled levels
    stops: np.ndarray  # [levels] distance of the stop after so many filled levels, negative against the position
    horizon: int
    taker_fee: float
    maker_fee: float
    slippage: float


class _Bars(NamedTuple):
    open: np.ndarray
    high: np.ndarray
    low: np.ndarray
    close: np.ndarray


def label_trades(
    open: np.ndarray, high: np.ndarray, low: np.ndarray, close: np.ndarray, side: Side, policy: ExitPolicy
) -> Labels:
    """The rule's outcome for a trade signalled at every bar of one symbol's consecutive bars.

    Arrays are one-dimensional and of one length; a NaN in any of the four marks a missing bar. A bar has no label where
    bar `horizon + 1` after it does not exist yet or any bar up to it is missing, also if the trade would have ended
    before: keeping only the early ends would bias the last days.
    """
    bars = _Bars(*(np.ascontiguousarray(column, np.float64) for column in (open, high, low, close)))
    if any(column.ndim != 1 or len(column) != len(bars.open) for column in bars):
        raise ValueError(f"expected four one-dimensional arrays of one length, received {[c.shape for c in bars]}")
    return Labels(*_label_bars(bars, _rule(side, policy)))


class OpenTrade:
    """One trade carried out from closed bars, as paper trading does: `walk` each bar from the entry bar on.

    `entry_open` is the open of the entry bar; the entry itself pays slippage and the taker fee.
    """

    def __init__(self, side: Side, policy: ExitPolicy, entry_open: float) -> None:
        self.side, self.policy = side, policy
        self._rule = _rule(side, policy)
        self.entry_price = entry_open * (1 + self._rule.sign * policy.slippage)
        self._levels = self.entry_price * (1 + self._rule.sign * self._rule.distances)
        self._stops = self.entry_price * (1 + self._rule.sign * self._rule.stops)
        self.bars_held = 0
        self.targets_filled = 0
        self.expected_return = -policy.taker_fee
        self._reason = NONE

    @property
    def closed(self) -> bool:
        """True once nothing is left."""
        return self._reason != NONE

    @property
    def exit_reason(self) -> str:
        """Why it ended; `none` while it is open."""
        return EXIT_REASONS[self._reason]

    @property
    def stop_level(self) -> float:
        """Where the stop stands now, or stood at the end."""
        return float(self._stops[min(self.targets_filled, len(self._stops) - 1)])

    @property
    def remaining(self) -> float:
        """Fraction of the entry size that is still open."""
        return 0.0 if self.closed else float(self._rule.left[self.targets_filled])

    def walk(self, open: float, high: float, low: float, close: float) -> list[Fill]:
        """The fills of the next closed bar, in order; of bar `horizon + 1` only the open counts, then time is out."""
        if self.closed:
            raise ValueError(f"the trade ended by {self.exit_reason} in bar {self.bars_held}")
        adverse, favourable = (low, high) if self.side == "buy" else (high, low)
        before = self.targets_filled
        self.targets_filled, self._reason, price, _ = _walk_one_bar(
            (open, adverse, favourable, close), self.bars_held, self._rule.sign, self._rule.horizon,
            self._levels, self._stops, before,
        )  # fmt: skip
        self.bars_held += 1
        fills = [self._target_fill(number) for number in range(before, self.targets_filled)]
        if self._reason not in (NONE, TAKE_PROFIT):
            fills.append(Fill(float(self._rule.left[self.targets_filled]), price, False, self.exit_reason))
        self.expected_return += sum(self.fill_return(fill) for fill in fills)
        return fills

    def fill_return(self, fill: Fill) -> float:
        """What one fill adds to the trade's return, after its fee and slippage: a fraction of the entry notional."""
        policy = self.policy
        fee, slippage = (policy.maker_fee, 0.0) if fill.maker else (policy.taker_fee, policy.slippage)
        return float(_contribution(fill.fraction, fill.price, self._rule.sign, self.entry_price, fee, slippage))

    def _target_fill(self, number: int) -> Fill:
        why = "take_profit" if number == len(self._levels) - 1 else "target"
        return Fill(float(self._rule.fractions[number]), float(self._levels[number]), True, why)


def _rule(side: Side, policy: ExitPolicy) -> _Rule:
    if side not in ("buy", "sell"):
        raise ValueError(f"side must be 'buy' or 'sell', received {side!r}")
    distances = [distance for distance, _ in policy.targets]
    fractions = [fraction for _, fraction in policy.targets]
    left = [1.0]
    for fraction in fractions:
        left.append(left[-1] - fraction)
    if left[-1] > AMBIGUOUS_ABOVE:
        distances.append(policy.take_profit)
        fractions.append(left[-1])
    return _Rule(
        1.0 if side == "buy" else -1.0,
        np.array(distances),
        np.array(fractions),
        np.array(left),
        np.array([-policy.stop, *policy.stop_after]),
        policy.horizon,
        policy.taker_fee,
        policy.maker_fee,
        policy.slippage,
    )


@njit(cache=_CACHED)
def _contribution(fraction, price, sign, entry, fee, slippage):
    """fraction * (s * (price / entry - 1) - fee * price / entry), the price worsened by the slippage."""
    paid = price * (1 - sign * slippage)
    return fraction * (sign * (paid / entry - 1) - fee * paid / entry)


@njit(cache=_CACHED, inline="always")
def _walk_bar(prices, bars_before, sign, horizon, levels, stops, filled, adverse_first):
    """One bar of a trade: `prices` (open, adverse extreme, favourable extreme, close), filled levels before it.

    `levels` and `stops` are prices; the stop in force is `stops[filled]`. Returns (filled levels, exit reason or NONE,
    price of a stop or time-out, whether the order of the extremes may matter).
    """
    open, adverse, favourable, close = prices
    # The open of the entry bar is the entry itself and triggers nothing.
    if bars_before > 0:
        if sign * (open - stops[filled]) <= 0:  # opens at or beyond the stop: filled at the open
            return filled, _stop_reason(filled), open, False
        filled = _reach(open, sign, levels, filled)
        if filled == len(levels):
            return filled, TAKE_PROFIT, 0.0, False
        if bars_before == horizon:
            return filled, TIMEOUT, open, False
    if adverse_first and sign * (adverse - stops[filled]) <= 0:
        return filled, _stop_reason(filled), stops[filled], sign * (favourable - levels[filled]) >= 0
    before = filled
    filled = _reach(favourable, sign, levels, filled)
    if filled == len(levels):
        return filled, TAKE_PROFIT, 0.0, False
    stopped_after = sign * (adverse - stops[filled]) <= 0
    order_matters = filled > before and stopped_after
    if sign * (close - stops[filled]) <= 0 or (stopped_after and not adverse_first):
        return filled, _stop_reason(filled), stops[filled], order_matters
    return filled, NONE, 0.0, order_matters


@njit(cache=_CACHED, inline="always")
def _reach(price, sign, levels, filled):
    """Number of filled levels after `price`: every level that it reaches fills, in order."""
    while filled < len(levels) and sign * (price - levels[filled]) >= 0:
        filled += 1
    return filled


@njit(cache=_CACHED, inline="always")
def _stop_reason(filled):
    if filled == 0:
        return STOP
    return BREAKEVEN if filled == 1 else LOCK


@njit(cache=_CACHED)
def _walk_one_bar(prices, bars_before, sign, horizon, levels, stops, filled):
    return _walk_bar(prices, bars_before, sign, horizon, levels, stops, filled, True)


@njit(cache=_CACHED)
def _prices(entry, sign, distances, prices):
    """entry * (1 + s * distance) for every distance, into `prices`."""
    for number in range(len(distances)):
        prices[number] = entry * (1 + sign * distances[number])


@njit(cache=_CACHED)
def _walk_trade(bars, first, rule, entry, levels, stops, adverse_first):
    """A whole trade from its entry bar: (return, exit reason, bars held, filled levels, whether order may matter)."""
    filled, order_mattered, sign, horizon = 0, False, rule.sign, rule.horizon
    opens, closes = bars.open, bars.close
    adverses, favourables = (bars.low, bars.high) if sign > 0 else (bars.high, bars.low)
    for held in range(horizon + 1):
        bar = first + held
        prices = (opens[bar], adverses[bar], favourables[bar], closes[bar])
        filled, reason, price, order_matters = _walk_bar(
            prices, held, sign, horizon, levels, stops, filled, adverse_first
        )
        order_mattered |= order_matters
        if reason != NONE:
            break
    total = -rule.taker_fee
    for number in range(filled):
        total += _contribution(rule.fractions[number], levels[number], sign, entry, rule.maker_fee, 0.0)
    if reason != TAKE_PROFIT:
        total += _contribution(rule.left[filled], price, sign, entry, rule.taker_fee, rule.slippage)
    return total, reason, held + 1, filled, order_mattered


@njit(cache=_CACHED)
def _label_bars(bars, rule):
    """A trade from every bar; backwards, so that the next missing bar is known without looking for it."""
    count = len(bars.open)
    expected_return = np.full(count, np.nan)
    exit_reason = np.zeros(count, np.int8)
    bars_held = np.zeros(count, np.int16)
    targets_filled = np.zeros(count, np.int8)
    ambiguous = np.zeros(count, np.bool_)
    levels, stops = np.empty(len(rule.distances)), np.empty(len(rule.stops))
    next_missing = count
    for signal in range(count - 1, -1, -1):
        if np.isnan(bars.open[signal] + bars.high[signal] + bars.low[signal] + bars.close[signal]):
            next_missing = signal
        first = signal + 1
        if first + rule.horizon >= next_missing:
            continue
        entry = bars.open[first] * (1 + rule.sign * rule.slippage)
        _prices(entry, rule.sign, rule.distances, levels)
        _prices(entry, rule.sign, rule.stops, stops)
        total, reason, held, filled, order_mattered = _walk_trade(bars, first, rule, entry, levels, stops, True)
        expected_return[signal], exit_reason[signal] = total, reason
        bars_held[signal], targets_filled[signal] = held, filled
        if order_mattered:
            other = _walk_trade(bars, first, rule, entry, levels, stops, False)[0]
            ambiguous[signal] = abs(total - other) > AMBIGUOUS_ABOVE
    return expected_return, exit_reason, bars_held, targets_filled, ambiguous
