"""live_runner.py as its users run it: a process, against the local exchange and a real PostgreSQL."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from live_runner import main
from perpcast.config import load_settings
from perpcast.database import (
    Database,
    DatabaseAddress,
    migrate,
    open_engine,
    read_equity,
    read_events,
    read_positions,
    read_signals,
)
from perpcast.evaluation.certificate import DATASET_CHECKS, Check
from perpcast.exit_policy import ExitPolicy, label_trades
from perpcast.features.inputs import OBSERVED, compute_inputs
from perpcast.market import SIDES
from perpcast.simulator.clock import RunningClock
from perpcast.simulator.server import serve_in_thread
from perpcast.simulator.synthetic import SyntheticMarket
from perpcast.timeframe import parse_time, to_ms
from tests.live_bundle import FINGERPRINT, certificate, make_model

ROOT = Path(__file__).parents[1]
STEP_MS = 900_000
NOW_MS = to_ms(parse_time("2023-02-01T00:00Z"))
BARS = 60
SYMBOLS = ("BTCUSDT", "ETHUSDT", "SOLUSDT")
MARKET = SyntheticMarket(7, 0.1, NOW_MS + 200 * STEP_MS)


@dataclass
class Shop:
    """A database with a model, and what a runner needs to know of it."""

    address: DatabaseAddress
    engine: Database
    folder: Path

    def configuration(self, rest_url: str, ws_url: str, **more: Any) -> list[str]:
        database = {"port": self.address.port, "name": self.address.name, "user": self.address.user}
        overlay = {
            "database": database,
            "exchange": {"environment": "local", "rest_url": rest_url, "ws_url": ws_url},
            "data_download": {"symbols": list(SYMBOLS)},
            **more,
        }
        path = self.folder / "overlay.yaml"
        path.write_text(yaml.safe_dump(overlay))
        return ["--config", str(ROOT / "config.yaml"), "--config", str(path)]

    def start(self, arguments: list[str]) -> subprocess.Popen[str]:
        environment = {**os.environ, "PERPCAST_DB_PASSWORD": self.address.password or ""}
        command = [sys.executable, str(ROOT / "live_runner.py"), *arguments]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=self.folder
        )

    def run(self, arguments: list[str]) -> tuple[int, str, str]:
        """In this process, which saves the start."""
        result = CliRunner().invoke(main, arguments, env={"PERPCAST_DB_PASSWORD": self.address.password or ""})
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stdout, result.stderr

    def tables(self, run: str) -> tuple[Any, ...]:
        """All rows of a run, its name taken out."""
        readers = (read_signals, read_positions, read_equity, read_events)
        return tuple(repr(read(self.engine, run)).replace(run, "RUN") for read in readers)


@contextmanager
def exchange(speed: float = 36_000.0) -> Iterator[tuple[str, str]]:
    """URLs of a local exchange that stands at NOW until the runner subscribes."""
    with serve_in_thread(MARKET, RunningClock(NOW_MS, speed, time.monotonic)) as address:
        yield address.rest_url, address.ws_url


@pytest.fixture
def shop(empty_database: DatabaseAddress, tmp_path: Path) -> Iterator[Shop]:
    engine = open_engine(empty_database)
    migrate(engine)
    yield Shop(empty_database, engine, tmp_path)
    engine.dispose()


def policies() -> dict[Any, ExitPolicy]:
    settings = load_settings([ROOT / "config.yaml"])
    return {side: ExitPolicy.from_config(settings.risk_profile, settings.fees, side) for side in SIDES}


def test_replay_trades_every_bar_and_resumes_after_kill_9(shop: Shop) -> None:
    make_model(shop.engine, shop.folder, SYMBOLS, policies())
    with exchange() as urls:
        code, out, err = shop.run([*shop.configuration(*urls), "--mode", "replay", "--bars", str(BARS)])
    assert (code, err) == (0, "")
    whole = "replay-local-momentum-1"
    assert whole in out
    assert re.search(r"trades closed +│ +\d+", out)
    equity = read_equity(shop.engine, whole)
    assert [to_ms(record.time) for record in equity] == [NOW_MS + bar * STEP_MS for bar in range(BARS)]
    signals = read_signals(shop.engine, whole)
    assert len(signals) == BARS * len(SYMBOLS) * 2
    positions = read_positions(shop.engine, whole)
    assert len(positions) > 3
    check_scores(signals)
    check_labels(positions)

    # The second session over the same bars is killed; a third command goes on with it.
    with exchange(speed=9_000.0) as urls:
        process = shop.start([*shop.configuration(*urls), "--mode", "replay", "--bars", str(BARS)])
        deadline = time.monotonic() + 40
        while len(read_equity(shop.engine, "replay-local-momentum-2")) < BARS // 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    done = len(read_equity(shop.engine, "replay-local-momentum-2"))
    assert BARS // 3 <= done < BARS
    with exchange() as urls:
        code, out, err = shop.run([*shop.configuration(*urls), "--mode", "replay", "--bars", str(BARS)])
    assert (code, err) == (0, "")
    assert "replay-local-momentum-2 goes on" in out
    assert shop.tables("replay-local-momentum-2") == shop.tables(whole)


def check_scores(signals: list[Any]) -> None:
    """Every score is the model's answer to inputs computed from all of history, by the batch code."""
    for symbol in SYMBOLS:
        series = MARKET.candles(symbol)
        end = int(np.searchsorted(series.open_time_ms, NOW_MS + BARS * STEP_MS))
        batch = series[end - 3000 : end]
        change = compute_inputs(batch.frame())[-BARS:, OBSERVED.index("price_change_4")]
        scores = [record.score for record in signals if record.symbol == symbol and record.side == "buy"]
        np.testing.assert_allclose(scores, 0.3 * change, rtol=1e-5, atol=1e-9)


def check_labels(positions: list[Any]) -> None:
    for position in (p for p in positions if p.exit_time is not None):
        series = MARKET.candles(position.symbol)
        rows = slice(int(np.searchsorted(series.open_time_ms, NOW_MS - STEP_MS)), None)
        bars = series[rows]
        policy = policies()[position.side]
        label = label_trades(bars.open, bars.high, bars.low, bars.close, position.side, policy)
        signal_row = int(np.searchsorted(bars.open_time_ms, to_ms(position.entry_time))) - 1
        assert position.realized_return == pytest.approx(label.expected_return[signal_row], abs=1e-12)


def test_paper_mode_on_the_local_exchange(shop: Shop) -> None:
    make_model(shop.engine, shop.folder, SYMBOLS, policies())
    with exchange() as urls:
        code, out, err = shop.run([*shop.configuration(*urls), "--mode", "paper", "--bars", "5"])
    assert (code, err) == (0, "")
    assert "paper-local-momentum-1 begins" in out
    assert len(read_equity(shop.engine, "paper-local-momentum-1")) == 5


def test_wrong_use_is_told_in_a_line(shop: Shop) -> None:
    """Each case: what stands in the configuration, options, words of the answer; exit code 2 and no traceback."""
    with exchange() as (rest_url, ws_url):
        plain = shop.configuration(rest_url, ws_url)

        def answer(arguments: list[str]) -> str:
            code, _, err = shop.run(arguments)
            assert code == 2, err
            assert len(err.splitlines()) <= 2, err
            return err

        assert "no model trained yet" in answer([*plain, "--mode", "replay"])
        make_model(shop.engine, shop.folder, SYMBOLS, policies())
        assert "no model other" in answer([*plain, "--mode", "replay", "--model", "other"])
        assert "comes later" in answer([*plain, "--mode", "live"])
        mainnet = shop.configuration(rest_url, ws_url, exchange={"environment": "mainnet"})
        assert "--mode replay needs the local exchange" in answer([*mainnet, "--mode", "replay"])
        other = shop.configuration(rest_url, ws_url, fees={"taker": 0.001})
        assert "another buy trade" in answer([*other, "--mode", "replay"])
        dead = shop.configuration("http://127.0.0.1:9", "ws://127.0.0.1:9")
        assert "exchange unreachable" in answer([*dead, "--mode", "replay"])


@pytest.mark.parametrize("case", ["none", "of another dataset", "failed", "of the dataset alone"])
def test_a_model_without_its_passing_certificate_is_not_traded(shop: Shop, case: str) -> None:
    own = certificate()
    leak = Check("threshold", False, "chosen again on V2 it is +1 %")
    cards: dict[str, dict[str, Any]] = {
        "none": {},
        "of another dataset": {"leak_certificate": replace(own, fingerprint="0" * 64).to_json()},
        "failed": {"leak_certificate": replace(own, checks=(*own.checks[:-1], leak)).to_json()},
        "of the dataset alone": {"leak_certificate": replace(own, checks=own.checks[: len(DATASET_CHECKS)]).to_json()},
    }
    said = {
        "none": "has no leak certificate",
        "of another dataset": "has another leak certificate than its own",
        "failed": "is not certified (threshold: chosen again on V2 it is +1 %)",
        "of the dataset alone": "calibration: was not checked",
    }
    card = {"dataset": {"fingerprint": FINGERPRINT}, **cards[case]}
    make_model(shop.engine, shop.folder, SYMBOLS, policies(), card=card)
    # Refused before anything is asked of an exchange: nothing listens there.
    configuration = shop.configuration("http://127.0.0.1:9", "ws://127.0.0.1:9")
    code, _, err = shop.run([*configuration, "--mode", "paper"])
    assert code == 2
    assert said[case] in " ".join(err.split())
    assert "run train_universal_transformer.py --force" in err


def test_a_symbol_that_the_exchange_does_not_list_is_refused(shop: Shop) -> None:
    symbols = (*SYMBOLS, "NOSUCHUSDT")
    make_model(shop.engine, shop.folder, symbols, policies())
    with exchange() as urls:
        configuration = shop.configuration(*urls, data_download={"symbols": list(symbols)})
        code, _, err = shop.run([*configuration, "--mode", "replay"])
    assert code == 2
    assert "NOSUCHUSDT" in err
