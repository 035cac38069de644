"""Signed requests: the published vectors, a secret that nothing shows, and the exchange's clock, which ours follows."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

import numpy as np
import pytest
from aiohttp import web

from perpcast.errors import PerpcastError, RefusedError
from perpcast.exchange import BybitClient, Credentials, KeyRights
from perpcast.exchange.client import RECV_WINDOW_MS
from perpcast.exchange.signing import signature, signed_headers, stream_signature
from perpcast.simulator import faults
from perpcast.simulator.clock import SteppedClock
from perpcast.simulator.faults import Faults
from perpcast.simulator.server import serve
from tests import warp
from tests.test_simulator_market import TableMarket

OURS = Credentials("KEY123", "SECRET123")
NOW_MS = 1_700_000_000_000
HOUR_MS = 3_600_000
RIGHTS = KeyRights(False, frozenset({"ContractTrade.Order", "ContractTrade.Position"}), ("127.0.0.1",))
TIME, KEY = "/v5/market/time", "/v5/user/query-api"
TOO_LATE = faults.ret_code(10002, "invalid request, please check your server timestamp")

# bybit-v5.md 1.2: what is signed, and its signature.
QUERY = "category=linear&symbol=BTCUSDT&limit=1"
ORDER = (
    '{"category":"linear","symbol":"BTCUSDT","side":"Buy","orderType":"Limit","qty":"0.001","price":"50000",'
    '"timeInForce":"PostOnly","orderLinkId":"t-1"}'
)
VECTORS = {
    QUERY: "8f890d4ed966da3ec17389ea4ec33df3df6a18cd05b94c206835602c9cc1eba6",
    ORDER: "63fb0de735478af28fdb1f1efb64c299a1900b9ab42915bf0b48b5026f3f8dde",
}

Value = TypeVar("Value")


@pytest.mark.parametrize(("tail", "expected"), VECTORS.items())
def test_signature_of_a_request_is_the_published_one(tail: str, expected: str) -> None:
    assert signature(OURS, NOW_MS, 5000, tail.encode()) == expected
    assert signed_headers(OURS, NOW_MS, 5000, tail.encode()) == {
        "X-BAPI-API-KEY": "KEY123",
        "X-BAPI-TIMESTAMP": "1700000000000",
        "X-BAPI-RECV-WINDOW": "5000",
        "X-BAPI-SIGN": expected,
    }


def test_signature_of_a_stream_is_the_published_one() -> None:
    expected = "55e35bb8371344bdcfc26c9ba396f3929246be1fc7889ad39f478f5e9dfdc20a"
    assert stream_signature(OURS, 1_700_000_010_000) == expected


def test_signature_depends_on_every_part() -> None:
    others = [
        signature(Credentials("KEY124", "SECRET123"), NOW_MS, 5000, QUERY.encode()),
        signature(Credentials("KEY123", "SECRET124"), NOW_MS, 5000, QUERY.encode()),
        signature(OURS, NOW_MS + 1, 5000, QUERY.encode()),
        signature(OURS, NOW_MS, 5001, QUERY.encode()),
        signature(OURS, NOW_MS, 5000, QUERY.encode() + b"&"),
        signature(OURS, NOW_MS, 5000, b""),
    ]
    assert len({*others, *VECTORS.values()}) == len(others) + len(VECTORS)


def ask(
    question: Callable[[BybitClient], Awaitable[Value]],
    script: Faults,
    clock: SteppedClock | None = None,
    credentials: Credentials | None = OURS,
) -> Value:
    """What comes of the question at an exchange that stands in 2023, while the loop's clock begins at 0."""

    async def run() -> Value:
        async with (
            serve(
                TableMarket(10), clock or SteppedClock(NOW_MS), faults=script, keys={"KEY123": "SECRET123"}
            ) as address,
            BybitClient(address.rest_url, jitter=np.random.default_rng(1), credentials=credentials) as client,
        ):
            return await question(client)

    return warp.run(run())


def rights(client: BybitClient) -> Awaitable[KeyRights]:
    return client.fetch_key_rights()


def test_signed_read_goes_by_the_clock_of_the_exchange_compared_once() -> None:
    async def three(client: BybitClient) -> list[KeyRights]:
        return [await client.fetch_key_rights() for _ in range(3)]

    script = Faults()
    assert ask(three, script) == [RIGHTS] * 3
    assert (script.requests(TIME), script.requests(KEY)) == (1, 3)


@pytest.mark.parametrize("away_ms", [RECV_WINDOW_MS + 1, HOUR_MS, 400 * 24 * HOUR_MS])
def test_signed_read_after_the_clocks_went_apart_compares_them_again(away_ms: int) -> None:
    clock, script = SteppedClock(NOW_MS), Faults()

    async def question(client: BybitClient) -> list[KeyRights]:
        first = await client.fetch_key_rights()
        clock.advance_to(NOW_MS + away_ms)
        return [first, await client.fetch_key_rights(), await client.fetch_key_rights()]

    assert ask(question, script, clock) == [RIGHTS] * 3
    assert (script.requests(TIME), script.requests(KEY)) == (2, 4)


def test_signed_read_after_our_clock_ran_ahead_compares_them_again() -> None:
    """The exchange stands still while an hour of ours passes: our stamps lie in its future."""

    async def question(client: BybitClient) -> list[KeyRights]:
        first = await client.fetch_key_rights()
        await asyncio.sleep(3600)
        return [first, await client.fetch_key_rights()]

    script = Faults()
    assert ask(question, script) == [RIGHTS] * 2
    assert (script.requests(TIME), script.requests(KEY)) == (2, 3)


def test_signed_read_a_second_time_at_the_wrong_time_is_final() -> None:
    script = Faults()
    script.add(TOO_LATE, path=KEY, times=None)
    with pytest.raises(
        RefusedError, match="API key: retCode 10002: .*although the clock was compared just before"
    ) as end:
        ask(rights, script)
    assert end.value.code == 10002
    assert (script.requests(TIME), script.requests(KEY)) == (2, 2)


def test_signed_read_at_the_wrong_time_after_other_trouble_still_compares() -> None:
    script = Faults()
    script.add(faults.status(500), path=KEY, times=3)
    script.add(TOO_LATE, path=KEY)
    assert ask(rights, script) == RIGHTS
    assert (script.requests(TIME), script.requests(KEY)) == (2, 5)


@pytest.mark.parametrize("spoil", [faults.status(500), faults.body(b"<html>"), faults.reset(after_bytes=5)])
def test_signed_read_while_the_clock_cannot_be_compared_is_tried_no_oftener_than_others(spoil: faults.Spoil) -> None:
    async def question(client: BybitClient) -> None:
        await client.fetch_tickers()
        await client.fetch_key_rights()

    script = Faults()
    script.add(spoil, path=TIME, times=None)
    with pytest.raises(PerpcastError, match=r"API key .*after \d+ tries"):
        ask(question, script)
    assert script.requests(TIME) in (4, 12)
    assert script.requests(KEY) == 0


def test_signed_reads_at_once_each_get_their_answer() -> None:
    async def question(client: BybitClient) -> list[KeyRights]:
        return await asyncio.gather(*(client.fetch_key_rights() for _ in range(20)))

    script = Faults()
    script.add(TOO_LATE, path=KEY, times=5)
    assert ask(question, script) == [RIGHTS] * 20


@pytest.mark.parametrize(
    ("credentials", "spoil", "code"),
    [
        (Credentials("KEY123", "SECRET124"), None, 10004),
        (Credentials("KEY124", "SECRET123"), None, 10003),
        (OURS, faults.ret_code(10005, "Permission denied"), 10005),
        (OURS, faults.ret_code(10010, "Unmatched IP"), 10010),
        (OURS, faults.ret_code(33004, "Your api key has expired."), 33004),
        (OURS, faults.status(401), 401),
    ],
)
def test_signed_read_that_is_refused_is_final_and_shows_no_secret(
    credentials: Credentials, spoil: faults.Spoil | None, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    script = Faults()
    if spoil:
        script.add(spoil, path=KEY)
    with pytest.raises(RefusedError, match="API key: ") as refused:
        ask(rights, script, credentials=credentials)
    assert refused.value.code == code
    assert script.requests(KEY) == 1
    for shown in (str(refused.value), repr(refused.value), caplog.text):
        assert credentials.secret not in shown


def test_secret_shows_in_no_representation() -> None:
    client = BybitClient("http://localhost", jitter=np.random.default_rng(1), credentials=OURS)
    for shown in (repr(OURS), str(OURS), f"{OURS}", f"{OURS!r:>90}", repr([OURS]), repr(client), str(client)):
        assert "SECRET" not in shown
    assert "KEY123" in repr(OURS)


def test_secret_is_sent_nowhere() -> None:
    """Neither in a header nor in the path: the signature alone."""
    seen: list[str] = []

    async def look(request: web.Request, honest: faults.Honest) -> web.StreamResponse:
        seen.extend([request.raw_path, *map(str, request.headers.items())])
        return await honest()

    script = Faults()
    script.add(look, times=None)
    assert ask(rights, script) == RIGHTS
    assert any("X-BAPI-SIGN" in text for text in seen)
    assert not any("SECRET" in text for text in seen)


def test_public_reads_are_not_signed_though_there_is_a_key() -> None:
    seen: list[str] = []

    async def look(request: web.Request, honest: faults.Honest) -> web.StreamResponse:
        seen.extend(name.upper() for name in request.headers)
        return await honest()

    script = Faults()
    script.add(look, times=None)
    ask(lambda client: client.fetch_tickers(), script)
    assert not any(name.startswith("X-BAPI") for name in seen)


def test_signed_read_without_credentials_is_a_mistake_of_the_caller() -> None:
    script = Faults()
    with pytest.raises(ValueError, match="needs credentials"):
        ask(rights, script, credentials=None)
    assert script.requests(KEY) == 0
