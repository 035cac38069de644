"""Reads back what a training wrote for TensorBoard, with TensorBoard's own reader."""

from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat.proto.summary_pb2 import Summary


def summaries_of(run_dir: Path) -> dict[str, list[tuple[int, float, Summary.Value]]]:
    """By tag: step, time in seconds and value of everything in the folder's event files, in the order of writing."""
    found: dict[str, list[tuple[int, float, Summary.Value]]] = {}
    for path in sorted(run_dir.glob("events.out.tfevents.*")):
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, event.wall_time, value))
    return found


def points_of(run_dir: Path) -> dict[str, list[tuple[int, np.float32]]]:
    """By tag: step and number; of a histogram or a picture only the step counts."""
    return {
        tag: [(step, np.float32(value.simple_value)) for step, _, value in found]
        for tag, found in summaries_of(run_dir).items()
    }
