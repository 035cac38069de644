"""The decision threshold: chosen once, on V2, then frozen; and the trades that a threshold would have taken."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from perpcast.evaluation.windows import Windows
from perpcast.market import SIDES

MIN_TRADES = 30


@dataclass(frozen=True)
class Trades:
    """Trades [trades] in order of their signal bar; `row` points into the windows they were chosen from."""

    row: np.ndarray  # int64
    side: np.ndarray  # int8, index into SIDES
    earned: np.ndarray  # float64, net of fees and slippage, before funding, a fraction of the entry notional

    def __len__(self) -> int:
        return len(self.row)


@dataclass(frozen=True)
class ThresholdPoint:
    """What one threshold would have taken and earned; `mean_return` is NaN without trades."""

    threshold: float
    trades: int
    mean_return: float
    total_return: float


@dataclass(frozen=True)
class ThresholdChoice:
    """The chosen threshold, what it earned where it was chosen, and the whole curve that it was chosen from."""

    threshold: float
    chosen: ThresholdPoint
    curve: tuple[ThresholdPoint, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain numbers, NaN as None."""
        return {
            "threshold": self.threshold,
            "chosen": _point_json(self.chosen),
            "curve": [_point_json(point) for point in self.curve],
        }


def take_trades(predicted: Mapping[str, np.ndarray], windows: Windows, threshold: float) -> Trades:
    """Trades of the better side where its predicted net return is above `threshold`, one position per symbol.

    A trade of signal bar t that was held h bars ended inside bar t + h: the symbol may enter again on that bar's
    signal. Equal sizes, no limit across symbols: portfolio, funding and sizes are the backtest's business.
    """
    symbol, open_time_ms = windows.symbol, windows.open_time_ms
    forecast = np.stack([predicted[side] for side in SIDES])
    best = np.argmax(forecast, axis=0)  # of equals the first: buy before sell
    rows = np.flatnonzero(np.take_along_axis(forecast, best[None], axis=0)[0] > threshold)
    rows = rows[np.lexsort((open_time_ms[rows], symbol[rows]))]
    held = np.stack([windows.bars_held[side] for side in SIDES])[best[rows], rows].astype(np.int64)
    ends = open_time_ms[rows] + held * windows.step_ms
    taken: list[int] = []
    starts = np.flatnonzero(np.diff(symbol[rows], prepend=-1))
    for start, stop in pairwise([*starts.tolist(), len(rows)]):
        times = open_time_ms[rows[start:stop]]
        at = 0
        while at < len(times):
            taken.append(start + at)
            at = max(at + 1, int(np.searchsorted(times, ends[start + at])))
    chosen = rows[taken]
    chosen = chosen[np.lexsort((symbol[chosen], open_time_ms[chosen]))]
    side = best[chosen].astype(np.int8)
    earned = np.stack([windows.realised[name] for name in SIDES])[side, chosen]
    return Trades(chosen, side, earned)


def choose_threshold(
    predicted: Mapping[str, np.ndarray],
    windows: Windows,
    *,
    min_trades: int = MIN_TRADES,
    points: int = 25,
) -> ThresholdChoice:
    """The threshold with the largest total return on these windows (V2: never the test span), of at least 0.

    A trade that the model itself expects to lose is never taken, so the candidates start at 0. Where none of them
    takes `min_trades` trades, it is 0: too little evidence to ask for more, or nothing expected to earn.
    """
    best = np.max(np.stack([predicted[side] for side in SIDES]), axis=0)
    hopeful = best[best > 0]
    candidates = [0.0]
    if len(hopeful):
        # Dense where few trades are left: the last percent matters as much as the first half.
        shares = 1 - np.geomspace(1, min(1.0, min_trades / len(hopeful)), points)
        candidates = sorted({0.0, *(float(value) for value in np.quantile(hopeful, shares))})
    curve = tuple(_point(value, take_trades(predicted, windows, value)) for value in candidates)
    enough = [point for point in curve if point.trades >= min_trades]
    chosen = max(enough, key=lambda point: point.total_return, default=curve[0])
    return ThresholdChoice(chosen.threshold, chosen, curve)


def _point(threshold: float, trades: Trades) -> ThresholdPoint:
    mean = float(np.mean(trades.earned)) if len(trades) else np.nan
    return ThresholdPoint(threshold, len(trades), mean, float(np.sum(trades.earned)))


def _point_json(point: ThresholdPoint) -> dict[str, Any]:
    return {key: None if value != value else value for key, value in asdict(point).items()}
