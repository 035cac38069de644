"""The public REST endpoints: parameters checked in Bybit's way, answers from what the clock lets a trader see."""

from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
import orjson
from aiohttp import web

from perpcast.simulator import signing, wire
from perpcast.simulator.clock import Clock
from perpcast.simulator.market import BASE_MS, FundingSeries, Market, Window, visible_candles
from perpcast.timeframe import INTERVAL_MINUTES

_DAY_MS = 86_400_000
# Coarser than the base bars and made of whole ones: what can be served. The rest of Bybit's intervals is refused.
SERVED_INTERVALS = {
    name: minutes * 60_000 for name, minutes in INTERVAL_MINUTES.items() if minutes * 60_000 % BASE_MS == 0
}
# Nothing is listed there: clients that look over the whole exchange are told so instead of being refused.
_EMPTY_CATEGORIES = ("spot", "inverse", "option")

Query = Mapping[str, str]


class _ParameterError(Exception):
    """The request as Bybit refuses it, with retCode 10001."""


class RestApi:
    """Answers GET /v5/market/*, and of the signed endpoints the one that says what a key may do."""

    def __init__(self, market: Market, clock: Clock, keys: Mapping[str, str] = {}) -> None:
        self._market, self._clock, self._keys = market, clock, keys

    def routes(self) -> list[web.RouteDef]:
        """One route for each endpoint; whatever else is asked for under /v5 is answered with 10017."""
        endpoints: dict[str, Callable[[Query], dict[str, Any]]] = {
            "time": lambda query: wire.server_time(self._clock.now_ms()),
            "kline": self.kline,
            "instruments-info": self.instruments_info,
            "funding/history": self.funding_history,
            "tickers": self.tickers,
        }
        served = [web.get(f"/v5/market/{name}", self._handler(answer)) for name, answer in endpoints.items()]
        signed = web.get("/v5/user/query-api", self._key_information)
        return [*served, signed, web.route("*", "/v5/{rest:.*}", self._not_found)]

    def _handler(self, answer: Callable[[Query], dict[str, Any]]) -> Callable[[web.Request], Any]:
        async def handle(request: web.Request) -> web.Response:
            try:
                result, code, message = answer(request.query), wire.OK, "OK"
            except _ParameterError as error:
                result, code, message = {}, wire.PARAMETER_ERROR, str(error)
            return _json(wire.envelope(result, self._clock.now_ms(), code, message))

        return handle

    async def _key_information(self, request: web.Request) -> web.Response:
        now_ms = self._clock.now_ms()
        try:
            key = signing.check_signed(request.headers, request.raw_path.partition("?")[2], self._keys, now_ms)
        except signing.UnsignedError as error:
            return web.Response(status=401, text=str(error))
        except signing.KeyRefusedError as error:
            return _json(wire.envelope({}, now_ms, error.code, str(error)))
        return _json(wire.envelope(wire.key_information(key, now_ms), now_ms))

    async def _not_found(self, request: web.Request) -> web.Response:
        message = f"Route not found: {request.method} {request.path}"
        return _json(wire.envelope({}, self._clock.now_ms(), wire.ROUTE_NOT_FOUND, message), status=404)

    def kline(self, query: Query) -> dict[str, Any]:
        """Newest first, the running bar included; an empty list before the listing and beyond the present."""
        _check_category(query, default="linear")
        symbol, interval = self._symbol(query), _required(query, "interval")
        if interval not in SERVED_INTERVALS:
            raise _ParameterError(
                f"params error: interval {interval} is not served here, expected one of {', '.join(SERVED_INTERVALS)}"
            )
        window = Window(_integer(query, "start"), _integer(query, "end"), _limit(query, default=200, most=1000))
        series = visible_candles(self._market, symbol, SERVED_INTERVALS[interval], self._clock.now_ms(), window)
        return {"symbol": symbol, "category": "linear", "list": wire.kline_list(series)}

    def instruments_info(self, query: Query) -> dict[str, Any]:
        """All of one status, else all that trade, page by page; what nothing has gives an empty list."""
        if query.get("category") in _EMPTY_CATEGORIES:
            return {"category": query["category"], "list": [], "nextPageCursor": ""}
        _check_category(query)
        symbols = [symbol for symbol in self._market.symbols if query.get("symbol", symbol) == symbol]
        instruments = [self._market.instrument(symbol) for symbol in symbols]
        wanted = [item for item in instruments if item.status == query.get("status", "Trading")]
        wanted = [
            item for item in wanted if query.get("baseCoin", item.symbol.removesuffix("USDT")) + "USDT" == item.symbol
        ]
        first, limit = _first_of_page(query), _limit(query, default=500, most=1000)
        more = first + limit < len(wanted)
        return {
            "category": "linear",
            "list": [wire.instrument_item(item) for item in wanted[first : first + limit]],
            "nextPageCursor": quote(f"first={first + limit},of={len(wanted)}") if more else "",
        }

    def funding_history(self, query: Query) -> dict[str, Any]:
        """Payments up to the present, newest first; a start without an end is refused, as Bybit does."""
        _check_category(query)
        symbol, limit = self._symbol(query), _limit(query, default=200, most=200)
        start, end = _integer(query, "startTime"), _integer(query, "endTime")
        if start is not None and end is None:
            raise _ParameterError("params error: endTime is required with startTime")
        funding, now_ms = self._market.funding(symbol), self._clock.now_ms()
        last = int(np.searchsorted(funding.time_ms, now_ms if end is None else min(end, now_ms), side="right"))
        first = max(0 if start is None else int(np.searchsorted(funding.time_ms, start)), last - limit)
        paid = FundingSeries(funding.time_ms[first:last], funding.rate[first:last])
        return {"category": "linear", "list": wire.funding_items(symbol, paid)}

    def tickers(self, query: Query) -> dict[str, Any]:
        """One symbol, or all that have traded in the last 24 hours."""
        if query.get("category") in _EMPTY_CATEGORIES:
            return {"category": query["category"], "list": []}
        _check_category(query)
        symbols = (self._symbol(query),) if "symbol" in query else self._market.symbols
        now_ms, items = self._clock.now_ms(), []
        for symbol in symbols:
            day = visible_candles(self._market, symbol, BASE_MS, now_ms, Window(now_ms - _DAY_MS, now_ms))
            if len(day):
                funding = self._market.funding(symbol)
                items.append(wire.ticker_item(self._market.instrument(symbol), day, funding, now_ms))
        return {"category": "linear", "list": items}

    def _symbol(self, query: Query) -> str:
        symbol = _required(query, "symbol")
        if symbol not in self._market.symbols:
            raise _ParameterError(f"Not supported symbols: {symbol}")
        return symbol


def _json(body: dict[str, Any], status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(body), status=status, content_type="application/json")


def _check_category(query: Query, default: str = "") -> None:
    if query.get("category", default) != "linear":
        raise _ParameterError("params error: Category is invalid, this exchange lists linear only")


def _required(query: Query, name: str) -> str:
    if not query.get(name):
        raise _ParameterError(f"params error: {name} is required")
    return query[name]


def _integer(query: Query, name: str) -> int | None:
    text = query.get(name, "")
    if text and not (text.isascii() and text.isdigit() and len(text) <= 15):
        raise _ParameterError(f"params error: {name} must be a whole number, received {text[:40]}")
    return int(text) if text else None


def _limit(query: Query, default: int, most: int) -> int:
    """More than the endpoint gives is cut to what it gives."""
    limit = _integer(query, "limit")
    if limit == 0:
        raise _ParameterError(f"params error: limit must lie between 1 and {most}")
    return min(limit or default, most)


def _first_of_page(query: Query) -> int:
    # A client passes the cursor on as it came, and the URL's own decoding may or may not have happened already.
    cursor = unquote(query.get("cursor", ""))
    if not cursor:
        return 0
    first = cursor.removeprefix("first=").split(",")[0]
    if not cursor.startswith("first=") or not first.isdigit():
        raise _ParameterError("params error: cursor is invalid")
    return int(first)
