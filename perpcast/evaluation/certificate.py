"""The leak certificate: what was recomputed to show that nothing of a dataset or a model knows its own future.

Pure checks over arrays, the record of their results that is kept with every dataset and every model, and the null
against which a score is read: labels shifted in time, learned by ridge. `perpcast.training.certify` runs them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations, pairwise
from typing import Any

import numpy as np
import pandas as pd

from perpcast.errors import MissingInputError
from perpcast.evaluation.metrics import rank_ic_by_day
from perpcast.evaluation.splits import SPLITS, TimeSplit
from perpcast.evaluation.threshold import choose_threshold
from perpcast.evaluation.windows import Windows
from perpcast.features.scaler import Scaler
from perpcast.market import SIDES
from perpcast.outputs import OutputReading, ProfitReading, platt_scaling
from perpcast.timeframe import DAY_MS

# Raised by whoever changes what the certificate shows; one of another version is made again.
CERTIFICATE_VERSION = "leak_certificate/1"

DATASET_CHECKS = ("label reach", "scaler", "inputs", "planted future")
MODEL_CHECKS = ("training rows", "reading", "calibration", "threshold")

NULL_SHIFTS = 20
NULL_SHIFT_DAYS = 30  # at least, in either direction of the circle that the labels are shifted on

# Recomputed in another order, sums differ by rounding; in units of the value's own spread.
_SAME = 1e-6
# Probabilities are float32; nearer to 0 or 1 than that, one does not tell its logit.
_SAME_PROBABILITY, _ROUGH = 1e-4, 1e-5
_BLOCK_ROWS = 1 << 16
_RIDGE = 1e-3  # of the variance of an input
_NULL_TRAIN_ROWS, _NULL_JUDGED_ROWS = 300_000, 60_000


@dataclass(frozen=True)
class Check:
    """One thing that was recomputed, and what came of it."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class NullScore:
    """Mean rank IC by day of ridge on the test windows where the labels of the whole panel were shifted in time.

    It shows what is reached without knowing when: by luck, and by what symbols are like at any time. Empty where the
    span is too short to be shifted, or has too few symbols to be ranked. `candidate` is the score of what is judged,
    None before anything is: a dataset is certified without a look at what its test windows came to.
    """

    shifts: tuple[int, ...]  # days
    rank_ic: tuple[float, ...]  # by shift
    candidate: float | None = None

    @property
    def exceeded(self) -> int | None:
        """How many of the shifts the candidate is above; None where there is none."""
        return None if self.candidate is None else sum(self.candidate > value for value in self.rank_ic)


@dataclass(frozen=True)
class Certificate:
    """What was shown of the dataset with this fingerprint and, where it is a model's, of the model made of it."""

    version: str
    fingerprint: str
    checks: tuple[Check, ...]
    null: NullScore

    @property
    def passed(self) -> bool:
        """True where every check of a dataset is there, and all that are there passed."""
        return not self.failures(DATASET_CHECKS)

    def failures(self, required: Sequence[str] = ()) -> tuple[str, ...]:
        """A line for each check that failed, or that is required and is not there."""
        missing = [f"{name}: was not checked" for name in required if name not in {check.name for check in self.checks}]
        return (*(f"{check.name}: {check.detail}" for check in self.checks if not check.passed), *missing)

    def extended(self, checks: tuple[Check, ...], candidate: float | None) -> "Certificate":
        """A model's: the same, with the checks of the model, and its score beside the null."""
        return replace(self, checks=(*self.checks, *checks), null=replace(self.null, candidate=candidate))

    def to_json(self) -> dict[str, Any]:
        """Plain values; `from_json` is the inverse."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Certificate":
        """The certificate from its JSON form. Raises KeyError or TypeError where it is not one."""
        null = data["null"]
        return cls(
            data["version"],
            data["fingerprint"],
            tuple(Check(**check) for check in data["checks"]),
            NullScore(tuple(null["shifts"]), tuple(null["rank_ic"]), null["candidate"]),
        )


def check_certificate(card: Mapping[str, Any], what: str) -> Certificate:
    """The certificate in a model's card. Raises MissingInputError where it has none that is whole, passed and its own.

    Whole is one of this version with all of DATASET_CHECKS and MODEL_CHECKS; its own one of the card's dataset. `what`
    names the model in the message.
    """
    again = "run train_universal_transformer.py --force to train and certify it again"
    try:
        certificate = Certificate.from_json(card["leak_certificate"])
        fingerprint = card["dataset"]["fingerprint"]
    except (KeyError, TypeError):
        raise MissingInputError(f"{what} has no leak certificate, which is expected in its card: {again}") from None
    if (certificate.version, certificate.fingerprint) != (CERTIFICATE_VERSION, fingerprint):
        raise MissingInputError(
            f"{what} has another leak certificate than its own: expected {CERTIFICATE_VERSION} of dataset "
            f"{fingerprint[:16]}, found {certificate.version} of {certificate.fingerprint[:16]}: {again}"
        )
    if failures := certificate.failures((*DATASET_CHECKS, *MODEL_CHECKS)):
        raise MissingInputError(f"{what} is not certified ({'; '.join(failures)}): {again}")
    return certificate


def check_label_reach(
    split: TimeSplit,
    signal_ms: Mapping[str, np.ndarray],
    bars_held: Mapping[str, np.ndarray],
    step_ms: int,
    horizon: int,
) -> Check:
    """No label of one split reaches into another: by their instants, by their signal bars, by the bars trades took.

    `signal_ms` [windows] are the signal bars of each split, `bars_held` [windows, sides] how long its trades lasted.
    """
    reach, found, passed = horizon + 1, [], True
    for name, span in split.spans.items():
        passed &= bool(span.contains(signal_ms[name]).all() and bars_held[name].max(initial=0) <= reach)
    for earlier, later in combinations(SPLITS, 2):
        first_ms = int(signal_ms[later].min())
        declared = (split.spans[later].first_ms - split.spans[earlier].last_ms) // step_ms
        real = (first_ms - int(signal_ms[earlier].max())) // step_ms
        ends_ms = signal_ms[earlier] + bars_held[earlier].max(axis=1).astype(np.int64) * step_ms
        left = (first_ms - int(ends_ms.max())) // step_ms
        passed &= declared > reach and real > reach and left > 0
        if (earlier, later) in pairwise(SPLITS):
            found.append(f"{earlier} to {later} {declared} bars ({real} between windows, {left} from the last exit)")
    return Check("label reach", passed, f"{', '.join(found)}; a label reaches {reach}")


def check_scaler(scaler: Scaler, inputs: np.ndarray, rows: np.ndarray) -> Check:
    """The scaler is that of these rows of `inputs` [n, columns], bool [n]: those in training windows."""
    claimed, unit = np.array(scaler.mean), np.array(scaler.deviation)
    total, squares = np.zeros(len(claimed)), np.zeros(len(claimed))
    for first in range(0, len(inputs), _BLOCK_ROWS):
        block = slice(first, first + _BLOCK_ROWS)
        apart = (inputs[block][rows[block]] - claimed) / unit
        total += apart.sum(axis=0)
        squares += np.einsum("nc,nc->c", apart, apart)
    count = int(rows.sum())
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 0))
    # A column without any spread keeps deviation 1.
    deviation[(unit == 1) & (deviation < _SAME)] = 1.0
    apart = np.maximum(np.abs(mean), np.abs(deviation - 1))
    worst = int(np.argmax(apart))
    detail = (
        f"mean and deviation of {count:,} rows in training windows differ from the scaler's by at most "
        f"{apart[worst]:.1e} deviations ({scaler.columns[worst]})"
    )
    return Check("scaler", bool(apart[worst] <= _SAME), detail)


def check_reading(reading: OutputReading, realised: np.ndarray) -> Check:
    """What the network's columns are read by is that of the labels [n, targets] that it was trained on."""
    apart = 0.0
    for mine, again in zip(reading.readings, OutputReading.fit(reading.task, realised).readings, strict=True):
        names = ("win", "loss") if isinstance(mine, ProfitReading) else ("mean", "deviation")
        pairs = [(getattr(mine, name), getattr(again, name)) for name in names]
        unit = max(float(np.std(realised)), *(abs(value) for _, value in pairs))
        apart = max(apart, *(abs(ours - theirs) / (unit or 1.0) for ours, theirs in pairs))
    detail = f"fitted again to {len(realised):,} training labels it differs by at most {apart:.1e} of its own size"
    return Check("reading", apart <= _SAME, detail)


def check_calibration(probability: Mapping[str, np.ndarray], realised: Mapping[str, np.ndarray]) -> Check:
    """Platt scaling once more on V2 changes no probability: they were calibrated there. Both are by side, [windows]."""
    if not probability:
        return Check("calibration", True, "returns are read as they are: there is nothing to calibrate")
    apart = max(_moved_by_platt(given.astype(np.float64), realised[side] > 0) for side, given in probability.items())
    detail = f"fitted again on V2, Platt scaling moves no probability by more than {apart:.1e}"
    return Check("calibration", apart <= _SAME_PROBABILITY, detail)


def _moved_by_platt(given: np.ndarray, profit: np.ndarray) -> float:
    """How far Platt scaling moves any of these probabilities; where some are certain, how far it moves their mean."""
    if given.min() < _ROUGH or given.max() > 1 - _ROUGH:
        # Too near to 0 or 1 for a logit. The mean is the base rate, but for less than 1 / n that Platt adds.
        return max(0.0, abs(float(np.mean(given) - np.mean(profit))) - 1 / len(given))
    logit = np.log(given / (1 - given))
    slope, intercept = platt_scaling(logit, profit)
    return float(np.max(np.abs(1 / (1 + np.exp(-slope * logit - intercept)) - given)))


def check_threshold(threshold: float, predicted: Mapping[str, np.ndarray], windows: Windows) -> Check:
    """The frozen threshold is the one that expected returns by side choose on these windows, those of V2."""
    again = choose_threshold(predicted, windows).threshold
    detail = f"chosen again on V2 it is {again:+.6%}, frozen was {threshold:+.6%}"
    return Check("threshold", abs(again - threshold) <= 1e-12, detail)


def null_score(
    inputs: np.ndarray,
    scaler: Scaler,
    labels: np.ndarray,
    symbol: np.ndarray,
    open_time_ms: np.ndarray,
    train: np.ndarray,
    judged: np.ndarray,
    step_ms: int,
) -> NullScore:
    """Ridge on the last bar of the windows that end at rows `train`, judged on those at `judged`, labels shifted.

    `inputs` [rows, columns], `labels` [rows, sides] with NaN where there is none, `symbol` and `open_time_ms` [rows].
    The labels of the whole panel go round in a circle by whole days, NULL_SHIFTS times, so that symbols of an instant
    stay together, and so do the hours. Neighbouring windows share nearly all of their label: of many, some are taken,
    evenly by instant.
    """
    panel = _ShiftedLabels(labels, symbol, open_time_ms, step_ms)
    if not len(panel.shifts):
        return NullScore((), ())
    train, judged = panel.some(train, _NULL_TRAIN_ROWS), panel.some(judged, _NULL_JUDGED_ROWS)
    width = len(scaler.columns) + 1
    gram, cross = np.zeros((width, width)), np.zeros((width, len(panel.shifts) * len(SIDES)))
    for first in range(0, len(train), _BLOCK_ROWS):
        rows = train[first : first + _BLOCK_ROWS]
        bars = _with_constant(scaler.apply(inputs[rows]))
        gram += bars.T @ bars
        # A label that is missing there is taken to be the average one.
        cross += bars.T @ np.nan_to_num(panel.at(rows) - panel.mean).reshape(len(rows), -1)
    weights = np.linalg.solve(gram + _RIDGE * len(train) * np.eye(width), cross)
    guess = (_with_constant(scaler.apply(inputs[judged])) @ weights).reshape(len(judged), len(panel.shifts), -1)
    scores = [
        _mean_rank_ic(came_true, guess[:, number], symbol[judged], open_time_ms[judged])
        for number, came_true in enumerate(np.moveaxis(panel.at(judged), 1, 0))
    ]
    known = [(int(days), score) for days, score in zip(panel.shifts, scores, strict=True) if np.isfinite(score)]
    return NullScore(tuple(days for days, _ in known), tuple(score for _, score in known))


class _ShiftedLabels:
    """The labels of a panel on one grid of whole days, read at rows as if they had come true so many days before."""

    def __init__(self, labels: np.ndarray, symbol: np.ndarray, open_time_ms: np.ndarray, step_ms: int) -> None:
        self._symbol, self._place = symbol, (open_time_ms - open_time_ms.min()) // step_ms
        self._bars_per_day = DAY_MS // step_ms
        days = int(self._place.max()) // self._bars_per_day + 1
        self._bars = days * self._bars_per_day
        self._grid = np.full((int(symbol.max()) + 1, self._bars, len(SIDES)), np.nan, np.float32)
        self._grid[symbol, self._place] = labels
        room = np.linspace(NULL_SHIFT_DAYS, days - NULL_SHIFT_DAYS, NULL_SHIFTS)
        self.shifts = np.unique(room.round().astype(np.int64)) if days >= 2 * NULL_SHIFT_DAYS else room[:0]
        self.mean = np.nanmean(labels, axis=0)

    def at(self, rows: np.ndarray) -> np.ndarray:
        """[rows, shifts, sides], NaN where nothing came true."""
        later = (self._place[rows, None] + self.shifts * self._bars_per_day) % self._bars
        return self._grid[self._symbol[rows, None], later]

    def some(self, rows: np.ndarray, most: int) -> np.ndarray:
        """At most about so many of the rows: all symbols of every so many instants."""
        return rows[self._place[rows] % -(-len(rows) // most) == 0]


def _with_constant(bars: np.ndarray) -> np.ndarray:
    return np.column_stack([bars, np.ones(len(bars), bars.dtype)]).astype(np.float64)


def _mean_rank_ic(realised: np.ndarray, guess: np.ndarray, symbol: np.ndarray, open_time_ms: np.ndarray) -> float:
    """The headline score, the mean of days and sides, of [n, sides]; NaN where there is no cross-section."""
    known = np.isfinite(realised).all(axis=1)
    days = [
        rank_ic_by_day(realised[known, side], guess[known, side], symbol[known], open_time_ms[known])
        for side in range(len(SIDES))
    ]
    return float(pd.concat(days, axis=1).mean(axis=1).mean()) if known.any() else np.nan
