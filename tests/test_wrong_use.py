"""Wrong use, as a user makes it: every script answers in a line or two on stderr and ends with exit code 2."""

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from perpcast.command_line import clean_exit
from perpcast.database import DatabaseAddress, free_port

ROOT = Path(__file__).parents[1]


@pytest.fixture
def stranger() -> Iterator[int]:
    """A port held by something that is not PostgreSQL: it hangs up on whoever calls."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener.getsockname()[1]


@pytest.fixture
def place(database: object, postgres: DatabaseAddress, tmp_path: Path) -> dict[str, dict[str, object]]:
    """Sections that lead to an empty, migrated database."""
    name = database.url.database  # type: ignore[attr-defined]
    return {"database": {"port": postgres.port, "name": name, "directory": str(tmp_path / "none")}}


def refused(script: str, overlay: dict[str, object], folder: Path, password: str, *options: str) -> str:
    """The two last lines of what a script said, after it ended with exit code 2."""
    path = folder / "overlay.yaml"
    path.write_text(yaml.safe_dump(overlay))
    command: list[str | Path] = [
        sys.executable,
        ROOT / script,
        *options,
        "--config",
        ROOT / "config.yaml",
        "--config",
        path,
    ]
    environment = {**os.environ, "PERPCAST_DB_PASSWORD": password}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=120)
    assert run.returncode == 2, run.stdout + run.stderr
    assert "Traceback" not in run.stderr
    assert 1 <= len(run.stderr.strip().splitlines()) <= 2, run.stderr
    return run.stderr


SCRIPTS = [
    ("init_database.py", ()),
    ("download_data.py", ()),
    ("prepare_dataset.py", ()),
    ("train_universal_transformer.py", ()),
    ("live_runner.py", ("--mode", "paper")),
    ("run_futures_pipeline.py", ()),
    ("run_futures_pipeline.py", ("--demo",)),
]


@pytest.mark.parametrize(("script", "options"), SCRIPTS, ids=lambda value: " ".join(value) if value else "")
def test_unknown_key_is_named_by_every_script(script: str, options: tuple[str, ...], tmp_path: Path) -> None:
    assert "unknown key fees.take" in refused(script, {"fees": {"take": 0.1}}, tmp_path, "", *options)


def test_fractions_above_one_are_added_up(tmp_path: Path) -> None:
    closes = [{"target_pct": n, "close_fraction": 0.6, "stop_pct": 0} for n in (1, 2)]
    message = refused("prepare_dataset.py", {"risk_profile": {"partial_closes": closes}}, tmp_path, "")
    assert "add up to 1.2, more than 1" in message


@pytest.mark.parametrize(("script", "options"), SCRIPTS[:-1], ids=lambda value: " ".join(value) if value else "")
def test_port_of_another_program_is_left_alone(
    script: str, options: tuple[str, ...], stranger: int, tmp_path: Path
) -> None:
    overlay: dict[str, object] = {"database": {"port": stranger, "directory": str(tmp_path / "postgres")}}
    message = refused(script, overlay, tmp_path, "", *options)
    assert f"port {stranger} on 127.0.0.1 is taken by a program that is not PostgreSQL" in message
    assert not (tmp_path / "postgres").exists()


def test_wrong_password_says_where_the_right_one_belongs(place: dict[str, object], tmp_path: Path) -> None:
    message = refused("download_data.py", place, tmp_path, "not the password")
    assert "password" in message
    assert "PERPCAST_DB_PASSWORD" in message


def test_exchange_that_nobody_answers_for_is_named(
    place: dict[str, object], postgres: DatabaseAddress, tmp_path: Path
) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    overlay = {**place, "exchange": {"rest_url": url}}
    assert url in refused("download_data.py", overlay, tmp_path, str(postgres.password))


@pytest.mark.parametrize(
    ("script", "options", "next_step"),
    [
        ("prepare_dataset.py", (), "download_data.py"),
        ("train_universal_transformer.py", (), "prepare_dataset.py"),
        ("live_runner.py", ("--mode", "paper"), "train_universal_transformer.py"),
    ],
)
def test_missing_stage_before_is_named(
    script: str,
    options: tuple[str, ...],
    next_step: str,
    place: dict[str, object],
    postgres: DatabaseAddress,
    tmp_path: Path,
) -> None:
    assert next_step in refused(script, place, tmp_path, str(postgres.password), *options)


@pytest.mark.parametrize("mode", ["demo", "testnet", "live"])
def test_modes_that_send_orders_come_later(mode: str, tmp_path: Path) -> None:
    assert "comes later" in refused("live_runner.py", {}, tmp_path, "", "--mode", mode)


def test_replay_on_a_real_exchange_is_refused(tmp_path: Path) -> None:
    assert "needs the local exchange" in refused("live_runner.py", {}, tmp_path, "", "--mode", "replay")


def test_reader_that_has_seen_enough_is_no_error() -> None:
    command = f"{sys.executable} {ROOT / 'live_runner.py'} --help | head -1"
    run = subprocess.run(command, shell=True, capture_output=True, text=True, check=True)
    assert run.stderr == ""
    with pytest.raises(SystemExit) as ended, clean_exit():
        raise FileNotFoundError(2, "No such file or directory", "gone.txt")
    assert ended.value.code == 1


def test_termination_reaches_a_command_that_ignores_ctrl_c() -> None:
    """As a script's background job does: SIGTERM still ends it, with its own exit code."""
    program = (
        "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from perpcast.command_line import clean_exit\n"
        "with clean_exit():\n    print('ready', flush=True)\n    time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        _, complaint = process.communicate(timeout=30)
    assert (process.returncode, complaint) == (143, "error: terminated; run the same command again to go on\n")
