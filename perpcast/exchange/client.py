"""The REST client: asks at a pace the exchange allows, asks again where that helps, believes only checked answers."""

import asyncio
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self, TypeVar

import aiohttp
import numpy as np
import orjson
from yarl import URL

from perpcast.errors import ConfigError, ExchangeUnavailableError, PerpcastError, RefusedError, TemporaryExchangeError
from perpcast.exchange.rate_limit import RateLimit
from perpcast.exchange.wire import (
    PAGE_BARS,
    PAGE_FUNDING_RATES,
    CandlePage,
    MalformedError,
    member,
    parse_candles,
    parse_funding_rates,
    parse_instruments,
    parse_server_time_ms,
)
from perpcast.market import CandleSeries, FundingRate, Instrument
from perpcast.timeframe import format_time, interval_ms

Value = TypeVar("Value")

# retCodes after which the same question may be answered: server time-out, rate limits, server error.
_TEMPORARY_CODES = frozenset({429, 10000, 10006, 10016, 10018})

_ATTEMPTS_UNANSWERED = 3


class _NoAnswerError(TemporaryExchangeError):
    """Nothing came back at all."""


class BybitClient:
    """Public market data of category linear. An async context manager; every `fetch_` is a read, safe to repeat.

    A read that fails in passing is tried `attempts` times with growing, jittered pauses; fewer times while the host has
    never answered at all, since then the network or the URL is likely wrong. HTTP 403 (too many requests from this IP,
    or a region that Bybit does not serve) ends all HTTP of this client at once: asking on makes it worse.
    """

    def __init__(
        self,
        rest_url: str,
        *,
        jitter: np.random.Generator,
        rate_limit: RateLimit | None = None,
        attempts: int = 6,
        first_pause_seconds: float = 0.25,
        timeout_seconds: float = 15.0,
        connections: int = 32,
    ) -> None:
        self._rest_url = rest_url.rstrip("/")
        self._jitter = jitter
        self._rate_limit = rate_limit or RateLimit()
        self._attempts = attempts
        self._first_pause_seconds = first_pause_seconds
        self._timeout = aiohttp.ClientTimeout(total=timeout_seconds)
        self._connections = connections
        self._session: aiohttp.ClientSession | None = None
        self._answered = False
        self._ban: RefusedError | None = None
        self.requests = 0  # sent, each try counted
        self.retries = 0

    async def __aenter__(self) -> Self:
        connector = aiohttp.TCPConnector(limit=self._connections)
        self._session = aiohttp.ClientSession(connector=connector, timeout=self._timeout)
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

    async def fetch_instruments(self) -> dict[str, Instrument]:
        """All USDT perpetuals on coins that trade now, by symbol."""
        instruments: dict[str, Instrument] = {}
        query: dict[str, str | int] = {"category": "linear", "limit": 1000}
        cursors: set[str] = set()
        while True:
            page, cursor = await self._fetch(
                "/v5/market/instruments-info", query, lambda result, _: parse_instruments(result), "instruments"
            )
            instruments |= page
            if not cursor:
                return instruments
            if cursor in cursors:
                raise MalformedError(f"instruments: the cursor {cursor!r} came twice, the list would never end")
            cursors.add(cursor)
            query["cursor"] = cursor

    async def _fetch(
        self,
        path: str,
        query: Mapping[str, str | int],
        parse: Callable[[Mapping[str, Any], int], Value],
        what: str = "",
    ) -> Value:
        """Asks until `parse(result, server_time_ms)` gives a value, or no further try makes sense."""
        what = what or path
        attempt = 0
        while True:
            attempt += 1
            try:
                return await self._ask(path, query, parse)
            except (TemporaryExchangeError, MalformedError) as error:
                if attempt >= (self._attempts if self._answered else min(self._attempts, _ATTEMPTS_UNANSWERED)):
                    raise self._final(error, what, attempt) from None
                self.retries += 1
                asked = error.retry_after_seconds if isinstance(error, TemporaryExchangeError) else None
                await asyncio.sleep(max(self._pause_seconds(attempt), asked or 0.0))
            except RefusedError as error:
                raise RefusedError(f"{what}: {error}", error.code) from None

    def _pause_seconds(self, attempt: int) -> float:
        """Doubling from try to try, each between half and all of it, so that clients fall out of step."""
        return self._first_pause_seconds * 2 ** (attempt - 1) * self._jitter.uniform(0.5, 1.0)

    def _final(self, error: PerpcastError, what: str, attempt: int) -> PerpcastError:
        tries = f"after {attempt} tries"
        if isinstance(error, _NoAnswerError):
            return ExchangeUnavailableError(
                f"exchange unreachable: {self._rest_url} gave no answer {tries} ({error}); "
                "check the network and exchange.rest_url, then run the same command again"
            )
        return type(error)(f"{what}: {error}, {tries}; run the same command again later to go on")

    async def _ask(
        self, path: str, query: Mapping[str, str | int], parse: Callable[[Mapping[str, Any], int], Value]
    ) -> Value:
        await self._rate_limit.take()
        if self._ban is not None:
            raise self._ban
        status, body, retry_after = await self._get(path, query)
        if status == 403:
            self._ban = RefusedError(
                f"{self._rest_url} answered HTTP 403: too many requests from this IP, or a region that it does not "
                "serve; wait at least ten minutes, then run the same command again",
                403,
            )
            raise self._ban
        if status == 429 or status >= 500:
            raise TemporaryExchangeError(f"HTTP {status} from {self._rest_url}", retry_after)
        if status != 200:
            raise RefusedError(f"HTTP {status} from {self._rest_url}{path}: is exchange.rest_url a Bybit host?", status)
        return parse(*_open_envelope(body))

    async def _get(self, path: str, query: Mapping[str, str | int]) -> tuple[int, bytes, float | None]:
        """Status, body and the pause asked for. The query goes out as written: a cursor must not be encoded again."""
        if self._session is None:
            raise RuntimeError("use the client inside `async with`")
        tail = "&".join(f"{key}={value}" for key, value in query.items())
        url = URL(f"{self._rest_url}{path}" + (f"?{tail}" if tail else ""), encoded=True)
        self.requests += 1
        try:
            async with self._session.get(url, allow_redirects=False) as response:
                self._answered = True
                return response.status, await response.read(), _seconds(response.headers.get("Retry-After"))
        except aiohttp.InvalidURL:
            raise ConfigError(f"exchange.rest_url: expected a URL, received {self._rest_url!r}") from None
        except TimeoutError:
            raise _NoAnswerError(f"no answer within {self._timeout.total:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise _NoAnswerError(str(error) or type(error).__name__) from None


def _open_envelope(body: bytes) -> tuple[Mapping[str, Any], int]:
    """The result and the server's time in milliseconds of an answer with retCode 0."""
    try:
        envelope = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise MalformedError(f"expected JSON, received {body[:60]!r}") from None
    code = member(envelope, "retCode", int)
    if code in _TEMPORARY_CODES:
        raise TemporaryExchangeError(f"retCode {code}: {envelope.get('retMsg')}")
    if code != 0:
        raise RefusedError(f"the exchange refused it with retCode {code}: {envelope.get('retMsg')}", code)
    return member(envelope, "result", dict), member(envelope, "time", int)


def _seconds(header: str | None) -> float | None:
    """A `Retry-After` in seconds, at most a minute; None where there is none (a date is not used by Bybit)."""
    return min(float(header), 60.0) if header and header.isascii() and header.isdigit() else None
