"""The scripts of `vast/` against a real sshd: what goes over, what is refused, what a lost connection costs."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import count
from pathlib import Path

import pytest

from perpcast.database import free_port
from tests.ssh_world import ALIAS, SshMachine, ssh_machine  # noqa: F401
from tests.tcp_proxy import TcpProxy

ROOT = Path(__file__).parents[1]
SCRIPTS = ("setup_remote_db_tunnel", "sync_to_vast", "fetch_from_vast", "run_training_on_vast", "connect_vast")
RANDOM_BYTES = 16_000_000  # incompressible, half a second of rsync

_numbers = count()


@dataclass
class Started:
    """A script that runs, its output in files that a test can look into meanwhile."""

    process: subprocess.Popen[bytes]
    out: Path
    err: Path

    def said(self) -> str:
        return self.out.read_text(errors="replace") + self.err.read_text(errors="replace")

    def until(self, text: str, times: int = 1) -> None:
        wait_until(lambda: self.said().count(text) >= times, lambda: f"no {text!r} in: {self.said()}")

    def end(self, timeout: float = 40) -> int:
        return self.process.wait(timeout)


def wait_until(condition: Callable[[], bool], why: Callable[[], str] = lambda: "it did not happen") -> None:
    until = time.monotonic() + 40
    while not condition():
        assert time.monotonic() < until, why()
        time.sleep(0.01)


@dataclass
class World:
    """A clone at home, with scripts, some code, a dataset and no key; and the machine's folder."""

    clone: Path
    machine: SshMachine
    remote: Path

    def command(self, name: str, *arguments: str) -> list[str]:
        script = str(self.clone / "vast" / f"{name}.sh")
        return ["bash", script, "-F", str(self.machine.config), "-d", str(self.remote), *arguments]

    def run(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = self.command(name, *arguments)
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    @contextmanager
    def start(self, name: str, *arguments: str, environment: Mapping[str, str] | None = None) -> Iterator[Started]:
        number = next(_numbers)
        out, err = self.clone.parent / f"out_{number}", self.clone.parent / f"err_{number}"
        with out.open("wb") as to_out, err.open("wb") as to_err:
            process = subprocess.Popen(
                self.command(name, *arguments),
                stdin=subprocess.DEVNULL,
                stdout=to_out,
                stderr=to_err,
                start_new_session=True,
                env={**os.environ, **(environment or {})},
            )
        try:
            yield Started(process, out, err)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def session(self, script: str, *options: str) -> list[str]:
        """Arguments of run_training_on_vast.sh for a line of bash that stands for a training."""
        return [*options, ALIAS, "--", "bash", "-c", script]


@pytest.fixture
def world(tmp_path: Path, ssh_machine: SshMachine) -> World:  # noqa: F811
    clone = tmp_path / "clone"
    shutil.copytree(ROOT / "vast", clone / "vast", ignore=shutil.ignore_patterns("__pycache__", "*.py"))
    (clone / "config.yaml").write_text("seed: 1\n")
    (clone / "train.py").write_text("print('training')\n")
    (clone / "train.py").chmod(0o755)
    (clone / "a name with spaces.txt").write_text("spaces\n")
    (clone / ".gitignore").write_text(".env\ndatasets/\n")
    (clone / ".env").write_text("KEY=secret\n")
    dataset = clone / "datasets" / "d1"
    dataset.mkdir(parents=True)
    (dataset / "manifest.json").write_text("{}")
    git(clone, "init", "-q")
    git(clone, "add", "-A")
    return World(clone, ssh_machine, ssh_machine.folder / "disk" / "perpcast")


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True)


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def random_file(path: Path) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = os.urandom(RANDOM_BYTES)
    path.write_bytes(content)
    return content


# --- What all of them have in common


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_explains_itself_with_examples(name: str) -> None:
    run = subprocess.run(
        ["bash", str(ROOT / "vast" / f"{name}.sh"), "-h"], capture_output=True, text=True, check=True, timeout=20
    )
    assert f"\nExamples:\n  vast/{name}.sh" in run.stdout
    assert "set -e" not in run.stdout


@pytest.mark.parametrize(
    ("name", "arguments", "complaint"),
    [
        ("setup_remote_db_tunnel", ["--port", "1"], "no such option: --port"),
        ("setup_remote_db_tunnel", ["-r", "70000", "gpu"], "-r needs a port from 1 to 65535, not '70000'"),
        ("setup_remote_db_tunnel", ["gpu", "gpu2"], "one HOST at most"),
        ("sync_to_vast", ["--dataset"], "--dataset needs a value"),
        ("sync_to_vast", ["--config"], "--config needs a value"),
        ("sync_to_vast", ["--dataset", "../d1", "gpu"], "--dataset is a name of letters"),
        ("sync_to_vast", ["--dataset", "other", "gpu"], "no such folder"),
        ("sync_to_vast", ["--config", "no.yaml", "gpu"], "no such configuration file: no.yaml"),
        ("sync_to_vast", ["--code-only", "gpu;true"], "HOST is user@host"),
        ("sync_to_vast", ["--code-only", "-d", "a b", "gpu"], "the folder there is a path"),
        ("sync_to_vast", ["--code-only", "-F", "no_config", "gpu"], "no such SSH configuration: no_config"),
        ("fetch_from_vast", [], "MODEL_ID and one HOST at most"),
        ("fetch_from_vast", ["a/b", "gpu"], "MODEL_ID is a name of letters"),
        ("run_training_on_vast", ["gpu", "--"], "no COMMAND behind --"),
        ("run_training_on_vast", ["--lost-minutes", "ten", "gpu"], "--lost-minutes needs a number, not 'ten'"),
        ("connect_vast", ["--local-port", "x"], "--local-port needs a port"),
    ],
)
def test_wrong_use_is_a_line_and_exit_code_2(name: str, arguments: list[str], complaint: str) -> None:
    command = ["bash", str(ROOT / "vast" / f"{name}.sh"), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    assert (run.returncode, run.stdout) == (2, "")
    assert complaint in run.stderr
    assert run.stderr.count("\n") == 1


def log_of(machine: SshMachine) -> str:
    return machine.log.read_text()


@contextmanager
def local_service() -> Iterator[int]:
    """Stands for PostgreSQL at home: says in a line who it is, on the port that is returned."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listener:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.sendall(b"at home\n")

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]
        listener.shutdown(socket.SHUT_RDWR)


def answer_on(port: int) -> bytes:
    with suppress(OSError), closing(socket.create_connection(("127.0.0.1", port), timeout=5)) as connection:
        return connection.recv(100)
    return b""


def run_each(world: World) -> Iterator[tuple[str, subprocess.CompletedProcess[str]]]:
    """Every script, with what it needs to get as far as a connection."""
    with local_service() as port:
        own = {
            "setup_remote_db_tunnel": ["-l", str(port)],
            "fetch_from_vast": ["m1"],
            "connect_vast": ["--local-port", str(free_port())],
        }
        for name in SCRIPTS:
            yield name, world.run(name, *own.get(name, []), ALIAS)


@pytest.mark.parametrize("known", ["another", "none"])
def test_host_key_that_is_not_the_known_one_is_refused_before_anything_is_sent(world: World, known: str) -> None:
    if known == "another":
        world.machine.change_host_key()
    else:
        world.machine.known_hosts.write_text("")
    for name, run in run_each(world):
        assert run.returncode == 3, (name, run.stderr)
        assert f"the host key of {ALIAS} is refused, nothing was sent to it" in run.stderr, name
        assert ("received: another one, SHA256:" in run.stderr) == (known == "another"), name
        assert ("received: one that is not known here" in run.stderr) == (known == "none"), name
        assert "ssh-keygen -lf" in run.stderr, name
    assert "Accepted" not in log_of(world.machine)
    assert not world.remote.exists()


def test_key_that_is_refused_there_is_a_line_and_exit_code_255(world: World) -> None:
    world.machine.authorized_keys.write_text("")
    for name, run in run_each(world):
        assert run.returncode == 255, (name, run.stderr)
        assert re.search(rf"^\w+: no connection to {ALIAS}: .*Permission denied", run.stderr), name
        assert run.stderr.count("\n") == 1, name


def test_host_with_its_port_is_connected_to_there(world: World) -> None:
    known = f"127.0.0.1:{world.machine.port}"
    world.machine.config.write_text(f"UserKnownHostsFile {world.machine.known_hosts}\nIdentityAgent none\n")
    run = world.run("sync_to_vast", "--code-only", f"nobody@{known}")
    assert run.returncode == 255  # the host key was right, only the user is none
    assert "nobody@127.0.0.1: Permission denied" in run.stderr


def test_without_a_host_the_current_rental_is_asked_for(world: World) -> None:
    answer = f"config={world.machine.config}\nhost={ALIAS}\nfolder={world.remote}\n"
    python = world.clone / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\n[ "$*" = "-m vast.target" ] && printf "{answer}"\n')
    python.chmod(0o755)
    command = ["bash", str(world.clone / "vast" / "sync_to_vast.sh"), "--code-only"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert run.returncode == 0, run.stderr
    assert (world.remote / "train.py").exists()

    python.write_text("#!/bin/sh\necho 'vast: nothing is rented, name a host' >&2; exit 2\n")
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert (run.returncode, run.stderr) == (2, "vast: nothing is rented, name a host\n")


# --- sync_to_vast.sh


def test_sync_sends_what_git_tracks_the_configuration_and_the_newest_dataset(world: World) -> None:
    newer = world.clone / "datasets" / "d2"
    newer.mkdir()
    (newer / "manifest.json").write_text("{2}")
    os.utime(world.clone / "datasets" / "d1", (1, 1))
    first, second = world.clone.parent / "mine.yaml", world.clone.parent / "more.yaml"
    first.write_text("seed: 2\n")
    second.write_text("seed: 3\n")
    (world.clone / "not_tracked.txt").write_text("mine\n")
    run = world.run("sync_to_vast", "--config", str(first), "--config", str(second), ALIAS)
    assert run.returncode == 0, run.stderr
    tracked = {
        name: content
        for name, content in files_below(world.clone).items()
        if not name.startswith((".git/", "datasets/", ".env", "not_tracked", "config.yaml"))
    }
    assert files_below(world.remote) == {
        **tracked,
        "config.yaml": b"seed: 2\n",
        "config.1.yaml": b"seed: 3\n",
        "datasets/d2/manifest.json": b"{2}",
    }
    assert "a name with spaces.txt" in tracked
    assert os.access(world.remote / "train.py", os.X_OK)


def test_sync_again_sends_what_has_changed_and_leaves_a_dataset_that_is_there(world: World) -> None:
    assert world.run("sync_to_vast", ALIAS).returncode == 0
    (world.clone / "train.py").write_text("print('changed')\n")
    (world.clone / "a name with spaces.txt").unlink()  # tracked still, but gone
    there = world.remote / "datasets" / "d1" / "manifest.json"
    there.write_text("as it was there")
    run = world.run("sync_to_vast", ALIAS)
    assert run.returncode == 0, run.stderr
    assert (world.remote / "train.py").read_text() == "print('changed')\n"
    assert there.read_text() == "as it was there"
    assert "datasets/d1 was there already" in run.stderr
    assert os.listdir(world.remote / "datasets") == ["d1"]


def test_sync_brings_the_checkpoint_of_a_run_from_another_home_folder(world: World) -> None:
    home = world.clone.parent / "home"
    (home / "logs" / "training_m1").mkdir(parents=True)
    (home / "logs" / "training_m1" / "checkpoint.h5").write_text("epoch 3")
    (home / "datasets" / "d9").mkdir(parents=True)
    run = world.run("sync_to_vast", "--from", str(home), "--run", "m1", ALIAS)
    assert run.returncode == 0, run.stderr
    assert (world.remote / "logs" / "training_m1" / "checkpoint.h5").read_text() == "epoch 3"
    assert os.listdir(world.remote / "datasets") == ["d9"]


def test_sync_refuses_everything_where_a_key_is_tracked(world: World) -> None:
    names = (".env", ".env.local", "metabase/.env", ".perpcast/vast/rental.json", "server.pem", "keys/id_ed25519")
    for secret in names:
        path = world.clone / secret
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("secret")
        git(world.clone, "add", "-f", secret)
        run = world.run("sync_to_vast", "--code-only", ALIAS)
        assert run.returncode == 1, secret
        assert f"nothing was sent, for keys would have been: {secret} (" in run.stderr
        git(world.clone, "rm", "-q", "--cached", secret)
    assert "Accepted" not in log_of(world.machine)


@pytest.mark.parametrize("secret", ["datasets/d1/.env", "logs/training_m1/id_rsa", "mine/.env"])
def test_sync_refuses_a_key_among_data_and_configuration(world: World, secret: str) -> None:
    (world.clone / "logs" / "training_m1").mkdir(parents=True)
    (world.clone / secret).parent.mkdir(exist_ok=True)
    (world.clone / secret).write_text("secret")
    more = ["--config", str(world.clone / secret)] if secret.startswith("mine") else []
    run = world.run("sync_to_vast", "--run", "m1", *more, ALIAS)
    assert run.returncode == 1
    assert secret in run.stderr
    assert "Accepted" not in log_of(world.machine)


def test_sync_sends_what_only_looks_like_a_key(world: World) -> None:
    harmless = {".env.example", "keys/id_ed25519.pub", "perpcast/id_of.py", "environment.py"}
    for name in harmless:
        (world.clone / name).parent.mkdir(exist_ok=True)
        (world.clone / name).write_text("no secret")
        git(world.clone, "add", "-f", name)
    assert world.run("sync_to_vast", "--code-only", ALIAS).returncode == 0
    assert harmless <= set(files_below(world.remote))


def test_sync_without_git_sends_nothing(world: World) -> None:
    shutil.rmtree(world.clone / ".git")
    run = world.run("sync_to_vast", "--code-only", ALIAS)
    assert run.returncode == 1
    assert "what may be sent is what git tracks" in run.stderr
    assert not world.remote.exists()


@pytest.mark.parametrize("how", ["connection", "script"])
def test_sync_killed_in_the_middle_goes_on_when_run_again(world: World, how: str) -> None:
    content = random_file(world.clone / "datasets" / "d1" / "inputs.f32")
    aside = world.remote / "datasets" / ".sync-d1"

    def bytes_there() -> int:
        return max((path.stat().st_size for path in aside.glob(".inputs.f32.*")), default=0)

    with world.start("sync_to_vast", ALIAS) as sync:
        wait_until(lambda: bytes_there() > 200_000 or sync.process.poll() is not None, sync.said)
        if how == "connection":
            assert world.machine.drop_connections() >= 1
            assert sync.end() == 255
            assert "was lost: run the same command again, it goes on" in sync.said()
        else:
            os.killpg(sync.process.pid, signal.SIGKILL)
            sync.end()
    kept = aside / ".rsync-partial" / "inputs.f32"
    wait_until(kept.exists)
    assert 0 < kept.stat().st_size < len(content)
    assert not (world.remote / "datasets" / "d1").exists()

    run = world.run("sync_to_vast", ALIAS)
    assert run.returncode == 0, run.stderr
    assert files_below(world.remote / "datasets") == {"d1/manifest.json": b"{}", "d1/inputs.f32": content}


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    if os.geteuid() != 0 or sys.platform != "linux":
        pytest.skip("a disk that fills up is a small file system, which only root can mount, on Linux")
    folder.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no small file system can be mounted here: {mounted.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_sync_onto_a_full_disk_says_so_and_goes_on_when_there_is_room(world: World) -> None:
    with small_disk(world.remote, 8):
        random_file(world.clone / "datasets" / "d1" / "inputs.f32")
        run = world.run("sync_to_vast", ALIAS)
        assert run.returncode == 4, run.stderr
        assert f"sync: the disk of {ALIAS} is full: make room there" in run.stderr
        subprocess.run(["mount", "-o", "remount,size=200m", str(world.remote)], check=True)
        assert world.run("sync_to_vast", ALIAS).returncode == 0
        assert (world.remote / "datasets" / "d1" / "inputs.f32").stat().st_size == RANDOM_BYTES


# --- fetch_from_vast.sh


def trained_there(world: World) -> None:
    for name in ("logs/training_m1/result/record.json", "plots/m1/loss.png", "trained_model/m1/model.onnx"):
        (world.remote / name).parent.mkdir(parents=True, exist_ok=True)
        (world.remote / name).write_text(name)
    (world.remote / "logs" / "training_other").mkdir()


def test_fetch_brings_logs_plots_and_bundle_but_nothing_that_is_no_plain_file(world: World) -> None:
    trained_there(world)
    bundle = world.remote / "trained_model" / "m1"
    (bundle / "link").symlink_to("/etc/passwd")
    (bundle / "folder_link").symlink_to("/etc")
    os.mkfifo(bundle / "fifo")
    (bundle / "run.sh").write_text("")
    (bundle / "run.sh").chmod(0o4777)
    into = world.clone.parent / "home"
    into.mkdir()
    run = world.run("fetch_from_vast", "--into", str(into), "m1", ALIAS)
    assert run.returncode == 0, run.stderr
    names = ["logs/training_m1/result/record.json", "plots/m1/loss.png", "trained_model/m1/model.onnx"]
    assert files_below(into) == {**{name: name.encode() for name in names}, "trained_model/m1/run.sh": b""}
    assert sorted(os.listdir(into / "trained_model" / "m1")) == ["model.onnx", "run.sh"]
    ours = world.clone.parent / "ours"
    ours.touch()
    assert (into / "trained_model" / "m1" / "run.sh").stat().st_mode == ours.stat().st_mode


def test_fetch_of_logs_alone_brings_them_and_new_ones_replace_old_ones(world: World) -> None:
    trained_there(world)
    assert world.run("fetch_from_vast", "--logs-only", "m1", ALIAS).returncode == 0
    record = world.remote / "logs/training_m1/result/record.json"
    before = record.stat()
    record.write_text(f"{'newer':>35}")  # as long as before, and within the same second
    os.utime(record, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert record.stat().st_size == before.st_size
    assert world.run("fetch_from_vast", "--logs-only", "m1", ALIAS).returncode == 0
    assert (world.clone / "logs/training_m1/result/record.json").read_text().endswith("newer")
    assert not (world.clone / "trained_model").exists()


def test_fetch_of_a_model_that_is_not_there_says_what_is_missing(world: World) -> None:
    run = world.run("fetch_from_vast", "m1", ALIAS)
    assert run.returncode == 1
    assert f"fetch: there is no {world.remote} on {ALIAS}" in run.stderr
    trained_there(world)
    shutil.rmtree(world.remote / "trained_model")
    shutil.rmtree(world.remote / "plots")
    run = world.run("fetch_from_vast", "m1", ALIAS)
    assert run.returncode == 1
    assert f"has no {world.remote}/trained_model/m1: the training has not got so far" in run.stderr


@pytest.mark.parametrize("how", ["connection", "script"])
def test_fetch_killed_in_the_middle_leaves_no_half_file_and_is_run_again(world: World, how: str) -> None:
    trained_there(world)
    content = random_file(world.remote / "trained_model" / "m1" / "weights.bin")
    bundle = world.clone / "trained_model" / "m1"
    unfinished = world.clone / ".perpcast" / "fetch"
    with TcpProxy(world.machine.port) as proxy:
        if how == "connection":
            proxy.cut_after(4_000_000)
        with world.start("fetch_from_vast", "-p", str(proxy.port), "m1", ALIAS) as fetch:
            if how == "script":
                wait_until(lambda: any(path.stat().st_size > 200_000 for path in unfinished.glob("*/weights*")))
                os.killpg(fetch.process.pid, signal.SIGKILL)
                fetch.end()
            else:
                assert fetch.end() == 255, fetch.said()
    assert not (bundle / "weights.bin").exists()
    assert not bundle.exists() or {path.name for path in bundle.iterdir()} <= {"model.onnx"}

    assert world.run("fetch_from_vast", "m1", ALIAS).returncode == 0
    assert (bundle / "weights.bin").read_bytes() == content
    assert sorted(os.listdir(bundle)) == ["model.onnx", "weights.bin"]
    assert list(unfinished.iterdir()) == []


# --- run_training_on_vast.sh

COUNTING = 'for i in $(seq 400); do echo "line $i"; sleep 0.005; done'
COUNTED = "".join(f"line {i}\n" for i in range(1, 401))


@pytest.fixture
def there(world: World) -> World:
    world.remote.mkdir(parents=True)
    return world


ENDINGS = [
    ("echo trained; echo but >&2", 0, "trained\nbut\n"),
    ("pwd; exit 7", 7, "{remote}\n"),
    ("printf 'no newline'; exit 255", 255, "no newline"),
    ("kill -KILL $$", 137, None),  # bash has a word for it
    ("kill -TERM $$", 143, None),
    ("kill -KILL $PPID; sleep 0.1; exit 0", 137, ""),
    (r"""printf '%s\n' "it's \"quoted\" \$HOME * \\ tab	end" """, 0, 'it\'s "quoted" $HOME * \\ tab\tend\n'),
]


def test_session_ends_with_the_commands_own_output_and_exit_code(there: World) -> None:
    (there.machine.home / ".bashrc").write_text("echo welcome to the machine\n")
    for script, code, out in ENDINGS:
        run = there.run("run_training_on_vast", *there.session(script))
        assert run.returncode == code, (script, run.stderr)
        assert "welcome" not in run.stdout
        assert out is None or run.stdout == out.format(remote=there.remote), script


def test_session_of_no_such_command_or_folder_says_so(there: World) -> None:
    run = there.run("run_training_on_vast", ALIAS, "--", "no_such_command")
    assert (run.returncode, "no_such_command: command not found" in run.stdout) == (127, True)
    there.remote.rename(there.remote.with_name("elsewhere"))
    run = there.run("run_training_on_vast", ALIAS, "--", "true")
    assert run.returncode == 1
    assert f"it could not start on {ALIAS}" in run.stderr


def test_session_without_a_command_trains_on_the_newest_dataset(there: World) -> None:
    python = there.remote / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$@"\n')
    python.chmod(0o755)
    for name, moment in (("old", 1), ("new", 1000), ("older", 0)):
        (there.remote / "datasets" / name).mkdir(parents=True)
        os.utime(there.remote / "datasets" / name, (moment, moment))
    run = there.run("run_training_on_vast", ALIAS)
    assert (run.returncode, run.stdout) == (0, "-m vast.remote --task regression --dataset new\n"), run.stderr


def test_session_survives_lost_connections_and_its_log_comes_whole_each_line_once(there: World) -> None:
    with there.start("run_training_on_vast", *there.session(f"echo start >>starts; {COUNTING}; exit 4")) as run:
        for line in (60, 200):
            run.until(f"line {line}\n")
            assert there.machine.drop_connections() >= 1
        assert run.end() == 4, run.said()
        assert run.out.read_text() == COUNTED
        assert run.said().count("no connection to") == 2
    assert (there.remote / "starts").read_text() == "start\n"


def test_session_whose_script_is_killed_is_attached_to_by_the_next_one(there: World) -> None:
    script = f"echo start >>starts; {COUNTING}; exit 4"
    with there.start("run_training_on_vast", *there.session(script)) as first:
        first.until("line 30\n")
        os.killpg(first.process.pid, signal.SIGKILL)
        first.end()
    run = there.run("run_training_on_vast", ALIAS)
    assert (run.returncode, run.stdout) == (4, COUNTED), run.stderr
    assert f"session: one runs on {ALIAS} already, attached to it: bash -c echo start" in run.stderr
    assert (there.remote / "starts").read_text() == "start\n"


def test_session_that_several_start_at_once_is_started_once(there: World) -> None:
    arguments = there.session(f"echo start >>starts; {COUNTING}")
    with (
        there.start("run_training_on_vast", *arguments) as one,
        there.start("run_training_on_vast", *arguments) as two,
        there.start("run_training_on_vast", *arguments) as three,
    ):
        assert [run.end() for run in (one, two, three)] == [0, 0, 0]
        assert [run.out.read_text() for run in (one, two, three)] == [COUNTED] * 3
    assert (there.remote / "starts").read_text() == "start\n"


@pytest.mark.parametrize(("stop", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_session_runs_on_after_ctrl_c_and_ends_by_stop(there: World, stop: signal.Signals, code: int) -> None:
    script = "trap 'echo stopped >>marks; exit 9' TERM; echo begun; for i in $(seq 400); do sleep 0.1; done"
    with there.start("run_training_on_vast", *there.session(script)) as run:
        run.until("begun")
        os.killpg(run.process.pid, stop)
        assert run.end() == code
        assert f"the session on {ALIAS} runs on" in run.said()
    assert any(command.startswith("bash -c trap") for command in there.machine.processes().values())
    ended = there.run("run_training_on_vast", "--stop", ALIAS)
    assert ended.returncode == 0
    assert ended.stderr.startswith(f"session: ended on {ALIAS}: bash -c trap")
    wait_until(lambda: not there.machine.processes())
    assert (there.remote / "marks").read_text() == "stopped\n"
    assert (there.remote / ".perpcast/session/exit_code").read_text() == "9  "
    assert f"nothing runs on {ALIAS}" in there.run("run_training_on_vast", "--stop", ALIAS).stderr


def test_session_that_ignores_stop_is_killed_with_all_that_it_started(there: World) -> None:
    script = "trap '' TERM; bash -c 'while :; do sleep 0.2; done' & echo begun; wait; sleep 60"
    with there.start("run_training_on_vast", *there.session(script)) as run:
        run.until("begun")
        assert there.run("run_training_on_vast", "--stop", ALIAS).returncode == 0  # after its ten seconds
        assert run.end() == 137
    wait_until(lambda: not there.machine.processes(), lambda: str(there.machine.processes()))


def test_session_is_given_up_after_the_minutes_without_a_connection(there: World) -> None:
    with there.start("run_training_on_vast", *there.session("echo begun; sleep 60", "--lost-minutes", "0.05")) as run:
        run.until("begun")
        before = time.monotonic()
        there.machine.stop()
        assert run.end() == 75
        assert time.monotonic() - before > 2  # 0.05 minutes are 3 s, counted in whole ones
        assert f"no connection to {ALIAS} for 0.05 minutes: given up" in run.said()
    assert "sleep 60" in there.machine.processes().values()


def test_session_on_a_line_that_falls_silent_connects_again(there: World) -> None:
    """What is shortened is the wait until SSH believes in the silence: 3 x 1 s instead of 3 x 15 s."""
    real = shutil.which("ssh")
    impatient = there.clone.parent / "bin" / "ssh"
    impatient.parent.mkdir()
    impatient.write_text(f'#!/bin/bash\nexec {real} "${{@/ServerAliveInterval=15/ServerAliveInterval=1}}"\n')
    impatient.chmod(0o755)
    path = {"PATH": f"{impatient.parent}:{os.environ['PATH']}"}
    with there.start("run_training_on_vast", *there.session(COUNTING), environment=path) as run:
        run.until("line 20\n")
        there.machine.freeze()
        run.until("no connection to")
        there.machine.thaw()
        assert run.end() == 0
        assert run.out.read_text() == COUNTED


def test_session_whose_machine_shows_another_key_in_mid_life_is_left_at_once(there: World) -> None:
    with there.start("run_training_on_vast", *there.session("echo begun; sleep 60")) as run:
        run.until("begun")
        there.machine.change_host_key()
        assert there.machine.drop_connections() >= 1
        assert run.end() == 3
        assert "received: another one, SHA256:" in run.said()


def test_session_that_fills_the_disk_ends_with_its_exit_code_and_the_reason(world: World) -> None:
    with small_disk(world.remote, 4):
        run = world.run("run_training_on_vast", *world.session("cat /dev/zero >fill; exit 6"))
        assert run.returncode == 6
        assert f"session: the disk of {ALIAS} is full (0 kB left)" in run.stderr


# --- setup_remote_db_tunnel.sh


def children_of(process: subprocess.Popen[bytes]) -> list[str]:
    listed = subprocess.run(["ps", "-ax", "-o", "pgid=,command="], capture_output=True, text=True, check=True)
    return [line for line in listed.stdout.splitlines() if line.split()[0] == str(process.pid)]


@pytest.fixture
def service() -> Iterator[int]:
    with local_service() as port:
        yield port


def tunnel_arguments(service: int, remote_port: int) -> Sequence[str]:
    return ("-l", str(service), "-r", str(remote_port), ALIAS)


def test_tunnel_leads_home_again_after_a_lost_connection(world: World, service: int) -> None:
    port = free_port()
    with world.start("setup_remote_db_tunnel", *tunnel_arguments(service, port)) as tunnel:
        for times in (1, 2):
            tunnel.until("tunnel: open\n", times)
            assert answer_on(port) == b"at home\n"
            assert world.machine.drop_connections() >= 1
            tunnel.until("tunnel: lost, again in 1 s\n", times)
        tunnel.until("tunnel: open\n", 3)
        assert answer_on(port) == b"at home\n"


@pytest.mark.parametrize("which", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_tunnel_ends_with_its_script_whatever_ends_that(world: World, service: int, which: signal.Signals) -> None:
    port = free_port()
    with world.start("setup_remote_db_tunnel", *tunnel_arguments(service, port)) as tunnel:
        tunnel.until("tunnel: open\n")
        tunnel.process.send_signal(which)  # to the script alone
        assert tunnel.end() == (-which if which == signal.SIGKILL else 128 + which)
        wait_until(lambda: not children_of(tunnel.process), lambda: str(children_of(tunnel.process)))
        wait_until(lambda: not answer_on(port))
    wait_until(lambda: not world.machine.processes())


def test_tunnel_waits_for_a_port_that_a_dead_session_holds(world: World, service: int) -> None:
    port = free_port()
    ssh = ["ssh", "-F", str(world.machine.config), "-N", "-R", f"127.0.0.1:{port}:127.0.0.1:{service}", ALIAS]
    with subprocess.Popen(ssh) as dead:
        wait_until(lambda: bool(answer_on(port)))
        dead.send_signal(signal.SIGSTOP)  # half-open: the server does not know yet
        with world.start("setup_remote_db_tunnel", *tunnel_arguments(service, port)) as tunnel:
            tunnel.until(f"port {port} there is still held by another session")
            dead.kill()
            tunnel.until("tunnel: open\n")
            assert answer_on(port) == b"at home\n"


def test_tunnel_refuses_a_key_that_changes_in_mid_life(world: World, service: int) -> None:
    with world.start("setup_remote_db_tunnel", *tunnel_arguments(service, free_port())) as tunnel:
        tunnel.until("tunnel: open\n")
        world.machine.change_host_key()
        assert world.machine.drop_connections() >= 1
        assert tunnel.end() == 3
        assert tunnel.said().count("tunnel: open") == 1


def test_tunnel_without_postgresql_here_is_told_at_once(world: World) -> None:
    port = free_port()
    run = world.run("setup_remote_db_tunnel", "-l", str(port), ALIAS)
    assert run.returncode == 1
    assert f"tunnel: nothing listens on 127.0.0.1:{port} here: start PostgreSQL" in run.stderr


# --- connect_vast.sh


def test_connect_opens_a_shell_and_the_tensorboard_of_the_machine(there: World) -> None:
    (there.remote / ".venv").symlink_to(Path(sys.executable).parents[1])
    (there.remote / "logs").mkdir()
    port = free_port()
    command = there.command("connect_vast", "--local-port", str(port), ALIAS)
    look = f"import urllib.request as http; print(http.urlopen('http://localhost:{port}').status)"
    shell = f'pwd; {sys.executable} -c "{look}"; exit 3'
    run = subprocess.run(command, input=shell, capture_output=True, text=True, check=False, timeout=90)
    assert (run.returncode, run.stdout) == (3, f"{there.remote}\n200\n"), run.stderr
    assert run.stderr == f"connect: TensorBoard: http://localhost:{port}\n"
    boards = [pid for pid, command in there.machine.processes().items() if " -m tensorboard.main" in command]

    with there.start("connect_vast", "--tensorboard-only", "--local-port", str(port), ALIAS) as connect:
        connect.until("until Ctrl-C")
        wait_until(lambda: not port_is_free(port))
        assert [p for p, c in there.machine.processes().items() if " -m tensorboard.main" in c] == boards
        os.killpg(connect.process.pid, signal.SIGINT)
        assert connect.end() == 130


def port_is_free(port: int) -> bool:
    with closing(socket.socket()) as one:
        return one.connect_ex(("127.0.0.1", port)) != 0


def test_connect_where_the_local_port_is_taken_names_the_option(there: World, service: int) -> None:
    run = there.run("connect_vast", "--local-port", str(service), ALIAS)
    assert run.returncode == 1
    assert f"connect: port {service} of this computer is taken: name another one by --local-port" in run.stderr


def test_connect_where_tensorboard_fails_says_why(there: World) -> None:
    run = there.run("connect_vast", "--local-port", str(free_port()), ALIAS)
    assert run.returncode == 1
    assert f"connect: TensorBoard did not start on {ALIAS}" in run.stderr
    assert ".venv/bin/python: No such file or directory" in run.stderr


# --- onstart.sh


@dataclass
class Api:
    """Vast's, as far as an instance itself uses it: what was asked, and with which key."""

    url: str
    asked: list[tuple[str, str, str]]


@pytest.fixture
def api() -> Iterator[Api]:
    asked: list[tuple[str, str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_DELETE(self) -> None:
            asked.append((self.command, self.path, self.headers["Authorization"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"success": true}')

        def log_message(self, *arguments: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Api(f"http://127.0.0.1:{server.server_port}", asked)
        server.shutdown()


@contextmanager
def instance(machine: SshMachine, api: Api, deadline: str, path: str = "") -> Iterator[Path]:
    """What the machine runs when it comes up, its /etc/ssh being the folder of its keys; gives its log."""
    text = (ROOT / "vast" / "onstart.sh").read_text().replace("/etc/ssh/", f"{machine.ssh_keys}/")
    log = machine.folder / f"onstart_{next(_numbers)}.log"
    variables = {"CONTAINER_ID": "42", "CONTAINER_API_KEY": "k3y", "VAST_URL": api.url, "PERPCAST_DEADLINE": deadline}
    environment = {**machine.environment, **variables}
    if path:
        environment["PATH"] = path
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["/bin/sh", "-c", text], env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        )
        try:
            wait_until(lambda: "perpcast: ready" in log.read_text(), log.read_text)
            yield log
        finally:
            machine.power_off()
            process.wait()


def test_onstart_tells_the_host_key_and_again_when_it_changes(ssh_machine: SshMachine, api: Api) -> None:  # noqa: F811
    first = ssh_machine.host_key_line
    with instance(ssh_machine, api, str(int(time.time()) + 1000)) as log:
        wait_until(lambda: f"perpcast-host-key: {first}\n" in log.read_text())
        ssh_machine.change_host_key()
        wait_until(lambda: f"perpcast-host-key: {ssh_machine.host_key_line}\n" in log.read_text())
        assert (ssh_machine.home / ".no_auto_tmux").exists()
        assert (ssh_machine.home / ".hushlogin").exists()
        assert not (ssh_machine.folder / "apt.log").exists()  # all that is needed was there
    assert api.asked == []


def test_dead_man_destroys_the_instance_at_the_deadline_of_its_first_start(ssh_machine: SshMachine, api: Api) -> None:  # noqa: F811
    soon = int(time.time()) + 3
    with instance(ssh_machine, api, str(soon)):
        assert api.asked == []
    # Everything there was killed; it comes up again, with a later deadline among its variables.
    with instance(ssh_machine, api, str(soon + 1000)) as log:
        wait_until(lambda: bool(api.asked), log.read_text)
        assert time.time() >= soon
        assert api.asked == [("DELETE", "/api/v0/instances/42/", "Bearer k3y")]
        assert f"perpcast-dead-man: set to {soon}\n" in log.read_text()
        commands = ssh_machine.processes().values()
        assert [command for command in commands if ".perpcast_dead_man.sh" in command]  # goes on until it is dead
        assert not [command for command in commands if "k3y" in command]


def path_without(machine: SshMachine, *names: str) -> str:
    """A PATH on which these programs are not."""
    folder = machine.folder / "programs"
    folder.mkdir()
    for one in os.environ["PATH"].split(":"):
        for program in Path(one).iterdir() if Path(one).is_dir() else []:
            if program.name not in names and not (folder / program.name).is_symlink():
                (folder / program.name).symlink_to(program)
    return f"{machine.bin}:{folder}"


def test_onstart_installs_what_is_missing_and_the_dead_man_does_without_curl(
    ssh_machine: SshMachine,  # noqa: F811
    api: Api,
) -> None:
    path = path_without(ssh_machine, "rsync", "curl", "apt-get")
    with instance(ssh_machine, api, "1", path) as log:
        wait_until(lambda: bool(api.asked), log.read_text)
        assert api.asked == [("DELETE", "/api/v0/instances/42/", "Bearer k3y")]
        assert (ssh_machine.folder / "apt.log").read_text() == "apt-get update\n"  # which fails here
        assert "perpcast: could not install rsync curl" in log.read_text()


def test_onstart_without_a_deadline_says_that_nothing_destroys_the_instance(
    ssh_machine: SshMachine,  # noqa: F811
    api: Api,
) -> None:
    with instance(ssh_machine, api, "") as log:
        assert "perpcast-dead-man: no deadline was given, there is none" in log.read_text()


def test_onstart_fits_into_what_vast_takes_and_its_inner_script_is_clean(ssh_machine: SshMachine, api: Api) -> None:  # noqa: F811
    assert (ROOT / "vast" / "onstart.sh").stat().st_size < 16_000
    with instance(ssh_machine, api, str(int(time.time()) + 1000)):
        inner = ssh_machine.home / ".perpcast_dead_man.sh"
        assert inner.stat().st_mode & 0o077 == 0
        subprocess.run(["sh", "-n", inner], check=True)
        if shellcheck := shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"):
            subprocess.run([shellcheck, inner], check=True)
