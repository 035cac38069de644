"""The candle stream against a scripted WebSocket server on loopback, in warped time: bars once each, through lost,
silent and poisoned lines, with the constants as they are."""

import asyncio
import json
import math
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from perpcast.errors import ExchangeUnavailableError
from perpcast.exchange import CandleStream
from perpcast.market import Candle
from tests import warp

STEP_MS = 900_000
T0 = 1_700_000_100_000 // STEP_MS * STEP_MS
TOPIC = "kline.15.BTCUSDT"

Line = Callable[[web.WebSocketResponse], Awaitable[None]]
Answer = Callable[[int, dict[str, Any]], list[dict[str, Any]]]  # connection from 0 and request: the replies


def push_of(symbol: str, bar: int, *, confirm: bool = True, **changes: Any) -> dict[str, Any]:
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
    return {"topic": f"kline.15.{symbol}", "type": "snapshot", "ts": start + STEP_MS, "data": [candle | changes]}


def push(symbol: str, bar: int, **changes: Any) -> str:
    return json.dumps(push_of(symbol, bar, **changes))


def reply(request: dict[str, Any], words: str = "", *, success: bool | None = True, **changes: Any) -> dict[str, Any]:
    envelope = {"success": success, "ret_msg": words, "conn_id": "c", "req_id": request["req_id"], "op": request["op"]}
    return envelope | changes


def honest(connection: int, request: dict[str, Any]) -> list[dict[str, Any]]:
    """As the exchange answers; topics with NOT in their name do not exist."""
    if request["op"] == "ping":
        return [reply(request, "pong")]
    (topic,) = request["args"]  # one request for each topic: a bad one fails its whole request
    if "NOT" in topic:
        return [reply(request, f"error:handler not found,topic:{topic}", success=False)]
    return [reply(request)]


async def stay(line: web.WebSocketResponse) -> None:
    await asyncio.Event().wait()


def sends(*messages: str | bytes, after: float = 1.0, then: Line | None = stay) -> Line:
    """Sends these after so many seconds, when all is subscribed; then stays, or closes the line."""

    async def serve(line: web.WebSocketResponse) -> None:
        await asyncio.sleep(after)
        for message in messages:
            await (line.send_str(message) if isinstance(message, str) else line.send_bytes(message))
        if then is not None:
            await then(line)

    return serve


@dataclass
class Server:
    """Serves connection i by `lines[i]`, the last one again and again, and notes who asked for what and when."""

    lines: list[Line]
    answer: Answer = honest
    opened: list[float] = field(default_factory=list)  # on the loop's clock
    asked: list[tuple[int, float, str, str]] = field(default_factory=list)  # connection, time, op, topic
    stream: CandleStream = field(init=False)  # that listens

    async def handle(self, request: web.Request) -> web.WebSocketResponse:
        loop, number = asyncio.get_running_loop(), len(self.opened)
        self.opened.append(loop.time())
        line = web.WebSocketResponse()
        await line.prepare(request)
        reading = asyncio.create_task(self._read(line, number))
        try:
            await self.lines[min(number, len(self.lines) - 1)](line)
        except ConnectionResetError:
            pass
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        return line

    async def _read(self, line: web.WebSocketResponse, number: int) -> None:
        while (message := await line.receive()).type is aiohttp.WSMsgType.TEXT:
            request = json.loads(message.data)
            now = asyncio.get_running_loop().time()
            self.asked.append((number, now, request["op"], request.get("args", [""])[0]))
            for answer in self.answer(number, request):
                await line.send_str(json.dumps(answer))

    def requests(self, operation: str = "subscribe") -> list[tuple[int, int]]:
        """Connection and whole second of each."""
        return [(number, int(time)) for number, time, op, _ in self.asked if op == operation]

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[str]:
        application = web.Application()
        application.router.add_get("/v5/public/linear", self.handle)
        runner = web.AppRunner(application, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            yield f"ws://127.0.0.1:{runner.addresses[0][1]}/v5/public/linear"
        finally:
            await runner.cleanup()


def listen(
    server: Server, bars: int | None, symbols: tuple[str, ...] = ("BTCUSDT",), seconds: float = 86_400.0
) -> tuple[list[Candle], CandleStream]:
    """The first `bars` candles of the server, or those that come within so many seconds."""

    async def run() -> tuple[list[Candle], CandleStream]:
        received: list[Candle] = []
        async with server.listening() as url:
            stream = server.stream = CandleStream(url, symbols, "15", jitter=np.random.default_rng(1))
            try:
                async with asyncio.timeout(seconds), aclosing(stream.candles()) as candles:
                    async for candle in candles:
                        received.append(candle)
                        if len(received) == bars:
                            break
            except TimeoutError:
                assert bars is None, f"{len(received)} of {bars} bars came"
        return received, stream

    return warp.run(run())


def bars_of(candles: list[Candle]) -> list[int]:
    return [(candle.open_time_ms - T0) // STEP_MS for candle in candles]


@pytest.mark.fault("M05")
def test_stream_confirmed_candles_once_each() -> None:
    server = Server([sends(push("BTCUSDT", 0, confirm=False), *[push("BTCUSDT", 0)] * 2, push("BTCUSDT", 1))])
    candles, stream = listen(server, 2)
    assert candles[0] == Candle("BTCUSDT", T0, 10.0, 12.0, 9.0, 11.0, 5.0, 55.0)
    assert candles[1].open_time_ms == T0 + STEP_MS
    assert stream.malformed == 0


@pytest.mark.fault("M01")
def test_stream_lost_line_is_made_again_and_subscribed_again() -> None:
    server = Server([sends(push("BTCUSDT", 0), then=None), sends(push("BTCUSDT", 0), push("BTCUSDT", 3))])
    candles, stream = listen(server, 2)
    assert bars_of(candles) == [0, 3]
    assert stream.connections == 2
    assert [number for number, _ in server.requests()] == [0, 1]


@pytest.mark.fault("M02")
def test_stream_silent_line_is_left_after_the_stale_time() -> None:
    server = Server([stay, sends(push("BTCUSDT", 0))], lambda number, request: honest(number, request) * number)
    candles, _ = listen(server, 1)
    assert bars_of(candles) == [0]
    assert 30 < server.opened[1] < 31


@pytest.mark.fault("M02")
def test_stream_upgrade_without_an_answer_is_given_up() -> None:
    class Deaf(Server):
        async def handle(self, request: web.Request) -> web.WebSocketResponse:
            if not self.opened:
                self.opened.append(0.0)
                await asyncio.sleep(100)
            return await super().handle(request)

    server = Deaf([sends(push("BTCUSDT", 0))])
    _, stream = listen(server, 1)
    assert 10 < server.opened[1] < 11
    assert stream.connections == 1


@pytest.mark.fault("M02")
def test_stream_leaves_a_half_open_line_without_a_close_handshake() -> None:
    class Deaf(Server):
        async def _read(self, line: web.WebSocketResponse, number: int) -> None:
            pass

    async def run() -> float:
        loop = asyncio.get_running_loop()
        async with Deaf([sends(push("BTCUSDT", 0))]).listening() as url:
            candles = CandleStream(url, ["BTCUSDT"], "15", jitter=np.random.default_rng(1)).candles()
            await anext(candles)
            begin = loop.time()
            await candles.aclose()
            return loop.time() - begin

    assert warp.run(run()) < 1


def test_stream_pongs_keep_a_quiet_line() -> None:
    server = Server([sends(push("BTCUSDT", 0), after=85)])
    candles, stream = listen(server, 1)
    assert len(candles) == 1
    assert (stream.connections, stream.resubscriptions) == (1, 0)
    assert server.requests("ping") == [(0, 20), (0, 40), (0, 60), (0, 80)]


@pytest.mark.fault("M04")
def test_stream_refused_topic_is_named_and_not_asked_for_again() -> None:
    server = Server([sends(push("BTCUSDT", 0), then=None), sends(push("BTCUSDT", 1), after=60)])
    candles, stream = listen(server, 2, symbols=("BTCUSDT", "NOTASYMBOLUSDT"))
    assert len(candles) == 2
    assert stream.refused == {"NOTASYMBOLUSDT": "error:handler not found,topic:kline.15.NOTASYMBOLUSDT"}
    topics = [(number, topic) for number, _, op, topic in server.asked if op == "subscribe"]
    assert topics == [(0, TOPIC), (0, "kline.15.NOTASYMBOLUSDT"), (1, TOPIC)]


@pytest.mark.fault("M04")
@pytest.mark.parametrize(
    "first",
    [
        lambda request: [],
        lambda request: [reply(request, req_id="kline.15.ETHUSDT")],
        lambda request: [reply(request, req_id=None)],
        lambda request: [reply(request, success=None)],
        lambda request: [reply(request, "error:system busy", success=False)],
    ],
    ids=["no answer", "for another", "for nobody", "neither", "refused in passing"],
)
def test_stream_is_subscribed_only_by_its_own_acknowledgement(
    first: Callable[[dict[str, Any]], list[dict[str, Any]]],
) -> None:
    subscribed: list[tuple[str, ...]] = []

    def answer(number: int, request: dict[str, Any]) -> list[dict[str, Any]]:
        spoiled = request["op"] == "subscribe" and len(server.requests()) == 1
        return first(request) if spoiled else honest(number, request)

    async def serve(line: web.WebSocketResponse) -> None:
        for _ in range(3):
            await line.send_str(push("BTCUSDT", 0, confirm=False))  # this alone does not count
            await asyncio.sleep(9)
            subscribed.append(server.stream.subscribed)
        await sends(push("BTCUSDT", 0))(line)

    server = Server([serve], answer)
    _, stream = listen(server, 1)
    assert subscribed == [(), (), ("BTCUSDT",)]
    assert server.requests() == [(0, 0), (0, 20)]
    assert (stream.connections, stream.refused) == (1, {})


@pytest.mark.fault("M04")
def test_stream_acknowledgement_counts_for_its_own_line_only() -> None:
    subscribed: list[tuple[str, ...]] = []

    async def serve(line: web.WebSocketResponse) -> None:
        await asyncio.sleep(5)
        subscribed.append(server.stream.subscribed)
        await line.send_str(push("BTCUSDT", len(subscribed)))

    server = Server([serve], lambda number, request: [] if number else honest(number, request))
    listen(server, 2)
    assert subscribed == [("BTCUSDT",), ()]


def test_stream_already_subscribed_is_success() -> None:
    def answer(number: int, request: dict[str, Any]) -> list[dict[str, Any]]:
        words = f"error:already subscribed,topic:{TOPIC}"
        return [reply(request, words, success=False)] if request["op"] == "subscribe" else honest(number, request)

    server = Server([sends(push("BTCUSDT", 0), after=85)], answer)
    _, stream = listen(server, 1)
    assert (len(server.requests()), stream.refused) == (1, {})


def pushes_while(alive: Callable[[int], bool]) -> Line:
    """ETHUSDT each ten seconds for ever; BTCUSDT beside it in the seconds in which it is alive."""

    async def serve(line: web.WebSocketResponse) -> None:
        while True:
            second = int(asyncio.get_running_loop().time())
            for symbol in ("ETHUSDT", *["BTCUSDT"] * alive(second)):
                await line.send_str(push(symbol, second // 10, confirm=False))
            await asyncio.sleep(10)

    return serve


@pytest.mark.fault("M03")
def test_stream_silent_topic_is_subscribed_again_on_the_same_line_then_on_a_new_one() -> None:
    """Silent from second 60 on, again and again: patience 90 s, 180 s, then doubling; looked after every 20 s."""
    server = Server([pushes_while(lambda second: second < 60)])
    _, stream = listen(server, None, ("BTCUSDT", "ETHUSDT"), seconds=3000)
    again = [(number, int(time), op) for number, time, op, topic in server.asked if topic == TOPIC]
    assert again[:3] == [(0, 0, "subscribe"), (0, 160, "unsubscribe"), (0, 160, "subscribe")]
    first_of_next = again[3]
    assert first_of_next[0] == 1
    assert 340 <= first_of_next[1] <= 361
    assert (stream.connections, stream.resubscriptions) == (3, 3)


@pytest.mark.fault("M03")
def test_stream_topic_that_speaks_again_has_its_first_patience_back() -> None:
    server = Server([pushes_while(lambda second: second < 60 or 170 < second < 500)])
    _, stream = listen(server, None, ("BTCUSDT", "ETHUSDT"), seconds=640)
    again = [int(time) for _, time, op, topic in server.asked if topic == TOPIC and op == "subscribe"]
    assert again == [0, 160, 600]
    assert stream.connections == 1


def test_stream_slow_reader_is_not_taken_for_a_silent_topic() -> None:
    server = Server([sends(push("BTCUSDT", 0), push("BTCUSDT", 1))])

    async def run() -> CandleStream:
        async with server.listening() as url:
            stream = CandleStream(url, ["BTCUSDT"], "15", jitter=np.random.default_rng(1))
            async with aclosing(stream.candles()) as candles:
                await anext(candles)
                await asyncio.sleep(1000)
                await anext(candles)
            return stream

    stream = warp.run(run())
    assert (stream.connections, stream.resubscriptions) == (1, 0)


@pytest.mark.fault("M06", "M14")
@pytest.mark.parametrize(
    "poison",
    [
        "{",
        "[]",
        "{}",
        "null",
        "[" * 5000,
        b"binary",
        '{"topic":"kline.15.BTCUSDT"}',
        '{"topic":"kline.15.BTCUSDT","data":[{"confirm":1}]}',
        '{"topic":"kline.15.BTCUSDT","data":[null]}',
        '{"topic":["kline.15.BTCUSDT"],"data":[]}',
        '{"topic":"kline.15.ETHUSDT","data":[]}',
        '{"topic":null}',
        '{"op":"subscribe","req_id":"other","success":false}',
        '{"op":{},"req_id":[]}',
        push("BTCUSDT", 0, open="x"),
        push("BTCUSDT", 0, open=None),
        push("BTCUSDT", 0, low="10.5"),
        push("BTCUSDT", 0, start="1"),
        json.dumps(push_of("BTCUSDT", 0) | {"ts": None}),
        json.dumps(push_of("BTCUSDT", 0) | {"ts": T0 + STEP_MS - 60_000}),
        push("BTCUSDT", 0, start=T0 + 500 * STEP_MS),
    ],
)
def test_stream_poisoned_message_is_counted_and_survived(poison: str | bytes) -> None:
    candles, stream = listen(Server([sends(poison, push("BTCUSDT", 1))]), 1)
    assert bars_of(candles) == [1]
    assert (stream.malformed, stream.connections, stream.refused) == (1, 1, {})


@pytest.mark.fault("M14")
def test_stream_fields_that_nobody_knows_do_no_harm() -> None:
    message = push_of("BTCUSDT", 0, cross=1, note=None) | {"cs": [1]}
    candles, stream = listen(Server([sends(json.dumps(message))]), 1)
    assert bars_of(candles) == [0]
    assert stream.malformed == 0


@pytest.mark.fault("M06")
def test_stream_bar_of_a_wrong_clock_does_not_hide_those_that_follow() -> None:
    """Believed as far as one can tell from the message alone: the reader has the exchange's clock."""
    poison = json.dumps(push_of("BTCUSDT", 9000))
    candles, _ = listen(Server([sends(push("BTCUSDT", 1), poison, push("BTCUSDT", 0), push("BTCUSDT", 2))]), 4)
    assert bars_of(candles) == [1, 9000, 0, 2]


@pytest.mark.fault("M14")
@pytest.mark.parametrize(
    ("opcode", "payload"),
    [
        (aiohttp.WSMsgType.TEXT, b" " * (2 << 20)),
        (aiohttp.WSMsgType.BINARY, bytes(50 << 20)),
        (aiohttp.WSMsgType.TEXT, b"\xff"),
        (aiohttp.WSMsgType.CLOSE, b"\x00"),
    ],
    ids=["2 MiB", "50 MiB", "no UTF-8", "no close code"],
)
def test_stream_frame_that_cannot_be_read_past_costs_the_line_and_is_counted(
    opcode: aiohttp.WSMsgType, payload: bytes
) -> None:
    async def serve(line: web.WebSocketResponse) -> None:
        await line.send_frame(payload, opcode)
        await stay(line)

    server = Server([serve, sends(push("BTCUSDT", 0))])
    candles, stream = listen(server, 1)
    assert bars_of(candles) == [0]
    assert (stream.malformed, stream.connections) == (1, 2)
    assert server.opened[1] < 1  # at once, not because the line fell silent


def test_stream_pauses_double_up_to_half_a_minute_while_no_line_lives() -> None:
    async def close(line: web.WebSocketResponse) -> None:
        await asyncio.sleep(0.01)

    async def live(line: web.WebSocketResponse) -> None:
        await asyncio.sleep(31)

    server = Server([*[close] * 12, live, close])
    listen(server, None, seconds=300)
    pauses = np.diff(server.opened) - 0.01
    pauses[12] -= 30.99
    longest = np.minimum(0.25 * 2.0 ** np.array([*range(12), 0, 1]), 30)
    assert ((pauses[:14] >= longest / 2 - 0.01) & (pauses[:14] <= longest + 0.01)).all(), pauses
    assert len(server.opened) < 40


def test_stream_nothing_listens_is_unreachable() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"ws://127.0.0.1:{free.getsockname()[1]}"

        async def run() -> None:
            stream = CandleStream(url, ["BTCUSDT"], "15", jitter=np.random.default_rng(1))
            async with aclosing(stream.candles()) as candles:
                async for _ in candles:
                    pass

        with pytest.raises(ExchangeUnavailableError, match="no connection to ws://.* after 6 tries"):
            warp.run(run())


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([TOPIC, "subscribe"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(max_size=4) | st.sampled_from(["topic", "data", "op", "req_id", "ts"]), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@st.composite
def spoiled_pushes(draw: st.DrawFn) -> str:
    """A true push, some fields of it replaced or missing, perhaps cut or with a character too many."""
    message = push_of("BTCUSDT", draw(st.integers(-3, 40)))
    number = st.decimals(-5, 1e20, places=2).map(str) | st.sampled_from(["", "0", "1e999", "nan", "-0", "1_0", " 1"])
    for part in (message, message["data"][0]):
        for key in draw(st.lists(st.sampled_from(sorted(part)), max_size=2)):
            part[key] = draw(number | st.integers(-(2**70), 2**70) | JSON)
            if draw(st.booleans()) and draw(st.booleans()):
                del part[key]
    text = json.dumps(message)
    place = draw(st.none() | st.integers(0, len(text)))
    return (
        text if place is None else text[:place] + draw(st.text(max_size=2)) + draw(st.sampled_from([text[place:], ""]))
    )


@pytest.mark.fault("M14")
@given(st.lists(spoiled_pushes() | JSON.map(json.dumps) | st.text() | st.binary(), max_size=30))
def test_stream_whatever_comes_only_candles_that_keep_the_rules_go_out(frames: list[str | bytes]) -> None:
    frames = [frame if isinstance(frame, bytes) else frame.encode("utf-8", "replace").decode() for frame in frames]
    last = push("ETHUSDT", 7, volume="123456.5")

    async def run() -> tuple[list[Candle], CandleStream]:
        received = []
        async with Server([sends(*frames, last)]).listening() as url:
            stream = CandleStream(url, ["BTCUSDT", "ETHUSDT"], "15", jitter=np.random.default_rng(1))
            async with asyncio.timeout(60), aclosing(stream.candles()) as candles:
                async for candle in candles:
                    if candle.volume == 123456.5:
                        break
                    received.append(candle)
        return received, stream

    received, stream = warp.run(run())
    assert stream.connections == 1
    assert stream.malformed <= len(frames)
    for candle in received:
        values = (candle.open, candle.high, candle.low, candle.close, candle.volume, candle.turnover)
        assert all(type(value) is float and math.isfinite(value) for value in values)
        assert 0 < candle.low <= min(candle.open, candle.close) <= max(candle.open, candle.close) <= candle.high
        assert min(candle.volume, candle.turnover) >= 0
        assert candle.open_time_ms % STEP_MS == 0
    assert len({(candle.symbol, candle.open_time_ms) for candle in received}) == len(received)
