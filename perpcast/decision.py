"""Which trades are taken: forecasts become signals, signals become decisions; backtest and runner call the same.

A model's expected return is net of fees and slippage already: nothing is subtracted twice.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal

import numpy as np

from perpcast.market import SIDES, Signal


@dataclass(frozen=True, slots=True)
class Taken:
    """A signal to be entered at the open of the next bar, and how much."""

    signal: Signal
    quantity: Decimal


@dataclass(frozen=True, slots=True)
class Refused:
    """A signal that is not traded, and why."""

    signal: Signal
    reason: str


Decision = Taken | Refused


def signals_from_returns(
    predicted: Mapping[str, np.ndarray],
    symbols: Sequence[str],
    open_time_ms: int,
    source: str,
    expected_funding: Mapping[str, float] | None = None,
) -> list[Signal]:
    """A signal for each symbol and side; the score is the predicted mean return less expected funding.

    `predicted` holds `buy_mean` and `sell_mean`, each [symbols], which a classifier tells beside its probabilities.
    `expected_funding` is what a long is expected to pay while it holds, as a fraction of the position's value by
    symbol: a buy pays it, a sell receives it; absent is 0.
    """
    funding = expected_funding or {}
    return [
        Signal(
            symbol, open_time_ms, side, float(predicted[f"{side}_mean"][row]) - sign * funding.get(symbol, 0.0), source
        )
        for row, symbol in enumerate(symbols)
        for side, sign in zip(SIDES, (1, -1), strict=True)
    ]


def ranked(signals: Iterable[Signal]) -> list[Signal]:
    """Best score first, then symbol, then buy before sell; a score that is not a number comes last."""
    return sorted(
        signals,
        key=lambda signal: (
            -signal.score if np.isfinite(signal.score) else np.inf,
            signal.symbol,
            SIDES.index(signal.side),
        ),
    )


def decide(
    signals: Iterable[Signal],
    *,
    threshold: float,
    occupied: Collection[str],
    max_positions: int,
    size: Callable[[Signal], Decimal | str],
    halted: str = "",
) -> list[Decision]:
    """A decision on every signal of one bar, in order of rank.

    Taken is a signal whose score lies above `threshold`, whose symbol is not `occupied` by a position (no flip, no
    second one), while fewer than `max_positions` symbols are. `size` answers a quantity, or why there is none: such a
    signal leaves its place to the next. `halted`, if it says something, refuses every entry for that reason.
    """
    taken = set(occupied)
    decisions: list[Decision] = []
    for signal in ranked(signals):
        reason = _objection(signal, threshold, taken, occupied, max_positions) or halted
        if not reason:
            quantity = size(signal)
            if isinstance(quantity, Decimal):
                taken.add(signal.symbol)
                decisions.append(Taken(signal, quantity))
                continue
            reason = quantity
        decisions.append(Refused(signal, reason))
    return decisions


def _objection(
    signal: Signal, threshold: float, taken: Collection[str], occupied: Collection[str], max_positions: int
) -> str:
    if not np.isfinite(signal.score):
        return "score is not a number"
    if not signal.score > threshold:
        return "not above the threshold"
    if signal.symbol in occupied:
        return "position open"
    if signal.symbol in taken:
        return "the other side ranks higher"
    if len(taken) >= max_positions:
        return "max_positions reached"
    return ""
