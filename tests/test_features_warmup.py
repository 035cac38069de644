"""Live equals batch: from WARMUP_BARS of history every model input is the one from all of it.

    python -m tests.test_features_warmup [starts]

measures over every recorded file how many bars each input needs, as docs/decisions/0003 writes it down.
"""

import sys
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest

from perpcast.features.indicators import CANDLES_49, COLUMNS, compute_indicators
from perpcast.features.inputs import OBSERVED, WARMUP_BARS, compute_inputs, rounded_as_stored
from perpcast.features.stretch import BLOCK_BARS
from tests.recorded import CANDLES, needs_recorded, recorded_candles
from tests.test_features_indicators import market, troubled_market

LOOKBACK = 60
TOLERANCE = 1e-6


def with_holes(candles: pd.DataFrame) -> pd.DataFrame:
    """Without three single rows, and without three runs of 2 to 40."""
    random = np.random.default_rng(3)
    gone = set(random.integers(0, len(candles), 3).tolist())
    for first in random.integers(0, len(candles) - 40, 3):
        gone |= set(range(first, first + int(random.integers(2, 40))))
    return candles.drop(index=list(gone)).reset_index(drop=True)


PANEL = "binance_usdm_15m_panel51_1y"
Candles = Callable[[], pd.DataFrame]
RECORDED: dict[str, Candles] = {
    "BTC in the crash of 2025-10-10": lambda: recorded_candles(f"{PANEL}/BTCUSDT", 32_000),
    "BONK in the crash": lambda: recorded_candles(f"{PANEL}/1000BONKUSDT", 32_000),
    "BONK in the crash, with holes": lambda: with_holes(recorded_candles(f"{PANEL}/1000BONKUSDT", 31_000)),
    "TRUMP from its listing on": lambda: recorded_candles(f"{PANEL}/TRUMPUSDT", 0, 4_000),
    "PEPE at a millionth": lambda: recorded_candles("okx_swap_15m/PEPEUSDT", 0, 4_000),
    "BTC around an outage behind flat bars": lambda: recorded_candles("okx_swap_15m/BTCUSDT", 32_000, 4_000),
    "TRX": lambda: recorded_candles("binance_usdm_15m_long/TRXUSDT", 50_000, 4_000),
    "XRP of Bybit": lambda: recorded_candles("bybit_linear_15m_2024/XRPUSDT", 20_000, 4_000),
}
MADE_UP: dict[str, Candles] = {
    "random walk": lambda: market(4_000),
    "trouble": troubled_market,
    "holes": lambda: with_holes(market(4_000)),
}
sets = pytest.mark.parametrize(
    "candles",
    [
        *(pytest.param(RECORDED[name], marks=needs_recorded, id=name) for name in RECORDED),
        *(pytest.param(MADE_UP[name], id=name) for name in MADE_UP),
    ],
)


def bars_needed(candles: pd.DataFrame, starts: np.ndarray, horizon: int = 1_500) -> np.ndarray:
    """Bars of history from which on each input is the one from all of it: int [2, inputs], within 1e-6 and exactly.

    Candles from each of the rows `starts` on are computed by themselves: the bar that lies i rows behind a start has
    i + 1 bars of history. A bar whose inputs differ, or are unknown in one of both, needs more than that.
    """
    batch, needed = compute_inputs(candles), np.zeros((2, len(OBSERVED)), int)
    for start in starts:
        live, expected = compute_inputs(candles.iloc[start : start + horizon]), batch[start : start + horizon]
        apart = np.abs(live.astype(float) - expected) > TOLERANCE * np.abs(expected)
        unlike = np.isnan(live) != np.isnan(expected)
        different = np.stack([apart | unlike, ((live != expected) & ~np.isnan(expected)) | unlike])
        history = np.arange(1, len(live) + 1)[:, None]
        needed = np.maximum(needed, (different * (history + 1)).max(axis=1))
    return needed


@sets
def test_newest_window_from_warmup_bars_is_the_batch_to_the_bit(candles: Candles) -> None:
    """What a runner computes at some bar, of the bars that it then holds, against all of history."""
    frame = candles()
    inputs, stored = compute_inputs(frame), rounded_as_stored(compute_indicators(frame).to_numpy())
    bars = WARMUP_BARS + LOOKBACK - 1
    for newest in np.random.default_rng(5).integers(bars, len(frame), 12):
        held, window = frame.iloc[newest + 1 - bars : newest + 1], slice(newest + 1 - LOOKBACK, newest + 1)
        live = compute_inputs(held)[-LOOKBACK:]
        for number, name in enumerate(OBSERVED):
            np.testing.assert_array_equal(live[:, number], inputs[window, number], name)
        live = rounded_as_stored(compute_indicators(held).to_numpy())[-LOOKBACK:]
        for number, name in enumerate(COLUMNS):
            if name != "obv":  # it counts from the first bar that there is, and enters by its differences only
                np.testing.assert_array_equal(live[:, number], stored[window, number], name)


@sets
def test_every_input_is_the_batch_from_warmup_bars_on(candles: Candles) -> None:
    frame = candles()
    starts = np.random.default_rng(6).integers(0, len(frame) - WARMUP_BARS, 30)
    needed = dict(zip(OBSERVED, bars_needed(frame, starts)[1].tolist(), strict=True))
    assert {name: bars for name, bars in needed.items() if bars > WARMUP_BARS} == {}


@needs_recorded
def test_measurement_bites() -> None:
    """Inputs without memory need their window and no more; the slowest needs more than two thirds of WARMUP_BARS."""
    frame = RECORDED["BTC in the crash of 2025-10-10"]()
    near, exact = bars_needed(frame, np.random.default_rng(7).integers(0, 1_500, 12))
    assert near[OBSERVED.index("atr_pct")] > WARMUP_BARS * 2 // 3
    for name in ("price_change_16", "donchian_high", "bb_width", "volume_sma_20", "obv"):
        indicator = CANDLES_49[COLUMNS.index(name)]
        assert exact[OBSERVED.index(name)] == (indicator.input_warmup or indicator.warmup) + 1, name


def test_blocks_of_running_sums_begin_within_the_warmup() -> None:
    assert BLOCK_BARS + max(indicator.warmup for indicator in CANDLES_49) <= WARMUP_BARS


if __name__ == "__main__":
    starts_each, random = int((sys.argv[1:] or ["40"])[0]), np.random.default_rng(11)
    files, most = sorted(CANDLES.rglob("*.parquet")), np.zeros((2, len(OBSERVED)), int)
    for file in files:
        recorded = recorded_candles(str(file.relative_to(CANDLES).with_suffix("")))
        drawn = random.integers(0, max(len(recorded) - 2_000, 1), starts_each)
        most = np.maximum(most, bars_needed(recorded, drawn))
    print(f"{len(files)} files, {starts_each} starts in each\n")
    print("| model input | bars to 1e-6 | bars to the bit |\n|---|---|---|")
    for name, near, exact in sorted(zip(OBSERVED, *most.tolist(), strict=True), key=lambda row: -row[2]):
        print(f"| {name} | {near} | {exact} |")
