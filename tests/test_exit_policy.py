"""The exit policy: the worked cases, a plain reference over drawn and recorded markets, the trade bar by bar."""

import ast
import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import fields
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from perpcast.config import load_settings
from perpcast.exit_policy import EXIT_REASONS, ExitPolicy, Labels, OpenTrade, label_sides, label_trades
from perpcast.market import SIDES, Side
from tests.exit_policy_reference import trade
from tests.recorded import CANDLES, needs_recorded, recorded_candles

ROOT = Path(__file__).parents[1]
CASES = ROOT.parent / "shared" / "spec" / "exit_policy_cases.json"
PANEL = "binance_usdm_15m_panel51_1y"

POLICY = ExitPolicy(
    stop=0.011,
    take_profit=0.058,
    targets=((0.012, 0.2), (0.024, 0.3), (0.035, 0.3)),
    stop_after=(0.0, 0.012, 0.024),
    horizon=100,
    taker_fee=0.00055,
    maker_fee=0.0002,
    slippage=0.0002,
)
BOTH: dict[Side, ExitPolicy] = {"buy": POLICY, "sell": POLICY}
SHORT = dataclasses.replace(POLICY, horizon=5)
NO_LABEL = "no label"

Bar = tuple[float, float, float, float]


def columns(bars: list[Bar]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    open_, high, low, close = (np.array(column) for column in zip(*bars, strict=True))
    return open_, high, low, close


def row(labels: Labels, signal: int) -> tuple[Any, ...]:
    return tuple(getattr(labels, field.name)[signal].item() for field in fields(Labels))


def is_no_label(labels: Labels, signal: int) -> bool:
    expected_return, *others = row(labels, signal)
    return bool(np.isnan(expected_return)) and others == [0, 0, 0, False]


# --- worked cases --------------------------------------------------------------------------------------------------


def cases() -> list[Any]:
    if not CASES.exists():
        return [
            pytest.param(
                None, marks=pytest.mark.skip(reason="the worked cases are kept in shared/spec, which is absent")
            )
        ]
    return [pytest.param(case, id=f"{case['name']} ({case['side']})") for case in json.loads(CASES.read_text())]


@pytest.mark.parametrize("case", cases())
def test_worked_case(case: dict[str, Any]) -> None:
    policy = ExitPolicy(**case["policy"])
    bars = [(bar["o"], bar["h"], bar["l"], bar["c"]) for bar in case["bars"]]
    labels, expected = label_trades(*columns(bars), case["side"], policy), case["expected"]
    if expected is None:
        assert is_no_label(labels, 0)
        return
    assert labels.expected_return[0] == pytest.approx(expected["expected_return"], abs=1e-12)
    assert EXIT_REASONS[labels.exit_reason[0]] == expected["exit_reason"]
    assert labels.bars_held[0] == expected["bars_held"]
    assert labels.targets_filled[0] == expected["targets_filled"]
    assert labels.ambiguous[0] == expected["ambiguous"]
    fills, held = walk(case["side"], policy, bars)
    assert [(fill.maker, fill.why) for fill in fills] == [(fill["maker"], fill["why"]) for fill in expected["fills"]]
    for fill, wanted in zip(fills, expected["fills"], strict=True):
        assert (fill.fraction, fill.price) == pytest.approx((wanted["fraction"], wanted["price"]), rel=1e-12)
    assert held.expected_return == pytest.approx(expected["expected_return"], abs=1e-12)


def walk(side: Side, policy: ExitPolicy, bars: list[Bar]) -> tuple[list[Any], OpenTrade]:
    held, fills = OpenTrade(side, policy, bars[1][0]), []
    for bar in bars[1:]:
        fills += held.walk(*bar)
        if held.closed:
            break
    return fills, held


# Signal bar, then the bars of the trade; entry 100, no fees, no slippage; what each line adds up to stands beside it.
FREE = dataclasses.replace(SHORT, taker_fee=0.0, maker_fee=0.0, slippage=0.0)
FLAT: Bar = (100.0, 100.0, 100.0, 100.0)


@pytest.mark.parametrize(
    ("bars", "expected", "reason"),
    [
        ([(100, 100, 98.9, 99)], -0.011, "stop"),  # the low is exactly the stop
        ([FLAT, (98, 99, 97, 98)], -0.02, "stop"),  # opens beyond the stop: filled at 98
        ([(100, 101.2, 100, 101), (100, 100, 100, 100)], 0.2 * 0.012, "breakeven"),  # 20 % at +1.2 %, the rest at 0
        (
            [(100, 102.4, 100, 102), (101, 101, 101, 101)],
            0.2 * 0.012 + 0.3 * 0.024 + 0.5 * 0.01,
            "lock",
        ),  # opens past +1.2 %
        ([(100, 106, 100, 106)], 0.2 * 0.012 + 0.3 * 0.024 + 0.3 * 0.035 + 0.2 * 0.058, "take_profit"),
        ([FLAT] * 5 + [(100.5, 120, 80, 90)], 0.005, "timeout"),  # of bar 6 only the open counts
        ([FLAT] * 5 + [(98.9, 120, 80, 90)], -0.011, "stop"),  # that open is exactly the stop: no time-out
        ([FLAT] * 5 + [(101.5, 120, 80, 90)], 0.2 * 0.012 + 0.8 * 0.015, "timeout"),  # that open fills target 1 first
    ],
)
def test_buy_without_costs_earns_what_its_fills_add_up_to(bars: list[Bar], expected: float, reason: str) -> None:
    bars = [FLAT, *bars, *[FLAT] * (6 - len(bars))]
    labels = label_trades(*columns(bars), "buy", FREE)
    assert labels.expected_return[0] == pytest.approx(expected, abs=1e-12)
    assert EXIT_REASONS[labels.exit_reason[0]] == reason
    mirrored = [(200 - o, 200 - low, 200 - h, 200 - c) for o, h, low, c in bars]
    assert label_trades(*columns(mirrored), "sell", FREE).expected_return[0] == pytest.approx(expected, abs=1e-12)


# --- the compiled pass beside the plain reference ------------------------------------------------------------------


def assert_equals_reference(
    bars: list[Bar], policies: Mapping[Side, ExitPolicy], signals: Iterable[int]
) -> Counter[tuple[Side, str]]:
    """Both sides' labels equal the plain rule's, in either order; returns how often each side ended in which way."""
    ends: Counter[tuple[Side, str]] = Counter()
    both, swapped = label_sides(*columns(bars), policies), label_sides(*columns(bars), policies, adverse_first=False)
    for side, signal in ((side, signal) for side in policies for signal in signals):
        policy, labels = policies[side], both[side]
        window = bars[signal : signal + policy.horizon + 2]
        expected, other = trade(window, side, policy), trade(window, side, policy, adverse_first=False)
        if expected is None or other is None:
            assert is_no_label(labels, signal)
            assert np.isnan(swapped[side].expected_return[signal])
            ends[side, NO_LABEL] += 1
            continue
        assert abs(swapped[side].expected_return[signal] - other.expected_return) <= 1e-12
        assert EXIT_REASONS[swapped[side].exit_reason[signal]] == other.reason
        assert len(swapped[side].ambiguous) == 0
        expected_return, reason, bars_held, targets_filled, ambiguous = row(labels, signal)
        assert abs(expected_return - expected.expected_return) <= 1e-12
        assert EXIT_REASONS[reason] == expected.reason
        assert (bars_held, targets_filled) == (expected.bars_held, expected.targets_filled)
        assert ambiguous == (abs(expected.expected_return - other.expected_return) > 1e-12)
        ends[side, expected.reason] += 1
        ends[side, "ambiguous"] += ambiguous
    return ends


@st.composite
def markets(draw: st.DrawFn) -> list[Bar]:
    """Rough walks in steps of 0.1 %, so that levels are touched, crossed and gapped over."""
    step = st.integers(-25, 25)
    price, bars = 1000, []
    for _ in range(draw(st.integers(7, 40))):
        open_ = price + draw(st.sampled_from([0, 0, 0, -12, 12, 24, 40]))
        close = open_ + draw(step)
        high = max(open_, close) + abs(draw(step))
        low = min(open_, close) - abs(draw(step))
        bars.append((open_ / 10, high / 10, low / 10, close / 10))
        price = max(close, 300)
    return bars


@st.composite
def exit_policies(draw: st.DrawFn) -> ExitPolicy:
    """Any number of targets, which may close everything; stops that move up, down or stay."""
    rungs = sorted(draw(st.sets(st.integers(1, 40), max_size=5)))
    shares = draw(st.lists(st.integers(1, 5), min_size=len(rungs), max_size=len(rungs)))
    whole = sum(shares) + draw(st.integers(0, 5))
    return ExitPolicy(
        stop=draw(st.integers(1, 30)) / 1000,
        take_profit=(max(rungs, default=0) + draw(st.integers(1, 20))) / 1000,
        targets=tuple((rung / 1000, share / whole) for rung, share in zip(rungs, shares, strict=True)),
        stop_after=tuple(draw(st.integers(-15, rung - 1)) / 1000 for rung in rungs),
        horizon=draw(st.integers(1, 12)),
        taker_fee=draw(st.sampled_from([0.0, 0.00055])),
        maker_fee=draw(st.sampled_from([0.0, 0.0002])),
        slippage=draw(st.sampled_from([0.0, 0.0002, 0.01])),
    )


def with_missing(bars: list[Bar], holes: Iterable[tuple[int, int]]) -> list[Bar]:
    """NaN at each (bar, column); a hole behind the last bar is none."""
    table = np.array(bars)
    for bar, column in holes:
        table[bar : bar + 1, column] = np.nan
    return list(map(tuple, table.tolist()))


missing = st.sets(st.tuples(st.integers(0, 39), st.integers(0, 3)), max_size=2)


@given(bars=markets(), holes=missing, buy=exit_policies(), sell=exit_policies())
def test_labels_of_any_policies_on_drawn_markets_equal_the_plain_reference(
    bars: list[Bar], holes: set[tuple[int, int]], buy: ExitPolicy, sell: ExitPolicy
) -> None:
    assert_equals_reference(with_missing(bars, holes), {"buy": buy, "sell": sell}, range(len(bars)))


@given(bars=markets(), slippage=st.sampled_from([0.0, 0.0002]))
def test_labels_on_drawn_markets_equal_the_plain_reference(bars: list[Bar], slippage: float) -> None:
    policy = dataclasses.replace(SHORT, slippage=slippage)
    assert_equals_reference(bars, {"buy": policy, "sell": policy}, range(len(bars)))


def drawn_stretch(name: str, rng: np.random.Generator) -> list[Bar]:
    """400 recorded bars; in half of them a gap, in half of them a stretch in which the price stands still."""
    frame = recorded_candles(name)
    first = int(rng.integers(len(frame) - 400))
    table = frame[["open", "high", "low", "close"]].to_numpy()[first : first + 400].copy()
    begin, bars = rng.integers(10, 350, 2), rng.integers(1, 40, 2)
    if rng.random() < 0.5:
        table[begin[0] : begin[0] + bars[0]] = table[begin[0] - 1, 3]
    if rng.random() < 0.5:
        table[begin[1] : begin[1] + bars[1], rng.integers(4)] = np.nan
    return list(map(tuple, table.tolist()))


@needs_recorded
def test_labels_of_cases_drawn_from_recorded_candles_equal_the_plain_reference() -> None:
    rng = np.random.default_rng(4)
    names = sorted(str(path.relative_to(CANDLES).with_suffix("")) for path in CANDLES.glob("*/*.parquet"))
    drawn = [name for name in names if not name.startswith(PANEL)] + list(rng.choice(names, 30, replace=False))
    ends: Counter[tuple[Side, str]] = Counter()
    for name in drawn:
        signals = rng.choice(298, 40, replace=False).tolist()  # bar 101 exists: only a gap takes the label
        ends += assert_equals_reference(drawn_stretch(name, rng), BOTH, signals)
    for side in SIDES:
        for end in (*EXIT_REASONS[1:], NO_LABEL, "ambiguous"):
            assert ends[side, end] >= 10, (side, end)


@needs_recorded
def test_labels_through_the_crash_of_2025_10_10_equal_the_plain_reference() -> None:
    """Bars that halve a price: entries into them, gaps out of them, every level of a sell inside one."""
    ends: Counter[tuple[Side, str]] = Counter()
    deepest = 0.0
    for path in sorted((CANDLES / PANEL).glob("*.parquet"))[::3]:
        frame = recorded_candles(f"{PANEL}/{path.stem}")
        crash = int(frame["open_time"].searchsorted(pd.Timestamp("2025-10-10T21:15Z")))
        table = frame[["open", "high", "low", "close"]].iloc[crash - 110 : crash + 130]
        deepest = max(deepest, float((1 - table["low"] / table["open"]).max()))
        signals = [*range(0, 100, 9), *range(100, 120)]
        bars = list(table.itertuples(index=False, name=None))
        ends += assert_equals_reference(bars, BOTH, signals)
    assert deepest > 0.5
    assert all(ends[side, reason] for side in SIDES for reason in EXIT_REASONS[1:-1])


# --- which bars have a label ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", range(4))
@pytest.mark.parametrize("price", [np.nan, np.inf, 0.0, -1.0])
@pytest.mark.parametrize("bar", [0, 1, 2, 50, 101, 102])
def test_label_is_unknown_where_a_bar_up_to_bar_101_is_missing(bar: int, price: float, column: int) -> None:
    """Also though every trade is over in bar 1, which holds both stops."""
    table = np.full((104, 4), 100.0)
    table[1] = 100, 110, 90, 100
    table[bar, column] = price
    open_, high, low, close = table.T
    for labels in label_sides(open_, high, low, close, BOTH).values():
        if bar > 101:
            assert row(labels, 0)[1:3] == (EXIT_REASONS.index("stop"), 1)
        else:
            assert is_no_label(labels, 0)


@pytest.mark.parametrize(("bars", "labelled"), [(0, 0), (1, 0), (101, 0), (102, 1), (150, 49)])
def test_last_label_has_bar_101_behind_it(bars: int, labelled: int) -> None:
    price = np.full(bars, 100.0)
    for labels in label_sides(price, price, price, price, BOTH).values():
        assert np.isfinite(labels.expected_return).tolist() == [True] * labelled + [False] * (bars - labelled)
        assert all(is_no_label(labels, signal) for signal in range(labelled, bars))


@given(bars=markets(), side=st.sampled_from(SIDES), missing=st.integers(0, 39))
def test_label_across_a_missing_bar_is_unknown(bars: list[Bar], side: Side, missing: int) -> None:
    arrays = columns(bars)
    whole = label_trades(*arrays, side, SHORT).expected_return
    missing %= len(bars)
    arrays[2][missing] = np.nan
    cut = label_trades(*arrays, side, SHORT).expected_return
    touched = np.arange(max(missing - SHORT.horizon - 1, 0), missing + 1)
    assert np.isnan(cut[touched]).all()
    np.testing.assert_array_equal(np.delete(cut, touched), np.delete(whole, touched))


@given(bars=markets(), side=st.sampled_from(SIDES), data=st.data())
def test_label_does_not_change_with_bars_after_its_horizon(bars: list[Bar], side: Side, data: st.DataObject) -> None:
    signal = data.draw(st.integers(0, len(bars) - SHORT.horizon - 2))
    end = signal + SHORT.horizon + 2
    whole, cut = label_trades(*columns(bars), side, SHORT), label_trades(*columns(bars[:end]), side, SHORT)
    assert whole.expected_return[signal] == cut.expected_return[signal]


numbers = st.floats() | st.floats(1e-320, 1e-300) | st.floats(1e300) | st.floats(90, 110)


@given(bars=st.lists(st.tuples(numbers, numbers, numbers, numbers), max_size=30))
@example(bars=[(1e-310,) * 4] * 2 + [(1e300,) * 4] * 5)  # a return beyond the largest float
def test_no_numbers_give_a_label_that_is_not_finite(bars: list[Bar]) -> None:
    open_, high, low, close = np.array(bars, float).reshape(-1, 4).T
    for labels in label_sides(open_, high, low, close, {"buy": SHORT, "sell": SHORT}).values():
        unknown = np.flatnonzero(~np.isfinite(labels.expected_return)).tolist()
        assert all(is_no_label(labels, signal) for signal in unknown)


# --- one side, both sides, bar by bar ------------------------------------------------------------------------------


@given(bars=markets(), buy=exit_policies(), sell=exit_policies())
def test_sides_do_not_depend_on_one_another_nor_on_what_is_asked_for(
    bars: list[Bar], buy: ExitPolicy, sell: ExitPolicy
) -> None:
    policies: dict[Side, ExitPolicy] = {"buy": buy, "sell": sell}
    both = label_sides(*columns(bars), policies)
    plain = label_sides(*columns(bars), policies, ambiguous=False)
    for side in SIDES:
        alone = label_trades(*columns(bars), side, policies[side])
        assert len(plain[side].ambiguous) == 0
        for field in fields(Labels):
            whole = getattr(both[side], field.name)
            np.testing.assert_array_equal(getattr(alone, field.name), whole)
            if field.name != "ambiguous":
                np.testing.assert_array_equal(getattr(plain[side], field.name), whole)


@given(bars=markets(), side=st.sampled_from(SIDES), policy=st.just(SHORT) | exit_policies())
def test_trade_walked_bar_by_bar_equals_its_label(bars: list[Bar], side: Side, policy: ExitPolicy) -> None:
    labels = label_trades(*columns(bars), side, policy)
    for signal in range(len(bars) - policy.horizon - 1):
        fills, held = walk(side, policy, bars[signal:])
        assert abs(held.expected_return - labels.expected_return[signal]) <= 1e-12
        assert (EXIT_REASONS.index(held.exit_reason), held.bars_held, held.targets_filled) == row(labels, signal)[1:4]
        assert sum(fill.fraction for fill in fills) == pytest.approx(1)
        assert held.remaining == 0


def test_open_trade_tells_its_stop_and_what_is_left() -> None:
    held = OpenTrade("buy", FREE, 100.0)
    assert (held.stop_level, held.remaining) == pytest.approx((98.9, 1))
    held.walk(100.0, 102.5, 100.0, 102.0)
    assert (held.targets_filled, held.stop_level, held.remaining) == pytest.approx((2, 101.2, 0.5))
    held.walk(102.0, 110.0, 102.0, 108.0)
    assert (held.targets_filled, held.exit_reason, held.remaining) == (4, "take_profit", 0)
    with pytest.raises(ValueError, match="the trade ended by take_profit in bar 2"):
        held.walk(108.0, 108.0, 108.0, 108.0)


# --- the policy ----------------------------------------------------------------------------------------------------


def test_from_config_gives_the_users_numbers_exactly() -> None:
    settings_ = load_settings([ROOT / "config.yaml"])
    for side in SIDES:
        assert (
            ExitPolicy.from_config(settings_.risk_profile, settings_.fees, side) == POLICY
        )  # 1 - 0.989 is 0.011, not 0.011000000000000010
    assert float(1 - Decimal("0.989")) == POLICY.stop != 1 - 0.989


@pytest.mark.parametrize("side", SIDES)
def test_changed_target_in_the_configuration_changes_labels_and_the_open_trade(tmp_path: Path, side: Side) -> None:
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text(
        "risk_profile: {partial_closes: [{target_pct: 2.0, close_fraction: 0.5, stop_pct: 0.5}]}", encoding="utf-8"
    )
    bars = [FLAT, (100.0, 102.3, 100.0, 100.7), *[FLAT] * 100]
    if side == "sell":
        bars = [(200 - o, 200 - low, 200 - h, 200 - c) for o, h, low, c in bars]
    returns, fractions = [], []
    for files in ([ROOT / "config.yaml"], [ROOT / "config.yaml", overlay]):
        configured = load_settings(files)
        policy = ExitPolicy.from_config(configured.risk_profile, configured.fees, side)
        returns.append(label_sides(*columns(bars), {side: policy})[side].expected_return[0])
        fractions.append([fill.fraction for fill in walk(side, policy, bars)[0]])
    assert returns[0] != returns[1]
    assert fractions == [[0.2, 0.8], [0.5, 0.5]]


def test_nobody_but_the_policy_reads_the_users_stops_and_targets() -> None:
    """So that one change in config.yaml changes labels, paper and live at once."""
    own = {"stop_loss_pct_buy", "take_profit_pct_buy", "stop_loss_pct_sell", "take_profit_pct_sell", "partial_closes"}
    readers = set()
    for path in [*ROOT.glob("*.py"), *ROOT.glob("perpcast/**/*.py")]:
        names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        if names & own:
            readers.add(path.name)
    assert readers == {"config.py", "exit_policy.py"}


def test_to_json_round_trips() -> None:
    assert ExitPolicy(**json.loads(json.dumps(POLICY.to_json()))) == POLICY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stop": 0.0}, "stop must lie"),
        ({"targets": ((0.012, 0.6), (0.024, 0.6)), "stop_after": (0.0, 0.012)}, "add up to at most 1"),
        ({"targets": ((0.024, 0.2), (0.012, 0.3)), "stop_after": (0.0, 0.0)}, "must rise"),
        ({"stop_after": (0.0, 0.024, 0.024)}, "one stop below each target"),
        ({"horizon": 0}, "at least 1 bar"),
    ],
)
def test_impossible_policy_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(POLICY, **change)


def test_unequal_arrays_are_refused() -> None:
    with pytest.raises(ValueError, match="of one length"):
        label_trades(np.ones(3), np.ones(3), np.ones(2), np.ones(3), "buy", POLICY)


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0.7, 0.3), (0.8, 0.2)])  # the last two miss 1 by 6e-17
def test_fractions_that_add_up_to_one_end_at_the_last_target(fractions: tuple[float, float]) -> None:
    first, last = fractions
    policy = dataclasses.replace(FREE, targets=((0.012, first), (0.024, last)), stop_after=(0.0, 0.012))
    bars = [FLAT, (100.0, 102.5, 100.0, 102.0), *[FLAT] * 5]
    labels = label_trades(*columns(bars), "buy", policy)
    assert labels.expected_return[0] == pytest.approx(first * 0.012 + last * 0.024, abs=1e-12)
    assert (EXIT_REASONS[labels.exit_reason[0]], labels.targets_filled[0]) == ("take_profit", 2)
    assert [fill.why for fill in walk("buy", policy, bars)[0]] == ["target", "take_profit"]
