"""Bybit's JSON into the market's values, strictly: a value of ours, a rejected row with its reason, or an error.

`MalformedError` means that an answer as a whole cannot be believed; a single candle that breaks its own rules is
rejected by itself and the rest of its page kept.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from reprlib import Repr
from typing import Any, TypeGuard

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from perpcast.errors import DataError
from perpcast.market import (
    USDT_PERPETUAL,
    Candle,
    CandleSeries,
    FundingRate,
    Instrument,
    Listing,
    Ticker,
    is_of_other_interval,
)

# The most candles that one answer holds. A wider window would come back cut at its old end without a word.
PAGE_BARS = 1000
PAGE_FUNDING_RATES = 200

_LATEST_MS = 4_102_444_800_000  # 2100: a later time is none
_MOST_DIGITS = 40  # of a decimal, before and after the point: no price and no rate is longer

_LARGEST = 1e18  # no price, volume or turnover is larger, and no price smaller than its inverse

_CURSOR = re.compile(r"[!\"$%'-~]*")

_REPR = Repr()
_REPR.maxstring = _REPR.maxother = 80

# How candles stand in an answer.
_LIST = b'"list":['
_ROW = b'["","","","","","",""],'
_PLACE = b'"the rows"'  # where they were taken out

_OTHER_ASSETS = ("stock", "commodity", "forex")


class MalformedError(DataError):
    """An answer that is not of the documented shape, or not the answer to the question."""


@dataclass(frozen=True, slots=True)
class RejectedRow:
    """A candle of the exchange that breaks its own rules: not stored, and reported."""

    symbol: str
    open_time_ms: int
    reason: str


@dataclass(frozen=True)
class CandlePage:
    """One answer: the closed candles of the window, oldest first, and those that were rejected."""

    candles: CandleSeries
    rejected: tuple[RejectedRow, ...]
    server_time_ms: int


@dataclass(frozen=True)
class KeyRights:
    """What an API key may do. `permissions` are written `Wallet.Withdraw`; `ips` is empty for a key bound to none."""

    read_only: bool
    permissions: frozenset[str]
    ips: tuple[str, ...]


def read_json(body: bytes) -> Any:
    """The JSON of an answer; where its `list` is rows of seven plain numbers, as candles come, an array float64 [n, 7].

    Without 7,000 texts in between, a page costs a third. Whatever is unusual in any way is read the plain way. Raises
    orjson.JSONDecodeError.
    """
    begin = body.find(_LIST) + len(_LIST)
    end = body.find(b"]]", begin) + 1
    if begin < len(_LIST) or not end or _PLACE in body:
        return orjson.loads(body)
    table = _table(body[begin:end])
    if table is None:
        return orjson.loads(body)
    envelope = orjson.loads(b"".join((body[:begin], _PLACE, body[end:])))
    result = envelope.get("result") if isinstance(envelope, dict) else None
    if not (isinstance(result, dict) and result.get("list") == [orjson.loads(_PLACE)]):
        return orjson.loads(body)
    result["list"] = table
    return envelope


def _table(rows: bytes) -> np.ndarray | None:
    """`["1","2",...],[...]` as an array [n, 7]; None where it is anything else than times and plain numbers."""
    skeleton = rows.translate(None, b"0123456789.")
    count = len(skeleton) // len(_ROW) + 1
    if skeleton != (_ROW * count)[:-1]:
        return None
    if not (rows.startswith(b'["') and rows.count(b'"],["') == count - 1 and rows.count(b'","') == 6 * count):
        return None  # a digit outside of its quotes
    text = rows.translate(None, b'[]"').decode()
    try:
        numbers = pc.cast(pc.split_pattern(pa.array([text]), ",").flatten(), pa.float64())
    except pa.ArrowInvalid:
        return None
    table = numbers.to_numpy().reshape(-1, 7)
    times = table[:, 0]
    plain = np.isfinite(table).all() and (times < _LATEST_MS).all() and (times == np.floor(times)).all()
    return table if plain else None


def member(value: Any, key: str, kind: type) -> Any:
    """`value[key]`, of that very type (no bool for an int). Raises MalformedError."""
    found = value.get(key) if isinstance(value, dict) else None
    if type(found) is not kind:
        raise MalformedError(f"expected {key} as {kind.__name__}, received {_short(found)}")
    return found


def parse_time_ms(envelope: Mapping[str, Any]) -> int:
    """The exchange's clock when it answered, as every envelope has it."""
    time_ms = member(envelope, "time", int)
    if not 0 <= time_ms < _LATEST_MS:
        raise MalformedError(f"expected time in milliseconds, received {time_ms}")
    return time_ms


def parse_server_time_ms(result: Mapping[str, Any]) -> int:
    """The exchange's clock from the result of `market/time`, in whole milliseconds."""
    nanoseconds = member(result, "timeNano", str)
    if not (_is_whole(nanoseconds) and int(nanoseconds) // 1_000_000 < _LATEST_MS):
        raise MalformedError(f"expected timeNano as a time in nanoseconds, received {_short(nanoseconds)}")
    return int(nanoseconds) // 1_000_000


def parse_candles(
    result: Mapping[str, Any], symbol: str, step_ms: int, start_ms: int, end_ms: int, server_time_ms: int
) -> CandlePage:
    """The closed candles with `start_ms <= open time < end_ms` of a `market/kline` result.

    The exchange answers newest first, may begin with the running candle and may add a row before `start_ms`: all
    three are put right here by the rows' own times. A row that comes twice must come twice alike.
    """
    if member(result, "symbol", str) != symbol:
        raise MalformedError(f"expected candles of {symbol}, received those of {_short(result['symbol'])}")
    if result.get("category", "linear") != "linear":
        raise MalformedError(f"expected category linear, received {_short(result['category'])}")
    times, values, unreadable = _columns(result, symbol)
    closed_end_ms = min(end_ms, server_time_ms - step_ms + 1)
    wanted = (times >= start_ms) & (times < closed_end_ms)
    times, values = times[wanted], values[wanted]
    order = np.argsort(times, kind="stable")
    times, values = times[order], values[order]
    if is_of_other_interval(times, step_ms):
        raise MalformedError(
            f"expected candles of {symbol} every {step_ms // 60_000} minutes, received them "
            f"{int(np.median(np.diff(np.unique(times)))) / 60_000:g} minutes apart"
        )
    reasons: dict[int, str] = {time: reason for time, reason in unreadable.items() if start_ms <= time < closed_end_ms}
    keep = np.isin(times, list(reasons), invert=True) if reasons else np.ones(len(times), bool)
    repeated = np.flatnonzero(np.diff(times) == 0)
    for row in repeated.tolist():
        keep[row + 1] = False
        if not np.array_equal(values[row], values[row + 1]):
            reasons.setdefault(int(times[row]), "listed twice with different values")
    for row, reason in _implausible(times, values, step_ms).items():
        reasons.setdefault(int(times[row]), reason)
    if reasons:
        keep &= np.isin(times, list(reasons), invert=True)
    candles = CandleSeries(times[keep], *np.ascontiguousarray(values[keep].T))
    rejected = tuple(RejectedRow(symbol, time, reasons[time]) for time in sorted(reasons))
    return CandlePage(candles, rejected, server_time_ms)


def _columns(result: Mapping[str, Any], symbol: str) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Open times int64 [n], values float64 [n, 6], and the reason of each row whose values are no numbers."""
    table = result.get("list")
    if isinstance(table, np.ndarray):
        return table[:, 0].astype(np.int64), table[:, 1:], {}
    # Some row is not seven plain numbers: each of those is told apart by its time.
    times, values, unreadable = [], [], {}
    for row in member(result, "list", list):
        time = row[0] if isinstance(row, list) and row else None
        if not (_is_whole(time) and int(time) < _LATEST_MS):
            raise MalformedError(f"expected candles of {symbol} with a start in milliseconds, received {_short(row)}")
        try:
            numbers = [_number(text) for text in row[1:]]
        except ValueError as error:
            unreadable[int(time)] = str(error)
            continue
        if len(numbers) != 6:
            unreadable[int(time)] = f"expected 7 fields, received {len(row)}"
            continue
        times.append(int(time))
        values.append(numbers)
    return np.array(times, np.int64), np.array(values, np.float64).reshape(-1, 6), unreadable


def _is_plain(text: str) -> bool:
    """Without what Python reads as part of a number and no exchange writes: `1_000`, ` 1`, digits of other scripts."""
    return text.isascii() and "_" not in text and text.split() in ([text], [])


def _number(text: Any) -> float:
    try:
        number = float(text) if isinstance(text, str) and _is_plain(text) else np.nan
    except ValueError:
        number = np.nan
    if not np.isfinite(number):
        raise ValueError(f"expected a number as text, received {_short(text)}")
    return float(number)


def _implausible(times: np.ndarray, values: np.ndarray, step_ms: int) -> dict[int, str]:
    """Row number and reason of candles that break the rules of DESIGN 7. A large move is none of them."""
    open_, high, low, close, volume, turnover = values.T
    rules = (
        (times % step_ms != 0, "its start is not on the grid of the interval"),
        ((values[:, :4] <= 0).any(axis=1), "a price is not above zero"),
        ((volume < 0) | (turnover < 0), "volume or turnover is negative"),
        (
            (values > _LARGEST).any(axis=1) | (values[:, :4] < 1 / _LARGEST).any(axis=1),
            "a number is beyond any market",
        ),
        (
            (low > np.minimum(open_, close)) | (high < np.maximum(open_, close)),
            "open or close lies outside low to high",
        ),
    )
    return {row: reason for broken, reason in reversed(rules) for row in np.flatnonzero(broken).tolist()}


def parse_instruments(result: Mapping[str, Any]) -> tuple[dict[str, Instrument], str]:
    """The USDT perpetuals on coins of one `market/instruments-info` page by symbol, and the cursor of the next page."""
    instruments = {}
    for item in member(result, "list", list):
        if _kind(item) == USDT_PERPETUAL:
            instrument = _instrument(item)
            instruments[instrument.symbol] = instrument
    return instruments, _cursor(result)


def parse_listings(result: Mapping[str, Any]) -> tuple[dict[str, Listing], str]:
    """All contracts of one `market/instruments-info` page by symbol, and the cursor of the next page."""
    listings = {}
    for item in member(result, "list", list):
        symbol = member(item, "symbol", str)
        listings[symbol] = Listing(
            symbol, _kind(item), member(item, "status", str), _milliseconds(item, "launchTime"), _delivery_time_ms(item)
        )
    return listings, _cursor(result)


def _cursor(result: Mapping[str, Any]) -> str:
    cursor = result.get("nextPageCursor") or ""
    if not (isinstance(cursor, str) and len(cursor) < 1000 and _CURSOR.fullmatch(cursor)):
        raise MalformedError(f"expected nextPageCursor as text, received {_short(cursor)}")
    return cursor


def _kind(item: Any) -> str:
    contract = member(item, "contractType", str)
    if contract != "LinearPerpetual":
        return "dated future" if contract == "LinearFutures" else contract
    if item.get("symbolType") in _OTHER_ASSETS:
        return f"{item['symbolType']} perpetual"
    quote, settle = member(item, "quoteCoin", str), member(item, "settleCoin", str)
    if quote != settle:
        return f"{quote} perpetual settled in {settle}"
    return USDT_PERPETUAL if quote == "USDT" else f"{quote} perpetual"


def _instrument(item: Mapping[str, Any]) -> Instrument:
    symbol = member(item, "symbol", str)
    try:
        prices, lots = member(item, "priceFilter", dict), member(item, "lotSizeFilter", dict)
        return Instrument(
            symbol=symbol,
            status=member(item, "status", str),
            tick_size=_positive(prices, "tickSize"),
            qty_step=_positive(lots, "qtyStep"),
            min_quantity=_positive(lots, "minOrderQty"),
            min_notional=_decimal(lots, "minNotionalValue") or Decimal(0),  # absent in older answers
            max_leverage=_positive(member(item, "leverageFilter", dict), "maxLeverage"),
            launch_time_ms=_milliseconds(item, "launchTime"),
            funding_interval_minutes=_minutes(item, "fundingInterval"),
            delivery_time_ms=_delivery_time_ms(item),
        )
    except MalformedError as error:
        raise MalformedError(f"instrument {symbol}: {error}") from None


def _minutes(values: Mapping[str, Any], key: str) -> int:
    minutes = member(values, key, int)
    if not 0 < minutes <= 7 * 24 * 60:
        raise MalformedError(f"expected {key} in minutes, received {minutes}")
    return minutes


def _delivery_time_ms(item: Mapping[str, Any]) -> int | None:
    """None for a contract without an end, which is written as 0, as nothing or not at all."""
    return _milliseconds(item, "deliveryTime") or None if item.get("deliveryTime") else None


def _milliseconds(values: Mapping[str, Any], key: str) -> int:
    text = values.get(key)
    if not (_is_whole(text) and int(text) < _LATEST_MS):
        raise MalformedError(f"expected {key} as a time in milliseconds, received {_short(text)}")
    return int(text)


def _is_whole(text: Any) -> TypeGuard[str]:
    return isinstance(text, str) and text.isascii() and text.isdigit() and len(text) < _MOST_DIGITS


def _positive(values: Mapping[str, Any], key: str) -> Decimal:
    number = _required_decimal(values, key)
    if not number:
        raise MalformedError(f"expected {key} above zero, received {number}")
    return number


def _required_decimal(values: Mapping[str, Any], key: str, *, signed: bool = False) -> Decimal:
    number = _decimal(values, key, signed=signed)
    if number is None:
        raise MalformedError(f"expected {key} as a number, received {_short(values.get(key))}")
    return number


def _decimal(values: Mapping[str, Any], key: str, *, signed: bool = False) -> Decimal | None:
    """The number under a key; None where the exchange has none, which it writes as empty text or not at all."""
    text = values.get(key)
    if text is None or text == "":
        return None
    try:
        number = Decimal(text) if isinstance(text, str) and _is_plain(text) else Decimal("NaN")
    except InvalidOperation:
        number = Decimal("NaN")
    if not (number.is_finite() and len(text) < 2 * _MOST_DIGITS and abs(number.adjusted()) < _MOST_DIGITS):
        raise MalformedError(f"expected {key} as a number as text, received {_short(text)}")
    if number < 0 and not signed:
        raise MalformedError(f"expected {key} not below zero, received {number}")
    return number


def parse_tickers(result: Mapping[str, Any]) -> dict[str, Ticker]:
    """All contracts of a `market/tickers` result, by symbol; those that have never traded have no price: left out."""
    tickers = {}
    for item in member(result, "list", list):
        symbol = member(item, "symbol", str)
        try:
            if _decimal(item, "lastPrice"):
                tickers[symbol] = _ticker(symbol, item)
        except MalformedError as error:
            raise MalformedError(f"ticker {symbol}: {error}") from None
    return tickers


def _ticker(symbol: str, item: Mapping[str, Any]) -> Ticker:
    return Ticker(
        symbol=symbol,
        last_price=_positive(item, "lastPrice"),
        mark_price=_positive(item, "markPrice"),
        bid_price=_decimal(item, "bid1Price") or None,
        ask_price=_decimal(item, "ask1Price") or None,
        turnover_24h=_required_decimal(item, "turnover24h"),
        volume_24h=_required_decimal(item, "volume24h"),
        funding_rate=_decimal(item, "fundingRate", signed=True),
        next_funding_time_ms=_milliseconds(item, "nextFundingTime") or None if item.get("nextFundingTime") else None,
    )


def parse_key_rights(result: Mapping[str, Any]) -> KeyRights:
    """What the key of a `user/query-api` result may do."""
    families = member(result, "permissions", dict)
    rights = {f"{family}.{right}" for family in families for right in _texts(families, family)}
    ips = _texts(result, "ips") if result.get("ips") else []
    read_only = member(result, "readOnly", int)
    if read_only not in (0, 1):
        raise MalformedError(f"expected readOnly as 0 or 1, received {read_only}")
    return KeyRights(read_only == 1, frozenset(rights), tuple(ip for ip in ips if ip != "*"))


def _texts(values: Mapping[str, Any], key: str) -> list[str]:
    texts = member(values, key, list)
    if not all(isinstance(text, str) for text in texts):
        raise MalformedError(f"expected {key} as a list of text, received {_short(texts)}")
    return texts


def parse_funding_rates(result: Mapping[str, Any], symbol: str, end_ms: int) -> list[FundingRate]:
    """The payments of one `funding/history` page before `end_ms`, oldest first."""
    rates: dict[int, FundingRate] = {}
    for item in member(result, "list", list):
        if member(item, "symbol", str) != symbol:
            raise MalformedError(f"expected funding rates of {symbol}, received those of {_short(item['symbol'])}")
        time_ms = _milliseconds(item, "fundingRateTimestamp")
        rate = float(_required_decimal(item, "fundingRate", signed=True))
        if time_ms >= end_ms or not abs(rate) < 1:
            raise MalformedError(f"expected a funding rate before {end_ms}, received {_short(item)}")
        if rates.setdefault(time_ms, FundingRate(symbol, time_ms, rate)).rate != rate:
            raise MalformedError(f"expected one funding rate at {time_ms}, received another: {_short(item)}")
    return [rates[time_ms] for time_ms in sorted(rates)]


def parse_confirmed_candles(message: Mapping[str, Any], step_ms: int) -> list[Candle]:
    """The closed candles of one message of a `kline.*` topic; mostly none, since a running candle is sent each second.

    Raises MalformedError for a closed candle that cannot be one: the caller leaves the bar to the REST interface.
    """
    symbol = member(message, "topic", str).rpartition(".")[2]
    candles = []
    for item in member(message, "data", list):
        if not member(item, "confirm", bool):
            continue
        time = member(item, "start", int)
        if not 0 <= time < _LATEST_MS or member(item, "end", int) - time != step_ms - 1:
            raise MalformedError(f"candle of {symbol}: expected {step_ms // 60_000} minutes, received {_short(item)}")
        try:
            numbers = [_number(item.get(key)) for key in ("open", "high", "low", "close", "volume", "turnover")]
        except ValueError as error:
            raise MalformedError(f"candle of {symbol}: {error}") from None
        broken = _implausible(np.array([time]), np.array([numbers]), step_ms)
        if broken:
            raise MalformedError(f"candle of {symbol} at {time}: {broken[0]}")
        candles.append(Candle(symbol, time, *numbers))
    return candles


def _short(value: Any) -> str:
    """So much of a value as a message bears, however long or deep it is."""
    text = _REPR.repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
