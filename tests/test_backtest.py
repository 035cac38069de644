"""The backtest beside the live trader and beside the labels; its cash to the cent; funding and stress by hand."""

from collections import Counter
from dataclasses import replace
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perpcast.backtest import Backtest, MarketPanel, Terms, backtest, buy_and_hold
from perpcast.errors import DataError, MissingInputError
from perpcast.exit_policy import EXIT_REASONS, label_sides
from perpcast.market import SIDES, Candle, CandleSeries, Instrument
from perpcast.sizing import Sizing
from perpcast.timeframe import to_ms
from tests.live_world import BEGIN, POLICY, RULES, SIZING, STEP, World, instrument, random_market

SYMBOLS = ("A", "B", "C", "D", "E")
FIRST = BEGIN + 40 * STEP
TERMS = Terms(RULES.threshold, {"buy": POLICY, "sell": POLICY}, SIZING, 3, 1.0, 10_000.0)
INSTRUMENTS = {symbol: instrument(symbol) for symbol in SYMBOLS}
Funding = dict[str, tuple[np.ndarray, np.ndarray]]


def panel_of(market: dict[str, list[Candle]], first_ms: int, bars: int, funding: Funding | None = None) -> MarketPanel:
    candles = {symbol: CandleSeries.from_candles(found) for symbol, found in market.items()}
    return MarketPanel.build(tuple(market), candles, funding or {}, first_ms, first_ms + (bars - 1) * STEP, STEP)


def random_panel(seed: int, bars: int = 160, missing: float = 0.0, funded: bool = False) -> MarketPanel:
    """Drawn candles, a share of them missing, and a funding rate of up to 0.3 % every 32 bars."""
    rng = np.random.default_rng(seed)
    market = random_market(SYMBOLS, bars, seed)
    market = {symbol: [c for c in found if rng.random() >= missing] for symbol, found in market.items()}
    times = BEGIN + STEP * np.arange(0, bars, 32)
    funding = {symbol: (times, rng.uniform(-0.003, 0.003, len(times))) for symbol in SYMBOLS} if funded else {}
    return panel_of(market, BEGIN, bars, funding)


def random_scores(market: MarketPanel, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    score = rng.normal(0, 0.004, (2, *market.open.shape))
    score[rng.random(score.shape) < 0.1] = np.nan
    return score


# --- beside the trader that paper trading runs ----------------------------------------------------------------------


def carried(world: World, bars: int) -> tuple[Backtest, MarketPanel]:
    """The backtest of the very predictions that the trader journalled."""
    market = panel_of(world.market, world.first, bars)
    score = np.full((2, *market.open.shape), np.nan)
    for signal in world.journal.signals.values():
        bar = (to_ms(signal.open_time) - world.first) // STEP
        score[SIDES.index(signal.side), market.symbols.index(signal.symbol), bar] = signal.score
    rules = world.rules
    terms = Terms(rules.threshold, rules.policies, rules.sizing, rules.max_positions, rules.max_drawdown, TERMS.initial)
    return backtest(market, score, INSTRUMENTS, terms), market


def assert_same_account(world: World, bars: int = 160) -> Backtest:
    found, market = carried(world, bars)
    equity = world.journal.read_equity("test")
    assert [to_ms(record.time) for record in equity] == found.open_time_ms.tolist()
    for mine, theirs in (
        (found.equity, [record.equity for record in equity]),
        (found.balance, [record.balance for record in equity]),
        (found.unrealised, [record.unrealized_pnl for record in equity]),
        (found.open_positions, [record.open_positions for record in equity]),
    ):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-9)
    positions = world.journal.read_positions("test")
    trades = found.trades
    assert len(trades) == len(positions)
    for row, position in enumerate(positions):
        assert market.symbols[trades.symbol[row]] == position.symbol
        assert SIDES[trades.side[row]] == position.side
        assert trades.entry_ms[row] == to_ms(position.entry_time)
        assert trades.entry_price[row] == position.entry_price
        assert trades.quantity[row] == position.quantity
        assert trades.pnl[row] == pytest.approx(position.realized_pnl, abs=1e-9)
        assert trades.bars_held[row] == position.bars_held
        assert trades.targets_filled[row] == position.targets_filled
        assert trades.closed[row] == (position.exit_time is not None)
        if position.exit_time is not None:
            assert trades.exit_ms[row] == to_ms(position.exit_time)
            assert trades.exit_reason[row] == position.exit_reason
            assert trades.expected_return[row] == pytest.approx(position.realized_return, abs=1e-12)
    assert found.refused == Counter(
        signal.reason for signal in world.journal.signals.values() if signal.decision == "refused"
    )
    assert found.cancelled == sum(e.kind == "entry_cancelled" for e in world.journal.events.values())
    return found


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"threshold": -1.0},
        {"max_positions": 1},
        {"max_drawdown": 0.002},
        {"sizing": Sizing.from_config(40, 10, (0.2, 0.3, 0.3))},  # the third finds no free margin
        {"policies": {"buy": replace(POLICY, horizon=4), "sell": replace(POLICY, stop=0.02)}},
    ],
    ids=lambda changed: "-".join(changed) or "rules",
)
def test_account_equals_the_traders(changed: dict[str, Any]) -> None:
    world = World(random_market(SYMBOLS, 200, seed=3), FIRST).with_rules(**changed)
    world.run()
    found = assert_same_account(world)
    assert found.trades.closed.any()


@pytest.mark.soak(50)
@pytest.mark.parametrize("percentage", [2, 40])
def test_account_equals_the_traders_where_candles_are_missing(seed: int, percentage: float) -> None:
    """At 40 % of equity a trade, an entry that waits for a missing candle leaves no margin for a third."""
    rng = np.random.default_rng(seed)
    market = random_market(SYMBOLS, 200, seed)
    gone = {symbol: rng.random(200) < 0.06 for symbol in SYMBOLS}
    for symbol in SYMBOLS:
        start = int(rng.integers(60, 150))
        gone[symbol][start : start + int(rng.integers(1, 40))] |= symbol in "BD"  # past a time-out
        gone[symbol][-1] = False
    market = {
        symbol: [c for c, lost in zip(market[symbol], gone[symbol], strict=True) if not lost] for symbol in SYMBOLS
    }
    market["A"] = random_market(("A",), 200, seed)["A"]  # so that every bar comes
    sizing = Sizing.from_config(percentage, 10, (0.2, 0.3, 0.3))
    world = World(market, FIRST, lookback=2).with_rules(threshold=0.001, sizing=sizing)
    world.run()
    found = assert_same_account(world)
    assert found.cancelled or seed


# --- beside the labels ----------------------------------------------------------------------------------------------


@given(st.integers(0, 10_000))
def test_every_trade_is_its_label(seed: int) -> None:
    """E1: the label kernel, the same policy, the same decisions."""
    market = random_panel(seed, missing=0.01)
    found = backtest(market, random_scores(market, seed), INSTRUMENTS, TERMS).trades
    checked = 0
    for symbol in range(len(SYMBOLS)):
        prices = (market.open[symbol], market.high[symbol], market.low[symbol], market.close[symbol])
        labels = label_sides(*prices, TERMS.policies, ambiguous=False)
        for row in np.flatnonzero(found.closed & (found.symbol == symbol)):
            label, signal = labels[SIDES[found.side[row]]], (found.signal_ms[row] - BEGIN) // STEP
            if np.isnan(label.expected_return[signal]):
                continue  # the horizon holds a missing bar, or reaches beyond the last
            checked += 1
            assert found.expected_return[row] == pytest.approx(label.expected_return[signal], abs=1e-12)
            assert found.exit_reason[row] == label.exit_reason[signal]
            assert found.bars_held[row] == label.bars_held[signal]
            assert found.targets_filled[row] == label.targets_filled[signal]
    assert checked > 10


# --- cash -----------------------------------------------------------------------------------------------------------


@given(
    st.integers(0, 10_000),
    st.sampled_from([0.0, 0.05]),
    st.sampled_from([0.0, 0.5]),
    st.sampled_from([-np.inf, 0.0, 0.005]),
)
def test_cash_adds_up_at_every_bar(seed: int, missing: float, stop_slide: float, threshold: float) -> None:
    market = random_panel(seed, missing=missing, funded=True)
    terms = replace(TERMS, threshold=threshold)
    found = backtest(market, random_scores(market, seed), INSTRUMENTS, terms, stop_slide=stop_slide)
    flows = found.initial + found.realised - found.fees + found.funding
    assert np.abs(found.equity - (flows + found.unrealised)).max() < 1e-6
    assert np.abs(found.balance - flows).max() < 1e-6
    trades = found.trades
    assert trades.pnl.sum() == pytest.approx(found.realised[-1] - found.fees[-1], abs=1e-6)
    assert trades.fees.sum() == pytest.approx(found.fees[-1], abs=1e-6)
    assert trades.funding.sum() == pytest.approx(found.funding[-1], abs=1e-6)
    assert np.all(np.diff(found.fees) >= 0)
    assert found.open_positions.max() <= terms.max_positions
    # Every signal was taken or refused; entries wait for a bar that came, never came, or lies beyond the last.
    signals = int(np.isfinite(np.where(market.present, random_scores(market, seed), np.nan)).sum())
    waiting = signals - sum(found.refused.values()) - len(trades) - found.cancelled
    assert 0 <= waiting <= terms.max_positions


def test_held_by_hand_fees_funding_and_what_is_open() -> None:
    """One buy at 100 on bar 1, a target at 101.2 on bar 4, then still open; no slippage, equity 10,000.

    2 % x 10 = 2,000 of value: 20 coins. Entry fee 2000 x 0.00055 = 1.10. Target 1 closes 4 at +1.2: 4.80, maker fee
    4 x 101.2 x 0.0002 = 0.08096. Funding 0.001 at bar 1 is settled before the entry, at bar 3 costs 20 x 100 x 0.001 =
    2.00, at bar 5 16 x 101 x 0.001 = 1.616.
    """
    closes = [100.0, 100.0, 100.0, 100.0, 101.0, 101.0]
    market = one_symbol(
        [100.0, 100.0, 100.0, 100.0, 100.0, 101.0], closes, highs={4: 101.2}, funding={1: 1e-3, 3: 1e-3, 5: 1e-3}
    )
    found = backtest(market, signal_at(market, 0), {"A": whole_coins()}, without_slippage())
    assert found.fees == pytest.approx([0, 1.1, 1.1, 1.1, 1.1 + 0.08096, 1.1 + 0.08096])
    assert found.funding == pytest.approx([0, 0, 0, -2.0, -2.0, -3.616])
    assert found.realised == pytest.approx([0, 0, 0, 0, 4.8, 4.8])
    assert found.unrealised == pytest.approx([0, 0, 0, 0, 16.0, 16.0])
    assert found.equity[-1] == pytest.approx(10_000 - 1.18096 - 3.616 + 4.8 + 16)
    assert found.open_positions.tolist() == [0, 1, 1, 1, 1, 1]
    (trade,) = [found.trades]
    assert (trade.quantity[0], trade.targets_filled[0], trade.closed[0], trade.exit_ms[0]) == (20, 1, False, -1)
    assert EXIT_REASONS[trade.exit_reason[0]] == "none"


def test_a_short_receives_what_a_long_pays() -> None:
    market = one_symbol([100.0] * 4, [100.0] * 4, funding={2: 1e-3})
    short = backtest(market, signal_at(market, 0, side=1), {"A": whole_coins()}, without_slippage())
    assert short.funding[-1] == pytest.approx(2.0)


def test_funding_goes_on_over_missing_bars_until_time_is_out() -> None:
    """Horizon 3, entered on bar 1: the time-out is due at bar 4, which is missing, as all from bar 2 to 5 are.

    Paid at bars 3 and 4, on 20 coins at the last close of 100; the close of bar 6 books the time-out of bar 4.
    """
    opens = [100.0, 100.0, np.nan, np.nan, np.nan, np.nan, 90.0]
    market = one_symbol(opens, [100.0] * 6 + [90.0], funding={3: 1e-3, 4: 1e-3, 5: 1e-3, 6: 1e-3})
    terms = without_slippage(horizon=3)
    found = backtest(market, signal_at(market, 0), {"A": whole_coins()}, terms)
    assert found.funding == pytest.approx([0, 0, 0, -2, -4, -4, -4])
    assert found.open_positions.tolist() == [0, 1, 1, 1, 1, 1, 0]
    assert EXIT_REASONS[found.trades.exit_reason[0]] == "timeout"
    assert found.trades.exit_ms[0] == BEGIN + 4 * STEP
    assert found.trades.pnl[0] == pytest.approx(-2 * 1.1)  # out at 100, where it went in


@pytest.mark.parametrize(
    ("opens", "low", "filled"),
    [
        ([100.0, 100.0, 100.0], 97.9, 98.4),  # stop at 98.9, low 97.9: half-way is 98.4
        ([100.0, 100.0, 98.0], 97.0, 97.5),  # opens beyond the stop at 98: half-way to 97
        ([100.0, 100.0, 98.0], 98.0, 98.0),  # no worse price was traded
    ],
)
def test_stress_fills_stops_half_way_to_the_extreme(opens: list[float], low: float, filled: float) -> None:
    market = one_symbol(opens, [100.0, 100.0, 98.5], lows={2: low})
    found = backtest(market, signal_at(market, 0), {"A": whole_coins()}, without_slippage(), stop_slide=0.5)
    # 20 coins, out at `filled`, taker fee on 100 and on that price.
    assert found.trades.pnl[0] == pytest.approx(20 * (filled - 100) - 0.00055 * 20 * (100 + filled))
    assert found.trades.expected_return[0] == pytest.approx(found.trades.pnl[0] / 2000, abs=1e-12)


def test_entries_until_allows_no_more() -> None:
    market = random_panel(5)
    terms, score = replace(TERMS, threshold=-np.inf), random_scores(market, 5)
    until = np.minimum(np.arange(160) // 20, 5)  # one more every 20 bars, five in all
    found = backtest(market, score, INSTRUMENTS, terms, entries_until=until).trades
    assert len(found) == 5
    entered = np.searchsorted(np.sort(found.signal_ms), market.open_time_ms, side="right")
    assert np.all(entered <= until)
    # With every signal above the threshold and places free, it is entered as soon as it may be.
    assert np.all(entered >= np.minimum(until, 3))


def test_a_position_never_starts_on_its_own_signals_bar() -> None:
    market = random_panel(6)
    trades = backtest(market, random_scores(market, 6), INSTRUMENTS, TERMS).trades
    assert np.all(trades.entry_ms - trades.signal_ms == STEP)
    opens = market.open[trades.symbol, (trades.entry_ms - BEGIN) // STEP]
    sign = np.where(trades.side == 0, 1, -1)
    np.testing.assert_array_equal(trades.entry_price, opens * (1 + sign * POLICY.slippage))


def test_the_order_of_the_symbols_changes_nothing() -> None:
    """Equal scores are ranked by name, wherever the symbols stand."""
    market, back = random_panel(12, funded=True), slice(None, None, -1)
    score = np.round(random_scores(market, 12), 3)
    columns: dict[str, Any] = {n: getattr(market, n)[back] for n in ("open", "high", "low", "close", "funding")}
    reversed_ = replace(market, symbols=market.symbols[back], **columns)
    one, other = backtest(market, score, INSTRUMENTS, TERMS), backtest(reversed_, score[:, back], INSTRUMENTS, TERMS)
    np.testing.assert_array_equal(one.equity, other.equity)
    names = [[account.symbols[code] for code in account.trades.symbol] for account in (one, other)]
    assert names[0] == names[1]


def test_the_future_changes_nothing_before_it() -> None:
    """Other candles and scores from bar 100 on: the same account until then."""
    one, other = random_panel(7, funded=True), random_panel(8, funded=True)
    columns = ("open", "high", "low", "close", "funding")
    spliced: dict[str, Any] = {n: np.hstack([getattr(one, n)[:, :100], getattr(other, n)[:, 100:]]) for n in columns}
    market, score = replace(one, **spliced), random_scores(one, 7)
    mixed = np.dstack([score[..., :100], random_scores(one, 9)[..., 100:]])
    before, after = (backtest(m, s, INSTRUMENTS, TERMS) for m, s in ((one, score), (market, mixed)))
    np.testing.assert_array_equal(before.equity[:100], after.equity[:100])
    assert before.equity[-1] != after.equity[-1]


def test_buy_and_hold_by_hand() -> None:
    """10,000 over two symbols, the second from bar 1 on: 5,000 each, fee included, without slippage."""
    market = one_symbol([100.0, 100.0, 100.0], [100.0, 110.0, 120.0], funding={0: 1e-3, 2: 1e-3})
    second = one_symbol([np.nan, 50.0, 40.0], [np.nan, 40.0, 40.0])
    columns = ("open", "high", "low", "close", "funding")
    stacked: dict[str, Any] = {n: np.vstack([getattr(m, n) for m in (market, second)]) for n in columns}
    both = replace(market, symbols=("A", "B"), **stacked)
    found = buy_and_hold(both, without_slippage())
    value = 5000 / 1.00055  # of each at its entry
    assert found.fees == pytest.approx([5000 - value, 10_000 - 2 * value, 10_000 - 2 * value])
    assert found.funding == pytest.approx([0, 0, -value / 1000])  # the first rate was settled before the entry
    assert found.unrealised == pytest.approx([0, value * (0.1 - 0.2), value * (0.2 - 0.2)])
    np.testing.assert_allclose(found.equity, 10_000 + found.realised - found.fees + found.funding + found.unrealised)
    assert found.open_positions.tolist() == [1, 2, 2]


# --- its inputs -----------------------------------------------------------------------------------------------------


def test_panel_leaves_holes_and_adds_up_the_funding_of_a_bar() -> None:
    candles = random_market(("A",), 5, seed=1)["A"]
    funding = {"A": (BEGIN + np.array([-1, 0, 2 * STEP, 2 * STEP + 1, 5 * STEP]), np.array([9.0, 1.0, 2.0, 3.0, 9.0]))}
    market = panel_of({"A": [*candles[:2], *candles[3:]]}, BEGIN, 5, funding)
    assert market.funding.tolist() == [[1.0, 0.0, 5.0, 0.0, 0.0]]
    assert np.isnan(market.close[0]).tolist() == [False, False, True, False, False]
    assert market.present.tolist() == [[True, True, False, True, True]]
    with pytest.raises(DataError, match="A: expected candles every 900000 ms"):
        panel_of({"A": [replace(candles[0], open_time_ms=BEGIN + 1)]}, BEGIN, 5)


def test_wrong_inputs_are_named() -> None:
    market = random_panel(1)
    with pytest.raises(ValueError, match=r"shape \(2, 5, 160\)"):
        backtest(market, np.zeros((2, 5, 159)), INSTRUMENTS, TERMS)
    with pytest.raises(MissingInputError, match="no instrument for E"):
        backtest(market, random_scores(market, 1), {s: INSTRUMENTS[s] for s in "ABCD"}, TERMS)
    terms = replace(TERMS, sizing=Sizing.from_config(2, 10, (0.5,)))
    with pytest.raises(ValueError, match="sliced by"):
        backtest(market, random_scores(market, 1), INSTRUMENTS, terms)


def one_symbol(
    opens: list[float],
    closes: list[float],
    *,
    highs: dict[int, float] | None = None,
    lows: dict[int, float] | None = None,
    funding: dict[int, float] | None = None,
) -> MarketPanel:
    """Bars of symbol A: extremes at open and close unless given; an open of NaN is a missing bar."""
    open_, close = np.array(opens), np.where(np.isnan(opens), np.nan, closes)
    high, low, rates = np.maximum(open_, close), np.minimum(open_, close), np.zeros(len(opens))
    for column, given_values in ((high, highs), (low, lows), (rates, funding)):
        for bar, value in (given_values or {}).items():
            column[bar] = value
    times = BEGIN + STEP * np.arange(len(opens))
    return MarketPanel(("A",), times, STEP, *(column[None] for column in (open_, high, low, close, rates)))


def signal_at(market: MarketPanel, bar: int, side: int = 0) -> np.ndarray:
    score = np.full((2, *market.open.shape), np.nan)
    score[side, 0, bar] = 1.0
    return score


def whole_coins() -> Instrument:
    return replace(instrument("A"), qty_step=Decimal(1), min_quantity=Decimal(1))


def without_slippage(**changes: Any) -> Terms:
    policy = replace(POLICY, slippage=0.0, **changes)
    return replace(TERMS, policies={"buy": policy, "sell": policy})
