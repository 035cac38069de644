"""The events of a training for TensorBoard, written by its own package: no TensorFlow, whichever backend trains.

One file holds all epochs. A training that goes on cuts off what its checkpoint does not know of, and so has no point
twice; the file then takes a new name, for a TensorBoard that is reading the old one to begin again.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import HistogramProto, Summary
from tensorboard.summary.writer.record_writer import RecordWriter

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PREFIX = "events.out.tfevents."
_BUCKETS = 30
_DPI = 100


class EventLog:
    """TensorBoard's file of a run folder, from `kept_bytes` on; `size` is what to hand in there to go on from here."""

    def __init__(self, run_dir: Path, kept_bytes: int = 0) -> None:
        before = sorted(run_dir.glob(f"{_PREFIX}*"))
        number = int(before[-1].name.split(".")[3]) + 1 if before else 0
        path = run_dir / f"{_PREFIX}{number:06d}.perpcast"
        if kept_bytes and before:
            with before.pop().open("r+b") as stream:
                stream.truncate(min(kept_bytes, stream.seek(0, io.SEEK_END)))
            Path(stream.name).replace(path)
        for old in before:
            old.unlink()
        self._stream = path.open("ab")
        self._records = RecordWriter(self._stream)
        if not self.size:
            self._write(Event(file_version="brain.Event:2", wall_time=path.stat().st_mtime))

    def __enter__(self) -> "EventLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stream.close()

    @property
    def size(self) -> int:
        """Bytes of all that has been written."""
        return self._stream.tell()

    def write_epoch(
        self,
        epoch: int,
        time_seconds: float,
        scalars: Mapping[str, float],
        histograms: Mapping[str, np.ndarray],
        pictures: Mapping[str, "Figure"],
    ) -> None:
        """What belongs to an epoch, by tag; `time_seconds` is its end, in seconds of UTC."""
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        values += [Summary.Value(tag=tag, histo=_histogram(data)) for tag, data in histograms.items()]
        values += [Summary.Value(tag=tag, image=_image(figure)) for tag, figure in pictures.items()]
        self._write(Event(wall_time=time_seconds, step=epoch, summary=Summary(value=values)))

    def _write(self, event: Event) -> None:
        self._records.write(event.SerializeToString())
        self._records.flush()


def _histogram(data: np.ndarray) -> HistogramProto:
    data = np.asarray(data, np.float64).ravel()
    counts, edges = np.histogram(data, _BUCKETS)
    return HistogramProto(
        min=data.min(),
        max=data.max(),
        num=len(data),
        sum=data.sum(),
        sum_squares=np.square(data).sum(),
        bucket_limit=edges[1:],
        bucket=counts,
    )


def _image(figure: "Figure") -> Summary.Image:
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=_DPI)
    width, height = (round(inches * _DPI) for inches in figure.get_size_inches())
    return Summary.Image(height=height, width=width, colorspace=4, encoded_image_string=png.getvalue())
