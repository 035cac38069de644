"""The prepare stage: from stored candles to indicators and labels, one symbol and one transaction at a time.

What the rows of a month were made of stands beside them: its candles (their number and a digest), and the version of
indicators, labels and settings. So only what new candles touch is computed again, and a run that was killed, new or
revised candles, another exit policy or another indicator all end in the table that a first run would have made.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from hashlib import sha256

import numpy as np

from perpcast.database import (
    CandleMonth,
    Database,
    ProcessedMonth,
    ProcessedSeries,
    read_candle_months,
    read_candles,
    read_processed_months,
    read_processed_spans,
    replace_processed,
)
from perpcast.errors import DataError, MissingInputError
from perpcast.exit_policy import LABEL_VERSION, ExitPolicy, Labels, label_sides
from perpcast.features.indicators import compute_indicators, feature_version
from perpcast.features.inputs import rounded_as_stored
from perpcast.market import FLAT_RUN_BARS, SIDES, CandleSeries, Side, flat_run_mask
from perpcast.quality import QUALITY_VERSION, Quality, measure
from perpcast.timeframe import format_time, interval_ms, month_ms

# Candles that close a label, or a flat run that changes one, come so much later than the bar that they concern.
_LATEST_INFLUENCE_BARS = FLAT_RUN_BARS + 1  # beside the policy's horizon


@dataclass(frozen=True)
class PreparedSymbol:
    """What stands in the table for one symbol, and from when on this run has written it (None: nothing was new)."""

    symbol: str
    months: Mapping[int, Quality]  # by the start of the month in ms
    written_from_ms: int | None
    bars_written: int

    @property
    def quality(self) -> Quality:
        """Of all months together."""
        return sum(self.months.values(), Quality())


def prepare(
    database: Database,
    symbols: Sequence[str],
    interval: str,
    policies: Mapping[Side, ExitPolicy],
    max_gap_bars: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[PreparedSymbol]:
    """Brings `processed_market_data` in line with the candles of `symbols`; a symbol without candles is left out.

    Months whose candles are what they were, and whose rows were made by this version of features, labels and settings,
    stay as they are. Raises MissingInputError where none of the symbols has candles, DataError for candles off the grid
    of `interval`.
    """
    candle_months = read_candle_months(database)
    present = [symbol for symbol in symbols if symbol in candle_months]
    if not present:
        raise MissingInputError(
            f"no candles of any of the {len(symbols)} configured symbols are stored: run python download_data.py first"
        )
    recipe = _Recipe(interval, policies, max_gap_bars)
    known, spans = read_processed_months(database), read_processed_spans(database)
    bars = {symbol: sum(month.candles for month in candle_months[symbol]) for symbol in present}
    done, prepared = 0, []
    for symbol in present:
        stored = known.get(symbol, [])
        whole = symbol in spans and spans[symbol].count == sum(month.candles.candles for month in stored)
        start_ms = recipe.first_outdated_ms(candle_months[symbol], stored if whole else [])
        prepared.append(_prepare_symbol(database, symbol, candle_months[symbol], stored, start_ms, recipe))
        done += bars[symbol]
        on_progress(done, sum(bars.values()))
    return prepared


@dataclass(frozen=True)
class _Recipe:
    """How rows are made of candles."""

    interval: str
    policies: Mapping[Side, ExitPolicy]
    max_gap_bars: int

    @cached_property
    def version(self) -> str:
        """Changes with everything but the candles that a row depends on."""
        policies = {side: self.policies[side].to_json() for side in SIDES}
        parts = [feature_version(), LABEL_VERSION, QUALITY_VERSION, self.interval, self.max_gap_bars, policies]
        return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    def first_outdated_ms(self, candles: Sequence[CandleMonth], stored: Sequence[ProcessedMonth]) -> int | None:
        """The start of the first month to write again, None where all rows are up to date.

        Indicators look back only, as far as their stretch reaches: everything from the first changed candle on is
        outdated. Labels look ahead: so are the last rows before it.
        """
        made_of = {month.candles.month_ms: month.candles for month in stored if month.version == self.version}
        changed = [month.month_ms for month in candles if made_of.get(month.month_ms) != month]
        changed += {month.candles.month_ms for month in stored} - {month.month_ms for month in candles}
        if not changed:
            return None
        horizon = max(policy.horizon for policy in self.policies.values())
        return month_ms(min(changed) - (horizon + _LATEST_INFLUENCE_BARS) * interval_ms(self.interval))


def _prepare_symbol(
    database: Database,
    symbol: str,
    candle_months: Sequence[CandleMonth],
    stored: Sequence[ProcessedMonth],
    start_ms: int | None,
    recipe: _Recipe,
) -> PreparedSymbol:
    """Writes a symbol's rows from `start_ms` on; the candles before it are read for the indicators' sake."""
    kept = {
        month.candles.month_ms: Quality.from_json(month.quality)
        for month in stored
        if start_ms is None or month.candles.month_ms < start_ms
    }
    if start_ms is None:
        return PreparedSymbol(symbol, kept, None, 0)
    candles = read_candles(database, symbol)
    try:
        processed = process_candles(candles, recipe.interval, recipe.policies, recipe.max_gap_bars)
    except DataError as error:
        raise DataError(f"{symbol}: {error}") from None
    first = int(np.searchsorted(candles.open_time_ms, start_ms))
    new = {
        month: measure(candles, processed.indicators, processed.labels, rows)
        for month, rows in _rows_by_month(candles, [month for month in candle_months if month.month_ms >= start_ms])
    }
    ledger = [ProcessedMonth(month, recipe.version, quality.to_json()) for month, quality in new.items()]
    replace_processed(database, symbol, processed[first:], ledger, start_ms)
    months = kept | {month.month_ms: quality for month, quality in new.items()}
    return PreparedSymbol(symbol, months, start_ms, len(candles) - first)


def _rows_by_month(candles: CandleSeries, months: Sequence[CandleMonth]) -> Iterator[tuple[CandleMonth, slice]]:
    """The rows of each month; the last ends with the candles, which may be newer than the list of months."""
    firsts = np.searchsorted(candles.open_time_ms, [month.month_ms for month in months])
    ends = [*firsts[1:].tolist(), len(candles)]
    return ((month, slice(int(first), end)) for month, first, end in zip(months, firsts, ends, strict=True))


def process_candles(
    candles: CandleSeries, interval: str, policies: Mapping[Side, ExitPolicy], max_gap_bars: int = 0
) -> ProcessedSeries:
    """Indicators, rounded as they are stored, and labels of both sides for every bar of one symbol."""
    indicators = compute_indicators(candles.frame(), interval, max_gap_bars).to_numpy()
    labels = label_candles(candles, interval, policies)
    return ProcessedSeries(candles.open_time_ms, rounded_as_stored(indicators), labels)


def label_candles(candles: CandleSeries, interval: str, policies: Mapping[Side, ExitPolicy]) -> dict[Side, Labels]:
    """Each side's label for every bar; none where a bar up to its end is missing or lies in a long flat run."""
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
    return {
        side: Labels(*(getattr(on_grid, field.name)[place] for field in fields(Labels)))
        for side, on_grid in label_sides(open, high, low, close, policies).items()
    }
