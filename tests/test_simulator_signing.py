"""Signed requests at the local exchange: the published vectors, the rule for time, who is refused and how."""

import asyncio
import hashlib
import hmac
from typing import Any

import aiohttp
import orjson
import pytest

from perpcast.simulator.clock import SteppedClock
from perpcast.simulator.server import serve
from perpcast.simulator.signing import KeyRefusedError, UnsignedError, check_signed, is_signed
from tests.test_simulator_market import TableMarket

KEY, SECRET = "KEY123", "SECRET123"
NOW_MS = 1_700_000_000_000
ORDER = (
    '{"category":"linear","symbol":"BTCUSDT","side":"Buy","orderType":"Limit","qty":"0.001","price":"50000",'
    '"timeInForce":"PostOnly","orderLinkId":"t-1"}'
)
# bybit-v5.md 1.2: the text that is signed, and its signature.
VECTORS = [
    (
        f"{NOW_MS}{KEY}5000category=linear&symbol=BTCUSDT&limit=1",
        "8f890d4ed966da3ec17389ea4ec33df3df6a18cd05b94c206835602c9cc1eba6",
    ),
    (f"{NOW_MS}{KEY}5000{ORDER}", "63fb0de735478af28fdb1f1efb64c299a1900b9ab42915bf0b48b5026f3f8dde"),
    ("GET/realtime1700000010000", "55e35bb8371344bdcfc26c9ba396f3929246be1fc7889ad39f478f5e9dfdc20a"),
]


def headers(timestamp: int | str = NOW_MS, tail: str = "", **changes: str) -> dict[str, str]:
    """Of a well signed request, some of them changed afterwards; an empty one is left out."""
    payload = f"{timestamp}{KEY}5000{tail}"
    signed = {
        "X-BAPI-API-KEY": KEY,
        "X-BAPI-TIMESTAMP": str(timestamp),
        "X-BAPI-RECV-WINDOW": "5000",
        "X-BAPI-SIGN": hmac.new(SECRET.encode(), payload.encode(), hashlib.sha256).hexdigest(),
    }
    signed |= {f"X-BAPI-{name.upper().replace('_', '-')}": value for name, value in changes.items()}
    return {name: value for name, value in signed.items() if value}


@pytest.mark.parametrize(("payload", "signature"), VECTORS)
def test_published_vectors_are_signed(payload: str, signature: str) -> None:
    assert is_signed(SECRET, payload, signature)
    assert not is_signed(SECRET, payload, signature.upper())
    assert not is_signed(SECRET, payload + " ", signature)
    assert not is_signed("SECRET124", payload, signature)
    assert not is_signed(SECRET, payload, "é")


@pytest.mark.parametrize(("payload", "signature"), VECTORS[:2])
def test_published_vectors_pass_as_requests(payload: str, signature: str) -> None:
    tail = payload.removeprefix(f"{NOW_MS}{KEY}5000")
    assert check_signed(headers(sign=signature), tail, {KEY: SECRET}, NOW_MS) == KEY


@pytest.mark.parametrize(
    ("ahead_ms", "recv_window_ms", "code"),
    [
        (0, 5000, None),
        (999, 5000, None),
        (1000, 5000, 10002),  # a second ahead, however wide the window
        (1000, 60_000, 10002),
        (-5000, 5000, None),
        (-5001, 5000, 10002),
        (-5001, 6000, None),
        (-1, 0, 10002),
    ],
)
def test_time_of_a_request_must_lie_in_the_window(ahead_ms: int, recv_window_ms: int, code: int | None) -> None:
    time = str(NOW_MS + ahead_ms)
    sign = hmac.new(SECRET.encode(), f"{time}{KEY}{recv_window_ms}".encode(), hashlib.sha256).hexdigest()
    signed = headers(timestamp=time, recv_window=str(recv_window_ms), sign=sign)
    if code is None:
        assert check_signed(signed, "", {KEY: SECRET}, NOW_MS) == KEY
        return
    with pytest.raises(KeyRefusedError, match="recv_window") as refused:
        check_signed(signed, "", {KEY: SECRET}, NOW_MS)
    assert refused.value.code == code


def test_window_is_five_seconds_where_the_header_is_missing() -> None:
    sign = hmac.new(SECRET.encode(), f"{NOW_MS}{KEY}".encode(), hashlib.sha256).hexdigest()
    signed = headers(recv_window="", sign=sign)
    assert check_signed(signed, "", {KEY: SECRET}, NOW_MS + 5000) == KEY
    with pytest.raises(KeyRefusedError):
        check_signed(signed, "", {KEY: SECRET}, NOW_MS + 5001)


@pytest.mark.parametrize(
    "changes", [{"api_key": ""}, {"sign": ""}, {"timestamp": ""}, {"timestamp": "now"}, {"recv_window": "-1"}]
)
def test_missing_or_senseless_headers_are_unsigned(changes: dict[str, str]) -> None:
    with pytest.raises(UnsignedError):
        check_signed(headers(**changes), "", {KEY: SECRET}, NOW_MS)


def asked(signed: dict[str, str], query: str = "") -> tuple[int, dict[str, Any]]:
    """HTTP status and envelope of /v5/user/query-api."""

    async def run() -> tuple[int, dict[str, Any]]:
        async with (
            serve(TableMarket(10), SteppedClock(NOW_MS), keys={KEY: SECRET}) as address,
            aiohttp.ClientSession() as session,
            session.get(f"{address.rest_url}/v5/user/query-api{query}", headers=signed) as response,
        ):
            body = await response.read()
            return response.status, orjson.loads(body) if response.status == 200 else {}

    return asyncio.run(run())


def test_key_information_says_what_the_key_may_do() -> None:
    code, body = asked(headers())
    assert (code, body["retCode"], body["time"]) == (200, 0, NOW_MS)
    information = body["result"]
    expected = {"apiKey": KEY, "secret": "", "readOnly": 0, "type": 1, "uta": 1, "isMaster": True}
    assert {name: information[name] for name in expected} == expected
    granted = {family: rights for family, rights in information["permissions"].items() if rights}
    assert granted == {"ContractTrade": ["Order", "Position"]}
    assert {"Wallet", "Spot", "Options", "Exchange", "Earn"} < set(information["permissions"])
    assert information["createdAt"] == "2023-11-14T22:13:20Z"
    assert information["expiredAt"] == "2024-02-12T22:13:20Z"
    assert information["deadlineDay"] == 90


@pytest.mark.parametrize(
    ("signed", "query", "http", "code"),
    [
        (headers(tail="a=1&b=%3D"), "?a=1&b=%3D", 200, 0),
        (headers(tail="a=1&b=="), "?a=1&b=%3D", 200, 10004),  # not as it came over the wire
        (headers(sign="0" * 64), "", 200, 10004),
        (headers(api_key="KEY124"), "", 200, 10003),
        (headers(NOW_MS + 1000), "", 200, 10002),
        (headers(sign=""), "", 401, None),
        ({}, "", 401, None),
    ],
)
def test_requests_are_refused_as_bybit_does(signed: dict[str, str], query: str, http: int, code: int | None) -> None:
    status, body = asked(signed, query)
    assert (status, body.get("retCode")) == (http, code)
    assert not body.get("result") or code == 0


def test_market_data_need_no_key_and_mind_none() -> None:
    async def run() -> int:
        async with (
            serve(TableMarket(10), SteppedClock(NOW_MS)) as address,
            aiohttp.ClientSession() as session,
            session.get(f"{address.rest_url}/v5/market/time", headers=headers(sign="0")) as response,
        ):
            return (await response.json())["retCode"]

    assert asyncio.run(run()) == 0
