"""Bybit's byte shapes: envelopes, rows and items as shared/spec/bybit-v5.md shows them; nearly every number is text."""

import re
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import numpy as np
import orjson

from perpcast.market import Candle, CandleSeries, Instrument
from perpcast.simulator.market import BASE_MS, FUNDING_MS, FundingSeries

OK, PARAMETER_ERROR, ROUTE_NOT_FOUND = 0, 10001, 10017
_EXPONENT = re.compile(rb"[-.0-9]+e[-+0-9]+")
_KEY_DAYS = 90


def envelope(result: dict[str, Any], now_ms: int, code: int = OK, message: str = "OK") -> dict[str, Any]:
    """What every REST answer is wrapped in; `time` is the market's."""
    return {"retCode": code, "retMsg": message, "result": result, "retExtInfo": {}, "time": now_ms}


def number(value: float) -> str:
    """The shortest text that reads back as the same float, never with an exponent."""
    text = repr(value)
    if "e" in text:
        text = format(Decimal(text), "f")
    return text.removesuffix(".0")


def server_time(now_ms: int) -> dict[str, Any]:
    """Result of /v5/market/time."""
    return {"timeSecond": str(now_ms // 1000), "timeNano": str(now_ms * 1_000_000)}


def kline_list(series: CandleSeries) -> orjson.Fragment:
    """Rows of /v5/market/kline, as JSON: start, open, high, low, close, volume, turnover; newest first.

    The same texts as `number` gives, but written by orjson from one array of floats and quoted afterwards: a page of
    1,000 rows takes half a millisecond instead of two. Starts are whole numbers below 2**53, exact as floats.
    """
    if not len(series):
        return orjson.Fragment(b"[]")
    columns = (series.open, series.high, series.low, series.close, series.volume, series.turnover)
    values = np.column_stack((series.open_time_ms, *columns))[::-1]
    rows = orjson.dumps(np.ascontiguousarray(values), option=orjson.OPT_SERIALIZE_NUMPY)
    if b"e" in rows:
        rows = _EXPONENT.sub(lambda match: number(float(match[0])).encode(), rows)
    cells = rows[2:-2].replace(b",", b'","').replace(b']","[', b'"],["')
    return orjson.Fragment(b'[["' + (cells + b'"').replace(b'.0"', b'"') + b"]]")


def kline_message(candle: Candle, interval: str, step_ms: int, confirm: bool, now_ms: int) -> dict[str, Any]:
    """A push of the topic kline.{interval}.{symbol}."""
    item = {
        "start": candle.open_time_ms,
        "end": candle.open_time_ms + step_ms - 1,
        "interval": interval,
        "open": number(candle.open),
        "close": number(candle.close),
        "high": number(candle.high),
        "low": number(candle.low),
        "volume": number(candle.volume),
        "turnover": number(candle.turnover),
        "confirm": confirm,
        "timestamp": now_ms,
    }
    return {"topic": f"kline.{interval}.{candle.symbol}", "type": "snapshot", "ts": now_ms, "data": [item]}


def instrument_item(instrument: Instrument) -> dict[str, Any]:
    """An item of /v5/market/instruments-info; largest quantities are plain multiples of the step."""
    tick, step = instrument.tick_size, instrument.qty_step
    most, most_at_market = format(step * 1_000_000, "f"), format(step * 200_000, "f")
    base = instrument.symbol.removesuffix("USDT")
    return {
        "symbol": instrument.symbol,
        "contractType": "LinearPerpetual",
        "status": instrument.status,
        "baseCoin": base,
        "quoteCoin": "USDT",
        "settleCoin": "USDT",
        "symbolType": "",
        "launchTime": str(instrument.launch_time_ms),
        "deliveryTime": str(instrument.delivery_time_ms or 0),
        "deliveryFeeRate": "",
        "priceScale": str(max(0, -int(tick.as_tuple().exponent))),
        "leverageFilter": {"minLeverage": "1", "maxLeverage": str(instrument.max_leverage), "leverageStep": "0.01"},
        "priceFilter": {
            "minPrice": format(tick, "f"),
            "maxPrice": format(tick * 19_999_998, "f"),
            "tickSize": format(tick, "f"),
        },
        "lotSizeFilter": {
            "maxOrderQty": most,
            "minOrderQty": format(instrument.min_quantity, "f"),
            "qtyStep": format(step, "f"),
            "postOnlyMaxOrderQty": most,
            "maxMktOrderQty": most_at_market,
            "minNotionalValue": format(instrument.min_notional, "f"),
        },
        "unifiedMarginTrade": True,
        "fundingInterval": instrument.funding_interval_minutes,
        "copyTrading": "none",
        "upperFundingRate": "0.005",
        "lowerFundingRate": "-0.005",
        "isPreListing": False,
        "preListingInfo": None,
        "riskParameters": {"priceLimitRatioX": "0.05", "priceLimitRatioY": "0.1"},
        "displayName": "",
        "forbidUplWithdrawal": False,
    }


def funding_items(symbol: str, funding: FundingSeries) -> list[dict[str, str]]:
    """Items of /v5/market/funding/history, newest first."""
    pairs = zip(funding.time_ms[::-1].tolist(), funding.rate[::-1].tolist(), strict=True)
    return [{"symbol": symbol, "fundingRate": number(rate), "fundingRateTimestamp": str(time)} for time, rate in pairs]


def ticker_item(instrument: Instrument, day: CandleSeries, funding: FundingSeries, now_ms: int) -> dict[str, str]:
    """An item of /v5/market/tickers from the visible bars of the last 24 hours (the running bar last).

    Index and mark price are the last price, the spread is one tick, open interest is not modelled ("0").
    """
    last, first = float(day.close[-1]), float(day.open[0])
    an_hour_ago = int(np.searchsorted(day.open_time_ms, now_ms - 3_600_000 - BASE_MS, side="right"))
    tick, price = instrument.tick_size, Decimal(number(last))
    coming = int(np.searchsorted(funding.time_ms, now_ms, side="right"))
    rate = number(float(funding.rate[coming])) if coming < len(funding.time_ms) else "0"
    size = format(instrument.qty_step * 1000, "f")
    return {
        "symbol": instrument.symbol,
        "lastPrice": number(last),
        "indexPrice": number(last),
        "markPrice": number(last),
        "prevPrice24h": number(first),
        "price24hPcnt": number(round(last / first - 1, 6)),
        "highPrice24h": number(float(day.high.max())),
        "lowPrice24h": number(float(day.low.min())),
        "prevPrice1h": number(float(day.open[min(an_hour_ago, len(day) - 1)])),
        "openInterest": "0",
        "openInterestValue": "0",
        "singleOpenInterest": "0",
        "singleOpenInterestValue": "0",
        "turnover24h": number(round(float(day.turnover.sum()), 4)),
        "volume24h": number(round(float(day.volume.sum()), 6)),
        "fundingRate": rate,
        "nextFundingTime": str((now_ms // FUNDING_MS + 1) * FUNDING_MS),
        "fundingIntervalHour": str(instrument.funding_interval_minutes // 60),
        "fundingCap": "0.005",
        "bid1Price": format(price - tick, "f"),
        "bid1Size": size,
        "ask1Price": format(price, "f"),
        "ask1Size": size,
        "predictedDeliveryPrice": "",
        "basis": "",
        "basisRate": "",
        "basisRateYear": "",
        "deliveryFeeRate": "",
        "deliveryTime": str(instrument.delivery_time_ms or 0),
        "preOpenPrice": "",
        "preQty": "",
        "curPreListingPhase": "",
    }


def key_information(key: str, now_ms: int) -> dict[str, Any]:
    """Result of /v5/user/query-api: a key of the master account, of this machine, that may trade contracts only."""
    none: list[str] = []
    families = ("Spot", "Wallet", "Options", "Derivatives", "CopyTrading", "BlockTrade", "Exchange", "NFT", "Affiliate")
    return {
        "id": "1",
        "note": "local exchange",
        "apiKey": key,
        "readOnly": 0,
        "secret": "",
        "permissions": {"ContractTrade": ["Order", "Position"], **dict.fromkeys((*families, "Earn"), none)},
        "ips": ["127.0.0.1"],
        "type": 1,
        "deadlineDay": _KEY_DAYS,
        "expiredAt": _timestamp(now_ms + _KEY_DAYS * 86_400_000),
        "createdAt": _timestamp(now_ms),
        "unified": 0,
        "uta": 1,
        "userID": 1,
        "inviterID": 0,
        "vipLevel": "No VIP",
        "mktMakerLevel": "0",
        "affiliateID": 0,
        "rsaPublicKey": "",
        "isMaster": True,
        "parentUid": "0",
        "kycLevel": "LEVEL_DEFAULT",
        "kycRegion": "",
    }


def _timestamp(time_ms: int) -> str:
    """As 2025-07-01T00:00:00Z."""
    return datetime.fromtimestamp(time_ms // 1000, UTC).isoformat().replace("+00:00", "Z")
