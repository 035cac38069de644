"""The values of the 49: the other library, or the formula written plainly, says the same of recorded candles."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import pytest
import talib
from ta.momentum import (
    ROCIndicator,
    RSIIndicator,
    StochasticOscillator,
    StochRSIIndicator,
    UltimateOscillator,
    WilliamsRIndicator,
)
from ta.trend import MACD, ADXIndicator, AroonIndicator, CCIIndicator, EMAIndicator
from ta.volatility import AverageTrueRange
from ta.volume import MFIIndicator, OnBalanceVolumeIndicator

from perpcast.features.indicators import CANDLES_49, COLUMNS, FEATURE_SET, compute_indicators, feature_version
from tests.recorded import needs_recorded, recorded_candles
from tests.test_features_indicators import TIME_COLUMNS, market

SEEDS = 800  # bars after which the libraries' different first values are forgotten

samples = pytest.mark.parametrize(
    ("name", "first"),
    [
        # holds the crash of 2025-10-10
        pytest.param("binance_usdm_15m_panel51_1y/BTCUSDT", 32_000, marks=needs_recorded),
        pytest.param("binance_usdm_15m_panel51_1y/1000BONKUSDT", 32_000, marks=needs_recorded),
        pytest.param("okx_swap_15m/PEPEUSDT", 1_000, marks=needs_recorded),  # prices of one millionth
        pytest.param("bybit_linear_15m_2024/XRPUSDT", 20_000, marks=needs_recorded),
        ("random walk", 0),
    ],
)


def sample(name: str, first: int) -> pd.DataFrame:
    return market(3_000) if name == "random walk" else recorded_candles(name, first, 3_000)


def _parabolic_sar(frame: pd.DataFrame) -> np.ndarray:
    """Wilder's rule as written down: the stop may not lie inside the last two bars, and turns at a touch."""
    high, low = frame["high"].tolist(), frame["low"].tolist()
    rising = not (low[0] - low[1] > max(high[1] - high[0], 0))
    extreme, sar = (high[1], low[0]) if rising else (low[1], high[0])
    factor, out = 0.02, [np.nan]
    for bar in range(1, len(high)):
        previous = slice(max(bar - 1, 0), bar)
        if (low[bar] <= sar) if rising else (high[bar] >= sar):
            rising = not rising
            recent_high, recent_low = max(*high[previous], high[bar]), min(*low[previous], low[bar])
            sar = min(extreme, recent_low) if rising else max(extreme, recent_high)
            out.append(sar)
            factor, extreme = 0.02, high[bar] if rising else low[bar]
        else:
            out.append(sar)
            beyond = high[bar] > extreme if rising else low[bar] < extreme
            if beyond:
                extreme = high[bar] if rising else low[bar]
                factor = min(factor + 0.02, 0.2)
        recent_high, recent_low = max(*high[previous], high[bar]), min(*low[previous], low[bar])
        sar += factor * (extreme - sar)
        sar = min(sar, recent_low) if rising else max(sar, recent_high)
    return np.array(out)


def _aroon(values: pd.Series, best: Callable[[np.ndarray], int]) -> pd.Series:
    """Bars since the extreme of 26 bars; of equal ones the newest counts (TA-Lib's convention; ta's is the oldest)."""
    return values.rolling(26).apply(lambda window: 100 * (25 - best(window[::-1])) / 25, raw=True)


def _plain_values(frame: pd.DataFrame) -> dict[str, pd.Series | np.ndarray]:
    """Every indicator by the other library, or by its formula in pandas; to be compared after SEEDS bars."""
    high, low, close, volume = (frame[name] for name in ("high", "low", "close", "volume"))
    time = frame["open_time"]
    range_of = {bars: (high.rolling(bars).max(), low.rolling(bars).min()) for bars in (9, 14, 20, 26)}
    atr = AverageTrueRange(high, low, close, window=14).average_true_range()
    adx = ADXIndicator(high, low, close, window=14)
    macd = MACD(close, window_slow=26, window_fast=12, window_sign=9)
    ema = EMAIndicator(close, window=20).ema_indicator()
    stochastic = StochasticOscillator(high, low, close, window=14, smooth_window=3)
    mean, deviation = close.rolling(20).mean(), close.rolling(20).std(ddof=0)
    bands = {"high": mean + 2 * deviation, "low": mean - 2 * deviation}
    donchian = {"high": range_of[20][0], "low": range_of[20][1]}
    aroon_up, aroon_down = _aroon(high, np.argmax), _aroon(low, np.argmin)
    previous = close.shift()
    true_range = pd.concat([high - low, (high - previous).abs(), (low - previous).abs()], axis=1).max(axis=1)
    vortex = {
        "pos": (high - low.shift()).abs().rolling(14).sum() / true_range.rolling(14).sum(),
        "neg": (low - high.shift()).abs().rolling(14).sum() / true_range.rolling(14).sum(),
    }
    flow = ((close - low) - (high - close)) / (high - low).where(high > low) * volume
    rsi = RSIIndicator(close, window=14).rsi()
    rsi_low, rsi_high = rsi.rolling(14).min(), rsi.rolling(14).max()
    return {
        "ema_20": ema,
        "adx_14": adx.adx(),
        "macd": macd.macd(),
        "macd_signal": macd.macd_signal(),
        "macd_diff": macd.macd_diff(),
        "ichimoku_conversion": sum(range_of[9]) / 2,
        "ichimoku_base": sum(range_of[26]) / 2,
        "psar": _parabolic_sar(frame),
        "aroon_up": aroon_up,
        "aroon_down": aroon_down,
        "dpo_20": close.shift(11) - mean,
        "rsi_14": rsi,
        "stoch_rsi_14": (rsi - rsi_low) / (rsi_high - rsi_low),
        "stoch_k": stochastic.stoch(),
        "stoch_d": stochastic.stoch_signal(),
        "cci_20": CCIIndicator(high, low, close, window=20, constant=0.015).cci(),
        "williams_r_14": WilliamsRIndicator(high, low, close, lbp=14).williams_r(),
        "roc_12": ROCIndicator(close, window=12).roc(),
        "ultimate_oscillator": UltimateOscillator(high, low, close).ultimate_oscillator(),
        "mfi_14": _money_flow_index(frame),
        "atr_14": atr,
        "bb_high": bands["high"],
        "bb_mid": mean,
        "bb_low": bands["low"],
        "bb_width": (bands["high"] - bands["low"]) / mean * 100,
        "donchian_high": donchian["high"],
        "donchian_mid": (donchian["high"] + donchian["low"]) / 2,
        "donchian_low": donchian["low"],
        # TA-Lib starts at the first bar's volume; an unchanged close adds nothing (ta adds its volume).
        "obv": (np.sign(close.diff()).fillna(1) * volume).cumsum(),
        "cmf_20": flow.fillna(0).rolling(20).sum() / volume.rolling(20).sum(),
        "volume_sma_20": volume.rolling(20).mean(),
        "volume_ratio": volume / volume.rolling(20).mean(),
        "vortex_pos": vortex["pos"],
        "vortex_neg": vortex["neg"],
        "hour": time.dt.hour,
        "day_of_week": time.dt.day_of_week,
        "is_weekend": time.dt.day_of_week >= 5,
        "price_change_1": close.pct_change(1),
        "price_change_4": close.pct_change(4),
        "price_change_16": close.pct_change(16),
        "close_to_ema": (close / ema - 1) / (atr / close),
        "bb_position": (close - bands["low"]) / (bands["high"] - bands["low"]),
        "donchian_position": (close - donchian["low"]) / (donchian["high"] - donchian["low"]),
        "atr_pct": atr / close,
        "di_diff": adx.adx_pos() - adx.adx_neg(),
        "aroon_oscillator": aroon_up - aroon_down,
        "vortex_diff": vortex["pos"] - vortex["neg"],
        "stoch_diff": stochastic.stoch() - stochastic.stoch_signal(),
        "candle_range": (high - low) / close,
    }


def _money_flow_index(frame: pd.DataFrame) -> pd.Series:
    """As TA-Lib has it: a typical price that changed by rounding only is no flow (to ta it is positive or negative)."""
    typical = (frame["high"] + frame["low"] + frame["close"]) / 3
    change = typical.diff()
    flow = (typical * frame["volume"]).where(change.abs() > 1e-12 * typical, 0.0)
    positive, negative = (flow.where(change * sign > 0, 0.0).rolling(14).sum() for sign in (1, -1))
    return 100 * positive / (positive + negative)


@samples
def test_values_agree_with_an_independent_computation(name: str, first: int) -> None:
    frame = sample(name, first)
    values, plain = compute_indicators(frame), _plain_values(frame)
    assert set(plain) == set(COLUMNS)
    for column in COLUMNS:
        ours, theirs = values[column].to_numpy()[SEEDS:], np.asarray(plain[column], float)[SEEDS:]
        # Residues of running sums differ where a value is 0.
        scale = np.nanmedian(np.abs(theirs)) if column not in TIME_COLUMNS else 1.0
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-8 * scale, err_msg=column)


# --- where the libraries differ ------------------------------------------------------------------------------------


def _average(values: np.ndarray, start: int, window: int, weight: float) -> np.ndarray:
    """An exponential average that begins, as TA-Lib's do, as the plain mean of `window` values from `start` on."""
    out, first = np.full(len(values), np.nan), start + window - 1
    out[first] = values[start : first + 1].mean()
    for bar in range(first + 1, len(values)):
        out[bar] = out[bar - 1] + weight * (values[bar] - out[bar - 1])
    return out


def _wilder_sum(values: np.ndarray) -> np.ndarray:
    """Wilder's running sum of 14: begun with 13 values from bar 1 on, then less a fourteenth, plus the newest."""
    out = np.full(len(values), np.nan)
    out[13] = values[1:14].sum()
    for bar in range(14, len(values)):
        out[bar] = out[bar - 1] * (13 / 14) + values[bar]
    return out


def _conventions(frame: pd.DataFrame) -> dict[str, np.ndarray]:
    """From the first bar on, with the convention that is TA-Lib's in each."""
    high, low, close, volume = (frame[name].to_numpy() for name in ("high", "low", "close", "volume"))
    change = np.diff(close, prepend=np.nan)
    before = np.concatenate(([np.nan], close[:-1]))
    true_range = np.maximum(high - low, np.maximum(np.abs(high - before), np.abs(low - before)))
    fast, slow = _average(close, 26 - 12, 12, 2 / 13), _average(close, 0, 26, 2 / 27)
    line = fast - slow
    signal = _average(line, 25, 9, 2 / 10)
    gain, loss = (_average(np.maximum(sign * change, 0), 1, 14, 1 / 14) for sign in (1, -1))
    up, down = np.diff(high, prepend=np.nan), -np.diff(low, prepend=np.nan)
    rise = _wilder_sum(np.where((up > down) & (up > 0), up, 0.0)) / _wilder_sum(true_range)
    fall = _wilder_sum(np.where((down > up) & (down > 0), down, 0.0)) / _wilder_sum(true_range)
    index = 100 * np.abs(rise - fall) / (rise + fall)
    lowest, highest = frame["low"].rolling(14).min(), frame["high"].rolling(14).max()
    k = 100 * (frame["close"] - lowest) / (highest - lowest)
    atr = _average(true_range, 1, 14, 1 / 14)
    ema = _average(close, 0, 20, 2 / 21)
    known = lambda values, first: np.where(np.arange(len(close)) >= first, values, np.nan)  # noqa: E731
    return {
        "ema_20": ema,
        "macd": known(line, 33),
        "macd_signal": signal,
        "macd_diff": line - signal,
        "rsi_14": 100 * gain / (gain + loss),
        "atr_14": atr,
        "atr_pct": atr / close,
        "close_to_ema": (close / ema - 1) / (atr / close),
        "di_diff": known(100 * (rise - fall), 14),
        "adx_14": _average(index, 14, 14, 1 / 14),
        "stoch_k": known(k, 15),
        "stoch_d": k.rolling(3).mean().to_numpy(),
        "obv": np.cumsum(np.where(change > 0, volume, np.where(change < 0, -volume, 0.0))) + volume[0],
        "mfi_14": known(_money_flow_index(frame).to_numpy(), 14),  # the first bar's flow is unknown
        "aroon_up": _aroon(frame["high"], np.argmax).to_numpy(),
        "aroon_down": _aroon(frame["low"], np.argmin).to_numpy(),
    }


@samples
def test_values_follow_the_convention_from_the_first_one_on(name: str, first: int) -> None:
    frame = sample(name, first).iloc[:600].reset_index(drop=True)
    values = compute_indicators(frame)
    for column, plain in _conventions(frame).items():
        scale = np.nanmedian(np.abs(plain))
        np.testing.assert_allclose(values[column], plain, rtol=1e-8, atol=1e-10 * scale, err_msg=column)


def _of_ta(frame: pd.DataFrame) -> dict[str, pd.Series]:
    high, low, close, volume = (frame[name] for name in ("high", "low", "close", "volume"))
    adx, macd, aroon = ADXIndicator(high, low, close), MACD(close), AroonIndicator(high, low)
    return {
        "ema_20": EMAIndicator(close, 20).ema_indicator(),
        "macd": macd.macd(),
        "macd_signal": macd.macd_signal(),
        "rsi_14": RSIIndicator(close).rsi(),
        "atr_14": AverageTrueRange(high, low, close).average_true_range(),
        "di_diff": adx.adx_pos() - adx.adx_neg(),
        "adx_14": adx.adx(),
        "stoch_k": StochasticOscillator(high, low, close).stoch(),
        "obv": OnBalanceVolumeIndicator(close, volume).on_balance_volume(),
        "mfi_14": MFIIndicator(high, low, close, volume).money_flow_index(),
        "aroon_up": aroon.aroon_up(),
    }


# What `ta` does instead, and a bar of the frame below at which that shows.
DIFFERENCES = {
    "ema_20": ("begins with the first close, not with the mean of the first 20", 19),
    "macd": ("both averages begin with the first close", 33),
    "macd_signal": ("begins with the first value of the line", 33),
    "rsi_14": ("begins with the first change alone, not with the mean of 14", 14),
    "atr_14": ("counts the first bar's own range as a true range, and is 0 in its warm-up", 14),
    "di_diff": ("begins with other bars, and is 0 in its warm-up", 14),
    "adx_14": ("begins with other bars, and is 0 in its warm-up", 27),
    "stoch_k": ("is known before %D is: from bar 13, not 15", 13),
    "obv": ("adds the volume of an unchanged close", 100),
    "mfi_14": ("counts a change of the typical price by rounding as a flow", 120),
    "aroon_up": ("of equal highs the oldest counts, not the newest", 105),
}


@pytest.mark.parametrize("column", DIFFERENCES)
def test_other_library_differs_where_the_convention_says(column: str) -> None:
    """The table is no invention: at the bar that it names `ta` says something else."""
    frame = market(200)
    frame.loc[100, "close"] = frame["close"].iloc[99]
    frame.loc[[100, 102], "high"] = frame["high"].max() + 1
    for bar in range(105, 125):  # one typical price, and two numbers
        frame.loc[bar, ["open", "high", "low", "close"]] = [0.2, 0.3, 0.1, 0.2] if bar % 2 else [0.2, 0.4, 0.1, 0.1]
    difference, bar = DIFFERENCES[column]
    ours, theirs = compute_indicators(frame)[column].iloc[bar], _of_ta(frame)[column].iloc[bar]
    assert not np.isclose(ours, theirs, rtol=1e-6, atol=0, equal_nan=True), difference
    assert column in _conventions(frame)


def test_conventions_forgotten_are_those_of_first_values() -> None:
    """After SEEDS bars the averages agree whatever they began with."""
    frame = market(1_500)
    values, theirs = compute_indicators(frame).iloc[SEEDS:], _of_ta(frame)
    for column in ("ema_20", "macd", "macd_signal", "rsi_14", "atr_14", "di_diff", "adx_14"):
        np.testing.assert_allclose(values[column], theirs[column].iloc[SEEDS:], rtol=1e-6, atol=1e-9, err_msg=column)


def test_stochastic_rsi_is_the_one_of_ta_from_its_first_value_on() -> None:
    frame = market(200)
    theirs = StochRSIIndicator(frame["close"], window=14).stochrsi()
    np.testing.assert_array_equal(compute_indicators(frame)["stoch_rsi_14"], theirs)


def test_first_values_are_those_of_ta_lib() -> None:
    frame = market(200)
    high, low, close, volume = (frame[name].to_numpy() for name in ("high", "low", "close", "volume"))
    values = compute_indicators(frame)
    k, d = talib.STOCHF(high, low, close, 14, 3)
    expected = {
        "ema_20": talib.EMA(close, 20),
        "adx_14": talib.ADX(high, low, close, 14),
        "macd": talib.MACD(close, 12, 26, 9)[0],
        "psar": talib.SAR(high, low, 0.02, 0.2),
        "aroon_up": talib.AROON(high, low, 25)[1],
        "rsi_14": talib.RSI(close, 14),
        "stoch_k": k,
        "stoch_d": d,
        "cci_20": talib.CCI(high, low, close, 20),
        "williams_r_14": talib.WILLR(high, low, close, 14),
        "roc_12": talib.ROC(close, 12),
        "ultimate_oscillator": talib.ULTOSC(high, low, close, 7, 14, 28),
        "mfi_14": talib.MFI(high, low, close, volume, 14),
        "atr_14": talib.ATR(high, low, close, 14),
        "bb_high": talib.BBANDS(close, 20, 2, 2)[0],
        "obv": talib.OBV(close, volume),
        "di_diff": talib.PLUS_DI(high, low, close, 14) - talib.MINUS_DI(high, low, close, 14),
    }
    for column, theirs in expected.items():
        np.testing.assert_allclose(values[column], theirs, rtol=1e-10, atol=1e-11, err_msg=column)


# --- a definition that changes has another version -----------------------------------------------------------------


def plain_candles(bars: int) -> pd.DataFrame:
    """Candles that are the same on every machine: whole numbers of cents from a congruential generator."""

    def numbers() -> Iterator[int]:
        x = 1
        while True:
            x = (1_103_515_245 * x + 12_345) % 2**31
            yield x >> 16

    draw, cents, rows = numbers(), 10_000, []
    for _ in range(bars):
        open, cents = cents, cents + next(draw) % 81 - 40
        high, low = max(open, cents) + next(draw) % 30, min(open, cents) - next(draw) % 30
        rows.append((open / 100, high / 100, low / 100, cents / 100, next(draw) % 5_000 / 8))
    frame = pd.DataFrame(rows, columns=["open", "high", "low", "close", "volume"])
    frame.insert(0, "open_time", pd.date_range("2024-01-06", periods=bars, freq="15min", tz="UTC"))
    return frame


# Version of each, and its value at the last of 700 plain candles.
VALUES: dict[str, tuple[int, float]] = {
    "ema_20": (1, 103.09452543626941),
    "adx_14": (1, 16.615012604201173),
    "macd": (1, -0.13650591783370203),
    "macd_signal": (1, -0.09859679058608461),
    "macd_diff": (1, -0.037909127247617413),
    "ichimoku_conversion": (1, 102.94999999999999),
    "ichimoku_base": (1, 103.145),
    "psar": (1, 103.29300901212412),
    "aroon_up": (1, 56.0),
    "aroon_down": (1, 4.0),
    "dpo_20": (1, 0.2149999999999892),
    "rsi_14": (1, 48.384435970881555),
    "stoch_rsi_14": (1, 0.5707633143462149),
    "stoch_k": (1, 43.715846994535404),
    "stoch_d": (1, 32.05828779599283),
    "cci_20": (1, -59.157247412410356),
    "williams_r_14": (1, -56.284153005464596),
    "roc_12": (1, -0.712840766785483),
    "ultimate_oscillator": (1, 46.10731428375202),
    "mfi_14": (1, 45.8905935394091),
    "atr_14": (1, 0.44583041111393845),
    "bb_high": (1, 103.83320059542427),
    "bb_mid": (1, 103.19499999999991),
    "bb_low": (1, 102.55679940457554),
    "bb_width": (1, 1.2368827858411082),
    "donchian_high": (1, 104.1),
    "donchian_mid": (1, 103.185),
    "donchian_low": (1, 102.27),
    "obv": (1, -2962.625),
    "cmf_20": (1, -0.09546118227879939),
    "volume_sma_20": (1, 323.90625),
    "volume_ratio": (1, 0.29329474191992283),
    "vortex_pos": (1, 0.9520661157024807),
    "vortex_neg": (1, 1.076033057851241),
    "hour": (1, 6.0),
    "day_of_week": (1, 5.0),
    "is_weekend": (1, 1.0),
    "price_change_1": (1, 0.0018468118195956234),
    "price_change_4": (1, 0.0026264591439688328),
    "price_change_16": (1, -0.00386585483715092),
    "close_to_ema": (1, -0.054997598269710346),
    "bb_position": (1, 0.4020684085097122),
    "donchian_position": (1, 0.43715846994535407),
    "atr_pct": (1, 0.004325510925719788),
    "di_diff": (1, -5.095794510743053),
    "aroon_oscillator": (1, 52.0),
    "vortex_diff": (1, -0.12396694214876025),
    "stoch_diff": (1, 11.657559198542572),
    "candle_range": (1, 0.004754050645192538),
}


@pytest.mark.parametrize("indicator", CANDLES_49, ids=lambda indicator: indicator.name)
def test_value_changes_with_the_version_only(indicator: Any) -> None:
    newest = compute_indicators(plain_candles(700), indicators=[indicator]).to_numpy()[-1, 0]
    version, value = VALUES[indicator.name]
    np.testing.assert_allclose(
        newest, value, rtol=1e-10, err_msg=f"{indicator.name} is defined otherwise: raise its version, and FEATURE_SET"
    )
    assert indicator.version == version


def test_feature_set_and_version_change_together() -> None:
    """Where the second has changed the first has to: models of before would be handed inputs that they do not know."""
    assert (FEATURE_SET, feature_version()) == ("candles_49/1", "candles_49:9a2b83e0599f")
