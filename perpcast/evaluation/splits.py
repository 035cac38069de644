"""The cut of history in time: train | V1 | V2 | test, the same instants for all symbols, purged between each two."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from perpcast.errors import MissingInputError
from perpcast.timeframe import format_time

# v1 stops the training, v2 calibrates and chooses the decision threshold, test is looked at once, at the end.
SPLITS = ("train", "v1", "v2", "test")


@dataclass(frozen=True)
class Span:
    """Signal bars from `first_ms` to `last_ms`, both included."""

    first_ms: int
    last_ms: int

    def contains(self, open_time_ms: np.ndarray) -> np.ndarray:
        """True for bars of this span: bool [n]."""
        return (open_time_ms >= self.first_ms) & (open_time_ms <= self.last_ms)


@dataclass(frozen=True)
class TimeSplit:
    """The four spans, and how many bars lie between the label-bearing bars of neighbours."""

    train: Span
    v1: Span
    v2: Span
    test: Span
    purge: int

    @property
    def spans(self) -> dict[str, Span]:
        """The spans by name, oldest first."""
        return {name: getattr(self, name) for name in SPLITS}

    def codes(self, open_time_ms: np.ndarray) -> np.ndarray:
        """Index into SPLITS of each signal bar, -1 for purged bars and bars outside: int8 [n]."""
        codes = np.full(len(open_time_ms), -1, np.int8)
        for code, span in enumerate(self.spans.values()):
            codes[span.contains(open_time_ms)] = code
        return codes

    def instants(self) -> list[str]:
        """One line for each span, the way a stage prints them."""
        return [f"{name:5} {format_time(s.first_ms)} to {format_time(s.last_ms)}" for name, s in self.spans.items()]

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; `from_json` is the inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "TimeSplit":
        """The split from its JSON form."""
        return cls(**{name: Span(**data[name]) for name in SPLITS}, purge=data["purge"])


def split_by_time(first_ms: int, last_ms: int, step_ms: int, fractions: Sequence[float], purge: int) -> TimeSplit:
    """Cuts the signal bars from `first_ms` to `last_ms` by `fractions`, in the order of SPLITS.

    Signal bars t of a span and v of a later one satisfy v - t > `purge` bars; the earlier span gives up its last bars.
    A label reaches horizon + 1 bars ahead, so anything below that is dishonest, and 0 leaks almost a whole horizon.
    Raises MissingInputError where a span would be left without bars.
    """
    if len(fractions) != len(SPLITS) or abs(sum(fractions) - 1) > 1e-9:
        raise ValueError(f"expected {len(SPLITS)} fractions that add up to 1, received {tuple(fractions)}")
    if purge < 0:
        raise ValueError(f"purge must be 0 or more bars, received {purge}")
    bars = (last_ms - first_ms) // step_ms + 1
    edges = [round(share * bars) for share in np.concatenate(([0.0], np.cumsum(fractions)))]
    spans = []
    for number, (name, (start, end)) in enumerate(zip(SPLITS, pairwise(edges), strict=True)):
        last = end - 1 - (purge if number < len(SPLITS) - 1 else 0)
        if last < start:
            raise MissingInputError(
                f"{bars:,} bars of labels are too few: {name} has {end - start} and the purge takes {purge} of them; "
                "download more days, or change the fractions in dataset"
            )
        spans.append(Span(first_ms + start * step_ms, first_ms + last * step_ms))
    train, v1, v2, test = spans
    return TimeSplit(train, v1, v2, test, purge)


def label_overlaps(split: TimeSplit, step_ms: int, horizon: int) -> int:
    """How many bars of label intervals reach from one span into the next, over all neighbours; 0 is honest.

    The label of signal bar t is made of bars t + 1 to t + horizon + 1.
    """
    reach = horizon + 1
    gaps = [(later.first_ms - earlier.last_ms) // step_ms for earlier, later in pairwise(split.spans.values())]
    return sum(max(0, reach - gap + 1) for gap in gaps)


def rows_of_windows(ends: np.ndarray, lookback: int, rows: int) -> np.ndarray:
    """True for every one of so many rows that lies in a window of `lookback` rows ending at one of `ends`: bool."""
    steps = np.zeros(rows + 1, np.int64)
    np.add.at(steps, ends - (lookback - 1), 1)
    np.add.at(steps, ends + 1, -1)
    return np.cumsum(steps[:-1]) > 0
