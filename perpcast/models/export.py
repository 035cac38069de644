"""A network as ONNX: whole, and in the two parts that a runner computes; refused where onnxruntime answers otherwise.

That an export ran through proves nothing: what came out is loaded, and compared with Keras on given and on random
windows, in values and in decisions.
"""

import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import onnx
import onnxruntime

from perpcast.bundle import RUN_BARS, open_session
from perpcast.errors import DataError
from perpcast.models.tft import TemporalFusionTransformer

# In units of the raw columns: of scaled labels, whose deviation is 1, or of logits.
TOLERANCE = 1e-4
BATCHES = (1, 51)

_THREADS = (2, 1)
# Enough for a 99th percentile, unless it would take longer than that.
_RUNS, _SECONDS = 300, 1.5

Inputs = Mapping[str, np.ndarray]  # observed [n, T, F], known [n, T, K], static_categories [n, 1]; scaled
Decide = Callable[[np.ndarray], np.ndarray]  # raw columns [n, columns] to what is done about each window [n, ...]


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one prediction by step and readout, over `runs` of them."""

    windows: int
    new_bars: int  # of each window; the embeddings of the others are at hand
    threads: int
    p50_ms: float
    p99_ms: float
    runs: int


@dataclass(frozen=True)
class Latency:
    """How long the networks of an export take on this machine; what surrounds them in a bundle is not in it."""

    timings: tuple[Timing, ...]

    def rows(self) -> list[tuple[str, ...]]:
        """A table for a reader, its titles first."""
        titles = ("windows", "new bars of each", "threads", "p50 ms", "p99 ms", "runs")
        return [
            titles,
            *(
                (str(t.windows), str(t.new_bars), str(t.threads), f"{t.p50_ms:.2f}", f"{t.p99_ms:.2f}", str(t.runs))
                for t in self.timings
            ),
        ]

    def to_json(self) -> list[dict[str, Any]]:
        """Plain numbers."""
        return [asdict(timing) for timing in self.timings]


@dataclass(frozen=True)
class Exported:
    """Three networks as ONNX with a free batch size; the largest difference of any from Keras; their speed."""

    model: bytes
    step: bytes
    readout: bytes
    difference: float
    latency: Latency


def export_onnx(
    network: TemporalFusionTransformer, inputs: Inputs, decide: Decide, *, symbols: int = 51, seed: int = 0
) -> Exported:
    """The network in float32 with fused variable selection, checked; timed for one window and for one of each symbol.

    `inputs` are at least 51 scaled windows; random ones are drawn beside them. Raises DataError where an export holds
    an operator that onnxruntime lacks, where a raw column differs from Keras by more than TOLERANCE, and where a
    decision differs although no column is within TOLERANCE of one at which it changes.
    """
    if keras.backend.backend() != "tensorflow":
        raise DataError(f"only the TensorFlow backend exports to ONNX, this one is {keras.backend.backend()}")
    if len(inputs["observed"]) < max(BATCHES):
        raise ValueError(f"inputs must be at least {max(BATCHES)} windows, received {len(inputs['observed'])}")
    exact = network.fused()
    step, readout = exact.split()
    few = {name: values[:1] for name, values in inputs.items()}
    graphs = _Graphs(
        _to_onnx("model", exact, few),
        _to_onnx("step", step, _bars(few)),
        _to_onnx("readout", readout, {**_static(few), "embeddings": _embeddings(step, few)}),
    )
    # Of a network in mixed precision, the float32 form is the exact one.
    mixed = any(layer.compute_dtype != "float32" for layer in network.layers)
    reference = exact if mixed else network
    difference = max(_check(reference, graphs, windows, decide) for windows in _samples(inputs, seed))
    return Exported(graphs.model, graphs.step, graphs.readout, difference, _latency(graphs, inputs, symbols))


class _Graphs:
    """The three networks, in onnxruntime."""

    def __init__(self, model: bytes, step: bytes, readout: bytes) -> None:
        self.model, self.step, self.readout = model, step, readout
        self._sessions = [open_session(graph) for graph in (model, step, readout)]

    def whole(self, inputs: Inputs) -> np.ndarray:
        """Raw columns by the whole network: [n, columns]."""
        return _run(self._sessions[0], None, inputs)

    def parts(self, inputs: Inputs) -> np.ndarray:
        """Raw columns by step and readout."""
        n, bars = inputs["observed"].shape[:2]
        embeddings = _run(self._sessions[1], "embedding", _bars(inputs)).reshape(n, bars, -1)
        return _run(self._sessions[2], "outputs", {**_static(inputs), "embeddings": embeddings})


def _to_onnx(name: str, network: keras.Model, inputs: Inputs) -> bytes:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        # Keras asks numpy for a name that numpy no longer has, to give it back to tf2onnx.
        warnings.filterwarnings("ignore", "In the future `np.object`", FutureWarning)
        network(inputs)  # Keras exports only what has been called
        path = Path(folder) / f"{name}.onnx"
        network.export(path, format="onnx", verbose=False)
        content = path.read_bytes()
    # tf2onnx leaves in what it cannot translate, and reports success.
    operators = set(_operators(onnx.load_from_string(content).graph))
    if lacking := sorted(name for name in operators if name == "Erfc" or name.startswith(("TensorList", "Cudnn"))):
        raise DataError(f"{name}.onnx holds {', '.join(lacking)}, which onnxruntime does not have: write it otherwise")
    return content


def _operators(graph: onnx.GraphProto) -> Iterator[str]:
    """The types of all operators, those inside loops and branches too."""
    for node in graph.node:
        yield node.op_type
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _operators(inner)


def _static(inputs: Inputs) -> dict[str, np.ndarray]:
    return {"static_categories": inputs["static_categories"]}


def _bars(inputs: Inputs) -> dict[str, np.ndarray]:
    """Every bar of every window, as the step wants them: [n T, F + K] and the symbol of each."""
    bars = np.concatenate([inputs["observed"], inputs["known"]], axis=-1)
    codes = np.repeat(inputs["static_categories"], bars.shape[1], axis=0)
    return {"bars": bars.reshape(-1, bars.shape[-1]), "static_categories": codes}


def _embeddings(step: keras.Model, inputs: Inputs) -> np.ndarray:
    n, bars = inputs["observed"].shape[:2]
    return np.asarray(keras.ops.convert_to_numpy(step(_bars(inputs))["embedding"])).reshape(n, bars, -1)


def _samples(inputs: Inputs, seed: int) -> Iterator[Inputs]:
    """Batches of the given windows, and of random ones with fat tails."""
    rng = np.random.default_rng(seed)
    for size in BATCHES:
        given = {name: values[:size] for name, values in inputs.items()}
        yield given
        drawn = {name: rng.standard_t(4, given[name].shape).astype(np.float32) for name in ("observed", "known")}
        yield {**drawn, "static_categories": rng.permutation(inputs["static_categories"])[:size]}


def _check(reference: keras.Model, graphs: _Graphs, inputs: Inputs, decide: Decide) -> float:
    """The largest difference of whole and parts from Keras. Raises DataError for one that is too large."""
    # On the processor: a GPU multiplies float32 in a shorter format.
    with keras.device("cpu:0"):
        expected = np.asarray(keras.ops.convert_to_numpy(reference(inputs, training=False)))
    wanted, undecided = np.asarray(decide(expected)), _undecided(expected, decide)
    largest = 0.0
    for name, received in (("network", graphs.whole(inputs)), ("pair of step and readout", graphs.parts(inputs))):
        difference = float(np.max(np.abs(received - expected)))
        if not difference <= TOLERANCE:
            raise DataError(
                f"the exported {name} differs from Keras by {difference:.2g} in {len(expected)} windows, "
                f"at most {TOLERANCE} is allowed"
            )
        changed = _differs(np.asarray(decide(received)), wanted)
        if count := int(np.sum(changed & ~undecided)):
            raise DataError(
                f"the exported {name} decides {count} of {len(expected)} windows otherwise than Keras, although it "
                f"differs by {difference:.2g} only and they are further than {TOLERANCE} from the threshold"
            )
        largest = max(largest, difference)
    return largest


def _undecided(raw: np.ndarray, decide: Decide) -> np.ndarray:
    """Windows [n] whose decision a change of one column by TOLERANCE changes: both answers are right."""
    wanted, undecided = np.asarray(decide(raw)), np.zeros(len(raw), bool)
    for column in range(raw.shape[1]):
        for change in (-TOLERANCE, TOLERANCE):
            moved = raw.copy()
            moved[:, column] += change
            undecided |= _differs(np.asarray(decide(moved)), wanted)
    return undecided


def _differs(decided: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    return np.any(np.reshape(decided != wanted, (len(wanted), -1)), axis=1)


def _latency(graphs: _Graphs, inputs: Inputs, symbols: int) -> Latency:
    """Every bar new, as after a start, and one new bar of each window, as after every other bar."""
    rows = np.resize(np.arange(len(inputs["observed"])), symbols)
    every = {name: values[rows] for name, values in inputs.items()}
    lookback = every["observed"].shape[1]
    timings = []
    for threads in _THREADS:
        step, readout = (open_session(graph, threads) for graph in (graphs.step, graphs.readout))
        for windows in dict.fromkeys((1, symbols)):
            batch = {name: values[:windows] for name, values in every.items()}
            bars = _bars(batch)
            embeddings = _run(step, "embedding", bars).reshape(windows, lookback, -1)
            feed = {**_static(batch), "embeddings": embeddings}
            for new_bars in (lookback, 1):
                new = {name: values[: windows * new_bars] for name, values in bars.items()}
                timings.append(Timing(windows, new_bars, threads, *_time(step, new, readout, feed)))
    return Latency(tuple(timings))


def _time(
    step: onnxruntime.InferenceSession, bars: Inputs, readout: onnxruntime.InferenceSession, feed: Inputs
) -> tuple[float, float, int]:
    """p50 and p99 in milliseconds and the number of runs, after one to warm up."""
    parts = [
        {name: values[first : first + RUN_BARS] for name, values in bars.items()}
        for first in range(0, len(bars["bars"]), RUN_BARS)
    ]
    took: list[float] = []
    while len(took) <= _RUNS and sum(took) < _SECONDS:
        begun = time.perf_counter()
        for part in parts:
            _run(step, "embedding", part)
        _run(readout, "outputs", feed)
        took.append(time.perf_counter() - begun)
    p50, p99 = np.percentile(took[1:] or took, [50, 99]) * 1000
    return float(p50), float(p99), len(took[1:] or took)


def _run(session: onnxruntime.InferenceSession, output: str | None, inputs: Inputs) -> np.ndarray:
    return np.asarray(session.run([output] if output else None, dict(inputs))[0])
