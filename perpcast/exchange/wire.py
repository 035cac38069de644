"""Bybit's JSON into the market's values, strictly: a value of ours, a rejected row with its reason, or an error.

`MalformedError` means that an answer as a whole cannot be believed; a single candle that breaks its own rules is
rejected by itself and the rest of its page kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from itertools import chain
from typing import Any, TypeGuard

import numpy as np

from perpcast.errors import DataError
from perpcast.market import USDT_PERPETUAL, Candle, CandleSeries, FundingRate, Instrument, Listing, Ticker

# The most candles that one answer holds. A wider window would come back cut at its old end without a word.
PAGE_BARS = 1000
PAGE_FUNDING_RATES = 200

_LATEST_MS = 4_102_444_800_000  # 2100: a later time is none
_MOST_DIGITS = 40  # of a decimal, before and after the point: no price and no rate is longer

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


def member(value: Any, key: str, kind: type) -> Any:
    """`value[key]`, of that very type (no bool for an int). Raises MalformedError."""
    found = value.get(key) if isinstance(value, dict) else None
    if type(found) is not kind:
        raise MalformedError(f"expected {key} as {kind.__name__}, received {_short(found)}")
    return found


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
    rows = member(result, "list", list)
    times, values, unreadable = _columns(rows, symbol)
    closed_end_ms = min(end_ms, server_time_ms - step_ms + 1)
    wanted = (times >= start_ms) & (times < closed_end_ms)
    times, values = times[wanted], values[wanted]
    _check_interval(times, symbol, step_ms)
    order = np.argsort(times, kind="stable")
    times, values = times[order], values[order]
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


def _check_interval(times: np.ndarray, symbol: str, step_ms: int) -> None:
    """Bars of another interval: an answer does not name its own, so its distances must. A few odd rows are no proof."""
    steps = np.diff(np.unique(times))
    finer = len(steps) > 0 and np.mean(steps < step_ms) > 0.5
    coarser = len(steps) >= 8 and (steps > step_ms).all()
    if finer or coarser:
        raise MalformedError(
            f"expected candles of {symbol} every {step_ms // 60_000} minutes, received them "
            f"{int(np.median(steps)) / 60_000:g} minutes apart"
        )


def _columns(rows: list[Any], symbol: str) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """Open times int64 [n], values float64 [n, 6], and the reason of each row whose values are no numbers."""
    if all(type(row) is list and len(row) == 7 for row in rows) and {*map(type, chain.from_iterable(rows))} <= {str}:
        texts = list(chain.from_iterable(rows))
        try:
            flat = np.fromiter(map(float, texts), np.float64, len(texts)).reshape(-1, 7)
        except ValueError:
            return _columns_row_by_row(rows, symbol)
        if not _is_plain("".join(texts)):
            return _columns_row_by_row(rows, symbol)
        if np.isfinite(flat).all() and (np.abs(flat[:, 0]) < _LATEST_MS).all():
            times = flat[:, 0].astype(np.int64)
            if (times == flat[:, 0]).all():
                return times, flat[:, 1:], {}
    return _columns_row_by_row(rows, symbol)


def _columns_row_by_row(rows: list[Any], symbol: str) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """The slow way, where some row is not seven numbers as text: each of those rows is told apart by its time."""
    times, values, unreadable = [], [], {}
    for row in rows:
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
    if not (isinstance(cursor, str) and cursor.isascii() and cursor.isprintable()):
        raise MalformedError(f"expected nextPageCursor as text, received {_short(cursor)}")
    return cursor


def _kind(item: Any) -> str:
    contract, quote = member(item, "contractType", str), item.get("quoteCoin")
    if contract != "LinearPerpetual":
        return "dated future" if contract == "LinearFutures" else contract
    if item.get("symbolType") in _OTHER_ASSETS:
        return f"{item['symbolType']} perpetual"
    return USDT_PERPETUAL if quote == item.get("settleCoin") == "USDT" else f"{quote} perpetual"


def _instrument(item: Mapping[str, Any]) -> Instrument:
    symbol = member(item, "symbol", str)
    prices, lots = member(item, "priceFilter", dict), member(item, "lotSizeFilter", dict)
    try:
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
    if number <= 0:
        raise MalformedError(f"expected {key} above zero, received {number}")
    return number


def _required_decimal(values: Mapping[str, Any], key: str) -> Decimal:
    number = _decimal(values, key)
    if number is None:
        raise MalformedError(f"expected {key} as a number, received {_short(values.get(key))}")
    return number


def _decimal(values: Mapping[str, Any], key: str) -> Decimal | None:
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
    return number


def parse_tickers(result: Mapping[str, Any]) -> dict[str, Ticker]:
    """All contracts of a `market/tickers` result, by symbol; those that have never traded have no price: left out."""
    tickers = {}
    for item in member(result, "list", list):
        symbol = member(item, "symbol", str)
        if not _decimal(item, "lastPrice"):
            continue
        tickers[symbol] = Ticker(
            symbol=symbol,
            last_price=_positive(item, "lastPrice"),
            mark_price=_positive(item, "markPrice"),
            bid_price=_decimal(item, "bid1Price") or None,
            ask_price=_decimal(item, "ask1Price") or None,
            turnover_24h=_required_decimal(item, "turnover24h"),
            volume_24h=_required_decimal(item, "volume24h"),
            funding_rate=_decimal(item, "fundingRate"),
            next_funding_time_ms=_milliseconds(item, "nextFundingTime") or None
            if item.get("nextFundingTime")
            else None,
        )
    return tickers


def parse_key_rights(result: Mapping[str, Any]) -> KeyRights:
    """What the key of a `user/query-api` result may do."""
    families = member(result, "permissions", dict)
    ips = result.get("ips") or []
    if not (isinstance(ips, list) and all(isinstance(ip, str) for ip in ips)):
        raise MalformedError(f"expected ips as a list of text, received {_short(ips)}")
    rights = {f"{family}.{right}" for family in families for right in member(families, family, list)}
    return KeyRights(member(result, "readOnly", int) == 1, frozenset(rights), tuple(ip for ip in ips if ip != "*"))


def parse_funding_rates(result: Mapping[str, Any], symbol: str, end_ms: int) -> list[FundingRate]:
    """The payments of one `funding/history` page before `end_ms`, oldest first."""
    rates = {}
    for item in member(result, "list", list):
        if member(item, "symbol", str) != symbol:
            raise MalformedError(f"expected funding rates of {symbol}, received those of {_short(item['symbol'])}")
        time_ms = _milliseconds(item, "fundingRateTimestamp")
        rate = float(_required_decimal(item, "fundingRate"))
        if time_ms >= end_ms or not abs(rate) < 1:
            raise MalformedError(f"expected a funding rate before {end_ms}, received {_short(item)}")
        rates[time_ms] = FundingRate(symbol, time_ms, rate)
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
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
