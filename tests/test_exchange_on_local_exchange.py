"""Our client and the local exchange, written apart from one specification, understand one another."""

import asyncio
import time
from contextlib import aclosing

import numpy as np
import pytest

from perpcast.errors import RefusedError
from perpcast.exchange import BybitClient, CandleStream
from perpcast.market import Candle
from perpcast.simulator.clock import RunningClock
from perpcast.simulator.server import serve
from perpcast.simulator.synthetic import SyntheticMarket
from perpcast.timeframe import interval_ms, parse_time, to_ms

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
            with pytest.raises(RefusedError, match="retCode 10001"):
                await client.fetch_candles("MATICUSDT", "15", start_ms, NOW)

    asyncio.run(run())


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
