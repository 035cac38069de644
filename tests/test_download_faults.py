"""A download through every fault that a network and an exchange have, into a real database.

Afterwards the tables are those of an undisturbed run, row for row; or what is not is told, and the next run puts it
right. In warped time and with the constants as they are; the exchange runs in the same event loop.
"""

import asyncio
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from aiohttp import web
from sqlalchemy import text

from perpcast.database import Database, DatabaseAddress
from perpcast.download import SETTLE_MS, DownloadSummary, Wanted, download
from perpcast.errors import ExchangeUnavailableError, RefusedError, SetupError
from perpcast.exchange import BybitClient, rate_limit
from perpcast.exchange.client import BAN_SECONDS
from perpcast.simulator import faults
from perpcast.simulator.clock import SteppedClock
from perpcast.simulator.faults import Faults, Honest, Spoil
from perpcast.simulator.market import Market
from perpcast.simulator.recorded import RecordedMarket
from perpcast.simulator.server import Address, serve, serve_in_thread
from perpcast.timeframe import DAY_MS, from_ms, parse_time, to_ms
from tests import warp
from tests.download_world import (
    BARS,
    END,
    START,
    STEP_MS,
    SYMBOLS,
    SmallMarket,
    Stage,
    Tables,
    assert_part_of,
    assert_same_tables,
    recorded,
    stage,
)
from tests.recorded import CANDLES, needs_recorded
from tests.tcp_proxy import TcpProxy

NOW = END + 120_000  # in the middle of a bar
PAGE = 1000
PAGES = -(-BARS // PAGE)
FEW = ("AAUSDT", "DDUSDT")  # a whole one with a flat run, and one that lists late
PATHS = ("kline", "funding", "instruments-info")

Rows = list[Any]


class Watch:
    """Notes what a person would see, and calls `after` with the number of pages that have come."""

    def __init__(self, after: Callable[[int], None] = lambda pages: None) -> None:
        self.notices: list[str] = []
        self._pages, self._after = 0, after

    def begin(self, phase: str, unit: str, amounts: Mapping[str, int]) -> None: ...

    def advance(self, symbol: str, amount: int) -> None:
        self._pages += 1
        self._after(self._pages)

    def notice(self, text: str) -> None:
        self.notices.append(text)


async def fetched(
    rest_url: str, database: Database, watch: Watch | None = None, *, symbols: Sequence[str] = SYMBOLS, **options: Any
) -> DownloadSummary:
    """A download of everything from START on."""
    rng, watch = np.random.default_rng(1), watch or Watch()
    local_time_ms = options.pop("local_time_ms", None)
    wanted = Wanted(tuple(symbols), "15", 1, **{"from_ms": START} | options)
    async with BybitClient(rest_url, jitter=rng, on_notice=watch.notice) as client:
        return await download(client, database, wanted, watch, sample=rng, local_time_ms=local_time_ms)


def run(
    database: Database,
    script: Faults | None = None,
    watch: Watch | None = None,
    *,
    market: Market | None = None,
    now_ms: int = NOW,
    **options: Any,
) -> DownloadSummary:
    """A download from an exchange with these faults, both in one event loop and in warped time."""

    async def both() -> DownloadSummary:
        async with serve(market or SmallMarket(), SteppedClock(now_ms), faults=script) as address:
            return await fetched(address.rest_url, database, watch, **options)

    return warp.run(both())


def run_few(database: Database, *arguments: Any, **options: Any) -> DownloadSummary:
    """The same of FEW alone."""
    return run(database, *arguments, symbols=FEW, **options)


@pytest.fixture(scope="module")
def place(postgres: DatabaseAddress, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with stage(postgres, tmp_path_factory.mktemp("faults"), {}) as place:
        yield place


@pytest.fixture
def own(place: Stage) -> Stage:
    """A database with empty tables."""
    with place.engine.begin() as connection:
        connection.execute(text("TRUNCATE raw_market_data, candle_gaps, candle_revisions, funding_rates, instruments"))
    return place


@pytest.fixture(scope="module")
def undisturbed(place: Stage) -> Tables:
    """What one run stores."""
    summary = run(place.engine)
    assert (summary.failed, summary.skipped, summary.rejected) == ({}, {}, ())
    tables = place.tables()
    causes = Counter(cause for _, _, _, cause, _ in tables["candle_gaps"])
    assert causes == {"flat_run": 1, "exchange_outage": 2, "not_yet_fetched": 1, "not_listed_yet": 1}
    assert len(tables["raw_market_data"]) == summary.bars_stored
    assert len(tables["funding_rates"]) == summary.funding_rates_stored
    assert len(tables["instruments"]) == len(SYMBOLS)
    return tables


@pytest.fixture(scope="module")
def few(undisturbed: Tables) -> Tables:
    """What one run stores of FEW alone: for tests of many cases."""
    return {name: {row for row in rows if row[0] in FEW} for name, rows in undisturbed.items()}


def bar_ms(bar: int) -> int:
    return START + bar * STEP_MS


def bars_of(tables: Tables, symbol: str) -> set[tuple[Any, ...]]:
    return {row for row in tables["raw_market_data"] if row[0] == symbol}


# --- D01: time-outs and resets ----------------------------------------------------------------------------------------

BROKEN: dict[str, Spoil] = {
    "reset before the answer": faults.reset(),
    "reset after a byte": faults.reset(after_bytes=1),
    "reset in the middle": faults.reset(after_bytes=200),
    "no answer in time": faults.delay(20.0),
    "HTTP 502": faults.status(502, b"<html>bad gateway</html>"),
    "retCode 10016": faults.ret_code(10016, "Internal server error"),
    "packed and cut off": faults.truncated_gzip(),
}


@pytest.mark.fault("D01")
@pytest.mark.parametrize("name", BROKEN)
def test_answers_that_break_off_are_asked_for_again(own: Stage, undisturbed: Tables, name: str) -> None:
    script = Faults()
    rules = [script.add(BROKEN[name], path=path, skip=skip) for path in PATHS for skip in (0, 1, 5, 9)]
    rules.append(script.add(BROKEN[name], path="time", times=2))
    run(own.engine, script)
    assert_same_tables(own.tables(), undisturbed)
    assert sum(rule.fired for rule in rules) >= 9


@pytest.mark.fault("D01")
def test_answers_that_are_late_but_in_time_cost_no_second_question(own: Stage, undisturbed: Tables) -> None:
    script = Faults()
    script.add(faults.delay(10.0), times=None)
    run(own.engine, script)
    assert_same_tables(own.tables(), undisturbed)
    assert script.requests("kline") == PAGES * len(SYMBOLS) + 3  # and two holes, and a page before the late listing


@pytest.mark.fault("D01")
def test_connections_that_are_cut_on_the_wire_are_made_again(
    own: Stage, undisturbed: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a proxy that resets them in the middle of pages, in real time."""
    with (
        serve_in_thread(SmallMarket(), SteppedClock(NOW), ip_limit=False) as address,
        TcpProxy(address.port) as proxy,
    ):
        cuts: dict[int, Callable[[], None]] = {
            2: lambda: proxy.cut_after(30_000),
            8: proxy.cut,
            12: lambda: proxy.cut_after(1),
            20: lambda: proxy.cut_after(90_000),
            27: proxy.cut,
        }
        watch = Watch(lambda pages: cuts.get(pages, lambda: None)())
        url = f"http://127.0.0.1:{proxy.port}"
        monkeypatch.setattr(rate_limit, "FIRST_PAUSE_SECONDS", 0.005)
        asyncio.run(fetched(url, own.engine, watch))
        assert proxy.accepted > len(SYMBOLS) * 2 + 2
    assert_same_tables(own.tables(), undisturbed)


class Host:
    """An exchange that can go away and come back on the same port."""

    def __init__(self) -> None:
        self._running: AbstractAsyncContextManager[Address]
        self._port = 0

    async def open(self) -> str:
        self._running = serve(SmallMarket(), SteppedClock(NOW), self._port)
        address = await self._running.__aenter__()
        self._port = address.port
        return address.rest_url

    async def close(self) -> None:
        await self._running.__aexit__(None, None, None)


async def with_an_outage(database: Database, seconds: float) -> DownloadSummary:
    """A download whose exchange is away for so long after the tenth page."""
    host, ten = Host(), asyncio.Event()
    url = await host.open()
    watch = Watch(lambda pages: ten.set() if pages == 10 else None)
    running = asyncio.create_task(fetched(url, database, watch))
    await ten.wait()
    await host.close()
    await asyncio.sleep(seconds)
    await host.open()
    try:
        return await running
    finally:
        await host.close()


@pytest.mark.fault("D01")
@pytest.mark.parametrize("seconds", [1.0, 60.0])
def test_outage_is_survived(own: Stage, undisturbed: Tables, seconds: float) -> None:
    warp.run(with_an_outage(own.engine, seconds))
    assert_same_tables(own.tables(), undisturbed)


@pytest.mark.fault("D01")
def test_outage_that_does_not_end_is_told_and_the_next_run_completes(own: Stage, undisturbed: Tables) -> None:
    with pytest.raises(ExchangeUnavailableError, match="gave no answer after 12 tries .*run the same command again"):
        warp.run(with_an_outage(own.engine, 3600.0))
    assert_part_of(own.tables(), undisturbed)
    assert not own.tables()["candle_gaps"]  # nothing is called missing that nobody could look for
    run(own.engine)
    assert_same_tables(own.tables(), undisturbed)


# --- D03, D04: limits -------------------------------------------------------------------------------------------------


class Quota:
    """At most `most` requests in a window of `seconds`; one more is told when the next window begins."""

    def __init__(self, most: int, seconds: float, how: str) -> None:
        self._most, self._seconds, self._how = most, seconds, how
        self._begun, self._count = -seconds, 0
        self._told_at: float | None = None
        self.refused = self.ignored = 0  # told, and asked nevertheless before the next window

    async def __call__(self, request: web.Request, honest: Honest) -> web.StreamResponse:
        now = asyncio.get_running_loop().time()
        if now >= self._begun + self._seconds:
            self._begun, self._count, self._told_at = now, 0, None
        self._count += 1
        if self._count <= self._most:
            return await honest()
        self.ignored += self._told_at is not None and now > self._told_at
        self._told_at = now if self._told_at is None else self._told_at
        self.refused += 1
        left = self._begun + self._seconds - now
        if self._how == "HTTP 429":
            return web.Response(status=429, headers={"Retry-After": str(int(left) + 1)})
        headers = {"X-Bapi-Limit-Reset-Timestamp": str(NOW + int(left * 1000) + 1)}
        return await faults.ret_code(10006, "Too many visits!", headers)(request, honest)


@pytest.mark.fault("D03")
@pytest.mark.parametrize("how", ["HTTP 429", "retCode 10006"])
def test_quota_is_kept_once_it_is_told(own: Stage, undisturbed: Tables, how: str) -> None:
    script, quota = Faults(), Quota(most=8, seconds=5.0, how=how)
    script.add(quota, times=None)
    run(own.engine, script)
    assert_same_tables(own.tables(), undisturbed)
    assert quota.refused > 0
    if how == "retCode 10006":  # 429 is a sign of the whole system, and no quota of ours
        assert quota.ignored == 0


class Ban:
    """Turns all requests away with 403 for so long after the first `passing`; notes when requests come."""

    def __init__(self, passing: int, seconds: float) -> None:
        self._passing, self._seconds = passing, seconds
        self.begun: float | None = None
        self.times: list[float] = []

    async def __call__(self, request: web.Request, honest: Honest) -> web.StreamResponse:
        now = asyncio.get_running_loop().time()
        self.times.append(now)
        if self.begun is None and len(self.times) > self._passing:
            self.begun = now
        if self.begun is not None and now < self.begun + self._seconds:
            return web.Response(status=403, text="access too frequent")
        return await honest()


@pytest.mark.fault("D04")
@pytest.mark.parametrize("passing", [1, 4, 30])
def test_ban_is_waited_for_in_silence_then_it_goes_on_alone(own: Stage, undisturbed: Tables, passing: int) -> None:
    script, ban, watch = Faults(), Ban(passing, seconds=300.0), Watch()
    script.add(ban, times=None)
    run(own.engine, script, watch)
    assert_same_tables(own.tables(), undisturbed)
    assert ban.begun is not None
    assert [when for when in ban.times if ban.begun < when < ban.begun + BAN_SECONDS] == []
    assert [notice for notice in watch.notices if "HTTP 403" in notice] == watch.notices
    assert len(watch.notices) == 1


@pytest.mark.fault("D04")
def test_limit_of_an_ip_that_is_lower_than_ours_is_survived(
    own: Stage, undisturbed: Tables, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The local exchange's own limit: ban after ban, each waited for."""
    monkeypatch.setattr("perpcast.simulator.ip_limit.REQUESTS", 8)
    script, watch = Faults(), Watch()
    run(own.engine, script, watch)
    assert_same_tables(own.tables(), undisturbed)
    assert len(watch.notices) >= 2


@pytest.mark.fault("D04")
@pytest.mark.parametrize("passing", [0, 6])
def test_ban_that_does_not_end_is_told_and_the_next_run_completes(
    own: Stage, undisturbed: Tables, passing: int
) -> None:
    script, ban = Faults(), Ban(passing, seconds=1e9)
    script.add(ban, times=None)
    with pytest.raises(RefusedError, match="HTTP 403: too many requests from this IP, or a region .*ten minutes"):
        run(own.engine, script)
    assert len(set(ban.times)) <= 3  # the beginning, what was on its way, and once after ten minutes
    assert_part_of(own.tables(), undisturbed)
    run(own.engine)
    assert_same_tables(own.tables(), undisturbed)


# --- D06, D07, D08: rows too many, in disorder, too few ---------------------------------------------------------------


def with_coming_bars(rows: Rows) -> Rows:
    """The running bar and the one after it on top, whatever was asked for."""
    coming = [[str(END + bar * STEP_MS), "1", "2", "0.5", "1.5", "10", "15"] for bar in (1, 0)]
    return [*coming, *[row for row in rows if int(row[0]) < END]]


@pytest.mark.fault("D06")
def test_running_candle_that_comes_first_is_never_stored(own: Stage, few: Tables) -> None:
    script = Faults()
    script.add(faults.rows(with_coming_bars), path="kline", times=None)
    run_few(own.engine, script)
    assert_same_tables(own.tables(), few)


@pytest.mark.fault("D06")
@pytest.mark.parametrize("passed_ms", [0, SETTLE_MS - 1])
def test_bar_that_has_just_closed_waits_until_it_has_settled(own: Stage, few: Tables, passed_ms: int) -> None:
    """Right after the close the exchange may still show values that it changes."""

    def unsettled(rows: Rows) -> Rows:
        return [[row[0], *row[1:5], "0.5", "50"] if int(row[0]) == END - STEP_MS else row for row in rows]

    script = Faults()
    script.add(faults.rows(unsettled), path="kline", times=None)
    summary = run_few(own.engine, script, now_ms=END + passed_ms)
    assert summary.end_ms == END - STEP_MS
    summary = run_few(own.engine)
    assert summary.revised == ()
    assert_same_tables(own.tables(), few)


def shuffled(rows: Rows) -> Rows:
    return [rows[place] for place in np.random.default_rng(len(rows)).permutation(len(rows))]


def overlapping(symbol: str) -> Callable[[Rows], Rows]:
    """With the hundred bars before and after, as other pages have them as well."""

    def edit(rows: Rows) -> Rows:
        if not rows:
            return rows
        newest, oldest = int(rows[0][0]), int(rows[-1][0])
        whole = recorded(symbol)
        near = whole[(whole.open_time_ms >= oldest - 100 * STEP_MS) & (whole.open_time_ms <= newest + 100 * STEP_MS)]
        return [
            [str(bar.open_time_ms), *map(repr, (bar.open, bar.high, bar.low, bar.close, bar.volume, bar.turnover))]
            for bar in near.candles(symbol)
            if bar.open_time_ms < END
        ]

    return edit


ORDERS: dict[str, Callable[[str], Callable[[Rows], Rows]]] = {
    "oldest first": lambda symbol: lambda rows: rows[::-1],
    "shuffled": lambda symbol: shuffled,
    "every row twice": lambda symbol: lambda rows: [row for row in rows for _ in range(2)],
    "overlapping": overlapping,
    "overlapping and shuffled": lambda symbol: lambda rows: shuffled(overlapping(symbol)(rows)),
}


@pytest.mark.fault("D07")
@pytest.mark.parametrize("order", ORDERS)
def test_rows_in_any_order_and_overlap_are_stored_once_each(own: Stage, few: Tables, order: str) -> None:
    script = Faults()
    for symbol in FEW:
        script.add(faults.rows(ORDERS[order](symbol)), path="kline", symbol=symbol, times=None)
    summary = run_few(own.engine, script)
    assert_same_tables(own.tables(), few)
    assert summary.rejected == ()


def lacking(first: int, end: int) -> Callable[[Rows], Rows]:
    return lambda rows: [row for row in rows if not bar_ms(first) <= int(row[0]) < bar_ms(end)]


@pytest.mark.fault("D08")
@pytest.mark.parametrize(("first", "end"), [(700, 701), (990, 1010), (1000, 3000), (BARS - 30, BARS - 20)])
def test_bars_that_an_answer_left_out_once_are_asked_for_again(own: Stage, few: Tables, first: int, end: int) -> None:
    script = Faults()
    script.add(faults.rows(lacking(first, end)), path="kline", symbol="AAUSDT", times=PAGES)
    run_few(own.engine, script)
    assert_same_tables(own.tables(), few)


@pytest.mark.fault("D08")
@pytest.mark.parametrize("end", [1, 30, PAGE + 30])
def test_oldest_bars_that_an_answer_left_out_once_are_not_taken_for_a_late_listing(
    own: Stage, few: Tables, end: int
) -> None:
    script = Faults()
    script.add(faults.rows(lacking(0, end)), path="kline", symbol="AAUSDT", times=2)
    run_few(own.engine, script)
    assert_same_tables(own.tables(), few)


@pytest.mark.fault("D08")
def test_newest_bars_that_an_answer_left_out_are_late_and_come_with_the_next_run(own: Stage, few: Tables) -> None:
    script = Faults()
    script.add(faults.rows(lacking(BARS - 20, BARS)), path="kline", symbol="AAUSDT", times=None)
    assert run_few(own.engine, script).late == ("AAUSDT",)
    run_few(own.engine)
    assert_same_tables(own.tables(), few)


@pytest.mark.fault("D08")
def test_bars_that_are_always_left_out_are_an_outage_until_a_verification_finds_them(own: Stage, few: Tables) -> None:
    def outages() -> set[tuple[int, int]]:
        return {
            ((to_ms(first) - START) // STEP_MS, bars)
            for symbol, first, bars, cause, _ in own.tables()["candle_gaps"]
            if (symbol, cause) == ("AAUSDT", "exchange_outage")
        }

    script = Faults()
    rule = script.add(faults.rows(lacking(3000, 3010)), path="kline", symbol="AAUSDT", times=None)
    run_few(own.engine, script)
    assert rule.fired == PAGES + 1  # the hole alone was asked for again
    assert outages() == {(3000, 10)}
    missing = {row for row in bars_of(few, "AAUSDT") if bar_ms(3000) <= to_ms(row[1]) < bar_ms(3010)}
    assert bars_of(own.tables(), "AAUSDT") == bars_of(few, "AAUSDT") - missing

    again = Faults()
    run_few(own.engine, again)
    assert again.requests("kline") == 0
    assert outages() == {(3000, 10)}
    run_few(own.engine, verify=True)
    assert_same_tables(own.tables(), few)


# --- D10, D12: answers that are none, or to another question ----------------------------------------------------------


def of_another_symbol(page: dict[str, Any]) -> dict[str, Any]:
    return page | {"symbol": "BTCUSDT"}


def every(minutes: int) -> Callable[[Rows], Rows]:
    """The page as candles of another interval have it: as many rows, at other distances."""

    def edit(rows: Rows) -> Rows:
        oldest = int(rows[-1][0]) if rows else START
        return [[str(oldest + place * minutes * 60_000), *row[1:]] for place, row in enumerate(rows)][::-1]

    return edit


NO_ANSWERS: dict[str, tuple[Spoil, str]] = {
    "HTML": (faults.body(b"<html>502 Bad Gateway</html>"), "expected JSON, received b'<html>"),
    "cut off": (faults.body(b'{"retCode":0,"retMsg":"OK","result":{"list":[["17'), "expected JSON"),
    "nothing": (faults.body(b""), "expected JSON"),
    "packed and cut off": (faults.truncated_gzip(), "expected JSON"),
    "no list": (faults.result(lambda page: page | {"list": None}), "expected list as list, received None"),
    "no result": (faults.envelope(lambda whole: whole | {"result": []}), "expected result as dict"),
    "no time": (faults.envelope(lambda whole: whole | {"time": None}), "expected time as int"),
    "refused": (faults.ret_code(10001, "params error"), "retCode 10001: params error"),
}
OF_OTHERS: dict[str, tuple[Spoil, str]] = {
    "another symbol": (faults.result(of_another_symbol), "received those of 'BTCUSDT'"),
    "another category": (faults.result(lambda page: page | {"category": "spot"}), "expected category linear"),
    "every minute": (faults.rows(every(1)), "received them 1 minutes apart"),
    "every 5 minutes": (faults.rows(every(5)), "received them 5 minutes apart"),
    "every hour": (faults.rows(every(60)), "received them 60 minutes apart"),
}
FALSE = [pytest.param(*spoiled, marks=pytest.mark.fault("D10"), id=name) for name, spoiled in NO_ANSWERS.items()] + [
    pytest.param(*spoiled, marks=pytest.mark.fault("D12"), id=name) for name, spoiled in OF_OTHERS.items()
]


@pytest.mark.parametrize(("spoil", "message"), FALSE)
def test_page_that_is_none_is_named_and_harms_no_other(own: Stage, few: Tables, spoil: Spoil, message: str) -> None:
    """The third page of one symbol is spoiled for ever; all others are stored, and nothing of that one is."""

    async def third(request: web.Request, honest: Honest) -> web.StreamResponse:
        return await (spoil(request, honest) if request.query["start"] == str(bar_ms(2 * PAGE)) else honest())

    script = Faults()
    script.add(third, path="kline", symbol="AAUSDT", times=None)
    summary = run_few(own.engine, script)
    assert list(summary.failed) == ["AAUSDT"]
    assert "candles of AAUSDT from 2024-01-12 08:00" in summary.failed["AAUSDT"]
    assert message in summary.failed["AAUSDT"]
    if "retCode" not in message:
        assert "/v5/market/kline" in summary.failed["AAUSDT"]
    tables = own.tables()
    page = {row for row in bars_of(few, "AAUSDT") if bar_ms(2 * PAGE) <= to_ms(row[1]) < bar_ms(3 * PAGE)}
    assert bars_of(tables, "AAUSDT") == bars_of(few, "AAUSDT") - page
    assert tables["raw_market_data"] == few["raw_market_data"] - page
    gaps = {(row[0], to_ms(row[1]), row[2], row[3]) for row in tables["candle_gaps"] - few["candle_gaps"]}
    assert gaps == {("AAUSDT", bar_ms(2 * PAGE), PAGE, "not_yet_fetched")}


@pytest.mark.fault("D10")
def test_pages_that_were_none_come_with_the_next_run(own: Stage, few: Tables) -> None:
    script = Faults()
    script.add(NO_ANSWERS["HTML"][0], path="kline", symbol="AAUSDT", skip=4, times=None)
    script.add(NO_ANSWERS["HTML"][0], path="funding", symbol="DDUSDT", times=None)
    assert set(run_few(own.engine, script).failed) == {*FEW}
    assert_part_of({name: own.tables()[name] for name in ("raw_market_data", "funding_rates")}, few)
    assert run_few(own.engine).failed == {}
    assert_same_tables(own.tables(), few)


@pytest.mark.fault("D10", "D12")
def test_answers_that_are_none_once_are_asked_for_again(own: Stage, undisturbed: Tables) -> None:
    script = Faults()
    spoils = [spoil for spoil, message in [*NO_ANSWERS.values(), *OF_OTHERS.values()] if "retCode" not in message]
    rules = [script.add(spoil, path="kline", skip=skip) for skip, spoil in enumerate(spoils)]
    assert run(own.engine, script).failed == {}
    assert_same_tables(own.tables(), undisturbed)
    assert [rule.fired for rule in rules] == [1] * len(rules)


# --- D11: rows that cannot be -----------------------------------------------------------------------------------------


def with_cell(column: int, cell: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda row: [*row[:column], cell, *row[column + 1 :]]


IMPOSSIBLE: dict[str, tuple[Callable[[list[Any]], list[Any]], str]] = {
    "NaN": (with_cell(4, "NaN"), "expected a number as text, received 'NaN'"),
    "infinite": (with_cell(2, "Infinity"), "expected a number as text, received 'Infinity'"),
    "1e999": (with_cell(2, "1e999"), "expected a number as text, received '1e999'"),
    "1e308": (with_cell(2, "1e308"), "a number is beyond any market"),
    "empty": (with_cell(1, ""), "expected a number as text, received ''"),
    "null": (with_cell(1, None), "expected a number as text, received None"),
    "a JSON number": (with_cell(4, 100.5), "expected a number as text, received 100.5"),
    "negative": (with_cell(3, "-1"), "a price is not above zero"),
    "zero": (with_cell(1, "0"), "a price is not above zero"),
    "negative volume": (with_cell(5, "-0.001"), "volume or turnover is negative"),
    "high below low": (
        lambda row: [row[0], row[1], row[3], row[2], *row[4:]],
        "open or close lies outside low to high",
    ),
    "six fields": (lambda row: row[:6], "expected 7 fields, received 6"),
    "off the grid": (lambda row: [str(int(row[0]) + 1), *row[1:]], "its start is not on the grid of the interval"),
}


@pytest.mark.fault("D11")
def test_rows_that_cannot_be_are_recorded_reported_and_left_out(own: Stage, few: Tables) -> None:
    """Three neighbouring bars of each kind, the second and third kind next to one another."""
    broken = {
        bar_ms(bar + (390 * kind if kind != 2 else 393)): IMPOSSIBLE[name]
        for kind, name in enumerate(IMPOSSIBLE)
        for bar in (0, 1, 2)
    }

    def edit(rows: Rows) -> Rows:
        return [broken[int(row[0])][0](row) if int(row[0]) in broken else row for row in rows]

    script = Faults()
    script.add(faults.rows(edit), path="kline", symbol="AAUSDT", times=None)
    summary = run_few(own.engine, script)
    found = {row.open_time_ms // STEP_MS * STEP_MS: row.reason for row in summary.rejected}
    assert found == {time_ms: reason for time_ms, (_, reason) in broken.items()}
    assert len(summary.rejected) == len(broken)
    assert summary.failed == {}
    tables = own.tables()
    left_out = {row for row in bars_of(few, "AAUSDT") if to_ms(row[1]) in broken}
    assert len(left_out) == len(broken)
    assert tables["raw_market_data"] == few["raw_market_data"] - left_out
    gaps = {(to_ms(first), bars, cause, reason) for _, first, bars, cause, reason in tables["candle_gaps"]}
    for time_ms in [*broken][::3]:
        assert (time_ms, 3, "rejected_row", broken[time_ms][1]) in gaps
    assert len(gaps) == len(few["candle_gaps"]) + len(IMPOSSIBLE)
    run_few(own.engine, verify=True)
    assert_same_tables(own.tables(), few)


@pytest.mark.fault("D11")
def test_row_that_comes_twice_with_different_values_is_left_out(own: Stage, few: Tables) -> None:
    def edit(rows: Rows) -> Rows:
        return rows + [with_cell(5, "12345")(row) for row in rows if int(row[0]) == bar_ms(77)]

    script = Faults()
    script.add(faults.rows(edit), path="kline", symbol="AAUSDT", times=None)
    (rejected,) = run_few(own.engine, script).rejected
    assert (rejected.open_time_ms, rejected.reason) == (bar_ms(77), "listed twice with different values")
    run_few(own.engine, verify=True)
    assert_same_tables(own.tables(), few)


# --- D14: clocks ------------------------------------------------------------------------------------------------------


@pytest.mark.fault("D14")
@pytest.mark.parametrize("hours", [-1, 12])
def test_clock_of_this_machine_that_is_hours_off_changes_nothing(own: Stage, few: Tables, hours: int) -> None:
    watch = Watch()
    run_few(own.engine, watch=watch, local_time_ms=NOW + hours * 3_600_000)
    assert_same_tables(own.tables(), few)
    (notice,) = watch.notices
    assert "this machine's clock says" in notice
    assert "the exchange's is used" in notice


@pytest.mark.fault("D14")
@pytest.mark.parametrize("days", [-2, 400])
def test_clock_that_is_days_off_stops_before_anything_is_stored(own: Stage, days: int) -> None:
    with pytest.raises(
        SetupError, match="one of them is wrong; set this machine's clock, or correct exchange.rest_url"
    ):
        run_few(own.engine, local_time_ms=NOW + days * DAY_MS)
    assert not any(own.tables().values())


@pytest.mark.fault("D14")
@pytest.mark.parametrize("zone", ["Asia/Almaty", "Asia/Kathmandu"])
def test_time_zone_of_machine_and_database_changes_nothing(
    own: Stage, few: Tables, monkeypatch: pytest.MonkeyPatch, zone: str
) -> None:
    """Almaty set its clocks back by an hour in the last night of the span."""
    with own.engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        connection.execute(text(f"ALTER DATABASE {own.engine.url.database} SET timezone TO '{zone}'"))
    own.engine.dispose()
    with monkeypatch.context() as patch:
        patch.setenv("TZ", zone)
        time.tzset()
        run_few(own.engine)
    time.tzset()
    with own.engine.execution_options(isolation_level="AUTOCOMMIT").connect() as connection:
        connection.execute(text(f"ALTER DATABASE {own.engine.url.database} RESET timezone"))
    own.engine.dispose()
    assert_same_tables(own.tables(), few)


@pytest.mark.fault("D14")
@pytest.mark.parametrize("away_ms", [-400 * DAY_MS, -3_600_000, DAY_MS])
def test_answers_with_a_time_that_is_off_are_asked_for_again(own: Stage, few: Tables, away_ms: int) -> None:
    """By the time of an answer it is told which candles are closed: a wrong one must not make them disappear."""
    script = Faults()
    lying = faults.envelope(lambda whole: whole | {"time": whole["time"] + away_ms})
    rules = [script.add(lying, path="kline", symbol=symbol, skip=skip) for symbol in FEW for skip in (0, 3)]
    run_few(own.engine, script)
    assert [rule.fired for rule in rules] == [1] * len(rules)
    assert_same_tables(own.tables(), few)


@pytest.mark.fault("D14")
def test_answers_whose_time_is_always_behind_what_was_asked_prove_no_gap(own: Stage, few: Tables) -> None:
    """The exchange said first that these bars are closed, then that they are not: neither is an outage."""
    script = Faults()
    lying = faults.envelope(lambda whole: whole | {"time": START + 500 * STEP_MS})
    rule = script.add(lying, path="kline", symbol="AAUSDT", times=None)
    summary = run_few(own.engine, script)
    assert rule.fired
    assert list(summary.failed) == ["AAUSDT"]
    assert_part_of({"raw_market_data": own.tables()["raw_market_data"]}, few)
    assert {row[3] for row in own.tables()["candle_gaps"] - few["candle_gaps"]} == {"not_yet_fetched"}
    run_few(own.engine)
    assert_same_tables(own.tables(), few)


# --- D17: signals -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def slow_exchange() -> Iterator[tuple[Address, Faults]]:
    script = Faults()
    with serve_in_thread(SmallMarket(), SteppedClock(NOW), faults=script, ip_limit=False) as address:
        yield address, script


@pytest.mark.fault("D17")
@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_signal_in_the_middle_of_pages_ends_it_and_the_next_run_completes(
    postgres: DatabaseAddress,
    slow_exchange: tuple[Address, Faults],
    undisturbed: Tables,
    tmp_path: Path,
    number: signal.Signals,
    code: int,
    word: str,
) -> None:
    address, script = slow_exchange
    section = {"environment": "local", "rest_url": address.rest_url, "ws_url": address.ws_url}
    with stage(postgres, tmp_path, section) as own:
        held = script.add(faults.delay(60.0), path="kline", skip=9, times=None)
        process = own.start()
        deadline = time.monotonic() + 60
        while held.fired < 4 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)  # between two looks
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
        held.times = 0
        assert process.returncode == code, errors
        assert errors.strip() == f"error: {word}; run the same command again to go on"
        assert_part_of(own.tables(), undisturbed)
        assert own.rows() < len(undisturbed["raw_market_data"])
        result = own.run()
        assert result.exit_code == 0, result.stderr
        assert_same_tables(own.tables(), undisturbed)


# --- everything at once -----------------------------------------------------------------------------------------------


class Storm:
    """Spoils a third of all answers, each kind as often as any other, but none more than twice in a row."""

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self._spoils = [
            *BROKEN.values(),
            *(spoil for spoil, message in NO_ANSWERS.values() if "retCode" not in message),
        ]
        self._in_a_row: Counter[str] = Counter()
        self.spoiled = 0

    async def __call__(self, request: web.Request, honest: Honest) -> web.StreamResponse:
        if self._in_a_row[request.path_qs] == 2 or self._random.random() > 1 / 3:
            self._in_a_row[request.path_qs] = 0
            return await honest()
        self._in_a_row[request.path_qs] += 1
        self.spoiled += 1
        return await self._spoils[self._random.integers(len(self._spoils))](request, honest)


@pytest.mark.fault("D01", "D10")
@pytest.mark.soak(25)
def test_storm_over_a_small_market_changes_nothing(own: Stage, undisturbed: Tables, seed: int) -> None:
    script, storm = Faults(), Storm(seed)
    script.add(storm, times=None)
    run(own.engine, script)
    assert_same_tables(own.tables(), undisturbed)
    assert storm.spoiled > 10


@needs_recorded
@pytest.mark.fault("D01", "D10")
@pytest.mark.soak(5)
def test_storm_over_recorded_candles_changes_nothing(own: Stage, seed: int) -> None:
    """Bybit's own candles of 2024, one symbol of which begins in the span."""
    market = RecordedMarket(CANDLES / "bybit_linear_15m_2024")
    first_ms, end_ms = to_ms(parse_time("2024-11-25T00:00Z")), to_ms(parse_time("2024-12-30T00:00Z"))
    script, storm = Faults(), Storm(seed)
    script.add(storm, times=None)
    summary = run(own.engine, script, market=market, now_ms=end_ms + 60_000, symbols=market.symbols, from_ms=first_ms)
    assert (summary.start_ms, summary.end_ms) == (first_ms, end_ms)
    assert storm.spoiled
    stored: dict[str, set[tuple[Any, ...]]] = {symbol: bars_of(own.tables(), symbol) for symbol in market.symbols}
    for symbol in market.symbols:
        whole = market.candles(symbol)
        truth = whole[(whole.open_time_ms >= first_ms) & (whole.open_time_ms < end_ms)]
        assert stored[symbol] == {
            (symbol, from_ms(row.open_time_ms), row.open, row.high, row.low, row.close, row.volume, row.turnover)
            for row in truth.candles(symbol)
        }
    causes = {(row[0], row[3]) for row in own.tables()["candle_gaps"]}
    assert causes == {("SOLUSDT", "not_listed_yet")}
