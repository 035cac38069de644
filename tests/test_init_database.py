"""`init_database.py` as a user runs it: what it prints, how it ends, and that wrong use is told in a line or two."""

import re
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result
from dotenv import dotenv_values

from init_database import ADMIN_EMAIL, GENERATED, main
from perpcast.command_line import open_database
from perpcast.config import Settings, load_settings
from perpcast.database import (
    DatabaseAddress,
    embedded_server,
    free_port,
    open_engine,
    read_row_counts,
    remove_server,
)
from perpcast.database.bi import BI_ROLE, METABASE
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


def test_metabase_gets_its_database_roles_and_secrets_once(overlay: Path, tmp_path: Path) -> None:
    """The configuration lies in a folder of its own, and so do the secrets."""
    settings = load_settings([write_whole(overlay, tmp_path)])
    path = tmp_path / "metabase" / ".env"
    first = run_in(tmp_path, "--metabase")
    assert (first.exit_code, first.stderr) == (0, "")
    assert "next: docker compose up -d (in the folder metabase), then: python -m metabase provision" in first.stdout
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    made = dotenv_values(path)
    assert made.keys() == {"METABASE_DB_HOST", "METABASE_DB_PORT", "METABASE_ADMIN_EMAIL", *GENERATED}
    assert (made["METABASE_DB_PORT"], made["METABASE_ADMIN_EMAIL"]) == (str(settings.database.port), ADMIN_EMAIL)
    assert len({made[name] for name in GENERATED}) == len(GENERATED)
    for name in GENERATED:
        assert re.fullmatch(r"(?=.*\d)[0-9a-f]{32}", made[name] or ""), (
            "docker compose reads $ and quotes in its own way"
        )
        assert (made[name] or "") not in first.stdout
    may_log_in(settings, BI_ROLE, settings.database.name, made["PERPCAST_BI_PASSWORD"])
    may_log_in(settings, METABASE, METABASE, made["METABASE_DB_PASSWORD"])

    # A second time nothing changes; a line of the user's own stays, one that he took out comes back.
    lines = path.read_text().splitlines()
    kept = [line for line in lines if not line.startswith("METABASE_DB_PASSWORD")]
    path.write_text("\n".join([*kept, "# mine", "METABASE_IMAGE_TAG=v0.64.1.5"]))
    again = run_in(tmp_path, "--metabase")
    assert again.exit_code == 0
    after = dotenv_values(path)
    changed = {key for key in after if after[key] != made.get(key)}
    assert changed == {"METABASE_DB_PASSWORD", "METABASE_IMAGE_TAG"}
    assert "# mine" in path.read_text()
    may_log_in(settings, METABASE, METABASE, after["METABASE_DB_PASSWORD"])


def test_role_of_the_dashboards_is_made_where_its_password_is_given(overlay: Path, tmp_path: Path) -> None:
    settings = load_settings([write_whole(overlay, tmp_path)])
    assert run_in(tmp_path).exit_code == 0
    with open_database(settings) as database, database.connect() as connection:
        known = connection.exec_driver_sql(f"SELECT count(*) FROM pg_roles WHERE rolname = '{BI_ROLE}'").scalar_one()
    assert known == 0
    for password in ("given2024", "other2024"):
        (tmp_path / ".env").write_text(f"PERPCAST_BI_PASSWORD={password}\n")
        assert run_in(tmp_path).exit_code == 0
        may_log_in(settings, BI_ROLE, settings.database.name, password)
    assert not (tmp_path / "metabase").exists()


def write_whole(overlay: Path, folder: Path) -> Path:
    """A configuration in one file, whose folder is then that of `.env` and of all that is written."""
    values = yaml.safe_load((ROOT / "config.yaml").read_text())
    values["database"].update(yaml.safe_load(overlay.read_text())["database"])
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run_in(folder: Path, *arguments: str) -> Result:
    names = ("PERPCAST_DB_PASSWORD", *GENERATED)
    command = ["--config", str(folder / "config.yaml"), *arguments]
    return CliRunner().invoke(main, command, env=dict.fromkeys(names))


def may_log_in(settings: Settings, user: str, name: str, password: str | None) -> None:
    database = settings.database
    open_engine(DatabaseAddress(database.host, database.port, name, user, password)).dispose()


def test_wrong_password_ends_with_two_lines_and_code_2(shared_overlay: Path) -> None:
    for arguments in ((), ("--status",)):
        refused = run(shared_overlay, *arguments, PERPCAST_DB_PASSWORD="canary-of-a-password")
        assert refused.exit_code == 2
        assert "refuses the password of user perpcast; set PERPCAST_DB_PASSWORD" in refused.stderr
        assert len(refused.stderr.splitlines()) <= 2
        assert "canary" not in refused.stdout + refused.stderr


def test_two_actions_at_once_are_wrong_use(overlay: Path) -> None:
    for actions in (("--stop", "--reset"), ("--metabase", "--status")):
        refused = run(overlay, *actions)
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
