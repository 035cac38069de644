"""Sizing: the arithmetic by hand, and what must hold for any quantity and any instrument."""

from dataclasses import replace
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from perpcast.market import Instrument
from perpcast.sizing import Sizing, entry_quantity, floor_to_step, slice_quantities

INSTRUMENT = Instrument(
    symbol="ABCUSDT",
    status="Trading",
    tick_size=Decimal("0.01"),
    qty_step=Decimal("0.1"),
    min_quantity=Decimal("0.1"),
    min_notional=Decimal("5"),
    max_leverage=Decimal("50"),
    launch_time_ms=0,
    funding_interval_minutes=480,
)
SIZING = Sizing.from_config(2, 10, (0.2, 0.3, 0.3))

steps = st.sampled_from([Decimal(text) for text in ("0.001", "0.01", "0.1", "1", "10", "0.25")])
quantities = st.decimals(min_value="0.001", max_value="1e6", places=4)
fraction_lists = st.lists(st.integers(1, 40), min_size=1, max_size=4).map(
    lambda parts: (
        tuple(Decimal(part) / 100 for part in parts) if sum(parts) <= 100 else (Decimal("0.5"), Decimal("0.5"))
    )
)


def test_notional_is_percentage_of_equity_times_leverage() -> None:
    assert SIZING.margin(10_000.0) == 200  # 2 % of 10,000
    assert SIZING.notional(10_000.0) == 2_000  # x 10
    assert SIZING.notional(-5.0) == 0


def test_slices_by_hand() -> None:
    # Q = 1.3, step 0.1: floor(0.26) = 0.2, floor(0.65) = 0.6, floor(1.04) = 1.0; the rest 0.3.
    expected = tuple(Decimal(text) for text in ("0.2", "0.4", "0.4", "0.3"))
    assert slice_quantities(Decimal("1.3"), SIZING.fractions, Decimal("0.1")) == expected


def test_slices_of_fractions_that_close_everything_leave_no_rest() -> None:
    halves = (Decimal("0.5"), Decimal("0.5"))
    assert slice_quantities(Decimal("0.3"), halves, Decimal("0.1")) == (Decimal("0.1"), Decimal("0.2"))


@given(quantities, fraction_lists, steps)
def test_slices_add_up_and_lie_on_the_step(quantity: Decimal, fractions: tuple[Decimal, ...], step: Decimal) -> None:
    filled = floor_to_step(quantity, step)
    slices = slice_quantities(filled, fractions, step)
    assert sum(slices) == filled
    assert len(slices) == len(fractions) + (sum(fractions) < 1)
    for part, fraction in zip(slices, (*fractions, 1 - sum(fractions)), strict=False):
        assert part >= 0
        assert part % step == 0
        assert abs(part - fraction * filled) <= step


@given(quantities, steps)
def test_floor_to_step_is_the_largest_multiple_below(quantity: Decimal, step: Decimal) -> None:
    floored = floor_to_step(quantity, step)
    assert floored <= quantity < floored + step
    assert floored % step == 0


@given(
    st.floats(100, 1e7),
    st.floats(1e-5, 1e5),
    st.floats(0.01, 20),
    steps,
    st.decimals(min_value="0.001", max_value="100", places=3),
)
def test_an_accepted_quantity_obeys_every_rule_and_never_exceeds_the_notional(
    equity: float, price: float, percentage: float, step: Decimal, minimum: Decimal
) -> None:
    sizing = Sizing.from_config(percentage, 10, (0.2, 0.3, 0.3))
    instrument = replace(INSTRUMENT, qty_step=step, min_quantity=minimum)
    lowest = price * 0.942
    quantity = entry_quantity(sizing, equity, price, lowest, instrument)
    if isinstance(quantity, str):
        return
    assert quantity % step == 0
    assert quantity * Decimal(price) <= sizing.notional(equity)
    for part in slice_quantities(quantity, sizing.fractions, step):
        assert part >= minimum
        assert part * Decimal(lowest) >= instrument.min_notional


@pytest.mark.parametrize(
    ("change", "equity", "words"),
    [
        ({"status": "Closed"}, 10_000.0, "instrument is Closed"),
        ({"max_leverage": Decimal(5)}, 10_000.0, "leverage above the instrument's 5"),
        ({"qty_step": Decimal(1), "min_quantity": Decimal(1)}, 200.0, "a slice of 0 is below the minimum quantity 1"),
        ({"min_quantity": Decimal(5)}, 10_000.0, "a slice of 4.0 is below the minimum quantity 5"),
        ({"min_notional": Decimal(400)}, 10_000.0, "a slice of 4.0 is below the minimum notional 400"),
        ({}, 0.0, "a slice of 0.0 is below the minimum quantity 0.1"),
    ],
)
def test_refusals_name_their_rule(change: dict[str, object], equity: float, words: str) -> None:
    # Equity 10,000 at price 100 is a quantity of 20, whose smallest slices are 4.0.
    answer = entry_quantity(SIZING, equity, 100.0, 98.9, replace(INSTRUMENT, **change))  # type: ignore[arg-type]
    assert answer == words
