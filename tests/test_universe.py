"""Verdicts on symbols as a table of cases, and the questions behind them against the local exchange."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import pytest

from perpcast.errors import ExchangeUnavailableError
from perpcast.exchange import QUESTIONS, BybitClient, CandlePage
from perpcast.exchange.renames import ENDED, LOOK_ALIKES, RENAMED, REUSED
from perpcast.market import USDT_PERPETUAL, Listing
from perpcast.simulator.clock import RunningClock
from perpcast.simulator.server import serve
from perpcast.universe import (
    PAST_DAYS,
    Proposal,
    Verdict,
    check_symbols,
    first_candle_ms,
    judge,
    suggest_replacements,
)
from tests.universe_world import DAY_MS, NOW, START, Contract, ContractMarket, on_day

Value = TypeVar("Value")


def listing(
    symbol: str,
    *,
    kind: str = USDT_PERPETUAL,
    status: str = "Trading",
    launched: float = -900,
    delivered: float | None = None,
) -> Listing:
    """A contract, launched and delivered on days after the first training bar (2025-05-22 06:00)."""
    return Listing(symbol, kind, status, on_day(launched), None if delivered is None else on_day(delivered))


# The symbol, the contracts that the exchange lists, the day of each first candle, and the verdict in words.
OLD = -900.0
JUDGED: list[tuple[str, list[Listing], dict[str, float], str]] = [
    ("BTCUSDT", [listing("BTCUSDT")], {"BTCUSDT": OLD}, ""),
    ("BTCUSDT", [listing("BTCUSDT")], {"BTCUSDT": 0.0}, ""),  # at the first training bar itself
    ("SYRUPUSDT", [], {}, "unknown to this exchange"),
    (
        "TSLAUSDT",
        [listing("TSLAUSDT", kind="stock perpetual")],
        {},
        "a stock perpetual, not a USDT perpetual on a coin",
    ),
    ("BTCUSDT", [listing("BTCUSDT", kind="dated future")], {}, "a dated future, not a USDT perpetual on a coin"),
    (
        "NEWUSDT",
        [listing("NEWUSDT", status="PreLaunch", launched=43)],
        {},
        "does not trade yet: launch on 2025-07-04",
    ),
    (
        "IPUSDT",
        [listing("IPUSDT", delivered=45.125)],
        {},
        "being delisted: last trade 2025-07-06 09:00 UTC",
    ),
    ("IPUSDT", [listing("IPUSDT", status="Delivering")], {}, "being delisted: Delivering"),
    ("IPUSDT", [listing("IPUSDT", status="Closed", delivered=-3)], {}, "delisted on 2025-05-19"),
    ("IPUSDT", [listing("IPUSDT", status="Closed")], {}, "delisted"),
    # Renamed: the new name where it can be used, else why not.
    (
        "MATICUSDT",
        [listing("MATICUSDT", status="Closed", delivered=-3), listing("POLUSDT")],
        {"POLUSDT": OLD},
        "delisted on 2025-05-19; use POLUSDT",
    ),
    ("MATICUSDT", [listing("POLUSDT")], {"POLUSDT": OLD}, "unknown to this exchange; use POLUSDT"),
    (
        "MATICUSDT",
        [listing("MATICUSDT", delivered=45), listing("POLUSDT")],
        {"POLUSDT": OLD},
        "being delisted: last trade 2025-07-06 06:00 UTC; use POLUSDT",
    ),
    (
        "FTMUSDT",
        [listing("SUSDT")],
        {"SUSDT": 3.5},
        "unknown to this exchange; now SUSDT: too young: candles since 2025-05-25, 4 days missing",
    ),
    ("GALUSDT", [], {}, "unknown to this exchange; now GUSDT: unknown to this exchange"),
    (
        "EOSUSDT",
        [listing("AUSDT", status="PreLaunch", launched=43)],
        {},
        "unknown to this exchange; now AUSDT: does not trade yet: launch on 2025-07-04",
    ),
    ("FETUSDT", [], {}, "unknown to this exchange; the coin merged into ASI or was rebranded"),
    # Listed in multiples: the name is another than on other exchanges.
    ("PEPEUSDT", [listing("1000PEPEUSDT")], {"1000PEPEUSDT": OLD}, "unknown to this exchange; use 1000PEPEUSDT"),
    ("1000SHIBUSDT", [listing("SHIB1000USDT")], {"SHIB1000USDT": OLD}, "unknown to this exchange; use SHIB1000USDT"),
    ("MOGUSDT", [listing("1000000MOGUSDT")], {"1000000MOGUSDT": OLD}, "unknown to this exchange; use 1000000MOGUSDT"),
    ("INCHUSDT", [listing("1INCHUSDT")], {"1INCHUSDT": OLD}, "unknown to this exchange"),
    # A successor counts only where it trades.
    ("PEPEUSDT", [listing("1000PEPEUSDT", status="Closed")], {}, "unknown to this exchange"),
    # By the first candle, whatever the launch time says.
    (
        "HYPEUSDT",
        [listing("HYPEUSDT", launched=1)],
        {"HYPEUSDT": 1},
        "too young: candles since 2025-05-23, 1 day missing",
    ),
    (
        "BCHUSDT",
        [listing("BCHUSDT", launched=-2698)],
        {"BCHUSDT": 10.01},
        "too young: candles since 2025-06-01, 11 days missing; launch time 2018-01-01 is earlier than its candles",
    ),
    (
        "ETHUSDT",
        [listing("ETHUSDT", launched=7)],
        {"ETHUSDT": OLD},
        "launch time 2025-05-29 is later than its candles",
    ),
    ("ETHUSDT", [listing("ETHUSDT", launched=0.9)], {"ETHUSDT": OLD}, ""),
    # Names that mislead.
    (
        "SONICUSDT",
        [listing("SONICUSDT"), listing("SUSDT")],
        {"SONICUSDT": OLD},
        "not Sonic, the former FTMUSDT, which is SUSDT",
    ),
    ("PUMPUSDT", [listing("PUMPUSDT")], {"PUMPUSDT": OLD}, "not the coin of PUMPFUNUSDT"),
    ("LITUSDT", [listing("LITUSDT", status="Closed"), listing("HEIUSDT")], {"HEIUSDT": OLD}, "delisted; use HEIUSDT"),
    # The candles before its launch are another coin's.
    (
        "LITUSDT",
        [listing("LITUSDT", launched=20), listing("HEIUSDT")],
        {"LITUSDT": OLD},
        "too young: candles since 2025-06-11, 20 days missing; this name was Litentry's, now HEIUSDT",
    ),
    ("LITUSDT", [listing("LITUSDT")], {"LITUSDT": OLD}, "this name was Litentry's, now HEIUSDT"),
]


@pytest.mark.parametrize(("symbol", "listed", "first_days", "words"), JUDGED, ids=[case[0] for case in JUDGED])
def test_verdict_in_words(symbol: str, listed: list[Listing], first_days: dict[str, float], words: str) -> None:
    listings = {each.symbol: each for each in listed}
    first_candles: dict[str, int | None] = {name: on_day(day) for name, day in first_days.items()}
    verdict = judge(symbol, listings, first_candles, START)
    assert "; ".join(filter(None, (verdict.problem, *verdict.warnings))) == words
    assert verdict.usable == (verdict.problem == "")
    assert verdict.replacement == (words.rpartition("; use ")[2] if "; use " in words else None)
    if verdict.usable:
        assert (verdict.is_perpetual, verdict.is_trading, verdict.is_in_time) == (True, True, True)


def test_verdict_answers_what_can_be_answered() -> None:
    def answers(symbol: str, first_day: float | None, *listed: Listing) -> tuple[bool | None, ...]:
        listings = {each.symbol: each for each in listed}
        verdict = judge(symbol, listings, {symbol: None if first_day is None else on_day(first_day)}, START)
        return verdict.is_perpetual, verdict.is_trading, verdict.is_in_time

    assert answers("AUSDT", None) == (None, None, None)
    assert answers("AUSDT", None, listing("AUSDT", kind="stock perpetual")) == (False, True, None)
    assert answers("AUSDT", None, listing("AUSDT", status="PreLaunch")) == (True, False, None)
    assert answers("AUSDT", None, listing("AUSDT", delivered=50)) == (True, False, None)
    assert answers("AUSDT", None, listing("AUSDT")) == (True, True, False)
    assert answers("AUSDT", 2.0, listing("AUSDT")) == (True, True, False)
    assert answers("AUSDT", -2.0, listing("AUSDT")) == (True, True, True)


def test_renames_lead_to_a_name_in_one_step() -> None:
    assert not set(RENAMED) & set(RENAMED.values())
    assert not set(RENAMED) & set(ENDED)
    for symbol in {*RENAMED, *RENAMED.values(), *ENDED, *REUSED, *LOOK_ALIKES}:
        assert symbol == symbol.upper()
        assert symbol.endswith("USDT")


def asked(contracts: Mapping[str, Contract], ask: Callable[[BybitClient], Awaitable[Value]]) -> tuple[Value, int]:
    """What `ask` finds on a local exchange of these contracts, and the number of requests that it took."""

    async def run() -> tuple[Value, int]:
        market, clock = ContractMarket(contracts), RunningClock(NOW, 1.0, time.monotonic)
        async with (
            serve(market, clock) as address,
            BybitClient(address.rest_url, jitter=np.random.default_rng(1)) as client,
        ):
            answer = await ask(client)
            return answer, client.requests

    return asyncio.run(run())


# Days of the first candle, and the requests: the coarse page, and the fine one where the first may be too late.
@pytest.mark.parametrize(
    ("first_day", "requests"),
    [
        (-60, 1),
        (-0.75, 1),  # the 12-hour bar before the one of the first training bar
        (-0.25, 2),  # START is 06:00: its own 12-hour bar begins at 00:00
        (0, 2),
        (1 / 96, 2),
        (0.5, 2),
        (3 + 5 / 96, 2),
        (39, 2),
    ],
)
def test_first_candle_is_exact_where_it_matters(first_day: float, requests: int) -> None:
    contracts = {"AUSDT": Contract(first_day)}
    first, asked_for = asked(contracts, lambda client: first_candle_ms(client, "AUSDT", "15", START, NOW))
    assert first is not None
    if requests == 1:
        assert first < START - START % (12 * 3_600_000)
    else:
        assert first == on_day(first_day)
    assert asked_for == requests


def test_first_candle_of_a_symbol_that_begins_after_pages_of_nothing() -> None:
    # 1000 coarse bars are 500 days: with a span of 1,095 days, the third page.
    start_ms, contracts = NOW - 1095 * DAY_MS, {"AUSDT": Contract(0)}
    first, requests = asked(contracts, lambda client: first_candle_ms(client, "AUSDT", "15", start_ms, NOW))
    assert (first, requests) == (START, 4)


def test_first_candle_absent() -> None:
    contracts = {"AUSDT": Contract(41, 42)}  # begins tomorrow
    assert asked(contracts, lambda client: first_candle_ms(client, "AUSDT", "15", START, NOW)) == (None, 1)


def test_missing_bars_at_the_start_make_no_symbol_young() -> None:
    contracts = {"AUSDT": Contract(missing_days=(-0.1, 0.5))}
    first, _ = asked(contracts, lambda client: first_candle_ms(client, "AUSDT", "15", START, NOW))
    assert first is not None
    assert first < START


WORLD = {
    "BTCUSDT": Contract(),
    "ETHUSDT": Contract(launch_day=7),
    "BCHUSDT": Contract(first_day=10, launch_day=-2698),
    "MATICUSDT": Contract(last_day=-3, status="Closed", delivery_day=-3),
    "POLUSDT": Contract(),
    "SUSDT": Contract(first_day=3.5),
    "IPUSDT": Contract(delivery_day=45),
    "NEWUSDT": Contract(first_day=43, last_day=44, status="PreLaunch"),
}


async def check(client: BybitClient, symbols: Sequence[str], on_progress: Callable[[int, int], None]) -> list[Verdict]:
    return await check_symbols(client, symbols, await client.fetch_listings(), "15", START, NOW, on_progress)


def test_symbols_are_checked_on_the_exchange_in_their_order() -> None:
    symbols = ["MATICUSDT", "BTCUSDT", "FTMUSDT", "ETHUSDT", "BCHUSDT", "IPUSDT", "NEWUSDT", "GONEUSDT"]
    progress: list[tuple[int, int]] = []
    verdicts, requests = asked(WORLD, lambda client: check(client, symbols, lambda *step: progress.append(step)))
    assert [verdict.symbol for verdict in verdicts] == symbols
    assert {verdict.symbol: verdict.problem for verdict in verdicts} == {
        "MATICUSDT": "delisted on 2025-05-19; use POLUSDT",
        "BTCUSDT": "",
        "FTMUSDT": "unknown to this exchange; now SUSDT: too young: candles since 2025-05-25, 4 days missing",
        "ETHUSDT": "",
        "BCHUSDT": "too young: candles since 2025-06-01, 10 days missing",
        "IPUSDT": "being delisted: last trade 2025-07-06 06:00 UTC",
        "NEWUSDT": "does not trade yet: launch on 2025-07-04",
        "GONEUSDT": "unknown to this exchange",
    }
    assert verdicts[0].replacement == "POLUSDT"
    assert verdicts[3].warnings == ("launch time 2025-05-29 is later than its candles",)
    assert verdicts[4].warnings == ("launch time 2018-01-01 is earlier than its candles",)
    # 4 pages of listings; BTC, ETH, POL once, BCH and S twice; nothing for what does not trade.
    assert requests == 4 + 3 + 4
    assert progress == [(done, 5) for done in range(1, 6)]


async def suggest(client: BybitClient, configured: Sequence[str], count: int) -> list[Proposal]:
    listings = await client.fetch_listings()
    return await suggest_replacements(client, configured, listings, START, count, lambda done, total: None)


def test_suggestions_are_ranked_by_turnover_before_the_first_training_bar() -> None:
    contracts = WORLD | {
        "BIGTHENUSDT": Contract(past_turnover=9e6, turnover=1e3),
        "RISENUSDT": Contract(past_turnover=2e6, turnover=1e9),  # huge today, small then
        "MIDDLEUSDT": Contract(past_turnover=5e6),
        "EARLIERUSDT": Contract(first_day=-10, past_turnover=12e6),  # 10 of 30 days: 4 million a day
        "YOUNGUSDT": Contract(first_day=1, turnover=1e9),
        "ENDINGUSDT": Contract(past_turnover=1e9, delivery_day=45),
        "CLOSEDUSDT": Contract(past_turnover=1e9, status="Closed", delivery_day=-1),
        "LITUSDT": Contract(past_turnover=1e9, launch_day=20),  # another coin's turnover
        "CONFIGUREDUSDT": Contract(past_turnover=1e9),
    }
    configured = ["CONFIGUREDUSDT", "BTCUSDT", "ETHUSDT", "POLUSDT", "GONEUSDT"]
    proposals, requests = asked(contracts, lambda client: suggest(client, configured, 4))
    assert [proposal.symbol for proposal in proposals] == ["BIGTHENUSDT", "MIDDLEUSDT", "EARLIERUSDT", "RISENUSDT"]
    # The last 12-hour bar before the first training bar ends 6 hours before it.
    assert proposals[0].past_turnover == pytest.approx(9e6)
    assert proposals[2].past_turnover == pytest.approx(12e6 * 9.75 / PAST_DAYS)
    # One for each of the four, YOUNG, BCH, S; 4 pages of listings.
    assert requests == 4 + 7


def test_suggestions_of_an_exchange_without_a_past() -> None:
    proposals, _ = asked({"AUSDT": Contract(first_day=1)}, lambda client: suggest(client, [], 3))
    assert proposals == []


class Counting(BybitClient):
    """Counts the questions that wait for their answers at one time."""

    def __init__(self, gone: bool = False) -> None:
        super().__init__("http://unused", jitter=np.random.default_rng(1))
        self.waiting = self.most = 0
        self.gone = gone

    async def fetch_candles(self, symbol: str, interval: str, start_ms: int, end_ms: int) -> CandlePage:
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        for _ in range(5):
            await asyncio.sleep(0)
        self.waiting -= 1
        if self.gone:
            raise ExchangeUnavailableError("exchange unreachable: it is gone")
        return CandlePage(Contract(-60, -1).candles(), (), NOW)


async def many(client: BybitClient) -> list[Proposal]:
    listings = {f"C{number}USDT": listing(f"C{number}USDT") for number in range(100)}
    return await suggest_replacements(client, (), listings, START, 1, lambda done, total: None)


def test_questions_in_flight_are_bounded() -> None:
    client = Counting()
    asyncio.run(many(client))
    assert client.most == QUESTIONS


def test_exchange_that_goes_away_is_one_error() -> None:
    with pytest.raises(ExchangeUnavailableError, match="it is gone"):
        asyncio.run(many(Counting(gone=True)))
