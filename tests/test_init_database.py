"""`init_database.py` as a user runs it: what it prints, how it ends, and that wrong use is told in a line or two."""

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from init_database import main
from perpcast.command_line import open_database
from perpcast.config import Settings, load_settings
from perpcast.database import DatabaseAddress, embedded_server, free_port, read_row_counts, remove_server
from perpcast.errors import DatabaseUnavailableError, PerpcastError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def overlay(tmp_path: Path) -> Iterator[Path]:
    """A configuration of its own: a free port, and data in the test's folder."""
    path = tmp_path / "overlay.yaml"
    directory = tmp_path / "postgres"
    path.write_text(yaml.safe_dump({"database": {"port": free_port(), "directory": str(directory)}}))
    yield path
    remove_server(directory)


@pytest.fixture
def shared_overlay(empty_database: DatabaseAddress, tmp_path: Path) -> Path:
    """A configuration that leads to an empty database of the tests' server, as if it were the user's own."""
    path = tmp_path / "shared.yaml"
    database = {"port": empty_database.port, "name": empty_database.name, "directory": str(tmp_path / "postgres")}
    path.write_text(yaml.safe_dump({"database": database}))
    return path


@pytest.fixture
def settings(shared_overlay: Path, empty_database: DatabaseAddress, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("PERPCAST_DB_PASSWORD", str(empty_database.password))
    return load_settings([ROOT / "config.yaml", shared_overlay])


def run(overlay: Path, *arguments: str, answer: str = "", **environment: str | None) -> Result:
    command = ["--config", str(ROOT / "config.yaml"), "--config", str(overlay), *arguments]
    return CliRunner().invoke(main, command, input=answer, env={"PERPCAST_DB_PASSWORD": None, **environment})


def test_prepare_status_reset_stop(overlay: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PERPCAST_DB_PASSWORD", raising=False)
    settings = load_settings([ROOT / "config.yaml", overlay])
    before = run(overlay, "--status")
    assert before.exit_code == 0
    assert "nothing listens" in before.stdout

    for _ in range(2):
        prepared = run(overlay)
        assert prepared.exit_code == 0, prepared.stderr
        assert re.search(r"is ready, schema version \d+", prepared.stdout)
    status = run(overlay, "--status")
    assert "embedded server: port" in status.stdout
    assert re.search(r"raw_market_data +0 rows", status.stdout)

    with open_database(settings) as database, database.begin() as connection:
        connection.exec_driver_sql("INSERT INTO funding_rates VALUES ('BTCUSDT', now(), 0.0001)")
    refused = run(overlay, "--reset", answer="n\n")
    assert refused.exit_code == 1
    assert "Drop every Perpcast table" in refused.stdout
    with open_database(settings) as database:
        assert read_row_counts(database)["funding_rates"] == 1
    assert run(overlay, "--reset", answer="y\n").exit_code == 0
    with open_database(settings) as database:
        assert read_row_counts(database)["funding_rates"] == 0

    stopped = run(overlay, "--stop")
    assert (stopped.exit_code, stopped.stdout) == (0, "the embedded server has ended\n")
    assert run(overlay, "--stop").stdout == "no embedded server of this clone is running\n"
    assert embedded_server(settings.database.directory) is None
    assert run(overlay, "--reset", answer="y\n").exit_code == 2, "nothing is started only to be dropped"


def test_wrong_password_ends_with_two_lines_and_code_2(shared_overlay: Path) -> None:
    for arguments in ((), ("--status",)):
        refused = run(shared_overlay, *arguments, PERPCAST_DB_PASSWORD="canary-of-a-password")
        assert refused.exit_code == 2
        assert "refuses the password of user perpcast; set PERPCAST_DB_PASSWORD" in refused.stderr
        assert len(refused.stderr.splitlines()) <= 2
        assert "canary" not in refused.stdout + refused.stderr


def test_two_actions_at_once_are_wrong_use(overlay: Path) -> None:
    refused = run(overlay, "--stop", "--reset")
    assert refused.exit_code == 2
    assert "exclude each other" in refused.stderr


def test_port_of_another_program_ends_with_code_2(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.1)
        port = listener.getsockname()[1]
        overlay = tmp_path / "overlay.yaml"
        overlay.write_text(yaml.safe_dump({"database": {"port": port, "directory": str(tmp_path / "postgres")}}))
        refused = run(overlay)
    assert refused.exit_code == 2
    assert f"port {port} on 127.0.0.1 is taken by a program that is not PostgreSQL" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_stage_without_tables_names_the_command(settings: Settings) -> None:
    with (
        pytest.raises(DatabaseUnavailableError, match=r"holds no tables yet; run: python init_database\.py"),
        open_database(settings),
    ):
        pass
    with open_database(settings, initialize=True) as database:
        assert set(read_row_counts(database).values()) == {0}


def test_server_that_dies_in_the_middle_of_a_stage_is_a_message(settings: Settings) -> None:
    def work() -> None:
        with open_database(settings, initialize=True) as database, database.connect() as connection:
            connection.exec_driver_sql(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname IS NOT NULL"
            )

    with pytest.raises(PerpcastError, match="the connection to .* was lost; what was committed is kept"):
        work()


def test_mistake_in_our_own_sql_stays_a_traceback(settings: Settings) -> None:
    def work() -> None:
        with open_database(settings, initialize=True) as database, database.connect() as connection:
            connection.exec_driver_sql("SELECT nonsense")

    with pytest.raises(Exception, match="nonsense") as caught:
        work()
    assert not isinstance(caught.value, PerpcastError)
