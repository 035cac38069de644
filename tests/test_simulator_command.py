"""The command line of the local exchange: the announced address, the clock that waits, the exit codes."""

import asyncio
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from click.testing import CliRunner

from perpcast.simulator.__main__ import main
from perpcast.simulator.market import BASE_MS
from perpcast.timeframe import parse_time, to_ms
from tests.test_simulator_market import write_candles
from tests.test_simulator_server import said, taken_port

ROOT = Path(__file__).parents[1]
JUNE_MS = to_ms(parse_time("2022-06-01T00:00Z"))


@contextmanager
def running(*arguments: str) -> Iterator[tuple[str, str]]:
    """REST and WebSocket URL of `python -m perpcast.simulator`, which must end cleanly on a signal."""
    command = [sys.executable, "-m", "perpcast.simulator", *arguments]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            match = re.fullmatch(r"local exchange: (http://\S+) and (ws://\S+)\n", process.stdout.readline())
            assert match
            yield match[1], match[2]
            process.send_signal(signal.SIGTERM)
            assert process.wait(10) == 0
        finally:
            process.kill()


async def fetch(rest_url: str, path: str) -> dict[str, Any]:
    async with aiohttp.ClientSession(rest_url) as session, session.get(f"/v5/market/{path}") as response:
        return await response.json()


async def confirmed_starts(ws_url: str, bars: int) -> list[int]:
    """Opens of the next closed bars of BTCUSDT."""
    async with aiohttp.ClientSession() as session, session.ws_connect(ws_url) as ws:
        await said(ws, {"op": "subscribe", "args": ["kline.15.BTCUSDT"]})
        starts: list[int] = []
        while len(starts) < bars:
            item = (await ws.receive_json())["data"][0]
            starts += [item["start"]] if item["confirm"] else []
        return starts


def test_time_waits_at_now_for_a_subscription_then_three_days_pass_in_seconds() -> None:
    with running("--synthetic", "7", "--now", "2022-06-01T00:00Z", "--speed", "180000") as (rest_url, ws_url):
        time.sleep(0.3)
        assert asyncio.run(fetch(rest_url, "time"))["time"] == JUNE_MS
        starts = asyncio.run(asyncio.wait_for(confirmed_starts(ws_url, 3 * 96), 30))
    assert starts == list(range(JUNE_MS, JUNE_MS + 3 * 96 * BASE_MS, BASE_MS))


def test_without_now_and_speed_recorded_candles_run_on_from_their_end(tmp_path: Path) -> None:
    async def ask(rest_url: str) -> tuple[list[list[str]], list[int]]:
        body = await fetch(rest_url, "kline?symbol=NEWUSDT&interval=15")
        await asyncio.sleep(0.05)
        return body["result"]["list"], [body["time"], (await fetch(rest_url, "time"))["time"]]

    write_candles(tmp_path / "NEWUSDT.parquet")
    with running("--candles", str(tmp_path)) as (rest_url, _):
        rows, times = asyncio.run(ask(rest_url))
    assert [row[0] for row in rows] == [str(3 * BASE_MS), str(BASE_MS), "0"]
    assert 4 * BASE_MS <= times[0] < times[1] < 5 * BASE_MS


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "give either --candles DIR or --synthetic SEED"),
        (["--synthetic", "7", "--candles", "EMPTY"], 2, "give either --candles DIR or --synthetic SEED"),
        (["--candles", "EMPTY"], 2, "expected files named SYMBOL.parquet"),
        (["--candles", "missing"], 2, "does not exist"),
        (["--synthetic", "7", "--now", "soon"], 2, "expected a time such as"),
        (["--synthetic", "7", "--now", "2020-01-01"], 2, "a synthetic market begins at"),
        (["--synthetic", "7", "--speed", "0"], 2, "--speed"),
        (["--candles", "DAMAGED"], 1, "cannot be read: expected parquet"),
        (["--synthetic", "7", "--now", "2022-06-01", "--port", "TAKEN"], 2, "give another with --port"),
    ],
)
def test_wrong_use_is_answered_in_a_line(tmp_path: Path, arguments: list[str], code: int, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "BTCUSDT.parquet").write_text("not parquet")
    with taken_port() as port:
        names = {"EMPTY": str(tmp_path / "empty"), "DAMAGED": str(tmp_path / "damaged"), "TAKEN": str(port)}
        result = CliRunner().invoke(main, [names.get(argument, argument) for argument in arguments])
    assert result.exit_code == code
    assert message in " ".join(result.stderr.split())
    assert isinstance(result.exception, SystemExit)  # not a traceback
