"""Prediction at full size: the exported networks beside Keras, for one window and for one of each symbol.

    python -m benchmarks.inference

d_model 128, 8 heads, 60 bars, the real inputs, the configured symbols; weights as drawn, for the time does not depend
on them. Every way is called again and again, each call with the next bar. A runner calls once a bar, when the processor
has long forgotten the network: "after a pause" is that.
"""

import inspect
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.download import peak_mb
from perpcast.bundle import Bundle, BundleParts, open_session, save_bundle
from perpcast.config import ModelSettings, load_settings
from perpcast.exit_policy import ExitPolicy
from perpcast.features.inputs import KNOWN, OBSERVED
from perpcast.features.scaler import Scaler
from perpcast.market import SIDES
from perpcast.outputs import OutputReading, ReturnReading
from perpcast.task import Task
from perpcast.training.dataset import regression_task

ROOT = Path(__file__).parents[1]
LOOKBACK = 60
COLUMNS = (*OBSERVED, *KNOWN)
WIDTHS = (None, 16)  # of each variable's own network: the paper's, and a narrow one
# Calls of a way, unless they take longer than that; every call has a bar of its own.
CALLS, SECONDS = 400, 6.0
PAUSE_SECONDS = 0.1
# A process that only predicts: its peak memory before and after, in megabytes, and the seconds of loading.
MEMORY = """
import resource, sys, time
from pathlib import Path
import numpy as np
from perpcast.bundle import load_bundle
{peak_mb}
imported = peak_mb()
begun = time.perf_counter()
bundle = load_bundle(sys.argv[1])
seconds = time.perf_counter() - begun
task, draw = bundle.task, np.random.default_rng(0).normal
for _ in range(3):
    shapes = ((len(task.symbols), task.lookback, len(names)) for names in (task.observed, task.known))
    bundle.predict(*(draw(size=shape) for shape in shapes), task.symbols)
print(imported, peak_mb(), seconds)
"""

Call = Callable[[int], object]


def measure() -> Table:
    """p50 and p99 of every way and width, and the memory of a process that only predicts."""
    table = Table(
        "vsn_rank", "windows", "way", "p50 ms", "p99 ms", "calls", "Keras / it", title="prediction, d_model 128"
    )
    for column in (0, 1, 3, 4, 5, 6):
        table.columns[column].justify = "right"
    for rank in WIDTHS:
        _measure_width(table, rank)
    return table


def _measure_width(table: Table, rank: int | None) -> None:
    from perpcast.models import build_model
    from perpcast.models.export import export_onnx

    settings = load_settings([ROOT / "config.yaml"])
    policies = {side: ExitPolicy.from_config(settings.risk_profile, settings.fees, side) for side in SIDES}
    task = regression_task("15", LOOKBACK, 100, settings.data_download.symbols, policies)
    size = {"d_model": 128, "num_heads": 8, "vsn_rank": rank, "variable_selection": "fused", "precision": "float32"}
    network = build_model(task, ModelSettings(**{**settings.model.model_dump(), **size}))
    rows = np.random.default_rng(0).normal(size=(len(task.symbols), LOOKBACK + CALLS, len(COLUMNS))).astype(np.float32)
    exported = export_onnx(network, _feed(rows, 0), lambda raw: raw[:, 0] > 0, symbols=len(task.symbols))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bundle"
        bundle = save_bundle(path, _bundle_parts(task, exported, rows))
        for windows in (1, len(task.symbols)):
            keras_p50 = 0.0
            for way, (call, pause) in _ways(network, exported.model, bundle, rows[:windows]).items():
                p50, p99, calls = _time(call, pause)
                keras_p50 = keras_p50 or p50
                row = (str(rank), str(windows), way, f"{p50:.2f}", f"{p99:.2f}", str(calls), f"{keras_p50 / p50:.1f} x")
                table.add_row(*row)
            table.add_section()
        command = [sys.executable, "-c", MEMORY.format(peak_mb=inspect.getsource(peak_mb)), str(path)]
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    imported, loaded, seconds = (float(number) for number in ran.stdout.split())
    sizes = sum(len(graph) for graph in (exported.model, exported.step, exported.readout)) / 2**20
    table.add_row(str(rank), "", f"process: {imported:.0f} MB, with the bundle {loaded:.0f} MB")
    table.add_row(str(rank), "", f"bundle: {sizes:.1f} MB of ONNX, loaded and checked in {seconds:.2f} s")
    table.add_section()


def _bundle_parts(task: Task, exported: Any, rows: np.ndarray) -> BundleParts:
    """A bundle that takes its inputs as they are."""
    golden = rows[:3, :LOOKBACK]
    plain = ReturnReading(0.0, 1.0)
    return BundleParts(
        model=exported.model,
        step=exported.step,
        readout=exported.readout,
        task=task,
        scaler=Scaler(COLUMNS, (0.0,) * len(COLUMNS), (1.0,) * len(COLUMNS)),
        reading=OutputReading(task, (plain,) * len(task.targets)),
        threshold=0.0,
        card={},
        card_text="",
        golden=(golden[..., : len(OBSERVED)], golden[..., len(OBSERVED) :], task.symbols[:3]),
    )


def _ways(network: Any, model: bytes, bundle: Bundle, rows: np.ndarray) -> dict[str, tuple[Call, float]]:
    """What is called with the number of a call, and the seconds to wait before it, by name; Keras first."""
    whole = open_session(model, threads=2)

    def by_bundle(bar: int) -> object:
        window = rows[:, bar : bar + LOOKBACK]
        return bundle.predict(
            window[..., : len(OBSERVED)], window[..., len(OBSERVED) :], bundle.task.symbols[: len(rows)]
        )

    return {
        "Keras predict_on_batch": (lambda bar: network.predict_on_batch(_feed(rows, bar)), 0.0),
        "model.onnx": (lambda bar: whole.run(None, _feed(rows, bar)), 0.0),
        "bundle, all bars new": (lambda bar: by_bundle(bar * LOOKBACK % (CALLS - CALLS % LOOKBACK)), 0.0),
        "bundle, one new bar": (by_bundle, 0.0),
        "bundle, one new bar, after a pause": (by_bundle, PAUSE_SECONDS),
    }


def _feed(rows: np.ndarray, bar: int) -> dict[str, np.ndarray]:
    """The windows of every symbol that begin at one bar, scaled as they are."""
    window = rows[:, bar : bar + LOOKBACK]
    codes = np.arange(len(rows), dtype=np.int32)[:, None]
    split = len(OBSERVED)
    return {"observed": window[..., :split], "known": window[..., split:], "static_categories": codes}


def _time(call: Call, pause: float) -> tuple[float, float, int]:
    """p50 and p99 in milliseconds and the number of calls, after two to warm up."""
    took: list[float] = []
    begun = time.perf_counter()
    while len(took) < 3 or (len(took) < CALLS and time.perf_counter() - begun < SECONDS):
        time.sleep(pause)
        called = time.perf_counter()
        call(len(took))
        took.append(time.perf_counter() - called)
    p50, p99 = np.percentile(took[2:], [50, 99]) * 1000
    return float(p50), float(p99), len(took) - 2


@click.command(epilog="\b\nExample:\n  python -m benchmarks.inference")
def main() -> None:
    """Measure predictions of the exported networks beside Keras."""
    Console(width=None if sys.stdout.isatty() else 140).print(measure())


if __name__ == "__main__":
    main()
