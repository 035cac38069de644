"""Certifies datasets and models: hands their arrays to the checks of the leak certificate and keeps the result."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from perpcast.errors import DataError, MissingInputError
from perpcast.evaluation.certificate import (
    CERTIFICATE_VERSION,
    DATASET_CHECKS,
    Certificate,
    Check,
    check_calibration,
    check_label_reach,
    check_reading,
    check_scaler,
    check_threshold,
    null_score,
)
from perpcast.evaluation.splits import SPLITS, rows_of_windows
from perpcast.features.indicators import compute_indicators
from perpcast.features.inputs import OBSERVED, compute_inputs, known_inputs, observed_inputs
from perpcast.features.leak import Leak, foreign_inputs, planted_leak
from perpcast.market import SIDES, CandleSeries
from perpcast.outputs import OutputReading
from perpcast.timeframe import format_time, interval_ms

if TYPE_CHECKING:
    from perpcast.training.dataset import Dataset

# What is computed again from candles: some windows of every symbol, and all rows of some symbols.
_WINDOWS, _WINDOWS_OF_SPLIT = 200, 2
_WHOLE_SYMBOLS = 6


def certify_dataset(dataset: "Dataset", candles: Callable[[str], CandleSeries]) -> Certificate:
    """All that is checked of a dataset; `candles` gives a symbol's bars, those of its rows. It may not have passed.

    Inputs are computed again for a sample of symbols and bars, which the certificate names.
    """
    step_ms, task = interval_ms(dataset.task.interval), dataset.task
    signal_ms = {name: dataset.open_time_ms[rows] for name, rows in dataset.index.items()}
    held = {name: dataset.bars_held[rows] for name, rows in dataset.index.items()}
    train = rows_of_windows(dataset.index["train"], task.lookback, len(dataset.inputs))
    checks = (
        check_label_reach(dataset.split, signal_ms, held, step_ms, task.horizon),
        check_scaler(dataset.scaler, dataset.inputs, train),
        _check_inputs(dataset, candles),
        _check_planted(dataset, candles(task.symbols[0])),
    )
    null = null_score(
        dataset.inputs,
        dataset.scaler,
        dataset.expected_return,
        dataset.symbol,
        dataset.open_time_ms,
        dataset.index["train"],
        dataset.index["test"],
        step_ms,
    )
    return Certificate(CERTIFICATE_VERSION, dataset.fingerprint, checks, null)


def certify_model(
    dataset: "Dataset",
    reading: OutputReading,
    threshold: float,
    predicted: Mapping[str, np.ndarray],
    rank_ic: float,
    trained_on: np.ndarray,
) -> Certificate:
    """The dataset's certificate, and what is checked of a model made of it: for `card["leak_certificate"]`.

    `predicted` are its outputs on V2 by name. `rank_ic` is its rank IC by day on test, to stand beside the null (NaN
    where it ranks nothing); `trained_on` are the rows of the windows that it was trained on. Raises MissingInputError
    where the dataset has no certificate.
    """
    if dataset.certificate is None:
        raise MissingInputError(f"dataset {dataset.path} has no leak certificate: build it again, then train")
    windows = dataset.windows("v2")
    means: dict[str, np.ndarray] = {side: predicted[f"{side}_mean"] for side in SIDES}
    probability = {
        target.name: predicted[f"{target.name}_profit_probability"]
        for target in dataset.task.targets
        if target.kind == "classification"
    }
    checks = (
        _check_training_rows(dataset, trained_on),
        check_reading(reading, dataset.targets(trained_on)),
        check_calibration(probability, windows.realised),
        check_threshold(threshold, means, windows),
    )
    return dataset.certificate.extended(checks, rank_ic if np.isfinite(rank_ic) else None)


def write_certificate(folder: Path, certificate: Certificate) -> None:
    """Writes `certificate.json` into a dataset folder."""
    (folder / "certificate.json").write_text(json.dumps(certificate.to_json(), indent=1), encoding="utf-8")


def read_certificate(folder: Path, fingerprint: str) -> Certificate:
    """The certificate in a dataset folder, whole and passed, of the dataset with this fingerprint.

    Raises MissingInputError where there is none of this version, DataError where it did not pass or is another's.
    """
    again = "run train_universal_transformer.py, which builds and certifies it again"
    try:
        certificate = Certificate.from_json(json.loads((folder / "certificate.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise MissingInputError(f"dataset {folder} has no leak certificate (certificate.json): {again}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise MissingInputError(f"dataset {folder}: its leak certificate cannot be read ({error!r}): {again}") from None
    if certificate.version != CERTIFICATE_VERSION:
        raise MissingInputError(
            f"dataset {folder}: its leak certificate is {certificate.version}, expected {CERTIFICATE_VERSION}: {again}"
        )
    if certificate.fingerprint != fingerprint:
        raise DataError(
            f"dataset {folder}: its leak certificate is that of dataset {certificate.fingerprint[:16]}, expected "
            f"{fingerprint[:16]}: {again}"
        )
    refuse_failures(certificate, f"dataset {folder}", again)
    return certificate


def refuse_failures(certificate: Certificate, what: str, next_step: str) -> None:
    """Raises DataError that names every check of a dataset that did not pass."""
    if failures := certificate.failures(DATASET_CHECKS):
        raise DataError(f"{what} leaks: its certificate failed ({'; '.join(failures)}): {next_step}")


def _check_training_rows(dataset: "Dataset", trained_on: np.ndarray) -> Check:
    foreign = int((~np.isin(trained_on, dataset.index["train"])).sum())
    detail = f"{foreign:,} of {len(trained_on):,} windows that were learned from lie outside the training span"
    return Check("training rows", foreign == 0 and len(trained_on) > 0, detail)


def _check_inputs(dataset: "Dataset", candles: Callable[[str], CandleSeries]) -> Check:
    """The stored inputs are those of candles whose future was cut off or exchanged."""
    symbols = dataset.task.symbols
    count = int(np.clip(_WINDOWS // (len(symbols) * len(SPLITS)), 1, _WINDOWS_OF_SPLIT))
    whole = np.unique(np.linspace(0, len(symbols) - 1, _WHOLE_SYMBOLS).round().astype(int)).tolist()
    random = np.random.default_rng(int(dataset.fingerprint[:8], 16))
    foreign: list[str] = []
    looked = 0
    for code, symbol in enumerate(symbols):
        first, last = np.searchsorted(dataset.symbol, [code, code + 1]).tolist()
        series, stored = candles(symbol), dataset.inputs[first:last]
        if not np.array_equal(series.open_time_ms, dataset.open_time_ms[first:last]):
            foreign.append(f"{symbol} has other candles than rows")
            continue
        rows = _sampled(dataset, first, last, count, random) - first
        looked += len(rows)
        told = [_told(leak) for leak in _leaks(dataset, series, stored, rows)]
        told += _differences(dataset, series, stored) if code in whole else []
        foreign += [f"{symbol} {each}" for each in told]
    names = ", ".join(symbols[code] for code in whole)
    detail = (
        f"{looked:,} windows of {len(symbols)} symbols from candles without their future or with another one, all "
        f"rows of {names} from all candles: " + ("; ".join(foreign[:3]) or "each the same")
    )
    return Check("inputs", not foreign, detail)


def _check_planted(dataset: "Dataset", series: CandleSeries) -> Check:
    """The same comparison sees a column that knows the next bar, in the first window of the first symbol."""
    registry, frame = (planted_leak(),), series.frame()
    interval, gap = dataset.task.interval, dataset.manifest["max_gap_bars"]
    indicators = compute_indicators(frame, interval, gap, registry).to_numpy()
    stored = observed_inputs(frame, indicators, interval, gap, registry)
    found = foreign_inputs(frame, stored, dataset.index["train"][:1], dataset.task.lookback, interval, gap, registry)
    caught = "is found" if found else "is not found, so that equal inputs show nothing"
    return Check("planted future", bool(found), f"a planted column that holds the change of the next bar {caught}")


def _sampled(dataset: "Dataset", first: int, last: int, count: int, random: np.random.Generator) -> np.ndarray:
    """So many windows of each split among a symbol's rows; all where there are fewer."""
    sample = []
    for rows in dataset.index.values():
        own = rows[slice(*np.searchsorted(rows, [first, last]))]
        sample.append(random.choice(own, min(count, len(own)), replace=False))
    return np.sort(np.concatenate(sample))


def _leaks(dataset: "Dataset", series: CandleSeries, stored: np.ndarray, rows: np.ndarray) -> list[Leak]:
    task, observed = dataset.task, stored[:, : len(OBSERVED)]
    gap = dataset.manifest["max_gap_bars"]
    return foreign_inputs(series.frame(), observed, rows, task.lookback, task.interval, gap)


def _differences(dataset: "Dataset", series: CandleSeries, stored: np.ndarray) -> list[str]:
    """What of a symbol's rows is not what all of its candles give."""
    task = dataset.task
    observed = compute_inputs(series.frame(), task.interval, dataset.manifest["max_gap_bars"])
    again = np.hstack([observed, known_inputs(series.open_time_ms)])
    same = np.isclose(stored, again, rtol=1e-5, atol=1e-8, equal_nan=True).all(axis=0)
    names = (*task.observed, *task.known)
    return [f"{names[column]} is not what its candles give" for column in np.flatnonzero(~same).tolist()]


def _told(leak: Leak) -> str:
    return (
        f"{leak.name} of {format_time(leak.time_ms)} is {leak.value:.6g}, and {leak.changed:.6g} without the bars from "
        f"{format_time(leak.cut_ms)} on"
    )
