"""The candle stream against a scripted WebSocket server on loopback: bars once each, through lost and silent lines."""

import asyncio
import json
import socket
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any

import numpy as np
import pytest
from aiohttp import web

from perpcast.errors import ExchangeUnavailableError
from perpcast.exchange import CandleStream
from perpcast.market import Candle

STEP_MS = 900_000
T0 = 1_700_000_100_000 // STEP_MS * STEP_MS

Line = Callable[[web.WebSocketResponse, list[str]], Awaitable[None]]


def push(symbol: str, bar: int, *, confirm: bool = True, **changes: Any) -> str:
    start = T0 + bar * STEP_MS
    candle = {
        "start": start,
        "end": start + STEP_MS - 1,
        "interval": "15",
        "open": "10",
        "close": "11",
        "high": "12",
        "low": "9",
        "volume": "5",
        "turnover": "55",
        "confirm": confirm,
        "timestamp": start + STEP_MS,
    }
    topic = f"kline.15.{symbol}"
    return json.dumps({"topic": topic, "type": "snapshot", "ts": start, "data": [candle | changes]})


def listen(lines: list[Line], bars: int, symbols: tuple[str, ...] = ("BTCUSDT",), **options: Any) -> Any:
    """The first `bars` candles and the stream, where connection i is served by `lines[i]` once it has subscribed."""
    served: list[web.WebSocketResponse] = []
    stream = CandleStream("ws://unused", symbols, "15", jitter=np.random.default_rng(1))

    async def handle(request: web.Request) -> web.WebSocketResponse:
        line = web.WebSocketResponse()
        await line.prepare(request)
        served.append(line)
        serve = lines[min(len(served), len(lines)) - 1]
        topics = []
        for _ in range(len(symbols) if len(served) == 1 else len(symbols) - len(stream.refused)):
            message = json.loads(await line.receive_str(timeout=5))
            assert message["op"] == "subscribe"
            (topic,) = message["args"]  # one request for each topic: a bad one fails its whole request
            topics.append(topic)
            known = "NOT" not in topic
            words = "" if known else f"error:handler not found,topic:{topic}"
            answer = {
                "success": known,
                "ret_msg": words,
                "conn_id": "c",
                "req_id": message["req_id"],
                "op": "subscribe",
            }
            await line.send_str(json.dumps(answer))
        await serve(line, topics)
        return line

    async def run() -> list[Candle]:
        nonlocal stream
        application = web.Application()
        application.router.add_get("/v5/public/linear", handle)
        runner = web.AppRunner(application, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"ws://127.0.0.1:{runner.addresses[0][1]}/v5/public/linear"
        settings: dict[str, Any] = {"first_pause_seconds": 0.001} | options
        stream = CandleStream(url, symbols, "15", jitter=np.random.default_rng(1), **settings)
        received: list[Candle] = []
        try:
            async with asyncio.timeout(10), aclosing(stream.candles()) as candles:
                async for candle in candles:
                    received.append(candle)
                    if len(received) == bars:
                        break
        finally:
            await runner.cleanup()
        return received

    return asyncio.run(run()), stream


async def stay(line: web.WebSocketResponse) -> None:
    """Keeps the connection open, answering nothing, until the client leaves."""
    async for _ in line:
        pass


def test_stream_confirmed_candles_once_each() -> None:
    async def serve(line: web.WebSocketResponse, topics: list[str]) -> None:
        for message in (push("BTCUSDT", 0, confirm=False), *[push("BTCUSDT", 0)] * 2, push("BTCUSDT", 1)):
            await line.send_str(message)
        await stay(line)

    candles, _ = listen([serve], 2)
    assert candles[0] == Candle("BTCUSDT", T0, 10.0, 12.0, 9.0, 11.0, 5.0, 55.0)
    assert candles[1].open_time_ms == T0 + STEP_MS


def test_stream_lost_line_is_made_again_and_subscribed_again() -> None:
    async def first(line: web.WebSocketResponse, topics: list[str]) -> None:
        await line.send_str(push("BTCUSDT", 0))

    async def second(line: web.WebSocketResponse, topics: list[str]) -> None:
        assert topics == ["kline.15.BTCUSDT"]
        await line.send_str(push("BTCUSDT", 0))
        await line.send_str(push("BTCUSDT", 3))
        await stay(line)

    candles, stream = listen([first, second], 2)
    assert [(candle.open_time_ms - T0) // STEP_MS for candle in candles] == [0, 3]
    assert stream.connections == 2


def test_stream_silent_line_is_left_after_the_stale_time() -> None:
    async def silent(line: web.WebSocketResponse, topics: list[str]) -> None:
        await stay(line)

    async def alive(line: web.WebSocketResponse, topics: list[str]) -> None:
        await line.send_str(push("BTCUSDT", 0))
        await stay(line)

    candles, stream = listen([silent, alive], 1, stale_seconds=0.2)
    assert len(candles) == 1
    assert stream.connections == 2


def test_stream_pongs_keep_a_quiet_line() -> None:
    async def quiet(line: web.WebSocketResponse, topics: list[str]) -> None:
        for _ in range(6):  # 0.6 s of pings, three times the stale time
            assert json.loads(await line.receive_str(timeout=5))["op"] == "ping"
            await line.send_str('{"success":true,"ret_msg":"pong","conn_id":"c","req_id":"ping","op":"ping"}')
        await line.send_str(push("BTCUSDT", 0))
        await stay(line)

    candles, stream = listen([quiet], 1, ping_seconds=0.1, stale_seconds=0.2)
    assert len(candles) == 1
    assert stream.connections == 1


def test_stream_refused_topic_is_named_and_not_asked_for_again() -> None:
    async def first(line: web.WebSocketResponse, topics: list[str]) -> None:
        await line.send_str(push("BTCUSDT", 0))

    async def second(line: web.WebSocketResponse, topics: list[str]) -> None:
        assert topics == ["kline.15.BTCUSDT"]
        await line.send_str(push("BTCUSDT", 1))
        await stay(line)

    candles, stream = listen([first, second], 2, symbols=("BTCUSDT", "NOTASYMBOLUSDT"))
    assert len(candles) == 2
    assert list(stream.refused) == ["NOTASYMBOLUSDT"]


@pytest.mark.parametrize(
    "poison",
    [
        "{",
        "[]",
        '{"topic":"kline.15.BTCUSDT"}',
        '{"topic":"kline.15.BTCUSDT","data":[{"confirm":1}]}',
        push("BTCUSDT", 0, open="x"),
        push("BTCUSDT", 0, low="10.5"),
        push("BTCUSDT", 0, start="1"),
    ],
)
def test_stream_poisoned_message_is_counted_and_survived(poison: str) -> None:
    async def serve(line: web.WebSocketResponse, topics: list[str]) -> None:
        await line.send_str(poison)
        await line.send_str(push("BTCUSDT", 1))
        await stay(line)

    candles, stream = listen([serve], 1)
    assert candles[0].open_time_ms == T0 + STEP_MS
    assert (stream.malformed, stream.connections) == (1, 1)


def test_stream_nothing_listens_is_unreachable() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"ws://127.0.0.1:{free.getsockname()[1]}"

    async def run() -> None:
        jitter = np.random.default_rng(1)
        stream = CandleStream(url, ["BTCUSDT"], "15", jitter=jitter, first_attempts=2, first_pause_seconds=0.001)
        async with aclosing(stream.candles()) as candles:
            async for _ in candles:
                pass

    with pytest.raises(ExchangeUnavailableError, match="no connection to ws://.* after 2 tries"):
        asyncio.run(run())
