"""Answers of any kind at all: what comes of them is a value that keeps the rules, or an error of ours, nothing else.

Through the client's own doors, byte for byte, then over real connections, then through a download into PostgreSQL.
"""

import asyncio
import copy
import json
import tracemalloc
from collections.abc import Callable, Mapping
from decimal import Decimal
from functools import cache
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import text

from perpcast.database import Database, read_candle_gaps, read_candle_revisions, read_candles, read_funding_rates
from perpcast.download import Wanted, download
from perpcast.errors import PerpcastError
from perpcast.exchange import BybitClient, CandlePage, KeyRights
from perpcast.exchange.client import _Answer
from perpcast.exchange.wire import (
    parse_candles,
    parse_funding_rates,
    parse_instruments,
    parse_key_rights,
    parse_listings,
    parse_server_time_ms,
    parse_tickers,
    read_json,
)
from perpcast.market import FundingRate, Instrument, Listing, Ticker
from perpcast.simulator import faults
from perpcast.simulator.clock import SteppedClock
from perpcast.simulator.faults import Faults
from perpcast.simulator.rest import RestApi
from perpcast.simulator.server import serve
from perpcast.simulator.synthetic import START_MS, SyntheticMarket
from perpcast.simulator.wire import envelope, key_information
from tests import warp

STEP_MS = 900_000
BARS = 6
NOW_MS = START_MS + 30 * 86_400_000 + STEP_MS // 3
END_MS = NOW_MS - NOW_MS % STEP_MS
FIRST_MS = END_MS - BARS * STEP_MS
LATEST_MS = 4_102_444_800_000  # 2100
SYMBOL = "BTCUSDT"
MARKET = SyntheticMarket(seed=3, edge=0.0, end_ms=NOW_MS + 86_400_000)

Parse = Callable[[Mapping[str, Any], int], Any]

PARSES: dict[str, Parse] = {
    "time": lambda result, _: parse_server_time_ms(result),
    "kline": lambda result, time_ms: parse_candles(result, SYMBOL, STEP_MS, FIRST_MS, END_MS + STEP_MS, time_ms),
    "funding": lambda result, _: parse_funding_rates(result, SYMBOL, NOW_MS),
    "instruments": lambda result, _: parse_instruments(result),
    "listings": lambda result, _: parse_listings(result),
    "tickers": lambda result, _: parse_tickers(result),
    "key": lambda result, _: parse_key_rights(result),
}


@cache
def honest() -> dict[str, Any]:
    """What the local exchange answers, a page of each endpoint, as plain JSON."""
    api = RestApi(MARKET, SteppedClock(NOW_MS))
    window = {"symbol": SYMBOL, "interval": "15", "start": str(FIRST_MS), "end": str(NOW_MS)}
    listed = api.instruments_info({"category": "linear"})
    results = {
        "time": {"timeSecond": str(NOW_MS // 1000), "timeNano": f"{NOW_MS}000000"},
        "kline": api.kline(window),
        "funding": api.funding_history({"category": "linear", "symbol": SYMBOL, "limit": "4"}),
        "instruments": listed | {"list": listed["list"][:2], "nextPageCursor": "first%3D2"},
        "listings": listed | {"list": listed["list"][:2]},
        "tickers": api.tickers({"category": "linear", "symbol": SYMBOL}),
        "key": key_information("KEY123", NOW_MS),
    }
    return {name: orjson.loads(orjson.dumps(envelope(result, NOW_MS))) for name, result in results.items()}


def believed(body: bytes, parse: Parse) -> Any:
    """What the client makes of a body that came with HTTP 200: a value, or the error that it raises."""
    client = BybitClient("http://unused", jitter=np.random.default_rng(1))

    async def open_and_parse() -> Any:  # on a loop: a quota is measured on its clock
        try:
            return parse(*client._open_envelope(_Answer(200, {}, body)))
        except PerpcastError as error:
            return error

    return asyncio.run(open_and_parse())


# --- what an answer may look like -------------------------------------------------------------------------------------

NUMBERS = st.one_of(
    st.integers(),
    st.integers(-(10**40), 10**40),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([0, -1, 1, 2**53, 2**63, 2**64, 10001, 10002, 10006, NOW_MS, 1e308, -0.0]),
)
TEXTS = st.one_of(
    st.text(max_size=20),
    st.decimals(allow_nan=True, allow_infinity=True).map(str),
    st.integers(-(10**40), 10**40).map(str),
    st.floats().map(repr),
    st.sampled_from(
        ["", "0", "-0", "-1", "1e308", "1e-308", "1e400", "1_0", " 1", "1 ", "+1", ".5", "5.", "0x1", "\uff11"]
    ),
    st.sampled_from([SYMBOL, "ETHUSDT", "linear", "spot", "Trading", "Closed", "USDT", "USDC", "LinearPerpetual", "*"]),
    st.integers(-3, BARS + 3).map(lambda bar: str(FIRST_MS + bar * STEP_MS)),
    st.integers(FIRST_MS, NOW_MS).map(str),
    st.integers(41, 5_000).map(lambda digits: "9" * digits),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=8) | st.dictionaries(st.text(max_size=8), inner, max_size=8)
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all that lies in a JSON value, itself first."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(deeper for key, member in inner for deeper in places(member, (*path, key)))]


@st.composite
def mutated(draw: st.DrawFn, body: Any) -> Any:
    """The same with some of it dropped, replaced, doubled, or in another order."""
    whole = [copy.deepcopy(body)]  # so that the body itself has a holder
    for _ in range(draw(st.integers(1, 4))):
        path = draw(st.sampled_from(places(whole)[1:]))
        holder = whole
        for key in path[:-1]:
            holder = holder[key]
        key = path[-1]
        kind = draw(st.sampled_from(["drop", "replace", "double", "reorder", "swap"]))
        if kind == "drop" and path != (0,):
            del holder[key]
        elif kind == "double" and isinstance(holder, list) and path != (0,):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif kind == "double" and isinstance(holder, dict):
            holder[draw(st.text(max_size=8))] = copy.deepcopy(holder[key])
        elif kind == "reorder" and isinstance(holder[key], list):
            holder[key] = draw(st.permutations(holder[key]))
        elif kind == "reorder" and isinstance(holder[key], dict):
            holder[key] = dict(draw(st.permutations(list(holder[key].items()))))
        elif kind == "swap":
            other = draw(st.sampled_from(places(whole)))
            found: Any = whole
            for step in other:
                found = found[step]
            holder[key] = copy.deepcopy(found)
        else:
            holder[key] = draw(JSON)
        if not whole:
            whole = [None]
    return whole[0]


@st.composite
def answers(draw: st.DrawFn, name: str) -> bytes:
    """A body: an honest one with changed values or changed bytes, or anything."""
    body = honest()[name]
    if draw(st.booleans()):
        body = draw(st.one_of(mutated(body), mutated(body), JSON.map(lambda result: body | {"result": result}), JSON))
    content = orjson.dumps(body) if representable(body) else json.dumps(body).encode("utf-8", "surrogatepass")
    if draw(st.booleans()):
        for _ in range(draw(st.integers(1, 3))):
            first = draw(st.integers(0, len(content)))
            last = draw(st.integers(first, min(len(content), first + 30)))
            between = draw(st.one_of(st.just(b""), st.binary(max_size=4), st.sampled_from(SHREDS)))
            content = content[:first] + between + content[last if draw(st.booleans()) else first :]
    return content


SHREDS = [
    *(
        b'"',
        b",",
        b"[",
        b"]",
        b"{",
        b"}",
        b'","',
        b'"],["',
        b"null",
        b"\xff",
        b"\xef\xbb\xbf",
        b"\\u0000",
        b"5",
        b".",
        b" ",
    ),
    *(b'"list":[],', b'"list":[null],', b'"result":null,', b'"retCode":0,', b"[" * 1100, b'{"a":' * 1100),
]


def representable(body: Any) -> bool:
    try:
        orjson.dumps(body)
    except TypeError:  # a whole number of more than 64 bits, a half of a surrogate pair
        return False
    return True


# --- what may come of it ----------------------------------------------------------------------------------------------


def literal_rows(body: bytes) -> list[list[Any]]:
    """Every list of seven texts in a body, as another reader of JSON sees it."""
    found = []

    def collect(value: Any) -> None:
        if isinstance(value, list) and len(value) == 7 and all(isinstance(cell, str) for cell in value):
            found.append(value)
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            collect(inner)

    collect(json.loads(body))
    return found


def check_page(page: CandlePage, body: bytes) -> None:
    """Candles that keep the rules, lie in the window, are closed by the exchange's own clock, and stood in the body."""
    assert page.server_time_ms == json.loads(body)["time"]
    times = page.candles.open_time_ms.tolist()
    assert times == sorted(set(times))
    rejected = [row.open_time_ms for row in page.rejected]
    assert rejected == sorted(set(rejected))
    assert not set(times) & set(rejected)
    for time in times + rejected:
        assert FIRST_MS <= time < END_MS + STEP_MS
        assert time + STEP_MS <= page.server_time_ms
    rows = {tuple(map(float, row)) for row in literal_rows(body) if all(map(readable, row))}
    for candle in page.candles.candles(SYMBOL):
        values = (candle.open, candle.high, candle.low, candle.close, candle.volume, candle.turnover)
        assert candle.open_time_ms % STEP_MS == 0
        assert all(1e-18 <= price <= 1e18 for price in values[:4])
        assert all(0 <= amount <= 1e18 for amount in values[4:])
        assert candle.low <= min(candle.open, candle.close)
        assert candle.high >= max(candle.open, candle.close)
        assert (float(candle.open_time_ms), *values) in rows


def readable(cell: str) -> bool:
    try:
        return np.isfinite(float(cell)) and cell.isascii() and "_" not in cell and cell.strip() == cell
    except ValueError:
        return False


def check_value(name: str, value: Any) -> None:
    """Of the promised types, within the promised bounds."""
    if name == "time":
        assert 0 <= value < LATEST_MS
    elif name == "funding":
        assert [rate.funding_time_ms for rate in value] == sorted({rate.funding_time_ms for rate in value})
        assert all(type(rate) is FundingRate and rate.symbol == SYMBOL and abs(rate.rate) < 1 for rate in value)
    elif name in ("instruments", "listings"):
        found, cursor = value
        assert type(cursor) is str
        assert not set(cursor) & set(" #&\n")
        for symbol, item in found.items():
            assert item.symbol == symbol
            assert type(item.status) is str
            assert 0 <= item.launch_time_ms < LATEST_MS
            assert item.delivery_time_ms is None or 0 < item.delivery_time_ms < LATEST_MS
            check_rules(item)
    elif name == "tickers":
        for symbol, ticker in value.items():
            assert type(ticker) is Ticker
            assert ticker.symbol == symbol
            assert ticker.last_price > 0
            assert ticker.mark_price > 0
            assert ticker.turnover_24h >= 0
    elif name == "key":
        assert type(value) is KeyRights
        assert all(type(right) is str for right in value.permissions | {*value.ips})


def check_rules(item: Instrument | Listing) -> None:
    if isinstance(item, Listing):
        assert type(item.kind) is str
        return
    for number in (item.tick_size, item.qty_step, item.min_quantity, item.max_leverage):
        assert type(number) is Decimal
        assert Decimal("1e-40") < number < Decimal("1e40")
    assert item.min_notional >= 0
    assert 0 < item.funding_interval_minutes <= 10_080


@pytest.mark.parametrize("name", PARSES)
def test_honest_answer_is_believed(name: str) -> None:
    body = orjson.dumps(honest()[name])
    value = believed(body, PARSES[name])
    check_value(name, value)
    if name == "kline":
        check_page(value, body)
        assert len(value.candles) == BARS
        assert value.rejected == ()
    else:
        assert value


@pytest.mark.fault("D10", "D11")
@pytest.mark.parametrize("name", PARSES)
def test_any_answer_is_a_value_that_keeps_the_rules_or_an_error_of_ours(name: str) -> None:
    @given(body=answers(name))
    def check(body: bytes) -> None:
        value = believed(body, PARSES[name])
        if isinstance(value, PerpcastError):
            assert len(str(value)) < 1000
            return
        if name == "kline":
            check_page(value, body)
        check_value(name, value)

    check()


# Rows whose quotes, commas and digits are nearly right.
ROW = b'["1","2","3.5","0.4","5","6","7"]'
BODY = b'{"result":{"symbol":"A","list":[%s]},"time":5}'


def changed(rows: int, old: bytes, new: bytes, skip: int) -> bytes:
    """A body of so many rows in which one `old`, after the first `skip` of them, is `new` instead."""
    parts = (BODY % b",".join([ROW] * rows)).split(old)
    place = 1 + skip % max(1, len(parts) - 1)
    return old.join(parts[:place]) + new + old.join(parts[place:])


SIGNS = st.sampled_from([b'"', b",", b"[", b"]", b".", b"3", b'","', b"],["])


@pytest.mark.fault("D10")
@given(body=st.builds(changed, st.integers(1, 4), SIGNS, st.sampled_from(SHREDS) | SIGNS, st.integers(0, 60)))
@example(BODY % ROW.replace(b'"2",', b'"2"5,'))
@example(BODY % (ROW + b",9" + ROW))
@example(BODY % (b"5" + ROW))
@example(BODY % b"")
@example(BODY.replace(b'"time"', b'"list":[null],"time"') % ROW)
@example(BODY.replace(b'"symbol"', b'"list":[["8"]],"symbol"') % ROW)
@example(BODY.replace(b'"symbol"', b'"list" : [null],"symbol"') % ROW)
@example(BODY.replace(b'},"time"', b',"list" : [null]},"time"') % ROW)
@example(BODY.replace(b'"result"', b'"retExtInfo"').replace(b'"time"', b'"result":{"list" :[null]},"time"') % ROW)
@example(BODY.replace(b'"A"', b'"\\"list\\":[["') % ROW)
@example(b'{"x\\"list":[%s],"result":{"list" : [null]}}' % ROW)
@example(b'{"x\\"list":[%s],"result":{"list" : ["the rows"]}}' % ROW)
def test_fast_reader_of_candles_reads_what_a_plain_one_reads(body: bytes) -> None:
    def meaning(read: Callable[[bytes], Any]) -> Any:
        try:
            found = read(body)
        except orjson.JSONDecodeError:
            return "not JSON"
        rows = found.get("result", {}).get("list") if isinstance(found.get("result"), dict) else None
        if isinstance(rows, np.ndarray):
            found["result"]["list"] = rows.tolist()
        elif isinstance(rows, list) and rows and all(isinstance(row, list) for row in rows):
            with_numbers = [[float(cell) if readable(str(cell)) else cell for cell in row] for row in rows]
            found["result"]["list"] = with_numbers
        return found

    assert meaning(read_json) == meaning(orjson.loads)


ENDLESS = {
    "brackets": b"[" * 400_000,
    "braces": b'{"a":' * 80_000,
    "deep": b'{"retCode":0,"retMsg":"OK","time":%d,"result":{"symbol":' % NOW_MS + b"[" * 1000 + b"]" * 1000 + b"}}",
    "digits": orjson.dumps(envelope({"symbol": SYMBOL, "list": [["9" * 400_000, *"123456"]]}, NOW_MS)),
    "digits in a row": orjson.dumps(
        envelope({"symbol": SYMBOL, "list": [[str(FIRST_MS), "9" * 400_000, *"23456"]]}, NOW_MS)
    ),
    "rows": orjson.dumps(
        envelope({"symbol": SYMBOL, "list": [[str(FIRST_MS), "1", "2", "1", "2", "1", "1"]] * 6_000}, NOW_MS)
    ),
    "bad rows": orjson.dumps(
        envelope({"symbol": SYMBOL, "list": [[str(FIRST_MS + bar), *"x"] for bar in range(6_000)]}, NOW_MS)
    ),
    "empty rows": orjson.dumps(envelope({"symbol": SYMBOL, "list": [[]] * 100_000}, NOW_MS)),
    "keys": orjson.dumps(envelope({str(key): key for key in range(25_000)}, NOW_MS)),
    "message": orjson.dumps(envelope({}, NOW_MS, 10001, "x" * 400_000)),
    "lists": b'{"retCode":0,"retMsg":"OK","time":5,"result":{"symbol":"BTCUSDT","list":[[]]'
    + b',"list":[[]]' * 30_000
    + b"}}",
}


@pytest.mark.fault("D10")
@pytest.mark.parametrize("name", PARSES)
@pytest.mark.parametrize("shape", ENDLESS)
def test_endless_answer_costs_memory_in_proportion_and_ends_in_a_short_word(shape: str, name: str) -> None:
    body = ENDLESS[shape]
    tracemalloc.start()
    try:
        value = believed(body, PARSES[name])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100 * len(body) + (1 << 20)
    assert not isinstance(value, PerpcastError) or len(str(value)) < 1000


# --- over a connection ------------------------------------------------------------------------------------------------

STATUS_LINES = [
    *(b"HTTP/1.1 200 OK", b"HTTP/1.0 200 OK", b"HTTP/1.1 200", b"HTTP/1.1 100 Continue", b"HTTP/1.1 204 No Content"),
    *(b"HTTP/1.1 304 Not Modified", b"HTTP/1.1 307 Moved", b"HTTP/1.1 999 ?", b"HTTP/1.1 -1 OK", b"HTTP/9.9 200 OK"),
    *(b"HTTP/1.1 99999 OK", b"ICY 200 OK", b"", b"\x16\x03\x01\x02", b"HTTP/1.1 101 Switching Protocols"),
]
HEADERS = [
    *(
        b"Content-Length: %d",
        b"Content-Length: 5",
        b"Content-Length: -5",
        b"Content-Length: 99999999999",
        b"Content-Length: x",
    ),
    *(
        b"Transfer-Encoding: chunked",
        b"Transfer-Encoding: gzip",
        b"Content-Encoding: gzip",
        b"Content-Encoding: deflate",
    ),
    *(
        b"Content-Encoding: br",
        b"Content-Encoding: zstd",
        b"Content-Encoding: rot13",
        b"Content-Type: text/html; charset=no",
    ),
    *(b"Set-Cookie: \xff=\xfe; Max-Age=x", b"Location: http://[", b"no colon", b": no name", b"X: " + b"a" * 20_000),
    *(
        b"Retry-After: soon",
        b"Retry-After: 5",
        b"X-Bapi-Limit-Reset-Timestamp: \xb2",
        b"Connection: upgrade",
        b"\x00: \x00",
    ),
]


@st.composite
def transmissions(draw: st.DrawFn) -> tuple[bytes, bytes]:
    """What a server may send, and the body in it."""
    body = draw(answers("kline") | st.just(orjson.dumps(honest()["kline"])))
    chosen = draw(st.lists(st.sampled_from(HEADERS), max_size=3))
    lines = [line % len(body) if b"%d" in line else line for line in chosen]
    head = b"\r\n".join([draw(st.sampled_from(STATUS_LINES)), *lines])
    return head + draw(st.sampled_from([b"\r\n\r\n", b"\r\n\r\n", b"\n\n", b""])) + body, body


@pytest.mark.fault("D10")
@given(transmission=transmissions())
@settings(max_examples=3 * settings().max_examples)
def test_any_transmission_is_a_page_that_keeps_the_rules_or_an_error_of_ours(transmission: tuple[bytes, bytes]) -> None:
    sent, body = transmission

    async def serve_it(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.readline() not in (b"\r\n", b""):
            pass
        writer.write(sent)
        writer.close()

    async def run() -> Any:
        rng = np.random.default_rng(1)
        async with await asyncio.start_server(serve_it, "127.0.0.1", 0) as server:
            url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
            async with BybitClient(url, jitter=rng, attempts=2) as client:
                try:
                    return await client.fetch_candles(SYMBOL, "15", FIRST_MS, END_MS + STEP_MS)
                except PerpcastError as error:
                    return error

    found = warp.run(run())
    assert isinstance(found, CandlePage | PerpcastError)
    if isinstance(found, CandlePage):
        check_page(found, body)


# --- into the database ------------------------------------------------------------------------------------------------

DAYS = 15
WANTED_BARS = DAYS * 96
SYMBOLS = (SYMBOL, "ETHUSDT")
START = END_MS - WANTED_BARS * STEP_MS

Rows = list[Any]
Edit = Callable[[Rows], Rows]


def at(rows: Rows, share: float) -> int:
    """The row at so much of the page."""
    return int(share * len(rows))


def dropped(share: float, length: int) -> Edit:
    return lambda rows: rows[: at(rows, share)] + rows[at(rows, share) + length :]


def doubled(share: float) -> Edit:
    return lambda rows: rows + rows[at(rows, share) :][:1]


def replaced(share: float, row: Any) -> Edit:
    return lambda rows: [*rows[: at(rows, share)], row, *rows[at(rows, share) + 1 :]]


def with_cell(share: float, column: int, cell: Any) -> Edit:
    """One cell of a row, where an edit before has left a row there."""

    def changed(row: Any) -> Any:
        return [*row[:column], cell, *row[column + 1 :]] if isinstance(row, list) else row

    def edit(rows: Rows) -> Rows:
        place = at(rows, share)
        return [*rows[:place], *map(changed, rows[place : place + 1]), *rows[place + 1 :]]

    return edit


def exchanged(share: float, one: int, other: int) -> Edit:
    """Two cells of a row, such as high and low."""

    def edit(rows: Rows) -> Rows:
        for row in rows[at(rows, share) :][:5]:
            if isinstance(row, list) and len(row) == 7:
                row[one], row[other] = row[other], row[one]
        return rows

    return edit


SHARES = st.floats(0, 1, exclude_max=True)
EDITS: st.SearchStrategy[Edit] = st.one_of(
    st.builds(dropped, SHARES, st.integers(1, 300)),
    st.builds(doubled, SHARES),
    st.builds(replaced, SHARES, JSON),
    st.builds(with_cell, SHARES, st.integers(0, 6), SCALARS),
    st.builds(exchanged, SHARES, st.integers(1, 6), st.integers(1, 6)),
    st.just(lambda rows: rows[::-1]),
    st.builds(lambda step: lambda rows: rows[::step], st.integers(2, 5)),
    st.just(lambda rows: []),
)


def served_as_valid(rows: Rows) -> set[tuple[float, ...]]:
    return {
        tuple(map(float, row))
        for row in rows
        if isinstance(row, list) and len(row) == 7 and all(isinstance(cell, str) and readable(cell) for cell in row)
    }


def fetched(database: Database, script: Faults, *, verify: bool = False) -> None:
    class Silent:
        def begin(self, phase: str, unit: str, amounts: Mapping[str, int]) -> None: ...

        def advance(self, symbol: str, amount: int) -> None: ...

        def notice(self, text: str) -> None: ...

    async def run() -> None:
        rng = np.random.default_rng(1)
        async with (
            serve(MARKET, SteppedClock(NOW_MS), faults=script) as address,
            BybitClient(address.rest_url, jitter=rng) as client,
        ):
            await download(client, database, Wanted(SYMBOLS, "15", DAYS, verify=verify), Silent(), sample=rng)

    warp.run(run())


@pytest.mark.fault("D11")
@given(plans=st.lists(st.lists(EDITS, max_size=4), min_size=1, max_size=6))
@settings(
    max_examples=settings().max_examples // 7,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_any_candles_that_are_served_leave_no_wrong_one_in_the_database(
    database: Database, plans: list[list[Edit]]
) -> None:
    with database.begin() as connection:
        connection.execute(text("TRUNCATE raw_market_data, candle_gaps, candle_revisions, funding_rates, instruments"))
    served: set[tuple[float, ...]] = set()
    pages = 0

    def spoiled(rows: Rows) -> Rows:
        nonlocal pages
        for edit in plans[pages % len(plans)]:
            rows = edit(rows)
        pages += 1
        served.update(served_as_valid(rows))
        return rows if all(map(representable, rows)) else []

    script = Faults()
    script.add(faults.rows(spoiled), path="kline", times=None)
    fetched(database, script)
    grid = range(START, END_MS, STEP_MS)
    for symbol in SYMBOLS:
        stored = read_candles(database, symbol)
        for candle in stored.candles(symbol):
            values = (candle.open, candle.high, candle.low, candle.close, candle.volume, candle.turnover)
            assert (float(candle.open_time_ms), *values) in served
            assert candle.low <= min(candle.open, candle.close) <= max(candle.open, candle.close) <= candle.high
            assert candle.open_time_ms in grid
        missing = {
            gap.first_missing_ms + bar * STEP_MS
            for gap in read_candle_gaps(database, symbol)
            if gap.cause != "flat_run"
            for bar in range(gap.bars)
        }
        assert missing == {*grid} - {*stored.open_time_ms.tolist()}

    fetched(database, Faults(), verify=True)  # an honest exchange: what was spoiled is asked again and put right
    for symbol in SYMBOLS:
        truth = MARKET.candles(symbol)
        truth = truth[(truth.open_time_ms >= START) & (truth.open_time_ms < END_MS)]
        stored = read_candles(database, symbol)
        np.testing.assert_array_equal(stored.frame(), truth.frame())
        assert read_candle_gaps(database, symbol) == []
        changed = read_candle_revisions(database, symbol)
        assert all((float(time), *before) in served for time, (before, _) in changed.items())
        paid = MARKET.funding(symbol)
        inside = (paid.time_ms >= START) & (paid.time_ms <= NOW_MS)
        assert [rate.rate for rate in read_funding_rates(database, symbol)] == paid.rate[inside].tolist()
