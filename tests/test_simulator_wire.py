"""Bybit's byte shapes of the local exchange: the quickly written rows equal the plainly written ones."""

from dataclasses import fields, replace
from decimal import Decimal

import hypothesis.strategies as st
import numpy as np
import orjson
import pytest
from hypothesis import given

from perpcast.market import CandleSeries
from perpcast.simulator.instruments import LISTED
from perpcast.simulator.market import FundingSeries
from perpcast.simulator.synthetic import START_MS, SyntheticMarket
from perpcast.simulator.wire import instrument_item, kline_list, number, ticker_item

DAY_MS = 86_400_000
COLUMNS = [field.name for field in fields(CandleSeries)][1:]


def plain(series: CandleSeries) -> bytes:
    """The rows cell by cell."""
    rows = [
        [str(candle.open_time_ms), *(number(getattr(candle, name)) for name in COLUMNS)]
        for candle in reversed(list(series.candles("BTCUSDT")))
    ]
    return orjson.dumps(rows)


def of_values(values: list[float]) -> CandleSeries:
    """One row for each value, which stands in all its columns."""
    times = START_MS + 900_000 * np.arange(len(values), dtype=np.int64)
    return CandleSeries(times, *(np.array(values, np.float64) for _ in COLUMNS))


@pytest.mark.parametrize(
    "values",
    [
        [],
        [0.1],
        [47000.0],
        [0.0, -0.0],
        [1e-7, 0.00001234, 9.99e-5, 0.0001],
        [1e15, 1e16, 1.5e16, 1.25e22, 1.7976931348623157e308, 5e-324],
        [123456789.0123, 0.30000000000000004, 2.0**53],
        [10.0, 100.05, 0.05, 1.0, 1.01, 20.0],
        [-1e-7, -1.0, -0.5],
    ],
)
def test_kline_list_equals_the_plain_way(values: list[float]) -> None:
    assert orjson.dumps(kline_list(of_values(values))) == plain(of_values(values))


@given(st.lists(st.floats(allow_nan=False, allow_infinity=False), max_size=30))
def test_kline_list_of_any_floats_equals_the_plain_way(values: list[float]) -> None:
    assert orjson.dumps(kline_list(of_values(values))) == plain(of_values(values))


@pytest.mark.parametrize("symbol", ["BTCUSDT", "1000PEPEUSDT", "SHIB1000USDT"])
def test_kline_list_of_a_market_equals_the_plain_way(symbol: str) -> None:
    series = SyntheticMarket(7, 0.0, START_MS + 700 * DAY_MS).candles(symbol)[-3000:]
    text = orjson.dumps(kline_list(series))
    assert text == plain(series)
    assert len(orjson.loads(text)) == 3000


def test_instrument_item_tells_when_a_contract_ends() -> None:
    ending = replace(LISTED["BTCUSDT"], status="Delivering", delivery_time_ms=START_MS)
    assert instrument_item(LISTED["BTCUSDT"])["deliveryTime"] == "0"
    assert instrument_item(ending)["deliveryTime"] == str(START_MS)
    assert instrument_item(ending)["status"] == "Delivering"
    day = of_values([100.0])
    assert ticker_item(ending, day, FundingSeries.empty(), START_MS + 1)["deliveryTime"] == str(START_MS)
    assert Decimal(ticker_item(ending, day, FundingSeries.empty(), START_MS + 1)["fundingRate"]) == 0
