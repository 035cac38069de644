"""The running local exchange: REST and WebSocket over a real socket, the byte shapes of Bybit v5, the command line."""

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest

from perpcast.errors import SetupError
from perpcast.market import Instrument
from perpcast.simulator.clock import RunningClock, SteppedClock
from perpcast.simulator.instruments import instrument_of
from perpcast.simulator.market import BASE_MS, FUNDING_MS
from perpcast.simulator.server import Address, serve, serve_in_thread
from perpcast.simulator.stream import MAX_WAITING
from perpcast.simulator.synthetic import START_MS, SyntheticMarket
from perpcast.simulator.wire import number
from tests.test_simulator_market import TableMarket

ROOT = Path(__file__).parents[1]
DAY_MS = 86_400_000
# A third of the way through a bar, ten days into the market.
NOW_MS = START_MS + 10 * DAY_MS + BASE_MS // 3
MARKET = SyntheticMarket(7, 0.1, START_MS + 20 * DAY_MS)

Ask = Callable[..., Awaitable[dict[str, Any]]]


def over_rest(conversation: Callable[[Ask], Awaitable[Any]], market: Any = MARKET) -> Any:
    """Runs a conversation with an exchange that stands at NOW_MS; `ask(path, **query)` returns the envelope."""

    async def run() -> Any:
        async with serve(market, SteppedClock(NOW_MS)) as address, aiohttp.ClientSession(address.rest_url) as session:

            async def ask(path: str, **query: Any) -> dict[str, Any]:
                async with session.get(f"/v5/market/{path}", params=query) as response:
                    return {"http": response.status, **orjson.loads(await response.read())}

            return await conversation(ask)

    return asyncio.run(run())


def answer(path: str, **query: Any) -> dict[str, Any]:
    return over_rest(lambda ask: ask(path, **query))


def test_time_is_the_markets_in_all_its_forms() -> None:
    body = answer("time")
    assert body == {
        "http": 200,
        "retCode": 0,
        "retMsg": "OK",
        "result": {"timeSecond": str(NOW_MS // 1000), "timeNano": f"{NOW_MS}000000"},
        "retExtInfo": {},
        "time": NOW_MS,
    }


def test_kline_rows_are_texts_newest_first_with_the_running_candle() -> None:
    result = answer("kline", category="linear", symbol="BTCUSDT", interval="15", limit=3)["result"]
    assert (result["symbol"], result["category"]) == ("BTCUSDT", "linear")
    running, closed, _ = result["list"]
    series = MARKET.candles("BTCUSDT")
    assert [int(row[0]) for row in result["list"]] == [NOW_MS // BASE_MS * BASE_MS - i * BASE_MS for i in range(3)]
    assert all(isinstance(cell, str) for row in result["list"] for cell in row)
    row = series.open_time_ms.tolist().index(int(closed[0]))
    names = ("open", "high", "low", "close", "volume", "turnover")
    assert [float(cell) for cell in closed[1:]] == [getattr(series, name)[row] for name in names]
    # A third of the bar has passed: it has reached its first extreme, and a third of its volume.
    assert running[4] in (running[2], running[3])
    assert float(running[5]) == pytest.approx(series.volume[row + 1] / 3, rel=1e-6)


def test_kline_pages_put_together_are_the_whole_history() -> None:
    async def download(ask: Ask) -> list[list[str]]:
        rows: list[list[str]] = []
        for start in range(START_MS, NOW_MS, 300 * BASE_MS):
            end = start + 299 * BASE_MS
            page = await ask("kline", symbol="BTCUSDT", interval="15", start=start, end=end, limit=1000)
            rows += reversed(page["result"]["list"])
        return rows

    rows, series = over_rest(download), MARKET.candles("BTCUSDT")
    closed = rows[:-1]
    assert [int(row[0]) for row in rows] == list(range(START_MS, NOW_MS, BASE_MS))
    for column, name in enumerate(("open", "high", "low", "close", "volume", "turnover"), 1):
        assert [float(row[column]) for row in closed] == getattr(series, name)[: len(closed)].tolist()


@pytest.mark.parametrize(
    ("query", "rows"),
    [
        ({}, 200),
        ({"limit": 5000}, 961),  # ten days and the running bar: less than the 1000 that a page holds
        ({"start": NOW_MS + BASE_MS}, 0),
        ({"end": START_MS - 1}, 0),
        ({"start": START_MS, "end": START_MS + 10 * BASE_MS}, 11),
        ({"start": START_MS + 10 * BASE_MS, "end": START_MS}, 0),
        ({"interval": "60", "limit": 1000}, 241),
        ({"interval": "240", "limit": 2}, 2),
    ],
)
def test_kline_window(query: dict[str, Any], rows: int) -> None:
    body = answer("kline", **{"symbol": "BTCUSDT", "interval": "15", **query})
    assert body["retCode"] == 0
    assert len(body["result"]["list"]) == rows


@pytest.mark.parametrize(
    ("path", "query", "message"),
    [
        ("kline", {"interval": "15"}, "symbol is required"),
        ("kline", {"symbol": "BTCUSDT"}, "interval is required"),
        ("kline", {"symbol": "NOUSDT", "interval": "15"}, "Not supported symbols"),
        ("kline", {"symbol": "BTCUSDT", "interval": "1"}, "interval 1 is not served"),
        ("kline", {"symbol": "BTCUSDT", "interval": "15", "category": "spot"}, "Category is invalid"),
        ("funding/history", {"symbol": "BTCUSDT", "category": "inverse"}, "Category is invalid"),
        ("tickers", {"category": "margin"}, "Category is invalid"),
        ("kline", {"symbol": "BTCUSDT", "interval": "15", "start": "soon"}, "start must be a whole number"),
        ("kline", {"symbol": "BTCUSDT", "interval": "15", "start": "-1"}, "start must be a whole number"),
        ("kline", {"symbol": "BTCUSDT", "interval": "15", "limit": "0"}, "limit must lie between 1 and 1000"),
        ("instruments-info", {}, "Category is invalid"),
        ("instruments-info", {"category": "linear", "cursor": "elsewhere"}, "cursor is invalid"),
        ("tickers", {"category": "linear", "symbol": "NOUSDT"}, "Not supported symbols"),
        ("funding/history", {"category": "linear", "symbol": "BTCUSDT", "startTime": "1"}, "endTime is required"),
    ],
)
def test_wrong_parameters_are_refused_with_10001(path: str, query: dict[str, Any], message: str) -> None:
    body = answer(path, **query)
    assert (body["http"], body["retCode"], body["result"]) == (200, 10001, {})
    assert message in body["retMsg"]


def test_unknown_route_is_answered_with_10017() -> None:
    body = answer("nowhere")
    assert (body["http"], body["retCode"]) == (404, 10017)


def test_instrument_item_has_every_field_of_the_exchange() -> None:
    body = answer("instruments-info", category="linear", symbol="BTCUSDT")
    (item,) = body["result"]["list"]
    expected = {
        "contractType": "LinearPerpetual",
        "status": "Trading",
        "quoteCoin": "USDT",
        "settleCoin": "USDT",
        "launchTime": "1584230400000",
        "deliveryTime": "0",
        "fundingInterval": 480,
        "leverageFilter": {"minLeverage": "1", "maxLeverage": "100.00", "leverageStep": "0.01"},
    }
    assert {name: item[name] for name in expected} == expected
    assert item["lotSizeFilter"]["qtyStep"] == item["lotSizeFilter"]["minOrderQty"] == "0.001"
    assert item["lotSizeFilter"]["minNotionalValue"] == "5"
    assert set(item["priceFilter"]) == {"minPrice", "maxPrice", "tickSize"}
    assert body["result"]["nextPageCursor"] == ""


@pytest.mark.parametrize("decode", [False, True], ids=["cursor as received", "cursor decoded by the client"])
def test_instruments_come_page_by_page(decode: bool) -> None:
    async def pages(ask: Ask) -> list[str]:
        symbols, cursor = [], ""
        while True:
            query = {"category": "linear", "limit": 20} | ({"cursor": cursor} if cursor else {})
            result = (await ask("instruments-info", **query))["result"]
            symbols += [item["symbol"] for item in result["list"]]
            cursor = result["nextPageCursor"]
            if decode:
                cursor = cursor.replace("%3D", "=").replace("%2C", ",")
            if not cursor:
                return symbols

    assert over_rest(pages) == list(MARKET.symbols)


@pytest.mark.parametrize(
    ("query", "count"), [({"symbol": "NOUSDT"}, 0), ({"status": "Closed"}, 0), ({"baseCoin": "ETH"}, 1), ({}, 51)]
)
def test_instruments_can_be_filtered(query: dict[str, str], count: int) -> None:
    assert len(answer("instruments-info", category="linear", **query)["result"]["list"]) == count


@pytest.mark.parametrize("category", ["spot", "inverse", "option"])
@pytest.mark.parametrize("path", ["instruments-info", "tickers"])
def test_nothing_is_listed_in_other_categories(path: str, category: str) -> None:
    body = answer(path, category=category)
    assert (body["retCode"], body["result"]["category"], body["result"]["list"]) == (0, category, [])


STATUSES = {"BTCUSDT": "Trading", "DOGEUSDT": "Delivering", "LUNAUSDT": "Closed", "NEWUSDT": "PreLaunch"}


class ChangingMarket(TableMarket):
    """One contract of each status; one has ended yesterday, one ends tomorrow."""

    symbols = tuple(STATUSES)

    def instrument(self, symbol: str) -> Instrument:
        ends = {"DOGEUSDT": NOW_MS + DAY_MS, "LUNAUSDT": NOW_MS - DAY_MS}
        known = instrument_of(symbol, self.series)
        return replace(known, status=STATUSES[symbol], delivery_time_ms=ends.get(symbol))


@pytest.mark.parametrize(
    ("query", "symbols"),
    [
        ({}, {"BTCUSDT": "0"}),
        ({"status": "Trading"}, {"BTCUSDT": "0"}),
        ({"status": "Delivering"}, {"DOGEUSDT": str(NOW_MS + DAY_MS)}),
        ({"status": "Closed"}, {"LUNAUSDT": str(NOW_MS - DAY_MS)}),
        ({"status": "PreLaunch"}, {"NEWUSDT": "0"}),
        ({"symbol": "LUNAUSDT"}, {}),
    ],
)
def test_instruments_of_each_status_say_when_they_end(query: dict[str, str], symbols: dict[str, str]) -> None:
    body = over_rest(lambda ask: ask("instruments-info", category="linear", **query), ChangingMarket(20))
    items = body["result"]["list"]
    assert {item["symbol"]: item["deliveryTime"] for item in items} == symbols
    assert {item["status"] for item in items} <= {query.get("status", "Trading")}


def test_funding_history_is_newest_first_and_ends_now() -> None:
    rows = answer("funding/history", category="linear", symbol="BTCUSDT")["result"]["list"]
    # Three a day for ten days; midnight of the eleventh has passed, the market's very first instant pays nothing.
    assert len(rows) == 30
    assert int(rows[0]["fundingRateTimestamp"]) == START_MS + 10 * DAY_MS
    assert {int(a["fundingRateTimestamp"]) - int(b["fundingRateTimestamp"]) for a, b in zip(rows, rows[1:])} == {  # noqa: B905, RUF007
        FUNDING_MS
    }
    window = {"startTime": START_MS + DAY_MS, "endTime": START_MS + 2 * DAY_MS}
    assert len(answer("funding/history", category="linear", symbol="BTCUSDT", **window)["result"]["list"]) == 4
    page = answer("funding/history", category="linear", symbol="BTCUSDT", limit=2)["result"]["list"]
    assert page == rows[:2]


def test_ticker_agrees_with_the_candles() -> None:
    async def both(ask: Ask) -> tuple[dict[str, str], list[list[str]]]:
        ticker = await ask("tickers", category="linear", symbol="BTCUSDT")
        bars = await ask("kline", symbol="BTCUSDT", interval="15", limit=97)
        return ticker["result"]["list"][0], bars["result"]["list"]

    ticker, bars = over_rest(both)
    assert ticker["lastPrice"] == ticker["markPrice"] == bars[0][4]
    assert float(ticker["highPrice24h"]) == max(float(bar[2]) for bar in bars)
    assert float(ticker["lowPrice24h"]) == min(float(bar[3]) for bar in bars)
    assert float(ticker["volume24h"]) == pytest.approx(sum(float(bar[5]) for bar in bars))
    assert float(ticker["bid1Price"]) < float(ticker["ask1Price"])
    assert int(ticker["nextFundingTime"]) == START_MS + 10 * DAY_MS + FUNDING_MS
    assert all(isinstance(value, str) for value in ticker.values())


def test_tickers_leave_out_what_is_not_listed_yet() -> None:
    items = answer("tickers", category="linear")["result"]["list"]
    assert {"BTCUSDT", "XMRUSDT"} <= {item["symbol"] for item in items}
    assert "SEIUSDT" not in {item["symbol"] for item in items}  # launched in August 2023


@pytest.mark.parametrize(
    ("value", "text"),
    [(47000.0, "47000"), (0.1, "0.1"), (1e-07, "0.0000001"), (1.25e22, "12500000000000000000000"), (0.0, "0")],
)
def test_number_is_plain_and_reads_back(value: float, text: str) -> None:
    assert number(value) == text
    assert float(text) == value


Talk = Callable[[aiohttp.ClientWebSocketResponse, SteppedClock], Awaitable[Any]]


def over_socket(talk: Talk, market: Any = MARKET, now_ms: int = NOW_MS) -> Any:
    async def run() -> Any:
        clock = SteppedClock(now_ms)
        async with (
            serve(market, clock) as address,
            aiohttp.ClientSession() as session,
            session.ws_connect(address.ws_url) as ws,
        ):
            return await asyncio.wait_for(talk(ws, clock), 20)

    return asyncio.run(run())


async def said(ws: aiohttp.ClientWebSocketResponse, message: Any) -> dict[str, Any]:
    """The next message after sending one."""
    await ws.send_str(message if isinstance(message, str) else orjson.dumps(message).decode())
    return await ws.receive_json()


def test_ping_is_answered_with_pong() -> None:
    async def talk(ws: aiohttp.ClientWebSocketResponse, clock: SteppedClock) -> dict[str, Any]:
        return await said(ws, {"req_id": "1", "op": "ping"})

    pong = over_socket(talk)
    assert pong.pop("conn_id")
    assert pong == {"success": True, "ret_msg": "pong", "req_id": "1", "op": "ping"}


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"op": "subscribe", "args": ["kline.15.NOUSDT"]}, "error:handler not found,topic:kline.15.NOUSDT"),
        ({"op": "subscribe", "args": ["kline.7.BTCUSDT"]}, "error:handler not found,topic:kline.7.BTCUSDT"),
        ({"op": "subscribe", "args": ["liquidation.BTCUSDT"]}, "error:handler not found,topic:liquidation.BTCUSDT"),
        ({"op": "subscribe", "args": ["kline.15.BTCUSDT", "x"]}, "error:handler not found,topic:x"),
        ({"op": "subscribe", "args": []}, "error:args must be a list of topics"),
        ({"op": "subscribe", "args": ["k" * 21_001]}, "error:args are longer than 21000"),
        ({"op": "order.create"}, "error:unknown op:order.create"),
        ("not json", "Request is not a JSON object"),
        ("[1]", "Request is not a JSON object"),
    ],
)
def test_wrong_requests_are_answered_and_change_nothing(message: Any, text: str) -> None:
    async def talk(ws: aiohttp.ClientWebSocketResponse, clock: SteppedClock) -> list[dict[str, Any]]:
        refused = await said(ws, message)
        # The good topic of a refused request was not subscribed to, and the connection lives.
        return [refused, await said(ws, {"op": "subscribe", "args": ["kline.15.BTCUSDT"]})]

    refused, accepted = over_socket(talk)
    assert (refused["success"], refused["ret_msg"]) == (False, text)
    assert (accepted["success"], accepted["ret_msg"]) == (True, "")


def test_repeated_subscription_is_refused_until_it_is_undone() -> None:
    async def talk(ws: aiohttp.ClientWebSocketResponse, clock: SteppedClock) -> list[str]:
        args = ["kline.15.BTCUSDT"]
        return [
            (await said(ws, {"op": operation, "args": args}))["ret_msg"]
            for operation in ("subscribe", "subscribe", "unsubscribe", "subscribe")
        ]

    assert over_socket(talk) == ["", "error:already subscribed,topic:kline.15.BTCUSDT", "", ""]


def test_closed_bars_are_pushed_once_in_order_and_equal_rest() -> None:
    """The clock leaps over three closes: each is confirmed once, then the running bar comes."""

    async def talk(ws: aiohttp.ClientWebSocketResponse, clock: SteppedClock) -> list[dict[str, Any]]:
        await said(ws, {"op": "subscribe", "args": ["kline.15.BTCUSDT", "kline.15.ETHUSDT"]})
        clock.advance_to(NOW_MS + 3 * BASE_MS)
        return [await ws.receive_json() for _ in range(8)]

    messages = over_socket(talk)
    assert {message["type"] for message in messages} == {"snapshot"}
    assert {message["ts"] for message in messages} == {NOW_MS + 3 * BASE_MS}
    first_ms = NOW_MS // BASE_MS * BASE_MS
    shown = [(message["topic"], message["data"][0]["start"], message["data"][0]["confirm"]) for message in messages]
    assert shown == [
        (topic, first_ms + bar * BASE_MS, bar < 3)
        for bar in range(4)
        for topic in ("kline.15.BTCUSDT", "kline.15.ETHUSDT")
    ]
    item, series = messages[0]["data"][0], MARKET.candles("BTCUSDT")
    row = series.open_time_ms.tolist().index(first_ms)
    assert item == {
        "start": first_ms,
        "end": first_ms + BASE_MS - 1,
        "interval": "15",
        "open": number(float(series.open[row])),
        "close": number(float(series.close[row])),
        "high": number(float(series.high[row])),
        "low": number(float(series.low[row])),
        "volume": number(float(series.volume[row])),
        "turnover": number(float(series.turnover[row])),
        "confirm": True,
        "timestamp": NOW_MS + 3 * BASE_MS,
    }


def test_bar_is_confirmed_at_its_very_close_and_not_before() -> None:
    async def talk(ws: aiohttp.ClientWebSocketResponse, clock: SteppedClock) -> list[dict[str, Any]]:
        await said(ws, {"op": "subscribe", "args": ["kline.15.BTCUSDT"]})
        close_ms = NOW_MS // BASE_MS * BASE_MS + BASE_MS
        clock.advance_to(close_ms - 1)
        before = await ws.receive_json()
        clock.advance_to(close_ms)
        return [before, await ws.receive_json(), await ws.receive_json()]

    before, at, after = (message["data"][0] for message in over_socket(talk))
    assert [before["confirm"], at["confirm"], after["confirm"]] == [False, True, False]
    assert before["start"] == at["start"] == after["start"] - BASE_MS
    assert after["open"] == after["close"] == at["close"]
    assert after["volume"] == "0"


def test_hourly_topic_confirms_on_the_hour_only() -> None:
    async def talk(ws: aiohttp.ClientWebSocketResponse, clock: SteppedClock) -> list[bool]:
        await said(ws, {"op": "subscribe", "args": ["kline.60.BTCUSDT"]})
        confirmed = []
        for quarter in range(1, 5):
            clock.advance_to(START_MS + DAY_MS + quarter * BASE_MS)
            confirmed.append((await ws.receive_json())["data"][0]["confirm"])
        return confirmed

    assert over_socket(talk, now_ms=START_MS + DAY_MS) == [False, False, False, True]


def test_missing_bar_is_not_pushed() -> None:
    async def talk(ws: aiohttp.ClientWebSocketResponse, clock: SteppedClock) -> list[float]:
        await said(ws, {"op": "subscribe", "args": ["kline.15.BTCUSDT"]})
        clock.advance_to(8 * BASE_MS)
        return [(await ws.receive_json())["data"][0]["start"] / BASE_MS for _ in range(4)]

    market = TableMarket(20, missing=frozenset({6}))
    assert over_socket(talk, market, now_ms=4 * BASE_MS) == [4, 5, 7, 8]


def test_unsubscribed_topic_falls_silent() -> None:
    async def talk(ws: aiohttp.ClientWebSocketResponse, clock: SteppedClock) -> list[str]:
        await said(ws, {"op": "subscribe", "args": ["kline.15.BTCUSDT", "kline.15.ETHUSDT"]})
        await said(ws, {"op": "unsubscribe", "args": ["kline.15.BTCUSDT"]})
        clock.advance_to(NOW_MS + BASE_MS)
        return [(await ws.receive_json())["topic"] for _ in range(2)]

    assert over_socket(talk) == ["kline.15.ETHUSDT"] * 2


def test_idle_connection_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    async def talk(ws: aiohttp.ClientWebSocketResponse, clock: SteppedClock) -> aiohttp.WSMsgType:
        return (await ws.receive()).type

    monkeypatch.setattr("perpcast.simulator.stream.IDLE_SECONDS", 0.1)
    assert over_socket(talk) is aiohttp.WSMsgType.CLOSE


async def deaf_subscriber(address: Address) -> socket.socket:
    """A subscriber that speaks HTTP by hand and does not read, so that nothing drains its socket."""
    loop, raw = asyncio.get_running_loop(), socket.socket()
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    raw.setblocking(False)
    await loop.sock_connect(raw, ("127.0.0.1", address.port))
    upgrade = "GET /v5/public/linear HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    key = "Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
    await loop.sock_sendall(raw, (upgrade + key).encode())
    assert b"101" in await loop.sock_recv(raw, 1000)
    payload = orjson.dumps({"op": "subscribe", "args": ["kline.15.BTCUSDT"]})
    # One masked text frame, the mask being 0.
    await loop.sock_sendall(raw, bytes([0x81, 0x80 | len(payload), 0, 0, 0, 0]) + payload)
    assert b'"success":true' in await loop.sock_recv(raw, 1000)
    return raw


async def read_to_the_end(raw: socket.socket) -> int:
    """Bytes that still came before the connection ended."""
    received = 0
    with suppress(ConnectionResetError):
        while chunk := await asyncio.get_running_loop().sock_recv(raw, 1 << 20):
            received += len(chunk)
    return received


def test_client_that_does_not_read_is_cut_off_and_others_are_served() -> None:
    bars = MAX_WAITING + 10_000

    async def run() -> tuple[int, bool]:
        clock = SteppedClock(BASE_MS)
        async with serve(TableMarket(bars + 2), clock) as address, aiohttp.ClientSession() as session:
            with await deaf_subscriber(address) as raw:
                clock.advance_to(BASE_MS * (bars + 1))
                await asyncio.sleep(0.5)
                received = await asyncio.wait_for(read_to_the_end(raw), 10)
            async with session.ws_connect(address.ws_url) as ws:
                return received, (await said(ws, {"op": "ping"}))["success"]

    received, alive = asyncio.run(run())
    assert alive
    assert received < 100 * bars  # a message is more than 200 bytes long


@contextmanager
def taken_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def test_exchange_in_a_thread_serves_and_time_runs_from_the_first_subscription() -> None:
    async def first_confirmed(address: Address) -> dict[str, Any]:
        async with aiohttp.ClientSession() as session, session.ws_connect(address.ws_url) as ws:
            async with session.get(f"{address.rest_url}/v5/market/time") as response:
                before = await response.json()
            assert before["time"] == NOW_MS  # it stands
            await said(ws, {"op": "subscribe", "args": ["kline.15.BTCUSDT"]})
            while True:
                item = (await ws.receive_json())["data"][0]
                if item["confirm"]:
                    return item

    with serve_in_thread(MARKET, RunningClock(NOW_MS, 36_000, time.monotonic)) as address:
        item = asyncio.run(asyncio.wait_for(first_confirmed(address), 20))
    assert item["start"] == NOW_MS // BASE_MS * BASE_MS
    with socket.socket() as after:
        assert after.connect_ex(("127.0.0.1", address.port)) != 0


def test_taken_port_is_refused_in_one_line() -> None:
    with (
        taken_port() as port,
        pytest.raises(SetupError, match=f"port {port} cannot be used"),
        serve_in_thread(MARKET, SteppedClock(NOW_MS), port),
    ):
        pass
