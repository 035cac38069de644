"""The prepare stage: from stored candles to indicators and labels, one symbol and one transaction at a time.

What a symbol's candles give is compared with what is stored, and written where it differs: a run that was killed, new
candles, another exit policy or another indicator all end in the table that a first run would have made.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np

from perpcast.database import (
    Database,
    ProcessedSeries,
    read_candle_spans,
    read_candles,
    read_processed,
    replace_processed,
)
from perpcast.errors import DataError, MissingInputError
from perpcast.exit_policy import EXIT_REASONS, ExitPolicy, Labels, label_trades
from perpcast.features.indicators import compute_indicators
from perpcast.features.inputs import rounded_as_stored
from perpcast.market import SIDES, CandleSeries, Side, flat_run_mask
from perpcast.timeframe import format_time, interval_ms


@dataclass(frozen=True)
class SideCounts:
    """What the trades of one side earned, over all bars with a label; sums, so that symbols can be added up."""

    labels: int = 0
    return_sum: float = 0.0
    profits: int = 0
    ambiguous: int = 0
    exits: tuple[int, ...] = (0,) * len(EXIT_REASONS)  # by exit reason

    def __add__(self, other: "SideCounts") -> "SideCounts":
        return SideCounts(
            self.labels + other.labels,
            self.return_sum + other.return_sum,
            self.profits + other.profits,
            self.ambiguous + other.ambiguous,
            tuple(a + b for a, b in zip(self.exits, other.exits, strict=True)),
        )


@dataclass(frozen=True)
class PreparedSymbol:
    """What was done for one symbol. `complete` counts the bars at which every indicator is known."""

    symbol: str
    bars: int
    complete: int
    written: bool  # False: the table held all of it already
    sides: Mapping[Side, SideCounts]


def prepare(
    database: Database,
    symbols: Sequence[str],
    interval: str,
    policies: Mapping[Side, ExitPolicy],
    max_gap_bars: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[PreparedSymbol]:
    """Brings `processed_market_data` in line with the candles of `symbols`; a symbol without candles is left out.

    Raises MissingInputError where none of them has candles, DataError for candles off the grid of `interval`.
    """
    spans = read_candle_spans(database)
    present = [symbol for symbol in symbols if symbol in spans]
    if not present:
        raise MissingInputError(
            f"no candles of any of the {len(symbols)} configured symbols are stored: run python download_data.py first"
        )
    total = sum(spans[symbol].count for symbol in present)
    done, prepared = 0, []
    for symbol in present:
        candles = read_candles(database, symbol)
        try:
            processed = process_candles(candles, interval, policies, max_gap_bars)
        except DataError as error:
            raise DataError(f"{symbol}: {error}") from None
        written = not _same(processed, read_processed(database, symbol))
        if written:
            replace_processed(database, symbol, processed)
        prepared.append(_count(symbol, processed, written))
        done += spans[symbol].count
        on_progress(done, total)
    return prepared


def process_candles(
    candles: CandleSeries, interval: str, policies: Mapping[Side, ExitPolicy], max_gap_bars: int = 0
) -> ProcessedSeries:
    """Indicators, rounded as they are stored, and labels of both sides for every bar of one symbol."""
    indicators = compute_indicators(candles.frame(), interval, max_gap_bars).to_numpy()
    labels = {side: label_candles(candles, interval, side, policies[side]) for side in SIDES}
    return ProcessedSeries(candles.open_time_ms, rounded_as_stored(indicators), labels)


def label_candles(candles: CandleSeries, interval: str, side: Side, policy: ExitPolicy) -> Labels:
    """A label for every bar; none where a bar up to the label's end is missing or lies in a long flat run."""
    step_ms = interval_ms(interval)
    since_first = candles.open_time_ms - candles.open_time_ms[:1]
    off_grid = np.flatnonzero(since_first % step_ms)
    if len(off_grid):
        time = format_time(int(candles.open_time_ms[off_grid[0]]))
        raise DataError(
            f"the bar of {time} is no multiple of {interval} minutes after the first: were these candles downloaded "
            f"with another data_download.interval? Run python init_database.py --reset, then python download_data.py"
        )
    place = since_first // step_ms
    counted = ~flat_run_mask(candles.high, candles.low, candles.volume)
    grid = np.full((4, int(place[-1]) + 1 if len(place) else 0), np.nan)
    grid[:, place[counted]] = [getattr(candles, name)[counted] for name in ("open", "high", "low", "close")]
    open, high, low, close = grid
    on_grid = label_trades(open, high, low, close, side, policy)
    return Labels(*(getattr(on_grid, field.name)[place] for field in fields(Labels)))


def _same(a: ProcessedSeries, b: ProcessedSeries) -> bool:
    return (
        np.array_equal(a.open_time_ms, b.open_time_ms)
        and np.array_equal(a.indicators, b.indicators, equal_nan=True)
        and all(
            np.array_equal(
                getattr(a.labels[side], field.name),
                getattr(b.labels[side], field.name),
                equal_nan=field.name == "expected_return",
            )
            for side in SIDES
            for field in fields(Labels)
        )
    )


def _count(symbol: str, processed: ProcessedSeries, written: bool) -> PreparedSymbol:
    complete = int(np.isfinite(processed.indicators).all(axis=1).sum())
    sides = {side: _count_side(processed.labels[side]) for side in SIDES}
    return PreparedSymbol(symbol, len(processed), complete, written, sides)


def _count_side(labels: Labels) -> SideCounts:
    known = np.isfinite(labels.expected_return)
    returns = labels.expected_return[known]
    return SideCounts(
        labels=len(returns),
        return_sum=float(returns.sum()),
        profits=int((returns > 0).sum()),
        ambiguous=int(labels.ambiguous[known].sum()),
        exits=tuple(np.bincount(labels.exit_reason[known], minlength=len(EXIT_REASONS)).tolist()),
    )
