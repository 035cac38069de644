"""How large a trade is: from equity to a quantity that the exchange accepts, and its slices; Decimal throughout."""

from collections.abc import Sequence
from dataclasses import dataclass
from decimal import ROUND_FLOOR, Decimal

from perpcast.market import Instrument


@dataclass(frozen=True)
class Sizing:
    """The user's rule: the margin of one trade is `per_trade_percentage` of equity, its notional margin x leverage.

    `fractions` are those of the exit policy's targets; what they leave is the last slice.
    """

    per_trade_percentage: Decimal
    leverage: int
    fractions: tuple[Decimal, ...]

    @classmethod
    def from_config(cls, per_trade_percentage: float, leverage: int, fractions: Sequence[float]) -> "Sizing":
        """Floats as the user wrote them: 0.2 is Decimal("0.2")."""
        return cls(Decimal(repr(per_trade_percentage)), leverage, tuple(Decimal(repr(part)) for part in fractions))

    def margin(self, equity: float) -> Decimal:
        """What one trade ties up, in USDT; nothing where nothing is left."""
        return max(Decimal(equity), Decimal(0)) * self.per_trade_percentage / 100

    def notional(self, equity: float) -> Decimal:
        """Value of one trade at its entry, in USDT."""
        return self.margin(equity) * self.leverage


def floor_to_step(quantity: Decimal, step: Decimal) -> Decimal:
    """The largest multiple of `step` that is at most `quantity`."""
    return (quantity / step).to_integral_value(ROUND_FLOOR) * step


def slice_quantities(quantity: Decimal, fractions: Sequence[Decimal], step: Decimal) -> tuple[Decimal, ...]:
    """What each target closes of a filled quantity, then what is left for the take profit; they add up to it exactly.

    Slice i is floor(F_i Q) - floor(F_(i-1) Q) with F the cumulated fractions, so that rounding never accumulates.
    """
    cumulated, closed, slices = Decimal(0), Decimal(0), []
    for fraction in fractions:
        cumulated += fraction
        closed_after = floor_to_step(cumulated * quantity, step) if cumulated < 1 else quantity
        slices.append(closed_after - closed)
        closed = closed_after
    return (*slices, quantity - closed) if cumulated < 1 else tuple(slices)


def entry_quantity(
    sizing: Sizing, equity: float, price: float, lowest_exit: float, instrument: Instrument
) -> Decimal | str:
    """The quantity of an entry at about `price`, or why it is refused.

    `lowest_exit` is the lowest price at which a slice may be closed: also there it must be worth the minimum.
    """
    if instrument.status != "Trading":
        return f"instrument is {instrument.status}"
    if sizing.leverage > instrument.max_leverage:
        return f"leverage above the instrument's {instrument.max_leverage}"
    quantity = floor_to_step(sizing.notional(equity) / Decimal(price), instrument.qty_step)
    smallest = min(slice_quantities(quantity, sizing.fractions, instrument.qty_step))
    if smallest <= 0 or smallest < instrument.min_quantity:
        return f"a slice of {smallest} is below the minimum quantity {instrument.min_quantity}"
    if smallest * Decimal(lowest_exit) < instrument.min_notional:
        return f"a slice of {smallest} is below the minimum notional {instrument.min_notional}"
    return quantity
