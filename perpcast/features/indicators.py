"""The 49 indicators of `candles_49`: their registry, and their values from candles.

TA-Lib and `ta` compute them, as spec/indicators.md assigns them (`ta` loops in Python where TA-Lib does not, and its
first ADX and ATR values are 0). They start again after a gap, and are NaN where nothing is known: before their window
has filled, on a missing bar, and where a library answers 0 or 100 to a window in which nothing moved or traded.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import talib
from ta.momentum import StochRSIIndicator
from ta.trend import DPOIndicator
from ta.volume import ChaikinMoneyFlowIndicator

from perpcast.features.stretch import STRETCH_VERSION, Stretch, bars_of, in_blocks, stretches, unless
from perpcast.features.transforms import (
    Transform,
    change_to_volume,
    close_above,
    divided_by,
    in_units_of_atr,
    less,
    log_one_plus,
    log_to_long_volume,
    log_to_own_long_mean,
    share_of_close,
    unchanged,
)
from perpcast.market import FLAT_RUN_BARS

# Stands in the task of every model: one of another set or number is refused. What to raise when: `feature_version`.
FEATURE_SET = "candles_49/1"

DAY_MS = 86_400_000
HOUR_MS = 3_600_000


@dataclass(frozen=True)
class Indicator:
    """One column of the feature set.

    `inputs` are series on the bar grid. `warmup` bars of a stretch pass before the first value. `compute` gives the
    stored value from a gap-free stretch. `model_input` makes of it what the model sees; None: it enters as a known
    input, as calendar (`inputs.KNOWN`). `input_warmup` bars pass before the first model input, where that takes longer.
    `double` values are stored in double precision, the others as REAL. `version` is raised with every change of the
    stored values (`feature_version`).
    """

    name: str
    group: str
    inputs: tuple[str, ...]
    warmup: int
    compute: Callable[[Stretch], np.ndarray]
    model_input: Transform | None
    meaning: str
    input_warmup: int | None = None
    double: bool = False
    version: int = 1


def _cmf(stretch: Stretch) -> np.ndarray:
    series = stretch.series
    return (
        ChaikinMoneyFlowIndicator(series["high"], series["low"], series["close"], series["volume"], window=20)
        .chaikin_money_flow()
        .to_numpy()
    )


def _stoch_rsi(stretch: Stretch) -> np.ndarray:
    return StochRSIIndicator(stretch.series["close"], window=14).stochrsi().to_numpy()


def _cci(stretch: Stretch) -> np.ndarray:
    return in_blocks(stretch, 19, lambda part: talib.CCI(part.high, part.low, part.close, timeperiod=20))[0]


def _ultimate(stretch: Stretch) -> np.ndarray:
    return in_blocks(stretch, 28, lambda part: talib.ULTOSC(part.high, part.low, part.close, 7, 14, 28))[0]


def _mfi(stretch: Stretch) -> np.ndarray:
    return in_blocks(stretch, 14, lambda part: talib.MFI(part.high, part.low, part.close, part.volume, 14))[0]


def _change(bars: int) -> Callable[[Stretch], np.ndarray]:
    return lambda stretch: talib.ROCP(stretch.close, timeperiod=bars)


def _position(close: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return np.where(high > low, (close - low) / (high - low), np.nan)


def _weekday(stretch: Stretch) -> np.ndarray:
    return ((stretch.open_time_ms // DAY_MS + 3) % 7).astype(float)  # 1970-01-01 was a Thursday


H, L, C, V = "candles.high", "candles.low", "candles.close", "candles.volume"
TIME = "candles.open_time"

# In the order of the table. A mask (`unless`) stands where a library knows no NaN for a window without information.
# fmt: off
CANDLES_49: tuple[Indicator, ...] = (
    Indicator("ema_20", "trend", (C,), 19, lambda s: s.ema_20, close_above,
              "Exponential moving average of close over 20 bars"),
    Indicator("adx_14", "trend", (H, L, C), 27,
              unless(lambda s: s.no_range(14), lambda s: talib.ADX(s.high, s.low, s.close, timeperiod=14)),
              divided_by(100), "Strength of the trend, whichever its direction: 0 none, above 25 a trend"),
    Indicator("macd", "trend", (C,), 33, lambda s: s.macd[0], share_of_close,
              "Fast less slow average of close (12 and 26 bars): momentum of the trend"),
    Indicator("macd_signal", "trend", (C,), 33, lambda s: s.macd[1], share_of_close, "9-bar average of macd"),
    Indicator("macd_diff", "trend", (C,), 33, lambda s: s.macd[2], share_of_close,
              "macd less its signal: momentum rising or fading"),
    Indicator("ichimoku_conversion", "trend", (H, L), 8, lambda s: s.ichimoku[0], close_above,
              "Middle of the last 9 bars' range"),
    Indicator("ichimoku_base", "trend", (H, L), 25, lambda s: s.ichimoku[1], close_above,
              "Middle of the last 26 bars' range"),
    Indicator("psar", "trend", (H, L), 1, lambda s: talib.SAR(s.high, s.low, acceleration=0.02, maximum=0.2),
              close_above, "Parabolic stop-and-reverse level: below the price in an uptrend, above it in a downtrend"),
    Indicator("aroon_up", "trend", (H, L), 25, lambda s: s.aroon[0], divided_by(100),
              "How recent the highest high of 25 bars is: 100 now, 0 long ago"),
    Indicator("aroon_down", "trend", (H, L), 25, lambda s: s.aroon[1], divided_by(100),
              "How recent the lowest low of 25 bars is: 100 now, 0 long ago"),
    Indicator("dpo_20", "trend", (C,), 19, lambda s: DPOIndicator(s.series["close"], window=20).dpo().to_numpy(),
              share_of_close, "Close of 11 bars ago less the 20-bar mean: the swing around the trend"),
    Indicator("rsi_14", "oscillator", (C,), 14,
              unless(lambda s: s.flat_closes(15), lambda s: talib.RSI(s.close, timeperiod=14)), divided_by(100),
              "Gains as a share of all moves of 14 bars: above 70 overbought, below 30 oversold"),
    Indicator("stoch_rsi_14", "oscillator", (C,), 26, unless(lambda s: s.flat_closes(14), _stoch_rsi), unchanged,
              "Where the RSI stands in its own range of 14 bars, 0 to 1"),
    Indicator("stoch_k", "oscillator", (H, L, C), 15, lambda s: s.stochastic[0], divided_by(100),
              "Where close stands in the range of 14 bars, 0 to 100"),
    Indicator("stoch_d", "oscillator", (H, L, C), 15, lambda s: s.stochastic[1], divided_by(100),
              "Mean of stoch_k over 3 bars"),
    Indicator("cci_20", "oscillator", (H, L, C), 19,
              unless(lambda s: s.flat_typical(20), _cci), divided_by(200),
              "Distance of the typical price from its 20-bar mean, in mean deviations / 0.015"),
    Indicator("williams_r_14", "oscillator", (H, L, C), 13,
              unless(lambda s: s.flat_prices(14), lambda s: talib.WILLR(s.high, s.low, s.close, timeperiod=14)),
              divided_by(100), "Distance of close below the high of 14 bars, as a share of their range: -100 to 0"),
    Indicator("roc_12", "oscillator", (C,), 12, lambda s: talib.ROC(s.close, timeperiod=12), divided_by(100),
              "Change of close over 12 bars, in percent"),
    Indicator("ultimate_oscillator", "oscillator", (H, L, C), 28, unless(lambda s: s.no_range(7), _ultimate),
              divided_by(100), "Buying pressure over 7, 14 and 28 bars together, 0 to 100"),
    Indicator("mfi_14", "oscillator", (H, L, C, V), 14, unless(lambda s: s.no_money_flow(14), _mfi), divided_by(100),
              "RSI weighted by traded value over 14 bars, 0 to 100"),
    Indicator("atr_14", "volatility", (H, L, C), 14, lambda s: s.atr, share_of_close,
              "Average true range of 14 bars: how far the price goes in a bar"),
    Indicator("bb_high", "volatility", (C,), 19, lambda s: s.bollinger[0], close_above,
              "20-bar mean plus 2 standard deviations"),
    Indicator("bb_mid", "volatility", (C,), 19, lambda s: s.bollinger[1], close_above, "20-bar mean of close"),
    Indicator("bb_low", "volatility", (C,), 19, lambda s: s.bollinger[2], close_above,
              "20-bar mean less 2 standard deviations"),
    Indicator("bb_width", "volatility", (C,), 19, lambda s: (s.bollinger[0] - s.bollinger[2]) / s.bollinger[1] * 100,
              divided_by(100), "Distance between the Bollinger bands, in percent of the middle"),
    Indicator("donchian_high", "volatility", (H,), 19, lambda s: s.donchian[0], close_above, "Highest high of 20 bars"),
    Indicator("donchian_mid", "volatility", (H, L), 19, lambda s: s.donchian[1], close_above,
              "Middle of the 20-bar range"),
    Indicator("donchian_low", "volatility", (L,), 19, lambda s: s.donchian[2], close_above, "Lowest low of 20 bars"),
    Indicator("obv", "volume", (C, V), 0, lambda s: talib.OBV(s.close, s.volume), change_to_volume,
              "Volume of rising less volume of falling bars, since the last gap", input_warmup=20, double=True),
    Indicator("cmf_20", "volume", (H, L, C, V), 19, unless(lambda s: s.no_volume(20), _cmf), unchanged,
              "Volume of 20 bars weighted by where each closed in its range, -1 to 1"),
    Indicator("volume_sma_20", "volume", (V,), 19, lambda s: s.volume_sma_20, log_to_long_volume,
              "Mean volume of 20 bars", input_warmup=199),
    Indicator("volume_ratio", "volume", (V,), 19, lambda s: s.volume / s.volume_sma_20, log_one_plus,
              "Volume as a multiple of its 20-bar mean"),
    Indicator("vortex_pos", "vortex", (H, L, C), 14, lambda s: s.vortex[0], less(1),
              "Upward movement as a multiple of the true range over 14 bars"),
    Indicator("vortex_neg", "vortex", (H, L, C), 14, lambda s: s.vortex[1], less(1),
              "Downward movement as a multiple of the true range over 14 bars"),
    Indicator("hour", "time", (TIME,), 0, lambda s: (s.open_time_ms % DAY_MS // HOUR_MS).astype(float), None,
              "Hour of the bar's open in UTC, 0 to 23"),
    Indicator("day_of_week", "time", (TIME,), 0, _weekday, None, "Day of the bar's open: Monday 0 to Sunday 6"),
    Indicator("is_weekend", "time", (TIME,), 0, lambda s: (_weekday(s) >= 5).astype(float), None,
              "1 on Saturday and Sunday, else 0"),
    Indicator("price_change_1", "price", (C,), 1, _change(1), unchanged, "Change of close over 1 bar"),
    Indicator("price_change_4", "price", (C,), 4, _change(4), unchanged, "Change of close over 4 bars"),
    Indicator("price_change_16", "price", (C,), 16, _change(16), unchanged, "Change of close over 16 bars"),
    Indicator("close_to_ema", "derived", (H, L, C), 19,
              unless(lambda s: s.no_range(14), lambda s: (s.close / s.ema_20 - 1) / (s.atr / s.close)), unchanged,
              "Distance of close from ema_20, in units of the average true range"),
    Indicator("bb_position", "derived", (C,), 19, lambda s: _position(s.close, s.bollinger[2], s.bollinger[0]),
              less(0.5), "Where close stands between the Bollinger bands: 0 lower, 1 upper"),
    Indicator("donchian_position", "derived", (H, L, C), 19, lambda s: _position(s.close, s.donchian[2], s.donchian[0]),
              less(0.5), "Where close stands in the 20-bar range: 0 lowest, 1 highest"),
    Indicator("atr_pct", "derived", (H, L, C), 14, lambda s: s.atr / s.close, log_to_own_long_mean,
              "Average true range as a fraction of close: volatility", input_warmup=213),
    Indicator("di_diff", "derived", (H, L, C), 14, lambda s: s.directional, divided_by(100),
              "Upward less downward directional movement: the direction of the trend"),
    Indicator("aroon_oscillator", "derived", (H, L), 25, lambda s: s.aroon[0] - s.aroon[1], divided_by(100),
              "aroon_up less aroon_down"),
    Indicator("vortex_diff", "derived", (H, L, C), 14, lambda s: s.vortex[0] - s.vortex[1], unchanged,
              "vortex_pos less vortex_neg"),
    Indicator("stoch_diff", "derived", (H, L, C), 15, lambda s: s.stochastic[0] - s.stochastic[1], divided_by(100),
              "stoch_k less stoch_d"),
    Indicator("candle_range", "derived", (H, L, C), 0, lambda s: (s.high - s.low) / s.close, in_units_of_atr,
              "Height of the bar as a fraction of close", input_warmup=14),
)
# fmt: on

COLUMNS = tuple(indicator.name for indicator in CANDLES_49)


def feature_version(registry: Sequence[Indicator] = CANDLES_49) -> str:
    """What the stored columns are made by, such as `candles_49:0123456789ab`; another one where values may be others.

    A pure function of what is declared - the name of the set; name, inputs, warm-up, precision and `version` of every
    indicator; the rules of stretches - and of no source text. `interval` and `max_gap_bars` are the caller's, and not
    in it. To be raised by whoever changes something:

    - `Indicator.version`, when its stored values change by more than the last bits of a double: formula, parameters, a
      mask, or a library that computes otherwise after an upgrade (tests/test_features_values.py notices);
    - `stretch.STRETCH_VERSION`, when another bar counts as missing or as a new start;
    - the number in FEATURE_SET beside either of them, and by itself when only a model input changes: the table stays,
      models of before are refused.
    """
    declared = [[each.name, each.inputs, each.warmup, each.double, each.version] for each in registry]
    text = json.dumps([STRETCH_VERSION, FLAT_RUN_BARS, declared])
    return f"{FEATURE_SET.split('/')[0]}:{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def compute_indicators(
    candles: pd.DataFrame,
    interval: str = "15",
    max_gap_bars: int = 0,
    indicators: Sequence[Indicator] = CANDLES_49,
) -> pd.DataFrame:
    """The indicators of one symbol's candles: float64, a column each in their order, on the index of `candles`.

    `candles` has open_time, open, high, low, close, volume, oldest first. A value at bar t depends on bars up to t
    alone, back to the last gap of more than `max_gap_bars` missing bars; what is unknown is NaN, nothing is infinite.
    Raises DataError where open_time does not rise, ValueError for an unknown interval.
    """
    bars = bars_of(candles, interval)
    parts = stretches(bars, max_gap_bars)
    values = np.full((len(indicators), len(bars)), np.nan)
    # Prices near the ends of float64 overflow, windows without information divide 0 by 0: both end as NaN below.
    with np.errstate(all="ignore"):
        for line, indicator in zip(values, indicators, strict=True):
            if indicator.inputs == (TIME,):
                line[:] = indicator.compute(bars)  # the time of a bar is known whatever its prices
                continue
            for rows, stretch in parts:
                if len(stretch) > indicator.warmup:
                    known = np.array(indicator.compute(stretch))
                    known[: indicator.warmup] = np.nan
                    known[np.isinf(known)] = np.nan
                    line[rows] = known
    return pd.DataFrame(values.T, index=candles.index, columns=[each.name for each in indicators], copy=False)
