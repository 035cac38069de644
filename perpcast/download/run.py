"""One download, from the exchange's clock to the record of what is missing.

A stretch is stored in one transaction, so a run that is killed anywhere goes on from what is stored. Bars that the
exchange does not have are recorded in `candle_gaps` with their cause and not asked for in every run; missing bars at
the newest end are asked for again, since the exchange may only be late.
"""

import asyncio
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from perpcast.database import (
    CandleGap,
    CandleSpan,
    Database,
    exclusive,
    read_candle_gaps,
    read_candle_spans,
    read_candles,
    read_flat_runs,
    read_funding_rates,
    read_instruments,
    read_missing_ranges,
    replace_candle_gaps,
    upsert_candles,
    upsert_funding_rates,
    upsert_instruments,
)
from perpcast.download.gaps import SETTLED, Evidence, Range, classify, intersect, join, range_of, subtract
from perpcast.errors import ConfigError, DataError, RefusedError, SetupError
from perpcast.exchange import PAGE_BARS, BybitClient, CandlePage, RejectedRow, side_by_side
from perpcast.kill_point import kill_point
from perpcast.market import CandleSeries, Instrument, is_of_other_interval
from perpcast.timeframe import DAY_MS, floor_ms, format_time, from_ms, interval_ms

# Values may still settle right after the close (bybit-v5.md 1.7.1): a bar is asked for this much later.
SETTLE_MS = 5_000

# Pages that are stored together: a commit waits for the disk, and each of them is asked for again after a kill.
STRETCH_PAGES = 20

# Stretches written at a time: one more than that and they only wait for one another.
WRITERS = 3

# What --verify asks for again, of some 5,400 pages in three years of 51 symbols: two seconds of the rate limit.
VERIFIED_PAGES = 200

# Refused or spoiled pages of one symbol after which its others are not asked for any more.
MOST_FAILURES = 3

# An answer of a clock that went back is asked for again so often: a single one of many servers may be wrong.
CLOCK_TRIES = 3

# A clock that is off by more is not believed, ours or theirs: every "closed" and "newest" would be wrong.
MOST_CLOCK_DIFFERENCE_MS = DAY_MS
TELLING_CLOCK_DIFFERENCE_MS = 60_000

# The status of an instrument that the exchange does not name any more.
UNLISTED = "Unlisted"

_BEFORE_INSERT = kill_point("dl.before_insert")
_BEFORE_CURSOR = kill_point("dl.before_cursor")  # everything is stored, and not yet said to be all there is
_AFTER_CURSOR = kill_point("dl.after_cursor")
_BEFORE_FUNDING = kill_point("dl.before_funding")
_AFTER_FUNDING = kill_point("dl.after_funding")


@dataclass(frozen=True)
class Wanted:
    """What is to be in the database: bars of `symbols` that open in [from_ms, to_ms).

    Without `to_ms` up to the newest closed bar; without `from_ms` the last `days` days before the end.
    """

    symbols: tuple[str, ...]
    interval: str
    days: int
    from_ms: int | None = None
    to_ms: int | None = None
    verify: bool = False


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
    skipped: Mapping[str, str]  # symbol: why nothing new was asked for it
    failed: Mapping[str, str]  # symbol: why it is not complete
    revised: tuple[tuple[str, int], ...]  # symbol and open of bars that the exchange has changed since
    verified_bars: int  # compared with the exchange
    vanished: tuple[tuple[str, int], ...]  # symbol and open of stored bars that the exchange has no longer


class Progress(Protocol):
    """Watches a download: phases one after the other, in each an amount of work of each symbol."""

    def begin(self, phase: str, unit: str, amounts: Mapping[str, int]) -> None:
        """A phase begins, with so many units of work of each symbol."""
        ...

    def advance(self, symbol: str, amount: int) -> None:
        """So much of a symbol's work is done."""
        ...

    def notice(self, text: str) -> None:
        """Something that a person should know meanwhile."""
        ...


async def download(
    client: BybitClient,
    database: Database,
    wanted: Wanted,
    progress: Progress,
    *,
    sample: np.random.Generator,
    local_time_ms: int | None = None,
) -> DownloadSummary:
    """Brings candles and funding rates of the wanted symbols up to date, and writes down what is missing of them.

    The exchange's clock decides which bars are closed; `local_time_ms`, this machine's, is only compared with it.
    `sample` draws what --verify compares. Raises ConfigError for symbols or times that cannot be, SetupError where
    another download works on this database or the clocks are far apart.
    """
    with exclusive(database, "download"):
        now_ms = await client.fetch_server_time_ms()
        if local_time_ms is not None:
            _check_clock(local_time_ms, now_ms, progress)
        run = _Run(client, database, wanted, now_ms, progress)
        await run.choose_symbols()
        await run.fetch_candles("candles", run.unexplained())
        while any((holes := run.holes()).values()):  # asked again before they are called an outage, or a late listing
            await run.fetch_candles("holes, asked again", holes)
        if wanted.verify:
            await run.verify(sample)
        gap_bars = run.record_gaps()
        await run.fetch_funding_rates()
        return run.summary(gap_bars)


def _check_clock(local_ms: int, exchange_ms: int, progress: Progress) -> None:
    difference_ms = local_ms - exchange_ms
    words = f"this machine's clock says {format_time(local_ms)} UTC, the exchange's {format_time(exchange_ms)}"
    if abs(difference_ms) > MOST_CLOCK_DIFFERENCE_MS:
        raise SetupError(f"{words}: one of them is wrong; set this machine's clock, or correct exchange.rest_url")
    if abs(difference_ms) > TELLING_CLOCK_DIFFERENCE_MS:
        progress.notice(f"{words}: the exchange's is used")


@dataclass
class _Symbol:
    """One symbol of a run: what is wanted, what is missing of it, what the exchange said."""

    name: str
    span: Range  # of bars that are wanted
    newest_ms: int | None  # end of the newest bar there can be; None for a symbol that trades no more
    known: list[CandleGap]
    missing: list[Range] = field(default_factory=list)  # also outside of the span, as far as anything is known
    first_stored_ms: int | None = None
    asked: list[Range] = field(default_factory=list)
    asked_again: list[Range] = field(default_factory=list)
    unanswered: list[Range] = field(default_factory=list)
    rejected: dict[int, RejectedRow] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)  # what the exchange refused or spoiled, in its own words

    def unexplained(self, step_ms: int) -> list[Range]:
        """Missing stretches of the span that no recorded gap explains."""
        settled = [range_of(gap, step_ms) for gap in self.known if gap.cause in SETTLED]
        return subtract(intersect(self.missing, [self.span]), settled)


class _Run:
    """One download of a fixed span: what is missing of it, what is fetched, stored and rejected."""

    def __init__(
        self, client: BybitClient, database: Database, wanted: Wanted, now_ms: int, progress: Progress
    ) -> None:
        self._client, self._database, self._wanted, self._progress = client, database, wanted, progress
        self._now_ms = now_ms
        self._step_ms = interval_ms(wanted.interval)
        self._newest_ms = floor_ms(now_ms - SETTLE_MS, self._step_ms)
        self._span = self._wanted_span()
        self._symbols: dict[str, _Symbol] = {}
        self._skipped: dict[str, str] = {}
        self._bars_stored = self._funding_rates_stored = self._verified_bars = 0
        self._revised: list[tuple[str, int]] = []
        self._vanished: list[tuple[str, int]] = []

    def _wanted_span(self) -> Range:
        wanted = self._wanted
        end_ms = self._newest_ms
        if wanted.to_ms is not None:
            end_ms = min(end_ms, floor_ms(wanted.to_ms, self._step_ms))
        start_ms = end_ms - wanted.days * DAY_MS if wanted.from_ms is None else floor_ms(wanted.from_ms, self._step_ms)
        if start_ms >= end_ms:
            raise ConfigError(
                f"expected a stretch of closed bars, received {format_time(start_ms)} to {format_time(end_ms)} UTC, "
                f"where the newest closed bar ends at {format_time(self._newest_ms)}"
            )
        return start_ms, end_ms

    # --- symbols -----------------------------------------------------------------------------------------------------

    async def choose_symbols(self) -> None:
        """Finds out which symbols trade and what is missing of each; stores their rules as they are now."""
        spans = read_candle_spans(self._database)
        listed = await self._client.fetch_instruments()
        absent = [symbol for symbol in self._wanted.symbols if symbol not in listed]
        if absent:
            listed = await self._client.fetch_instruments("PreLaunch", "Delivering", "Closed") | listed
        unknown = [symbol for symbol in absent if symbol not in listed and symbol not in spans]
        if unknown:
            raise ConfigError(
                f"data_download.symbols: {', '.join(unknown)} not among the {len(listed)} USDT perpetuals of this "
                "exchange; python validate_futures_symbols.py tells which name to use"
            )
        known: dict[str, list[CandleGap]] = {symbol: [] for symbol in self._wanted.symbols}
        for gap in read_candle_gaps(self._database):
            if gap.symbol in known:
                known[gap.symbol].append(gap)
        for symbol in self._wanted.symbols:
            self._check_stored_interval(symbol, spans.get(symbol))
            self._choose(symbol, listed.get(symbol), known[symbol], spans)
        rules = read_instruments(self._database)
        gone = [
            replace(rules[symbol], status=UNLISTED) for symbol in absent if symbol in rules and symbol not in listed
        ]
        found = [listed[symbol] for symbol in self._wanted.symbols if symbol in listed]
        upsert_instruments(self._database, found + gone, from_ms(self._now_ms))

    def _choose(
        self,
        symbol: str,
        instrument: Instrument | None,
        known: list[CandleGap],
        spans: Mapping[str, CandleSpan],
    ) -> None:
        """Takes a symbol up, or writes down why not; what is stored of it stays in any case."""
        kept = "its history is kept" if symbol in spans else "it has no history here"
        (start_ms, end_ms), newest_ms = self._span, None
        if instrument is None:
            self._skipped[symbol] = f"the exchange lists it no more; {kept}"
            return
        if instrument.status == "PreLaunch":
            self._skipped[symbol] = f"it does not trade yet; {kept}"
            return
        if instrument.status == "Trading":
            newest_ms = self._newest_ms
        else:
            delivery_ms = instrument.delivery_time_ms
            if delivery_ms is None:
                self._skipped[symbol] = f"it trades no more ({instrument.status}); {kept}"
                return
            self._progress.notice(
                f"{symbol} is delisted ({instrument.status}), its last trade was at {format_time(delivery_ms)} UTC"
            )
            end_ms = min(end_ms, floor_ms(delivery_ms, self._step_ms))
            if start_ms >= end_ms:
                self._skipped[symbol] = f"it was delisted before the wanted span; {kept}"
                return
        self._symbols[symbol] = _Symbol(symbol, (start_ms, end_ms), newest_ms, known)
        self._look(symbol, spans.get(symbol))

    def _check_stored_interval(self, symbol: str, span: CandleSpan | None) -> None:
        """A database holds candles of one interval: others between them could not be told apart any more."""
        if span is None:
            return
        newest = read_candles(self._database, symbol, span.last_ms - 10 * DAY_MS)
        if is_of_other_interval(newest.open_time_ms, self._step_ms) or span.first_ms % self._step_ms:
            raise ConfigError(
                f"data_download.interval: the database holds candles of {symbol} of another interval than "
                f"{self._wanted.interval} minutes; name another database in database.name, or empty this one with "
                "python init_database.py --reset"
            )

    def _look(self, symbol: str, span: CandleSpan | None) -> None:
        """Notes what the database lacks of a symbol, over everything that is known of it."""
        state = self._symbols[symbol]
        known = [range_of(gap, self._step_ms) for gap in state.known]
        stored = [(span.first_ms, span.last_ms + self._step_ms)] if span else []
        first_ms = min(first for first, _ in (state.span, *known, *stored))
        end_ms = max(end for _, end in (state.span, *known, *stored))
        state.first_stored_ms = span.first_ms if span else None
        if stored and span and span.count == (stored[0][1] - stored[0][0]) // self._step_ms:  # no hole to look for
            state.missing = subtract([(first_ms, end_ms)], stored)
        else:
            state.missing = read_missing_ranges(self._database, symbol, first_ms, end_ms, self._step_ms)

    def unexplained(self) -> dict[str, list[Range]]:
        """Stretches to ask for, by symbol."""
        return {symbol: state.unexplained(self._step_ms) for symbol, state in self._symbols.items()}

    def holes(self) -> dict[str, list[Range]]:
        """What is still unexplained between stored bars, and a page of it before the first: each to be asked once more.

        A bar that comes to light before the first moves that page back.
        """
        holes = {}
        for symbol, ranges in self.unexplained().items():
            state = self._symbols[symbol]
            if state.first_stored_ms is None:
                continue
            since = (state.first_stored_ms - PAGE_BARS * self._step_ms, state.newest_ms or state.span[1])
            late = [part for part in ranges if part[1] == state.newest_ms]
            holes[symbol] = subtract(subtract(intersect(ranges, [since]), late), join(state.asked_again))
            state.asked_again += holes[symbol]
        return holes

    # --- candles -----------------------------------------------------------------------------------------------------

    async def fetch_candles(self, phase: str, wanted: Mapping[str, Sequence[Range]]) -> None:
        """Fetches and stores the wanted stretches, the oldest of each symbol first."""
        bars = {symbol: sum(end - first for first, end in ranges) // self._step_ms for symbol, ranges in wanted.items()}
        bars = {symbol: count for symbol, count in bars.items() if count}
        if not bars:
            return
        self._progress.begin(phase, "bars", bars)
        writing = asyncio.Semaphore(WRITERS)

        async def fetch(job: tuple[str, Range]) -> None:
            symbol, stretch = job
            pages = {page: await self._fetch_page(symbol, page) for page in _cut(stretch, PAGE_BARS * self._step_ms)}
            answers = {page: answer for page, answer in pages.items() if answer is not None}
            _BEFORE_INSERT()
            async with writing:
                await self._store(symbol, CandleSeries.concatenated(*(answer.candles for answer in answers.values())))
            self._symbols[symbol].asked += answers

        await side_by_side(self._stretches(wanted), fetch)
        spans = read_candle_spans(self._database)
        for symbol in bars:
            self._look(symbol, spans.get(symbol))

    def _stretches(self, wanted: Mapping[str, Sequence[Range]]) -> Iterator[tuple[str, Range]]:
        for symbol, ranges in wanted.items():
            for stretch in ranges:
                for part in _cut(stretch, STRETCH_PAGES * PAGE_BARS * self._step_ms):
                    yield symbol, part

    async def _fetch_page(self, symbol: str, page: Range) -> CandlePage | None:
        """None where the exchange refuses the page or spoils it; that harms neither other pages nor other symbols."""
        state = self._symbols[symbol]
        if len(state.failures) >= MOST_FAILURES:
            return None
        try:
            answer = await self._ask_in_time(symbol, page)
        except (DataError, RefusedError) as error:
            _note_failure(state, error)
            state.unanswered.append(page)
            return None
        state.rejected.update({row.open_time_ms: row for row in answer.rejected})
        self._progress.advance(symbol, (page[1] - page[0]) // self._step_ms)
        return answer

    async def _ask_in_time(self, symbol: str, page: Range) -> CandlePage:
        """An answer from after the page's end: by an older clock its newest bars would be hidden as not yet closed."""
        for _ in range(CLOCK_TRIES):
            answer = await self._client.fetch_candles(symbol, self._wanted.interval, *page)
            if answer.server_time_ms >= page[1]:
                return answer
        time = format_time(answer.server_time_ms)
        raise DataError(f"candles of {symbol}: the exchange's clock says {time} UTC, before the bars it was asked for")

    async def _store(self, symbol: str, candles: CandleSeries) -> None:
        stored = await asyncio.to_thread(upsert_candles, self._database, symbol, candles)
        self._bars_stored += stored.new
        self._revised += [(symbol, open_time_ms) for open_time_ms in stored.revised_ms]

    # --- what is missing, and whether the rest is true ----------------------------------------------------------------

    async def verify(self, sample: np.random.Generator) -> None:
        """Asks again for what was rejected or lacking, and for a sample of what is stored."""
        again = {
            symbol: join(
                intersect([range_of(gap, self._step_ms) for gap in state.known if gap.cause in SETTLED], [state.span])
            )
            for symbol, state in self._symbols.items()
        }
        await self.fetch_candles("gaps, asked again", again)
        pages = [
            (symbol, page)
            for symbol, state in self._symbols.items()
            for page in _cut(state.span, PAGE_BARS * self._step_ms)
        ]
        drawn = sample.choice(len(pages), min(VERIFIED_PAGES, len(pages)), replace=False)
        chosen = [pages[number] for number in sorted(drawn.tolist())]
        bars: Counter[str] = Counter()
        for symbol, (first, end) in chosen:
            bars[symbol] += (end - first) // self._step_ms
        self._progress.begin("verification", "bars", bars)
        await side_by_side(chosen, self._verify_page)

    async def _verify_page(self, job: tuple[str, Range]) -> None:
        symbol, page = job
        stored = (await asyncio.to_thread(read_candles, self._database, symbol, *page)).open_time_ms
        answer = await self._fetch_page(symbol, page)
        if answer is None:
            return
        self._verified_bars += len(np.intersect1d(stored, answer.candles.open_time_ms))
        present = [*answer.candles.open_time_ms.tolist(), *(row.open_time_ms for row in answer.rejected)]
        self._vanished += [(symbol, open_time_ms) for open_time_ms in np.setdiff1d(stored, present).tolist()]
        await self._store(symbol, answer.candles)

    def record_gaps(self) -> Counter[str]:
        """Writes down why bars of each symbol are missing or do not count; returns the bars of each cause."""
        bars: Counter[str] = Counter()
        flat_runs = read_flat_runs(self._database)
        for symbol, state in self._symbols.items():
            evidence = Evidence(
                missing=state.missing,
                first_stored_ms=state.first_stored_ms,
                asked=subtract(join(state.asked), join(state.unanswered)),
                rejected=_stretches_of(state.rejected.values(), self._step_ms),
                flat_runs=[(first_ms, last_ms + self._step_ms) for first_ms, last_ms in flat_runs.get(symbol, [])],
                newest_ms=state.newest_ms,
            )
            gaps = classify(symbol, self._step_ms, state.known, evidence)
            _BEFORE_CURSOR()
            if gaps != state.known:
                replace_candle_gaps(self._database, symbol, gaps)
            _AFTER_CURSOR()
            for gap in gaps:
                bars[gap.cause] += gap.bars
        return bars

    # --- funding -----------------------------------------------------------------------------------------------------

    async def fetch_funding_rates(self) -> None:
        """Fetches what lies before and after the stored payments; a symbol's new ones are stored in one transaction.

        So that a broken run leaves no hole between them. Payments up to the present, or the wanted end, are wanted.
        """
        self._progress.begin("funding rates", "symbols", dict.fromkeys(self._symbols, 1))
        start_ms = self._span[0]
        end_ms = self._now_ms + 1 if self._wanted.to_ms is None else min(self._now_ms + 1, self._wanted.to_ms)

        async def fetch(symbol: str) -> None:
            stored = await asyncio.to_thread(read_funding_rates, self._database, symbol)
            spans = [(start_ms, end_ms)]
            if stored:
                spans = [(start_ms, stored[0].funding_time_ms), (stored[-1].funding_time_ms + 1, end_ms)]
            try:
                rates = [rate for span in spans for rate in await self._client.fetch_funding_rates(symbol, *span)]
            except (DataError, RefusedError) as error:
                _note_failure(self._symbols[symbol], error)
                return
            _BEFORE_FUNDING()
            await asyncio.to_thread(upsert_funding_rates, self._database, rates)
            _AFTER_FUNDING()
            self._funding_rates_stored += len(rates)
            self._progress.advance(symbol, 1)

        await side_by_side(self._symbols, fetch)

    def summary(self, gap_bars: Mapping[str, int]) -> DownloadSummary:
        """All that is to be reported."""
        states = self._symbols.values()
        return DownloadSummary(
            *self._span,
            bars_stored=self._bars_stored,
            funding_rates_stored=self._funding_rates_stored,
            rejected=tuple(state.rejected[time] for state in states for time in sorted(state.rejected)),
            gap_bars=dict(gap_bars),
            late=tuple(state.name for state in states if any(end == state.newest_ms for _, end in state.missing)),
            skipped=self._skipped,
            failed={state.name: state.failures[0] for state in states if state.failures},
            revised=tuple(self._revised),
            verified_bars=self._verified_bars,
            vanished=tuple(sorted(self._vanished)),
        )


def _note_failure(state: _Symbol, error: DataError | RefusedError) -> None:
    """What concerns one symbol is noted; a 403 concerns us, and ends everything."""
    if isinstance(error, RefusedError) and error.code == 403:
        raise error
    state.failures.append(str(error))


def _cut(stretch: Range, length_ms: int) -> Iterator[Range]:
    """The stretch in parts of at most that length, oldest first."""
    first, end = stretch
    return ((part, min(part + length_ms, end)) for part in range(first, end, length_ms))


def _stretches_of(rows: Iterable[RejectedRow], step_ms: int) -> list[tuple[Range, str]]:
    """The bars of rejected rows; neighbours with the same reason as one stretch."""
    stretches: list[tuple[Range, str]] = []
    for row in sorted(rows, key=lambda row: row.open_time_ms):
        first_ms = floor_ms(row.open_time_ms, step_ms)
        if stretches and stretches[-1][0][1] >= first_ms and stretches[-1][1] == row.reason:
            stretches[-1] = ((stretches[-1][0][0], first_ms + step_ms), row.reason)
        else:
            stretches.append(((first_ms, first_ms + step_ms), row.reason))
    return stretches
