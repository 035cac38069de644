"""The embedded server: found, started once, stopped, and started again after whatever killed it."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from perpcast.database import (
    DatabaseAddress,
    embedded_server,
    ensure_server,
    find_listener,
    free_port,
    open_engine,
    remove_server,
    stop_server,
)
from perpcast.database import server as server_module
from perpcast.errors import DatabaseUnavailableError

ROOT = Path(__file__).parents[1]


def new_address() -> DatabaseAddress:
    return DatabaseAddress("127.0.0.1", free_port(), "perpcast", "perpcast")


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "postgres"
    remove_server(tmp_path / "postgres")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder whose server the tests stop, kill and start again: each makes sure that it runs, and on which port."""
    directory = tmp_path_factory.mktemp("home") / "postgres"
    yield directory
    remove_server(directory)


@pytest.fixture
def address(home: Path) -> DatabaseAddress:
    running = embedded_server(home)
    wanted = new_address()
    return ensure_server(replace(wanted, port=running.port) if running else wanted, home)


def execute(address: DatabaseAddress, *statements: str) -> object:
    """The first value of the last statement's answer."""
    engine = open_engine(address)
    try:
        with engine.begin() as connection:
            for statement in statements:
                result = connection.execute(text(statement))
            return result.scalar() if result.returns_rows else None
    finally:
        engine.dispose()


def test_start_stop_and_start_keeps_the_data(home: Path) -> None:
    wanted = new_address()
    assert embedded_server(home) is None
    address = ensure_server(wanted, home)
    server = embedded_server(home)
    assert server is not None
    assert server.port == wanted.port
    assert find_listener(address.host, address.port) == "postgres"
    execute(address, "CREATE TABLE kept (n int)", "INSERT INTO kept SELECT generate_series(1, 10000)")

    assert ensure_server(wanted, home) == address
    assert embedded_server(home) == server, "a second command finds the first one's server"

    assert stop_server(home)
    assert not stop_server(home)
    assert embedded_server(home) is None
    assert find_listener(address.host, address.port) == "nothing"
    assert execute(ensure_server(wanted, home), "SELECT count(*) FROM kept") == 10_000


def test_settings_are_the_safe_ones(postgres: DatabaseAddress) -> None:
    for name, value in {
        "fsync": "on",
        "synchronous_commit": "on",
        "full_page_writes": "on",
        "data_checksums": "on",
        "TimeZone": "UTC",
        "listen_addresses": "127.0.0.1",
        "unix_socket_directories": "",
        "password_encryption": "scram-sha-256",
    }.items():
        assert execute(postgres, f"SHOW {name}") == value, name


def test_generated_password_lies_in_a_file_for_us_alone_and_is_never_shown(
    home: Path, address: DatabaseAddress
) -> None:
    server = embedded_server(home)
    assert server is not None
    file = server.data.with_name(server.data.name + ".password")
    assert file.stat().st_mode & 0o777 == 0o600
    assert file.read_text() == address.password
    assert address.password is not None
    assert address.password not in f"{address} {address!r} {open_engine(address).url}"


def test_wrong_password_is_refused_with_the_way_out(postgres: DatabaseAddress) -> None:
    with pytest.raises(DatabaseUnavailableError, match="refuses the password of user perpcast; set PERPCAST_DB_PASS"):
        open_engine(replace(postgres, password="wrong"))
    with pytest.raises(DatabaseUnavailableError, match="refuses the password"):
        open_engine(replace(postgres, password=None))


def test_given_password_is_used_and_not_written(directory: Path) -> None:
    address = ensure_server(replace(new_address(), password="of the user's choice ' \\ ü"), directory)
    assert execute(address, "SELECT 1") == 1
    server = embedded_server(directory)
    assert server is not None
    assert not server.data.with_name(server.data.name + ".password").exists()
    with pytest.raises(DatabaseUnavailableError, match="refuses the password"):
        open_engine(ensure_server(replace(address, password=None), directory))


def test_missing_database_names_the_command(postgres: DatabaseAddress) -> None:
    with pytest.raises(DatabaseUnavailableError, match=r"no such database yet; run: python init_database\.py"):
        open_engine(replace(postgres, name="nowhere"))


@pytest.mark.parametrize("greeting", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n", None], ids=["closes", "http", "silent"])
def test_port_of_another_program_is_refused(directory: Path, greeting: bytes | None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        open_connections = []

        def answer() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                if greeting is None:
                    open_connections.append(connection)
                    continue
                with connection:
                    connection.sendall(greeting)

        threading.Thread(target=answer, daemon=True).start()
        address = replace(new_address(), port=listener.getsockname()[1])
        with pytest.raises(DatabaseUnavailableError, match="taken by a program that is not PostgreSQL"):
            ensure_server(address, directory)
        listener.shutdown(socket.SHUT_RDWR)
        for connection in open_connections:
            connection.close()
    assert not directory.exists()


def test_remote_host_without_a_server_starts_nothing(directory: Path) -> None:
    with pytest.raises(DatabaseUnavailableError, match="no PostgreSQL answers at nowhere.invalid:5555"):
        ensure_server(DatabaseAddress("nowhere.invalid", 5555, "perpcast", "perpcast"), directory)
    assert not directory.parent.joinpath("postgres.lock").exists()


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGQUIT], ids=["kill -9", "immediate"])
def test_killed_server_starts_again_with_what_was_committed(
    home: Path, address: DatabaseAddress, stop: signal.Signals
) -> None:
    execute(
        address,
        "DROP TABLE IF EXISTS kept",
        "CREATE TABLE kept (n int)",
        "INSERT INTO kept SELECT generate_series(1, 10000)",
    )
    server = embedded_server(home)
    assert server is not None
    os.kill(server.pid, stop)
    deadline = time.monotonic() + 20
    while embedded_server(home) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert execute(ensure_server(address, home), "SELECT count(*) FROM kept") == 10_000
    again = embedded_server(home)
    assert again is not None
    assert again.pid != server.pid


def test_lock_file_of_a_process_that_is_not_the_server_does_not_block(home: Path, address: DatabaseAddress) -> None:
    """After a reboot the number in `postmaster.pid` may belong to anybody; PostgreSQL alone would refuse for ever."""
    server = embedded_server(home)
    assert server is not None
    lines = (server.data / "postmaster.pid").read_text().splitlines()
    owner = server.data.stat()
    stop_server(home)
    other = subprocess.Popen(["sleep", "60"], cwd="/", user=owner.st_uid if os.geteuid() == 0 else None)
    try:
        pid_file = server.data / "postmaster.pid"
        pid_file.write_text("\n".join([str(other.pid), *lines[1:]]) + "\n")
        os.chown(pid_file, owner.st_uid, owner.st_gid)
        assert embedded_server(home) is None
        assert execute(ensure_server(address, home), "SELECT 1") == 1
    finally:
        other.kill()
        other.wait()


def test_server_on_another_port_is_named(home: Path, address: DatabaseAddress) -> None:
    with pytest.raises(DatabaseUnavailableError, match=rf"runs on port {address.port}, expected .* --stop"):
        ensure_server(new_address(), home)


def test_data_of_another_postgresql_are_refused(home: Path, address: DatabaseAddress) -> None:
    server = embedded_server(home)
    assert server is not None
    stop_server(home)
    version = server.data / "PG_VERSION"
    ours = version.read_text()
    try:
        version.write_text("15\n")
        with pytest.raises(DatabaseUnavailableError, match="made by PostgreSQL 15, the embedded server is 18"):
            ensure_server(address, home)
    finally:
        version.write_text(ours)


START = """
import sys
from pathlib import Path
from typing import Any
from perpcast.database import DatabaseAddress, embedded_server, ensure_server, open_engine
address = ensure_server(DatabaseAddress("127.0.0.1", int(sys.argv[2]), "perpcast", "perpcast"), Path(sys.argv[1]))
open_engine(address).dispose()
print(embedded_server(Path(sys.argv[1])).pid)
"""


def start_elsewhere(
    directory: Path, port: int, python: str = sys.executable, path: str = str(ROOT), **options: Any
) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [python, "-c", START, str(directory), str(port)],
        env={
            "PYTHONPATH": path,
            "PATH": os.defpath,
            "NUMBA_CACHE_DIR": str(directory.parent),
            "PYTHONDONTWRITEBYTECODE": "1",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def test_two_commands_that_start_it_at_the_same_time_share_one_server(directory: Path) -> None:
    port = free_port()
    processes = [start_elsewhere(directory, port) for _ in range(2)]
    answers = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0] * 2, answers
    assert len({output for output, _ in answers}) == 1


def test_start_killed_in_the_middle_leaves_nothing_in_the_way(directory: Path) -> None:
    process = start_elsewhere(directory, port := free_port())
    while process.poll() is None and not directory.parent.joinpath("postgres.lock").exists():
        time.sleep(0.01)
    time.sleep(0.2)  # initdb is at work
    process.kill()
    process.communicate()
    # What the dead command had started ends by itself or is the server: either way the next start succeeds.
    running = embedded_server(directory)
    wanted = DatabaseAddress("127.0.0.1", running.port if running else port, "perpcast", "perpcast")
    assert execute(ensure_server(wanted, directory), "SELECT 1") == 1


def test_folder_with_foreign_files_is_left_alone(directory: Path) -> None:
    directory.mkdir()
    directory.joinpath("letter.txt").write_text("mine")
    if os.geteuid() == 0:
        pytest.skip("as root below a 0700 folder the data lie elsewhere")
    with pytest.raises(DatabaseUnavailableError, match="holds files, but no PostgreSQL data"):
        ensure_server(new_address(), directory)
    assert directory.joinpath("letter.txt").read_text() == "mine"


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")


@needs_root
def test_as_root_below_a_closed_folder_nothing_is_opened(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = directory.parent
    closed.chmod(0o700)
    before = [folder.stat().st_mode for folder in directory.parents]
    monkeypatch.setattr(server_module, "_can_run", lambda user, program: "binaries-" in str(program))
    address = ensure_server(new_address(), directory)
    server = embedded_server(directory)
    assert server is not None
    assert server.data.parent == server_module.OUTSIDE
    program = os.readlink(f"/proc/{server.pid}/exe")
    assert program.startswith(f"{server_module.OUTSIDE}/binaries-"), "the wheel's programs were copied"
    assert os.stat(f"/proc/{server.pid}").st_uid == server.data.stat().st_uid != 0
    assert execute(address, "SELECT 1") == 1
    assert [folder.stat().st_mode for folder in directory.parents] == before
    remove_server(directory)
    assert not server.data.exists()


@needs_root
def test_as_root_below_an_open_folder_the_data_lie_there() -> None:
    folder = Path(f"/tmp/perpcast-test-{os.getpid()}")
    folder.mkdir(mode=0o755)
    folder.chmod(0o755)
    try:
        ensure_server(new_address(), folder / "postgres")
        server = embedded_server(folder / "postgres")
        assert server is not None
        assert server.data == folder / "postgres"
        assert server.data.stat().st_uid == pwd.getpwnam(pwd.getpwuid(server.data.stat().st_uid).pw_name).pw_uid != 0
    finally:
        remove_server(folder / "postgres")
        shutil.rmtree(folder)


def python_of(user: dict[str, Any], cache: Path) -> tuple[str, str] | None:
    """An interpreter that the user can run, and the PYTHONPATH with which it finds our packages."""
    packages = sysconfig.get_paths()["purelib"]
    system = f"/usr/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    for python, path in ((sys.executable, str(ROOT)), (system, f"{ROOT}:{packages}")):
        check = "import perpcast.database"
        environment = {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "NUMBA_CACHE_DIR": str(cache)}
        try:
            run = subprocess.run([python, "-c", check], env=environment, capture_output=True, check=False, **user)
        except OSError:
            continue
        if run.returncode == 0:
            return python, path
    return None


@needs_root
def test_as_an_ordinary_user() -> None:
    nobody = pwd.getpwnam("nobody")
    user: dict[str, Any] = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": [], "cwd": "/"}
    folder = Path(f"/tmp/perpcast-test-{os.getpid()}")
    folder.mkdir()
    os.chown(folder, nobody.pw_uid, nobody.pw_gid)
    folder.chmod(0o700)
    try:
        found = python_of(user, folder)
        if found is None:
            pytest.skip("user nobody can reach no interpreter with our packages")
        process = start_elsewhere(folder / "postgres", free_port(), *found, **user)
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        assert os.stat(f"/proc/{int(output)}").st_uid == nobody.pw_uid
        assert (folder / "postgres").stat().st_uid == nobody.pw_uid
    finally:
        remove_server(folder / "postgres")
        shutil.rmtree(folder)
