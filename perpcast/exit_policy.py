"""What a trade earns: one rule for labels, backtest, paper and live.

A trade enters at the open of the bar after its signal bar, rests partial targets and a take profit, and moves its stop
as targets fill; what is left after `horizon` bars closes at the next open. Inside a bar the price is taken to go open,
extreme against the position, extreme in its favour, close. One compiled walk carries the rule: labels run it from every
bar of history, `OpenTrade` over one bar after the other.

All distances and returns are fractions of the entry price; float64 without fast-math, so that equal inputs give equal
results everywhere.
"""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numba import njit

from perpcast.market import SIDES, Side

# What a label is made by: raised by whoever changes what the rule gives.
LABEL_VERSION = "exit_policy/1"

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
    """Outcome of a trade signalled at every bar [n]; no label is NaN in `expected_return` and 0 in the others.

    `ambiguous` is empty where it was left out.
    """

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


def label_trades(
    open: np.ndarray, high: np.ndarray, low: np.ndarray, close: np.ndarray, side: Side, policy: ExitPolicy
) -> Labels:
    """The labels of one side; see `label_sides`."""
    return label_sides(open, high, low, close, {side: policy})[side]


def label_sides(
    open: np.ndarray,
    high: np.ndarray,
    low: np.ndarray,
    close: np.ndarray,
    policies: Mapping[Side, ExitPolicy],
    *,
    ambiguous: bool = True,
    adverse_first: bool = True,
) -> dict[Side, Labels]:
    """The rule's outcome for a trade of each side signalled at every bar of one symbol's consecutive bars.

    Prices are four arrays [n]; a bar is missing where any of its four is NaN, infinite or not positive. A bar has no
    label where bar `horizon + 1` after it does not exist yet or any bar up to it is missing, also if the trade would
    have ended before: keeping only the early ends would bias the last days. `ambiguous` takes a tenth of the time.

    `adverse_first` False is not the rule: it walks every bar favourable extreme first, without `ambiguous`, to show
    how much hangs on the order.
    """
    prices = [np.ascontiguousarray(column, np.float64) for column in (open, high, low, close)]
    if any(column.ndim != 1 or len(column) != len(prices[0]) for column in prices):
        raise ValueError(f"expected four one-dimensional arrays of one length, received {[c.shape for c in prices]}")
    columns = _label_bars(*prices, *compiled_rules(policies), ambiguous and adverse_first, adverse_first)
    return {side: Labels(*(column[number] for column in columns)) for number, side in enumerate(policies)}


class OpenTrade:
    """One trade carried out from closed bars, as paper trading does: `walk` each bar from the entry bar on.

    `entry_open` is the open of the entry bar; the entry itself pays slippage and the taker fee.
    """

    def __init__(self, side: Side, policy: ExitPolicy, entry_open: float) -> None:
        self.side, self.policy = side, policy
        rules, steps = compiled_rules({side: policy})
        self._rule, self._plan = rules[0], np.empty_like(steps[0])
        self.entry_price = entry_open * (1 + float(self._rule["sign"]) * policy.slippage)
        set_plan(self._plan, steps, 0, self.entry_price)
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
        return float(self._plan[self.targets_filled, _STOP])

    @property
    def remaining(self) -> float:
        """Fraction of the entry size that is still open."""
        return 0.0 if self.closed else float(self._plan[self.targets_filled, _LEFT])

    def walk(self, open: float, high: float, low: float, close: float) -> list[Fill]:
        """The fills of the next closed bar, in order; of bar `horizon + 1` only the open counts, then time is out."""
        if self.closed:
            raise ValueError(f"the trade ended by {self.exit_reason} in bar {self.bars_held}")
        prices = (open, high, low, close)
        bars = np.array([[*prices, min(prices), max(prices)]])
        before, entry_bar = self.targets_filled, -self.bars_held
        self.targets_filled, self._reason, price, self.bars_held, _ = walk_bars(
            bars, 0, 1, entry_bar, self._rule, self._plan, before, True
        )
        fills = [self._target_fill(number) for number in range(before, self.targets_filled)]
        if self._reason not in (NONE, TAKE_PROFIT):
            fills.append(Fill(float(self._plan[self.targets_filled, _LEFT]), price, False, self.exit_reason))
        self.expected_return += sum(self.fill_return(fill) for fill in fills)
        return fills

    def fill_return(self, fill: Fill) -> float:
        """What one fill adds to the trade's return, after its fee and slippage: a fraction of the entry notional."""
        policy = self.policy
        fee, slippage = (policy.maker_fee, 0.0) if fill.maker else (policy.taker_fee, policy.slippage)
        return float(contribution(fill.fraction, fill.price, self._rule["sign"], self.entry_price, fee, slippage))

    def _target_fill(self, number: int) -> Fill:
        why = "take_profit" if number + 1 == self._rule["levels"] else "target"
        return Fill(float(self._plan[number, _CLOSES]), float(self._plan[number, PLAN_LEVEL]), True, why)


# --- the compiled walk -----------------------------------------------------------------------------------------------
# Numba counts references to the arrays of a function that has several ways out, which takes longer than the walk
# itself: the functions below that run for every trade take few arrays and return once.

# A policy as the walk takes it, beside its steps.
_RULE = np.dtype(
    [
        ("sign", np.float64),  # 1 buy, -1 sell
        ("levels", np.int64),  # the targets, then the take profit for what they leave
        ("horizon", np.int64),
        ("taker_fee", np.float64),
        ("maker_fee", np.float64),
        ("slippage", np.float64),
    ],
    align=True,
)

# Columns of a policy's steps and of a trade's plan. Row k is what holds while k levels are filled: the next level and
# the stop (multiples of the entry price in steps, prices in a plan), the fraction of the entry size that the next level
# closes, and the fraction still open. When all are filled there is no next level and nothing open.
PLAN_LEVEL, _STOP, _CLOSES, _LEFT = range(4)

# Columns of a bar. The extremes over all four prices say with two comparisons that a bar touches nothing.
_OPEN, _HIGH, _LOW, _CLOSE, _LOWEST, _HIGHEST = range(6)


def compiled_rules(policies: Mapping[Side, ExitPolicy]) -> tuple[np.ndarray, np.ndarray]:
    """Rules [sides] and steps [sides, levels + 1, 4]; where another side has more levels, NaN fills up."""
    if not set(policies) <= set(SIDES):
        raise ValueError(f"side must be 'buy' or 'sell', received {list(policies)}")
    rules, tables = np.empty(len(policies), _RULE), []
    for number, (side, policy) in enumerate(policies.items()):
        sign = 1.0 if side == "buy" else -1.0
        tables.append(_steps(sign, policy))
        levels = len(tables[-1]) - 1
        rules[number] = (sign, levels, policy.horizon, policy.taker_fee, policy.maker_fee, policy.slippage)
    steps = np.full((len(tables), max(map(len, tables), default=0), 4), np.nan)
    for number, table in enumerate(tables):
        steps[number, : len(table)] = table
    return rules, steps


def _steps(sign: float, policy: ExitPolicy) -> list[tuple[float, float, float, float]]:
    left, table = 1.0, []
    stops = [1 + sign * distance for distance in (-policy.stop, *policy.stop_after)]
    for stop, (distance, fraction) in zip(stops, policy.targets, strict=False):  # the last stop comes after them
        table.append((1 + sign * distance, stop, fraction, left))
        left -= fraction
    if left > AMBIGUOUS_ABOVE:
        table.append((1 + sign * policy.take_profit, stops[-1], left, left))
    return [*table, (np.nan, stops[-1], 0.0, 0.0)]


@njit(cache=_CACHED, error_model="numpy")
def set_plan(plan, steps, side, entry):
    """Writes the plan of a trade from its entry price and its side's steps."""
    for filled in range(len(plan)):
        plan[filled, PLAN_LEVEL] = entry * steps[side, filled, PLAN_LEVEL]
        plan[filled, _STOP] = entry * steps[side, filled, _STOP]
        plan[filled, _CLOSES] = steps[side, filled, _CLOSES]
        plan[filled, _LEFT] = steps[side, filled, _LEFT]


@njit(cache=_CACHED, error_model="numpy")
def walk_bars(bars, bar, end, entry_bar, rule, plan, filled, adverse_first):
    """A trade that entered at `entry_bar` and has filled so many levels, over `bars` from `bar` to before `end`.

    Returns (filled levels, exit reason or NONE, price of a stop or time-out, bars held, whether the order of the
    extremes may have mattered).
    """
    adverse, favourable = (_LOW, _HIGH) if rule.sign > 0 else (_HIGH, _LOW)
    reason, price, order_mattered = NONE, 0.0, False
    while bar < end and reason == NONE:
        level, stop = plan[filled, PLAN_LEVEL], plan[filled, _STOP]
        lower, upper = min(level, stop), max(level, stop)
        # Most bars lie between the two and change nothing. The last may be the time-out.
        while bar < end - 1 and bars[bar, _LOWEST] > lower and bars[bar, _HIGHEST] < upper:
            bar += 1
        if bar > entry_bar:  # the open of the entry bar is the entry itself and triggers nothing
            price = bars[bar, _OPEN]
            filled, reason = _walk_open(price, bar == entry_bar + rule.horizon, rule, plan, filled)
        if reason == NONE:
            filled, reason, order_matters = _walk_extremes(
                bars[bar, adverse], bars[bar, favourable], bars[bar, _CLOSE], rule, plan, filled, adverse_first
            )
            price = plan[filled, _STOP]
            order_mattered |= order_matters
        bar += 1
    return filled, reason, price, bar - entry_bar, order_mattered


@njit(cache=_CACHED, error_model="numpy")
def _walk_open(open, is_last, rule, plan, filled):
    """(Filled levels, exit reason or NONE) after a bar's open; a stop or time-out there is filled at the open."""
    reason = NONE
    if rule.sign * (open - plan[filled, _STOP]) <= 0:
        reason = _stop_reason(filled)
    else:
        filled = _reach(open, rule, plan, filled)
        if filled == rule.levels:
            reason = TAKE_PROFIT
        elif is_last:
            reason = TIMEOUT
    return filled, reason


@njit(cache=_CACHED, error_model="numpy")
def _walk_extremes(adverse, favourable, close, rule, plan, filled, adverse_first):
    """A bar after its open: (filled levels, exit reason or NONE, whether the order of the extremes may matter)."""
    sign, reason = rule.sign, NONE
    if adverse_first and sign * (adverse - plan[filled, _STOP]) <= 0:
        reason = _stop_reason(filled)
        order_matters = sign * (favourable - plan[filled, PLAN_LEVEL]) >= 0
    else:
        before = filled
        filled = _reach(favourable, rule, plan, filled)
        stopped_after = sign * (adverse - plan[filled, _STOP]) <= 0
        order_matters = before < filled < rule.levels and stopped_after
        if filled == rule.levels:
            reason = TAKE_PROFIT
        elif sign * (close - plan[filled, _STOP]) <= 0 or (stopped_after and not adverse_first):
            reason = _stop_reason(filled)
    return filled, reason, order_matters


@njit(cache=_CACHED, error_model="numpy")
def _reach(price, rule, plan, filled):
    """Number of filled levels after `price`: every level that it reaches fills, in order. None reaches NaN."""
    while rule.sign * (price - plan[filled, PLAN_LEVEL]) >= 0:
        filled += 1
    return filled


@njit(cache=_CACHED, error_model="numpy")
def _stop_reason(filled):
    return STOP if filled == 0 else BREAKEVEN if filled == 1 else LOCK


@njit(cache=_CACHED, error_model="numpy")
def earned(filled, price, rule, plan, entry):
    """The return of a trade that has ended: filled levels as maker, what they left at `price` as taker."""
    total = -rule.taker_fee
    for number in range(filled):
        total += contribution(plan[number, _CLOSES], plan[number, PLAN_LEVEL], rule.sign, entry, rule.maker_fee, 0.0)
    return total + contribution(plan[filled, _LEFT], price, rule.sign, entry, rule.taker_fee, rule.slippage)


@njit(cache=_CACHED, error_model="numpy")
def contribution(fraction, price, sign, entry, fee, slippage):
    """fraction * (s * (price / entry - 1) - fee * price / entry), the price worsened by the slippage."""
    paid = price * (1 - sign * slippage)
    return fraction * (sign * (paid / entry - 1) - fee * paid / entry)


@njit(cache=_CACHED, error_model="numpy")
def _label_bars(open, high, low, close, rules, steps, with_ambiguous, adverse_first):
    """The columns of `Labels`, [sides, n] each. Backwards, so that the next missing bar is always known."""
    count, sides = len(open), len(rules)
    expected_return = np.full((sides, count), np.nan)
    exit_reason = np.zeros((sides, count), np.int8)
    bars_held = np.zeros((sides, count), np.int16)
    targets_filled = np.zeros((sides, count), np.int8)
    ambiguous = np.zeros((sides, count if with_ambiguous else 0), np.bool_)
    bars, plan = np.empty((count, 6)), np.empty(steps.shape[1:])
    next_missing = count
    for signal in range(count - 1, -1, -1):
        if not set_bar(bars, signal, open[signal], high[signal], low[signal], close[signal]):
            next_missing = signal
        first = signal + 1
        for side in range(sides):
            rule = rules[side]
            end = first + rule.horizon + 1
            if end > next_missing:
                continue
            entry = open[first] * (1 + rule.sign * rule.slippage)
            set_plan(plan, steps, side, entry)
            filled, reason, price, held, order_mattered = walk_bars(
                bars, first, end, first, rule, plan, 0, adverse_first
            )
            total = earned(filled, price, rule, plan, entry)
            if not np.isfinite(total):  # prices too far apart for a fraction of one another
                continue
            expected_return[side, signal], exit_reason[side, signal] = total, reason
            bars_held[side, signal], targets_filled[side, signal] = held, filled
            if with_ambiguous and order_mattered:
                filled, _, price, _, _ = walk_bars(bars, first, end, first, rule, plan, 0, False)
                ambiguous[side, signal] = abs(total - earned(filled, price, rule, plan, entry)) > AMBIGUOUS_ABOVE
    return expected_return, exit_reason, bars_held, targets_filled, ambiguous


@njit(cache=_CACHED, error_model="numpy")
def set_bar(bars, bar, open, high, low, close):
    """Writes a bar's row; False where the bar is missing."""
    lowest, highest = min(min(open, high), min(low, close)), max(max(open, high), max(low, close))
    bars[bar, _OPEN], bars[bar, _HIGH], bars[bar, _LOW], bars[bar, _CLOSE] = open, high, low, close
    bars[bar, _LOWEST], bars[bar, _HIGHEST] = lowest, highest
    return lowest > 0 and highest < np.inf and not np.isnan(open + high + low + close)
