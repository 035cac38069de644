"""The REST client against a scripted server on loopback, in warped time and with the constants as they are: what it
asks, what it believes, when it asks again and when no more."""

import asyncio
import gzip
import json
import socket
from collections.abc import Awaitable, Callable
from decimal import Decimal
from typing import Any, TypeVar

import numpy as np
import pytest
from aiohttp import web

from perpcast.errors import (
    ConfigError,
    DataError,
    ExchangeUnavailableError,
    RefusedError,
    TemporaryExchangeError,
)
from perpcast.exchange import PAGE_BARS, BybitClient, KeyRights, RateLimit, hosts_of
from perpcast.exchange import client as client_module
from perpcast.exchange.client import BAN_SECONDS
from perpcast.exchange.wire import parse_key_rights
from perpcast.market import USDT_PERPETUAL, Listing, Ticker
from perpcast.simulator import faults
from perpcast.simulator.faults import Spoil
from tests import warp

STEP_MS = 900_000
HOUR_MS = 3_600_000
T0 = 1_700_000_100_000 // STEP_MS * STEP_MS
NOW = T0 + 10_000 * STEP_MS
MINUTE = 60.0

# What the client promises: tries until it gives up, where it was never answered, and where the answers make no sense.
TRIES, TRIES_UNANSWERED, TRIES_MALFORMED = 12, 3, 4

Value = TypeVar("Value")
Question = Callable[[BybitClient], Awaitable[Value]]


def envelope(result: Any, code: Any = 0, message: Any = "OK", now_ms: Any = NOW, **headers: str) -> Spoil:
    body = {"retCode": code, "retMsg": message, "result": result, "retExtInfo": {}, "time": now_ms}
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    return faults.status(200, json.dumps(body).encode(), {"Content-Type": "application/json"} | names)


def row(bar: float, *, open_: str = "10", high: str = "12", low: str = "9", close: str = "11") -> list[str]:
    return [str(T0 + int(bar * STEP_MS)), open_, high, low, close, "5", "55"]


def kline(*rows: Any, symbol: Any = "BTCUSDT", **fields: Any) -> Spoil:
    return envelope({"category": "linear", "symbol": symbol, "list": list(rows)} | fields)


GOOD = kline(row(0))


def hang_up() -> Spoil:
    """Half of the body, then the end of the connection."""

    async def spoil(request: web.Request, honest: faults.Honest) -> web.StreamResponse:
        answer = web.StreamResponse()
        answer.content_length = 100
        await answer.prepare(request)
        await answer.write(b"{" * 50)
        assert request.transport is not None
        request.transport.close()
        return answer

    return spoil


class Exchange:
    """Gives its answers one after the other, the last one again and again; notes what was asked, and when.

    As Bybit does, it answers a GET that has a body with 403.
    """

    def __init__(self, *answers: Spoil) -> None:
        self._answers = answers
        self.requests: list[web.Request] = []
        self.times: list[float] = []
        self.notices: list[str] = []
        self.client: BybitClient

    async def respond(self, request: web.Request) -> web.StreamResponse:
        if request.body_exists or request.method != "GET":
            return web.Response(status=403, text="GET with a body")
        self.requests.append(request)
        self.times.append(asyncio.get_running_loop().time())
        return await self.answer(request)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        async def honest() -> web.StreamResponse:
            return await GOOD(request, honest)

        return await self._answers[min(len(self.requests), len(self._answers)) - 1](request, honest)

    def ask(self, question: Question[Value], **options: Any) -> Value:
        """What comes of `question`, asked through a client of these options."""
        return warp.run(self._converse(question, options))

    async def open(self, port: int = 0) -> web.AppRunner:
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", self.respond)
        runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port).start()
        return runner

    async def _converse(self, question: Question[Value], options: dict[str, Any]) -> Value:
        runner = await self.open()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        settings: dict[str, Any] = {"jitter": np.random.default_rng(1), "on_notice": self.notices.append} | options
        try:
            async with BybitClient(url, **settings) as self.client:
                return await question(self.client)
        finally:
            await runner.cleanup()


def candles(client: BybitClient, bars: int = 4) -> Awaitable[Any]:
    return client.fetch_candles("BTCUSDT", "15", T0, T0 + bars * STEP_MS)


async def twice(client: BybitClient) -> Any:
    """Candles, by a client that knows that the host answers."""
    await candles(client)
    return await candles(client)


# --- candles ----------------------------------------------------------------------------------------------------------


def test_fetch_candles_asks_with_limit_and_inclusive_end() -> None:
    exchange = Exchange(GOOD)
    exchange.ask(candles)
    assert exchange.requests[0].path_qs == (
        f"/v5/market/kline?category=linear&symbol=BTCUSDT&interval=15&start={T0}&end={T0 + 4 * STEP_MS - 1}&limit=1000"
    )
    assert exchange.client.requests == 1


@pytest.mark.parametrize(
    "rows",
    [
        [row(3), row(2), row(1), row(0), row(-1)],  # as Bybit does, with a row before the start
        [row(0), row(1), row(2), row(3), row(4)],
        [row(2), row(0), row(3), row(1)],
        [row(1), row(0), row(3), row(2), row(1), row(0)],
    ],
)
def test_fetch_candles_in_any_order_are_the_window_oldest_first(rows: list[list[str]]) -> None:
    page = Exchange(kline(*rows)).ask(candles)
    assert page.candles.open_time_ms.tolist() == [T0 + bar * STEP_MS for bar in range(4)]
    assert page.candles.close.tolist() == [11.0] * 4
    assert page.rejected == ()
    assert page.server_time_ms == NOW


@pytest.mark.parametrize(("age_ms", "bars"), [(STEP_MS - 1, 2), (STEP_MS, 3)])
def test_fetch_candles_running_candle_is_dropped_by_server_time(age_ms: int, bars: int) -> None:
    result = {"category": "linear", "symbol": "BTCUSDT", "list": [row(2), row(1), row(0)]}
    now_ms = T0 + 2 * STEP_MS + age_ms  # bar 2 is closed one interval after its open, not a millisecond before
    page = Exchange(envelope(result, now_ms=now_ms)).ask(candles)
    assert len(page.candles) == bars


BROKEN_ROWS: list[tuple[list[Any], str]] = [
    (row(1, low="11.5"), "outside low to high"),
    (row(1, high="10.5"), "outside low to high"),
    (row(1, high="8", low="13"), "outside low to high"),
    (row(1, low="-1"), "not above zero"),
    (row(1, open_="0"), "not above zero"),
    (row(1, high="1e308"), "beyond any market"),
    (row(1, low="1e-300"), "beyond any market"),
    ([*row(1)[:5], "1e308", "55"], "beyond any market"),
    (row(1, close=""), "expected a number"),
    (row(1, close="nan"), "expected a number"),
    (row(1, close="1e999"), "expected a number"),
    (row(1, close="1_1"), "expected a number"),
    (row(1, close=" 11"), "expected a number"),
    (row(1, close="11\n"), "expected a number"),
    (row(1, close="\u0661\u0661"), "expected a number"),
    (row(1, close="9" * 4000), "expected a number"),
    ([*row(1)[:4], 11.0, "5", "55"], "expected a number"),
    ([*row(1)[:4], None, "5", "55"], "expected a number"),
    (row(1)[:5], "expected 7 fields"),
    ([*row(1), "1"], "expected 7 fields"),
    ([str(T0 + STEP_MS + 1), *row(1)[1:]], "not on the grid"),
    ([*row(1)[:5], "-5", "55"], "negative"),
    ([*row(1)[:6], "-55"], "negative"),
]


@pytest.mark.fault("D11")
@pytest.mark.parametrize(("bad", "reason"), BROKEN_ROWS)
def test_fetch_candles_bad_row_is_rejected_alone(bad: list[Any], reason: str) -> None:
    page = Exchange(kline(row(2), bad, row(0))).ask(candles)
    assert page.candles.open_time_ms.tolist() == [T0, T0 + 2 * STEP_MS]
    (rejected,) = page.rejected
    assert rejected.open_time_ms == int(bad[0])
    assert reason in rejected.reason
    assert len(rejected.reason) < 200


@pytest.mark.fault("D11")
def test_fetch_candles_row_twice_alike_counts_once_and_unlike_is_rejected() -> None:
    page = Exchange(kline(row(1), row(1), row(0), row(0, close="10"))).ask(candles)
    assert page.candles.open_time_ms.tolist() == [T0 + STEP_MS]
    assert page.rejected[0].reason == "listed twice with different values"


@pytest.mark.parametrize(
    "unusual",
    [
        row(1, open_="10", high="18", low="2", close="2"),  # a large move
        [*row(1, open_="10", high="10", low="10", close="10")[:5], "0", "0"],  # no trade
        row(1, open_="1e1", close="1.1E+1"),
        row(1, open_="10.000000000000000000000000001"),
    ],
)
def test_fetch_candles_unusual_but_possible_row_is_kept(unusual: list[str]) -> None:
    page = Exchange(kline(unusual, row(0))).ask(candles)
    assert len(page.candles) == 2
    assert page.candles.open[1] == 10


@pytest.mark.fault("D12")
@pytest.mark.parametrize(
    ("minutes", "bars"), [(1, 4), (5, 1), (5, 4), (5, 1000), (14, 20), (30, 18), (60, 40), (240, 1000)]
)
def test_fetch_candles_of_another_interval_are_refused(minutes: int, bars: int) -> None:
    rows = [row(quarter / 15) for quarter in range(0, bars * 15, minutes)][:1000]
    exchange = Exchange(kline(*rows[::-1]))
    with pytest.raises(DataError, match=f"BTCUSDT every 15 minutes, received them {minutes} minutes apart"):
        exchange.ask(lambda client: candles(client, bars))
    assert len(exchange.requests) == TRIES_MALFORMED


def test_fetch_candles_with_outages_are_not_taken_for_another_interval() -> None:
    bars = [0, 1, *range(20, 900, 40)]
    page = Exchange(kline(*[row(bar) for bar in reversed(bars)])).ask(lambda client: candles(client, 1000))
    assert len(page.candles) == len(bars)


LONG = faults.body(b" " * (17 << 20))
UNPACKED_LONG = faults.status(200, gzip.compress(b" " * (64 << 20), 1), {"Content-Encoding": "gzip"})
MALFORMED: list[Spoil] = [
    faults.body(b"<html>busy</html>"),
    faults.body(b'{"retCode":0,'),
    faults.body(b""),
    faults.body(b"\xff\xfe"),
    faults.body(b"[" * 1_000_000),
    faults.body(b'{"retCode":' + b"[" * 1000 + b"]" * 1000 + b"}"),
    LONG,
    UNPACKED_LONG,
    faults.truncated_gzip(),
    faults.body(b"[]"),
    envelope([]),
    envelope({"symbol": "BTCUSDT"}),
    kline(list={}),
    kline("1234567"),
    kline([]),
    kline(["yesterday", *row(0)[1:]]),
    kline(["9" * 400, *row(0)[1:]]),
    kline([str(T0) + "_0", *row(0)[1:]]),
    kline([T0, *row(0)[1:]]),
    envelope({"symbol": "BTCUSDT", "list": []}, code="0"),
    envelope({"symbol": "BTCUSDT", "list": []}, code=False),
    envelope({"symbol": "BTCUSDT", "list": []}, code=None),
    envelope({"symbol": "BTCUSDT", "list": []}, now_ms=None),
    envelope({"symbol": "BTCUSDT", "list": []}, now_ms=str(NOW)),
    envelope({"symbol": "BTCUSDT", "list": []}, now_ms=-1),
    envelope({"symbol": "BTCUSDT", "list": []}, now_ms=NOW * 1000),
]
OF_ANOTHER_QUESTION: list[Spoil] = [
    kline(row(0), symbol="ETHUSDT"),
    kline(row(0), symbol=None),
    kline(row(0), category="spot"),
]


@pytest.mark.parametrize(
    "answer",
    [
        *(pytest.param(answer, marks=pytest.mark.fault("D10")) for answer in MALFORMED),
        *(pytest.param(answer, marks=pytest.mark.fault("D12")) for answer in OF_ANOTHER_QUESTION),
    ],
)
def test_fetch_candles_malformed_answer_is_asked_again_then_named(answer: Spoil) -> None:
    exchange = Exchange(answer, GOOD)
    assert len(exchange.ask(candles).candles) == 1
    assert (len(exchange.requests), exchange.client.retries) == (2, 1)
    exchange = Exchange(answer)
    named = r"candles of BTCUSDT from 2023-11-14 22:15 \(http://127.0.0.1:\d+/v5/market/kline\): .*after 4 tries"
    with pytest.raises(DataError, match=named) as malformed:
        exchange.ask(candles)
    assert len(exchange.requests) == TRIES_MALFORMED
    assert len(str(malformed.value)) < 500


@pytest.mark.fault("D10")
@pytest.mark.parametrize("spoil", [LONG, UNPACKED_LONG])
def test_fetch_answer_that_is_longer_than_any_is_not_read_to_its_end(spoil: Spoil) -> None:
    with pytest.raises(DataError, match="expected at most 16 MiB, the answer is longer"):
        Exchange(spoil).ask(candles, attempts=1)


@pytest.mark.fault("D14")
def test_fetch_candles_answer_out_of_the_past_is_asked_for_again() -> None:
    """By its time the candles would not be closed yet, and be missing."""
    page = {"category": "linear", "symbol": "BTCUSDT", "list": [row(0)]}
    past = envelope(page, now_ms=NOW - 60_001)
    exchange = Exchange(GOOD, past, GOOD)
    assert exchange.ask(twice).server_time_ms == NOW
    assert len(exchange.requests) == 3
    exchange = Exchange(GOOD, past)
    assert exchange.ask(twice).server_time_ms == NOW - 60_001  # it says so again: the one before was wrong
    exchange = Exchange(GOOD, envelope(page, now_ms=NOW - 60_000))
    exchange.ask(twice)
    assert len(exchange.requests) == 2  # as two hosts may differ


@pytest.mark.parametrize("bars", [0, PAGE_BARS + 1])
def test_fetch_candles_window_that_one_answer_cannot_hold_raises(bars: int) -> None:
    with pytest.raises(ValueError, match="1 to 1000 bars"):
        Exchange(GOOD).ask(lambda client: candles(client, bars))


# --- when it asks again -----------------------------------------------------------------------------------------------

TEMPORARY: dict[str, Spoil] = {
    "HTTP 500": faults.status(500),
    "HTTP 502": faults.status(502, b"<html>"),
    "HTTP 429": faults.status(429),
    "retCode 429: Too many": envelope({}, 429, "Too many"),
    "retCode 10000: Server Timeout": envelope({}, 10000, "Server Timeout"),
    "retCode 10006: Too many visits": envelope({}, 10006, "Too many visits"),
    "retCode 10016: server error": envelope(None, 10016, "server error"),
    "retCode 10018: Exceeded": envelope({}, 10018, "Exceeded"),
    "broke off": faults.reset(after_bytes=40),
    "broke off or": hang_up(),
    "cannot be unpacked": faults.status(200, b"no gzip", {"Content-Encoding": "gzip"}),
}
UNANSWERED: dict[str, Spoil] = {
    "": faults.reset(),
    "no answer within 15 s": faults.delay(20.0),
}


@pytest.mark.parametrize("reason", [*TEMPORARY, *UNANSWERED])
def test_fetch_that_fails_in_passing_is_asked_again(reason: str) -> None:
    answer = (TEMPORARY | UNANSWERED)[reason]
    exchange = Exchange(answer, answer, GOOD)
    assert len(exchange.ask(candles).candles) == 1
    assert len(exchange.requests) == 3


@pytest.mark.parametrize("reason", TEMPORARY)
def test_fetch_that_fails_for_minutes_ends_with_its_reason(reason: str) -> None:
    exchange = Exchange(GOOD, TEMPORARY[reason])
    with pytest.raises(TemporaryExchangeError, match=rf"candles of BTCUSDT.*{reason}.*after {TRIES} tries.*again"):
        exchange.ask(twice)
    assert len(exchange.requests) == 1 + TRIES
    pauses = np.diff(exchange.times[1:])
    longest = np.minimum(0.25 * 2.0 ** np.arange(TRIES - 1), 30.0)
    assert (pauses >= longest / 2).all()
    assert (pauses <= longest + 0.1).all()
    assert len(set(pauses / longest)) > 5  # jittered
    assert sum(longest / 2) > MINUTE


@pytest.mark.parametrize("reason", UNANSWERED)
def test_fetch_not_answered_any_more_ends_as_unreachable(reason: str) -> None:
    exchange = Exchange(GOOD, UNANSWERED[reason])
    with pytest.raises(ExchangeUnavailableError, match=f"gave no answer after {TRIES} tries.*{reason}.*check the net"):
        exchange.ask(twice)
    assert len(exchange.requests) == 1 + TRIES
    assert [notice for notice in exchange.notices if "it is asked again and again" in notice] == exchange.notices
    assert len(exchange.notices) == 1


@pytest.mark.parametrize("reason", UNANSWERED)
def test_fetch_never_answered_ends_soon(reason: str) -> None:
    exchange = Exchange(UNANSWERED[reason])
    with pytest.raises(ExchangeUnavailableError, match=f"gave no answer after {TRIES_UNANSWERED} tries"):
        exchange.ask(candles)
    assert len(exchange.requests) == TRIES_UNANSWERED


def test_fetch_outage_of_a_minute_is_survived() -> None:
    """Nothing listens for a minute, then again on the same port."""

    exchange = Exchange(GOOD)

    async def run() -> float:
        runner = await exchange.open()
        port = runner.addresses[0][1]
        async with BybitClient(f"http://127.0.0.1:{port}", jitter=np.random.default_rng(1)) as client:
            await candles(client)
            await runner.cleanup()
            asked = asyncio.create_task(twice(client))
            await asyncio.sleep(MINUTE)
            runner = await exchange.open(port)
            await asked
        await runner.cleanup()
        return asyncio.get_running_loop().time()

    assert warp.run(run()) < 2 * MINUTE
    assert len(exchange.requests) == 3


def test_fetch_is_told_of_a_long_failure_once_and_of_the_next_one_again() -> None:
    async def question(client: BybitClient) -> None:
        for _ in range(3):
            await candles(client)

    trouble = [faults.status(500)] * 7
    exchange = Exchange(GOOD, *trouble, GOOD, *trouble, GOOD)
    exchange.ask(question)
    assert [notice.partition(": ")[2] for notice in exchange.notices] == [
        f"HTTP 500 from {exchange.client._rest_url}; it is asked again and again"
    ] * 2


@pytest.mark.parametrize(
    ("retry_after", "seconds"),
    [
        ("1", 1),
        ("7", 7),
        ("3600", 60),
        ("9" * 4000, 60),
        ("0", 0),
        ("-5", 0),
        ("1.5", 0),
        ("1e3", 0),
        ("soon", 0),
        ("", 0),
        ("Wed, 21 Oct 2026 07:28:00 GMT", 0),
    ],
)
@pytest.mark.parametrize("code", [429, 503])
def test_fetch_retry_after_is_waited_for(retry_after: str, seconds: float, code: int) -> None:
    exchange = Exchange(faults.status(code, headers={"Retry-After": retry_after}), GOOD)
    exchange.ask(candles)
    (pause,) = np.diff(exchange.times)
    assert max(seconds, 0.125) <= pause < seconds + 0.3


@pytest.mark.fault("D03")
@pytest.mark.parametrize(
    ("reset", "seconds"),
    [
        (str(NOW + 5_000), 5),
        (str(NOW + 1), 0),
        (str(NOW), 0),
        (str(NOW - 5_000), 0),
        ("0", 0),
        (str(NOW + 86_400_000_000), 60),
        ("9" * 4000, 60),
        ("soon", 0),
        ("-1", 0),
        ("1.7e12", 0),
        ("", 0),
    ],
)
def test_fetch_beyond_a_quota_waits_until_it_is_filled_again(reset: str, seconds: float) -> None:
    exchange = Exchange(envelope({}, 10006, "Too many visits", X_Bapi_Limit_Reset_Timestamp=reset), GOOD)
    exchange.ask(candles)
    (pause,) = np.diff(exchange.times)
    assert max(seconds, 0.125) <= pause < seconds + 0.3


@pytest.mark.parametrize("now_ms", [None, str(NOW), 0.5, True, -(10**15)])
def test_fetch_beyond_a_quota_without_a_time_that_can_be_pauses_like_others(now_ms: Any) -> None:
    full = envelope({}, 10006, "Too many visits", now_ms, X_Bapi_Limit_Reset_Timestamp=str(NOW))
    exchange = Exchange(full, GOOD)
    exchange.ask(candles)
    assert exchange.times[1] - exchange.times[0] < 61


@pytest.mark.fault("D03")
def test_fetch_beyond_a_quota_holds_all_others_back_as_well() -> None:
    async def question(client: BybitClient) -> None:
        async with asyncio.TaskGroup() as group:
            for seconds in (0.0, 1.0, 2.0, 20.0):
                group.create_task(after(seconds, client))

    async def after(seconds: float, client: BybitClient) -> None:
        await asyncio.sleep(seconds)
        await candles(client)

    full = envelope({}, 10006, "Too many visits", X_Bapi_Limit_Reset_Timestamp=str(NOW + 5_000))
    exchange = Exchange(full, GOOD)
    exchange.ask(question)
    assert len(exchange.times) == 5
    assert sorted(exchange.times)[1] >= exchange.times[0] + 5
    assert exchange.times[-1] >= 20


@pytest.mark.fault("D03")
def test_fetch_beyond_a_quota_that_is_prolonged_meanwhile_waits_on() -> None:
    class Twice(Exchange):
        async def answer(self, request: web.Request) -> web.StreamResponse:
            seconds = {1: 5, 2: 20}.get(len(self.requests))
            if seconds is None:
                return await super().answer(request)
            await asyncio.sleep(len(self.requests) - 1.0)
            full = envelope({}, 10006, "Too many visits", X_Bapi_Limit_Reset_Timestamp=str(NOW + seconds * 1000))
            return await full(request, lambda: self.answer(request))

    async def question(client: BybitClient) -> None:
        async def third() -> None:
            await asyncio.sleep(0.5)
            await candles(client)

        await asyncio.gather(candles(client), candles(client), third())

    exchange = Twice(GOOD)
    exchange.ask(question)
    assert len(exchange.times) == 5
    assert exchange.times[:2] == pytest.approx([0, 0], abs=0.1)
    assert exchange.times[2] >= 21


@pytest.mark.parametrize(
    ("answer", "code", "message"),
    [
        (envelope({}, 10001, "Not supported symbols"), 10001, "retCode 10001: Not supported symbols"),
        (envelope({}, 10003, "API key is invalid."), 10003, "retCode 10003: API key is invalid."),
        (envelope({}, 10029, None), 10029, "retCode 10029"),
        (envelope({}, -1, {"a": 1}), -1, "retCode -1"),
        (envelope({}, 10001, "a\nb\r\n\tc" + 1_000_000 * "d"), 10001, "retCode 10001: a b c"),
        (faults.body(b'{"retCode":7,"retMsg":' + b"[" * 1000 + b"]" * 1000 + b"}"), 7, "retCode 7"),
        (faults.status(401), 401, "HTTP 401 .*is exchange.rest_url a Bybit host"),
        (faults.status(404, b"<html>"), 404, "HTTP 404"),
        (faults.status(302, headers={"Location": "https://example.invalid/"}), 302, "HTTP 302"),
    ],
)
def test_fetch_refusal_is_not_asked_again(answer: Spoil, code: int, message: str) -> None:
    exchange = Exchange(answer, GOOD)
    with pytest.raises(RefusedError, match=f"^candles of BTCUSDT from 2023-11-14 22:15: .*{message}") as refused:
        exchange.ask(candles)
    assert refused.value.code == code
    assert len(exchange.requests) == 1
    assert len(str(refused.value)) < 500
    assert str(refused.value).isprintable()


def test_fetch_nothing_listens_is_unreachable_with_exit_code_2() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"

    async def run() -> None:
        async with BybitClient(url, jitter=np.random.default_rng(1), attempts=2) as client:
            await client.fetch_server_time_ms()

    with pytest.raises(
        ExchangeUnavailableError, match=f"exchange unreachable: {url} gave no answer after 2 tries"
    ) as unreachable:
        warp.run(run())
    assert unreachable.value.exit_code == 2


@pytest.mark.parametrize(
    "url", ["http://", "http://no host", "http://a..b", "http://" + "a" * 70 + ".com", "http://bücher.invalid", "x"]
)
def test_fetch_from_what_is_no_host_is_a_setup_error(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "TIMEOUT_SECONDS", 5.0)

    async def run() -> None:
        async with BybitClient(url, jitter=np.random.default_rng(1), attempts=1) as client:
            await client.fetch_server_time_ms()

    with pytest.raises((ConfigError, ExchangeUnavailableError)):
        asyncio.run(run())


# --- 403 --------------------------------------------------------------------------------------------------------------


class Banning(Exchange):
    """Turns everything away with 403 during these stretches of the loop's clock; all else is `seconds` in coming."""

    def __init__(self, *bans: tuple[float, float], seconds: float = 0.0) -> None:
        super().__init__(GOOD)
        self._bans, self._seconds = bans, seconds

    async def answer(self, request: web.Request) -> web.StreamResponse:
        now = self.times[-1]
        if any(first <= now < end for first, end in self._bans):
            return web.Response(status=403, text="access too frequent")
        await asyncio.sleep(self._seconds)
        return await super().answer(request)

    def during(self, first: float, end: float) -> list[float]:
        """When something was asked in that stretch."""
        return [time for time in self.times if first <= time < end]


def many(number: int, *, apart_seconds: float = 0.0, begin: float = 10.0) -> Question[list[Any]]:
    """One question at first, then as many together, each a little later than the one before; errors as values."""

    async def one(client: BybitClient, seconds: float) -> Any:
        await asyncio.sleep(seconds)
        return await candles(client)

    async def question(client: BybitClient) -> list[Any]:
        asked = [one(client, begin + place * apart_seconds) for place in range(number)]
        return await asyncio.gather(candles(client), *asked, return_exceptions=True)

    return question


def kinds(found: list[Any]) -> list[type]:
    return [type(value) if isinstance(value, Exception) else object for value in found]


@pytest.mark.fault("D04")
def test_403_after_an_answer_ends_in_silence_then_one_goes_first_and_the_others_follow() -> None:
    exchange = Banning((5.0, 100.0), seconds=1.0)
    assert kinds(exchange.ask(many(8, apart_seconds=30.0))) == [object] * 9
    banned, end = exchange.times[1], exchange.times[1] + BAN_SECONDS
    assert banned == pytest.approx(10.0)
    assert exchange.during(banned + 0.001, end) == []
    first, *others = exchange.during(end, end + MINUTE)
    assert first < end + 1
    assert len(others) == 7
    assert min(others) >= first + 1  # the answer to the first has come
    assert max(others) < min(others) + 0.5  # and they need not wait for one another
    (notice,) = exchange.notices
    assert "HTTP 403, too many requests from this IP: no request for 10 minutes, then it goes on by itself" in notice


@pytest.mark.fault("D04")
def test_403_to_several_at_once_is_one_ban() -> None:
    exchange = Banning((5.0, 100.0))
    assert kinds(exchange.ask(many(8))) == [object] * 9
    assert len(exchange.during(5.0, 600.0)) == 8  # they were on their way already
    assert len(exchange.notices) == 1


def test_403_is_not_forgotten_for_an_answer_that_was_on_its_way() -> None:
    class Late(Banning):
        async def answer(self, request: web.Request) -> web.StreamResponse:
            if len(self.requests) == 2:  # admitted before the ban, answered after it
                await asyncio.sleep(3.0)
                return await Exchange.answer(self, request)
            return await super().answer(request)

    exchange = Late((5.0, 100.0), seconds=1.0)
    assert kinds(exchange.ask(many(8))) == [object] * 9
    first, *others = exchange.during(610.0, 700.0)
    assert len(others) == 6
    assert min(others) >= first + 1


def test_403_stops_those_that_wait_for_their_turn() -> None:
    exchange = Banning((5.0, 100.0))
    limit = RateLimit(requests=10, seconds=5.0)  # one of the eight in 0.55 s
    assert kinds(exchange.ask(many(8), rate_limit=limit)) == [object] * 9
    assert len(exchange.during(5.0, 610.0)) == 1
    allowed = exchange.during(610.0, 700.0)
    assert len(allowed) == 8
    assert all(len(exchange.during(time, time + 5.0)) <= 10 for time in allowed)


def test_403_while_a_quota_is_spent_is_a_ban() -> None:
    class Both(Banning):
        async def answer(self, request: web.Request) -> web.StreamResponse:
            if len(self.requests) == 3:
                full = envelope({}, 10006, "Too many visits", X_Bapi_Limit_Reset_Timestamp=str(NOW + 30_000))
                return await full(request, lambda: super(Both, self).answer(request))
            if len(self.requests) == 2:
                await asyncio.sleep(1.0)
                return web.Response(status=403)
            return await super().answer(request)

    exchange = Both()
    # The first is banned after a second; by then the second has been told of the quota, and the others wait for it.
    assert kinds(exchange.ask(many(4, apart_seconds=0.3))) == [object] * 5
    assert exchange.during(10.4, 611.0) == []


@pytest.mark.fault("D04")
def test_403_again_is_final_for_all() -> None:
    exchange = Banning((5.0, 10_000.0))
    question = many(8, apart_seconds=30.0)

    async def and_later(client: BybitClient) -> list[Any]:
        found = await question(client)
        asked = len(exchange.requests)
        with pytest.raises(RefusedError, match="ten minutes"):
            await candles(client)
        assert len(exchange.requests) == asked
        return found

    first, *others = exchange.ask(and_later)
    assert len(first.candles) == 1
    for error in others:
        assert isinstance(error, RefusedError)
        assert error.code == 403
    assert len(exchange.requests) == 3  # the good one, the one that was banned, and the one after ten minutes
    assert exchange.times[2] - exchange.times[1] >= BAN_SECONDS


def test_403_a_second_time_hours_later_is_a_ban_of_its_own() -> None:
    exchange = Banning((5.0, 100.0), (7_000.0, 8_000.0))

    async def question(client: BybitClient) -> list[Any]:
        return [await many(3)(client), await many(3, begin=7_000.0)(client)]

    assert [kinds(found) for found in exchange.ask(question)] == [[object] * 4] * 2
    assert len(exchange.notices) == 2


def test_403_then_no_answer_lets_one_after_the_other_try() -> None:
    class Restarting(Banning):
        async def answer(self, request: web.Request) -> web.StreamResponse:
            if 600 < self.times[-1] < 612:
                await asyncio.sleep(1.0)
                return web.Response(status=502)
            return await super().answer(request)

    exchange = Restarting((5.0, 100.0), seconds=1.0)
    assert kinds(exchange.ask(many(5, apart_seconds=1.0))) == [object] * 6
    after_ban = exchange.during(600.0, 700.0)
    assert (np.diff(after_ban[:3]) >= 1).all()  # never two at once, until one was answered


@pytest.mark.fault("D04")
def test_403_as_the_first_answer_ends_everything_at_once() -> None:
    async def two(client: BybitClient) -> None:
        for _ in range(2):
            with pytest.raises(RefusedError, match="region that it does not serve; wait at least ten minutes") as end:
                await candles(client)
            assert end.value.code == 403
            assert "candles of BTCUSDT" in str(end.value)

    exchange = Exchange(faults.status(403), GOOD)
    exchange.ask(two)
    assert len(exchange.requests) == 1
    assert exchange.notices == []


# --- what goes over the wire ------------------------------------------------------------------------------------------


@pytest.mark.fault("D05")
def test_no_get_has_a_body_or_says_that_it_has() -> None:
    listed = envelope({"list": []})

    async def all_of_them(client: BybitClient) -> None:
        await candles(client)
        for fetch in (client.fetch_instruments, client.fetch_listings, client.fetch_tickers):
            await fetch()
        await funding_rates(client)

    exchange = Exchange(GOOD, listed)
    exchange.ask(all_of_them)
    assert len(exchange.requests) == 1 + 1 + 4 + 1 + 1
    for request in exchange.requests:  # with a body they were answered with 403 before they got here
        assert not {"Content-Type", "Content-Length", "Transfer-Encoding"} & set(request.headers)


def test_rate_limit_never_lets_more_through_than_allowed() -> None:
    async def run() -> list[float]:
        limit, times = RateLimit(requests=50, seconds=5.0), []

        async def one() -> None:
            await limit.take()
            times.append(asyncio.get_running_loop().time())

        await asyncio.gather(*(one() for _ in range(120)))
        return times

    times = np.array(warp.run(run()))
    for begin in times:
        assert ((times >= begin) & (times < begin + 5.0)).sum() <= 50 + 1  # one for the edge


# --- the clock, and funding -------------------------------------------------------------------------------------------


def test_fetch_server_time_is_exact_milliseconds() -> None:
    exchange = Exchange(envelope({"timeSecond": "1700000000", "timeNano": "1700000000123456789"}))
    assert exchange.ask(lambda client: client.fetch_server_time_ms()) == 1_700_000_000_123
    assert exchange.requests[0].path_qs == "/v5/market/time"


@pytest.mark.parametrize(
    "nanoseconds",
    [None, "", "-1", "1.5", "1e18", "1_000", " 1", "\u0967\u096d", 1_700_000_000_000_000_000, "9" * 30, "9" * 100_000],
)
def test_fetch_server_time_that_cannot_be_raises(nanoseconds: Any) -> None:
    with pytest.raises(DataError, match="timeNano"):
        Exchange(envelope({"timeNano": nanoseconds})).ask(lambda client: client.fetch_server_time_ms())


def payment(hour: int, rate: Any = "0.0001", symbol: str = "BTCUSDT") -> dict[str, Any]:
    return {"symbol": symbol, "fundingRate": rate, "fundingRateTimestamp": str(T0 + hour * HOUR_MS)}


def funding(*hours: int, **fields: Any) -> Spoil:
    return envelope({"category": "linear", "list": [payment(hour, **fields) for hour in sorted(hours, reverse=True)]})


def funding_rates(client: BybitClient) -> Awaitable[Any]:
    return client.fetch_funding_rates("BTCUSDT", T0, T0 + 100 * HOUR_MS)


def test_fetch_funding_rates_pages_back_by_the_times_that_come() -> None:
    exchange = Exchange(funding(90, 98, 99), funding(50, 58, 66), funding(-8, 0, 8), funding())
    rates = exchange.ask(funding_rates)
    assert [(rate.funding_time_ms - T0) // HOUR_MS for rate in rates] == [0, 8, 50, 58, 66, 90, 98, 99]
    assert rates[0].rate == 0.0001
    ends = [int(request.query["endTime"]) for request in exchange.requests]
    assert ends == [T0 + hour * HOUR_MS - 1 for hour in (100, 90, 50)]
    assert all(request.query["startTime"] == str(T0) for request in exchange.requests)


def test_fetch_funding_rates_in_any_order_and_twice_alike_are_one_each() -> None:
    page = envelope({"list": [payment(8), payment(16), payment(0), payment(8)]})
    rates = Exchange(page, funding()).ask(funding_rates)
    assert [(rate.funding_time_ms - T0) // HOUR_MS for rate in rates] == [0, 8, 16]


@pytest.mark.parametrize(
    "items",
    [
        [payment(8, symbol="ETHUSDT")],
        [payment(100)],  # at the end, which is not asked for
        *(
            [payment(8, rate)]
            for rate in ("", None, "nan", "1.5", "-1", 0.0001, "0_1", " 0.1", "1e-50", "0." + 90 * "1")
        ),
        *(
            [payment(8) | {"fundingRateTimestamp": time}]
            for time in ("", None, "soon", "-1", "1.7e12", T0, "9" * 20, "9" * 100_000)
        ),
        [payment(8), payment(8, "0.0002")],  # which of them?
        [{}],
        [7],
        None,
        {},
    ],
)
def test_fetch_funding_rates_that_cannot_be_raise(items: Any) -> None:
    exchange = Exchange(envelope({"list": items}), funding())
    with pytest.raises(DataError, match=r"funding rates of BTCUSDT before 2023-11-1.* after 1 tries"):
        exchange.ask(funding_rates, attempts=1)


@pytest.mark.parametrize(("rate", "value"), [("0", 0.0), ("-0.00375", -0.00375), ("1e-7", 1e-7), ("-0.0000000", 0.0)])
def test_fetch_funding_rates_of_any_sign_are_read(rate: str, value: float) -> None:
    (found,) = Exchange(funding(8, rate=rate), funding()).ask(funding_rates)
    assert found.rate == value


# --- contracts --------------------------------------------------------------------------------------------------------


def instrument(symbol: Any = "BTCUSDT", **changes: Any) -> dict[str, Any]:
    """An item of instruments-info; `symbol__key=value` changes a member of a member, None takes a field away."""
    item: dict[str, Any] = {
        "symbol": symbol,
        "contractType": "LinearPerpetual",
        "status": "Trading",
        "quoteCoin": "USDT",
        "settleCoin": "USDT",
        "symbolType": "",
        "launchTime": "1584230400000",
        "deliveryTime": "0",
        "leverageFilter": {"minLeverage": "1", "maxLeverage": "100.00", "leverageStep": "0.01"},
        "priceFilter": {"minPrice": "0.10", "maxPrice": "1999999.80", "tickSize": "0.10"},
        "lotSizeFilter": {"minOrderQty": "0.001", "qtyStep": "0.001", "minNotionalValue": "5"},
        "fundingInterval": 480,
    }
    for path, value in changes.items():
        outer, _, inner = path.partition("__")
        holder, key = (item[outer], inner) if inner else (item, outer)
        holder[key] = value
        if value is None:
            del holder[key]
    return item


def listed(*items: Any, cursor: Any = "") -> Spoil:
    return envelope({"category": "linear", "list": list(items), "nextPageCursor": cursor})


def instruments(client: BybitClient) -> Awaitable[Any]:
    return client.fetch_instruments()


def test_fetch_instruments_follows_the_cursor_as_received_and_keeps_usdt_perpetuals() -> None:
    exchange = Exchange(
        listed(
            instrument(), instrument("BTC-26DEC25", contractType="LinearFutures"), cursor="first%3DBTC%2CETH%3A1%25"
        ),
        listed(
            instrument("ETHPERP", quoteCoin="USDC", settleCoin="USDC"),
            instrument("XAUUSDT", symbolType="commodity"),
            cursor="second%3D",
        ),
        listed(instrument("ETHUSDT", lotSizeFilter__minNotionalValue=None)),
    )
    found = exchange.ask(instruments)
    assert list(found) == ["BTCUSDT", "ETHUSDT"]
    assert str(found["BTCUSDT"].tick_size) == "0.10"
    assert found["ETHUSDT"].min_notional == 0
    begin = "/v5/market/instruments-info?category=linear&status=Trading&limit=1000"
    cursors = ["", "&cursor=first%3DBTC%2CETH%3A1%25", "&cursor=second%3D"]
    assert [request.raw_path for request in exchange.requests] == [begin + cursor for cursor in cursors]


@pytest.mark.parametrize("cursors", [["again"], ["one", "other"] * 1000, [f"page{number}" for number in range(2000)]])
def test_fetch_instruments_list_that_never_ends_raises(cursors: list[str]) -> None:
    exchange = Exchange(*(listed(instrument(), cursor=cursor) for cursor in cursors))
    with pytest.raises(DataError, match="from one cursor to the next the list would never end"):
        exchange.ask(instruments)
    assert len(exchange.requests) == (2 if cursors == ["again"] else 100)


@pytest.mark.parametrize("cursor", [7, ["a"], {"a": 1}, "é", "a\nb", "a b", "a#b", "a" * 100_000])
def test_fetch_instruments_cursor_that_no_url_can_hold_raises(cursor: Any) -> None:
    with pytest.raises(DataError, match="nextPageCursor"):
        Exchange(listed(instrument(), cursor=cursor)).ask(instruments)


@pytest.mark.parametrize("cursor", [None, ""])
def test_fetch_instruments_without_cursor_is_the_last_page(cursor: Any) -> None:
    exchange = Exchange(listed(instrument(), cursor=cursor))
    assert len(exchange.ask(instruments)) == len(exchange.requests) == 1


NO_NUMBER: list[Any] = [
    *(None, True, 0.1, 5, [], {}),
    *("", "0_1", " 1", "1 ", "1\n", "\uff11", "0x10", "1,5", "nan", "-inf", "1e400", "9" * 41, "9" * 100_000),
]


@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("priceFilter__tickSize", [*NO_NUMBER, "0", "-0.1"]),
        ("lotSizeFilter__qtyStep", [*NO_NUMBER, "0", "-0.1"]),
        ("lotSizeFilter__minOrderQty", ["", None, "0"]),
        ("lotSizeFilter__minNotionalValue", ["-5", "five", 5]),
        ("leverageFilter__maxLeverage", ["", None, "0"]),
        ("priceFilter", [None, "", []]),
        ("lotSizeFilter", [None, "", []]),
        ("leverageFilter", [None, "", []]),
        ("launchTime", ["", None, "-1", 1584230400000, "1e12", "9" * 20]),
        ("deliveryTime", ["soon", "-1", 1584230400000, "9" * 20, "1e12", ["1"]]),
        ("fundingInterval", ["480", "", None, 0, -480, 480.0, True, 10_000_000]),
        ("status", [None, 1, ["Trading"]]),
    ],
)
def test_fetch_instruments_field_that_cannot_be_names_the_symbol(path: str, values: list[Any]) -> None:
    for value in values:
        exchange = Exchange(listed(instrument(**{path: value})))
        with pytest.raises(DataError, match=rf"instrument BTCUSDT: expected {path.rpartition('__')[2]} ") as error:
            exchange.ask(instruments, attempts=1)
        assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("path", "value", "name", "found"),
    [
        ("lotSizeFilter__minNotionalValue", "", "min_notional", 0),
        ("priceFilter__tickSize", "1e-7", "tick_size", Decimal("0.0000001")),
        ("lotSizeFilter__qtyStep", "100000", "qty_step", 100_000),
        ("fundingInterval", 60, "funding_interval_minutes", 60),
        ("deliveryTime", "", "delivery_time_ms", None),
        ("deliveryTime", "0", "delivery_time_ms", None),
        ("deliveryTime", None, "delivery_time_ms", None),
        ("deliveryTime", "1700000000000", "delivery_time_ms", 1_700_000_000_000),
        ("launchTime", "0", "launch_time_ms", 0),
        ("status", "Delivering", "status", "Delivering"),
    ],
)
def test_fetch_instruments_reads_what_is_unusual_but_possible(path: str, value: Any, name: str, found: Any) -> None:
    (rules,) = Exchange(listed(instrument(**{path: value}))).ask(instruments).values()
    assert getattr(rules, name) == found


class ByStatus(Exchange):
    """instruments-info of an exchange that lists these contracts by status."""

    def __init__(self, **items: list[dict[str, Any]]) -> None:
        super().__init__()
        self._items = items

    async def answer(self, request: web.Request) -> web.StreamResponse:
        page = listed(*self._items.get(request.query["status"], []))
        return await page(request, lambda: self.answer(request))


def listings(client: BybitClient) -> Awaitable[dict[str, Listing]]:
    return client.fetch_listings()


def test_fetch_listings_of_all_statuses_the_trading_one_of_two_of_a_name() -> None:
    ended = {"deliveryTime": "1700000000000"}
    exchange = ByStatus(
        Trading=[instrument("BTCUSDT"), instrument("LUNAUSDT", launchTime="1653638400000")],
        PreLaunch=[instrument("NEWUSDT", status="PreLaunch")],
        Delivering=[instrument("OLDUSDT", status="Delivering", **ended)],
        Closed=[instrument("LUNAUSDT", status="Closed", **ended), instrument("OLDUSDT", status="Closed", **ended)],
    )
    found = exchange.ask(listings)
    launch_ms = 1_584_230_400_000
    assert found == {
        "BTCUSDT": Listing("BTCUSDT", USDT_PERPETUAL, "Trading", launch_ms, None),
        "LUNAUSDT": Listing("LUNAUSDT", USDT_PERPETUAL, "Trading", 1_653_638_400_000, None),
        "NEWUSDT": Listing("NEWUSDT", USDT_PERPETUAL, "PreLaunch", launch_ms, None),
        "OLDUSDT": Listing("OLDUSDT", USDT_PERPETUAL, "Delivering", launch_ms, 1_700_000_000_000),
    }


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({}, USDT_PERPETUAL),
        ({"symbolType": None}, USDT_PERPETUAL),  # absent before 2024
        ({"symbolType": "innovation"}, USDT_PERPETUAL),
        ({"symbolType": "stock"}, "stock perpetual"),
        ({"symbolType": "commodity"}, "commodity perpetual"),
        ({"symbolType": "forex"}, "forex perpetual"),
        ({"quoteCoin": "USDC", "settleCoin": "USDC"}, "USDC perpetual"),
        ({"settleCoin": "USDC"}, "USDT perpetual settled in USDC"),
        ({"contractType": "LinearFutures"}, "dated future"),
        ({"contractType": "InversePerpetual", "quoteCoin": "USD", "settleCoin": "BTC"}, "InversePerpetual"),
    ],
)
def test_fetch_listings_tells_the_kind_in_words(changes: dict[str, Any], kind: str) -> None:
    exchange = ByStatus(Trading=[instrument(**changes)])
    (found,) = exchange.ask(listings).values()
    assert found.kind == kind
    assert found.is_usdt_perpetual == (kind == "USDT perpetual")
    assert list(exchange.ask(instruments)) == (["BTCUSDT"] if found.is_usdt_perpetual else [])


@pytest.mark.parametrize(
    "item",
    [
        instrument(symbol=7),
        instrument(contractType=None),
        instrument(contractType=7),
        instrument(quoteCoin=None),
        instrument(settleCoin=None),
        instrument(settleCoin=["USDT"]),
        instrument(status=None),
        instrument(launchTime=""),
        instrument(deliveryTime="soon"),
        "BTCUSDT",
        None,
    ],
)
def test_fetch_listings_item_that_cannot_be_raises(item: Any) -> None:
    with pytest.raises(DataError, match="instruments.*: .*expected"):
        ByStatus(Trading=[item]).ask(listings)


# --- tickers and rights -----------------------------------------------------------------------------------------------

TICKER = {
    "symbol": "BTCUSDT",
    "lastPrice": "64000.10",
    "markPrice": "64001",
    "bid1Price": "64000.00",
    "ask1Price": "64000.10",
    "turnover24h": "1234567.89",
    "volume24h": "19.5",
    "fundingRate": "-0.0001",
    "nextFundingTime": "1700006400000",
}
FOUND = Ticker(
    symbol="BTCUSDT",
    last_price=Decimal("64000.10"),
    mark_price=Decimal(64001),
    bid_price=Decimal(64000),
    ask_price=Decimal("64000.1"),
    turnover_24h=Decimal("1234567.89"),
    volume_24h=Decimal("19.5"),
    funding_rate=Decimal("-0.0001"),
    next_funding_time_ms=1_700_006_400_000,
)


def tickers(client: BybitClient) -> Awaitable[dict[str, Ticker]]:
    return client.fetch_tickers()


def test_fetch_tickers_of_all_contracts_by_symbol() -> None:
    exchange = Exchange(envelope({"list": [TICKER, TICKER | {"symbol": "BTCPERP", "basis": ""}]}))
    found = exchange.ask(tickers)
    assert found["BTCUSDT"] == FOUND
    assert list(found) == ["BTCUSDT", "BTCPERP"]
    assert exchange.requests[0].path_qs == "/v5/market/tickers?category=linear"


@pytest.mark.parametrize(
    ("field", "name", "values"),
    [
        ("bid1Price", "bid_price", ["", "0", "0.00", None]),
        ("ask1Price", "ask_price", ["", "0", None]),
        ("fundingRate", "funding_rate", ["", None]),
        ("nextFundingTime", "next_funding_time_ms", ["", "0", None]),
    ],
)
def test_fetch_tickers_number_that_the_exchange_has_not_is_none(field: str, name: str, values: list[Any]) -> None:
    for value in values:
        item = {key: text for key, text in (TICKER | {field: value}).items() if text is not None}
        (found,) = Exchange(envelope({"list": [item]})).ask(tickers).values()
        assert getattr(found, name) is None


@pytest.mark.parametrize("price", ["", "0", "0.00", None])
def test_fetch_tickers_contract_that_has_never_traded_is_left_out(price: Any) -> None:
    item = TICKER | {"symbol": "NEWUSDT", "lastPrice": price, "markPrice": ""}
    assert Exchange(envelope({"list": [item, TICKER]})).ask(tickers) == {"BTCUSDT": FOUND}


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("lastPrice", ["-1", *(value for value in NO_NUMBER if value not in (None, ""))]),
        ("markPrice", ["0", "-1", *NO_NUMBER]),
        ("bid1Price", ["-1", "nan", 1.5]),
        ("ask1Price", ["-1", "nan", 1.5]),
        ("turnover24h", ["-1", *NO_NUMBER]),
        ("volume24h", ["-1", *NO_NUMBER]),
        ("fundingRate", ["nan", 0.0001, "1_0"]),
        ("nextFundingTime", ["soon", "-1", 1_700_006_400_000, "9" * 20]),
    ],
)
def test_fetch_tickers_field_that_cannot_be_names_the_symbol(field: str, values: list[Any]) -> None:
    for value in values:
        exchange = Exchange(envelope({"list": [TICKER | {field: value}]}))
        with pytest.raises(DataError, match=f"ticker BTCUSDT: expected {field} "):
            exchange.ask(tickers, attempts=1)


@pytest.mark.parametrize("result", [{}, {"list": {}}, {"list": [7]}, {"list": [{}]}, {"list": [{"symbol": 7}]}])
def test_fetch_tickers_that_are_no_list_of_contracts_raise(result: Any) -> None:
    with pytest.raises(DataError, match="tickers"):
        Exchange(envelope(result)).ask(tickers)


@pytest.mark.parametrize(
    ("ips", "bound"), [(["*"], ()), ([], ()), (None, ()), (["10.0.0.1", "10.0.0.2"], ("10.0.0.1", "10.0.0.2"))]
)
def test_key_rights_are_read_by_family_and_binding(ips: Any, bound: tuple[str, ...]) -> None:
    permissions = {"ContractTrade": ["Order", "Position"], "Wallet": ["Withdraw"], "Spot": []}
    found = parse_key_rights({"readOnly": 0, "permissions": permissions, "ips": ips})
    expected = frozenset({"ContractTrade.Order", "ContractTrade.Position", "Wallet.Withdraw"})
    assert found == KeyRights(read_only=False, permissions=expected, ips=bound)


@pytest.mark.parametrize(
    "changes",
    [
        {"readOnly": None},
        {"readOnly": "0"},
        {"readOnly": False},
        {"readOnly": 2},
        {"permissions": None},
        {"permissions": []},
        {"permissions": {"Wallet": None}},
        {"permissions": {"Wallet": "Withdraw"}},
        {"permissions": {"Wallet": [["Withdraw"]]}},  # a right that would not be found under its name
        {"permissions": {"Wallet": [1]}},
        {"ips": "*"},
        {"ips": [1]},
        {"ips": {"a": 1}},
    ],
)
def test_key_rights_that_cannot_be_raise(changes: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=f"expected .*{next(iter(changes))}|expected .*Wallet"):
        parse_key_rights({"readOnly": 0, "permissions": {"Wallet": ["Withdraw"]}, "ips": ["*"]} | changes)


# --- hosts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rest_url", "ws_url", "key"),
    [
        ("localhost:80", None, "rest_url"),
        ("ftp://localhost", None, "rest_url"),
        ("http://", None, "rest_url"),
        ("http://localhost:99999", None, "rest_url"),
        ("http://user:word@localhost", None, "rest_url"),
        (None, "http://localhost", "ws_url"),
    ],
)
def test_hosts_of_what_is_no_url_raises(rest_url: str | None, ws_url: str | None, key: str) -> None:
    with pytest.raises(ConfigError, match=f"exchange.{key}: expected"):
        hosts_of("mainnet", rest_url, ws_url)


def test_hosts_of_environment_and_override() -> None:
    assert hosts_of("testnet").rest_url == "https://api-testnet.bybit.com"
    assert hosts_of("demo").ws_url == hosts_of("mainnet").ws_url  # demo trades on mainnet's prices
    assert hosts_of("local", "http://127.0.0.1:1/", "ws://127.0.0.1:1/x").rest_url == "http://127.0.0.1:1"
