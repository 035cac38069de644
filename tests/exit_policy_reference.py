"""The exit policy once more, written plainly for reading: no arrays, no compilation, one fill after the other."""

import math
from dataclasses import dataclass, field
from typing import Any

from perpcast.exit_policy import ExitPolicy


@dataclass
class ReferenceTrade:
    """One trade: what it filled, and what it earned."""

    fills: list[dict[str, Any]] = field(default_factory=list)
    reason: str = ""
    bars_held: int = 0
    targets_filled: int = 0
    expected_return: float = 0.0


def trade(
    bars: list[tuple[float, float, float, float]], side: str, policy: ExitPolicy, adverse_first: bool = True
) -> ReferenceTrade | None:
    """`bars` are (open, high, low, close), the signal bar first; None where one up to bar horizon + 1 is missing."""
    following = bars[1 : policy.horizon + 2]
    if len(following) < policy.horizon + 1 or any(math.isnan(price) for bar in (bars[0], *following) for price in bar):
        return None
    s = 1 if side == "buy" else -1
    entry = following[0][0] * (1 + s * policy.slippage)
    targets = [(entry * (1 + s * distance), fraction) for distance, fraction in policy.targets]
    take_profit = entry * (1 + s * policy.take_profit)
    all_by_targets = sum(fraction for _, fraction in targets) > 1 - 1e-12
    result = ReferenceTrade()
    stop = entry * (1 + s * -policy.stop)
    open_fraction = 1.0

    def close_rest(price: float, why: str, maker: bool = False) -> None:
        nonlocal open_fraction
        result.fills.append({"fraction": open_fraction, "price": price, "maker": maker, "why": why})
        result.reason, open_fraction = why, 0.0

    def stop_name() -> str:
        return {0: "stop", 1: "breakeven"}.get(result.targets_filled, "lock")

    def reach_targets(price: float) -> None:
        nonlocal stop, open_fraction
        while result.targets_filled < len(targets) and s * (price - targets[result.targets_filled][0]) >= 0:
            level, fraction = targets[result.targets_filled]
            result.fills.append({"fraction": fraction, "price": level, "maker": True, "why": "target"})
            open_fraction -= fraction
            stop = entry * (1 + s * policy.stop_after[result.targets_filled])
            result.targets_filled += 1
        if result.targets_filled < len(targets):
            return
        if all_by_targets:
            result.fills[-1]["why"] = result.reason = "take_profit"
        elif s * (price - take_profit) >= 0:
            result.targets_filled += 1
            close_rest(take_profit, "take_profit", maker=True)

    def visit(price: float, is_open: bool) -> None:
        if not result.reason and s * (price - stop) <= 0:
            close_rest(price if is_open else stop, stop_name())
        if not result.reason:
            reach_targets(price)

    for number, (open_, high, low, close) in enumerate(following, 1):
        result.bars_held = number
        adverse, favourable = (low, high) if s > 0 else (high, low)
        if number > 1:
            visit(open_, is_open=True)
        if number == policy.horizon + 1 and not result.reason:
            close_rest(open_, "timeout")
        for price in (adverse, favourable, close) if adverse_first else (favourable, adverse, close):
            if not result.reason:
                visit(price, is_open=False)
        if result.reason:
            break
    result.expected_return = -policy.taker_fee
    for fill in result.fills:
        price, fee = fill["price"], policy.maker_fee
        if not fill["maker"]:
            price, fee = price * (1 - s * policy.slippage), policy.taker_fee
        result.expected_return += fill["fraction"] * (s * (price / entry - 1) - fee * price / entry)
    return result
