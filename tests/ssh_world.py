"""A machine to reach over SSH: a real sshd on a loopback port, with keys, a disk folder and programs of its own."""

import getpass
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from perpcast.database import free_port

ALIAS = "perpcast-gpu"
WAIT_SECONDS = 20
_MARK = "PERPCAST_TEST_MACHINE"  # in the environment of whatever runs "there", also of what outlives its session

# As on a real machine a session begins at home; HOME is the machine's own.
_SESSION = (
    'cd "$HOME" && if [ -n "$SSH_ORIGINAL_COMMAND" ]; then exec bash -c "$SSH_ORIGINAL_COMMAND"; fi; exec bash -i'
)
_NO_APT = '#!/bin/sh\necho "apt-get $*" >>"$(dirname "$0")/../apt.log"\nexit 100\n'


def sshd_path() -> str | None:
    """Where the server lies; it must be started by its absolute path."""
    return shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")


def missing() -> str:
    """Why there can be no machine, and how to get one; empty where there can."""
    lacking = [name for name in ("ssh", "ssh-keygen", "rsync") if not shutil.which(name)]
    if not sshd_path():
        lacking.append("sshd")
    elif os.geteuid() == 0 and sys.platform == "linux":
        os.makedirs("/run/sshd", mode=0o755, exist_ok=True)  # a server started by root insists on it
    if not lacking:
        return ""
    return f"no {', '.join(lacking)} on this machine: apt-get install openssh-server rsync (macOS brings them)"


class SshMachine:
    """A machine of the tests. `SshMachine(folder)` on a folder that holds one is that machine again, in any process.

    `folder` stands for its disk: `home` is HOME there, `ssh_keys` stands for /etc/ssh, `bin` is first on PATH (and has
    an apt-get that only writes down what it was asked, in apt.log). `config` is an ssh_config in which the alias
    `perpcast-gpu` is this machine with the key pinned that it had when it was made. `environment` is added to what
    every session sees.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self.folder = folder.resolve()
        self.home, self.bin, self.ssh_keys = self.folder / "root", self.folder / "bin", self.folder / "etc" / "ssh"
        self.client_key = self.folder / "client_key"
        self.authorized_keys = self.folder / "authorized_keys"
        self.known_hosts = self.folder / "known_hosts"
        self.config = self.folder / "ssh_config"
        self.log = self.folder / "sshd.log"
        self._pid_file, self._port_file = self.folder / "sshd.pid", self.folder / "port"
        self._server_config = self.folder / "sshd_config"
        if not self._port_file.exists():
            self._make(environment or {})
        self.port = int(self._port_file.read_text())

    def _make(self, environment: Mapping[str, str]) -> None:
        for one in (self.home, self.bin, self.ssh_keys):
            one.mkdir(parents=True)
        (self.bin / "apt-get").write_text(_NO_APT)
        (self.bin / "apt-get").chmod(0o755)
        _make_key(self.ssh_keys / "ssh_host_ed25519_key")
        _make_key(self.client_key)
        self.authorized_keys.write_text(self.client_key.with_suffix(".pub").read_text())
        self.authorized_keys.chmod(0o600)
        port = free_port()
        self.known_hosts.write_text(f"{ALIAS} {self.host_key_line}\n[127.0.0.1]:{port} {self.host_key_line}\n")
        self.config.write_text(_client_config(self, port))
        seen = {"HOME": str(self.home), "PATH": f"{self.bin}:{os.environ['PATH']}", **environment}
        self._write_server_config(port, {**seen, _MARK: str(self.folder)})
        self._port_file.write_text(f"{port}\n")

    def _write_server_config(self, port: int, environment: Mapping[str, str]) -> None:
        lines = [
            f"Port {port}",
            "ListenAddress 127.0.0.1",
            f"HostKey {self.ssh_keys}/ssh_host_ed25519_key",
            f"PidFile {self._pid_file}",
            f"AuthorizedKeysFile {self.authorized_keys}",
            "PasswordAuthentication no",
            "KbdInteractiveAuthentication no",
            "PermitRootLogin prohibit-password",
            "UsePAM no",
            "StrictModes no",  # temporary folders are anybody's to write
            "PrintMotd no",
            "AllowTcpForwarding yes",
            "GatewayPorts no",
            "MaxStartups 100",
            "SetEnv " + " ".join(f'"{name}={value}"' for name, value in environment.items()),
            f"ForceCommand {_SESSION}",
        ]
        self._server_config.write_text("\n".join(["PerSourcePenalties no", *lines]) + "\n")
        if self._sshd("-t").returncode:  # an option of newer servers, which would shut out the tests that are refused
            self._server_config.write_text("\n".join(lines) + "\n")

    def _sshd(self, *options: str) -> subprocess.CompletedProcess[str]:
        command = [str(sshd_path()), "-f", str(self._server_config), *options]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    @property
    def host_key_line(self) -> str:
        """The key that the machine shows now: `ssh-ed25519 AAAA…`, without its comment."""
        return " ".join((self.ssh_keys / "ssh_host_ed25519_key.pub").read_text().split()[:2])

    @property
    def environment(self) -> dict[str, str]:
        """For a program that a test starts "there" without SSH, such as what runs when the machine comes up."""
        path = f"{self.bin}:{os.environ['PATH']}"
        return {**os.environ, "HOME": str(self.home), "PATH": path, _MARK: str(self.folder)}

    def start(self) -> None:
        """Listens; also again after `stop`, on the same port."""
        self._pid_file.unlink(missing_ok=True)
        started = self._sshd("-E", str(self.log))
        assert started.returncode == 0, started.stderr + self.log.read_text()
        _wait_for(self._pid_file.exists)

    def stop(self) -> None:
        """The network is gone: nothing listens, every connection is dead. Programs there run on."""
        _kill(signal.SIGKILL, self._servers())
        self._pid_file.unlink(missing_ok=True)

    def power_off(self) -> None:
        """Everything that runs there is dead at once."""
        self.stop()
        _wait_for(lambda: not _kill(signal.SIGKILL, self.processes()))

    def freeze(self) -> None:
        """Nobody answers any more, on old connections or new ones, but none is closed. Programs there run on."""
        _kill(signal.SIGSTOP, self._servers())

    def thaw(self) -> None:
        """Ends `freeze`."""
        _kill(signal.SIGCONT, self._servers())

    def drop_connections(self) -> int:
        """Kills what serves the open connections, new ones are welcome; how many there were."""
        return len(_kill(signal.SIGKILL, self._servers()[1:]))

    def change_host_key(self) -> None:
        """Another key from now on, as of another machine behind the same address. Open connections stay."""
        key = self.ssh_keys / "ssh_host_ed25519_key"
        key.unlink()
        key.with_suffix(".pub").unlink()
        _make_key(key)
        if self._pid_file.exists():
            pid = int(self._pid_file.read_text())
            self._pid_file.unlink()
            os.kill(pid, signal.SIGHUP)
            _wait_for(self._pid_file.exists)

    def processes(self) -> dict[int, str]:
        """What runs there, the server's own processes not counted: number and command line."""
        with_environment = ["-axEww"] if sys.platform == "darwin" else ["axeww"]
        named = _ps(*with_environment, "-o", "pid=,command=")
        mine = {int(pid) for pid, rest in named if f"{_MARK}={self.folder}" in rest.split(" ")}
        return {int(pid): command for pid, command in _ps("-axww", "-o", "pid=,command=") if int(pid) in mine}

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        """Runs a command there, as any user of `config` would."""
        ssh = ["ssh", "-F", str(self.config), "-T", ALIAS, command]
        return subprocess.run(ssh, capture_output=True, text=True, check=False, timeout=60)

    def _servers(self) -> list[int]:
        """The server, then one process or two for each open connection."""
        try:
            found = [int(self._pid_file.read_text())]
        except FileNotFoundError:
            return []
        children = []
        for pid, rest in _ps("-ax", "-o", "pid=,ppid=,comm="):
            parent_pid, name = rest.split(None, 1)
            if Path(name).name.startswith("sshd"):
                children.append((int(pid), int(parent_pid)))
        for parent in found:  # grows while it is walked
            found += [pid for pid, parent_pid in children if parent_pid == parent]
        return found


@pytest.fixture
def ssh_machine(tmp_path: Path) -> Iterator[SshMachine]:
    """A machine that runs; skips where none can be had."""
    if reason := missing():
        pytest.skip(reason)
    machine = SshMachine(tmp_path / "machine")
    machine.start()
    yield machine
    machine.thaw()
    machine.power_off()


def _client_config(machine: SshMachine, port: int) -> str:
    return f"""Host {ALIAS}
  HostName 127.0.0.1
  Port {port}
  User {getpass.getuser()}
  IdentityFile {machine.client_key}
  IdentitiesOnly yes
  HostKeyAlias {ALIAS}
  UserKnownHostsFile {machine.known_hosts}
  GlobalKnownHostsFile /dev/null
  StrictHostKeyChecking yes
  UpdateHostKeys no
"""


def _make_key(path: Path) -> None:
    command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "perpcast-test", "-f", str(path)]
    subprocess.run(command, check=True, capture_output=True)


def _ps(*options: str) -> list[tuple[str, str]]:
    listed = subprocess.run(["ps", *options], capture_output=True, text=True, check=True, errors="replace")
    rows = (line.split(None, 1) for line in listed.stdout.splitlines())
    return [(row[0], row[1]) for row in rows if len(row) == 2]


def _kill(which: signal.Signals, pids: Sequence[int] | Mapping[int, str]) -> list[int]:
    """Those that were there to be told."""
    told = []
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, which)
            told.append(pid)
    return told


def _wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < until, "the test's machine did not follow"
        time.sleep(0.02)
