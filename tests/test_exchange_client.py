"""The REST client against a scripted server on loopback: what it asks, what it believes, when it asks again."""

import asyncio
import json
import socket
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import numpy as np
import pytest
from aiohttp import web

from perpcast.errors import ConfigError, DataError, ExchangeUnavailableError, RefusedError, TemporaryExchangeError
from perpcast.exchange import PAGE_BARS, BybitClient, RateLimit, hosts_of

STEP_MS = 900_000
T0 = 1_700_000_100_000 // STEP_MS * STEP_MS
NOW = T0 + 10_000 * STEP_MS

Value = TypeVar("Value")
Answer = web.Response | Callable[[web.Request], Awaitable[web.Response]]


def envelope(result: Any, code: Any = 0, message: str = "OK", now_ms: Any = NOW) -> web.Response:
    body = {"retCode": code, "retMsg": message, "result": result, "retExtInfo": {}, "time": now_ms}
    return web.Response(text=json.dumps(body), content_type="application/json")


def row(bar: int, *, open_: str = "10", high: str = "12", low: str = "9", close: str = "11") -> list[str]:
    return [str(T0 + bar * STEP_MS), open_, high, low, close, "5", "55"]


def kline(*rows: Any, symbol: str = "BTCUSDT") -> web.Response:
    return envelope({"category": "linear", "symbol": symbol, "list": list(rows)})


def ask(
    answers: list[Callable[[], web.Response]], question: Callable[[BybitClient], Awaitable[Value]], **options: Any
) -> tuple[Value, list[web.Request], BybitClient]:
    """The value of `question` where the server gives `answers` one after the other (the last one again and again)."""
    requests: list[web.Request] = []

    async def handle(request: web.Request) -> web.Response:
        assert not await request.read()  # Bybit answers 403 to a GET with a body
        requests.append(request)
        return answers[min(len(requests), len(answers)) - 1]()

    async def run() -> tuple[Value, list[web.Request], BybitClient]:
        application = web.Application()
        application.router.add_get("/{path:.*}", handle)
        runner = web.AppRunner(application)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        host, port = runner.addresses[0][:2]
        try:
            settings: dict[str, Any] = {
                "jitter": np.random.default_rng(1),
                "first_pause_seconds": 0.001,
                "attempts": 3,
            } | options
            async with BybitClient(f"http://{host}:{port}", **settings) as client:
                return await question(client), requests, client
        finally:
            await runner.cleanup()

    return asyncio.run(run())


def candles(client: BybitClient, bars: int = 4) -> Awaitable[Any]:
    return client.fetch_candles("BTCUSDT", "15", T0, T0 + bars * STEP_MS)


def test_fetch_candles_asks_with_limit_and_inclusive_end() -> None:
    _, requests, client = ask([lambda: kline(row(0))], candles)
    assert requests[0].path_qs == (
        f"/v5/market/kline?category=linear&symbol=BTCUSDT&interval=15&start={T0}&end={T0 + 4 * STEP_MS - 1}&limit=1000"
    )
    assert client.requests == 1


def test_fetch_candles_newest_first_with_row_before_start_returns_window_oldest_first() -> None:
    page, _, _ = ask([lambda: kline(row(3), row(2), row(1), row(0), row(-1))], candles)
    assert page.candles.open_time_ms.tolist() == [T0 + bar * STEP_MS for bar in range(4)]
    assert page.candles.close.tolist() == [11.0] * 4
    assert page.rejected == ()
    assert page.server_time_ms == NOW


@pytest.mark.parametrize(("age_ms", "bars"), [(STEP_MS - 1, 2), (STEP_MS, 3)])
def test_fetch_candles_running_candle_is_dropped_by_server_time(age_ms: int, bars: int) -> None:
    result = {"category": "linear", "symbol": "BTCUSDT", "list": [row(2), row(1), row(0)]}
    now_ms = T0 + 2 * STEP_MS + age_ms  # bar 2 is closed one interval after its open, not a millisecond before
    page, _, _ = ask([lambda: envelope(result, now_ms=now_ms)], candles)
    assert len(page.candles) == bars


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (row(1, low="11.5"), "outside low to high"),
        (row(1, high="10.5"), "outside low to high"),
        (row(1, low="-1"), "not above zero"),
        (row(1, open_="0"), "not above zero"),
        (row(1, close=""), "expected a number"),
        (row(1, close="nan"), "expected a number"),
        (row(1, close="1e999"), "expected a number"),
        ([*row(1)[:4], 11.0, "5", "55"], "expected a number"),
        (row(1)[:5], "expected 7 fields"),
        ([str(T0 + STEP_MS + 1), *row(1)[1:]], "not on the grid"),
        ([*row(1)[:5], "-5", "55"], "negative"),
    ],
)
def test_fetch_candles_bad_row_is_rejected_alone(bad: list[Any], reason: str) -> None:
    page, _, _ = ask([lambda: kline(row(2), bad, row(0))], candles)
    assert page.candles.open_time_ms.tolist() == [T0, T0 + 2 * STEP_MS]
    (rejected,) = page.rejected
    assert rejected.open_time_ms == int(bad[0])
    assert reason in rejected.reason


def test_fetch_candles_row_twice_alike_counts_once_and_unlike_is_rejected() -> None:
    page, _, _ = ask([lambda: kline(row(1), row(1), row(0), row(0, close="10"))], candles)
    assert page.candles.open_time_ms.tolist() == [T0 + STEP_MS]
    assert page.rejected[0].reason == "listed twice with different values"


def test_fetch_candles_large_move_is_kept() -> None:
    page, _, _ = ask([lambda: kline(row(1, open_="10", high="18", low="2", close="2"), row(0))], candles)
    assert len(page.candles) == 2


@pytest.mark.parametrize(
    "answer",
    [
        lambda: web.Response(text="<html>busy</html>"),
        lambda: web.Response(text='{"retCode":0,'),
        lambda: web.Response(text="[]"),
        lambda: envelope([]),
        lambda: envelope({"symbol": "BTCUSDT"}),
        lambda: envelope({"symbol": "BTCUSDT", "list": {}}),
        lambda: envelope({"symbol": "BTCUSDT", "list": ["1234567"]}),
        lambda: envelope({"symbol": "BTCUSDT", "list": [[]]}),
        lambda: envelope({"symbol": "BTCUSDT", "list": [["yesterday", *row(0)[1:]]]}),
        lambda: envelope({"symbol": "BTCUSDT", "list": [["9" * 400, *row(0)[1:]]]}),
        lambda: envelope({"symbol": "BTCUSDT", "list": []}, code="0"),
        lambda: envelope({"symbol": "BTCUSDT", "list": []}, code=False),
        lambda: envelope({"symbol": "BTCUSDT", "list": []}, now_ms=None),
        lambda: kline(row(0), symbol="ETHUSDT"),
        lambda: envelope({"symbol": "BTCUSDT", "category": "spot", "list": [row(0)]}),
    ],
)
def test_fetch_candles_malformed_answer_is_asked_again_then_named(answer: Callable[[], web.Response]) -> None:
    page, requests, client = ask([answer, lambda: kline(row(0))], candles)
    assert len(page.candles) == 1
    assert (len(requests), client.retries) == (2, 1)
    with pytest.raises(DataError, match=r"candles of BTCUSDT from 2023-11-14 .*after 3 tries"):
        ask([answer], candles)


@pytest.mark.parametrize(
    "answer",
    [
        lambda: web.Response(status=500),
        lambda: web.Response(status=502, text="<html>"),
        lambda: web.Response(status=429),
        lambda: envelope({}, code=10006, message="Too many visits"),
        lambda: envelope({}, code=10016, message="server error"),
    ],
)
def test_fetch_temporary_failure_is_asked_again(answer: Callable[[], web.Response]) -> None:
    page, requests, _ = ask([answer, answer, lambda: kline(row(0))], candles)
    assert len(page.candles) == 1
    assert len(requests) == 3
    with pytest.raises(TemporaryExchangeError, match="after 3 tries"):
        ask([answer], candles)


def test_fetch_retry_after_is_waited_for() -> None:
    begun = time.monotonic()
    ask([lambda: web.Response(status=429, headers={"Retry-After": "1"}), lambda: kline(row(0))], candles)
    assert time.monotonic() - begun >= 1


def test_fetch_refusal_is_not_asked_again() -> None:
    with pytest.raises(RefusedError, match="candles of BTCUSDT.*retCode 10001: Not supported symbols") as refused:
        ask([lambda: envelope({}, code=10001, message="Not supported symbols"), lambda: kline()], candles)
    assert refused.value.code == 10001


def test_fetch_403_ends_all_http() -> None:
    async def two(client: BybitClient) -> int:
        for _ in range(2):
            with pytest.raises(RefusedError, match="ten minutes"):
                await candles(client)
        return client.requests

    requests, _, _ = ask([lambda: web.Response(status=403), lambda: kline(row(0))], two)
    assert requests == 1


def test_fetch_nothing_listens_is_unreachable_with_exit_code_2() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"

    async def run() -> None:
        async with BybitClient(url, jitter=np.random.default_rng(1), attempts=2, first_pause_seconds=0.001) as client:
            await client.fetch_server_time_ms()

    with pytest.raises(
        ExchangeUnavailableError, match=f"exchange unreachable: {url} gave no answer after 2 tries"
    ) as unreachable:
        asyncio.run(run())
    assert unreachable.value.exit_code == 2


def test_fetch_answer_cut_off_is_asked_again() -> None:
    """A server that closes the connection half-way through the body, then one that answers."""
    calls = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal calls
        while await reader.readline() not in (b"\r\n", b""):
            pass
        calls += 1
        body = bytes(kline(row(0)).body)  # type: ignore[arg-type]
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body))
        writer.write(body[:20] if calls == 1 else body)
        await writer.drain()
        writer.close()

    async def run() -> int:
        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            url = f"http://127.0.0.1:{port}"
            async with BybitClient(url, jitter=np.random.default_rng(1), first_pause_seconds=0.001) as client:
                return len((await candles(client)).candles)

    assert asyncio.run(run()) == 1
    assert calls == 2


@pytest.mark.parametrize("bars", [0, PAGE_BARS + 1])
def test_fetch_candles_window_that_one_answer_cannot_hold_raises(bars: int) -> None:
    with pytest.raises(ValueError, match="1 to 1000 bars"):
        ask([lambda: kline()], lambda client: candles(client, bars))


def test_fetch_server_time_is_exact_milliseconds() -> None:
    time_ms, requests, _ = ask(
        [lambda: envelope({"timeSecond": "1700000000", "timeNano": "1700000000123456789"})],
        lambda client: client.fetch_server_time_ms(),
    )
    assert time_ms == 1_700_000_000_123
    assert requests[0].path_qs == "/v5/market/time"


def funding(*hours: int, symbol: str = "BTCUSDT", rate: str = "0.0001") -> web.Response:
    items = [
        {"symbol": symbol, "fundingRate": rate, "fundingRateTimestamp": str(T0 + hour * 3_600_000)}
        for hour in sorted(hours, reverse=True)
    ]
    return envelope({"category": "linear", "list": items})


def funding_rates(client: BybitClient) -> Awaitable[Any]:
    return client.fetch_funding_rates("BTCUSDT", T0, T0 + 100 * 3_600_000)


def test_fetch_funding_rates_pages_back_by_the_times_that_come() -> None:
    answers = iter([funding(90, 98, 99), funding(50, 58, 66), funding(-8, 0, 8), funding()])
    rates, requests, _ = ask([lambda: next(answers)], funding_rates)
    assert [(rate.funding_time_ms - T0) // 3_600_000 for rate in rates] == [0, 8, 50, 58, 66, 90, 98, 99]
    assert rates[0].rate == 0.0001
    ends = [int(request.query["endTime"]) for request in requests]
    assert ends == [T0 + hour * 3_600_000 - 1 for hour in (100, 90, 50)]
    assert all(request.query["startTime"] == str(T0) for request in requests)


@pytest.mark.parametrize(
    "answer",
    [
        lambda: funding(8, symbol="ETHUSDT"),
        lambda: funding(8, rate=""),
        lambda: funding(8, rate="nan"),
        lambda: funding(8, rate="1.5"),
        lambda: funding(100),
        lambda: envelope({"list": [{"symbol": "BTCUSDT", "fundingRate": "0.1", "fundingRateTimestamp": ""}]}),
        lambda: envelope({"list": [7]}),
    ],
)
def test_fetch_funding_rates_that_cannot_be_raise(answer: Callable[[], web.Response]) -> None:
    with pytest.raises(DataError, match=r"funding rates of BTCUSDT before 2023-11-1.* after 3 tries"):
        ask([answer], funding_rates)


def instrument(symbol: str, **changes: Any) -> dict[str, Any]:
    item = {
        "symbol": symbol,
        "contractType": "LinearPerpetual",
        "status": "Trading",
        "quoteCoin": "USDT",
        "settleCoin": "USDT",
        "symbolType": "",
        "launchTime": "1584230400000",
        "leverageFilter": {"minLeverage": "1", "maxLeverage": "100.00", "leverageStep": "0.01"},
        "priceFilter": {"minPrice": "0.10", "maxPrice": "1999999.80", "tickSize": "0.10"},
        "lotSizeFilter": {"minOrderQty": "0.001", "qtyStep": "0.001", "minNotionalValue": "5"},
        "fundingInterval": 480,
    }
    return item | changes


def test_fetch_instruments_follows_the_cursor_as_received_and_keeps_usdt_perpetuals() -> None:
    pages = [
        {"list": [instrument("BTCUSDT"), instrument("BTC-26DEC25", contractType="LinearFutures")]},
        {
            "list": [
                instrument("ETHPERP", quoteCoin="USDC", settleCoin="USDC"),
                instrument("XAUUSDT", symbolType="commodity"),
            ]
        },
        {"list": [instrument("ETHUSDT", lotSizeFilter={"minOrderQty": "0.01", "qtyStep": "0.01"})]},
    ]
    cursors = ["first%3DBTC%2CETH", "second%3D", ""]
    answers = [envelope(page | {"nextPageCursor": cursor}) for page, cursor in zip(pages, cursors, strict=True)]
    served = iter(answers)
    instruments, requests, _ = ask([lambda: next(served)], lambda client: client.fetch_instruments())
    assert list(instruments) == ["BTCUSDT", "ETHUSDT"]
    assert str(instruments["BTCUSDT"].tick_size) == "0.10"
    assert instruments["ETHUSDT"].min_notional == 0
    assert requests[1].path_qs.endswith("&cursor=first%3DBTC%2CETH")


def test_fetch_instruments_cursor_that_never_ends_raises() -> None:
    answer = {"list": [instrument("BTCUSDT")], "nextPageCursor": "again"}
    with pytest.raises(DataError, match="came twice"):
        ask([lambda: envelope(answer)], lambda client: client.fetch_instruments())


@pytest.mark.parametrize(
    "changes", [{"fundingInterval": "480"}, {"launchTime": ""}, {"priceFilter": {"tickSize": "0"}}]
)
def test_fetch_instruments_field_that_cannot_be_names_the_symbol(changes: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="instrument BTCUSDT"):
        ask([lambda: envelope({"list": [instrument("BTCUSDT", **changes)]})], lambda client: client.fetch_instruments())


def test_rate_limit_never_lets_more_through_than_allowed() -> None:
    async def run() -> list[float]:
        limit, times = RateLimit(requests=50, seconds=0.5), []
        clock = asyncio.get_running_loop().time

        async def one() -> None:
            await limit.take()
            times.append(clock())

        await asyncio.gather(*(one() for _ in range(120)))
        return times

    times = np.array(asyncio.run(run()))
    for begin in times:
        # Sleeps may end a little late, never early: 50 in any half second, one for the edge.
        assert ((times >= begin) & (times < begin + 0.5)).sum() <= 51


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
