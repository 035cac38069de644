"""pybit and ccxt, unmodified but for the URL, read from the local exchange what our client reads.

They were written for Bybit by others: what they do not understand, our exchange does not do as Bybit does.
"""

import asyncio
import queue
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

import ccxt.async_support
import ccxt.pro
import numpy as np
import pytest
from pybit.unified_trading import HTTP, WebSocket

from perpcast.exchange import BybitClient
from perpcast.market import CandleSeries, FundingRate, Instrument, Ticker
from perpcast.simulator.clock import RunningClock
from perpcast.simulator.server import Address, serve_in_thread
from perpcast.simulator.synthetic import SyntheticMarket
from perpcast.timeframe import interval_ms, parse_time, to_ms
from tests.test_simulator_market import TableMarket

NOW_MS = to_ms(parse_time("2024-03-01T00:07Z"))
STEP_MS = interval_ms("15")
# Three pages of candles, the last one short and with the running bar; two of funding rates.
START_MS = NOW_MS - NOW_MS % STEP_MS - 2300 * STEP_MS
FUNDING_START_MS = NOW_MS - 100 * 86_400_000
# Of large and small prices, whole and broken volumes, names that begin and end in digits.
SYMBOLS = ("BTCUSDT", "XRPUSDT", "1000PEPEUSDT", "SHIB1000USDT")

Value = TypeVar("Value")


@pytest.fixture(scope="module")
def local() -> Iterator[Address]:
    """The local exchange at a time that stands still, so that all clients see the same running bar."""
    market = SyntheticMarket(seed=3, edge=0.0, end_ms=NOW_MS + 86_400_000)
    with serve_in_thread(market, RunningClock(NOW_MS, 1.0, time.monotonic)) as address:
        yield address


def ours(address: Address, ask: Callable[[BybitClient], Awaitable[Value]]) -> Value:
    async def run() -> Value:
        async with BybitClient(address.rest_url, jitter=np.random.default_rng(1)) as client:
            return await ask(client)

    return asyncio.run(run())


@contextmanager
def pybit_on(address: Address, **options: Any) -> Iterator[HTTP]:
    session = HTTP(**options)
    session.endpoint = address.rest_url
    try:
        yield session
    finally:
        session.client.close()


@asynccontextmanager
async def ccxt_on(address: Address, **options: Any) -> AsyncIterator[ccxt.async_support.bybit]:
    exchange = ccxt.async_support.bybit(options)
    exchange.urls["api"] = dict.fromkeys(exchange.urls["api"], address.rest_url)
    try:
        yield exchange
    finally:
        await exchange.close()


def ccxt_symbol(symbol: str) -> str:
    return f"{symbol.removesuffix('USDT')}/USDT:USDT"


def table(candles: CandleSeries) -> list[list[float]]:
    """Rows of open time, open, high, low, close, volume."""
    columns = (candles.open_time_ms, candles.open, candles.high, candles.low, candles.close, candles.volume)
    return np.column_stack(columns).tolist()


@pytest.fixture(scope="module")
def candles(local: Address) -> dict[str, CandleSeries]:
    async def fetch(client: BybitClient) -> dict[str, CandleSeries]:
        return {symbol: await client.fetch_candle_series(symbol, "15", START_MS, NOW_MS) for symbol in SYMBOLS}

    found = ours(local, fetch)
    assert {len(series) for series in found.values()} == {2300}
    return found


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_pybit_reads_the_same_candles(local: Address, candles: dict[str, CandleSeries], symbol: str) -> None:
    rows: list[list[str]] = []
    with pybit_on(local) as session:
        for start in range(START_MS, NOW_MS, 1000 * STEP_MS):
            query = {"category": "linear", "symbol": symbol, "interval": "15", "limit": 1000}
            answer = session.get_kline(**query, start=start, end=start + 999 * STEP_MS)
            rows += reversed(answer["result"]["list"])
    expected = np.column_stack((table(candles[symbol]), candles[symbol].turnover)).tolist()
    # pybit has the running bar too.
    assert [[float(cell) for cell in row] for row in rows[:-1]] == expected
    assert int(rows[-1][0]) == NOW_MS - NOW_MS % STEP_MS


def test_ccxt_reads_the_same_candles(local: Address, candles: dict[str, CandleSeries]) -> None:
    async def run() -> None:
        async with ccxt_on(local) as exchange:
            for symbol in SYMBOLS:
                rows: list[list[float]] = []
                while not rows or rows[-1][0] < NOW_MS - STEP_MS:
                    since = int(rows[-1][0]) + STEP_MS if rows else START_MS
                    rows += await exchange.fetch_ohlcv(ccxt_symbol(symbol), "15m", since=since, limit=1000)
                assert rows[:-1] == table(candles[symbol])

    asyncio.run(run())


@pytest.fixture(scope="module")
def instruments(local: Address) -> dict[str, Instrument]:
    found = ours(local, lambda client: client.fetch_instruments())
    assert len(found) == 51
    return found


def test_pybit_reads_the_same_instruments(local: Address, instruments: dict[str, Instrument]) -> None:
    items: dict[str, dict[str, Any]] = {}
    with pybit_on(local) as session:
        cursor = None
        while cursor != "":
            page = session.get_instruments_info(category="linear", limit=20, cursor=cursor)["result"]
            items |= {item["symbol"]: item for item in page["list"]}
            cursor = page["nextPageCursor"]
    assert set(items) == set(instruments)
    for symbol, instrument in instruments.items():
        item = items[symbol]
        assert item["status"] == instrument.status
        assert item["fundingInterval"] == instrument.funding_interval_minutes
        assert item["priceFilter"]["tickSize"] == format(instrument.tick_size, "f")
        assert item["lotSizeFilter"]["qtyStep"] == str(instrument.qty_step)
        assert item["lotSizeFilter"]["minOrderQty"] == str(instrument.min_quantity)
        assert item["lotSizeFilter"]["minNotionalValue"] == str(instrument.min_notional)
        assert item["leverageFilter"]["maxLeverage"] == str(instrument.max_leverage)
        assert (item["launchTime"], item["deliveryTime"]) == (str(instrument.launch_time_ms), "0")
        assert instrument.delivery_time_ms is None


def test_ccxt_reads_the_same_instruments(local: Address, instruments: dict[str, Instrument]) -> None:
    async def run() -> dict[str, Any]:
        async with ccxt_on(local) as exchange:
            return await exchange.load_markets()

    markets = asyncio.run(run())
    assert {market["id"] for market in markets.values()} == set(instruments)
    for symbol, instrument in instruments.items():
        market = markets[ccxt_symbol(symbol)]
        assert (market["type"], market["linear"], market["active"]) == ("swap", True, True)
        assert market["precision"]["price"] == float(instrument.tick_size)
        assert market["precision"]["amount"] == float(instrument.qty_step)
        assert market["limits"]["amount"]["min"] == float(instrument.min_quantity)
        assert market["limits"]["leverage"]["max"] == float(instrument.max_leverage)
        assert market["created"] == instrument.launch_time_ms


@pytest.fixture(scope="module")
def tickers(local: Address) -> dict[str, Ticker]:
    found = ours(local, lambda client: client.fetch_tickers())
    assert len(found) == 51
    return found


def test_pybit_reads_the_same_tickers(local: Address, tickers: dict[str, Ticker]) -> None:
    with pybit_on(local) as session:
        items = {item["symbol"]: item for item in session.get_tickers(category="linear")["result"]["list"]}
    assert set(items) == set(tickers)
    for symbol, ticker in tickers.items():
        expected = {
            "lastPrice": ticker.last_price,
            "markPrice": ticker.mark_price,
            "bid1Price": ticker.bid_price,
            "ask1Price": ticker.ask_price,
            "turnover24h": ticker.turnover_24h,
            "volume24h": ticker.volume_24h,
            "fundingRate": ticker.funding_rate,
            "nextFundingTime": ticker.next_funding_time_ms,
        }
        assert {name: items[symbol][name] for name in expected} == {
            name: str(value) if isinstance(value, int) else format(value, "f") for name, value in expected.items()
        }


def test_ccxt_reads_the_same_tickers(local: Address, tickers: dict[str, Ticker]) -> None:
    async def run() -> tuple[dict[str, Any], dict[str, Any]]:
        symbols = [ccxt_symbol(symbol) for symbol in tickers]
        async with ccxt_on(local) as exchange:
            return await exchange.fetch_tickers(symbols), await exchange.fetch_funding_rates(symbols)

    found, rates = asyncio.run(run())
    assert set(found) == {ccxt_symbol(symbol) for symbol in tickers}
    for symbol, ticker in tickers.items():
        theirs, rate = found[ccxt_symbol(symbol)], rates[ccxt_symbol(symbol)]
        assert (theirs["last"], theirs["markPrice"]) == (float(ticker.last_price), float(ticker.mark_price))
        assert ticker.bid_price is not None
        assert ticker.ask_price is not None
        assert ticker.funding_rate is not None
        assert (theirs["bid"], theirs["ask"]) == (float(ticker.bid_price), float(ticker.ask_price))
        assert (theirs["quoteVolume"], theirs["baseVolume"]) == (float(ticker.turnover_24h), float(ticker.volume_24h))
        assert rate["fundingRate"] == float(ticker.funding_rate)
        assert rate["fundingTimestamp"] == ticker.next_funding_time_ms


@pytest.fixture(scope="module")
def funding(local: Address) -> dict[str, list[FundingRate]]:
    async def fetch(client: BybitClient) -> dict[str, list[FundingRate]]:
        return {symbol: await client.fetch_funding_rates(symbol, FUNDING_START_MS, NOW_MS) for symbol in SYMBOLS}

    found = ours(local, fetch)
    assert {len(rates) for rates in found.values()} == {300}
    return found


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_pybit_reads_the_same_funding_rates(local: Address, funding: dict[str, list[FundingRate]], symbol: str) -> None:
    items: list[dict[str, str]] = []
    end_ms = NOW_MS - 1
    with pybit_on(local) as session:
        query = {"category": "linear", "symbol": symbol, "startTime": FUNDING_START_MS}
        while page := session.get_funding_rate_history(**query, endTime=end_ms)["result"]["list"]:
            items += page
            end_ms = int(page[-1]["fundingRateTimestamp"]) - 1
    expected = [(rate.symbol, rate.funding_time_ms, rate.rate) for rate in reversed(funding[symbol])]
    assert [
        (item["symbol"], int(item["fundingRateTimestamp"]), float(item["fundingRate"])) for item in items
    ] == expected


def test_ccxt_reads_the_same_funding_rates(local: Address, funding: dict[str, list[FundingRate]]) -> None:
    async def run() -> dict[str, list[dict[str, Any]]]:
        async with ccxt_on(local) as exchange:
            return {
                symbol: await exchange.fetch_funding_rate_history(
                    ccxt_symbol(symbol), FUNDING_START_MS, 1000, {"paginate": True, "until": NOW_MS - 1}
                )
                for symbol in SYMBOLS
            }

    for symbol, found in asyncio.run(run()).items():
        expected = [(rate.funding_time_ms, rate.rate) for rate in funding[symbol]]
        assert [(item["timestamp"], item["fundingRate"]) for item in found] == expected


def test_all_clients_read_the_same_time(local: Address) -> None:
    async def by_ccxt() -> int:
        async with ccxt_on(local) as exchange:
            return await exchange.fetch_time()

    with pybit_on(local) as session:
        result = session.get_server_time()
    assert int(result["result"]["timeNano"]) // 1_000_000 == result["time"] == NOW_MS
    assert asyncio.run(by_ccxt()) == NOW_MS
    assert ours(local, lambda client: client.fetch_server_time_ms()) == NOW_MS


@contextmanager
def knowing_a_key() -> Iterator[Address]:
    """A local exchange that knows one key, at the present time, since foreign clients sign with the machine's."""
    clock = RunningClock(int(time.time() * 1000), 1.0, time.monotonic)
    clock.start()
    with serve_in_thread(TableMarket(10), clock, keys={"KEY123": "SECRET123"}) as address:
        yield address


def test_signatures_of_both_are_accepted() -> None:
    async def by_ccxt(address: Address) -> dict[str, Any]:
        async with ccxt_on(address, apiKey="KEY123", secret="SECRET123") as exchange:
            return await exchange.privateGetV5UserQueryApi()

    with knowing_a_key() as address:
        with pybit_on(address, api_key="KEY123", api_secret="SECRET123") as session:
            answer = session.get_api_key_information()
        other = asyncio.run(by_ccxt(address))
    assert answer["result"]["permissions"]["ContractTrade"] == ["Order", "Position"]
    assert other["result"]["permissions"] == answer["result"]["permissions"]


BARS = 20


@contextmanager
def running() -> Iterator[tuple[Address, list[list[float]]]]:
    """An exchange whose bars pass eighty in a second, and the next BARS of BTCUSDT as the market has them."""
    market = SyntheticMarket(seed=3, edge=0.0, end_ms=NOW_MS + 86_400_000)
    series = market.candles("BTCUSDT")
    first = int(np.searchsorted(series.open_time_ms, NOW_MS - NOW_MS % STEP_MS))
    with serve_in_thread(market, RunningClock(NOW_MS, 3600.0 * 20, time.monotonic)) as address:
        yield address, table(series[first : first + BARS])


def test_pybit_is_pushed_the_same_candles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked up to three times: pybit notes a subscription after it has sent it; a faster answer ends its thread."""
    for attempt in range(3):
        with running() as (address, expected):
            try:
                rows = pushed_to_pybit(address, monkeypatch)
            except queue.Empty:
                assert attempt < 2
                continue
        assert rows == expected
        return


def pushed_to_pybit(address: Address, monkeypatch: pytest.MonkeyPatch) -> list[list[float]]:
    """The closed candles that pybit hears of. Raises queue.Empty where it hears of none for 20 seconds."""
    messages: queue.Queue[dict[str, Any]] = queue.Queue()
    rows: list[list[float]] = []
    monkeypatch.setattr("pybit.unified_trading.PUBLIC_WSS", f"ws://127.0.0.1:{address.port}/v5/public/{{CHANNEL_TYPE}}")
    # Its thread looks at a closed socket for as long as a pong may take.
    ws = WebSocket("linear", testnet=False, ping_timeout=1)
    try:
        ws.kline_stream(15, "BTCUSDT", messages.put)
        while len(rows) < BARS:
            (item,) = messages.get(timeout=20)["data"]
            if item["confirm"]:
                rows.append([float(item[name]) for name in ("start", "open", "high", "low", "close", "volume")])
    finally:
        ws.exit()
        ws.wst.join(10)
    return rows


def test_ccxt_is_pushed_the_same_candles() -> None:
    async def run(address: Address, until_ms: float) -> dict[float, list[float]]:
        exchange = ccxt.pro.bybit()
        exchange.urls["api"] = dict.fromkeys(exchange.urls["api"], address.rest_url)
        exchange.urls["api"]["ws"] = {"public": {"linear": address.ws_url}}
        bars: dict[float, list[float]] = {}
        try:
            while not any(start > until_ms for start in bars):
                bars |= {bar[0]: bar for bar in await exchange.watch_ohlcv("BTC/USDT:USDT", "15m")}
        finally:
            await exchange.close()
        return bars

    with running() as (address, expected):
        bars = asyncio.run(asyncio.wait_for(run(address, expected[-1][0]), 20))
    # ccxt hands out running bars as well: what it had last of each is the closed one.
    assert [bars[row[0]] for row in expected] == expected
