"""The local exchange's faults: which requests a rule takes, and what each fault looks like on the wire."""

import asyncio
import gzip
import socket
import zlib
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import orjson
import pytest

from perpcast.simulator import faults
from perpcast.simulator.clock import SteppedClock
from perpcast.simulator.faults import Faults
from perpcast.simulator.market import BASE_MS
from perpcast.simulator.server import Address, serve, serve_in_thread
from tests.test_simulator_market import TableMarket
from tests.test_simulator_server import MARKET, NOW_MS

TIME, KLINE = "/v5/market/time", "/v5/market/kline?symbol=BTCUSDT&interval=15"

Get = Callable[..., Awaitable[tuple[int, bytes]]]


def conversing(script: Faults, conversation: Callable[[Get], Awaitable[Any]]) -> Any:
    """Runs a conversation with an exchange of these faults; `get(path)` returns HTTP status and body."""

    async def run() -> Any:
        market = TableMarket(20)
        async with (
            serve(market, SteppedClock(10 * BASE_MS), faults=script) as address,
            aiohttp.ClientSession(address.rest_url) as session,
        ):

            async def get(path: str) -> tuple[int, bytes]:
                async with session.get(path) as response:
                    return response.status, await response.read()

            return await conversation(get)

    return asyncio.run(run())


def codes(script: Faults, *paths: str) -> list[int]:
    """HTTP status of each request, one after the other."""

    async def ask(get: Get) -> list[int]:
        return [(await get(path))[0] for path in paths]

    return conversing(script, ask)


def answer(spoil: faults.Spoil, path: str = KLINE) -> tuple[int, Any]:
    """HTTP status and JSON of one spoiled answer."""
    script = Faults()
    rule = script.add(spoil)
    status, body = conversing(script, lambda get: get(path))
    assert rule.fired == 1
    return status, orjson.loads(body)


def test_rule_spoils_as_often_as_it_says_after_those_it_lets_pass() -> None:
    script = Faults()
    rule = script.add(faults.status(503), path="time", skip=1, times=2)
    assert codes(script, TIME, KLINE, TIME, KLINE, TIME, TIME) == [200, 200, 503, 200, 503, 200]
    assert rule.fired == 2
    assert (script.requests("time"), script.requests("kline"), script.requests()) == (4, 2, 6)


def test_rule_without_an_end_goes_on_until_it_is_ended() -> None:
    script = Faults()
    rule = script.add(faults.status(500), times=None)
    assert codes(script, TIME, TIME, TIME) == [500, 500, 500]
    rule.times = 0
    assert codes(script, TIME) == [200]
    assert rule.fired == 3


def test_rule_takes_the_requests_of_its_symbol() -> None:
    script = Faults()
    script.add(faults.status(500), path="kline", symbol="BTCUSDT", times=None)
    other = KLINE.replace("BTCUSDT", "ETHUSDT")
    assert codes(script, KLINE, other, TIME) == [500, 200, 200]


def test_first_rule_wins_and_later_ones_do_not_see_the_request() -> None:
    script = Faults()
    script.add(faults.status(500))
    second = script.add(faults.status(502), skip=1)
    assert codes(script, TIME, TIME, TIME, TIME) == [500, 200, 502, 200]
    assert second.fired == 1


def test_requests_that_are_turned_away_are_counted_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perpcast.simulator.ip_limit.REQUESTS", 1)
    script = Faults()
    assert codes(script, TIME, TIME, TIME) == [200, 403, 403]
    assert script.requests() == 3


def test_rules_can_be_added_from_another_thread_than_the_exchange_runs_in() -> None:
    async def ask(address: Address) -> int:
        async with aiohttp.ClientSession() as session, session.get(address.rest_url + TIME) as response:
            return response.status

    script = Faults()
    with serve_in_thread(MARKET, SteppedClock(NOW_MS), faults=script) as address:
        seen = [asyncio.run(ask(address))]
        script.add(faults.status(418))
        seen.append(asyncio.run(ask(address)))
    assert (seen, script.requests()) == ([200, 418], 2)


def test_status_has_its_body_and_headers() -> None:
    async def ask() -> tuple[int, str, bytes]:
        script = Faults()
        script.add(faults.status(429, b"<html>busy</html>", {"Retry-After": "7"}))
        async with (
            serve(TableMarket(3), SteppedClock(0), faults=script) as address,
            aiohttp.ClientSession() as session,
            session.get(address.rest_url + TIME) as response,
        ):
            return response.status, response.headers["Retry-After"], await response.read()

    assert asyncio.run(ask()) == (429, "7", b"<html>busy</html>")


def test_ret_code_comes_with_http_200_an_empty_result_and_the_markets_time() -> None:
    status, body = answer(faults.ret_code(10006, "Too many visits!"))
    assert status == 200
    assert body == {
        "retCode": 10006,
        "retMsg": "Too many visits!",
        "result": {},
        "retExtInfo": {},
        "time": 10 * BASE_MS,
    }


def test_ret_code_has_its_headers() -> None:
    async def ask() -> str:
        script = Faults()
        script.add(faults.ret_code(10006, "Too many visits!", {"X-Bapi-Limit-Reset-Timestamp": "5"}))
        async with (
            serve(TableMarket(3), SteppedClock(0), faults=script) as address,
            aiohttp.ClientSession() as session,
            session.get(address.rest_url + TIME) as response,
        ):
            assert response.content_type == "application/json"
            return response.headers["X-Bapi-Limit-Reset-Timestamp"]

    assert asyncio.run(ask()) == "5"


def test_answers_can_be_edited_at_each_depth() -> None:
    assert answer(faults.envelope(lambda whole: whole | {"time": 7}), TIME)[1]["time"] == 7
    _, body = answer(faults.result(lambda page: page | {"symbol": "ETHUSDT"}))
    assert body["result"]["symbol"] == "ETHUSDT"
    _, body = answer(faults.rows(lambda rows: [*rows[:2], ["0", "NaN"]]))
    page = body["result"]["list"]
    assert [row[0] for row in page] == [str(10 * BASE_MS), str(9 * BASE_MS), "0"]
    assert page[2] == ["0", "NaN"]
    assert body["result"]["symbol"] == "BTCUSDT"


def test_body_is_sent_as_it_is() -> None:
    script = Faults()
    script.add(faults.body(b'{"retCode": NaN'))
    assert conversing(script, lambda get: get(TIME)) == (200, b'{"retCode": NaN')


def test_truncated_gzip_is_half_of_the_honest_answer_with_a_length_that_fits() -> None:
    async def ask() -> tuple[bytes, bytes]:
        script = Faults()
        script.add(faults.truncated_gzip())
        async with (
            serve(TableMarket(20), SteppedClock(10 * BASE_MS), faults=script) as address,
            aiohttp.ClientSession(address.rest_url, auto_decompress=False) as session,
        ):
            async with session.get(KLINE) as response:
                assert response.headers["Content-Encoding"] == "gzip"
                packed = await response.read()
            async with session.get(KLINE) as response:
                return packed, await response.read()

    packed, honest = asyncio.run(ask())
    partial = zlib.decompressobj(31).decompress(packed)
    assert honest.startswith(partial)
    assert 0 < len(partial) < len(honest)
    with pytest.raises(EOFError):
        gzip.decompress(packed)


def test_delay_holds_back_one_answer_and_no_other() -> None:
    async def ask(get: Get) -> list[str]:
        order: list[str] = []

        async def note(name: str) -> None:
            assert (await get(KLINE if name == "delayed" else TIME))[0] == 200
            order.append(name)

        delayed = asyncio.create_task(note("delayed"))
        while not script.requests("kline"):
            await asyncio.sleep(0.001)
        await note("prompt")
        await delayed
        return order

    script = Faults()
    script.add(faults.delay(0.1), path="kline")
    assert conversing(script, ask) == ["prompt", "delayed"]


def test_delayed_answer_whose_client_has_gone_does_not_hold_up_the_end() -> None:
    async def ask(address: Address) -> None:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(0.05)) as session:
            with pytest.raises(TimeoutError):
                await session.get(address.rest_url + TIME)

    script = Faults()
    script.add(faults.delay(3600.0))
    with serve_in_thread(MARKET, SteppedClock(NOW_MS), faults=script) as address:
        asyncio.run(ask(address))
    assert script.requests() == 1


def received_until_reset(after_bytes: int) -> bytes:
    """What a client reads by hand before its connection is reset; an orderly end fails the test."""
    script = Faults()
    script.add(faults.reset(after_bytes))
    received = bytearray()

    def read(raw: socket.socket) -> None:
        while chunk := raw.recv(1 << 16):
            received.extend(chunk)

    with (
        serve_in_thread(MARKET, SteppedClock(NOW_MS), faults=script) as address,
        socket.create_connection(("127.0.0.1", address.port)) as raw,
    ):
        raw.sendall(f"GET {KLINE}&limit=1000 HTTP/1.1\r\nHost: x\r\n\r\n".encode())
        with pytest.raises(ConnectionResetError):
            read(raw)
    return bytes(received)


def test_reset_before_an_answer() -> None:
    assert received_until_reset(0) == b""


@pytest.mark.parametrize("after_bytes", [1, 1000, 40_000])
def test_reset_after_so_many_bytes_of_the_body(after_bytes: int) -> None:
    head, _, body = received_until_reset(after_bytes).partition(b"\r\n\r\n")
    assert b"200 OK" in head
    assert len(body) == after_bytes
    length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
    assert length > after_bytes


def test_handshake_of_a_websocket_can_be_spoiled() -> None:
    async def run() -> None:
        script = Faults()
        script.add(faults.status(503), path="public")
        async with (
            serve(TableMarket(3), SteppedClock(0), faults=script) as address,
            aiohttp.ClientSession() as session,
        ):
            with pytest.raises(aiohttp.WSServerHandshakeError, match="503"):
                await session.ws_connect(address.ws_url)
            async with session.ws_connect(address.ws_url) as ws:
                await ws.send_str('{"op": "ping"}')
                assert (await ws.receive_json())["success"]

    asyncio.run(run())
