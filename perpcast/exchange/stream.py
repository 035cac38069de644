"""The public WebSocket: closed candles as they happen, over a connection that is watched and made again."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, suppress
from typing import Any

import aiohttp
import numpy as np
import orjson

from perpcast.errors import ExchangeUnavailableError
from perpcast.exchange.wire import MalformedError, member, parse_confirmed_candles
from perpcast.market import Candle
from perpcast.timeframe import interval_ms

PING_SECONDS = 20.0
STALE_SECONDS = 30.0  # a live line brings at least our pongs
_LONGEST_PAUSE_SECONDS = 30.0
_ENDS = (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSING, aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR)


class CandleStream:
    """Closed candles of `symbols` as the exchange confirms them, each bar once, until the caller stops iterating.

    A lost line is made again with growing, jittered pauses. What closed meanwhile is not replayed by the exchange: the
    caller sees the jump in `open_time_ms` and asks the REST interface. A topic that the exchange refuses is left out
    and named in `refused`; the others live on.
    """

    def __init__(
        self,
        ws_url: str,
        symbols: Sequence[str],
        interval: str,
        *,
        jitter: np.random.Generator,
        first_attempts: int = 6,
        first_pause_seconds: float = 0.25,
        ping_seconds: float = PING_SECONDS,
        stale_seconds: float = STALE_SECONDS,
    ) -> None:
        self._ws_url = ws_url
        self._topics = {f"kline.{interval}.{symbol}": symbol for symbol in symbols}
        self._step_ms = interval_ms(interval)
        self._jitter = jitter
        self._first_attempts = first_attempts
        self._first_pause_seconds = first_pause_seconds
        self._ping_seconds = ping_seconds
        self._stale_seconds = stale_seconds
        self._latest_ms: dict[str, int] = {}
        self.refused: dict[str, str] = {}  # symbol: the exchange's words
        self.connections = 0
        self.malformed = 0

    async def candles(self) -> AsyncGenerator[Candle, None]:
        """Yields each confirmed candle. Raises ExchangeUnavailableError if not even a first connection is made."""
        failures = 0
        async with aiohttp.ClientSession() as session:
            while True:
                heard = False
                reason = "the line was closed"
                try:
                    async with session.ws_connect(self._ws_url, max_msg_size=1 << 22) as socket:
                        self.connections += 1
                        async with aclosing(self._messages(socket)) as messages:
                            async for message in messages:
                                heard = True
                                for candle in self._new_candles(message):
                                    yield candle
                except (aiohttp.ClientError, TimeoutError, OSError) as error:
                    reason = str(error) or type(error).__name__
                failures = 1 if heard else failures + 1
                if not self.connections and failures >= self._first_attempts:
                    raise ExchangeUnavailableError(
                        f"exchange unreachable: no connection to {self._ws_url} after {failures} tries ({reason}); "
                        "check the network and exchange.ws_url, then run the same command again"
                    )
                await asyncio.sleep(self._pause_seconds(failures))

    def _pause_seconds(self, failures: int) -> float:
        longest = min(self._first_pause_seconds * 2 ** min(failures - 1, 16), _LONGEST_PAUSE_SECONDS)
        return longest * self._jitter.uniform(0.5, 1.0)

    async def _messages(self, socket: aiohttp.ClientWebSocketResponse) -> AsyncGenerator[Any, None]:
        """Subscribes, keeps the line alive, yields what is JSON; ends when the line does or has fallen silent."""
        wanted = {topic: symbol for topic, symbol in self._topics.items() if symbol not in self.refused}
        for topic in wanted:  # one request each: a bad topic fails its whole request, and the answer does not name it
            await _send(socket, {"req_id": topic, "op": "subscribe", "args": [topic]})
        pings = asyncio.create_task(self._ping(socket))
        try:
            while True:
                frame = await socket.receive(timeout=self._stale_seconds)
                if frame.type is aiohttp.WSMsgType.TEXT:
                    try:
                        yield orjson.loads(frame.data)
                    except orjson.JSONDecodeError:
                        self.malformed += 1
                elif frame.type in _ENDS:
                    return
        finally:
            pings.cancel()
            with suppress(asyncio.CancelledError, aiohttp.ClientError, OSError):
                await pings

    async def _ping(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        while True:
            await asyncio.sleep(self._ping_seconds)
            await _send(socket, {"req_id": "ping", "op": "ping"})

    def _new_candles(self, message: Any) -> list[Candle]:
        """The closed candles of a message that were not handed out yet; takes note of a refused subscription."""
        if not isinstance(message, dict):
            self.malformed += 1
            return []
        if message.get("topic") not in self._topics:
            self._note_answer(message)
            return []
        try:
            candles = parse_confirmed_candles(message, self._step_ms)
        except MalformedError:
            self.malformed += 1
            return []
        fresh = []
        for candle in sorted(candles, key=lambda candle: candle.open_time_ms):
            if candle.open_time_ms > self._latest_ms.get(candle.symbol, -1):  # confirms come twice at times
                self._latest_ms[candle.symbol] = candle.open_time_ms
                fresh.append(candle)
        return fresh

    def _note_answer(self, message: dict[str, Any]) -> None:
        symbol = self._topics.get(str(message.get("req_id")))
        try:
            if symbol and message.get("op") == "subscribe" and not member(message, "success", bool):
                words = str(message.get("ret_msg"))
                if "already subscribed" not in words:
                    self.refused[symbol] = words
        except MalformedError:
            self.malformed += 1


async def _send(socket: aiohttp.ClientWebSocketResponse, message: dict[str, Any]) -> None:
    await socket.send_str(orjson.dumps(message).decode())
