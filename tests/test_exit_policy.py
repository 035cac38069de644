"""The exit policy: the worked cases, a plain reference over drawn and recorded markets, the trade bar by bar."""

import dataclasses
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perpcast.config import load_settings
from perpcast.exit_policy import EXIT_REASONS, ExitPolicy, OpenTrade, label_trades
from perpcast.market import SIDES, Side
from tests.exit_policy_reference import trade

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
CASES = SHARED / "spec" / "exit_policy_cases.json"
PANEL = SHARED / "data" / "candles" / "binance_usdm_15m_panel51_1y"

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
SHORT = dataclasses.replace(POLICY, horizon=5)

Bar = tuple[float, float, float, float]


def columns(bars: list[Bar]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    open_, high, low, close = (np.array(column) for column in zip(*bars, strict=True))
    return open_, high, low, close


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
        assert np.isnan(labels.expected_return[0])
        assert (labels.exit_reason[0], labels.bars_held[0], labels.targets_filled[0], labels.ambiguous[0]) == (
            0,
            0,
            0,
            False,
        )
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


@given(bars=markets(), side=st.sampled_from(SIDES), slippage=st.sampled_from([0.0, 0.0002]))
def test_labels_on_drawn_markets_equal_the_plain_reference(bars: list[Bar], side: Side, slippage: float) -> None:
    assert_equals_reference(bars, side, dataclasses.replace(SHORT, slippage=slippage), range(len(bars)))


@given(bars=markets(), side=st.sampled_from(SIDES))
def test_trade_walked_bar_by_bar_equals_its_label(bars: list[Bar], side: Side) -> None:
    labels = label_trades(*columns(bars), side, SHORT)
    for signal in range(len(bars) - SHORT.horizon - 1):
        fills, held = walk(side, SHORT, bars[signal:])
        assert held.expected_return == pytest.approx(labels.expected_return[signal], abs=1e-12)
        assert (held.exit_reason, held.bars_held) == (
            EXIT_REASONS[labels.exit_reason[signal]],
            labels.bars_held[signal],
        )
        assert sum(fill.fraction for fill in fills) == pytest.approx(1)


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


@pytest.mark.skipif(not PANEL.exists(), reason="recorded candles are kept in shared/data, which is absent")
@pytest.mark.parametrize("symbol", ["BTCUSDT", "1000PEPEUSDT", "HYPEUSDT"])
@pytest.mark.parametrize("side", SIDES)
def test_labels_on_recorded_candles_equal_the_plain_reference(symbol: str, side: Side) -> None:
    frame = pd.read_parquet(PANEL / f"{symbol}.parquet", columns=["open", "high", "low", "close"])
    crash = 33_840 if len(frame) > 34_000 else 12_800  # 2025-10-10, moves of 30-80 % inside one bar
    rows = frame.iloc[crash - 600 : crash + 600]
    bars = list(rows.itertuples(index=False, name=None))
    reasons = assert_equals_reference(bars, side, POLICY, range(0, len(bars), 3))
    assert len(reasons) >= 4


def assert_equals_reference(bars: list[Bar], side: Side, policy: ExitPolicy, signals: range) -> set[str]:
    labels, reasons = label_trades(*columns(bars), side, policy), set()
    for signal in signals:
        window = bars[signal : signal + policy.horizon + 2]
        expected, other = trade(window, side, policy), trade(window, side, policy, adverse_first=False)
        if expected is None or other is None:
            assert np.isnan(labels.expected_return[signal])
            continue
        assert labels.expected_return[signal] == pytest.approx(expected.expected_return, abs=1e-12)
        assert EXIT_REASONS[labels.exit_reason[signal]] == expected.reason
        assert labels.bars_held[signal] == expected.bars_held
        assert labels.targets_filled[signal] == expected.targets_filled
        assert labels.ambiguous[signal] == (abs(expected.expected_return - other.expected_return) > 1e-12)
        reasons.add(expected.reason)
    return reasons


def test_from_config_gives_the_users_numbers_exactly() -> None:
    settings_ = load_settings([ROOT / "config.yaml"])
    for side in SIDES:
        assert (
            ExitPolicy.from_config(settings_.risk_profile, settings_.fees, side) == POLICY
        )  # 1 - 0.989 is 0.011, not 0.011000000000000010
    assert float(1 - Decimal("0.989")) == POLICY.stop != 1 - 0.989


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


@settings(max_examples=10)
@given(extra=st.floats(0.001, 0.5))
def test_fractions_that_add_up_to_one_end_at_the_last_target(extra: float) -> None:
    policy = dataclasses.replace(FREE, targets=((0.012, 0.5), (0.024, 0.5)), stop_after=(0.0, 0.012))
    bars = [FLAT, (100.0, 102.4 + extra, 100.0, 102.0), *[FLAT] * 5]
    labels = label_trades(*columns(bars), "buy", policy)
    assert labels.expected_return[0] == pytest.approx(0.5 * 0.012 + 0.5 * 0.024, abs=1e-12)
    assert (EXIT_REASONS[labels.exit_reason[0]], labels.targets_filled[0]) == ("take_profit", 2)
