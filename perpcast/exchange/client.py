"""The REST client: asks at a pace the exchange allows, asks again where that helps, believes only checked answers."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp
import numpy as np
import orjson
from yarl import URL

from perpcast.errors import ConfigError, ExchangeUnavailableError, PerpcastError, RefusedError, TemporaryExchangeError
from perpcast.exchange.rate_limit import RateLimit, pause_seconds
from perpcast.exchange.signing import Credentials, signed_headers
from perpcast.exchange.wire import (
    PAGE_BARS,
    PAGE_FUNDING_RATES,
    CandlePage,
    KeyRights,
    MalformedError,
    member,
    parse_candles,
    parse_funding_rates,
    parse_instruments,
    parse_key_rights,
    parse_listings,
    parse_server_time_ms,
    parse_tickers,
    parse_time_ms,
    read_json,
)
from perpcast.market import CandleSeries, FundingRate, Instrument, Listing, Ticker
from perpcast.timeframe import format_time, interval_ms

Value = TypeVar("Value")

# retCodes after which the same question may be answered: server time-out, rate limits, server error.
_TEMPORARY_CODES = frozenset({429, 10000, 10006, 10016, 10018})
_CLOCK_CODE = 10002

# Tries: an outage of a minute is survived; a host that never answered is likely a wrong URL; an answer that makes no
# sense four times will not make more of it.
_ATTEMPTS = 12
_ATTEMPTS_UNANSWERED = 3
_ATTEMPTS_MALFORMED = 4
_TELLING_PAUSE_SECONDS = 4.0  # a longer one is worth a notice

TIMEOUT_SECONDS = 15.0  # of one try
_CONNECTIONS = 32

BAN_SECONDS = 600.0  # Bybit lifts the ban of an IP after ten minutes of silence
RECV_WINDOW_MS = 5000

_LARGEST_STEP_BACK_MS = 60_000  # of the exchange's clock, from one host of it to another

_MOST_PAGES = 100  # of 1000 contracts: a hundred times what is listed

# Ten times the longest answer there is: whatever sends more is no exchange.
_LARGEST_BODY = 16 << 20

_STATUSES = ("Closed", "Delivering", "PreLaunch", "Trading")  # of two contracts of one name, the later one counts


class _NoAnswerError(TemporaryExchangeError):
    """Nothing came back at all."""


class _ClockError(TemporaryExchangeError):
    """The exchange found our time stamp too early or too late."""


@dataclass(frozen=True)
class _Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes


class BybitClient:
    """Public market data of category linear. An async context manager; every `fetch_` is a read, safe to repeat.

    A read that fails in passing is tried again with growing, jittered pauses, for a minute at least; not so long while
    the host has never answered at all, since then the network or the URL is likely wrong. HTTP 403 (too many requests
    from this IP) stops all requests of this client for BAN_SECONDS, then one is let through before the others. Where
    it is the very first answer, or comes again at once, it is final: this IP may lie in a region that Bybit does not
    serve. `credentials` are needed by what is signed alone. `on_notice` is told what a person should know meanwhile.
    """

    def __init__(
        self,
        rest_url: str,
        *,
        jitter: np.random.Generator,
        rate_limit: RateLimit | None = None,
        credentials: Credentials | None = None,
        on_notice: Callable[[str], None] = lambda text: None,
        attempts: int = _ATTEMPTS,
    ) -> None:
        self._rest_url = rest_url.rstrip("/")
        self._jitter = jitter
        self._rate_limit = rate_limit or RateLimit()
        self._credentials = credentials
        self._on_notice = on_notice
        self._attempts = attempts
        self._timeout = aiohttp.ClientTimeout(total=TIMEOUT_SECONDS)
        self._session: aiohttp.ClientSession | None = None
        self._answered = False
        self._told = False  # that it does not answer
        self._silent_until = 0.0  # on the event loop's clock
        self._probing: asyncio.Lock | None = None  # set from a ban on until something is answered again
        self._end: RefusedError | None = None
        self._clock_offset_ms: float | None = None  # the exchange's clock minus the event loop's
        self._latest_ms = 0  # of the exchange's clock, by its last answer
        self.requests = 0  # sent, each try counted
        self.retries = 0

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(limit=_CONNECTIONS)
        self._session = aiohttp.ClientSession(connector=connector, timeout=self._timeout, middlewares=(_once,))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()

    async def fetch_server_time_ms(self) -> int:
        """The exchange's clock, the only one that decides whether a candle is closed."""
        return await self._fetch("/v5/market/time", {}, lambda result, _: parse_server_time_ms(result))

    async def fetch_candles(self, symbol: str, interval: str, start_ms: int, end_ms: int) -> CandlePage:
        """The closed candles that open in `[start_ms, end_ms)`, at most PAGE_BARS of them.

        An empty page is an answer: the symbol was not listed then, or the exchange stood still.
        """
        step_ms = interval_ms(interval)
        if not 0 < end_ms - start_ms <= PAGE_BARS * step_ms:
            raise ValueError(f"expected a window of 1 to {PAGE_BARS} bars, received {end_ms - start_ms} ms")
        query: dict[str, str | int] = {
            "category": "linear",
            "symbol": symbol,
            "interval": interval,
            "start": start_ms,
            "end": end_ms - 1,  # the exchange's end is inclusive
            "limit": PAGE_BARS,
        }
        return await self._fetch(
            "/v5/market/kline",
            query,
            lambda result, time_ms: parse_candles(result, symbol, step_ms, start_ms, end_ms, time_ms),
            f"candles of {symbol} from {format_time(start_ms)}",
        )

    async def fetch_candle_series(self, symbol: str, interval: str, start_ms: int, end_ms: int) -> CandleSeries:
        """The closed candles that open in `[start_ms, end_ms)`, of any length, oldest first; rejected are left out."""
        page_ms = PAGE_BARS * interval_ms(interval)
        parts = []
        for first_ms in range(start_ms, end_ms, page_ms):
            page = await self.fetch_candles(symbol, interval, first_ms, min(first_ms + page_ms, end_ms))
            parts.append(page.candles)
        return CandleSeries.concatenated(*parts)

    async def fetch_funding_rates(self, symbol: str, start_ms: int, end_ms: int) -> list[FundingRate]:
        """All funding payments in `[start_ms, end_ms)`, oldest first, over as many answers as it takes.

        The interval of payments changes (8, 4, 1 hours): pages go back by the times that come, until none are left.
        """
        rates: list[FundingRate] = []
        while start_ms < end_ms and (page := await self._fetch_funding_page(symbol, start_ms, end_ms)):
            rates = [rate for rate in page if rate.funding_time_ms >= start_ms] + rates
            end_ms = page[0].funding_time_ms
        return rates

    async def _fetch_funding_page(self, symbol: str, start_ms: int, end_ms: int) -> list[FundingRate]:
        """The newest PAGE_FUNDING_RATES of the span, oldest first."""
        query: dict[str, str | int] = {
            "category": "linear",
            "symbol": symbol,
            "startTime": start_ms,
            "endTime": end_ms - 1,  # inclusive; a start without an end is an error
            "limit": PAGE_FUNDING_RATES,
        }
        return await self._fetch(
            "/v5/market/funding/history",
            query,
            lambda result, _: parse_funding_rates(result, symbol, end_ms),
            f"funding rates of {symbol} before {format_time(end_ms)}",
        )

    async def fetch_instruments(self, *statuses: str) -> dict[str, Instrument]:
        """All USDT perpetuals on coins of these statuses (none given: those that trade now), by symbol."""
        instruments: dict[str, Instrument] = {}
        for status in statuses or ("Trading",):
            instruments |= await self._fetch_listed(parse_instruments, status)
        return instruments

    async def fetch_listings(self) -> dict[str, Listing]:
        """Contracts of every kind, those that do not trade yet or any more included, by symbol."""
        listings: dict[str, Listing] = {}
        for status in _STATUSES:
            listings |= await self._fetch_listed(parse_listings, status)
        return listings

    async def _fetch_listed(
        self, parse: Callable[[Mapping[str, Any]], tuple[dict[str, Value], str]], status: str
    ) -> dict[str, Value]:
        """Every page of `instruments-info`."""
        found: dict[str, Value] = {}
        query: dict[str, str | int] = {"category": "linear", "status": status, "limit": 1000}
        for _ in range(_MOST_PAGES):
            page, cursor = await self._fetch(
                "/v5/market/instruments-info", query, lambda result, _: parse(result), "instruments"
            )
            found |= page
            if not cursor:
                return found
            if cursor == query.get("cursor"):
                break
            query["cursor"] = cursor
        raise MalformedError(f"instruments ({self._rest_url}): from one cursor to the next the list would never end")

    async def fetch_tickers(self) -> dict[str, Ticker]:
        """The present prices of every contract that has traded, by symbol."""
        return await self._fetch(
            "/v5/market/tickers", {"category": "linear"}, lambda result, _: parse_tickers(result), "tickers"
        )

    async def fetch_key_rights(self) -> KeyRights:
        """What the key of `credentials` may do."""
        return await self._fetch(
            "/v5/user/query-api", {}, lambda result, _: parse_key_rights(result), "API key", signed=True
        )

    async def _fetch(
        self,
        path: str,
        query: Mapping[str, str | int],
        parse: Callable[[Mapping[str, Any], int], Value],
        what: str = "",
        *,
        signed: bool = False,
    ) -> Value:
        """Asks until `parse(result, server_time_ms)` gives a value, or no further try makes sense."""
        what = what or path
        attempt, compared = 0, False
        while True:
            attempt += 1
            try:
                return await self._ask(path, query, parse, signed)
            except _ClockError as error:
                if compared:
                    text = f"{what}: {error}, although the clock was compared just before"
                    raise RefusedError(text, _CLOCK_CODE) from None
                self.retries += 1
                self._clock_offset_ms, compared = None, True
            except (TemporaryExchangeError, MalformedError) as error:
                if attempt >= self._attempts_worth(error):
                    raise self._final(error, what, path, attempt) from None
                self.retries += 1
                await self._pause(error, attempt)
            except RefusedError as error:
                raise RefusedError(f"{what}: {error}", error.code) from None

    def _attempts_worth(self, error: PerpcastError) -> int:
        if isinstance(error, MalformedError):
            return min(self._attempts, _ATTEMPTS_MALFORMED)
        return self._attempts if self._answered else min(self._attempts, _ATTEMPTS_UNANSWERED)

    async def _pause(self, error: PerpcastError, attempt: int) -> None:
        """Doubling from try to try, each between half and all of it, so that clients fall out of step."""
        longest = pause_seconds(attempt)
        if longest >= _TELLING_PAUSE_SECONDS and not self._told:
            self._told = True
            self._on_notice(f"{self._rest_url}: {error}; it is asked again and again")
        asked = error.retry_after_seconds if isinstance(error, TemporaryExchangeError) else None
        await asyncio.sleep(max(longest * self._jitter.uniform(0.5, 1.0), asked or 0.0))

    def _final(self, error: PerpcastError, what: str, path: str, attempt: int) -> PerpcastError:
        tries = f"after {attempt} tries"
        if isinstance(error, _NoAnswerError):
            return ExchangeUnavailableError(
                f"exchange unreachable: {self._rest_url} gave no answer {tries} ({error}); "
                "check the network and exchange.rest_url, then run the same command again"
            )
        return type(error)(f"{what} ({self._rest_url}{path}): {error}, {tries}; run the same command again to go on")

    async def _ask(
        self,
        path: str,
        query: Mapping[str, str | int],
        parse: Callable[[Mapping[str, Any], int], Value],
        signed: bool = False,
    ) -> Value:
        """One try. Raises TemporaryExchangeError or MalformedError where another may succeed, else RefusedError."""
        if signed and self._clock_offset_ms is None:
            await self._compare_clocks()
        async with self._leave_to_ask():
            answer = await self._get(path, query, signed)
            if answer.status == 403:
                raise self._banned()
            if answer.status == 429 or answer.status >= 500:
                wait = answer.headers.get("Retry-After", "")
                raise TemporaryExchangeError(f"HTTP {answer.status} from {self._rest_url}", _seconds(wait))
            if answer.status != 200:
                raise RefusedError(
                    f"HTTP {answer.status} from {self._rest_url}{path}: is exchange.rest_url a Bybit host?",
                    answer.status,
                )
            self._told = False
            if asyncio.get_running_loop().time() >= self._silent_until:  # else it was on its way before a ban
                self._probing = None
            result, time_ms = self._open_envelope(answer)
        return parse(result, time_ms)

    @asynccontextmanager
    async def _leave_to_ask(self) -> AsyncIterator[None]:
        """Waits until a request may go out; after a ban one goes alone, and the others when it was answered."""
        await self._wait_for_turn()
        while (probing := self._probing) is not None and self._end is None:
            async with probing:
                await self._wait_for_turn()
                if self._probing is probing and self._end is None:
                    yield
                    return
        if self._end is not None:
            raise self._end
        yield

    async def _wait_for_turn(self) -> None:
        """A place in the rate limit while nothing has to be silent: a silence may begin while one waits for a place."""
        loop = asyncio.get_running_loop()
        await self._rate_limit.take()
        while (seconds := self._silent_until - loop.time()) > 0:
            await asyncio.sleep(seconds)
            await self._rate_limit.take()

    def _banned(self) -> PerpcastError:
        """What a 403 means here: silence from now on, or the end."""
        now = asyncio.get_running_loop().time()
        if self._probing is not None and now < self._silent_until:  # sent before the ban was known
            return TemporaryExchangeError("HTTP 403")
        if self._probing is not None or not self._answered:
            self._end = RefusedError(
                f"{self._rest_url} answered HTTP 403: too many requests from this IP, or a region that it does not "
                "serve; wait at least ten minutes, then run the same command again",
                403,
            )
            return self._end
        self._probing = asyncio.Lock()
        self._silent_until = now + BAN_SECONDS
        self._on_notice(
            f"{self._rest_url} answered HTTP 403, too many requests from this IP: no request for "
            f"{BAN_SECONDS / 60:.0f} minutes, then it goes on by itself"
        )
        return TemporaryExchangeError("HTTP 403")

    async def _compare_clocks(self) -> None:
        """Notes how far the exchange's clock is from ours, as of the middle of a question."""
        loop = asyncio.get_running_loop()
        asked = loop.time()
        server_ms = await self._ask("/v5/market/time", {}, lambda result, _: parse_server_time_ms(result))
        self._clock_offset_ms = server_ms - (asked + loop.time()) / 2 * 1000

    async def _get(self, path: str, query: Mapping[str, str | int], signed: bool) -> _Answer:
        """The query goes out as written and as it was signed: a cursor must not be encoded again. No body, ever."""
        if self._session is None:
            raise RuntimeError("use the client inside `async with`")
        tail = "&".join(f"{key}={value}" for key, value in query.items())
        url = URL(f"{self._rest_url}{path}" + (f"?{tail}" if tail else ""), encoded=True)
        self.requests += 1
        try:
            async with self._session.get(url, headers=self._signed(tail, signed), allow_redirects=False) as response:
                answer = _Answer(response.status, response.headers, await _read(response))
                self._answered = self._answered or answer.status != 403
                return answer
        except aiohttp.InvalidURL:
            raise ConfigError(f"exchange.rest_url: expected a URL, received {self._rest_url!r}") from None
        except aiohttp.ClientPayloadError as error:
            raise TemporaryExchangeError(f"the answer broke off or cannot be unpacked ({_line(error)})") from None
        except TimeoutError:
            raise _NoAnswerError(f"no answer within {self._timeout.total:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise _NoAnswerError(_line(error)) from None

    def _signed(self, tail: str, signed: bool) -> Mapping[str, str]:
        if not signed:
            return {}
        if self._credentials is None:
            raise ValueError("a signed request needs credentials")
        now_ms = int(asyncio.get_running_loop().time() * 1000 + (self._clock_offset_ms or 0.0))
        return signed_headers(self._credentials, now_ms, RECV_WINDOW_MS, tail.encode())

    def _open_envelope(self, answer: _Answer) -> tuple[Mapping[str, Any], int]:
        """The result and the server's time in milliseconds of an answer with retCode 0."""
        try:
            envelope = read_json(answer.body)
        except orjson.JSONDecodeError:
            raise MalformedError(f"expected JSON, received {answer.body[:60]!r}") from None
        code = member(envelope, "retCode", int)
        message = envelope.get("retMsg")
        said = f"retCode {code}: {_line(message) if isinstance(message, str) else 'without a message'}"
        if code == _CLOCK_CODE:
            raise _ClockError(said)
        if code in _TEMPORARY_CODES:
            # A quota: nobody asks before it is filled again. Its time may lie in the past, by a clock that is off.
            wait = _seconds_until(answer.headers.get("X-Bapi-Limit-Reset-Timestamp", ""), envelope.get("time"))
            self._silent_until = max(self._silent_until, asyncio.get_running_loop().time() + wait)
            raise TemporaryExchangeError(said)
        if code != 0:
            raise RefusedError(f"the exchange refused it with {said}", code)
        result, time_ms = member(envelope, "result", dict), parse_time_ms(envelope)
        self._check_time(time_ms)
        return result, time_ms

    def _check_time(self, time_ms: int) -> None:
        """An answer out of the past is asked for again: by its time, candles that are closed would count as open.

        Once, since it may have been the one before that was wrong.
        """
        before, self._latest_ms = self._latest_ms, time_ms
        if time_ms < before - _LARGEST_STEP_BACK_MS:
            raise MalformedError(f"the exchange's clock went back from {format_time(before)} to {format_time(time_ms)}")


async def _once(request: aiohttp.ClientRequest, send: aiohttp.ClientHandlerType) -> aiohttp.ClientResponse:
    """Keeps aiohttp from sending a GET again by itself when a connection breaks: past our pace, and uncounted."""
    try:
        return await send(request)
    except aiohttp.ClientConnectionError as error:
        raise _NoAnswerError(_line(error)) from None


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """The body. Raises MalformedError where it is too long to be an answer."""
    chunks, size = [], 0
    async for chunk in response.content.iter_any():
        chunks.append(chunk)
        size += len(chunk)
        if size > _LARGEST_BODY:
            raise MalformedError(f"expected at most {_LARGEST_BODY >> 20} MiB, the answer is longer")
    return b"".join(chunks)


def _seconds(header: str) -> float | None:
    """A `Retry-After` in seconds, at most a minute; None where there is none (a date is not used by Bybit)."""
    return min(float(header), 60.0) if header.isascii() and header.isdigit() else None


def _seconds_until(reset_ms: str, server_time_ms: Any) -> float:
    """How long until a rate limit is lifted, both times by the exchange's clock: between nothing and a minute."""
    if not (reset_ms.isascii() and reset_ms.isdigit() and type(server_time_ms) is int):
        return 0.0
    return min(max(int(reset_ms[:20]) - server_time_ms, 0) / 1000, 60.0)


def _line(said: BaseException | str) -> str:
    """What a person reads of it, in one line."""
    line = " ".join(str(said)[:1000].split())[:200]
    return "".join(sign if sign.isprintable() else "?" for sign in line) or type(said).__name__
