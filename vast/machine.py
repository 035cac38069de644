"""The machine with the GPU: how it is reached, and how this folder's scripts run against it, none beyond a deadline."""

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from perpcast.errors import PerpcastError, SetupError
from vast.rental import clock

HERE = Path(__file__).resolve().parent
ALIAS = "perpcast-gpu"
USER = "root"  # of every instance
HOST_KEY_MARK = "perpcast-host-key:"
# Exit codes of the scripts; 255 is ssh's own for a connection that failed.
HOST_KEY_REFUSED, DISK_FULL, LOST, NOT_CONNECTED = 3, 4, 75, 255
# A script that ran longer than this before it lost the connection had one.
_CONNECTED_SECONDS = 60.0
_TICK_SECONDS, _PATIENCE_SECONDS = 0.1, 5.0
_SSH_OPTIONS = (
    *("-T", "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=yes", "-o", "ConnectTimeout=20"),
    *("-o", "ServerAliveInterval=15", "-o", "ServerAliveCountMax=3"),
)
# Ends the script with this process, even when it is killed: then standard input, a pipe, ends too.
_LEASH = """
trap : TERM
exec 3<&0 </dev/null
"$@" 3<&- & child=$!
(
  trap '' TERM
  cat <&3 >/dev/null 2>&1
  kill -TERM 0
  for second in 1 2 3 4 5; do sleep 1; done
  kill -KILL 0
) & watcher=$!
disown "$watcher"
exec 3<&-
while wait "$child"; code=$?; kill -0 "$child" 2>/dev/null; do :; done
kill -KILL "$watcher" 2>/dev/null
exit "$code"
"""


class MachineError(PerpcastError):
    """Something on the machine, or on the way to it, did not work."""


class HostKeyError(MachineError):
    """Who answers has not the key that the machine has: nothing more is sent there."""


class LostError(MachineError):
    """No connection to the machine for too long."""


class OutOfTimeError(MachineError):
    """The deadline has come."""


class Deadline:
    """A moment that comes by the wall clock or by a clock that nobody sets, whichever shows it first."""

    def __init__(self, at: float, why: str) -> None:
        self.at, self.why = at, why
        self._ticks = time.monotonic() + (at - time.time())

    def check(self) -> None:
        """Raises OutOfTimeError once it has come."""
        if time.time() >= self.at or time.monotonic() >= self._ticks:
            raise OutOfTimeError(f"{self.why} is used up (at {clock(self.at)}); the same command goes on from there")


@dataclass(frozen=True)
class Route:
    """How the scripts and ssh reach the machine; `config` is an ssh_config, or None for the user's own."""

    host: str
    folder: str
    config: Path | None = None
    port: int | None = None

    @classmethod
    def to_own(cls, host: str, folder: str) -> "Route":
        """From `user@host` or `user@host:port`. Raises SetupError."""
        name, separator, port = host.rpartition(":") if host.count(":") == 1 else (host, "", "")
        if separator and not (port.isdecimal() and 0 < int(port) < 65536):
            raise SetupError(f"--host {host}: expected user@host or user@host:port, the port between 1 and 65535")
        return cls(name, folder, port=int(port) if port else None)

    @property
    def options(self) -> list[str]:
        """What the scripts of this folder take, before everything else."""
        return [*self._ssh_options, "-d", self.folder]

    @property
    def ssh(self) -> list[str]:
        """An ssh command up to the remote command."""
        return ["ssh", *_SSH_OPTIONS, *self._ssh_options, self.host]

    @property
    def _ssh_options(self) -> list[str]:
        config = [] if self.config is None else ["-F", str(self.config)]
        return config if self.port is None else [*config, "-p", str(self.port)]


def make_key(folder: Path) -> str:
    """The public half of this clone's own key pair, made where there is none yet."""
    key = folder / "id_ed25519"
    if not key.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = folder / "id_ed25519.part"
        for left in (part, part.with_name(f"{part.name}.pub")):
            left.unlink(missing_ok=True)
        command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "perpcast", "-f", str(part)]
        try:
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL, capture_output=True)
        except FileNotFoundError:
            raise SetupError("no ssh-keygen on PATH: install OpenSSH's client (openssh-client)") from None
        os.replace(f"{part}.pub", f"{key}.pub")
        os.replace(part, key)  # last: where it is, both are
    return key.with_suffix(".pub").read_text(encoding="utf-8").strip()


def host_key_in(log: str) -> str | None:
    """The host key that the instance printed last, as `ssh-ed25519 AAAA…`; None until it did."""
    lines = [line.strip().removeprefix(HOST_KEY_MARK).split() for line in log.splitlines() if HOST_KEY_MARK in line]
    keys = [" ".join(words[:2]) for words in lines if len(words) >= 2 and words[0] == "ssh-ed25519"]
    return keys[-1] if keys else None


def write_ssh_config(folder: Path, label: str, host_key: str, address: tuple[str, int], remote_folder: str) -> Route:
    """Pins the key: `ssh -F folder/ssh_config perpcast-gpu` reaches the machine that has it, and nobody else."""
    host, port = address
    (folder / "known_hosts").write_text(f"{label} {host_key}\n", encoding="utf-8")
    config = folder / "ssh_config"
    config.write_text(
        f"Host {ALIAS}\n"
        f"  HostName {host}\n  Port {port}\n  User {USER}\n"
        f"  HostKeyAlias {label}\n  HostKeyAlgorithms ssh-ed25519\n"
        f"  UserKnownHostsFile {_quoted(folder / 'known_hosts')}\n  GlobalKnownHostsFile /dev/null\n"
        f"  StrictHostKeyChecking yes\n  UpdateHostKeys no\n"
        f"  IdentityFile {_quoted(folder / 'id_ed25519')}\n  IdentitiesOnly yes\n"
        f"  PasswordAuthentication no\n  ForwardAgent no\n",
        encoding="utf-8",
    )
    return Route(ALIAS, remote_folder, config)


def _quoted(path: Path) -> str:
    return f'"{str(path.resolve()).replace("%", "%%")}"'


class Child:
    """A command in a session of its own: it hears no Ctrl-C, and ends with `stop`, its block or this process.

    What it prints goes where ours goes, or nowhere (`quiet`), or its standard output to the end of a file.
    """

    def __init__(self, command: Sequence[str], *, quiet: bool = False, output: Path | None = None) -> None:
        with open(os.devnull if output is None else output, "ab") as stream:
            self._process = subprocess.Popen(
                ["bash", "-c", _LEASH, "leash", *command],
                stdin=subprocess.PIPE,
                stdout=stream if quiet or output else None,
                stderr=stream if quiet else None,
                start_new_session=True,
                close_fds=False,
            )

    def __enter__(self) -> "Child":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends the whole session, or what is left of it."""
        for which, seconds in ((signal.SIGTERM, _PATIENCE_SECONDS), (signal.SIGKILL, None)):
            if self.poll() is not None:
                break
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, which)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(seconds)
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.close()

    def poll(self) -> int | None:
        """The exit code, None while it runs."""
        return self._process.poll()

    def wait(self, deadline: "Deadline | None", meanwhile: Callable[[], None] = lambda: None) -> int:
        """Its exit code; `meanwhile` is called over and over. Raises OutOfTimeError."""
        while (code := self.poll()) is None:
            if deadline is not None:
                deadline.check()
            meanwhile()
            time.sleep(_TICK_SECONDS)
        return code


class Machine:
    """One machine, reached by a route; every call ends by the deadline, and none outlives `lost_seconds` offline."""

    def __init__(self, route: Route, deadline: Deadline | None, lost_seconds: float) -> None:
        self.route, self.deadline, self.lost_seconds = route, deadline, lost_seconds

    def script(self, name: str, *options: str) -> list[str]:
        """The command line of a script of this folder."""
        return [str(HERE / name), *self.route.options, *options]

    def run(self, name: str, *options: str, meanwhile: Callable[[], None] = lambda: None) -> int:
        """Runs a script; tries again what lost its connection. Returns its exit code.

        Raises HostKeyError, LostError, MachineError for a full disk there, OutOfTimeError.
        """
        return self._checked(self._persist(self.script(name, *options), meanwhile))

    def _checked(self, code: int) -> int:
        if code == HOST_KEY_REFUSED:
            raise HostKeyError(
                f"{self.route.host} does not show the host key that was pinned: somebody else may answer in its place. "
                "Nothing was sent"
            )
        if code == DISK_FULL:
            raise MachineError(f"the disk of {self.route.host} is full: raise disk_gb in the configuration")
        if code in (LOST, NOT_CONNECTED):
            raise LostError(
                f"no connection to {self.route.host} for {self.lost_seconds / 60:g} minutes: run the same command again"
            )
        return code

    def ssh(self, command: str) -> int:
        """Runs a shell command there, in its folder; its exit code. Raises as `run`."""
        whole = f"cd {shlex.quote(self.route.folder)} && {command}"
        return self._checked(self._persist([*self.route.ssh, whole], on_lost=self.check_host))

    def send_secret(self, text: str, path: str) -> None:
        """Writes a file there that nobody else may read; the text goes over standard input alone."""
        command = f"umask 077 && cd {shlex.quote(self.route.folder)} && cat >{path}.part && mv {path}.part {path}"
        sent = subprocess.run([*self.route.ssh, command], input=text, text=True, capture_output=True, check=False)
        if sent.returncode:
            raise MachineError(f"{path} could not be written on {self.route.host}: {sent.stderr.strip()[-300:]}")

    def check_host(self) -> bool:
        """True where the machine answers and lets us in. Raises HostKeyError."""
        tried = subprocess.run(
            [*self.route.ssh, "true"], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        if "Host key verification failed" in tried.stderr:
            raise HostKeyError(
                f"{self.route.host} shows another host key than the one pinned, or none is known: somebody else may "
                f"answer in its place; nothing was sent. Compare the keys; a first `ssh {self.route.host}` accepts one"
            )
        return tried.returncode == 0

    def _persist(
        self,
        command: Sequence[str],
        meanwhile: Callable[[], None] = lambda: None,
        on_lost: Callable[[], object] = lambda: None,
    ) -> int:
        """The exit code; a lost connection is tried again until there was none for `lost_seconds`."""
        lost_at, pause = None, 1.0
        while True:
            begun = time.monotonic()
            with Child(command) as child:
                code = child.wait(self.deadline, meanwhile)
            now = time.monotonic()
            if code != NOT_CONNECTED:
                return code
            on_lost()
            if lost_at is None or now - begun > _CONNECTED_SECONDS:
                lost_at, pause = now, 1.0
            if now + pause - lost_at > self.lost_seconds:
                return code
            time.sleep(pause)
            pause = min(2 * pause, 30.0)
