"""The public WebSocket (/v5/public/linear): subscriptions to kline topics, and the one loop that pushes them.

A closed bar is pushed once with `confirm: true`, in order, however late the loop wakes; the running bar in between, at
most once a second of the wall.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from itertools import count
from typing import Any, cast

import orjson
from aiohttp import WSMsgType, web

from perpcast.simulator import wire
from perpcast.simulator.clock import Clock
from perpcast.simulator.market import Market, Window, visible_candles
from perpcast.simulator.rest import SERVED_INTERVALS
from perpcast.timeframe import floor_ms

PUSH_SECONDS = 1.0
IDLE_SECONDS = 600.0  # without a message from the client the connection is cut
MAX_ARGS_LENGTH = 21_000
# A client that does not read loses its connection instead of holding up the others.
MAX_WAITING = 20_000

Topic = tuple[str, str]  # interval, symbol


class _Connection:
    """One client: what it subscribed to, and the messages that wait to be sent to it."""

    def __init__(self, connection_id: str, abort: Callable[[], None]) -> None:
        self.id = connection_id
        self.topics: set[Topic] = set()
        self.waiting: asyncio.Queue[bytes] = asyncio.Queue(MAX_WAITING)
        self._abort = abort

    def post(self, message: dict[str, Any] | bytes) -> None:
        """Queues a message; a client whose queue is full is cut off."""
        try:
            self.waiting.put_nowait(message if isinstance(message, bytes) else orjson.dumps(message))
        except asyncio.QueueFull:
            self._abort()


class Stream:
    """All public connections of the exchange."""

    def __init__(self, market: Market, clock: Clock) -> None:
        self._market, self._clock = market, clock
        self._connections: set[_Connection] = set()
        self._numbers = count(1)

    async def handle(self, request: web.Request) -> web.WebSocketResponse:
        """Serves one connection until either side ends it."""
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        assert request.transport is not None
        connection = _Connection(f"local-{next(self._numbers)}", request.transport.abort)
        self._connections.add(connection)
        writer = asyncio.create_task(_write(socket, connection))
        try:
            while (message := await socket.receive(timeout=IDLE_SECONDS)).type is WSMsgType.TEXT:
                connection.post(self.answer(connection, message.data))
        except TimeoutError:
            pass
        finally:
            self._connections.discard(connection)
            writer.cancel()
            await socket.close()
        return socket

    def answer(self, connection: _Connection, text: str) -> dict[str, Any]:
        """The reply to one message of a client; subscriptions take effect here."""
        try:
            request = orjson.loads(text)
        except orjson.JSONDecodeError:
            request = None
        if not isinstance(request, dict):
            return _reply(connection, {}, "Request is not a JSON object", success=False)
        operation, args = request.get("op"), request.get("args", [])
        if operation == "ping":
            return _reply(connection, request, "pong", success=True)
        if operation not in ("subscribe", "unsubscribe"):
            return _reply(connection, request, f"error:unknown op:{operation}", success=False)
        if not isinstance(args, list) or not args or not all(isinstance(arg, str) for arg in args):
            return _reply(connection, request, "error:args must be a list of topics", success=False)
        if sum(map(len, args)) > MAX_ARGS_LENGTH:
            return _reply(connection, request, f"error:args are longer than {MAX_ARGS_LENGTH}", success=False)
        # One bad topic fails the whole request.
        topics = [self._topic(arg) for arg in args]
        for arg, topic in zip(args, topics, strict=True):
            if topic is None:
                return _reply(connection, request, f"error:handler not found,topic:{arg}", success=False)
            if operation == "subscribe" and topic in connection.topics:
                return _reply(connection, request, f"error:already subscribed,topic:{arg}", success=False)
        if operation == "subscribe":
            connection.topics.update(cast(list[Topic], topics))
            self._clock.start()
        else:
            connection.topics.difference_update(cast(list[Topic], topics))
        return _reply(connection, request, "", success=True)

    def _topic(self, arg: str) -> Topic | None:
        kind, _, rest = arg.partition(".")
        interval, _, symbol = rest.partition(".")
        known = kind == "kline" and interval in SERVED_INTERVALS and symbol in self._market.symbols
        return (interval, symbol) if known else None

    async def push(self) -> None:
        """Pushes bars for as long as the exchange runs."""
        shown_ms = self._clock.now_ms()
        step_ms = min(SERVED_INTERVALS.values())
        while True:
            await self._clock.wait_until(floor_ms(shown_ms, step_ms) + step_ms, PUSH_SECONDS)
            now_ms = self._clock.now_ms()
            if now_ms > shown_ms:
                self._push_bars(shown_ms, now_ms)
                shown_ms = now_ms

    def _push_bars(self, shown_ms: int, now_ms: int) -> None:
        """Bars that closed after `shown_ms` and up to `now_ms`, oldest first over all topics, then the running ones."""
        topics = {topic for connection in self._connections for topic in connection.topics}
        bars = [bar for topic in sorted(topics) for bar in self._bars(topic, shown_ms, now_ms)]
        for _, topic, message in sorted(bars, key=lambda bar: bar[:2]):
            for connection in self._connections:
                if topic in connection.topics:
                    connection.post(message)

    def _bars(self, topic: Topic, shown_ms: int, now_ms: int) -> list[tuple[int, Topic, bytes]]:
        """(close, topic, message) of each bar to push."""
        interval, symbol = topic
        step_ms = SERVED_INTERVALS[interval]
        limit = (now_ms - shown_ms) // step_ms + 2
        series = visible_candles(self._market, symbol, step_ms, now_ms, Window(shown_ms - step_ms + 1, now_ms, limit))
        bars = []
        for candle in series.candles(symbol):
            close_ms = candle.open_time_ms + step_ms
            if close_ms > shown_ms:
                message = wire.kline_message(candle, interval, step_ms, close_ms <= now_ms, now_ms)
                bars.append((close_ms, topic, orjson.dumps(message)))
        return bars


async def _write(socket: web.WebSocketResponse, connection: _Connection) -> None:
    with suppress(ConnectionError):
        while True:
            await socket.send_str((await connection.waiting.get()).decode())


def _reply(connection: _Connection, request: dict[str, Any], message: str, *, success: bool) -> dict[str, Any]:
    return {
        "success": success,
        "ret_msg": message,
        "conn_id": connection.id,
        "req_id": str(request.get("req_id", "")),
        "op": str(request.get("op", "")),
    }
