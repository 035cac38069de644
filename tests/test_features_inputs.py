"""Model inputs: the formulas of the table, the same from fresh and from stored values; the scaler."""

import json
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from perpcast.features.indicators import CANDLES_49, COLUMNS, compute_indicators
from perpcast.features.inputs import (
    CANDLE_SHAPE,
    KNOWN,
    OBSERVED,
    compute_inputs,
    known_inputs,
    observed_inputs,
    rounded_as_stored,
)
from perpcast.features.scaler import Scaler
from tests.recorded import needs_recorded, recorded_candles
from tests.test_features_indicators import flatten, market, troubled_market

FIRST_COMPLETE = 213  # atr_14 after 14 bars, its mean over 200 of those


CRASH = "binance_usdm_15m_panel51_1y/1000BONKUSDT"


def _plain_inputs(frame: pd.DataFrame, values: pd.DataFrame) -> dict[str, pd.Series]:
    """The last column of the table, row by row, in pandas."""
    close, volume = frame["close"], frame["volume"]
    x = values
    top, bottom = frame[["open", "close"]].max(axis=1), frame[["open", "close"]].min(axis=1)
    price_levels = ["ema_20", "ichimoku_conversion", "ichimoku_base", "psar", "bb_high", "bb_mid", "bb_low"]
    price_levels += ["donchian_high", "donchian_mid", "donchian_low"]
    hundredths = ["adx_14", "aroon_up", "aroon_down", "rsi_14", "stoch_k", "stoch_d", "williams_r_14", "roc_12"]
    hundredths += ["ultimate_oscillator", "mfi_14", "bb_width", "di_diff", "aroon_oscillator", "stoch_diff"]
    plain = ["stoch_rsi_14", "cmf_20", "price_change_1", "price_change_4", "price_change_16", "close_to_ema"]
    return {
        **{name: close / x[name] - 1 for name in price_levels},
        **{name: x[name] / 100 for name in hundredths},
        **{name: x[name] / close for name in ("macd", "macd_signal", "macd_diff", "dpo_20", "atr_14")},
        **{name: x[name] for name in (*plain, "vortex_diff")},
        **{name: x[name] - 1 for name in ("vortex_pos", "vortex_neg")},
        **{name: x[name] - 0.5 for name in ("bb_position", "donchian_position")},
        "cci_20": x["cci_20"] / 200,
        "obv": x["obv"].diff(20) / (20 * x["volume_sma_20"]),
        "volume_sma_20": np.log(x["volume_sma_20"] / volume.rolling(200).mean()),
        "volume_ratio": np.log1p(x["volume_ratio"]),
        "atr_pct": np.log(x["atr_pct"] / x["atr_pct"].rolling(200).mean()),
        "candle_range": x["candle_range"] / x["atr_pct"],
        "candle_body": (close - frame["open"]) / close / x["atr_pct"],
        "candle_upper_wick": (frame["high"] - top) / close / x["atr_pct"],
        "candle_lower_wick": (bottom - frame["low"]) / close / x["atr_pct"],
    }


@pytest.mark.parametrize(
    "candles",
    [
        lambda: market(900),
        pytest.param(lambda: recorded_candles("okx_swap_15m/PEPEUSDT", 0, 3_000), marks=needs_recorded),
        pytest.param(lambda: recorded_candles(CRASH, 32_000), marks=needs_recorded),
    ],
)
def test_inputs_are_the_formulas_of_the_table(candles: Callable[[], pd.DataFrame]) -> None:
    frame = candles()
    values = compute_indicators(frame)
    stored = pd.DataFrame(rounded_as_stored(values.to_numpy()), columns=list(COLUMNS))
    plain = _plain_inputs(frame, stored)
    assert set(plain) == set(OBSERVED)
    inputs = observed_inputs(frame, values.to_numpy())
    assert inputs.dtype == np.float32
    for number, name in enumerate(OBSERVED):
        np.testing.assert_allclose(inputs[:, number], plain[name], rtol=2e-6, atol=1e-9, err_msg=name)


def test_observed_and_known_share_out_every_column() -> None:
    assert len(OBSERVED) == 49 - 3 + len(CANDLE_SHAPE)
    assert [indicator.name for indicator in CANDLES_49 if indicator.model_input is None] == [
        "hour",
        "day_of_week",
        "is_weekend",
    ]
    assert len(set(OBSERVED)) == len(OBSERVED)


def test_inputs_are_known_from_one_bar_on_and_scale_free() -> None:
    frame = market(900)
    inputs = compute_inputs(frame)
    assert np.isnan(inputs[:FIRST_COMPLETE]).any(axis=1).all()
    assert np.isfinite(inputs[FIRST_COMPLETE:]).all()
    scaled = frame.assign(**{name: frame[name] * 2.0**-30 for name in ("open", "high", "low", "close")})
    scaled["volume"] *= 2.0**20
    np.testing.assert_array_equal(compute_inputs(scaled), inputs)


def test_inputs_from_stored_values_are_those_from_fresh_ones() -> None:
    frame = troubled_market()
    fresh = compute_indicators(frame).to_numpy()
    stored = rounded_as_stored(fresh)
    reals = [number for number, indicator in enumerate(CANDLES_49) if not indicator.double]
    np.testing.assert_array_equal(stored[:, reals], stored[:, reals].astype(np.float32))
    np.testing.assert_array_equal(observed_inputs(frame, fresh), observed_inputs(frame, stored))


def test_inputs_start_anew_after_a_gap_and_are_never_infinite() -> None:
    frame = troubled_market()
    inputs = compute_inputs(frame)
    assert not np.isinf(inputs).any()
    first_after = int(np.flatnonzero(frame["open_time"].diff() > pd.Timedelta(hours=1))[0])
    np.testing.assert_array_equal(inputs[first_after:], compute_inputs(frame.iloc[first_after:]))
    assert np.isnan(inputs[first_after : first_after + FIRST_COMPLETE]).any(axis=1).all()


def test_value_too_large_for_the_table_is_unknown() -> None:
    values = np.full((1, 49), 1e300)
    stored = rounded_as_stored(values)
    assert np.isnan(stored).sum() == 48
    assert stored[0, COLUMNS.index("obv")] == 1e300


@pytest.mark.parametrize("frame", [market(900), flatten(market(900), 500, 30), troubled_market()])
def test_inputs_of_the_past_do_not_change_with_the_future(frame: pd.DataFrame) -> None:
    whole = compute_inputs(frame)
    for cut in (230, 503, 509, 520, 700):
        later = frame.copy()
        later.loc[later.index[cut:], ["open", "high", "low", "close", "volume"]] *= 3
        for other in (frame.iloc[:cut], later):
            np.testing.assert_array_equal(compute_inputs(other)[:cut], whole[:cut])


def test_known_inputs_are_the_calendar_on_circles() -> None:
    monday = 1_704_067_200_000  # 2024-01-01 00:00 UTC
    hour = 3_600_000
    times = np.array([monday, monday + 6 * hour + 900_000, monday + 5 * 24 * hour, monday + 7 * 24 * hour - 1])
    known = known_inputs(times)
    assert known.dtype == np.float32
    weekday = np.array([0, 0, 5, 6]) * 2 * np.pi / 7
    clock = np.array([0, 6, 0, 23]) * 2 * np.pi / 24
    expected = (np.sin(clock), np.cos(clock), np.sin(weekday), np.cos(weekday), np.array([0.0, 0, 1, 1]))
    np.testing.assert_allclose(known, np.column_stack(expected), atol=1e-7)
    assert known.shape == (4, len(KNOWN))


# --- the scaler ----------------------------------------------------------------------------------------------------


def test_scaler_gives_mean_zero_and_deviation_one_and_back() -> None:
    random = np.random.default_rng(3)
    inputs = (random.normal(size=(200_000, 3)) * [1e-3, 5, 1] + [1, -20, 0]).astype(np.float32)
    inputs[:100, 1] = np.nan
    scaler = Scaler.fit(inputs, ("a", "b", "c"))
    scaled = scaler.apply(inputs)
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(np.nanmean(scaled, axis=0, dtype=float), 0, atol=1e-4)
    np.testing.assert_allclose(np.nanstd(scaled, axis=0, dtype=float), 1, atol=1e-4)
    np.testing.assert_allclose(scaler.invert(scaled), inputs, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(scaler.mean, np.nanmean(inputs.astype(float), axis=0), rtol=1e-12)
    np.testing.assert_allclose(scaler.deviation, np.nanstd(inputs.astype(float), axis=0), rtol=1e-12)


def test_scaler_takes_windows_and_survives_json_to_the_bit() -> None:
    random = np.random.default_rng(4)
    scaler = Scaler.fit(random.normal(size=(50, 2)), ("a", "b"))
    again = Scaler.from_json(json.loads(json.dumps(scaler.to_json())))
    assert again == scaler
    windows = random.normal(size=(5, 60, 2)).astype(np.float32)
    np.testing.assert_array_equal(again.apply(windows)[2, 7], scaler.apply(windows[2, 7]))


def test_scaler_leaves_constant_and_unknown_columns_finite() -> None:
    inputs = np.column_stack([np.full(9, 0.1), np.full(9, np.nan), np.zeros(9), np.arange(9)])
    scaler = Scaler.fit(inputs, ("constant", "unknown", "zero", "rising"))
    assert scaler.deviation[:3] == (1.0, 1.0, 1.0)
    np.testing.assert_allclose(scaler.apply(inputs)[:, [0, 2]], 0, atol=1e-7)


def test_scaler_refuses_another_number_of_columns() -> None:
    with pytest.raises(ValueError, match=r"inputs must be \[n, 2\], received \[9, 3\]"):
        Scaler.fit(np.zeros((9, 3)), ("a", "b"))
