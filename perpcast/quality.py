"""What indicators and labels hold, in counts and sums: months add up to symbols, symbols to the whole table."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from perpcast.exit_policy import EXIT_REASONS, Labels
from perpcast.market import SIDES, CandleSeries, Side

# What is counted here is stored: another way of counting is another version.
QUALITY_VERSION = "quality/1"

# The distribution of labels: counts between these edges, and beyond both ends. Steps of a quarter percent.
RETURN_EDGES = np.round(np.arange(-0.02, 0.0401, 0.0025), 4)

# A move of that size between two closes happens; where it comes often, somebody should look.
LARGE_MOVE = 0.2


@dataclass(frozen=True)
class SideQuality:
    """What the trades of one side earned, over all bars with a label."""

    labels: int = 0
    return_sum: float = 0.0
    profits: int = 0
    ambiguous: int = 0
    exits: tuple[int, ...] = (0,) * len(EXIT_REASONS)  # by exit reason
    histogram: tuple[int, ...] = (0,) * (len(RETURN_EDGES) + 1)  # below, between and above RETURN_EDGES

    def __add__(self, other: "SideQuality") -> "SideQuality":
        return SideQuality(
            self.labels + other.labels,
            self.return_sum + other.return_sum,
            self.profits + other.profits,
            self.ambiguous + other.ambiguous,
            tuple(a + b for a, b in zip(self.exits, other.exits, strict=True)),
            tuple(a + b for a, b in zip(self.histogram, other.histogram, strict=True)),
        )


@dataclass(frozen=True)
class Quality:
    """Bars, those with every indicator, those that look odd, and both sides' trades."""

    bars: int = 0
    complete: int = 0
    large_moves: int = 0  # close to close, by more than LARGE_MOVE
    without_volume: int = 0
    repeated: int = 0  # the same candle as the one before, volume included
    sides: Mapping[Side, SideQuality] = field(default_factory=lambda: {side: SideQuality() for side in SIDES})

    def __add__(self, other: "Quality") -> "Quality":
        return Quality(
            self.bars + other.bars,
            self.complete + other.complete,
            self.large_moves + other.large_moves,
            self.without_volume + other.without_volume,
            self.repeated + other.repeated,
            {side: self.sides[side] + other.sides[side] for side in SIDES},
        )

    @property
    def suspicious(self) -> int:
        """Odd bars of all kinds."""
        return self.large_moves + self.without_volume + self.repeated

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; `from_json` is the inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Quality":
        """What `to_json` gave, also after it went through a JSON column."""
        sides = {side: SideQuality(**{**data["sides"][side], **_tuples(data["sides"][side])}) for side in SIDES}
        return cls(**{**data, "sides": sides})


def _tuples(side: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(side[name]) for name in ("exits", "histogram")}


def measure(
    candles: CandleSeries, indicators: np.ndarray, labels: Mapping[Side, Labels], rows: slice = slice(None)
) -> Quality:
    """The quality of some rows of one symbol: candles [n], indicators [n, columns], labels [n] of both sides."""
    first, end, _ = rows.indices(len(candles))
    seen = candles[max(first - 1, 0) : end]  # with the bar before, which only the comparisons need
    moved = np.abs(np.diff(np.log(seen.close)))
    same = seen.volume[1:] > 0
    for column in (seen.open, seen.high, seen.low, seen.close, seen.volume):
        same &= np.diff(column) == 0
    return Quality(
        bars=end - first,
        complete=int(np.isfinite(indicators[rows]).all(axis=1).sum()),
        large_moves=int((moved > np.log1p(LARGE_MOVE)).sum()),
        without_volume=int((candles.volume[rows] == 0).sum()),
        repeated=int(same.sum()),
        sides={side: _measure_side(labels[side], rows) for side in SIDES},
    )


def _measure_side(labels: Labels, rows: slice) -> SideQuality:
    known = np.isfinite(labels.expected_return[rows])
    returns = labels.expected_return[rows][known]
    return SideQuality(
        labels=len(returns),
        return_sum=float(returns.sum()),
        profits=int((returns > 0).sum()),
        ambiguous=int(labels.ambiguous[rows][known].sum()),
        exits=tuple(np.bincount(labels.exit_reason[rows][known], minlength=len(EXIT_REASONS)).tolist()),
        histogram=tuple(np.bincount(np.searchsorted(RETURN_EDGES, returns), minlength=len(RETURN_EDGES) + 1).tolist()),
    )
