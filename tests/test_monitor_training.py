"""The monitor on real run folders, processes and terminals: what it shows, and that nothing on disk can upset it."""

import io
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console
from rich.text import Text

from monitor_training import (
    EVIDENCE_STEPS,
    KILLED,
    GpuWatch,
    best_epoch,
    chart,
    duration,
    eta_seconds,
    find_run,
    is_alive,
    machine_memory,
    process_memory,
    read_frame,
    render,
)
from perpcast.training.progress import Progress, append_epoch, write_progress

ROOT = Path(__file__).parents[1]
RUNNING = Progress("running", "", 4, 10, 350, 1000, 812.4, 700.0, 2048.0, os.getpid(), "CPU", 1.2345)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder with a configuration, and with logs of its own."""
    (tmp_path / "config.yaml").write_bytes((ROOT / "config.yaml").read_bytes())
    return tmp_path


@pytest.fixture
def sleeper() -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        yield process
        process.kill()


def a_run(home: Path, name: str = "tft-1", progress: Progress | None = RUNNING, epochs: int = 3) -> Path:
    folder = home / "logs" / f"training_{name}"
    folder.mkdir(parents=True)
    for epoch in range(epochs):
        values = {"loss": 3.0 - epoch, "val_loss": 2.0 + abs(epoch - 1) / 4, "learning_rate": 3.2e-4}
        values |= {"gradient_norm": 0.41, "samples_per_second": 800.0, "seconds": 200.0, "memory_mb": 2000.0}
        append_epoch(folder, epoch + 1, values)
    if progress is not None:
        write_progress(folder, progress)
    return folder


def monitor(home: Path, *options: str | Path, **environment: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, ROOT / "monitor_training.py", "--config", home / "config.yaml", *options]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=60, check=False
    )


def drawn(home: Path, width: int = 80, height: int = 24) -> str:
    """The same frame without a process of its own, which takes a second to begin."""
    screen = Console(file=io.StringIO(), width=width, height=height)
    screen.print(render(read_frame(find_run(home / "logs", None), GpuWatch()), screen))
    return screen.file.getvalue()  # type: ignore[attr-defined]


def shown(home: Path, *options: str | Path, **environment: str) -> str:
    """What it printed, having ended well and without a word of complaint."""
    run = monitor(home, *options, **environment)
    assert (run.returncode, run.stderr) == (0, "")
    return run.stdout


@pytest.mark.parametrize(("width", "height", "charts"), [(80, 24, 1), (200, 60, 4)])
def test_once_shows_everything_within_the_terminal(home: Path, width: int, height: int, charts: int) -> None:
    a_run(home)
    out = shown(home, "--once", COLUMNS=str(width), LINES=str(height))
    lines = out.splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) < height
    for words in (
        "tft-1  running", "epoch 4 of 10", "35%, step 350 of 1,000",
        "elapsed 0:11:40, ETA 0:21:40",  # 700 s for 350 steps: 2 s for each of the 650 that are left
        "now 1.2345, training 1.0000, V1 2.2500, best V1 2.0000 in epoch 2", "best: 2",
        "learning rate 3.20e-04, gradient norm 0.41, samples/s 812", "training on CPU", "at most 2.0 GiB",
    ):  # fmt: skip
        assert words in out
    # Each chart has a last line that begins with epoch 1 and ends with epoch 3.
    assert sum(line.split().count("3") for line in lines if line.strip().startswith("1 ")) == charts


def test_output_that_is_no_terminal_gets_one_frame_without_asking(home: Path) -> None:
    a_run(home)
    out = shown(home)
    assert "running" in out
    assert "\x1b" not in out


def test_newest_run_is_shown_unless_another_is_named(home: Path) -> None:
    old, new = a_run(home, "tft-old"), a_run(home, "tft-new")
    for path in old.iterdir():
        os.utime(path, (1e9, 1e9))
    assert find_run(home / "logs", None) == new
    assert shown(home, "--once", "--run", "tft-old").startswith("tft-old")
    for name in ("tft-old", "training_tft-old", str(old)):
        assert find_run(home / "logs", name) == old
    os.utime(new, (1e9, 1e9))  # a folder's own time says nothing
    assert find_run(home / "logs", None) == new


def test_no_run_is_exit_2_with_the_next_step(home: Path) -> None:
    run = monitor(home, "--once")
    assert (run.returncode, run.stdout) == (2, "")
    assert "run python train_universal_transformer.py" in run.stderr
    (home / "logs" / "training_empty").mkdir(parents=True)  # nothing was written there
    assert monitor(home, "--once").returncode == 2
    a_run(home)
    run = monitor(home, "--run", "tft-2")
    assert run.returncode == 2
    assert "'tft-2'" in run.stderr
    assert "tft-1" in run.stderr
    assert len(run.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("progress", "words"),
    [
        (replace(RUNNING, state="done", step=1000, epoch=10, pid=1), ("tft-1  done", "100%, step 1,000 of 1,000")),
        (replace(RUNNING, state="stopped", cause="V1 was not better for 3 epochs", pid=2**22 + 1),
         ("stopped: V1 was not better for 3 epochs",)),
        (replace(RUNNING, state="failed", cause="loss nan\n in epoch 4"), ("failed: loss nan in epoch 4",)),
        (replace(RUNNING, pid=2**22 + 1), (KILLED,)),  # no system gives a process that number
    ],
)  # fmt: skip
def test_ended_runs_say_why_and_have_no_eta(home: Path, progress: Progress, words: tuple[str, ...]) -> None:
    a_run(home, progress=progress)
    out = drawn(home)
    assert all(word in out for word in words)
    assert "ETA" not in out
    assert "now 1.2345" not in out


def test_killed_training_is_noticed_even_while_nobody_has_reaped_it(
    home: Path, sleeper: "subprocess.Popen[bytes]"
) -> None:
    folder = a_run(home, progress=replace(RUNNING, pid=sleeper.pid))
    assert "running" in drawn(home)
    sleeper.send_signal(signal.SIGKILL)
    assert KILLED in wait_for(lambda: drawn(home), KILLED)  # a zombie: its parent, this test, has not asked for it
    sleeper.wait()
    assert KILLED in shown(home)
    assert not is_alive(sleeper.pid, (folder / "progress.json").stat().st_mtime)


def wait_for(look: Callable[[], str], word: str) -> str:
    seen = look()
    for _ in range(20):
        if word in seen:
            break
        time.sleep(0.1)
        seen = look()
    return seen


def test_other_process_under_the_number_of_a_dead_one_is_not_the_training(sleeper: "subprocess.Popen[bytes]") -> None:
    now = time.time()
    assert is_alive(sleeper.pid, now)
    assert not is_alive(sleeper.pid, now - 3600)  # the training wrote an hour before this process began


def test_eta_needs_evidence() -> None:
    assert eta_seconds(replace(RUNNING, step=0)) is None
    assert eta_seconds(replace(RUNNING, step=EVIDENCE_STEPS - 1)) is None
    assert eta_seconds(replace(RUNNING, step=EVIDENCE_STEPS, elapsed_seconds=0.0)) is None
    assert eta_seconds(replace(RUNNING, step=250, steps=1000, elapsed_seconds=50.0)) == pytest.approx(150)
    assert eta_seconds(replace(RUNNING, step=4, steps=4, elapsed_seconds=50.0)) == 0
    assert duration(93_784.4) == "1 day, 2:03:04"


def test_beginning_says_unknown_instead_of_a_number(home: Path) -> None:
    a_run(home, progress=replace(RUNNING, epoch=1, step=0, samples_per_second=0.0, loss=None), epochs=0)
    out = drawn(home)
    for words in ("ETA unknown", "no epoch has ended yet", "learning rate unknown", "samples/s unknown"):
        assert words in out


@pytest.mark.parametrize(
    "content",
    [None, "", '{"state": "runn', "[]", "7", "null", '{"state": "running"}', "\xff\xfe",
     json.dumps({**vars(RUNNING), "step": None}), json.dumps({**vars(RUNNING), "state": "asleep"}),
     json.dumps({**vars(RUNNING), "more": 1})],
)  # fmt: skip
def test_damaged_progress_is_a_run_of_which_nothing_is_known_yet(home: Path, content: str | None) -> None:
    path = a_run(home, progress=None) / "progress.json"
    if content is not None:
        path.write_text(content, encoding="latin-1")
    out = drawn(home)
    assert "starting: nothing is known yet" in out
    assert "best V1 2.0000 in epoch 2" in out  # what else there is, is shown


@pytest.mark.parametrize("tail", ['{"epoch": 4, "loss', "7\n", "{}\n", "\xff", "\n\n"])
def test_damaged_history_never_ends_in_a_traceback(home: Path, tail: str) -> None:
    path = a_run(home) / "history.jsonl"
    with path.open("ab") as stream:
        stream.write(tail.encode("latin-1"))
    assert "epoch 4 of 10" in drawn(home)


def test_history_of_numbers_that_are_none_is_drawn_without_them(home: Path) -> None:
    path = a_run(home) / "history.jsonl"
    path.write_text(
        path.read_text().replace('"loss": 2.0', '"loss": NaN').replace('"val_loss": 2.0', '"val_loss": NaN')
    )
    assert "best V1 2.2500 in epoch 1" in drawn(home)


def test_terminal_of_ascii_alone_gets_a_chart_too(home: Path) -> None:
    a_run(home)
    out = shown(home, "--once", PYTHONIOENCODING="ascii", PYTHONUTF8="0", LINES="40")
    assert out.isascii()
    assert "*****" in out


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ("echo '0, NVIDIA H200, 87, 12390, 143771'; echo '1, NVIDIA X, [N/A], [N/A], [N/A]'",
         ["0 NVIDIA H200: 87 % busy, 12.1 of 140.4 GiB", "1 NVIDIA X: it tells no more"]),
        ("echo 'NVIDIA-SMI has failed'; exit 9", ["no GPU"]),
        ("echo 'No devices were found'", ["no GPU"]),
    ],
)  # fmt: skip
def test_gpu_is_what_nvidia_smi_says(
    home: Path, monkeypatch: pytest.MonkeyPatch, script: str, expected: list[str]
) -> None:
    a_run(home)
    program = home / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    out = drawn(home)
    assert all(words in out for words in expected)


def test_machine_without_nvidia_smi_has_no_gpu(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a_run(home)
    monkeypatch.setenv("PATH", str(home))
    assert "training on CPU; no GPU" in drawn(home)


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="only Linux tells")
def test_memory_is_that_of_process_and_machine() -> None:
    used, total = machine_memory()
    own = process_memory(os.getpid())
    assert used is not None
    assert total is not None
    assert own is not None
    assert 10 * 2**20 < own < used < total


def test_chart_by_hand() -> None:
    # 7 cells wide, a margin of 5 for "2.00 ": one line of two cells, 4 by 4 dots; the curve falls from top to bottom.
    braille = chart(Text("t"), [([2.0, 1.0], "blue")], 7, 3, None, ascii_only=False)
    title, curve, axis = braille.plain.split("\n")
    assert (title, curve[:5], axis) == ("t", "2.00 ", "     1")  # no room for a 2 beside it
    bits = [ord(sign) - 0x2800 for sign in curve[5:]]
    # Dots (0,0), (1,1), (2,2), (3,3): 0x01 + 0x10, then 0x04 + 0x80.
    assert bits == [0x01 + 0x10, 0x04 + 0x80]
    # Three cells a line; half way down is still the upper one, and the last curve lies on top.
    ascii_chart = chart(Text("t"), [([1.0, 1.0], "red"), ([2.0, 1.0], "blue")], 8, 4, 2, ascii_only=True).plain
    assert ascii_chart.split("\n")[1:3] == ["2.00 ** ", "1.00 ..*"]


@pytest.mark.parametrize(("values", "best"), [([], None), ([2.0, 1.0, 1.0], 2), ([float("nan"), 3.0], 2)])
def test_best_epoch_is_the_first_of_the_lowest(values: list[float], best: int | None) -> None:
    assert best_epoch(values) == best


def test_monitor_needs_no_network_library() -> None:
    heavy = "{'keras', 'tensorflow', 'matplotlib'}"
    code = f"import sys, monitor_training; assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


class Terminal:
    """The monitor in a terminal of 80 x 24; `text` is all that it has written there so far."""

    def __init__(self, home: Path) -> None:
        leader, follower = pty.openpty()
        command: list[str | Path] = [sys.executable, ROOT / "monitor_training.py", "--config", home / "config.yaml"]
        environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "80", "LINES": "24"}
        self.process = subprocess.Popen(
            command, stdin=follower, stdout=follower, stderr=follower, env=environment, start_new_session=True
        )
        os.close(follower)
        self.leader, self.text = leader, ""
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        try:
            while block := os.read(self.leader, 65_536):
                self.text += block.decode(errors="replace")
        except OSError:  # the terminal is closed
            pass

    def wait_for(self, word: str) -> None:
        deadline = time.monotonic() + 30
        while word not in self.text:
            assert time.monotonic() < deadline, self.text
            time.sleep(0.05)

    def end(self) -> int:
        try:
            code = self.process.wait(30)
        finally:
            self.process.kill()
            self.process.wait()
            self.reader.join(5)
            os.close(self.leader)
        return code


def test_live_frame_follows_the_training_and_ends_with_it(home: Path) -> None:
    folder = a_run(home)
    terminal = Terminal(home)
    terminal.wait_for("step 350 of 1,000")
    write_progress(folder, replace(RUNNING, step=420))
    terminal.wait_for("step 420 of 1,000")
    write_progress(folder, replace(RUNNING, state="stopped", cause="V1 was not better for 10 epochs"))
    terminal.wait_for("stopped: V1 was not better for 10 epochs")
    assert terminal.end() == 0
    assert "Traceback" not in terminal.text


def test_ctrl_c_leaves_quietly_with_130(home: Path) -> None:
    a_run(home)
    terminal = Terminal(home)
    terminal.wait_for("samples/s")
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == 130
    assert "Traceback" not in terminal.text
