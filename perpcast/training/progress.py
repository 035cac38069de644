"""The run folder as others see it while a training runs: `history.jsonl`, a line an epoch, and `progress.json`.

`monitor_training.py` reads them in another process, so that everything here is written whole or appended by lines, and
a line that is only half there is not there. No Keras.
"""

import json
import math
import os
import resource
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

State = Literal["running", "done", "stopped", "failed"]

# One value an epoch each: losses of the training windows (with dropout, while they were learnt) and of V1 (after the
# epoch), the learning rate after it, the mean norm of the gradients before clipping, training windows per second (the
# first step of a process, which compiles, left out), seconds with everything, and the peak memory of the process.
COLUMNS = ("loss", "val_loss", "learning_rate", "gradient_norm", "samples_per_second", "seconds", "memory_mb")

_HISTORY, _PROGRESS = "history.jsonl", "progress.json"


@dataclass(frozen=True)
class Progress:
    """Where a training stands. `stopped` is one that V1 ended before its last epoch; `cause` says why it ended."""

    state: State
    cause: str
    epoch: int  # the one that runs, from 1; the last one where none does
    epochs: int
    step: int
    steps: int  # of all epochs
    samples_per_second: float
    elapsed_seconds: float  # of all processes that took part, as far as their epochs were kept
    memory_mb: float  # the most that this process has held
    pid: int
    device: str
    loss: float | None  # mean over the steps of this epoch so far; None where there is none, or it is not a number


def write_progress(run_dir: Path, progress: Progress) -> None:
    """Replaces `progress.json`, whole at every moment."""
    aside = run_dir / f"{_PROGRESS}.aside"
    fields = asdict(progress)
    if progress.loss is not None and not math.isfinite(progress.loss):
        fields["loss"] = None
    aside.write_text(json.dumps(fields, indent=1), encoding="utf-8")
    aside.replace(run_dir / _PROGRESS)


def read_progress(run_dir: Path) -> Progress | None:
    """Where the training stands that writes to this folder; None where there is none."""
    try:
        return Progress(**json.loads((run_dir / _PROGRESS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def append_epoch(run_dir: Path, epoch: int, values: Mapping[str, float]) -> float:
    """Adds the line of an epoch, from 1; returns the time of that by the file system's clock, in seconds of UTC."""
    with (run_dir / _HISTORY).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps({"epoch": epoch, **values}) + "\n")
        stream.flush()
        return os.fstat(stream.fileno()).st_mtime


def rewrite_history(run_dir: Path, history: Mapping[str, Sequence[float]]) -> None:
    """Makes these epochs all that `history.jsonl` holds: a killed process may have written more than it kept."""
    aside = run_dir / f"{_HISTORY}.aside"
    epochs = zip(*history.values(), strict=True)
    lines = [json.dumps({"epoch": n, **dict(zip(history, row, strict=True))}) + "\n" for n, row in enumerate(epochs, 1)]
    aside.write_text("".join(lines), encoding="utf-8")
    aside.replace(run_dir / _HISTORY)


def read_history(run_dir: Path) -> dict[str, list[float]]:
    """One list for each of COLUMNS, a value an epoch; empty ones where no epoch has ended."""
    rows: list[dict[str, float]] = []
    try:
        text = (run_dir / _HISTORY).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        text = ""
    for line in text.splitlines():
        try:
            row = json.loads(line)
            rows.append({name: float(row[name]) for name in COLUMNS})
        except (ValueError, KeyError, TypeError):
            break  # being written at this moment
    return {name: [row[name] for row in rows] for name in COLUMNS}


def peak_memory_mb() -> float:
    """The most memory that this process has held at once."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1024 / (1024 if sys.platform == "darwin" else 1)
