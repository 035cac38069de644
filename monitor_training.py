"""Shows a training live in the terminal: python monitor_training.py [--run NAME]

Reads `progress.json` and `history.jsonl` of logs/training_<model id>/, which the training writes, and asks the machine
for memory and GPU. Writes nothing; the training does not notice. Without a terminal, or with --once, prints one frame.
"""

import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path

import click
import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from perpcast.command_line import console, stage
from perpcast.config import Settings
from perpcast.errors import MissingInputError
from perpcast.training.progress import Progress, read_history, read_progress

RUN_FILES = ("progress.json", "history.jsonl", "checkpoint.npz")
KILLED = "killed: run train_universal_transformer.py --resume"
EVIDENCE_STEPS = 20  # before them most of the time went into compiling: no ETA
REFRESH_SECONDS, GPU_SECONDS, GPU_TIMEOUT_SECONDS = 1.0, 5.0, 5.0
QUIET_SECONDS = 30  # without a sign of life, worth saying: V1 and pictures take their time too
COLOURS = {"running": "green", "done": "bold green", "stopped": "yellow", "failed": "bold red", "killed": "bold red"}
LOSS, V1, QUIET = "grey62", "dodger_blue1", "grey62"
SMALL_CHARTS = {
    "learning_rate": "learning rate",
    "gradient_norm": "gradient norm",
    "samples_per_second": "samples/s",
}
_SMALL_HEIGHT = 9
# Bits of a braille character by row and column of its dots.
_BRAILLE = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


@dataclass(frozen=True)
class Machine:
    """What the machine says: bytes, None where it does not tell."""

    process: int | None  # held by the training now
    used: int | None
    total: int | None
    gpus: tuple[str, ...]  # a line each


@dataclass(frozen=True)
class Frame:
    """Everything that one picture in the terminal shows."""

    name: str
    progress: Progress | None
    history: Mapping[str, Sequence[float]]
    alive: bool  # its process
    silent_seconds: float  # since the training last wrote
    machine: Machine

    @property
    def state(self) -> str:
        """The state as written, `killed` where nobody is left to write another, `starting` before any is written."""
        if self.progress is None:
            return "starting"
        return "killed" if self.progress.state == "running" and not self.alive else self.progress.state

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will come."""
        return self.state not in ("running", "starting")


@click.command()
@click.option("--run", "run", metavar="NAME", help="A model id, or the folder of a run; the newest one unless given.")
@click.option("--once", is_flag=True, help="Print one frame and end, as where the output is no terminal.")
@stage
def main(settings: Settings, run: str | None, once: bool) -> None:
    """Show a training live: progress, ETA, curves, memory, GPU, and why it ended.

    It ends with the training; Ctrl-C leaves earlier, and the training goes on.

    \b
    Examples:
      python monitor_training.py
      python monitor_training.py --run tft-0123456789ab
      python monitor_training.py --once
    """
    run_dir = find_run(settings.path("logs"), run)
    gpus = GpuWatch()
    frame = read_frame(run_dir, gpus)
    if once or not console.is_terminal or frame.has_ended:
        console.print(render(frame, console))
        return
    with Live(render(frame, console), console=console, auto_refresh=False) as live:
        while not frame.has_ended:
            time.sleep(REFRESH_SECONDS)
            frame = read_frame(run_dir, gpus)
            live.update(render(frame, console), refresh=True)


def find_run(logs: Path, name: str | None) -> Path:
    """The folder of the named run, or of the one that was written last. Raises MissingInputError without one."""
    if name is not None:
        for folder in (Path(name), logs / name, logs / f"training_{name}"):
            if is_run(folder):
                return folder.resolve()
        known = ", ".join(path.name.removeprefix("training_") for path in sorted(logs.glob("training_*"))) or "none"
        raise MissingInputError(f"no training named {name!r}: expected a run folder or one of {logs} ({known})")
    runs = [folder for folder in logs.glob("training_*") if is_run(folder)]
    if not runs:
        raise MissingInputError(
            f"no training in {logs}: run python train_universal_transformer.py --task regression first"
        )
    return max(runs, key=last_written)


def is_run(folder: Path) -> bool:
    """Whether a training has written there."""
    return any((folder / name).exists() for name in RUN_FILES)


def last_written(run_dir: Path) -> float:
    """When the training last wrote a file that is read here, in seconds since the epoch."""
    times = [0.0]
    for name in RUN_FILES:
        try:
            times.append((run_dir / name).stat().st_mtime)
        except OSError:  # not there yet, or just being replaced
            continue
    return max(times)


def read_frame(run_dir: Path, gpus: "GpuWatch") -> Frame:
    """One look at the files, the process and the machine."""
    progress, written = progress_of(run_dir), last_written(run_dir)
    alive = progress is not None and is_alive(progress.pid, written)
    used, total = machine_memory()
    process = process_memory(progress.pid) if progress is not None and alive else None
    return Frame(
        run_dir.name.removeprefix("training_"),
        progress,
        read_history(run_dir),
        alive,
        max(0.0, time.time() - written),
        Machine(process, used, total, gpus.lines()),
    )


def progress_of(run_dir: Path) -> Progress | None:
    """Where the training stands; None where the file is not there yet, or not one of ours."""
    progress = read_progress(run_dir)
    if progress is None or progress.state not in COLOURS or not isinstance(progress.cause, str):
        return None
    numbers = [value for name, value in asdict(progress).items() if name not in ("state", "cause", "device", "loss")]
    return progress if all(isinstance(number, int | float) for number in numbers) else None


def is_alive(pid: int, written: float) -> bool:
    """Whether the process that wrote then still runs: not a zombie, and not a later one under the same number."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True  # of another user
    except (OSError, OverflowError):
        return False
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        booted = next(line for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
        started = int(booted.split()[1]) + int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, StopIteration, ValueError, IndexError):
        return True  # a system that tells no more
    return fields[0] not in "ZX" and started <= written + 2


def process_memory(pid: int) -> int | None:
    """Bytes that the process holds now, where the system tells."""
    return _kilobytes(Path(f"/proc/{pid}/status"), "VmRSS")


def machine_memory() -> tuple[int | None, int | None]:
    """Bytes in use and in all, where the system tells."""
    total, available = (_kilobytes(Path("/proc/meminfo"), name) for name in ("MemTotal", "MemAvailable"))
    return (None if total is None or available is None else total - available), total


def _kilobytes(path: Path, name: str) -> int | None:
    try:
        for line in path.read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


class GpuWatch:
    """Asks `nvidia-smi` every few seconds: it takes long where many GPUs are busy."""

    def __init__(self) -> None:
        self._lines: tuple[str, ...] = ()
        self._asked = -GPU_SECONDS

    def lines(self) -> tuple[str, ...]:
        """A line for each GPU; none where nvidia-smi is absent or does not answer."""
        if time.monotonic() - self._asked >= GPU_SECONDS:
            self._lines = _ask_gpus()
            self._asked = time.monotonic()
        return self._lines


def _ask_gpus() -> tuple[str, ...]:
    query = "--query-gpu=index,name,utilization.gpu,memory.used,memory.total"
    try:
        run = subprocess.run(
            ["nvidia-smi", query, "--format=csv,noheader,nounits"],
            capture_output=True, text=True, check=True, timeout=GPU_TIMEOUT_SECONDS,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ()
    rows = [[field.strip() for field in line.split(",")] for line in run.stdout.splitlines()]
    return tuple(_gpu_line(*row) for row in rows if len(row) == 5)


def _gpu_line(index: str, name: str, busy: str, used: str, total: str) -> str:
    """Numbers as nvidia-smi writes them, memory in MiB; it writes [N/A] for what a GPU does not tell."""
    memory = f"{int(used) / 1024:.1f} of {int(total) / 1024:.1f} GiB" if used.isdigit() and total.isdigit() else ""
    shares = [f"{busy} % busy" if busy.isdigit() else "", memory]
    return f"{index} {name}: {', '.join(filter(None, shares)) or 'it tells no more'}"


def render(frame: Frame, screen: Console) -> RenderableType:
    """The frame, as large as the terminal lets it be; one line is left for the cursor."""
    ascii_only = screen.options.ascii_only
    headline, progress, numbers = _headline(frame), _progress_lines(frame, screen.width), _numbers(frame)
    lines = len(headline.wrap(screen, screen.width)) + len(progress) + len(numbers)
    room = screen.height - 1 - lines
    charts: list[RenderableType] = []
    if room >= 2 * _SMALL_HEIGHT + 4 and screen.width >= 120 and frame.history["loss"]:
        charts.append(_small_charts(frame.history, screen.width, ascii_only))
        room -= _SMALL_HEIGHT
    if room >= 5:
        charts.insert(0, _loss_chart(frame.history, screen.width, min(room, 32), ascii_only))
    return Group(headline, *progress, *charts, *numbers)


def _headline(frame: Frame) -> Text:
    line = Text().append(f"{frame.name}  ", style="bold")
    said = KILLED if frame.state == "killed" else frame.state
    if frame.state == "starting":
        said = "starting: nothing is known yet"
    elif frame.progress is not None and frame.progress.cause and frame.state != "killed":
        said = f"{frame.state}: {' '.join(frame.progress.cause.split())}"
    line.append(said, style=COLOURS.get(frame.state, "default"))
    if frame.state in ("running", "starting") and frame.silent_seconds >= QUIET_SECONDS:
        line.append(f", silent for {duration(frame.silent_seconds)}", style="yellow")
    return line


def _progress_lines(frame: Frame, width: int) -> list[RenderableType]:
    progress = frame.progress
    if progress is None:
        return []
    share = progress.step / progress.steps if progress.steps else 0.0
    bar = Table.grid(padding=(0, 1))
    bar.add_row(
        Text(f"epoch {progress.epoch} of {progress.epochs}"),
        ProgressBar(
            total=max(progress.steps, 1), completed=progress.step, width=max(10, min(60, width - 58)), complete_style=V1
        ),
        Text(f"{share:.0%}, step {progress.step:,} of {progress.steps:,}"),
    )
    times = Text(f"elapsed {duration(progress.elapsed_seconds)}", style=QUIET)
    if frame.state == "running":
        left = eta_seconds(progress)
        times.append(", ETA unknown" if left is None else f", ETA {duration(left)}, sooner where V1 stops it")
    return [bar, times]


def eta_seconds(progress: Progress) -> float | None:
    """Seconds that the remaining steps take at the mean speed so far; None before there is evidence."""
    if progress.step < min(EVIDENCE_STEPS, progress.steps) or progress.step < 1 or progress.elapsed_seconds <= 0:
        return None
    return progress.elapsed_seconds / progress.step * max(0, progress.steps - progress.step)


def duration(seconds: float) -> str:
    """As in 1:02:03, days before it where there are some."""
    return str(timedelta(seconds=round(seconds)))


def best_epoch(val_loss: Sequence[float]) -> int | None:
    """The epoch, from 1, of the lowest V1 loss; None before there is one."""
    known = [(value, epoch) for epoch, value in enumerate(val_loss, 1) if np.isfinite(value)]
    return min(known)[1] if known else None


def _numbers(frame: Frame) -> list[Text]:
    """What is known beside the curves, a line each."""
    history, progress, machine = frame.history, frame.progress, frame.machine
    best = best_epoch(history["val_loss"])
    losses = {"training": _last(history["loss"]), "V1": _last(history["val_loss"])}
    if progress is not None and progress.loss is not None and frame.state == "running":
        losses = {"now": progress.loss, **losses}
    words = [f"{name} {value:.4f}" for name, value in losses.items() if value is not None]
    if best is not None:
        words.append(f"best V1 {history['val_loss'][best - 1]:.4f} in epoch {best}")
    lines = [_line("loss", ", ".join(words) or "no epoch has ended yet")]
    speed = progress.samples_per_second or None if progress is not None else _last(history["samples_per_second"])
    words = [
        "learning rate " + _number(_last(history["learning_rate"]), "{:.2e}"),
        "gradient norm " + _number(_last(history["gradient_norm"]), "{:.3g}"),
        "samples/s " + _number(speed, "{:,.0f}"),
    ]
    lines.append(_line("speed", ", ".join(words)))
    device = f"training on {progress.device}" if progress is not None else "unknown"
    lines.append(_line("device", device if machine.gpus else f"{device}; no GPU"))
    lines += [_line("GPU", gpu) for gpu in machine.gpus]
    peak = progress.memory_mb * 2**20 if progress is not None else None
    training = f"{_gibibytes(machine.process)}, " if machine.process is not None else ""
    of = f"{_gibibytes(machine.used)} of {_gibibytes(machine.total)}"
    lines.append(_line("memory", f"training {training}at most {_gibibytes(peak)}; machine {of}"))
    return lines


def _line(name: str, said: str) -> Text:
    return Text(f"{name:<8}", style=QUIET, no_wrap=True, overflow="ellipsis").append(said, style="default")


def _last(values: Sequence[float]) -> float | None:
    return values[-1] if values else None


def _number(value: float | None, form: str) -> str:
    return "unknown" if value is None else form.format(value)


def _gibibytes(count: float | None) -> str:
    return "unknown" if count is None else f"{count / 2**30:.1f} GiB"


def _loss_chart(history: Mapping[str, Sequence[float]], width: int, height: int, ascii_only: bool) -> Text:
    title = Text("loss of the training windows", style=LOSS)
    title.append(" and ", style="default").append("of V1", style=V1).append(", by epoch", style="default")
    series = [(history["loss"], LOSS), (history["val_loss"], V1)]
    return chart(title, series, width, height, best_epoch(history["val_loss"]), ascii_only)


def _small_charts(history: Mapping[str, Sequence[float]], width: int, ascii_only: bool) -> Table:
    grid, each = Table.grid(padding=(0, 2)), (width - 4) // len(SMALL_CHARTS)
    grid.add_row(
        *(
            chart(Text(title), [(history[name], "default")], each, _SMALL_HEIGHT, None, ascii_only)
            for name, title in SMALL_CHARTS.items()
        )
    )
    return grid


def chart(
    title: Text,
    series: Sequence[tuple[Sequence[float], str]],
    width: int,
    height: int,
    marked: int | None,
    ascii_only: bool,
) -> Text:
    """Curves over epochs in `height` lines of `width` cells: the title, the curves (the last on top), the epochs.

    Drawn in braille, 2 by 4 dots a cell, or with one sign a cell where the terminal knows ASCII alone. `marked` is an
    epoch, from 1, to point at. Values that are no numbers leave no dot.
    """
    epochs = max((len(values) for values, _ in series), default=0)
    known = [value for values, _ in series for value in values if np.isfinite(value)]
    if not known:
        return Text.assemble(title, Text("\n  no epoch has ended yet", style=QUIET), no_wrap=True)
    low, high = min(known), max(known)
    labels = _labels(high, low)
    margin = max(map(len, labels)) + 1
    columns, rows = width - margin, height - 2
    across, down = (1, 1) if ascii_only else (2, 4)
    bits, styles = np.zeros((rows, columns), int), np.full((rows, columns), "", object)
    for number, (values, style) in enumerate(series):
        for x, y in _dots(values, epochs, low, high, columns * across, rows * down):
            cell = y // down, x // across
            bits[cell] = number + 1 if ascii_only else bits[cell] | _BRAILLE[y % down][x % across]
            styles[cell] = style
    text = Text(no_wrap=True, overflow="crop").append_text(title)
    for row in range(rows):
        label = labels[0] if row == 0 else labels[1] if row == rows - 1 else ""
        text.append(f"\n{label:>{margin - 1}} ", style=QUIET)
        for cell, style in zip(bits[row], styles[row], strict=True):
            sign = " .*"[cell] if ascii_only else chr(0x2800 + cell) if cell else " "
            text.append(sign, style=style or None)
    return text.append("\n" + " " * margin + _epoch_axis(epochs, marked, columns), style=QUIET)


def _labels(high: float, low: float) -> list[str]:
    """Both numbers with as many digits as tell them apart."""
    for digits in range(3, 9):
        labels = [f"{value:#.{digits}g}".rstrip(".") for value in (high, low)]
        if labels[0] != labels[1]:
            break
    return labels if high > low else [f"{high:#.4g}".rstrip("."), ""]


def _dots(
    values: Sequence[float], epochs: int, low: float, high: float, columns: int, rows: int
) -> list[tuple[int, int]]:
    """The dots (x, y) of one curve, y from the top, its points joined by lines."""
    known = np.flatnonzero(np.isfinite(values))
    if not len(known):
        return []
    places = known * (columns - 1) / max(epochs - 1, 1)
    x = np.arange(round(places[0]), round(places[-1]) + 1)
    height = (np.interp(x, places, np.asarray(values, float)[known]) - low) / ((high - low) or 1.0)
    y = np.round((1 - height) * (rows - 1)).astype(int)
    before = np.concatenate([y[:1], y[:-1]])
    return [
        (int(column), row)
        for column, a, b in zip(x, before, y, strict=True)
        for row in (range(a + 1, b + 1) if a < b else range(b, a) if a > b else (b,))
    ]


def _epoch_axis(epochs: int, marked: int | None, columns: int) -> str:
    """The first and the last epoch, and the best one under its place; what would lie over another is left out."""
    line = [" "] * columns

    def put(place: int, label: str) -> None:
        place = max(0, min(place, columns - len(label)))
        if not "".join(line[max(0, place - 1) : place + len(label) + 1]).strip():
            line[place : place + len(label)] = label

    if marked is not None:
        place = round((marked - 1) * (columns - 1) / max(epochs - 1, 1))
        label = f"^ best: {marked}"
        # To the left of its place where there is no room on the right.
        put(*((place, label) if place + len(label) <= columns else (place - len(label) + 1, f"best: {marked} ^")))
    put(0, "1")
    if epochs > 1:
        put(columns, str(epochs))
    return "".join(line).rstrip()


if __name__ == "__main__":
    main()
