"""The public WebSocket: closed candles as they happen, over a connection that is watched and made again."""

import asyncio
import math
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from typing import Any

import aiohttp
import numpy as np
import orjson

from perpcast.errors import ExchangeUnavailableError
from perpcast.exchange.rate_limit import pause_seconds
from perpcast.exchange.wire import MalformedError, member, parse_confirmed_candles
from perpcast.market import Candle
from perpcast.timeframe import interval_ms

PING_SECONDS = 20.0  # as the exchange asks; it cuts a line after ten minutes without
STALE_SECONDS = 30.0  # a live line brings at least our pongs
CONNECT_SECONDS = 10.0  # for TCP, TLS and the upgrade: a few round trips
ANSWER_SECONDS = 10.0  # for the answer to a subscription: one round trip
TOPIC_SECONDS = 90.0  # a kline topic is pushed at least every 60 s
LONGEST_PATIENCE_SECONDS = 3600.0  # a topic that never speaks again costs a new line every other hour
LIVED_SECONDS = 30.0  # only after a line that held so long do the pauses begin anew
FIRST_ATTEMPTS = 6  # some seconds: until a first line was made, the network or the URL may be wrong
LONGEST_MESSAGE = 1 << 20  # bytes; a push of one or two candles has less than a thousandth
_REMEMBERED_BARS = 16  # of each symbol; a confirmation that comes twice comes soon

_ENDS = (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSING, aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR)
_NO_SUCH_TOPIC = "handler not found"
_ALREADY = "already subscribed"


class CandleStream:
    """Closed candles of `symbols` as the exchange confirms them, each bar once, until the caller stops iterating.

    A lost line is made again with growing, jittered pauses. What closed meanwhile is not replayed by the exchange: the
    caller sees the jump in `open_time_ms` and asks the REST interface. A topic that is not acknowledged, or falls
    silent while the line lives, is asked for again, with a patience that doubles until it speaks. A topic that the
    exchange refuses is named in `refused`, and left out if there is no such topic; the others live on. What cannot be
    understood or believed is dropped and counted in `malformed`.
    """

    def __init__(self, ws_url: str, symbols: Sequence[str], interval: str, *, jitter: np.random.Generator) -> None:
        self._ws_url = ws_url
        self._topics = {f"kline.{interval}.{symbol}": symbol for symbol in symbols}
        self._step_ms = interval_ms(interval)
        self._jitter = jitter
        self._recent_ms: dict[str, deque[int]] = defaultdict(lambda: deque(maxlen=_REMEMBERED_BARS))
        # Of the present line. Time is time spent listening: what waits behind a slow reader of ours is not late.
        self._listened_before_seconds = 0.0
        self._waiting_since: float | None = None  # of the frame that comes next
        self._signs: dict[str, float] = {}  # topic: when it was last asked for or heard
        self._subscribed: set[str] = set()  # topics
        self._reminders = dict.fromkeys(self._topics, 0)  # how often a topic was late since it last spoke
        self.refused: dict[str, str] = {}  # symbol: the exchange's words
        self.connections = 0
        self.resubscriptions = 0  # of single topics, on a line that lives
        self.malformed = 0  # frames and candles

    @property
    def subscribed(self) -> tuple[str, ...]:
        """Symbols whose subscription was acknowledged on the present line, sorted."""
        return tuple(sorted(self._topics[topic] for topic in self._subscribed))

    async def candles(self) -> AsyncGenerator[Candle, None]:
        """Yields each confirmed candle. Raises ExchangeUnavailableError if not even a first connection is made."""
        loop, failures = asyncio.get_running_loop(), 0
        async with aiohttp.ClientSession() as session:
            while True:
                reason, begin = "the line was closed", math.inf
                try:
                    async with await self._connect(session) as socket, aclosing(self._messages(socket)) as messages:
                        self.connections += 1
                        begin = loop.time()
                        async for message in messages:
                            for candle in self._new_candles(message):
                                yield candle
                except (aiohttp.ClientError, TimeoutError, OSError) as error:
                    reason = str(error) or type(error).__name__
                failures = 1 if loop.time() - begin >= LIVED_SECONDS else failures + 1
                if not self.connections and failures >= FIRST_ATTEMPTS:
                    raise ExchangeUnavailableError(
                        f"exchange unreachable: no connection to {self._ws_url} after {failures} tries ({reason}); "
                        "check the network and exchange.ws_url, then run the same command again"
                    )
                await asyncio.sleep(pause_seconds(failures) * self._jitter.uniform(0.5, 1.0))

    async def _connect(self, session: aiohttp.ClientSession) -> aiohttp.ClientWebSocketResponse:
        # No waiting for the other side's close frame: on a half-open line it does not come.
        leaving = aiohttp.ClientWSTimeout(ws_close=0)
        async with asyncio.timeout(CONNECT_SECONDS):
            return await session.ws_connect(self._ws_url, timeout=leaving, max_msg_size=LONGEST_MESSAGE)

    async def _messages(self, socket: aiohttp.ClientWebSocketResponse) -> AsyncGenerator[Any, None]:
        """Subscribes, keeps the line alive, yields what is JSON; ends when the line does or has fallen silent."""
        loop = asyncio.get_running_loop()
        wanted = [topic for topic, symbol in self._topics.items() if _NO_SUCH_TOPIC not in self.refused.get(symbol, "")]
        self._signs = dict.fromkeys(wanted, 0.0)
        self._listened_before_seconds = 0.0
        keeper = asyncio.create_task(self._keep(socket))
        try:
            while True:
                self._waiting_since = loop.time()
                frame = await socket.receive(timeout=STALE_SECONDS)
                self._listened_before_seconds, self._waiting_since = self._listened_seconds(), None
                if frame.type is aiohttp.WSMsgType.TEXT:
                    try:
                        yield orjson.loads(frame.data)
                    except orjson.JSONDecodeError:
                        self.malformed += 1
                elif frame.type in _ENDS:
                    self.malformed += isinstance(frame.data, aiohttp.WebSocketError)  # too long, not UTF-8, no frame
                    return
                else:
                    self.malformed += 1
        finally:
            self._waiting_since = None
            self._subscribed.clear()
            keeper.cancel()
            with suppress(asyncio.CancelledError, aiohttp.ClientError, OSError):
                await keeper

    async def _keep(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        """Subscribes, then pings and looks after the topics at each ping; closes a line on which that did not help."""
        for topic in list(self._signs):  # one request each: a bad topic fails its whole request, the answer names none
            await _send(socket, "subscribe", topic)
        while True:
            await asyncio.sleep(PING_SECONDS)
            await _send(socket, "ping")
            late = [topic for topic in self._signs if self._is_late(topic)]
            for topic in late:
                self._reminders[topic] += 1
                self._signs[topic] = self._listened_seconds()
            if any(self._reminders[topic] % 2 == 0 for topic in late):
                await socket.close()
                return
            for topic in late:
                if topic in self._subscribed:
                    self._subscribed.discard(topic)
                    await _send(socket, "unsubscribe", topic)
                await _send(socket, "subscribe", topic)
                self.resubscriptions += 1

    def _listened_seconds(self) -> float:
        waiting = 0.0 if self._waiting_since is None else asyncio.get_running_loop().time() - self._waiting_since
        return self._listened_before_seconds + waiting

    def _is_late(self, topic: str) -> bool:
        patience = TOPIC_SECONDS if topic in self._subscribed else ANSWER_SECONDS
        patience = min(patience * 2 ** min(self._reminders[topic], 16), LONGEST_PATIENCE_SECONDS)
        return self._listened_seconds() - self._signs[topic] > patience

    def _new_candles(self, message: Any) -> list[Candle]:
        """The closed candles of a message that were not handed out yet; takes note of what it says about its topic."""
        try:
            if not isinstance(message, dict):
                raise MalformedError("expected an object")
            if "topic" not in message:
                self._note_answer(message)
                return []
            topic = member(message, "topic", str)
            if topic not in self._topics:
                raise MalformedError(f"expected a topic of ours, received {topic[:80]!r}")
            candles = parse_confirmed_candles(message, self._step_ms)
            latest_ms = member(message, "ts", int) - self._step_ms  # on mainnet it is about 150 ms later
            if any(candle.open_time_ms > latest_ms for candle in candles):
                raise MalformedError(f"{topic}: a bar is confirmed before its end")
        except MalformedError:
            self.malformed += 1
            return []
        self._note_push(topic)
        recent = self._recent_ms[self._topics[topic]]
        fresh = []
        for candle in sorted(candles, key=lambda candle: candle.open_time_ms):
            if candle.open_time_ms not in recent:  # confirmations come twice at times
                recent.append(candle.open_time_ms)
                fresh.append(candle)
        return fresh

    def _note_push(self, topic: str) -> None:
        if topic in self._subscribed:
            self._signs[topic] = self._listened_seconds()
            self._reminders[topic] = 0

    def _note_answer(self, message: dict[str, Any]) -> None:
        """Raises MalformedError for what is no answer to a request of ours."""
        operation = member(message, "op", str)
        if operation in ("ping", "pong"):
            return
        topic = member(message, "req_id", str)
        if operation not in ("subscribe", "unsubscribe") or topic not in self._topics:
            raise MalformedError(f"expected an answer to a request of ours, received {operation[:80]!r}")
        if operation == "unsubscribe":
            return
        symbol, words = self._topics[topic], str(message.get("ret_msg"))[:200]
        if member(message, "success", bool) or _ALREADY in words:
            self._subscribed.add(topic)
            self.refused.pop(symbol, None)
        else:
            self.refused[symbol] = words
            if _NO_SUCH_TOPIC in words:
                self._signs.pop(topic, None)


async def _send(socket: aiohttp.ClientWebSocketResponse, operation: str, topic: str | None = None) -> None:
    request = {"req_id": topic or operation, "op": operation} | ({"args": [topic]} if topic else {})
    await socket.send_str(orjson.dumps(request).decode())
