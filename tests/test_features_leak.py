"""The leak test finds what looks ahead, however faintly, and says nothing of what does not."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from perpcast.features.indicators import CANDLES_49, HOUR_MS, Indicator, compute_indicators
from perpcast.features.inputs import observed_inputs, observed_names
from perpcast.features.leak import Leak, check_indicators, foreign_inputs, planted_leak
from perpcast.features.stretch import Stretch
from perpcast.features.transforms import Transform, unchanged
from tests.recorded import needs_recorded, recorded_candles
from tests.test_features_indicators import flatten, market, troubled_market

BY_NAME = {indicator.name: indicator for indicator in CANDLES_49}


def planted(compute: Callable[[Stretch], np.ndarray], model_input: Transform | None = unchanged) -> Indicator:
    return Indicator("leak", "derived", ("candles.close",), 0, compute, model_input, "knows what is to come")


def series(values: np.ndarray) -> pd.Series:
    return pd.Series(values)


def hourly_close(stretch: Stretch) -> np.ndarray:
    """The close of the hour, given to each of its bars: resampled candles merged back by the open of the hour."""
    return series(stretch.close).groupby(stretch.open_time_ms // HOUR_MS).transform("last").to_numpy()


def usual_of_the_hour(stretch: Stretch) -> np.ndarray:
    """A seasonal mean over all days, those to come too."""
    of_hour = stretch.open_time_ms % (24 * HOUR_MS) // HOUR_MS
    return series(stretch.volume).groupby(of_hour).transform("mean").to_numpy()


def filled_back(name: str) -> Callable[[Stretch], np.ndarray]:
    """An honest indicator whose unknown values are filled in from the next known one."""

    def compute(stretch: Stretch) -> np.ndarray:
        values = np.array(BY_NAME[name].compute(stretch))
        values[: BY_NAME[name].warmup] = np.nan
        return series(values).bfill().to_numpy()

    return compute


def smoothed(values: np.ndarray, stretch: Stretch, stored: object) -> np.ndarray:
    """mean over the bar before and the bar after"""
    return series(values).rolling(3, center=True).mean().to_numpy()


def turning_points(stretch: Stretch) -> np.ndarray:
    """1 at a low that no bar undercuts for ten bars: known ten bars later only."""
    lowest = series(stretch.low).rolling(21, center=True, min_periods=1).min().to_numpy()
    return (stretch.low == lowest).astype(float)


LEAKS = {
    "the next bar's close": planted_leak(),
    "the next bar's open": planted(lambda s: np.append(s.open[1:], np.nan)),
    "the sign of the next move alone": planted(lambda s: np.append(np.sign(np.diff(s.close)), 0.0)),
    "the volume of 50 bars ahead": planted(lambda s: series(s.volume).shift(-50).to_numpy()),
    "a mean around the bar": planted(lambda s: series(s.close).rolling(21, center=True).mean().to_numpy()),
    "a score by mean and deviation of the whole": planted(lambda s: (s.close - s.close.mean()) / s.close.std()),
    "the whole's maximum": planted(lambda s: s.close / s.high.max()),
    "the whole's minimum": planted(lambda s: s.close / s.low.min()),
    "the rank in the whole": planted(lambda s: series(s.close).rank(pct=True).to_numpy()),
    "the close of the running hour": planted(hourly_close),
    "what is usual at the hour": planted(usual_of_the_hour),
    "a warm-up filled from behind": planted(filled_back("ema_20")),
    "unknown values filled from behind": planted(filled_back("bb_position")),
    "the end of the stretch": planted(lambda s: np.arange(len(s), 0.0, -1.0)),
    "turning points": planted(turning_points),
    "a ten-billionth of the next close": planted(lambda s: s.close + 1e-10 * np.append(s.close[1:], 0.0)),
    "a filter run forth and back": planted(lambda s: series(s.close[::-1]).ewm(span=5).mean().to_numpy()[::-1]),
    "the model input alone": replace(BY_NAME["rsi_14"], name="leak", model_input=smoothed),
}


def with_one_trouble(bars: int = 3_000) -> pd.DataFrame:
    """A walk with a gap and a standstill that trades."""
    return flatten(market(bars), 1_000, 60, volume=2.0).drop(index=[1_700]).reset_index(drop=True)


@pytest.mark.parametrize("kind", LEAKS)
def test_planted_leak_is_found_and_nothing_else(kind: str) -> None:
    leak = LEAKS[kind]
    found = check_indicators(with_one_trouble(), (BY_NAME["ema_20"], leak, BY_NAME["bb_position"]))
    assert {each.name for each in found} == {leak.name}
    assert all(each.time_ms < each.cut_ms and each.relative > 0 for each in found)


@needs_recorded
@pytest.mark.parametrize("kind", LEAKS)
def test_planted_leak_is_found_in_recorded_candles(kind: str) -> None:
    candles = recorded_candles("okx_swap_15m/BTCUSDT", 33_000, 2_500)
    assert {each.name for each in check_indicators(candles, (LEAKS[kind],))} == {LEAKS[kind].name}


def test_next_close_is_found_by_all_three_tests_in_both_forms_at_the_bar_before_the_cut() -> None:
    found = check_indicators(market(2_000), (planted_leak(),))
    assert {(each.test, each.form) for each in found} == {
        (test, form) for test in ("truncation", "perturbation", "append") for form in ("stored value", "model input")
    }
    assert all(each.time_ms == each.cut_ms - 900_000 for each in found)
    cut_off = next(each for each in found if (each.test, each.form) == ("truncation", "stored value"))
    frame = market(2_000).set_index("open_time")["close"]
    change = frame.pct_change().loc[pd.Timestamp(cut_off.cut_ms, unit="ms", tz="UTC")]
    np.testing.assert_allclose(cut_off.value, change, rtol=1e-12)
    assert np.isnan(cut_off.changed)
    assert cut_off.relative == 1.0


def test_leak_of_the_model_input_alone_is_named_as_such() -> None:
    found = check_indicators(market(2_000), (LEAKS["the model input alone"],))
    assert {each.form for each in found} == {"model input"}


@pytest.mark.soak(25)
def test_registered_indicators_leak_nothing_in_a_troubled_market(seed: int) -> None:
    assert check_indicators(troubled_market(), seed=seed) == []


@pytest.mark.soak(25)
def test_registered_indicators_leak_nothing_where_gaps_are_bridged(seed: int) -> None:
    assert check_indicators(troubled_market(), max_gap_bars=50, seed=seed) == []


def test_registered_indicators_leak_nothing_at_another_interval() -> None:
    frame = market(1_500).assign(open_time=pd.date_range("2024-01-01", periods=1_500, freq="60min", tz="UTC"))
    assert check_indicators(frame, interval="60") == []


@needs_recorded
@pytest.mark.parametrize(
    ("name", "first", "rows"),
    [
        ("okx_swap_15m/BTCUSDT", 30_000, 6_000),  # an outage of 40 flat bars
        ("okx_swap_15m/PEPEUSDT", 0, 6_000),  # one millionth a coin
        ("binance_usdm_15m_panel51_1y/1000BONKUSDT", 32_000, 3_039),  # the crash of 2025-10-10
        ("bybit_linear_15m_2024/XRPUSDT", 0, 6_000),
    ],
)
def test_registered_indicators_leak_nothing_in_recorded_candles(name: str, first: int, rows: int) -> None:
    assert check_indicators(recorded_candles(name, first, rows)) == []


def test_same_seed_makes_the_same_cuts() -> None:
    frame, registry = market(1_000), (planted_leak(),)
    once, again, other = (check_indicators(frame, registry, seed=seed) for seed in (4, 4, 5))
    assert repr(once) == repr(again)
    assert repr(once) != repr(other)


@pytest.mark.parametrize("bars", [0, 1, 2, 3, 9, 40])
def test_few_bars_are_no_trouble(bars: int) -> None:
    assert check_indicators(market(60).iloc[:bars]) == []


def test_bars_without_any_price_are_no_trouble() -> None:
    assert check_indicators(market(100).assign(close=np.nan)) == []


def test_candles_are_left_as_they_are() -> None:
    frame = troubled_market()
    before = frame.copy()
    check_indicators(frame, CANDLES_49[:1])
    pd.testing.assert_frame_equal(frame, before)


def test_change_is_measured_against_the_larger_value() -> None:
    leak = Leak("x", "stored value", "append", 1, 0, 2.0, -8.0)
    assert leak.relative == 10 / 8
    assert replace(leak, changed=np.nan).relative == 1.0


# --- stored inputs against those of someone who does not know the future --------------------------------------------

# Seen at few bars only, or by the last digits: for `check_indicators`, which looks at the computation itself.
FAINT = {"a ten-billionth of the next close", "a warm-up filled from behind", "unknown values filled from behind"}


def stored_inputs(candles: pd.DataFrame, registry: tuple[Indicator, ...] = CANDLES_49) -> np.ndarray:
    indicators = compute_indicators(candles, "15", 0, registry).to_numpy()
    return observed_inputs(candles, indicators, "15", 0, registry)


@pytest.mark.parametrize("kind", [kind for kind in LEAKS if kind not in FAINT])
def test_foreign_inputs_are_found_where_an_indicator_looks_ahead(kind: str) -> None:
    """Windows of 20 bars that end all over the history; the newest bars of each tell, or its whole."""
    candles, registry = with_one_trouble(), (LEAKS[kind],)
    found = foreign_inputs(candles, stored_inputs(candles, registry), np.arange(800, 2_800, 101), 20, registry=registry)
    assert len(found) > 5
    assert {leak.name for leak in found} == {LEAKS[kind].name}
    assert all(leak.time_ms < leak.cut_ms for leak in found)


@pytest.mark.parametrize("candles", [with_one_trouble, troubled_market], ids=["one trouble", "many troubles"])
def test_honest_inputs_are_no_foreign_ones(candles: Callable[[], pd.DataFrame]) -> None:
    frame = candles()
    assert foreign_inputs(frame, stored_inputs(frame), np.arange(5, len(frame), 211), 20) == []


def test_foreign_inputs_names_the_bar_and_both_values() -> None:
    candles = market(1_500)
    stored = stored_inputs(candles)
    true = float(stored[1_190, 3])
    stored[1_190, 3] = true + 1
    (leak,) = foreign_inputs(candles, stored, np.array([1_000, 1_189, 1_195]), 20)
    times = pd.DatetimeIndex(candles["open_time"]).as_unit("ms").asi8
    assert (leak.time_ms, leak.cut_ms) == (times[1_190], times[1_196])
    assert (leak.value, leak.changed) == pytest.approx((true + 1, true))
    assert leak.name == observed_names()[3]
