"""The 49 indicators: the right values, nothing from the future, nothing across a gap, nothing infinite or made up."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from perpcast.errors import DataError
from perpcast.features import indicators
from perpcast.features.__main__ import page
from perpcast.features.indicators import CANDLES_49, COLUMNS, Indicator, compute_indicators, feature_version
from perpcast.features.stretch import Stretch
from perpcast.features.transforms import unchanged
from tests.recorded import CANDLES, needs_recorded, recorded_candles

TIME_COLUMNS = ["hour", "day_of_week", "is_weekend"]
VALUE_COLUMNS = [name for name in COLUMNS if name not in TIME_COLUMNS]
STEP = pd.Timedelta(minutes=15)


def market(bars: int, seed: int = 1, start: str = "2024-01-01") -> pd.DataFrame:
    """A random walk that looks like candles, on the 15-minute grid."""
    random = np.random.default_rng(seed)
    close = 100 * np.exp(np.cumsum(random.normal(0, 0.003, bars)))
    open = np.concatenate(([100.0], close[:-1]))
    spread = np.abs(random.normal(0, 0.001, (2, bars)))
    return pd.DataFrame(
        {
            "open_time": pd.date_range(start, periods=bars, freq="15min", tz="UTC"),
            "open": open,
            "high": np.maximum(open, close) * (1 + spread[0]),
            "low": np.minimum(open, close) * (1 - spread[1]),
            "close": close,
            "volume": random.lognormal(5, 1, bars),
        }
    )


def flatten(frame: pd.DataFrame, first: int, bars: int, volume: float = 0.0) -> pd.DataFrame:
    """The bars from `first` on stand still at the close before them."""
    flat = frame.copy()
    rows = flat.index[first : first + bars]
    flat.loc[rows, ["open", "high", "low", "close"]] = flat["close"].iloc[first - 1]
    flat.loc[rows, "volume"] = volume
    return flat


def troubled_market() -> pd.DataFrame:
    """Gaps, long and short flat runs, a broken row, a standstill with volume and a stretch without any volume."""
    frame = flatten(flatten(flatten(market(2600), 700, 30), 1100, 5), 1300, 40, volume=2.0)
    frame.loc[1500:1540, "volume"] = 0.0
    frame.loc[1800, "high"] = np.nan
    return frame.drop(index=[300, *range(2100, 2130)]).reset_index(drop=True)


# --- what the table says -------------------------------------------------------------------------------------------


def test_registry_holds_49_columns_by_group_in_order() -> None:
    groups = [indicator.group for indicator in CANDLES_49]
    assert {group: groups.count(group) for group in dict.fromkeys(groups)} == {
        "trend": 11,
        "oscillator": 9,
        "volatility": 8,
        "volume": 4,
        "vortex": 2,
        "time": 3,
        "price": 3,
        "derived": 9,
    }
    assert groups == sorted(groups, key=list(dict.fromkeys(groups)).index)
    assert len(set(COLUMNS)) == 49


def test_registry_agrees_with_the_specification_and_the_table() -> None:
    from perpcast.database.schema import DOUBLE_INDICATORS, INDICATORS

    assert COLUMNS == INDICATORS
    assert tuple(indicator.name for indicator in CANDLES_49 if indicator.double) == DOUBLE_INDICATORS
    specification = CANDLES.parents[1] / "spec" / "indicators.md"
    if specification.exists():
        rows = re.findall(r"^\| (\d+) \| (\w+) \| (\w+) \|", specification.read_text(), re.MULTILINE)
        assert [(name, group) for _, name, group in rows] == [(each.name, each.group) for each in CANDLES_49]


def test_every_indicator_explains_itself() -> None:
    for indicator in CANDLES_49:
        assert indicator.meaning, indicator.name
        assert all(re.fullmatch(r"[a-z]+\.[a-z_0-9]+", series) for series in indicator.inputs), indicator.name
        assert indicator.model_input is None or indicator.model_input.__doc__, indicator.name
        assert indicator.input_warmup is None or indicator.input_warmup > indicator.warmup, indicator.name


def test_page_is_what_the_registry_says() -> None:
    written = (Path(__file__).parents[1] / "docs" / "indicators.md").read_text(encoding="utf-8")
    assert written == page(), "run: python -m perpcast.features > docs/indicators.md"
    assert all(f"| `{name}` |" in written for name in COLUMNS)


@pytest.mark.parametrize(
    "change", [{"version": 2}, {"warmup": 20}, {"inputs": ("candles.open",)}, {"double": True}, {"name": "ema_21"}]
)
def test_feature_version_tells_every_declared_change_of_a_stored_column(change: dict[str, Any]) -> None:
    changed = (replace(CANDLES_49[0], **change), *CANDLES_49[1:])
    assert feature_version(changed) != feature_version()
    assert feature_version(CANDLES_49[::-1]) != feature_version()


@pytest.mark.parametrize("change", [{"meaning": "other words"}, {"compute": len}, {"model_input": None}])
def test_feature_version_is_no_function_of_words_code_or_model_inputs(change: dict[str, Any]) -> None:
    assert feature_version((replace(CANDLES_49[0], **change), *CANDLES_49[1:])) == feature_version()


def test_feature_version_tells_a_change_of_the_rules_of_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    before = feature_version()
    monkeypatch.setattr(indicators, "STRETCH_VERSION", indicators.STRETCH_VERSION + 1)
    assert feature_version() != before


def test_values_do_not_depend_on_the_unit_of_price_or_volume() -> None:
    """A power of two scales without rounding: an absolute threshold inside a library would show."""
    frame = market(600)
    tiny = frame.assign(**{name: frame[name] * 2.0**-40 for name in ("open", "high", "low", "close", "volume")})
    of_price = ["ema_20", "macd", "macd_signal", "macd_diff", "ichimoku_conversion", "ichimoku_base", "psar", "dpo_20"]
    of_price += ["atr_14", "bb_high", "bb_mid", "bb_low", "donchian_high", "donchian_mid", "donchian_low"]
    scaled = [*of_price, "obv", "volume_sma_20"]
    expected = compute_indicators(frame)
    expected[scaled] *= 2.0**-40
    pd.testing.assert_frame_equal(compute_indicators(tiny), expected, check_exact=True)


@pytest.mark.parametrize("changed", ["open", "high", "low", "close", "volume"])
def test_indicators_depend_on_the_series_that_they_name_and_no_others(changed: str) -> None:
    frame = market(400)
    near = np.random.default_rng(2).uniform(0.9999, 1.0001, len(frame))
    other = compute_indicators(frame.assign(**{changed: frame[changed] * near}))
    same = (other == compute_indicators(frame)) | other.isna()
    flat_windows_only = {("aroon_up", "low"), ("aroon_down", "high")}  # where high and low are one price throughout
    for indicator in CANDLES_49:
        named = f"candles.{changed}" in indicator.inputs and (indicator.name, changed) not in flat_windows_only
        assert same[indicator.name].all() != named, indicator.name


# --- nothing from the future ---------------------------------------------------------------------------------------


def _leaking(indicators: tuple[Indicator, ...], frame: pd.DataFrame, cuts: list[int]) -> set[str]:
    """Names of the indicators whose values up to a cut change when the bars after it are changed, cut off or added."""
    names = [indicator.name for indicator in indicators]
    whole = compute_indicators(frame, indicators=indicators).to_numpy()
    leaking: set[str] = set()
    for cut in cuts:
        perturbed = frame.copy()
        later = perturbed.index[cut:]
        perturbed.loc[later, ["open", "high", "low", "close"]] *= 1000.0
        perturbed.loc[later, "volume"] = perturbed.loc[later, "volume"] * 7 + 1
        appended = pd.concat([frame.iloc[:cut], perturbed.iloc[cut : cut + 3]])
        for other in (perturbed, frame.iloc[:cut], appended):
            values = compute_indicators(other, indicators=indicators).to_numpy()[:cut]
            same = np.isclose(values, whole[:cut], rtol=1e-9, atol=0, equal_nan=True).all(axis=0)
            leaking |= {name for name, ok in zip(names, same, strict=True) if not ok}
    return leaking


@needs_recorded
@pytest.mark.parametrize(
    ("name", "first", "cuts"),
    [
        ("binance_usdm_15m_panel51_1y/ETHUSDT", 32_500, [40, 333, 1_000, 1_367, 1_500]),
        (
            "okx_swap_15m/BTCUSDT",
            33_000,
            [700, 735, 741, 747, 760, 790],
        ),  # before, in and after an outage of 40 flat bars
    ],
)
def test_past_does_not_change_with_the_future_on_recorded_candles(name: str, first: int, cuts: list[int]) -> None:
    assert _leaking(CANDLES_49, recorded_candles(name, first, 2_000), cuts) == set()


def test_past_does_not_change_with_the_future_in_a_troubled_market() -> None:
    # 699-732 lie before, in and after a long flat run; the others at gaps, standstills and a broken row.
    cuts = [1, 30, 301, 699, 703, 706, 707, 708, 709, 732, 1105, 1340, 1545, 1801, 2102, 2500]
    assert _leaking(CANDLES_49, troubled_market(), cuts) == set()


def test_planted_leak_is_found() -> None:
    def next_close(stretch: Stretch) -> np.ndarray:
        return np.append(stretch.close[1:], np.nan)

    def mean_of_all(stretch: Stretch) -> np.ndarray:
        return stretch.close / stretch.close.mean()

    planted = (
        Indicator("next_close", "derived", ("candles.close",), 0, next_close, unchanged, "tomorrow"),
        Indicator("to_mean", "derived", ("candles.close",), 0, mean_of_all, unchanged, "the future, diluted"),
    )
    assert _leaking((*CANDLES_49, *planted), market(600), [300]) == {"next_close", "to_mean"}


# --- gaps, warm-up, dull markets -----------------------------------------------------------------------------------


def test_warmup_ends_where_the_registry_says() -> None:
    values = compute_indicators(market(300))
    for indicator in CANDLES_49:
        known = values[indicator.name].notna().to_numpy()
        assert not known[: indicator.warmup].any(), indicator.name
        assert known[indicator.warmup :].all(), indicator.name


@pytest.mark.parametrize("missing", [1, 50])
def test_gap_starts_everything_anew(missing: int) -> None:
    frame = market(1000)
    after = frame.iloc[400 + missing :]
    gapped = compute_indicators(pd.concat([frame.iloc[:400], after]))
    pd.testing.assert_frame_equal(gapped.iloc[400:], compute_indicators(after), check_exact=True)
    pd.testing.assert_frame_equal(gapped.iloc[:400], compute_indicators(frame.iloc[:400]), check_exact=True)


def test_gap_within_max_gap_bars_is_passed_over() -> None:
    frame = market(600).drop(index=[300, 301])
    bridged = compute_indicators(frame, max_gap_bars=2)
    assert bridged.iloc[300:].notna().all(axis=None)
    assert compute_indicators(frame, max_gap_bars=1)["ema_20"].iloc[300:319].isna().all()


@pytest.mark.parametrize("column", ["open", "high", "low", "close", "volume"])
@pytest.mark.parametrize("broken", [np.nan, np.inf, -1.0])
def test_broken_row_is_a_missing_bar(column: str, broken: float) -> None:
    frame = market(700)
    frame.loc[350, column] = broken
    values = compute_indicators(frame)
    assert values.loc[350, VALUE_COLUMNS].isna().all()
    without = compute_indicators(frame.drop(index=350))
    pd.testing.assert_frame_equal(values.drop(index=350), without, check_exact=True)


def test_long_flat_run_is_a_gap_from_its_eighth_bar_on() -> None:
    """Before that nobody can know that it will be a long one: a value at bar t may not depend on later bars."""
    frame = flatten(market(900), 400, 30)
    values = compute_indicators(frame)
    assert values.loc[407:429, VALUE_COLUMNS].isna().all(axis=None)
    assert values.loc[400:406, "ema_20"].notna().all()
    pd.testing.assert_frame_equal(values.iloc[430:], compute_indicators(frame.iloc[430:]), check_exact=True)
    with_bridge = compute_indicators(frame, max_gap_bars=100)
    assert with_bridge.loc[430:448, "ema_20"].isna().all()


def test_short_flat_run_is_ordinary_bars() -> None:
    values = compute_indicators(flatten(market(900), 400, 7))
    assert values["ema_20"].iloc[400:].notna().all()


# A standstill with volume: what is 0 / 0 is unknown, what is a plain 0 or the price itself is that.
STANDSTILL = {
    **dict.fromkeys(["ema_20", "ichimoku_conversion", "ichimoku_base", "bb_high", "bb_mid", "bb_low"], 50.0),
    **dict.fromkeys(["psar", "donchian_high", "donchian_mid", "donchian_low"], 50.0),
    **dict.fromkeys(["macd", "macd_signal", "macd_diff", "dpo_20", "roc_12", "atr_14", "bb_width", "cmf_20"], 0.0),
    **dict.fromkeys(["price_change_1", "price_change_4", "price_change_16", "atr_pct", "candle_range"], 0.0),
    **dict.fromkeys(["obv", "volume_sma_20"], 3.0),
    "volume_ratio": 1.0,
}


def test_standstill_gives_documented_values_or_nan() -> None:
    frame = market(500).assign(open=50.0, high=50.0, low=50.0, close=50.0, volume=3.0)
    newest = compute_indicators(frame).iloc[-1]
    for column in VALUE_COLUMNS:
        np.testing.assert_allclose(newest[column], STANDSTILL.get(column, np.nan), atol=1e-12, err_msg=column)


def test_standstill_after_movement_masks_what_libraries_answer_to_a_flat_window() -> None:
    newest = compute_indicators(flatten(market(500), 450, 50, volume=3.0)).iloc[-1]
    unknown = ["rsi_14", "stoch_rsi_14", "stoch_k", "stoch_d", "cci_20", "williams_r_14", "mfi_14", "aroon_up"]
    unknown += ["aroon_down", "vortex_pos", "vortex_neg", "ultimate_oscillator", "bb_position", "donchian_position"]
    unknown += ["adx_14", "di_diff", "close_to_ema", "stoch_diff", "aroon_oscillator", "vortex_diff"]
    assert newest[unknown].isna().all()
    assert newest[[name for name in COLUMNS if name not in unknown]].notna().all()


def test_typical_price_that_changes_by_rounding_only_stands_still() -> None:
    """0.3 + 0.1 + 0.2 and 0.4 + 0.1 + 0.1 are one price, and two numbers."""
    frame = market(60)
    frame[["open", "high", "low", "close"]] = [0.2, 0.3, 0.1, 0.2]
    frame.loc[::2, ["open", "high", "low", "close"]] = [0.2, 0.4, 0.1, 0.1]
    typical = (frame["high"] + frame["low"] + frame["close"]) / 3
    assert 0 < typical.diff().abs().max() < 1e-15
    assert compute_indicators(frame).loc[50, ["mfi_14", "cci_20"]].isna().all()


def test_no_volume_is_zero_or_unknown_without_residue() -> None:
    frame = market(600)
    frame.loc[400:450, "volume"] = 0.0
    at = compute_indicators(frame).loc[440]
    assert at["volume_sma_20"] == 0
    assert at[["volume_ratio", "cmf_20", "mfi_14"]].isna().all()


@pytest.mark.parametrize("bars", [0, 1, 2, 5, 13, 14, 15, 27, 28, 34])
def test_few_rows_are_no_trouble(bars: int) -> None:
    frame = market(60).iloc[:bars]
    whole = compute_indicators(market(60)).iloc[:bars]
    pd.testing.assert_frame_equal(compute_indicators(frame), whole, check_exact=True)


# --- the frame that is handed in -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "index",
    [
        lambda frame: pd.DatetimeIndex(frame["open_time"]),
        lambda frame: pd.DatetimeIndex(frame["open_time"]).tz_localize(None),
        lambda frame: pd.Index([f"bar {number}" for number in range(len(frame))]),
        lambda frame: pd.RangeIndex(len(frame), 0, -1),
        lambda frame: pd.Index([7] * len(frame)),
        lambda frame: pd.MultiIndex.from_product([["BTCUSDT"], range(len(frame))]),
    ],
)
def test_values_stand_on_the_index_of_the_candles(index: Callable[[pd.DataFrame], pd.Index]) -> None:
    frame = troubled_market()
    expected = compute_indicators(frame).to_numpy()
    frame.index = index(frame)
    before = frame.copy()
    values = compute_indicators(frame)
    assert values.index.equals(frame.index)
    np.testing.assert_array_equal(values.to_numpy(), expected)
    pd.testing.assert_frame_equal(frame, before)


@pytest.mark.parametrize(
    "times",
    [
        lambda time: time.dt.tz_localize(None),
        lambda time: time.dt.tz_convert("Asia/Tokyo"),
        lambda time: time.astype("datetime64[ms, UTC]"),
        lambda time: time.astype("datetime64[ms, UTC]").astype("int64"),
        lambda time: time.astype(str),
        lambda time: pd.Series(list(time.dt.to_pydatetime()), dtype=object),
    ],
)
def test_open_time_is_understood_in_every_form(times: Callable[[pd.Series], pd.Series]) -> None:
    frame = market(100)
    other = frame.assign(open_time=times(frame["open_time"]))
    pd.testing.assert_frame_equal(compute_indicators(other), compute_indicators(frame), check_exact=True)


def test_open_time_may_be_the_index_alone() -> None:
    frame = market(100)
    values = compute_indicators(frame.set_index("open_time"))
    np.testing.assert_array_equal(values.to_numpy(), compute_indicators(frame).to_numpy())


def test_other_interval_moves_the_gaps_only() -> None:
    frame = market(300)
    hourly = frame.assign(open_time=pd.date_range("2024-01-01", periods=300, freq="60min", tz="UTC"))
    values = compute_indicators(hourly, interval="60").drop(columns=TIME_COLUMNS)
    # Blocks of running sums (stretch.in_blocks) begin at other bars: equal but for their residue.
    pd.testing.assert_frame_equal(values, compute_indicators(frame).drop(columns=TIME_COLUMNS), rtol=1e-10)


def test_time_is_that_of_the_open_in_utc() -> None:
    saturday = market(2, start="2024-01-06T23:30")  # 23:30 and 23:45 of a Saturday
    sunday = compute_indicators(pd.concat([saturday, market(1, start="2024-01-07T00:00")]))[TIME_COLUMNS]
    assert sunday.to_numpy().tolist() == [[23, 5, 1], [23, 5, 1], [0, 6, 1]]


def test_unordered_candles_are_refused_by_time() -> None:
    with pytest.raises(DataError, match="row 1 is 2024-01-01 00:00"):
        compute_indicators(market(3).iloc[[1, 0, 2]])
    with pytest.raises(DataError, match="row 2 is 2024-01-01 00:15, the row before it is 2024-01-01 00:15"):
        compute_indicators(market(3).iloc[[0, 1, 1, 2]])


def test_unknown_interval_is_refused() -> None:
    with pytest.raises(ValueError, match="interval must be one of"):
        compute_indicators(market(3), interval="7")


def test_registered_values_are_frozen() -> None:
    with pytest.raises(AttributeError):
        CANDLES_49[0].name = "other"  # type: ignore[misc]
    assert replace(CANDLES_49[0], name="other").name == "other"
