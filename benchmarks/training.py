"""Training steps of our network beside two libraries' Temporal Fusion Transformers: python -m benchmarks.training

One task for all: 60 steps, 49 real inputs, 51 symbols, two outputs; width, heads and dropout of config.yaml; float32,
squared error and Adam, on the CPU. Each network has a process of its own and one batch in memory; loaders are left out.
Every network is visited in two rounds, so that none has the machine's best minute for itself. The libraries have a
decoder always, here of one step that reads one input; neuralforecast is given the symbol as a number. Time-shared
dropout is a part of ours in every form.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.download import peak_mb
from perpcast.config import ModelSettings, load_settings
from perpcast.task import Target, Task

ROOT = Path(__file__).parents[1]
PEERS = ROOT / "benchmarks" / "peers" / ".venv" / "bin" / "python"
SETTINGS = load_settings([ROOT / "config.yaml"])
STEPS, OBSERVED, KNOWN, SYMBOLS = 60, 48, 1, 51
BATCHES = (64, 256)
ROUNDS = 2
COMPILE_SECONDS = 90  # torch.compile is given this long, with its few steps


@dataclass(frozen=True)
class Entry:
    """A network to measure: who, in which form, and the changes that make the form."""

    who: str  # ours, pytorch-forecasting, neuralforecast
    form: str
    batch: int
    changes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def peer(self) -> bool:
        """Whether it runs in the libraries' environment."""
        return self.who != "ours"


def entries() -> list[Entry]:
    """What is measured, in the order of the table; other forms of ours than the default at one batch size."""
    found = []
    for batch in BATCHES:
        found.append(Entry("ours", "as config.yaml has it", batch))
        if batch == BATCHES[0]:
            found += [Entry("ours", name, batch, changes) for name, changes in deviations(SETTINGS.model)]
        found += [
            Entry("pytorch-forecasting", "hidden_continuous_size = d_model", batch),
            Entry("pytorch-forecasting", "hidden_continuous_size = 16", batch, {"hidden_continuous": 16}),
            Entry("neuralforecast", "", batch),
        ]
    compiled = {"compiled": True}
    return found + [
        Entry(who, "torch.compile", BATCHES[0], compiled) for who in ("pytorch-forecasting", "neuralforecast")
    ]


def deviations(default: ModelSettings) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every form that differs from the default in one thing; stacked selection has the paper's full width only."""
    if default.variable_selection == "fused":
        yield "stacked variable selection", {"variable_selection": "stacked", "vsn_rank": None}
    else:
        yield "fused variable selection", {"variable_selection": "fused"}
    for rank in (None, 16, 8):
        if rank != default.vsn_rank:
            yield f"vsn_rank {rank or 'null'}", {"variable_selection": "fused", "vsn_rank": rank}
    yield f"XLA {'off' if default.xla else 'on'}", {"xla": not default.xla}


def measure(seconds: float = 20.0, only: Sequence[Entry] | None = None) -> Table:
    """Visits every entry in each round and compares medians over both.

    A visit times 8 steps and a quarter of `seconds` at the least, and stops after `seconds` in any case.
    """
    listed = list(entries() if only is None else only)
    found: dict[int, list[dict[str, Any]]] = {number: [] for number in range(len(listed))}
    problems: dict[int, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = {batch: write_batch(Path(folder) / f"{batch}.npz", batch) for batch in {e.batch for e in listed}}
        for turn in range(ROUNDS):
            for number, entry in enumerate(listed):
                # What torch.compile brings is for information: it is tried once.
                if number in problems or (turn and entry.changes.get("compiled")):
                    continue
                answer = visit(entry, paths[entry.batch], seconds)
                if isinstance(answer, str):
                    problems[number] = answer
                else:
                    found[number].append(answer)
    return _table(listed, found, problems)


def write_batch(path: Path, batch: int) -> Path:
    """One batch of noise, the same for every network."""
    rng = np.random.default_rng(7)
    arrays = {
        "observed": rng.standard_normal((batch, STEPS, OBSERVED), np.float32),
        "known": rng.standard_normal((batch, STEPS + 1, KNOWN), np.float32),
        "static_categories": rng.integers(0, SYMBOLS, (batch, 1), np.int32),
        "targets": rng.standard_normal((batch, 2), np.float32),
    }
    np.savez(path, allow_pickle=False, **arrays)
    return path


def visit(entry: Entry, batch: Path, seconds: float) -> dict[str, Any] | str:
    """A process for one network; what it measured, or why it measured nothing."""
    model = SETTINGS.model
    told: dict[str, Any] = {"batch": str(batch), "seconds": seconds, "steps": 8, "learning_rate": 1e-3, "seed": 7}
    if entry.peer:
        if not PEERS.exists():
            return "their environment is absent: make benchmarks/peers/.venv/.done"
        shape: dict[str, Any] = {
            "encoder_steps": STEPS,
            "decoder_steps": 1,
            "observed": OBSERVED,
            "known": KNOWN,
            "outputs": 2,
        }
        shape |= {"static_categories": [SYMBOLS], "d_model": model.d_model, "num_heads": model.num_heads}
        told |= {"library": entry.who, "shape": shape | {"dropout": model.dropout}, "threads": os.cpu_count()}
        told |= {"hidden_continuous": None, "compiled": False} | dict(entry.changes)
    else:
        told["changes"] = dict(entry.changes)
    python, module = (PEERS, "benchmarks.peers.speed") if entry.peer else (sys.executable, "benchmarks.training")
    limit = None
    if told.get("compiled"):
        limit, told["seconds"] = COMPILE_SECONDS, min(seconds, 5.0)
    try:
        run = subprocess.run(
            [python, "-m", module, *([] if entry.peer else ["--visit"]), json.dumps(told)],
            cwd=ROOT,
            env={**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"},
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"not done within {limit} s"
    if run.returncode:
        return (run.stderr.strip().splitlines() or ["no message"])[-1][:80]
    return json.loads(run.stdout.splitlines()[-1])


def _table(
    listed: Sequence[Entry], found: Mapping[int, Sequence[Mapping[str, Any]]], problems: Mapping[int, str]
) -> Table:
    model = SETTINGS.model
    table = Table(
        f"training, d_model {model.d_model}, {model.num_heads} heads",
        *("form", "batch", "samples/s", "best", "first step", "parameters", "peak memory"),
        *("x pytorch-forecasting", "x neuralforecast"),
    )
    medians = {
        number: listed[number].batch / statistics.median(s for visit in visits for s in visit["spent"])
        for number, visits in found.items()
        if visits
    }

    def ratio(number: int, peer: str) -> str:
        """To the peer's plain form at the same batch size."""
        for other, median in medians.items():
            entry = listed[other]
            if entry.who == peer and entry.batch == listed[number].batch and not entry.changes:
                return f"{medians[number] / median:.1f}"
        return ""

    for number, entry in enumerate(listed):
        visits = found[number]
        if not visits:
            table.add_row(entry.who, entry.form, str(entry.batch), problems.get(number, ""))
            continue
        best = entry.batch / min(s for visit in visits for s in visit["spent"])
        table.add_row(
            *(entry.who, entry.form, str(entry.batch), f"{medians[number]:,.0f}", f"{best:,.0f}"),
            f"{min(visit['first'] for visit in visits):.1f} s",
            f"{visits[0]['parameters'] / 1e6:.2f} M",
            f"{max(visit['peak_mb'] for visit in visits) / 1024:.1f} GB",
            *(ratio(number, "pytorch-forecasting"), ratio(number, "neuralforecast")),
        )
    return table


# --- what the processes do --------------------------------------------------------------------------------------------


def _visit(told: Mapping[str, Any]) -> None:
    import keras

    from perpcast.models import build_model

    keras.utils.set_random_seed(told["seed"])
    settings = SETTINGS.model.model_copy(update=told["changes"])
    network = build_model(_task(), settings, precision="float32")
    network.compile(
        optimizer=keras.optimizers.Adam(told["learning_rate"]), loss="mean_squared_error", jit_compile=settings.xla
    )
    network.optimizer.build(network.trainable_variables)
    with np.load(told["batch"]) as arrays:
        inputs = dict(arrays)
    inputs["known"] = inputs["known"][:, :STEPS]  # ours needs no step after the last observed one
    targets = inputs.pop("targets")

    def step() -> float:
        begun = time.perf_counter()
        network.train_on_batch(inputs, targets)
        return time.perf_counter() - begun

    # The second step still sets things up; the libraries' second one is left out as well.
    first, _ = step(), step()
    spent = [step()]
    while not (sum(spent) >= told["seconds"] or (len(spent) >= told["steps"] and sum(spent) >= told["seconds"] / 4)):
        spent.append(step())
    found = {"first": first, "spent": spent, "parameters": network.count_params(), "peak_mb": peak_mb()}
    print(json.dumps(found), flush=True)


def _task() -> Task:
    """49 inputs and two outputs of no meaning."""
    return Task(
        interval="15",
        lookback=STEPS,
        feature_set="noise",
        static=("symbol",),
        known=tuple(f"known_{number}" for number in range(KNOWN)),
        observed=tuple(f"observed_{number}" for number in range(OBSERVED)),
        targets=(Target("buy", "regression", 1), Target("sell", "regression", 1)),
        exit_policies={},
        symbols=tuple(f"S{number}" for number in range(SYMBOLS)),
    )


@click.command(epilog="\b\nExample:\n  python -m benchmarks.training")
@click.option("--seconds", default=20.0, show_default=True, help="Timed at most on each of the two visits.")
@click.option("--batch", type=int, multiple=True, help="Only these batch sizes.")
@click.option("--only", multiple=True, help="Only networks whose name or form contains this.")
@click.option("--visit", "told", hidden=True)
def main(seconds: float, batch: tuple[int, ...], only: tuple[str, ...], told: str | None) -> None:
    """Measure training steps: ours, pytorch-forecasting's and neuralforecast's. About twelve minutes."""
    if told is not None:
        _visit(json.loads(told))
        return
    listed = [
        entry
        for entry in entries()
        if (not batch or entry.batch in batch)
        and (not only or any(word in f"{entry.who} {entry.form}" for word in only))
    ]
    console = Console(width=None if sys.stdout.isatty() else 160)
    with console.status("measuring"):
        found = measure(seconds, listed)
    console.print(found)


if __name__ == "__main__":
    main()
