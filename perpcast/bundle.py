"""The model bundle: a folder that explains itself, and its predictor. onnxruntime only, never Keras or pickle.

model.onnx   scaled inputs {observed, known, symbol} to scaled outputs
task.json    task, scaler of the inputs, scaler of the targets, decision threshold
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
from perpcast.task import Task

FILES = ("model.onnx", "task.json", "card.json", "card.md", "golden.npz")
SUMS = "SHA256SUMS"

# In units of the scaled targets: what another processor or thread count may change.
GOLDEN_TOLERANCE = 1e-4
# Windows in one run of the network; more are predicted in parts, so that memory stays small.
_RUN_WINDOWS = 512


@dataclass(frozen=True)
class BundleParts:
    """All that a bundle is written from. `golden` are unscaled inputs: observed, known, symbol names."""

    model: bytes
    task: Task
    scaler: Scaler  # over observed, then known
    target_scaler: Scaler  # over the names of the targets
    threshold: float
    card: Mapping[str, Any]
    card_text: str
    golden: tuple[np.ndarray, np.ndarray, Sequence[str]]


class Bundle:
    """A loaded model. `predict` takes unscaled inputs and answers in the units of the labels."""

    def __init__(
        self, model: bytes, task: Task, scaler: Scaler, target_scaler: Scaler, threshold: float, sha256: str = ""
    ) -> None:
        self.task, self.scaler, self.target_scaler = task, scaler, target_scaler
        self.threshold, self.sha256 = threshold, sha256
        self._code = {symbol: code for code, symbol in enumerate(task.symbols)}
        self._session = _open_session(model)
        of_output = [number for number, target in enumerate(task.targets) for _ in target.outputs]
        self._mean = np.array(target_scaler.mean)[of_output]
        self._deviation = np.array(target_scaler.deviation)[of_output]

    def predict(self, observed: np.ndarray, known: np.ndarray, symbols: Sequence[str]) -> dict[str, np.ndarray]:
        """Every output of the task by name, float32 [n], for n windows.

        `observed` [n, lookback, F] and `known` [n, lookback, K] are unscaled model inputs in the order of the task,
        `symbols` n names. Raises ValueError for another shape or a value that is not finite, DataError for a symbol
        that the model was not trained on.
        """
        observed, known = self._checked(observed, known, symbols)
        codes = np.array([self._code[symbol] for symbol in symbols], np.int32)
        parts = [slice(first, first + _RUN_WINDOWS) for first in range(0, len(codes), _RUN_WINDOWS)]
        runs = [self._run(observed[part], known[part], codes[part]) for part in parts]
        scaled = np.concatenate(runs) if runs else np.empty((0, len(self.task.outputs)), np.float32)
        values = (scaled * self._deviation + self._mean).astype(np.float32)
        return {name: values[:, column] for column, name in enumerate(self.task.outputs)}

    def _run(self, observed: np.ndarray, known: np.ndarray, codes: np.ndarray) -> np.ndarray:
        scaled = self.scaler.apply(np.concatenate([observed, known], axis=-1))
        split = observed.shape[-1]
        feed = {"observed": scaled[..., :split], "known": scaled[..., split:], "symbol": codes}
        outputs = np.asarray(self._session.run(None, feed)[0])
        expected = (len(codes), len(self.task.outputs))
        if outputs.shape != expected:
            raise DataError(
                f"the network must answer {list(expected)}, as its task says, and answers {list(outputs.shape)}: "
                "they do not belong together; train again"
            )
        return outputs

    def _checked(
        self, observed: np.ndarray, known: np.ndarray, symbols: Sequence[str]
    ) -> tuple[np.ndarray, np.ndarray]:
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
        return arrays[0], arrays[1]


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
        bundle = Bundle(
            (path / "model.onnx").read_bytes(),
            Task.from_json(described["task"]),
            Scaler.from_json(described["scaler"]),
            Scaler.from_json(described["target_scaler"]),
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
        "target_scaler": parts.target_scaler.to_json(),
        "threshold": parts.threshold,
    }
    (path / "model.onnx").write_bytes(parts.model)
    _write_json(path / "task.json", described)
    _write_json(path / "card.json", parts.card)
    (path / "card.md").write_text(parts.card_text, encoding="utf-8")
    bundle = Bundle(parts.model, parts.task, parts.scaler, parts.target_scaler, parts.threshold)
    observed, known, symbols = parts.golden
    outputs = bundle.predict(observed, known, symbols)
    golden: dict[str, Any] = {"observed": observed, "known": known, "symbols": np.array(symbols), **outputs}
    np.savez(path / "golden.npz", **golden)
    (path / SUMS).write_bytes(b"".join(_sum_line(path / name) for name in FILES))


def _check_sums(path: Path, sums: bytes) -> None:
    lines = {name: _sum_line(path / name) for name in FILES}
    if sums != b"".join(lines.values()):
        damaged = next((name for name, line in lines.items() if line not in sums), "the list itself")
        raise DataError(f"model bundle {path} is damaged: {damaged} is not as {SUMS} says; train again")


def _check_golden(path: Path, bundle: Bundle) -> None:
    with np.load(path / "golden.npz") as golden:
        answers = bundle.predict(golden["observed"], golden["known"], golden["symbols"].tolist())
        for column, name in enumerate(bundle.task.outputs):
            difference = float(np.max(np.abs(answers[name] - golden[name])) / bundle._deviation[column])
            if not difference <= GOLDEN_TOLERANCE:
                raise DataError(
                    f"model bundle {path}: {name} of its golden windows differs by {difference:.2g} deviations, "
                    f"at most {GOLDEN_TOLERANCE} is allowed: this machine's onnxruntime computes otherwise; train here"
                )


def _open_session(model: bytes) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no class of their own in common
        cause = " ".join(str(error).split())
        raise DataError(
            f"onnxruntime {onnxruntime.__version__} cannot read the network ({cause}): train again with this version"
        ) from None


def _sum_line(path: Path) -> bytes:
    return f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n".encode()


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=1, allow_nan=False), encoding="utf-8")
