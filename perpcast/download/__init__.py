"""The download stage: what the database lacks of the wanted candles is fetched, checked and stored, page by page.

A page is stored in one transaction, so a run that is killed anywhere goes on from what is stored. Bars that the
exchange does not have are recorded in `candle_gaps` with their cause and not asked for in every run; missing bars at
the newest end are asked for again, since the exchange may only be late.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from perpcast.database import (
    CandleGap,
    Database,
    read_candle_gaps,
    read_candle_spans,
    read_funding_rates,
    read_missing_ranges,
    replace_candle_gaps,
    upsert_candles,
    upsert_funding_rates,
    upsert_instruments,
)
from perpcast.errors import ConfigError
from perpcast.exchange import PAGE_BARS, BybitClient, RejectedRow
from perpcast.market import Instrument
from perpcast.timeframe import floor_ms, from_ms, interval_ms

DAY_MS = 86_400_000

# Values may still settle right after the close (bybit-v5.md 1.7.1): a bar is asked for this much later.
SETTLE_MS = 5_000

# Enough requests in flight to reach the exchange's rate limit at 0.2 s an answer.
WORKERS = 16

# Bars that are missing for one of these causes are not asked for again.
_SETTLED = ("not_listed_yet", "exchange_outage", "rejected_row")

Job = TypeVar("Job")
Range = tuple[int, int]  # [first, end) in milliseconds


@dataclass(frozen=True)
class DownloadSummary:
    """What a run did, and what is known to be missing after it."""

    start_ms: int
    end_ms: int
    bars_stored: int
    funding_rates_stored: int
    rejected: tuple[RejectedRow, ...]
    gap_bars: Mapping[str, int]  # recorded for these symbols, by cause
    late: tuple[str, ...]  # symbols without their newest bars: asked again by the next run


async def download(
    client: BybitClient,
    database: Database,
    symbols: Sequence[str],
    interval: str,
    days: int,
    on_progress: Callable[[int, int], None],
) -> DownloadSummary:
    """Brings candles and funding rates of `symbols` to the last `days` days; calls on_progress(bars, of bars).

    The exchange's clock decides which bars are closed. Instruments are stored as they are now. Raises ConfigError for a
    symbol that the exchange does not list.
    """
    now_ms = await client.fetch_server_time_ms()
    instruments = _listed(await client.fetch_instruments(), symbols)
    upsert_instruments(database, instruments, from_ms(now_ms))
    step_ms = interval_ms(interval)
    end_ms = floor_ms(now_ms - SETTLE_MS, step_ms)
    run = _Run(client, database, symbols, interval, end_ms - days * DAY_MS, end_ms)
    wanted = {symbol: run.unexplained(symbol) for symbol in symbols}
    total = sum(end - first for ranges in wanted.values() for first, end in ranges) // step_ms
    await run.fetch_candles(wanted, lambda done: on_progress(done, total))
    holes = {symbol: run.holes(symbol) for symbol in symbols}
    await run.fetch_candles(holes, lambda done: None)  # asked again before it is called an outage
    gap_bars: Counter[str] = Counter()
    for symbol in symbols:
        for gap in run.record_gaps(symbol):
            gap_bars[gap.cause] += gap.bars
    await run.fetch_funding_rates(symbols, now_ms)
    return DownloadSummary(
        run.start_ms,
        end_ms,
        run.bars_stored,
        run.funding_rates_stored,
        tuple(sorted(run.rejected.values(), key=lambda row: (row.symbol, row.open_time_ms))),
        dict(gap_bars),
        tuple(symbol for symbol in symbols if any(end == end_ms for _, end in run.unexplained(symbol))),
    )


def _listed(instruments: Mapping[str, Instrument], symbols: Sequence[str]) -> list[Instrument]:
    unknown = [symbol for symbol in symbols if symbol not in instruments]
    if unknown:
        raise ConfigError(
            f"data_download.symbols: {', '.join(unknown)} not among the {len(instruments)} USDT perpetuals that trade "
            "on this exchange; correct the name or remove it"
        )
    return [instruments[symbol] for symbol in symbols]


class _Run:
    """One download of a fixed span [start_ms, end_ms): what is missing of it, what is fetched, stored and rejected."""

    def __init__(
        self, client: BybitClient, database: Database, symbols: Sequence[str], interval: str, start_ms: int, end_ms: int
    ) -> None:
        self._client = client
        self._database = database
        self._interval = interval
        self._step_ms = interval_ms(interval)
        self.start_ms = start_ms
        self.end_ms = end_ms
        self.bars_stored = 0
        self.funding_rates_stored = 0
        self.rejected: dict[tuple[str, int], RejectedRow] = {}
        self._gaps: dict[str, list[CandleGap]] = {symbol: [] for symbol in symbols}
        for gap in read_candle_gaps(database):
            if gap.symbol in self._gaps:
                self._gaps[gap.symbol].append(gap)
        self._missing: dict[str, list[Range]] = {}
        self._first_ms: dict[str, int] = {}
        self._look(symbols)

    def _look(self, symbols: Iterable[str]) -> None:
        """Asks the database what it holds of these symbols now."""
        spans = read_candle_spans(self._database)
        for symbol in symbols:
            self._missing[symbol] = read_missing_ranges(
                self._database, symbol, self.start_ms, self.end_ms, self._step_ms
            )
            self._first_ms[symbol] = spans[symbol].first_ms if symbol in spans else self.end_ms

    def unexplained(self, symbol: str) -> list[Range]:
        """Missing stretches that no recorded gap explains."""
        return subtract(
            self._missing[symbol], [self._range(gap) for gap in self._gaps[symbol] if gap.cause in _SETTLED]
        )

    def holes(self, symbol: str) -> list[Range]:
        """Unexplained stretches between stored bars."""
        listed_ms = self._first_ms[symbol]
        return [hole for hole in self.unexplained(symbol) if listed_ms < hole[0] and hole[1] < self.end_ms]

    async def fetch_candles(self, wanted: Mapping[str, Sequence[Range]], on_bars: Callable[[int], None]) -> None:
        """Fetches and stores the wanted stretches, the oldest page of each first; calls on_bars(bars done)."""
        writing = asyncio.Lock()  # one write at a time: they share a disk
        done = 0

        async def fetch(page: tuple[str, int, int]) -> None:
            nonlocal done
            symbol, first, end = page
            answer = await self._client.fetch_candles(symbol, self._interval, first, end)
            self.rejected.update({(symbol, row.open_time_ms): row for row in answer.rejected})
            async with writing:
                self.bars_stored += await asyncio.to_thread(upsert_candles, self._database, symbol, answer.candles)
            done += (end - first) // self._step_ms
            on_bars(done)

        await _side_by_side(self._pages(wanted), fetch)
        self._look(symbol for symbol, ranges in wanted.items() if ranges)

    async def fetch_funding_rates(self, symbols: Sequence[str], now_ms: int) -> None:
        """Fetches what lies before and after the stored payments; a symbol's new ones are stored in one transaction.

        So that a broken run leaves no hole between them. Payments up to the present are wanted.
        """

        async def fetch(symbol: str) -> None:
            stored = read_funding_rates(self._database, symbol, self.start_ms)
            spans = [(self.start_ms, now_ms + 1)]
            if stored:
                spans = [(self.start_ms, stored[0].funding_time_ms), (stored[-1].funding_time_ms + 1, now_ms + 1)]
            rates = [rate for span in spans for rate in await self._client.fetch_funding_rates(symbol, *span)]
            upsert_funding_rates(self._database, rates)
            self.funding_rates_stored += len(rates)

        await _side_by_side(iter(symbols), fetch)

    def _pages(self, wanted: Mapping[str, Sequence[Range]]) -> Iterator[tuple[str, int, int]]:
        page_ms = PAGE_BARS * self._step_ms
        for symbol, ranges in wanted.items():
            for first, end in ranges:
                for page_first in range(first, end, page_ms):
                    yield symbol, page_first, min(page_first + page_ms, end)

    def record_gaps(self, symbol: str) -> list[CandleGap]:
        """Writes down why bars of the symbol are missing, with what earlier runs recorded, and returns it.

        Stretches at the newest end have no cause yet: they are left out.
        """
        stored = subtract([(self.start_ms, self.end_ms)], self._missing[symbol])
        gaps = [
            self._gap(symbol, part, gap.cause, gap.reason)
            for gap in self._gaps[symbol]
            if gap.cause != "not_yet_fetched"
            for part in ([self._range(gap)] if gap.cause == "flat_run" else subtract([self._range(gap)], stored))
        ]
        parts = self.unexplained(symbol)
        for row in self.rejected.values():
            first_ms = floor_ms(row.open_time_ms, self._step_ms)
            bar = (first_ms, first_ms + self._step_ms)
            if row.symbol == symbol and not subtract([bar], parts):
                gaps.append(self._gap(symbol, bar, "rejected_row", row.reason))
                parts = subtract(parts, [bar])
        for part in parts:
            if part[1] < self.end_ms:
                cause = "exchange_outage" if part[0] > self._first_ms[symbol] else "not_listed_yet"
                gaps.append(self._gap(symbol, part, cause, None))
        gaps = self._merged(gaps)
        if gaps != self._gaps[symbol]:
            replace_candle_gaps(self._database, symbol, gaps)
            self._gaps[symbol] = gaps
        return gaps

    def _merged(self, gaps: Sequence[CandleGap]) -> list[CandleGap]:
        """By time; neighbours of one cause and reason become one."""
        merged: list[CandleGap] = []
        for gap in sorted(gaps, key=lambda gap: gap.first_missing_ms):
            last = merged[-1] if merged else None
            if (
                last is not None
                and self._range(last)[1] == gap.first_missing_ms
                and (last.cause, last.reason) == (gap.cause, gap.reason)
            ):
                merged[-1] = self._gap(gap.symbol, (last.first_missing_ms, self._range(gap)[1]), gap.cause, gap.reason)
            else:
                merged.append(gap)
        return merged

    def _range(self, gap: CandleGap) -> Range:
        return gap.first_missing_ms, gap.first_missing_ms + gap.bars * self._step_ms

    def _gap(self, symbol: str, part: Range, cause: str, reason: str | None) -> CandleGap:
        return CandleGap(symbol, part[0], (part[1] - part[0]) // self._step_ms, cause, reason)


async def _side_by_side(jobs: Iterator[Job], work: Callable[[Job], Awaitable[None]]) -> None:
    """Does `work` on every job, WORKERS of them at a time, begun in order; the first error ends them all."""

    async def worker() -> None:
        for job in jobs:  # shared: each job goes to the worker that is free
            await work(job)

    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(WORKERS):
                group.create_task(worker())
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None  # the others are the same trouble, or follow from it


def subtract(ranges: Sequence[Range], holes: Sequence[Range]) -> list[Range]:
    """What is left of `ranges` outside of `holes`; both sorted by their first ends."""
    rest = []
    for first, end in ranges:
        for hole_first, hole_end in holes:
            if hole_first < end and hole_end > first:
                if hole_first > first:
                    rest.append((first, hole_first))
                first = max(first, hole_end)
        if first < end:
            rest.append((first, end))
    return rest
