"""The model bundle: a folder that explains itself, and its predictor. onnxruntime only, never Keras or pickle.

model.onnx   the whole network: scaled inputs {observed, known, static_categories} to its raw columns
step.onnx    its first part, of one scaled bar: {bars, static_categories} to {embedding, selection}
readout.onnx its second part, of a window: {embeddings, static_categories} to {outputs, attention}
task.json    task, scaler of the inputs, reading of the raw columns, decision threshold
card.json    where it comes from and how it scored; card.md says the same to a reader
golden.npz   a few inputs and outputs, checked on every loading
SHA256SUMS   of each file, in the form of `sha256sum --check`
"""

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from perpcast.errors import DataError, MissingInputError
from perpcast.features.scaler import Scaler
from perpcast.outputs import OutputReading
from perpcast.task import Task

FILES = ("model.onnx", "step.onnx", "readout.onnx", "task.json", "card.json", "card.md", "golden.npz")
SUMS = "SHA256SUMS"

# In `OutputReading.units`: what another processor or thread count may change, and the two parts against the whole.
GOLDEN_TOLERANCE = 1e-4
# More is computed in parts: memory stays small, and what is worked on stays in the processor's cache.
_RUN_WINDOWS = 128
RUN_BARS = 256
# The networks alone, d_model 128 on two idle cores, p50/p99 ms: 51 symbols 9.6/11.9, by one thread 15.7/18.9; one
# symbol 0.8/1.3, by one thread 0.6/1.1.
_THREADS = 2


@dataclass(frozen=True)
class BundleParts:
    """All that a bundle is written from. `golden` are unscaled inputs: observed, known, symbol names."""

    model: bytes
    step: bytes
    readout: bytes
    task: Task
    scaler: Scaler  # over observed, then known
    reading: OutputReading
    threshold: float
    card: Mapping[str, Any]
    card_text: str
    golden: tuple[np.ndarray, np.ndarray, Sequence[str]]


class Bundle:
    """A loaded model. `predict` takes unscaled inputs and answers in the units of the labels.

    It computes step and readout, never the whole network at once, which is hardly faster for windows that share no bar.
    Most of the work is the step, the variable selection of every single bar. What it answered for the last window of
    each symbol is remembered, so that a closed bar costs one step for each symbol. One caller at a time: the memory has
    no lock.
    """

    def __init__(
        self,
        step: bytes,
        readout: bytes,
        task: Task,
        scaler: Scaler,
        reading: OutputReading,
        threshold: float,
        sha256: str = "",
    ) -> None:
        self.task, self.scaler, self.reading = task, scaler, reading
        self.threshold, self.sha256 = threshold, sha256
        self._code = {symbol: code for code, symbol in enumerate(task.symbols)}
        self._embedder = _Embedder(open_session(step), scaler)
        self._readout = open_session(readout)

    @property
    def bars_embedded(self) -> int:
        """For how many bars the step has been computed so far; all others were remembered."""
        return self._embedder.bars_computed

    def predict(self, observed: np.ndarray, known: np.ndarray, symbols: Sequence[str]) -> dict[str, np.ndarray]:
        """Every output of the task by name, float32 [n], for n windows.

        `observed` [n, lookback, F] and `known` [n, lookback, K] are unscaled model inputs in the order of the task,
        `symbols` n names. What was asked before changes no answer by more than the rounding of float32. Raises
        ValueError for another shape or a value that is not finite, DataError for a symbol that the model was not
        trained on.
        """
        bars, codes = self._checked(observed, known, symbols)
        columns = sum(target.columns for target in self.task.targets)
        raw = np.empty((len(codes), columns), np.float32)
        for part in _parts(len(codes), _RUN_WINDOWS):
            embeddings, _ = self._embedder.embed(bars[part], codes[part])
            raw[part] = self._read(embeddings, codes[part], "outputs", columns)
        return self.reading.read(raw)

    def explain(self, observed: np.ndarray, known: np.ndarray, symbols: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """What the network looks at, for the inputs of `predict`: selection and attention, both float32.

        The selection [n, lookback, F + K] is the weight of each variable in its bar, observed first; the attention
        [n, lookback] is the weight of each bar in the answer, oldest first. Both add up to 1 along their last axis.
        Raises as `predict` does.
        """
        bars, codes = self._checked(observed, known, symbols)
        selection, attention = np.empty_like(bars), np.empty(bars.shape[:2], np.float32)
        for part in _parts(len(codes), _RUN_WINDOWS):
            embeddings, selection[part] = self._embedder.embed(bars[part], codes[part])
            attention[part] = self._read(embeddings, codes[part], "attention", self.task.lookback)
        return selection, attention

    def _read(self, embeddings: np.ndarray, codes: np.ndarray, output: str, columns: int) -> np.ndarray:
        """One output of the readout: [n, columns]."""
        feed = {"embeddings": embeddings, "static_categories": codes[:, None]}
        return _run(self._readout, {output: columns}, feed)

    def _checked(
        self, observed: np.ndarray, known: np.ndarray, symbols: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray]:
        """All inputs of each bar, unscaled, float32 [n, lookback, F + K], and the symbols' codes, int32 [n]."""
        arrays = []
        for name, values, columns in (("observed", observed, self.task.observed), ("known", known, self.task.known)):
            values = np.asarray(values, np.float32)
            expected = (len(symbols), self.task.lookback, len(columns))
            if values.shape != expected:
                raise ValueError(f"{name} must be {list(expected)}, received {list(values.shape)}")
            if not np.isfinite(values).all():
                window, bar, column = np.argwhere(~np.isfinite(values))[0]
                raise ValueError(
                    f"{name} must be finite: {columns[column]} of {symbols[window]} is {values[window, bar, column]} "
                    f"at bar {bar} of its window"
                )
            arrays.append(values)
        unknown = sorted({symbol for symbol in symbols if symbol not in self._code})
        if unknown:
            raise DataError(
                f"the model was not trained on {', '.join(unknown)}; it knows {len(self._code)} symbols: "
                "leave the others out, or train again with them"
            )
        return np.concatenate(arrays, axis=-1), np.array([self._code[symbol] for symbol in symbols], np.int32)


class _Embedder:
    """The step, and a memory of its answers for the last window of each symbol.

    An answer depends on its bar and the symbol alone: where all inputs of a bar equal remembered ones, bit for bit, it
    is the remembered one.
    """

    def __init__(self, session: onnxruntime.InferenceSession, scaler: Scaler) -> None:
        self._session, self._scaler = session, scaler
        # By the symbol's code: the bits of each bar of the window, and the answers [lookback, units + variables].
        self._remembered: dict[int, tuple[list[bytes], np.ndarray]] = {}
        self.bars_computed = 0

    def embed(self, bars: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Embeddings [n, lookback, units] and selection [n, lookback, variables] of unscaled bars."""
        windows, lookback, variables = bars.shape
        places, table = self._remembered_places(codes)
        size = sum(len(answers) for answers in table)
        keys, of_bar = _bits(bars), np.repeat(codes, lookback)
        wanted: list[int] = []  # the place of each bar in the table
        new: list[int] = []  # the bars whose answers are still to come
        for bar, (key, code) in enumerate(zip(keys, of_bar.tolist(), strict=True)):
            place = places[code].setdefault(key, size + len(new))
            if place == size + len(new):
                new.append(bar)
            wanted.append(place)
        table += self._compute(bars.reshape(-1, variables)[new], of_bar[new])
        answers = np.concatenate(table)[np.reshape(wanted, (windows, lookback))]
        for code, window in {code: window for window, code in enumerate(codes.tolist())}.items():
            own = keys[window * lookback : (window + 1) * lookback]
            self._remembered[code] = own, answers[window].copy()  # the copy lets go of the other windows
        return answers[..., :-variables], answers[..., -variables:]

    def _remembered_places(self, codes: np.ndarray) -> tuple[dict[int, dict[bytes, int]], list[np.ndarray]]:
        """The remembered answers of these symbols as parts of one table, and where in it a bar of a symbol stands."""
        places: dict[int, dict[bytes, int]] = {}
        table: list[np.ndarray] = []
        size = 0
        for code in set(codes.tolist()):
            keys, answers = self._remembered.get(code, ([], np.empty(0)))
            places[code] = {key: size + bar for bar, key in enumerate(keys)}
            if keys:
                table.append(answers)
                size += len(keys)
        return places, table

    def _compute(self, bars: np.ndarray, codes: np.ndarray) -> list[np.ndarray]:
        """The answers for unscaled bars [m, variables], in parts [some, units + variables]."""
        self.bars_computed += len(bars)
        table = []
        for part in _parts(len(bars), RUN_BARS):
            feed = {"bars": self._scaler.apply(bars[part]), "static_categories": codes[part, None]}
            table.append(_run(self._session, {"embedding": None, "selection": bars.shape[1]}, feed))
        return table


def save_bundle(path: Path, parts: BundleParts) -> Bundle:
    """Writes the folder `path` aside and renames it, so that a bundle that exists is whole; returns it, loaded.

    An older bundle stays until the new one is whole. An error leaves no half of one; what a killed process left
    behind is removed by the next.
    """
    aside, older = path.with_name(f".{path.name}.part"), path.with_name(f".{path.name}.older")
    for left_behind in (aside, older):
        shutil.rmtree(left_behind, ignore_errors=True)
    try:
        _write_files(aside, parts)
        loaded = load_bundle(aside)
        # A folder cannot be renamed over another one.
        if path.exists():
            path.replace(older)
        aside.replace(path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    shutil.rmtree(older, ignore_errors=True)
    return loaded


def load_bundle(path: str | Path) -> Bundle:
    """The bundle in a folder, checked: the hash of every file, and that it still answers its golden inputs alike.

    Raises MissingInputError where there is none, DataError where it is damaged or answers otherwise.
    """
    path = Path(path)
    try:
        sums = (path / SUMS).read_bytes()
        _check_sums(path, sums)
        described = json.loads((path / "task.json").read_text(encoding="utf-8"))
        task = Task.from_json(described["task"])
        bundle = Bundle(
            (path / "step.onnx").read_bytes(),
            (path / "readout.onnx").read_bytes(),
            task,
            Scaler.from_json(described["scaler"]),
            OutputReading.from_json(task, described["reading"]),
            float(described["threshold"]),
            hashlib.sha256(sums).hexdigest(),
        )
        _check_golden(path, bundle)
    except FileNotFoundError as error:
        raise MissingInputError(
            f"no model bundle in {path}: {Path(error.filename).name} is not there; run train_universal_transformer.py"
        ) from None
    except (LookupError, TypeError, ValueError) as error:
        raise DataError(f"model bundle {path} is of another version ({error!r}): train again") from None
    return bundle


def read_card(path: Path) -> dict[str, Any]:
    """The card of a bundle: where it comes from and how it scored."""
    return json.loads((path / "card.json").read_text(encoding="utf-8"))


def _write_files(path: Path, parts: BundleParts) -> None:
    """Fills a new folder; the list of hashes comes last."""
    path.mkdir(parents=True)
    described = {
        "task": parts.task.to_json(),
        "scaler": parts.scaler.to_json(),
        "reading": parts.reading.to_json(),
        "threshold": parts.threshold,
    }
    for name in ("model", "step", "readout"):
        (path / f"{name}.onnx").write_bytes(getattr(parts, name))
    _write_json(path / "task.json", described)
    _write_json(path / "card.json", parts.card)
    (path / "card.md").write_text(parts.card_text, encoding="utf-8")
    bundle = Bundle(parts.step, parts.readout, parts.task, parts.scaler, parts.reading, parts.threshold)
    observed, known, symbols = parts.golden
    outputs = _predict_whole(parts.model, bundle, observed, known, symbols)
    golden: dict[str, Any] = {"observed": observed, "known": known, "symbols": np.array(symbols), **outputs}
    np.savez(path / "golden.npz", **golden)
    (path / SUMS).write_bytes(b"".join(_sum_line(path / name) for name in FILES))


def _check_sums(path: Path, sums: bytes) -> None:
    of_later = [name for name in FILES if f"  {name}\n".encode() not in sums and not (path / name).exists()]
    if of_later:
        raise DataError(f"model bundle {path} is of another version (it has no {', '.join(of_later)}): train again")
    lines = {name: _sum_line(path / name) for name in FILES}
    if sums != b"".join(lines.values()):
        damaged = next((name for name, line in lines.items() if line not in sums), "the list itself")
        raise DataError(f"model bundle {path} is damaged: {damaged} is not as {SUMS} says; train again")


def _check_golden(path: Path, bundle: Bundle) -> None:
    """The whole network, and its two parts, which predict, answer as the whole did when the bundle was written."""
    with np.load(path / "golden.npz") as golden:
        inputs = golden["observed"], golden["known"], golden["symbols"].tolist()
        expected = {name: golden[name] for name in bundle.task.outputs}
    whole = _predict_whole((path / "model.onnx").read_bytes(), bundle, *inputs)
    for graphs, answers in (("model.onnx", whole), ("step.onnx and readout.onnx", bundle.predict(*inputs))):
        for name, unit in bundle.reading.units.items():
            difference = float(np.max(np.abs(answers[name] - expected[name])) / unit)
            if not difference <= GOLDEN_TOLERANCE:
                raise DataError(
                    f"model bundle {path}: {name} of its golden windows by {graphs} differs by {difference:.2g} "
                    f"deviations, at most {GOLDEN_TOLERANCE} is allowed: this machine's onnxruntime computes "
                    "otherwise; train here"
                )


def _predict_whole(
    model: bytes, bundle: Bundle, observed: np.ndarray, known: np.ndarray, symbols: Sequence[str]
) -> dict[str, np.ndarray]:
    """As `Bundle.predict`, by the whole network."""
    bars, codes = bundle._checked(observed, known, symbols)
    scaled = bundle.scaler.apply(bars)
    split = len(bundle.task.observed)
    feed = {"observed": scaled[..., :split], "known": scaled[..., split:], "static_categories": codes[:, None]}
    session = open_session(model)
    columns = sum(target.columns for target in bundle.task.targets)
    return bundle.reading.read(_run(session, {session.get_outputs()[0].name: columns}, feed))


def _parts(size: int, most: int) -> list[slice]:
    return [slice(first, first + most) for first in range(0, size, most)]


def _bits(bars: np.ndarray) -> list[bytes]:
    """The bytes of each bar of [n, lookback, variables], in order."""
    content, width = bars.tobytes(), bars.shape[-1] * bars.itemsize
    return [content[first : first + width] for first in range(0, len(content), width)]


def _run(
    session: onnxruntime.InferenceSession, outputs: Mapping[str, int | None], feed: Mapping[str, np.ndarray]
) -> np.ndarray:
    """The named outputs side by side: [n, sum of their columns]. Raises DataError where columns are not as told."""
    n = len(feed["static_categories"])
    try:
        answers = [np.asarray(answer) for answer in session.run(list(outputs), dict(feed))]
    except Exception as error:  # onnxruntime's errors have no class of their own in common
        raise DataError(f"the network cannot be computed as its task says ({_told(error)}): train again") from None
    for (name, columns), answer in zip(outputs.items(), answers, strict=True):
        if answer.ndim != 2 or answer.shape != (n, columns or answer.shape[1]):
            raise DataError(
                f"the network must answer {[n, columns]}, as its task says, and answers {list(answer.shape)} as "
                f"{name}: they do not belong together; train again"
            )
    return answers[0] if len(answers) == 1 else np.concatenate(answers, axis=1)


def open_session(model: bytes, threads: int = _THREADS) -> onnxruntime.InferenceSession:
    """A network as it runs live. Raises DataError where this onnxruntime cannot read it."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    # Else a thread spins for some 50 ms after each prediction, in case that another one comes; none does.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise DataError(
            f"onnxruntime {onnxruntime.__version__} cannot read the network ({_told(error)}): train again with this "
            "version"
        ) from None


def _told(error: Exception) -> str:
    return " ".join(str(error).split())


def _sum_line(path: Path) -> bytes:
    return f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n".encode()


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1, allow_nan=False), encoding="utf-8")
