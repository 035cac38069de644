"""Our client and the local exchange, written apart from one specification, understand one another."""

import asyncio
import time
from contextlib import aclosing

import numpy as np
import pytest

from perpcast.errors import RefusedError
from perpcast.exchange import BybitClient, CandleStream, Credentials, KeyRights
from perpcast.market import USDT_PERPETUAL, Candle, Listing
from perpcast.simulator.clock import RunningClock, SteppedClock
from perpcast.simulator.market import Window, visible_candles
from perpcast.simulator.server import serve
from perpcast.simulator.synthetic import SyntheticMarket
from perpcast.timeframe import interval_ms, parse_time, to_ms
from tests.test_simulator_server import ChangingMarket

NOW = to_ms(parse_time("2022-03-01T00:07Z"))
STEP_MS = interval_ms("15")
DAY_MS = 86_400_000
SYMBOLS = ("BTCUSDT", "1000BONKUSDT")  # the second lists in 2023


@pytest.fixture(scope="module")
def market() -> SyntheticMarket:
    return SyntheticMarket(seed=3, edge=0.0, end_ms=NOW + DAY_MS)


def test_client_reads_what_the_market_holds(market: SyntheticMarket) -> None:
    async def run() -> None:
        async with (
            serve(market, RunningClock(NOW, 1.0, time.monotonic)) as address,
            BybitClient(address.rest_url, jitter=np.random.default_rng(1)) as client,
        ):
            assert NOW <= await client.fetch_server_time_ms() < NOW + 60_000
            instruments = await client.fetch_instruments()
            assert instruments == {symbol: market.instrument(symbol) for symbol in market.symbols}
            # 1000 bars up to the running one, which is left out.
            start_ms = NOW - NOW % STEP_MS - 999 * STEP_MS
            page = await client.fetch_candles("BTCUSDT", "15", start_ms, start_ms + 1000 * STEP_MS)
            truth = market.candles("BTCUSDT")
            truth = truth[(truth.open_time_ms >= start_ms) & (truth.open_time_ms < NOW - STEP_MS)]
            assert len(page.candles) == 999
            assert page.rejected == ()
            for name in ("open_time_ms", "open", "high", "low", "close", "volume", "turnover"):
                np.testing.assert_array_equal(getattr(page.candles, name), getattr(truth, name))
            longer = await client.fetch_candle_series("BTCUSDT", "15", start_ms - 2000 * STEP_MS, NOW)
            assert len(longer) == 2999
            np.testing.assert_array_equal(longer[slice(2000, None)].close, truth.close)
            assert len(await client.fetch_candle_series("BTCUSDT", "15", NOW, NOW)) == 0
            assert len((await client.fetch_candles("1000BONKUSDT", "15", start_ms, NOW)).candles) == 0
            rates = await client.fetch_funding_rates("BTCUSDT", 0, NOW)
            paid = market.funding("BTCUSDT")
            assert [rate.funding_time_ms for rate in rates] == paid.time_ms[paid.time_ms < NOW].tolist()
            np.testing.assert_array_equal([rate.rate for rate in rates], paid.rate[paid.time_ms < NOW])
            assert await client.fetch_funding_rates("1000BONKUSDT", 0, NOW) == []
            with pytest.raises(RefusedError, match="retCode 10001"):
                await client.fetch_candles("MATICUSDT", "15", start_ms, NOW)

    asyncio.run(run())


def test_client_tells_contracts_of_every_status_apart() -> None:
    async def run() -> None:
        market = ChangingMarket(20)
        async with (
            serve(market, SteppedClock(NOW)) as address,
            BybitClient(address.rest_url, jitter=np.random.default_rng(1)) as client,
        ):
            assert await client.fetch_instruments() == {"BTCUSDT": market.instrument("BTCUSDT")}
            listings = await client.fetch_listings()
        known = {symbol: market.instrument(symbol) for symbol in market.symbols}
        assert listings == {
            symbol: Listing(symbol, USDT_PERPETUAL, rules.status, rules.launch_time_ms, rules.delivery_time_ms)
            for symbol, rules in known.items()
        }
        assert {listing.status for listing in listings.values()} == {"Trading", "Delivering", "Closed", "PreLaunch"}

    asyncio.run(run())


def test_client_reads_the_present_prices(market: SyntheticMarket) -> None:
    async def run() -> None:
        async with (
            serve(market, SteppedClock(NOW)) as address,
            BybitClient(address.rest_url, jitter=np.random.default_rng(1)) as client,
        ):
            tickers = await client.fetch_tickers()
        listed = {symbol for symbol in market.symbols if market.instrument(symbol).launch_time_ms < NOW}
        assert set(tickers) == listed
        for symbol in ("BTCUSDT", "DOGEUSDT"):
            ticker, rules = tickers[symbol], market.instrument(symbol)
            day = visible_candles(market, symbol, STEP_MS, NOW, Window(NOW - DAY_MS, NOW))
            assert float(ticker.last_price) == float(ticker.mark_price) == day.close[-1]
            assert ticker.ask_price is not None
            assert ticker.bid_price == ticker.ask_price - rules.tick_size
            assert float(ticker.volume_24h) == pytest.approx(day.volume.sum())
            assert float(ticker.turnover_24h) == pytest.approx(day.turnover.sum())
            paid = market.funding(symbol)
            coming = int(np.searchsorted(paid.time_ms, NOW, side="right"))
            assert ticker.next_funding_time_ms == paid.time_ms[coming]
            assert ticker.funding_rate is not None
            assert float(ticker.funding_rate) == paid.rate[coming]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("credentials", "code"),
    [
        (Credentials("KEY123", "SECRET123"), None),
        (Credentials("KEY123", "SECRET124"), 10004),
        (Credentials("KEY124", "SECRET123"), 10003),
    ],
)
def test_client_signs_by_the_exchanges_clock(
    market: SyntheticMarket, credentials: Credentials, code: int | None
) -> None:
    """The exchange stands years ago: a signature by the machine's clock would be refused with 10002."""

    async def run() -> KeyRights:
        async with (
            serve(market, SteppedClock(NOW), keys={"KEY123": "SECRET123"}) as address,
            BybitClient(address.rest_url, jitter=np.random.default_rng(1), credentials=credentials) as client,
        ):
            return await client.fetch_key_rights()

    if code is None:
        rights = KeyRights(False, frozenset({"ContractTrade.Order", "ContractTrade.Position"}), ("127.0.0.1",))
        assert asyncio.run(run()) == rights
        return
    with pytest.raises(RefusedError) as refused:
        asyncio.run(run())
    assert refused.value.code == code


def test_stream_hands_out_every_bar_that_closes_as_rest_has_it(market: SyntheticMarket) -> None:
    bars = 8
    symbols = ("BTCUSDT", "ETHUSDT", "SOLUSDT")

    async def run() -> tuple[list[Candle], list[Candle], CandleStream]:
        async with serve(market, RunningClock(NOW, 7200.0, time.monotonic)) as address:
            rng = np.random.default_rng(1)
            stream = CandleStream(address.ws_url, [*symbols, "MATICUSDT"], "15", jitter=rng)
            received: list[Candle] = []
            async with asyncio.timeout(30), aclosing(stream.candles()) as candles:
                async for candle in candles:
                    received.append(candle)
                    if len(received) == bars * len(symbols):
                        break
            async with BybitClient(address.rest_url, jitter=rng) as client:
                known: list[Candle] = []
                first_ms = min(candle.open_time_ms for candle in received)
                for symbol in symbols:
                    page = await client.fetch_candles(symbol, "15", first_ms, first_ms + bars * STEP_MS)
                    known += page.candles.candles(symbol)
            return received, known, stream

    received, known, stream = asyncio.run(run())
    assert sorted(received, key=lambda candle: (candle.symbol, candle.open_time_ms)) == sorted(
        known, key=lambda candle: (candle.symbol, candle.open_time_ms)
    )
    assert list(stream.refused) == ["MATICUSDT"]
    assert (stream.connections, stream.malformed) == (1, 0)
