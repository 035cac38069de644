"""The limit for one IP: 600 requests in any 5 seconds, then ten minutes of HTTP 403."""

import asyncio

import aiohttp
import pytest

from perpcast.simulator.clock import SteppedClock
from perpcast.simulator.ip_limit import BAN_SECONDS, REQUESTS, WINDOW_SECONDS, IpLimit
from perpcast.simulator.server import serve
from tests.test_simulator_market import TableMarket


class Wall:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("gap_seconds", [0.0, 0.001, WINDOW_SECONDS / REQUESTS - 0.0001])
def test_the_601st_request_within_five_seconds_is_refused_for_ten_minutes(gap_seconds: float) -> None:
    wall = Wall()
    limit = IpLimit(wall)
    for _ in range(REQUESTS):
        assert limit.admits()
        wall.now += gap_seconds
    assert not limit.admits()
    breach = wall.now
    wall.now = breach + BAN_SECONDS - 1
    assert not limit.admits()  # and asking on has not made it longer:
    wall.now = breach + BAN_SECONDS
    assert limit.admits()


def test_six_hundred_in_any_five_seconds_go_on_for_ever() -> None:
    wall = Wall()
    limit = IpLimit(wall)
    for window in range(5):
        wall.now = window * WINDOW_SECONDS
        assert all(limit.admits() for _ in range(REQUESTS))


def test_window_is_rolling_not_counted_from_full_seconds() -> None:
    wall = Wall()
    limit = IpLimit(wall)
    wall.now = 4.0
    assert all(limit.admits() for _ in range(REQUESTS))
    wall.now = 5.0
    assert not limit.admits()


@pytest.mark.parametrize("limited", [True, False])
def test_exchange_answers_http_403_over_the_limit(limited: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> list[tuple[int, str]]:
        async with (
            serve(TableMarket(10), SteppedClock(0), ip_limit=limited) as address,
            aiohttp.ClientSession() as session,
        ):
            answers = []
            for _ in range(3):
                async with session.get(f"{address.rest_url}/v5/market/time") as response:
                    answers.append((response.status, (await response.text())[:20]))
            async with session.ws_connect(address.ws_url) as ws:  # a connection is not a request
                await ws.send_str('{"op": "ping"}')
                assert (await ws.receive_json())["success"]
            return answers

    monkeypatch.setattr("perpcast.simulator.ip_limit.REQUESTS", 2)
    answers = asyncio.run(run())
    assert [code for code, _ in answers] == ([200, 200, 403] if limited else [200] * 3)
    if limited:
        assert answers[2][1] == "access too frequent"


@pytest.mark.parametrize("sent", [b"{}", b"category=linear"])
def test_get_with_a_body_is_answered_http_403(sent: bytes) -> None:
    async def run() -> list[int]:
        async with (
            serve(TableMarket(10), SteppedClock(0)) as address,
            aiohttp.ClientSession() as session,
        ):
            url, codes = f"{address.rest_url}/v5/market/time", []
            for body in (sent, None):
                async with session.get(url, data=body) as response:
                    codes.append(response.status)
            return codes

    assert asyncio.run(run()) == [403, 200]
