"""Stream, REST client and feed against the local exchange through a network that fails, in warped time and with the
constants as they are: afterwards every symbol has every bar, once, in order, as the exchange has it."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import numpy as np
import pytest
from aiohttp import web

from perpcast.exchange import BybitClient, CandleStream
from perpcast.live.feed import BarFeed, ClosedBar
from perpcast.market import Candle
from perpcast.simulator.clock import RunningClock
from perpcast.simulator.faults import Faults, delay
from perpcast.simulator.server import serve
from perpcast.simulator.synthetic import SyntheticMarket
from perpcast.timeframe import parse_time, to_ms
from tests import warp
from tests.tcp_proxy import TcpProxy

STEP_MS = 900_000
SPEED = 90.0  # a bar in ten seconds: an outage of 60 s costs six
HISTORY_BARS = 5
LAST_BARS = 3  # when all must be well again
NOW = to_ms(parse_time("2022-03-01T00:07Z"))
FIRST_MS = to_ms(parse_time("2022-03-01T00:00Z"))
SYMBOLS = ("BTCUSDT", "ETHUSDT", "SOLUSDT")

MARKET = SyntheticMarket(seed=3, edge=0.0, end_ms=FIRST_MS + 100 * STEP_MS)

Edit = Callable[[dict[str, Any]], list[str | bytes]]  # a message of either side: what goes on instead


class Recorded:
    """The stream, and a list of what it brought."""

    def __init__(self, stream: CandleStream) -> None:
        self._stream = stream
        self.seen: list[Candle] = []

    async def candles(self) -> AsyncGenerator[Candle, None]:
        async with aclosing(self._stream.candles()) as candles:
            async for candle in candles:
                self.seen.append(candle)
                yield candle


@dataclass
class Outcome:
    bars: list[ClosedBar] = field(default_factory=list)
    delays: list[float] = field(default_factory=list)  # of each bar, in seconds after its end
    streamed: list[Candle] = field(default_factory=list)
    stream: CandleStream = field(init=False)

    def handed(self, symbol: str) -> list[Candle]:
        return [candle for bar in self.bars for candle in bar.candles.get(symbol, [])]

    def streamed_bars(self, symbol: str) -> list[int]:
        return [(c.open_time_ms - FIRST_MS) // STEP_MS for c in self.streamed if c.symbol == symbol]


@dataclass
class Network:
    """What lies between us and the exchange: a proxy for everything, and within it one that understands WebSocket."""

    proxy: TcpProxy
    edit: Edit
    lines: list[web.WebSocketResponse] = field(default_factory=list)  # to us, oldest first

    @asynccontextmanager
    async def relay(self, ws_url: str) -> AsyncIterator[str]:
        """Passes on what `edit` leaves of each message."""

        async def handle(request: web.Request) -> web.WebSocketResponse:
            near = web.WebSocketResponse()
            await near.prepare(request)
            self.lines.append(near)
            async with aiohttp.ClientSession() as session, session.ws_connect(ws_url) as far:
                await asyncio.gather(self._pass_on(near, far), self._pass_on(far, near), return_exceptions=True)
            return near

        application = web.Application()
        application.router.add_get("/", handle)
        runner = web.AppRunner(application, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        try:
            yield f"ws://127.0.0.1:{runner.addresses[0][1]}/"
        finally:
            await runner.cleanup()

    async def _pass_on(self, source: Any, sink: Any) -> None:
        async for message in source:
            for edited in self.edit(json.loads(message.data)):
                await (sink.send_str(edited) if isinstance(edited, str) else sink.send_bytes(edited))
        await sink.close()


Fault = Callable[[Network], Awaitable[None]]


def honestly(message: dict[str, Any]) -> list[str | bytes]:
    return [json.dumps(message)]


async def nothing(network: Network) -> None:
    pass


def follow(
    bars: int,
    fault: Fault = nothing,
    edit: Edit | None = None,
    fault_seconds: float = 45.0,
    faults: Faults | None = None,
) -> Outcome:
    """So many bars from FIRST_MS on. The network fails as `fault` says, `fault_seconds` after the start; `edit` puts a
    relay in the way."""

    async def break_network(network: Network) -> None:
        await asyncio.sleep(fault_seconds)
        await fault(network)

    async def run() -> Outcome:
        outcome, rng = Outcome(), np.random.default_rng(1)
        clock = RunningClock(NOW, SPEED, asyncio.get_running_loop().time)
        async with AsyncExitStack() as stack:
            address = await stack.enter_async_context(serve(MARKET, clock, faults=faults))
            network = Network(stack.enter_context(TcpProxy(address.port)), edit or honestly)
            host = f"127.0.0.1:{network.proxy.port}"
            ws_url = f"ws://{host}/v5/public/linear"
            if edit is not None:
                ws_url = await stack.enter_async_context(network.relay(ws_url))
            client = await stack.enter_async_context(BybitClient(f"http://{host}", jitter=rng))
            outcome.stream = CandleStream(ws_url, SYMBOLS, "15", jitter=rng)
            recorded = Recorded(outcome.stream)
            feed = BarFeed(
                SYMBOLS,
                STEP_MS,
                stream=recorded,
                fetch=lambda symbol, first_ms, end_ms: client.fetch_candle_series(symbol, "15", first_ms, end_ms),
                exchange_time_ms=client.fetch_server_time_ms,
                history_ms=FIRST_MS - HISTORY_BARS * STEP_MS,
                first_ms=FIRST_MS,
                last_ms=FIRST_MS + (bars - 1) * STEP_MS,
            )
            breaking = asyncio.create_task(break_network(network))
            async with asyncio.timeout(3600):
                async for block in feed.blocks():
                    outcome.bars += block
                    late_ms = [clock.now_ms() - bar.open_time_ms - STEP_MS for bar in block]
                    outcome.delays += [late / 1000 / SPEED for late in late_ms]
            await breaking
            outcome.streamed = recorded.seen
        return outcome

    return warp.run(run())


def assert_whole(outcome: Outcome, bars: int) -> None:
    end_ms = FIRST_MS + bars * STEP_MS
    assert [bar.open_time_ms for bar in outcome.bars] == list(range(FIRST_MS, end_ms, STEP_MS))
    for symbol in SYMBOLS:
        truth = MARKET.candles(symbol)
        wanted = (truth.open_time_ms >= FIRST_MS - HISTORY_BARS * STEP_MS) & (truth.open_time_ms < end_ms)
        assert outcome.handed(symbol) == list(truth[wanted].candles(symbol))


def assert_streamed(outcome: Outcome, bars: int, symbols: tuple[str, ...] = SYMBOLS) -> None:
    """The last bars but one came over the WebSocket, each once. (With the very last the feed ends, however it came.)"""
    for symbol in symbols:
        streamed = [bar for bar in outcome.streamed_bars(symbol) if bar < bars - 1]
        assert streamed[-LAST_BARS:] == list(range(bars - 1 - LAST_BARS, bars - 1))


def refused_for(seconds: float) -> Fault:
    async def fault(network: Network) -> None:
        network.proxy.refuse()
        await asyncio.sleep(seconds)
        network.proxy.accept()

    return fault


def frozen_for(seconds: float) -> Fault:
    async def fault(network: Network) -> None:
        network.proxy.freeze()
        await asyncio.sleep(seconds)
        network.proxy.thaw()

    return fault


async def cut(network: Network) -> None:
    network.proxy.cut()


async def cut_often(network: Network) -> None:
    for _ in range(20):
        network.proxy.cut()
        await asyncio.sleep(3)


async def close_in_order(network: Network) -> None:
    await network.lines[-1].close(code=1001)


@pytest.mark.fault("M01", "M02")
@pytest.mark.parametrize(
    ("fault", "bars", "missed", "connections"),
    [
        pytest.param(nothing, 8, 0, 1, id="none"),
        pytest.param(cut, 10, 0, 2, id="reset"),
        pytest.param(refused_for(0.2), 10, 0, 2, id="outage 0.2 s"),
        pytest.param(refused_for(3), 10, 1, 2, id="outage 3 s"),
        pytest.param(refused_for(60), 20, 6, 2, id="outage 60 s"),
        pytest.param(cut_often, 20, 2, 10, id="a reset every 3 s"),
        pytest.param(frozen_for(20), 12, 0, 1, id="stall 20 s"),
        pytest.param(frozen_for(60), 20, 6, 2, id="half-open 60 s"),
    ],
)
def test_after_an_outage_every_bar_is_there_once(fault: Fault, bars: int, missed: int, connections: int) -> None:
    outcome = follow(bars, fault)
    assert_whole(outcome, bars)
    assert_streamed(outcome, bars)
    assert outcome.stream.connections <= connections
    # What the stream missed came by REST.
    assert len(outcome.streamed_bars("BTCUSDT")) <= bars - missed


@pytest.mark.fault("M01", "M02")
@pytest.mark.parametrize("seed", range(3))
def test_after_faults_at_any_time_every_bar_is_there_once(seed: int) -> None:
    """Until some bars before the last: resets, outages and stalls of 0.1 to 40 s, at any time."""
    rng = np.random.default_rng(seed)

    async def fault(network: Network) -> None:
        loop = asyncio.get_running_loop()
        while loop.time() < 160:
            seconds = 0.1 * 400 ** rng.uniform()
            await asyncio.sleep(rng.uniform(0, 30))
            await (refused_for(seconds), frozen_for(seconds), cut)[rng.integers(3)](network)

    bars = 26
    outcome = follow(bars, fault, fault_seconds=0.0)
    assert_whole(outcome, bars)


@pytest.mark.fault("M01")
def test_after_a_close_in_order_every_bar_is_there_once() -> None:
    outcome = follow(10, close_in_order, honestly)
    assert_whole(outcome, 10)
    assert_streamed(outcome, 10)
    assert (outcome.stream.connections, outcome.stream.malformed) == (2, 0)


def closes(message: dict[str, Any]) -> bool:
    """Whether it confirms a bar of ETHUSDT."""
    return message.get("topic") == "kline.15.ETHUSDT" and message["data"][0]["confirm"]


def twice(message: dict[str, Any]) -> list[str | bytes]:
    return honestly(message) * 2


def never(message: dict[str, Any]) -> list[str | bytes]:
    return [] if closes(message) else honestly(message)


def late() -> Edit:
    """Each confirmation after the next one."""
    waiting: list[str | bytes] = []

    def edit(message: dict[str, Any]) -> list[str | bytes]:
        if not closes(message):
            return honestly(message)
        waiting.insert(0, json.dumps(message))
        return [waiting.pop() for _ in waiting[1:]]

    return edit


def ahead(message: dict[str, Any]) -> list[str | bytes]:
    """Before each confirmation one of a bar far away, by a clock that is as wrong."""
    if not closes(message):
        return honestly(message)
    far = json.loads(json.dumps(message))
    for part, key in ((far, "ts"), (far["data"][0], "start"), (far["data"][0], "end")):
        part[key] += 500 * STEP_MS
    return [*honestly(far), *honestly(message)]


def unfinished(message: dict[str, Any]) -> list[str | bytes]:
    """The running bar is called closed."""
    if message.get("topic") == "kline.15.ETHUSDT":
        message["data"][0]["confirm"] = True
    return honestly(message)


def garbled(message: dict[str, Any]) -> list[str | bytes]:
    """Nothing of one topic can be read."""
    if message.get("topic") != "kline.15.ETHUSDT":
        return honestly(message)
    spoiled = message | {"data": [message["data"][0] | {"close": None, "confirm": True}]}
    return [*honestly(spoiled), b"\x00", json.dumps(message)[:-9]]


def littered(message: dict[str, Any]) -> list[str | bytes]:
    """Everything is there, with much beside it."""
    if "topic" not in message:
        return honestly(message)
    return ["{}", b"\x00", '{"topic":"kline.1.XUSDT"}', *honestly(message | {"note": None, "cs": [1]}), "[" * 9999]


def oversized(message: dict[str, Any]) -> list[str | bytes]:
    """Each confirmation of one topic costs the line."""
    return [" " * (2 << 20), *honestly(message)] if closes(message) else honestly(message)


def unknown(message: dict[str, Any]) -> list[str | bytes]:
    """The exchange does not know one of the topics."""
    if message.get("args") == ["kline.15.ETHUSDT"]:
        message["args"] = ["kline.15.NOTASYMBOLUSDT"]
    return honestly(message)


OTHERS = ("BTCUSDT", "SOLUSDT")


@pytest.mark.parametrize(
    ("edit", "streamed", "malformed"),
    [
        pytest.param(twice, SYMBOLS, False, id="twice", marks=pytest.mark.fault("M05")),
        pytest.param(never, OTHERS, False, id="never", marks=pytest.mark.fault("M05")),
        pytest.param(late(), OTHERS, False, id="late", marks=pytest.mark.fault("M06")),
        pytest.param(ahead, OTHERS, False, id="ahead", marks=pytest.mark.fault("M06")),
        pytest.param(unfinished, SYMBOLS, True, id="unfinished", marks=pytest.mark.fault("M06")),
        pytest.param(garbled, OTHERS, True, id="garbled", marks=pytest.mark.fault("M14")),
        pytest.param(littered, SYMBOLS, True, id="littered", marks=pytest.mark.fault("M14")),
        pytest.param(oversized, (), True, id="oversized", marks=pytest.mark.fault("M14")),
        pytest.param(unknown, OTHERS, False, id="unknown", marks=pytest.mark.fault("M04")),
    ],
)
def test_whatever_one_topic_brings_every_bar_is_there_once(
    edit: Edit, streamed: tuple[str, ...], malformed: bool
) -> None:
    outcome = follow(10, edit=edit)
    assert_whole(outcome, 10)
    assert_streamed(outcome, 10, streamed)
    assert (outcome.stream.malformed > 0) == malformed
    assert list(outcome.stream.refused) == ["ETHUSDT"] * (edit is unknown)
    assert outcome.stream.connections == 1 or edit is oversized


@pytest.mark.fault("M03")
def test_a_topic_that_the_exchange_forgets_is_subscribed_again_and_loses_no_bar() -> None:
    forgotten = False

    def edit(message: dict[str, Any]) -> list[str | bytes]:
        nonlocal forgotten
        if message.get("op") == "unsubscribe":
            forgotten = False
        lost = forgotten and message.get("topic") == "kline.15.ETHUSDT"
        return [] if lost else honestly(message)

    async def forget(network: Network) -> None:
        nonlocal forgotten
        forgotten = True

    outcome = follow(18, forget, edit)
    assert_whole(outcome, 18)
    assert_streamed(outcome, 18)
    assert (outcome.stream.connections, outcome.stream.resubscriptions) == (1, 1)
    assert len(outcome.streamed_bars("ETHUSDT")) < 10


@pytest.mark.fault("M05")
@pytest.mark.parametrize("answer_seconds", [8.0, 1e9], ids=["slow", "hanging"])
def test_a_symbol_that_cannot_be_had_does_not_hold_up_the_others_and_comes_later(answer_seconds: float) -> None:
    """One confirmation is lost, and the REST interface does not answer in time for that symbol for a while."""
    faults = Faults()

    async def fault(network: Network) -> None:
        rule = faults.add(delay(answer_seconds), path="kline", symbol="ETHUSDT", times=None)
        await asyncio.sleep(60)
        rule.times = 0

    def edit(message: dict[str, Any]) -> list[str | bytes]:
        lost = closes(message) and message["data"][0]["start"] == FIRST_MS + 5 * STEP_MS
        return [] if lost else honestly(message)

    outcome = follow(20, fault, edit, faults=faults)
    assert_whole(outcome, 20)
    assert "ETHUSDT" not in outcome.bars[5].present
    assert all(bar.present == SYMBOLS for bar in outcome.bars[-LAST_BARS:])
    assert max(outcome.delays) < STEP_MS / 1000 / SPEED
