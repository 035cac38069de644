"""The dataset folder: model inputs, labels and the index of valid windows, built once from the database.

`datasets/<id>/` holds `inputs.f32` (float32 [rows, observed + known], unscaled), `rows.npz` (symbol, time, outcome of
every row), `index.npz` (signal rows by split), `task.json` (task and scaler), `manifest.json` and `certificate.json`.
Windows are never written out: one is the `lookback` rows that end at its signal row. The id is a hash of the content,
so that the same data gives the same folder; it is written aside, certified and renamed, so that a folder that exists is
whole and does not leak.
"""

import fcntl
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from perpcast.database import Database, TrainingSequence, read_candles, read_processed, replace_training_sequences
from perpcast.errors import DataError, MissingInputError, PerpcastError
from perpcast.evaluation.certificate import Certificate
from perpcast.evaluation.splits import SPLITS, TimeSplit, label_overlaps, rows_of_windows, split_by_time
from perpcast.evaluation.windows import Windows
from perpcast.exit_policy import LABEL_VERSION, ExitPolicy, label_sides
from perpcast.features.indicators import FEATURE_SET
from perpcast.features.inputs import KNOWN, OBSERVED, known_inputs, observed_inputs
from perpcast.features.scaler import Scaler
from perpcast.market import SIDES, CandleSeries, Side
from perpcast.task import Target, Task
from perpcast.timeframe import format_time, interval_ms
from perpcast.training.certify import certify_dataset, read_certificate, refuse_failures, write_certificate

# Declared versions of the code whose change makes another dataset of the same rows; they enter the fingerprint.
SPLIT_VERSION = "time_split/1"

QUANTILES = (0.5, 0.75, 0.9)
_CHECKED_BARS = 5000
_HASH_BYTES = 1 << 24


@dataclass(frozen=True)
class Dataset:
    """A loaded dataset folder. Rows are ordered by symbol, in the order of the task, then time."""

    path: Path
    task: Task
    scaler: Scaler  # over observed, then known
    split: TimeSplit
    manifest: Mapping[str, Any]
    inputs: np.ndarray  # float32 [rows, observed + known], a read-only memory map, unscaled
    symbol: np.ndarray  # int16 [rows], index into task.symbols
    open_time_ms: np.ndarray  # int64 [rows]
    expected_return: np.ndarray  # float64 [rows, sides], NaN where there is no label
    bars_held: np.ndarray  # int16 [rows, sides]
    index: Mapping[str, np.ndarray]  # by split: rows of the signal bars, int64 [windows]
    certificate: Certificate | None = None  # None until it is certified: none is trained on or traded without

    @property
    def dataset_id(self) -> str:
        """The folder's name, the beginning of the fingerprint."""
        return self.path.name

    @property
    def fingerprint(self) -> str:
        """SHA-256 over rows, task, configuration and the declared versions of feature, label and split code."""
        return self.manifest["fingerprint"]

    def windows(self, split: str) -> Windows:
        """What came true at the signal bars of one split."""
        rows = self.index[split]
        return Windows(
            symbols=self.task.symbols,
            symbol=self.symbol[rows].astype(np.int64),
            open_time_ms=self.open_time_ms[rows],
            realised={side: self.expected_return[rows, number] for number, side in enumerate(SIDES)},
            bars_held={side: self.bars_held[rows, number] for number, side in enumerate(SIDES)},
            step_ms=interval_ms(self.task.interval),
        )

    def targets(self, rows: np.ndarray) -> np.ndarray:
        """Labels of both sides at signal rows: float32 [n, sides], buy first."""
        return self.expected_return[rows].astype(np.float32)

    def gather(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Unscaled windows that end at `rows`: observed [n, lookback, F] and known [n, lookback, K], float32."""
        steps = np.arange(1 - self.task.lookback, 1)
        windows = self.inputs[rows[:, None] + steps]
        observed = len(self.task.observed)
        return windows[..., :observed], windows[..., observed:]

    @cached_property
    def sequences(self) -> tuple[TrainingSequence, ...]:
        """Contiguous ranges of valid windows, for `training_sequences`."""
        found = []
        for split, rows in self.index.items():
            breaks = np.flatnonzero((np.diff(rows) != 1) | (np.diff(self.symbol[rows]) != 0)) + 1
            for part in np.split(rows, breaks):
                first, last = part[0], part[-1]
                times = int(self.open_time_ms[first]), int(self.open_time_ms[last])
                found.append(TrainingSequence(self.task.symbols[self.symbol[first]], split, *times, len(part)))
        return tuple(found)


def spread(rows: np.ndarray, count: int) -> np.ndarray:
    """So many of the rows, over all symbols and the whole span: rows are ordered by symbol. Of few, some come twice."""
    return rows[np.linspace(0, len(rows) - 1, count).round().astype(np.int64)]


@dataclass(frozen=True)
class _SymbolRows:
    """One symbol's rows, before it is known which of them a split takes."""

    inputs: np.ndarray
    open_time_ms: np.ndarray
    expected_return: np.ndarray
    bars_held: np.ndarray
    valid: np.ndarray  # bool [n], True where a window ends


def regression_task(
    interval: str, lookback: int, horizon: int, symbols: Sequence[str], policies: Mapping[Side, ExitPolicy]
) -> Task:
    """The task of `--task regression`: expected return of both sides, a mean and three quantiles each."""
    return Task(
        interval=interval,
        lookback=lookback,
        feature_set=FEATURE_SET,
        static=("symbol",),
        known=KNOWN,
        observed=OBSERVED,
        targets=tuple(Target(side, "regression", horizon, QUANTILES) for side in SIDES),
        exit_policies={side: policies[side].to_json() for side in SIDES},
        symbols=tuple(symbols),
    )


def classification_task(
    interval: str, lookback: int, horizon: int, symbols: Sequence[str], policies: Mapping[Side, ExitPolicy]
) -> Task:
    """The task of `--task classification`: the probability that a trade ends in profit, for both sides."""
    task = regression_task(interval, lookback, horizon, symbols, policies)
    return replace(task, targets=tuple(Target(side, "classification", horizon) for side in SIDES))


def build_dataset(
    database: Database,
    task: Task,
    folder: Path,
    fractions: Sequence[float],
    *,
    universe_as_of: str,
    max_gap_bars: int = 0,
    purge: int | None = None,
    record: bool = True,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Dataset:
    """Builds `folder/<id>` from the candles, indicators and labels in the database, and returns it.

    `record` stores its windows in `training_sequences`, which somebody who may only read must leave out.

    `fractions` are those of the spans in the order of SPLITS. `purge` in bars is the reach of a label, horizon + 1,
    unless given; less is refused. Symbols without a window in the training span are left out of the task: the model
    could say nothing about them. `universe_as_of` says when and how the symbols were chosen. Raises DataError where
    its leak certificate does not pass; nothing is kept then.
    """
    reach = task.horizon + 1
    purge = reach if purge is None else purge
    if purge < reach:
        raise ValueError(f"purge must be at least the label's reach of {reach} bars, received {purge}")
    folder.mkdir(parents=True, exist_ok=True)
    with _building(folder) as aside:
        settings = {"universe_as_of": universe_as_of, "max_gap_bars": max_gap_bars}
        dataset_id = _write(database, task, aside, fractions, purge, settings, on_progress)
        path = folder / dataset_id
        if not _is_certified(path):
            _certify(database, aside)
            shutil.rmtree(path, ignore_errors=True)  # one of an older version: this one holds the same, and more
            aside.replace(path)
    dataset = load_dataset(path)
    if record:
        replace_training_sequences(
            database, dataset.dataset_id, dataset.sequences, dataset.fingerprint, dataset.task.to_json()
        )
    return dataset


def load_dataset(path: Path) -> Dataset:
    """A dataset folder, checked: sizes, finite windows, label reach across splits, its leak certificate.

    Raises DataError where one of them fails, MissingInputError where a file or the certificate is not there.
    """
    dataset = _open(path)
    _check(dataset)
    return replace(dataset, certificate=read_certificate(path, dataset.fingerprint))


def _open(path: Path) -> Dataset:
    """What is in the folder, as it is."""
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        described = json.loads((path / "task.json").read_text(encoding="utf-8"))
        task = Task.from_json(described["task"])
        width = len(task.observed) + len(task.known)
        inputs = np.memmap(path / "inputs.f32", np.float32, "r", shape=(manifest["rows"], width))
        with np.load(path / "rows.npz") as rows, np.load(path / "index.npz") as index:
            return Dataset(
                path=path,
                task=task,
                scaler=Scaler.from_json(described["scaler"]),
                split=TimeSplit.from_json(manifest["split"]),
                manifest=manifest,
                inputs=inputs,
                **{name: rows[name] for name in ("symbol", "open_time_ms", "expected_return", "bars_held")},
                index={name: index[name] for name in SPLITS},
            )
    except FileNotFoundError as error:
        raise MissingInputError(f"dataset {path}: {error.filename} is not there; train again to build it") from None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise DataError(f"dataset {path} is damaged ({error}): delete the folder, then train again") from None


def _is_certified(path: Path) -> bool:
    try:
        read_certificate(path, _open(path).fingerprint)
    except PerpcastError:
        return False
    return True


def _certify(database: Database, aside: Path) -> None:
    """Writes the certificate into the folder. Raises DataError where it does not pass."""
    dataset = _open(aside)

    def candles(symbol: str) -> CandleSeries:
        times = dataset.open_time_ms[dataset.symbol == dataset.task.symbols.index(symbol)]
        return read_candles(database, symbol, int(times[0]), int(times[-1]) + 1)

    certificate = certify_dataset(dataset, candles)
    refuse_failures(certificate, "the dataset", "run prepare_dataset.py again, then train; nothing of it was kept")
    write_certificate(aside, certificate)


def _check(dataset: Dataset) -> None:
    step_ms, lookback = interval_ms(dataset.task.interval), dataset.task.lookback
    if label_overlaps(dataset.split, step_ms, dataset.task.horizon):
        raise DataError(f"dataset {dataset.path}: labels of one split reach into the next; build it again")
    for name, rows in dataset.index.items():
        inside = dataset.split.spans[name].contains(dataset.open_time_ms[rows])
        starts = rows - (lookback - 1)
        whole = (starts >= 0) & (dataset.symbol[starts] == dataset.symbol[rows])
        whole &= dataset.open_time_ms[rows] - dataset.open_time_ms[starts] == (lookback - 1) * step_ms
        labelled = np.isfinite(dataset.expected_return[rows]).all(axis=1)
        if not (inside & whole & labelled).all():
            raise DataError(f"dataset {dataset.path}: {name} holds windows that are not valid; build it again")


@contextmanager
def _building(folder: Path) -> Iterator[Path]:
    """An empty folder aside, one builder at a time; what a killed one left behind is removed first."""
    aside = folder / ".building"
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        try:
            yield aside
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _write(
    database: Database,
    task: Task,
    aside: Path,
    fractions: Sequence[float],
    purge: int,
    settings: Mapping[str, Any],
    on_progress: Callable[[int, int], None],
) -> str:
    """Fills the folder; returns the dataset's id."""
    found = _read_symbols(database, task, settings["max_gap_bars"], on_progress)
    times = [rows.open_time_ms[rows.valid] for rows in found.values()]
    first_ms, last_ms = min(int(t[0]) for t in times), max(int(t[-1]) for t in times)
    split = split_by_time(first_ms, last_ms, interval_ms(task.interval), fractions, purge)
    kept = {name: rows for name, rows in found.items() if split.train.contains(rows.open_time_ms[rows.valid]).any()}
    left_out = [name for name in task.symbols if name not in kept]
    task = replace(task, symbols=tuple(name for name in task.symbols if name in kept))

    with (aside / "inputs.f32").open("wb") as stream:
        for rows in kept.values():
            stream.write(rows.inputs.tobytes())
    counts = [len(rows.open_time_ms) for rows in kept.values()]
    columns: dict[str, Any] = {"symbol": np.repeat(np.arange(len(kept), dtype=np.int16), counts)}
    for name in ("open_time_ms", "expected_return", "bars_held"):
        columns[name] = np.concatenate([getattr(rows, name) for rows in kept.values()])
    valid = np.concatenate([rows.valid for rows in kept.values()])
    codes = np.where(valid, split.codes(columns["open_time_ms"]), -1)
    index: dict[str, Any] = {name: np.flatnonzero(codes == code) for code, name in enumerate(SPLITS)}
    empty = [name for name, ends in index.items() if not len(ends)]
    if empty:
        raise MissingInputError(
            f"no valid window in {', '.join(empty)}: the candles have gaps there; run download_data.py and "
            "prepare_dataset.py again, or choose more days"
        )
    names = (*task.observed, *task.known)
    inputs = np.memmap(aside / "inputs.f32", np.float32, "r", shape=(sum(counts), len(names)))
    scaler = Scaler.fit(inputs[rows_of_windows(index["train"], task.lookback, len(inputs))], names)

    declared = {
        **settings,
        "split": split.to_json(),
        "fractions": list(fractions),
        "versions": {"features": FEATURE_SET, "labels": LABEL_VERSION, "split": SPLIT_VERSION},
    }
    fingerprint = _fingerprint(aside / "inputs.f32", columns, index, {"task": task.to_json(), **declared})
    manifest = {
        "fingerprint": fingerprint,
        "rows": len(inputs),
        "windows": {name: len(ends) for name, ends in index.items()},
        "instants": {name: [format_time(s.first_ms), format_time(s.last_ms)] for name, s in split.spans.items()},
        "left_out": left_out,
        **declared,
    }
    np.savez(aside / "rows.npz", **columns)
    np.savez(aside / "index.npz", **index)
    described = {"task": task.to_json(), "scaler": scaler.to_json()}
    (aside / "task.json").write_text(json.dumps(described, indent=1), encoding="utf-8")
    (aside / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return fingerprint[:16]


def _read_symbols(
    database: Database, task: Task, max_gap_bars: int, on_progress: Callable[[int, int], None]
) -> dict[str, _SymbolRows]:
    """The rows of every symbol that has at least one labelled window, in the order of the task."""
    found: dict[str, _SymbolRows] = {}
    for number, symbol in enumerate(task.symbols):
        rows = _read_symbol(database, symbol, task, max_gap_bars)
        if rows is not None and rows.valid.any():
            found[symbol] = rows
        on_progress(number + 1, len(task.symbols))
    if not found:
        raise MissingInputError(
            "no symbol has a window with a label: run download_data.py, then prepare_dataset.py; a label needs "
            f"{task.lookback + task.horizon + 1} bars without a gap, besides the warm-up of the indicators"
        )
    return found


def _read_symbol(database: Database, symbol: str, task: Task, max_gap_bars: int) -> _SymbolRows | None:
    """Inputs, labels and window ends of one symbol's prepared bars; None where none are prepared."""
    processed = read_processed(database, symbol)
    if not len(processed):
        return None
    candles = read_candles(database, symbol, int(processed.open_time_ms[0]), int(processed.open_time_ms[-1]) + 1)
    if not np.array_equal(candles.open_time_ms, processed.open_time_ms):
        raise MissingInputError(f"{symbol}: the candles changed since they were prepared; run prepare_dataset.py again")
    returns = np.column_stack([processed.labels[side].expected_return for side in SIDES])
    _check_policy(symbol, candles, returns, task)
    step_ms = interval_ms(task.interval)
    observed = observed_inputs(candles.frame(), processed.indicators, task.interval, max_gap_bars)
    inputs = np.ascontiguousarray(np.hstack([observed, known_inputs(candles.open_time_ms)]), np.float32)
    usable = np.asarray(np.isfinite(inputs).all(axis=1))
    # Bars since the last break, this one included: a window ends where at least `lookback` are in a row.
    goes_on = np.zeros(len(inputs), bool)
    goes_on[1:] = usable[1:] & usable[:-1] & (np.diff(candles.open_time_ms) == step_ms)
    row = np.arange(len(inputs))
    start = np.maximum.accumulate(np.where(goes_on, 0, row))
    valid = usable & (row - start + 1 >= task.lookback) & np.isfinite(returns).all(axis=1)
    held = np.column_stack([processed.labels[side].bars_held for side in SIDES]).astype(np.int16)
    return _SymbolRows(inputs, candles.open_time_ms, returns, held, valid)


def _check_policy(symbol: str, candles: CandleSeries, returns: np.ndarray, task: Task) -> None:
    """Labels must be those of the task's exit policies: the newest bars are labelled again and compared."""
    candles, returns = candles[slice(-_CHECKED_BARS, None)], returns[-_CHECKED_BARS:]
    step_ms = interval_ms(task.interval)
    place = (candles.open_time_ms - candles.open_time_ms[0]) // step_ms
    prices = np.full((4, int(place[-1]) + 1), np.nan)
    prices[:, place] = candles.open, candles.high, candles.low, candles.close
    policies = {side: ExitPolicy(**task.exit_policies[side]) for side in SIDES}
    labels = label_sides(prices[0], prices[1], prices[2], prices[3], policies, ambiguous=False)
    for number, side in enumerate(SIDES):
        again = labels[side].expected_return[place]
        known = np.isfinite(returns[:, number]) & np.isfinite(again)
        if np.any(np.abs(again[known] - returns[known, number]) > 1e-12):
            raise MissingInputError(
                f"{symbol}: its labels were made with another exit policy than the configuration's; "
                "run prepare_dataset.py again"
            )


def _fingerprint(
    inputs: Path, columns: Mapping[str, np.ndarray], index: Mapping[str, np.ndarray], declared: Mapping[str, Any]
) -> str:
    digest = hashlib.sha256(json.dumps(declared, sort_keys=True).encode())
    with inputs.open("rb") as stream:
        while block := stream.read(_HASH_BYTES):
            digest.update(block)
    for arrays in (columns, index):
        for name, values in arrays.items():
            digest.update(name.encode())
            digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()
