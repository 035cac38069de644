"""Which symbols a training can use: what each is, whether it goes on trading, how far back its candles reach.

The first candle is found by asking for candles: the launch time that the exchange states is sometimes a placeholder
(2018-01-01) and sometimes late (ETHUSDT has candles from before it).
"""

import re
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from perpcast.exchange import PAGE_BARS, BybitClient, side_by_side
from perpcast.exchange.renames import ENDED, LOOK_ALIKES, RENAMED, REUSED
from perpcast.market import Listing
from perpcast.timeframe import DAY_MS, floor_ms, format_time, interval_ms

# A page of these reaches over 500 days, and one of them over no more bars of a finer interval than a page holds.
COARSE_INTERVAL = "720"
COARSE_MS = interval_ms(COARSE_INTERVAL)

# Candidates are ranked by their turnover over so many days before the first training bar.
PAST_DAYS = 30

_MULTIPLE = re.compile(r"^10{3,}|10{3,}(?=USDT$)")  # 1000, 10000, 1000000: so many coins a contract

Value = TypeVar("Value")
Progress = Callable[[int, int], None]  # done, of how many


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is known of one symbol; None where there is nothing to know: the exchange does not list it as such."""

    symbol: str
    is_perpetual: bool | None  # a USDT perpetual on a coin
    is_trading: bool | None  # today, and with no end announced
    is_in_time: bool | None  # has candles at the first training bar
    problem: str = ""  # why it cannot be used, in words; empty where it can
    replacement: str | None = None  # the same coin's contract, where that one can be used
    warnings: tuple[str, ...] = ()  # what a person should know of it all the same

    @property
    def usable(self) -> bool:
        """Whether a training can use it, and a trader after it."""
        return not self.problem


@dataclass(frozen=True, slots=True)
class Proposal:
    """A symbol that could be used instead; its turnover in USDT a day, on average over PAST_DAYS."""

    symbol: str
    past_turnover: float


async def check_symbols(
    client: BybitClient,
    symbols: Sequence[str],
    listings: Mapping[str, Listing],
    interval: str,
    start_ms: int,
    now_ms: int,
    on_progress: Progress,
) -> list[Verdict]:
    """A verdict on each symbol, in their order, for a training whose first bar of `interval` opens at `start_ms`.

    Asks once for each symbol that trades and for the successor of each that does not; more where it is young.
    """
    ended = [symbol for symbol in symbols if not _goes_on(listings.get(symbol))]
    successors = [name for symbol in ended if (name := _successor(symbol, listings))]
    asked = [name for name in dict.fromkeys([*symbols, *successors]) if _goes_on(listings.get(name))]

    async def ask(symbol: str) -> int | None:
        return await first_candle_ms(client, symbol, interval, start_ms, now_ms)

    first_candles = await _answers(ask, asked, on_progress)
    return [judge(symbol, listings, first_candles, start_ms) for symbol in symbols]


async def first_candle_ms(client: BybitClient, symbol: str, interval: str, start_ms: int, end_ms: int) -> int | None:
    """Open of the first candle, exact if it lies in `[start_ms, end_ms)`; some earlier time if there are older ones.

    None where there are no candles at all. A bar that is missing just at `start_ms` does not make a symbol young.
    """
    around_ms = floor_ms(start_ms, COARSE_MS)
    for page_ms in range(around_ms - COARSE_MS, end_ms, PAGE_BARS * COARSE_MS):
        page = await client.fetch_candles(symbol, COARSE_INTERVAL, page_ms, page_ms + PAGE_BARS * COARSE_MS)
        if len(page.candles):
            coarse_ms = int(page.candles.open_time_ms[0])
            if coarse_ms < around_ms:
                return coarse_ms
            fine = (await client.fetch_candles(symbol, interval, coarse_ms, coarse_ms + COARSE_MS)).candles
            return int(fine.open_time_ms[0]) if len(fine) else coarse_ms
    return None


def judge(
    symbol: str, listings: Mapping[str, Listing], first_candles: Mapping[str, int | None], start_ms: int
) -> Verdict:
    """The verdict on one symbol; `first_candles` answers for every USDT perpetual that goes on trading."""
    listing = listings.get(symbol)
    if listing is not None and _goes_on(listing):
        return _aged(listing, first_candles[symbol], start_ms)
    verdict = _unusable(symbol, listing)
    name = _successor(symbol, listings)
    if name is None:
        return verdict
    successor = judge(name, listings, first_candles, start_ms)
    if successor.usable:
        return replace(verdict, problem=f"{verdict.problem}; use {name}", replacement=name)
    return replace(verdict, problem=f"{verdict.problem}; now {name}: {successor.problem}")


def _goes_on(listing: Listing | None) -> bool:
    """Whether it is a USDT perpetual that trades, with no end announced."""
    return (
        listing is not None
        and listing.is_usdt_perpetual
        and listing.status == "Trading"
        and listing.delivery_time_ms is None
    )


def _unusable(symbol: str, listing: Listing | None) -> Verdict:
    """The verdict on what is no USDT perpetual, or none that goes on trading."""
    fate = f"; {ENDED[symbol]}" if symbol in ENDED else ""
    if listing is None:
        return Verdict(symbol, None, None, None, f"unknown to this exchange{fate}")
    if not listing.is_usdt_perpetual:
        trades = listing.status == "Trading"
        return Verdict(symbol, False, trades, None, f"a {listing.kind}, not a USDT perpetual on a coin")
    if listing.status == "PreLaunch":
        return Verdict(symbol, True, False, None, f"does not trade yet: launch on {_day(listing.launch_time_ms)}")
    return Verdict(symbol, True, False, None, f"{_ending(listing)}{fate}")


def _ending(listing: Listing) -> str:
    end_ms = listing.delivery_time_ms
    if listing.status == "Closed":
        return "delisted" + (f" on {_day(end_ms)}" if end_ms else "")
    return "being delisted: " + (f"last trade {format_time(end_ms)} UTC" if end_ms else listing.status)


def _successor(symbol: str, listings: Mapping[str, Listing]) -> str | None:
    """The coin's contract under another name: renamed, or listed in multiples (1000PEPEUSDT, SHIB1000USDT)."""
    if symbol in RENAMED or symbol in listings:
        return RENAMED.get(symbol)
    coin = _MULTIPLE.sub("", symbol)
    return next((name for name in listings if _MULTIPLE.sub("", name) == coin and _goes_on(listings[name])), None)


def _aged(listing: Listing, first_ms: int | None, start_ms: int) -> Verdict:
    """The verdict on a USDT perpetual that goes on trading, by its first candle."""
    symbol, launch_ms = listing.symbol, listing.launch_time_ms
    warnings = [table[symbol] for table in (REUSED, LOOK_ALIKES) if symbol in table]
    if first_ms is None:
        return Verdict(symbol, True, True, False, "too young: no candles from before today", warnings=tuple(warnings))
    if symbol in REUSED:
        first_ms = max(first_ms, launch_ms)
    if launch_ms > max(first_ms, start_ms) + DAY_MS:
        warnings.append(f"launch time {_day(launch_ms)} is later than its candles")
    if first_ms <= start_ms:
        return Verdict(symbol, True, True, True, warnings=tuple(warnings))
    if launch_ms < first_ms - DAY_MS:
        warnings.append(f"launch time {_day(launch_ms)} is earlier than its candles")
    days = -(-(first_ms - start_ms) // DAY_MS)
    problem = f"too young: candles since {_day(first_ms)}, {days:,} day{'s' if days > 1 else ''} missing"
    return Verdict(symbol, True, True, False, problem, warnings=tuple(warnings))


def _day(time_ms: int) -> str:
    return format_time(time_ms)[:10]


async def suggest_replacements(
    client: BybitClient,
    configured: Collection[str],
    listings: Mapping[str, Listing],
    start_ms: int,
    count: int,
    on_progress: Progress,
) -> list[Proposal]:
    """The `count` symbols with the largest turnover in the PAST_DAYS days before `start_ms`, the largest first.

    Chosen by what was known then: today's turnover would prefer what has risen since. All of them still trade, so some
    survivorship remains. One request for each USDT perpetual that is not configured.
    """
    end_ms = floor_ms(start_ms, COARSE_MS)
    candidates = [
        symbol
        for symbol, listing in sorted(listings.items())
        if _goes_on(listing) and symbol not in configured and not (symbol in REUSED and listing.launch_time_ms > end_ms)
    ]

    async def ask(symbol: str) -> float:
        page = await client.fetch_candles(symbol, COARSE_INTERVAL, end_ms - PAST_DAYS * DAY_MS, end_ms)
        return float(page.candles.turnover.sum()) / PAST_DAYS

    turnover = await _answers(ask, candidates, on_progress)
    known = [Proposal(symbol, value) for symbol, value in turnover.items() if value > 0]
    return sorted(known, key=lambda proposal: -proposal.past_turnover)[:count]


async def _answers(
    ask: Callable[[str], Awaitable[Value]], symbols: Sequence[str], on_progress: Progress
) -> dict[str, Value]:
    """What `ask` says of each symbol."""
    answers: dict[str, Value] = {}

    async def answer(symbol: str) -> None:
        answers[symbol] = await ask(symbol)
        on_progress(len(answers), len(symbols))

    await side_by_side(symbols, answer)
    return {symbol: answers[symbol] for symbol in symbols}
