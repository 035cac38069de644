"""Closed bars of all symbols, in order of time, each candle once: from the stream, with the REST interface behind it.

The candles of one symbol are handed out without a hole: what the stream left out is fetched before anything newer of
that symbol is given on, and only what the exchange does not have either is passed over. A symbol that cannot be had
holds up the others for moments only.
"""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from perpcast.errors import PerpcastError
from perpcast.market import Candle, CandleSeries
from perpcast.timeframe import floor_ms

# Candles that wait for us; with more of them the stream is not read on, and the exchange's own buffers fill.
QUEUE_CANDLES = 10_000
# After an outage so long is waited for what the stream left out, then bars are handed out without it.
CATCH_UP_SECONDS = 30.0

FetchCandles = Callable[[str, int, int], Awaitable[CandleSeries]]  # symbol, first open, end (excluded), in ms
ExchangeTime = Callable[[], Awaitable[int]]  # the exchange's clock in ms


class CandleSource(Protocol):
    """A stream of closed candles."""

    def candles(self) -> AsyncGenerator[Candle, None]:
        """Each closed candle as the exchange confirms it. Its end is taken as the end of the market."""
        ...


@dataclass(frozen=True)
class ClosedBar:
    """A bar of all symbols. `candles` are new since the bar before, by symbol and oldest first: usually this bar's
    alone. A symbol whose newest candle is older, or that is absent, was not there in time."""

    open_time_ms: int
    candles: dict[str, list[Candle]]
    failures: tuple[str, ...] = ()  # what could not be fetched meanwhile

    @property
    def present(self) -> tuple[str, ...]:
        """Symbols that have this very bar, sorted."""
        return tuple(sorted(s for s, new in self.candles.items() if new and new[-1].open_time_ms == self.open_time_ms))


class BarFeed:
    """Hands out every bar from `first_ms` on, up to `last_ms` where one is given.

    `history_ms` is the first candle of each symbol to be handed out at all, together with the first bar. A bar is
    complete when every symbol has it; else it is closed `grace_seconds` after its first candle, or as soon as the
    stream has moved on to a newer bar; before that the REST interface is asked for the rest. After `idle_seconds` of
    silence the exchange is asked whether a bar is overdue.
    """

    def __init__(
        self,
        symbols: Sequence[str],
        step_ms: int,
        *,
        stream: CandleSource,
        fetch: FetchCandles,
        exchange_time_ms: ExchangeTime,
        history_ms: int,
        first_ms: int,
        last_ms: int | None = None,
        grace_seconds: float = 2.0,
        idle_seconds: float = 30.0,
        block_bars: int = 32,
    ) -> None:
        self._step_ms = step_ms
        self._stream, self._fetch, self._exchange_time_ms = stream, fetch, exchange_time_ms
        self._first_ms, self._next_ms, self._last_ms = first_ms, first_ms, last_ms
        self._grace_seconds, self._idle_seconds, self._block_bars = grace_seconds, idle_seconds, block_bars
        self._handed = dict.fromkeys(symbols, history_ms - step_ms)  # newest candle handed out or known not to exist
        self._settled = dict.fromkeys(symbols, history_ms)  # before this, what is not here is not at the exchange
        self._buffer: dict[str, dict[int, Candle]] = {symbol: {} for symbol in symbols}
        self._arriving: asyncio.Queue[Candle | BaseException | None] = asyncio.Queue(QUEUE_CANDLES)
        self._close_before_ms = first_ms  # bars before this wait for nobody any more
        self._first_arrival_seconds: float | None = None  # of the bar that is waited for
        self._fetching: dict[str, asyncio.Task[str]] = {}  # symbols whose candles are asked for; what went wrong
        self._ended = False
        self._failures: list[str] = []
        self.dropped = 0  # candles that came twice, or from the future

    async def prime(self) -> None:
        """Fetches the history up to now, so that the first bar need not wait for it. Raises what the exchange does."""
        end_ms = min(self._next_ms, floor_ms(await self._exchange_time_ms(), self._step_ms))
        await asyncio.gather(*(self._fetch_missing(symbol, end_ms, end_ms - self._step_ms) for symbol in self._buffer))

    async def blocks(self) -> AsyncGenerator[list[ClosedBar], None]:
        """Yields bars in blocks: one bar, and with it those after it that are complete already. Iterate once."""
        pump = asyncio.create_task(self._pump())
        try:
            while self._wanted() and await self._wait():
                block = [await self._hand_out()]
                await asyncio.sleep(0)
                while len(block) < self._block_bars and self._wanted() and self._more_ready():
                    block.append(self._take())
                yield block
        finally:
            for task in (tasks := [pump, *self._fetching.values()]):
                task.cancel()
            for task in tasks:
                with suppress(asyncio.CancelledError):
                    await task

    def _wanted(self) -> bool:
        return self._last_ms is None or self._next_ms <= self._last_ms

    async def _pump(self) -> None:
        """Moves candles from the stream to the queue; a full queue holds up the stream, nothing is dropped."""
        stream = self._stream.candles()
        try:
            async for candle in stream:
                await self._arriving.put(candle)
            await self._arriving.put(None)
        except Exception as error:
            await self._arriving.put(error)
        finally:
            await stream.aclose()

    async def _wait(self) -> bool:
        """Until the next bar may be closed. False where it will not come any more."""
        while not (self._complete() or self._next_ms < self._close_before_ms):
            if self._arriving.empty() and self._newest_ms() > self._next_ms:
                await self._stream_moved_on()
            elif await self._receive():
                continue
            elif self._arrived():
                await self._sweep(self._next_ms + self._step_ms, self._next_ms, self._grace_seconds / 2)
                self._close_before_ms = self._next_ms + self._step_ms
            elif self._ended or not await self._ask_for_overdue():
                return False
        return True

    async def _receive(self) -> bool:
        """Takes what the stream has brought, waiting for a first candle if it must; False when patience ended."""
        if self._ended:
            return False
        try:
            async with asyncio.timeout(self._patience_seconds()):
                arrived = await self._arriving.get()
        except TimeoutError:
            return False
        self._accept(arrived)
        self._drain()
        return True

    def _drain(self) -> None:
        """Takes what waits in the queue, no more than completes the next bar."""
        while not (self._complete() or self._arriving.empty()):
            self._accept(self._arriving.get_nowait())

    def _patience_seconds(self) -> float:
        """Half of the grace is for the stream, the other half for the REST interface."""
        if not self._arrived():
            return self._idle_seconds
        now = asyncio.get_running_loop().time()
        if self._first_arrival_seconds is None:
            self._first_arrival_seconds = now
        return max(0.0, self._first_arrival_seconds + self._grace_seconds / 2 - now)

    def _accept(self, arrived: Candle | BaseException | None) -> None:
        if isinstance(arrived, BaseException):
            raise arrived
        if arrived is None:
            self._ended = True
            return
        waiting = self._buffer.get(arrived.symbol)
        if waiting is None or arrived.open_time_ms <= self._handed[arrived.symbol]:
            self.dropped += 1
            return
        waiting.setdefault(arrived.open_time_ms, arrived)
        if arrived.open_time_ms == self._next_ms and self._first_arrival_seconds is None:
            self._first_arrival_seconds = asyncio.get_running_loop().time()

    def _complete(self) -> bool:
        return all(self._next_ms in waiting for waiting in self._buffer.values())

    def _arrived(self) -> bool:
        return any(self._next_ms in waiting for waiting in self._buffer.values())

    def _newest_ms(self) -> int:
        return max((max(waiting) for waiting in self._buffer.values() if waiting), default=0)

    async def _stream_moved_on(self) -> None:
        """The stream brings a newer bar while this one is not complete: the REST interface says what is missing."""
        now_ms = await self._now_ms()
        if now_ms is None:  # without the exchange's clock a newer bar proves nothing: wait as for a late one
            await asyncio.sleep(self._grace_seconds / 2)
            return
        for waiting in self._buffer.values():
            for open_time_ms in [t for t in waiting if t + self._step_ms > now_ms + self._grace_seconds * 1000]:
                del waiting[open_time_ms]
                self.dropped += 1
        newest_ms = self._newest_ms()
        if newest_ms > self._next_ms:
            await self._sweep(newest_ms, newest_ms, CATCH_UP_SECONDS)
            self._close_before_ms = newest_ms

    async def _ask_for_overdue(self) -> bool:
        """After a silence: has the bar closed without a word? False where the last wanted bar is over and empty."""
        now_ms = await self._now_ms()
        late_ms = self._step_ms + self._grace_seconds * 1000
        if now_ms is None or now_ms < self._next_ms + late_ms:
            return True
        end_ms = floor_ms(now_ms, self._step_ms)
        failed = len(self._failures)
        await self._sweep(end_ms, end_ms - self._step_ms, CATCH_UP_SECONDS)
        newest_ms = self._newest_ms()
        if newest_ms >= self._next_ms:
            self._close_before_ms = newest_ms + self._step_ms
        elif self._last_ms is not None and now_ms >= self._last_ms + late_ms and len(self._failures) == failed:
            return False
        return True

    async def _now_ms(self) -> int | None:
        try:
            async with asyncio.timeout(CATCH_UP_SECONDS):
                return await self._exchange_time_ms()
        except PerpcastError as error:
            self._failures.append(str(error))
        except TimeoutError:
            self._failures.append(f"the exchange's clock: no answer within {CATCH_UP_SECONDS:g} s")
        return None

    async def _sweep(self, end_ms: int, settled_ms: int, at_most_seconds: float | None) -> None:
        """Fetches what is missing before `end_ms`; afterwards what is still missing before `settled_ms` does not exist.

        A symbol whose fetch fails is left as it is and asked for again later. One that takes longer than allowed goes
        on beside everything else: it is waited for again next time.
        """
        results = await asyncio.gather(
            *(self._fetch_in_time(symbol, end_ms, settled_ms, at_most_seconds) for symbol in self._buffer)
        )
        self._failures += [failure for failure in results if failure]

    async def _fetch_in_time(self, symbol: str, end_ms: int, settled_ms: int, seconds: float | None) -> str:
        try:
            async with asyncio.timeout(seconds):
                if symbol in self._fetching and (failure := await self._fetched(symbol)):
                    return failure
                self._fetching[symbol] = asyncio.create_task(self._try_fetch(symbol, end_ms, settled_ms))
                return await self._fetched(symbol)
        except TimeoutError:
            return f"candles of {symbol}: no answer within {seconds:g} s"

    async def _fetched(self, symbol: str) -> str:
        await asyncio.wait([self._fetching[symbol]])  # whose cancellation leaves the fetch alone
        return self._fetching.pop(symbol).result()

    async def _try_fetch(self, symbol: str, end_ms: int, settled_ms: int) -> str:
        try:
            await self._fetch_missing(symbol, end_ms, settled_ms)
        except PerpcastError as error:
            return str(error)
        return ""

    async def _fetch_missing(self, symbol: str, end_ms: int, settled_ms: int) -> None:
        start_ms = self._first_unsettled(symbol)
        if start_ms < end_ms:
            for candle in (await self._fetch(symbol, start_ms, end_ms)).candles(symbol):
                if candle.open_time_ms > self._handed[symbol]:
                    self._buffer[symbol].setdefault(candle.open_time_ms, candle)
        self._settled[symbol] = max(self._settled[symbol], settled_ms)

    def _first_unsettled(self, symbol: str) -> int:
        """The oldest bar of which it is not known whether it exists."""
        open_time_ms = max(self._handed[symbol] + self._step_ms, self._settled[symbol])
        while open_time_ms in self._buffer[symbol]:
            open_time_ms += self._step_ms
        return open_time_ms

    async def _hand_out(self) -> ClosedBar:
        """The next bar; holes before it are filled first. The history before the first bar may take its time."""
        if any(self._first_unsettled(symbol) < self._next_ms for symbol in self._buffer):
            begun = self._next_ms > self._first_ms
            await self._sweep(self._next_ms, self._next_ms, self._grace_seconds if begun else None)
        return self._take()

    def _more_ready(self) -> bool:
        """The next bar is here for every symbol, and nothing before it is missing."""
        self._drain()
        return self._complete() and all(handed + self._step_ms == self._next_ms for handed in self._handed.values())

    def _take(self) -> ClosedBar:
        candles = {symbol: self._take_candles(symbol) for symbol in self._buffer}
        bar = ClosedBar(self._next_ms, {s: new for s, new in candles.items() if new}, tuple(self._failures))
        self._failures.clear()
        self._next_ms += self._step_ms
        self._first_arrival_seconds = None
        return bar

    def _take_candles(self, symbol: str) -> list[Candle]:
        """Candles of one symbol up to the next bar, or up to the first of which nothing is known."""
        waiting, candles = self._buffer[symbol], []
        until_ms = min(self._next_ms, self._first_unsettled(symbol) - self._step_ms)
        for open_time_ms in sorted(t for t in waiting if t <= until_ms):
            candles.append(waiting.pop(open_time_ms))
        # The bar itself may still come late: only what is settled counts as passed over.
        newest_ms = candles[-1].open_time_ms if candles else self._handed[symbol]
        self._handed[symbol] = max(newest_ms, min(self._next_ms, self._settled[symbol]) - self._step_ms)
        return candles
