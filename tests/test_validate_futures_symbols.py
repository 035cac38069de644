"""validate_futures_symbols.py as its users run it: against the local exchange, with nothing else running."""

import os
import pty
import re
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from perpcast.config import load_settings
from perpcast.database import free_port
from perpcast.simulator.clock import RunningClock
from perpcast.simulator.server import serve_in_thread
from tests.universe_world import DAYS, NOW, Contract, ContractMarket
from validate_futures_symbols import SPARE, main

ROOT = Path(__file__).parents[1]

GOOD = ["BTCUSDT", "ETHUSDT", "POLUSDT", "1000PEPEUSDT"]
BAD = ["BTCUSDT", "MATICUSDT", "BCHUSDT", "ETHUSDT", "FTMUSDT", "IPUSDT", "NEWUSDT", "PEPEUSDT"]
CONTRACTS = {
    "BTCUSDT": Contract(turnover=123_456_789),
    "ETHUSDT": Contract(launch_day=7),
    "BCHUSDT": Contract(first_day=10, launch_day=-2698, turnover=5e6),
    "MATICUSDT": Contract(last_day=-3, status="Closed", delivery_day=-3),
    "POLUSDT": Contract(),
    "SUSDT": Contract(first_day=3.5),
    "IPUSDT": Contract(delivery_day=45),
    "NEWUSDT": Contract(first_day=43, last_day=44, status="PreLaunch"),
    "1000PEPEUSDT": Contract(),
    "BIGTHENUSDT": Contract(past_turnover=9e6, turnover=1e3),
    "MIDDLEUSDT": Contract(past_turnover=5e6),
    "SMALLUSDT": Contract(past_turnover=4e6),
    "TINYUSDT": Contract(past_turnover=3e6),
    "RISENUSDT": Contract(past_turnover=2e6, turnover=1e9),
}

TODAY = "124.1"  # BTCUSDT's turnover of 96 bars and 7 minutes, in millions


@pytest.fixture(scope="module")
def rest_url() -> Iterator[str]:
    with serve_in_thread(ContractMarket(CONTRACTS), RunningClock(NOW, 1.0, time.monotonic)) as address:
        yield address.rest_url


@pytest.fixture
def overlay(rest_url: str, tmp_path: Path) -> Callable[..., list[str]]:
    """The options for a configuration of these symbols on the local exchange, with no database anywhere."""

    def options(symbols: list[str], url: str = rest_url) -> list[str]:
        exchange = {"environment": "local", "rest_url": url, "ws_url": "ws://127.0.0.1:9/v5/public/linear"}
        sections: dict[str, Any] = {
            "exchange": exchange,
            "data_download": {"days": DAYS, "symbols": symbols},
            "database": {"port": free_port(), "directory": str(tmp_path / "none")},
        }
        path = tmp_path / "overlay.yaml"
        path.write_text(yaml.safe_dump(sections))
        return ["--config", str(ROOT / "config.yaml"), "--config", str(path)]

    return options


def rows(text: str) -> dict[str, list[str]]:
    """The table's rows by their symbol, as words."""
    return {words[0]: words[1:] for line in text.splitlines() if (words := line.split()) and words[0].endswith("USDT")}


def requests(text: str) -> int:
    found = re.search(r"([\d,]+) requests", text)
    assert found
    return int(found[1].replace(",", ""))


def test_symbols_that_can_all_be_used(overlay: Callable[..., list[str]], tmp_path: Path) -> None:
    finished = CliRunner().invoke(main, overlay(GOOD))
    assert (finished.exit_code, finished.stderr) == (0, "")
    assert "first training bar 2025-05-22 06:00 UTC, 40 days before the exchange's clock" in finished.stdout
    table = rows(finished.stdout)
    assert table["BTCUSDT"] == ["yes", "yes", "yes", TODAY, "usable"]
    assert set(GOOD) <= set(table)
    assert "ETHUSDT: launch time 2025-05-29 is later than its candles" in finished.stdout
    assert finished.stdout.splitlines()[-1] == "all of them can be used; next: python download_data.py"
    assert requests(finished.stdout) == 1 + 4 + 1 + len(GOOD)  # clock, listings, tickers, candles
    assert not (tmp_path / "none").exists()
    assert rows(CliRunner().invoke(main, [*overlay(GOOD), "--suggest"]).stdout) == table  # nothing to propose


def test_symbols_that_cannot_be_used_are_named_with_what_to_do(overlay: Callable[..., list[str]]) -> None:
    finished = CliRunner().invoke(main, overlay(BAD))
    assert finished.exit_code == 1
    assert rows(finished.stdout) == {
        "BTCUSDT": ["yes", "yes", "yes", TODAY, "usable"],
        "MATICUSDT": ["yes", "no", "-", "-", "use", "POLUSDT"],
        "BCHUSDT": ["yes", "yes", "no", "5.0", "unusable"],
        "ETHUSDT": ["yes", "yes", "yes", "1.0", "usable"],
        "FTMUSDT": ["-", "-", "-", "-", "unusable"],
        "IPUSDT": ["yes", "no", "-", "1.0", "unusable"],
        "NEWUSDT": ["yes", "no", "-", "-", "unusable"],
        "PEPEUSDT": ["-", "-", "-", "-", "use", "1000PEPEUSDT"],
    }
    for line in (
        "MATICUSDT: delisted on 2025-05-19; use POLUSDT",
        "BCHUSDT: too young: candles since 2025-06-01, 10 days missing; "
        "launch time 2018-01-01 is earlier than its candles",
        "FTMUSDT: unknown to this exchange; now SUSDT: too young: candles since 2025-05-25, 4 days missing",
        "IPUSDT: being delisted: last trade 2025-07-06 06:00 UTC",
        "NEWUSDT: does not trade yet: launch on 2025-07-04",
    ):
        assert line in finished.stdout.splitlines()
    assert finished.stderr == (
        "error: 6 of 8 symbols cannot be used: in data_download.symbols change MATICUSDT to POLUSDT, "
        "change PEPEUSDT to 1000PEPEUSDT, replace or remove BCHUSDT, FTMUSDT, IPUSDT, NEWUSDT "
        "(--suggest proposes others); set universe_as_of to '2025-07-01'\n"
    )


def test_new_name_that_is_configured_already_is_not_named_twice(overlay: Callable[..., list[str]]) -> None:
    finished = CliRunner().invoke(main, overlay(["MATICUSDT", "POLUSDT"]))
    assert finished.exit_code == 1
    assert "in data_download.symbols replace or remove MATICUSDT (--suggest" in finished.stderr


def test_proposals_rank_by_past_turnover_and_their_lines_pass(
    overlay: Callable[..., list[str]], tmp_path: Path
) -> None:
    options = overlay(BAD)
    finished = CliRunner().invoke(main, [*options, "--suggest"])
    assert finished.exit_code == 1
    table = finished.stdout[finished.stdout.index("proposal ") :]
    assert list(rows(table)) == ["BIGTHENUSDT", "MIDDLEUSDT", "SMALLUSDT", "TINYUSDT", "RISENUSDT"]
    assert rows(table)["RISENUSDT"] == ["2.0", "1,004.9"]  # huge today, small then
    assert "4 needed, 5 found." in table
    assert len(rows(table)) <= 4 + SPARE
    assert "still trade today, so some survivorship remains" in table
    assert "paste the lines above" in finished.stderr
    # Clock, listings, tickers; BTC, ETH, POL, PEPE once; BCH and S twice, since they are young; S and 5 candidates.
    assert requests(finished.stdout) == 6 + 4 + 4 + 6

    lines = finished.stdout[finished.stdout.index("data_download:") :]
    (tmp_path / "mine.yaml").write_text(lines)
    chosen = load_settings([ROOT / "config.yaml", tmp_path / "mine.yaml"]).data_download
    assert chosen.universe_as_of == "2025-07-01"
    assert chosen.symbols == (
        *("BTCUSDT", "POLUSDT", "ETHUSDT", "1000PEPEUSDT"),
        *("BIGTHENUSDT", "MIDDLEUSDT", "SMALLUSDT", "TINYUSDT"),
    )
    again = CliRunner().invoke(main, [*options, "--config", str(tmp_path / "mine.yaml")])
    assert again.exit_code == 0, again.stdout


def test_wrong_use_ends_with_exit_code_2(overlay: Callable[..., list[str]]) -> None:
    closed = f"http://127.0.0.1:{free_port()}"
    unreachable = CliRunner().invoke(main, overlay(GOOD, closed))
    assert unreachable.exit_code == 2
    assert f"exchange unreachable: {closed} gave no answer" in unreachable.stderr
    assert len(unreachable.stderr.splitlines()) == 1
    for symbols, url, words in ((["btcusdt"], closed, "data_download.symbols"), (GOOD, "nowhere", "rest_url")):
        finished = CliRunner().invoke(main, overlay(symbols, url))
        assert finished.exit_code == 2
        assert words in finished.stderr
    assert CliRunner().invoke(main, ["--propose"]).exit_code == 2


def test_table_fits_a_terminal_of_80_columns(overlay: Callable[..., list[str]]) -> None:
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (50, 80))
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "NO_COLOR")}
    environment["TERM"] = "xterm-256color"
    command = [sys.executable, str(ROOT / "validate_futures_symbols.py"), *overlay(BAD)]
    with subprocess.Popen(command, stdout=theirs, stderr=subprocess.PIPE, env=environment, text=True) as process:
        os.close(theirs)
        shown = _read_to_end(ours)
        assert process.stderr is not None
        errors = process.stderr.read()
    assert process.returncode == 1, shown
    assert "Traceback" not in errors
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).rsplit("\r", 1)[-1] for line in shown.split("\r\n")]
    assert max(map(len, lines)) <= 80
    table = rows("\n".join(lines))
    assert [symbol for symbol in BAD if symbol not in table] == []
    assert table["PEPEUSDT"] == ["-", "-", "-", "-", "use", "1000PEPEUSDT"]


def _read_to_end(terminal: int) -> str:
    shown = b""
    try:
        while part := os.read(terminal, 1 << 16):
            shown += part
    except OSError:  # Linux says so when the other side has closed
        pass
    finally:
        os.close(terminal)
    return shown.decode()
