"""The checkpoint of a training: everything that the epochs to come depend on, in one file without pickle.

It is written aside, synced and renamed, so that a file which exists is whole; a file which is not has been damaged by
something else, and is refused: hours of training are not thrown away without being asked.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from perpcast.errors import DataError
from perpcast.kill_point import kill_point

_NAME = "checkpoint.npz"
_ARRAYS = ("network", "optimizer", "best")
_mid_write = kill_point("train.ckpt_mid_write")
_before_rename = kill_point("train.ckpt_before_rename")
_after_rename = kill_point("train.ckpt_after_rename")


@dataclass(frozen=True)
class Checkpoint:
    """A training after `epoch` epochs. Which windows come next depends on the seed and the epoch alone."""

    run: str  # fingerprint of data, settings and code: what the checkpoint may be continued with
    epoch: int
    history: Mapping[str, Sequence[float]]
    best_loss: float
    waited: int  # epochs since then
    constant: int  # epochs in a row whose predictions did not differ
    events_bytes: int  # how much of TensorBoard's file belongs to these epochs
    network: Sequence[np.ndarray]  # every variable, the states of its random generators among them
    optimizer: Sequence[np.ndarray]
    best: Sequence[np.ndarray]  # weights of the epoch with the lowest loss on V1


def save_checkpoint(run_dir: Path, checkpoint: Checkpoint) -> None:
    """Replaces the run folder's checkpoint; at every moment the old one or the new one is there, whole."""
    plain = {field.name: getattr(checkpoint, field.name) for field in fields(checkpoint) if field.name not in _ARRAYS}
    arrays = {f"{part}_{n}": value for part in _ARRAYS for n, value in enumerate(getattr(checkpoint, part))}
    counts = {part: len(getattr(checkpoint, part)) for part in _ARRAYS}
    aside = run_dir / f"{_NAME}.aside"
    with aside.open("wb") as stream:
        text: Any = np.array(json.dumps({**plain, "counts": counts}))
        np.savez(stream, allow_pickle=False, plain=text, **arrays)
        _mid_write()
        stream.flush()
        os.fsync(stream.fileno())
    _before_rename()
    aside.replace(run_dir / _NAME)
    _sync(run_dir)
    _after_rename()


def load_checkpoint(run_dir: Path, run: str) -> Checkpoint | None:
    """The checkpoint of the training `run`; None where the folder has none.

    Raises DataError for a damaged one, and for that of another training.
    """
    path = run_dir / _NAME
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
            values: dict[str, Any] = json.loads(str(stored["plain"]))
            for part, count in values.pop("counts").items():
                values[part] = [stored[f"{part}_{number}"] for number in range(count)]
        checkpoint = Checkpoint(**values)
    except FileNotFoundError:
        return None
    except Exception as error:  # damaged bytes of a zip file raise nearly anything
        raise DataError(
            f"checkpoint {path} is damaged ({error}): delete it, then train again from the beginning"
        ) from None
    if checkpoint.run != run:
        raise DataError(
            f"checkpoint {path} is of another training: expected this dataset, these settings, this version of the "
            "network and this Keras backend; train with --restart to begin anew"
        )
    return checkpoint


def _sync(folder: Path) -> None:
    """A rename is on the disk only when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
