"""From a network's raw columns to what a trader reads, and back from labels to what the network is trained on.

A return is learnt in units of its own spread. A profit is learnt as a logit, made a probability by Platt scaling on V2,
and told beside the expected return that it implies, p x mean win + (1 - p) x mean loss: decisions read only means.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from perpcast.task import Target, Task

_NEWTON_STEPS = 100
_HALVINGS = 40


@dataclass(frozen=True)
class ReturnReading:
    """Raw columns are the mean and the quantiles of the label, less `mean`, in units of `deviation`."""

    mean: float
    deviation: float

    @classmethod
    def fit(cls, realised: np.ndarray) -> "ReturnReading":
        """Mean and population deviation of the labels [n]; labels without any spread keep deviation 1."""
        mean, deviation = float(np.mean(realised)), float(np.std(realised))
        # A constant column has the rounding error of its mean as deviation.
        return cls(mean, deviation if deviation > 1e-12 * abs(mean) else 1.0)

    def targets(self, realised: np.ndarray) -> np.ndarray:
        """Scaled labels [n]."""
        return (realised - self.mean) / self.deviation

    def calibrated(self, raw: np.ndarray, realised: np.ndarray) -> "ReturnReading":
        """Itself: a return needs no calibration to be read."""
        return self

    def read(self, raw: np.ndarray) -> np.ndarray:
        """Mean and quantiles in the unit of the labels: [n, columns]."""
        return raw * self.deviation + self.mean

    def units(self, target: Target) -> tuple[float, ...]:
        """The spread of the labels, for each output."""
        return (self.deviation,) * len(target.outputs)


@dataclass(frozen=True)
class ProfitReading:
    """The raw column is a logit; the probability of profit is sigmoid(slope x logit + intercept)."""

    win: float  # mean return of the training trades that earned
    loss: float  # mean return of those that did not
    slope: float
    intercept: float

    @classmethod
    def fit(cls, realised: np.ndarray) -> "ProfitReading":
        """Payoffs of the labels [n], uncalibrated; where no trade won, or none lost, that payoff is 0."""
        profit = realised > 0
        win, loss = (float(np.mean(part)) if len(part) else 0.0 for part in (realised[profit], realised[~profit]))
        return cls(win, loss, slope=1.0, intercept=0.0)

    def targets(self, realised: np.ndarray) -> np.ndarray:
        """1 where the trade earned, else 0: [n]."""
        return (realised > 0).astype(np.float64)

    def calibrated(self, raw: np.ndarray, realised: np.ndarray) -> "ProfitReading":
        """Slope and intercept fitted anew to raw columns [n, 1] and what came true [n]."""
        slope, intercept = platt_scaling(raw[:, 0], realised > 0)
        return replace(self, slope=slope, intercept=intercept)

    def read(self, raw: np.ndarray) -> np.ndarray:
        """Probability of profit and expected return: [n, 2]."""
        probability = _sigmoid(self.slope * raw[:, 0] + self.intercept)
        return np.stack([probability, probability * self.win + (1 - probability) * self.loss], axis=1)

    def units(self, target: Target) -> tuple[float, ...]:
        """1 for the probability; for the expected return what lies between a loss and a win."""
        return (1.0, (self.win - self.loss) or 1.0)


@dataclass(frozen=True)
class OutputReading:
    """How to read the columns of a network that was trained for `task`; frozen with its weights."""

    task: Task
    readings: tuple[ReturnReading | ProfitReading, ...]  # one for each target

    @classmethod
    def fit(cls, task: Task, realised: np.ndarray) -> "OutputReading":
        """From labels [n, targets] of training rows alone. Raises ValueError for another shape or a missing label."""
        realised = _matrix("realised", realised, len(task.targets))
        if not len(realised) or not np.isfinite(realised).all():
            raise ValueError(f"realised must hold finite labels, received {np.isfinite(realised).sum()} of them")
        return cls(task, tuple(_KINDS[t.kind].fit(realised[:, n]) for n, t in enumerate(task.targets)))

    def targets(self, realised: np.ndarray) -> np.ndarray:
        """What the network is trained on, float32 [n, targets]: the scaled return, or 1 for a profit and 0 for none."""
        realised = _matrix("realised", realised, len(self.readings))
        columns = [reading.targets(realised[:, number]) for number, reading in enumerate(self.readings)]
        return np.stack(columns, axis=1).astype(np.float32)

    def calibrated(self, raw: np.ndarray, realised: np.ndarray) -> "OutputReading":
        """The reading with probabilities calibrated on raw columns and labels [n, targets] of V2; returns stay."""
        realised = _matrix("realised", realised, len(self.readings))
        fitted = tuple(reading.calibrated(part, realised[:, n]) for n, (reading, part) in enumerate(self._parts(raw)))
        return replace(self, readings=fitted)

    def read(self, raw: np.ndarray) -> dict[str, np.ndarray]:
        """Every output of the task by name, float32 [n], from raw columns [n, columns]."""
        values = np.concatenate([reading.read(part) for reading, part in self._parts(raw)], axis=1)
        return {name: values[:, column].astype(np.float32) for column, name in enumerate(self.task.outputs)}

    @property
    def units(self) -> dict[str, float]:
        """The size of each output of the task by name: what a small difference is small against."""
        pairs = zip(self.readings, self.task.targets, strict=True)
        units = [unit for reading, target in pairs for unit in reading.units(target)]
        return dict(zip(self.task.outputs, units, strict=True))

    def to_json(self) -> dict[str, Any]:
        """Plain numbers by target, exact to the last bit; `from_json` is the inverse."""
        return {t.name: asdict(reading) for t, reading in zip(self.task.targets, self.readings, strict=True)}

    @classmethod
    def from_json(cls, task: Task, data: Mapping[str, Mapping[str, float]]) -> "OutputReading":
        """The reading from its JSON form. Raises KeyError or TypeError where it is not that of the task."""
        return cls(task, tuple(_KINDS[target.kind](**data[target.name]) for target in task.targets))

    def _parts(self, raw: np.ndarray) -> list[tuple[ReturnReading | ProfitReading, np.ndarray]]:
        """Each target's reading with its columns, float64 [n, columns of the target]."""
        ends = np.cumsum([target.columns for target in self.task.targets])
        parts = np.split(_matrix("raw columns", raw, int(ends[-1])), ends[:-1], axis=1)
        return list(zip(self.readings, parts, strict=True))


def platt_scaling(logit: np.ndarray, profit: np.ndarray) -> tuple[float, float]:
    """Slope, at least 0, and intercept of the likeliest sigmoid(slope x logit + intercept); `profit` is bool [n].

    Platt (1999) by the Newton steps of Lin, Lin and Weng (2007). His smoothed targets, (wins + 1) / (wins + 2) and
    1 / (losses + 2), keep both finite where the logits tell wins from losses without an error. The mean probability is
    the base rate but for that smoothing, less than 1 / n. Where the logits order trades the wrong way round, slope 0
    is the best that is not a bet on their being wrong again: every trade has the base rate. Raises ValueError where
    there are no rows, or a logit is not a number.
    """
    if not len(logit) or not np.isfinite(logit).all():
        raise ValueError(f"calibration needs finite logits, received {np.isfinite(logit).sum()} of {len(logit)}")
    wins, losses = int(profit.sum()), int((~profit).sum())
    wanted = np.where(profit, (wins + 1) / (wins + 2), 1 / (losses + 2))
    base = float(np.mean(wanted))
    centre, spread = float(np.mean(logit)), float(np.std(logit))
    flat = 0.0, float(np.log(base / (1 - base)))
    if spread <= 1e-12 * max(1.0, abs(centre)):
        return flat
    # In units of their own spread both parameters are of one size, and the Hessian is well conditioned.
    slope, intercept = _newton((logit - centre) / spread, wanted, flat)
    if slope <= 0:
        return flat
    return slope / spread, intercept - slope * centre / spread


def _newton(logit: np.ndarray, wanted: np.ndarray, start: tuple[float, float]) -> tuple[float, float]:
    """The minimum of the cross-entropy over slope and intercept: convex, so that damped steps always arrive."""
    features = np.stack([logit, np.ones_like(logit)], axis=1)

    def loss(parameters: np.ndarray) -> float:
        score = features @ parameters
        return float(np.sum(np.logaddexp(0, score) - wanted * score))

    parameters = np.array(start)
    best = loss(parameters)
    for _ in range(_NEWTON_STEPS):
        probability = _sigmoid(features @ parameters)
        gradient = features.T @ (probability - wanted)
        curvature = probability * (1 - probability)
        hessian = (features * curvature[:, None]).T @ features + 1e-12 * np.eye(2)
        step = np.linalg.solve(hessian, gradient)
        for _ in range(_HALVINGS):
            if (value := loss(parameters - step)) < best:
                break
            step = step / 2
        else:
            break  # no lower: as far as floats go
        parameters, best = parameters - step, value
    return float(parameters[0]), float(parameters[1])


def _sigmoid(score: np.ndarray) -> np.ndarray:
    # exp of a number that is never above 0 cannot overflow.
    small = np.exp(-np.abs(score))
    return np.where(score >= 0, 1, small) / (1 + small)


def _matrix(what: str, values: np.ndarray, columns: int) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or values.shape[1] != columns:
        raise ValueError(f"{what} must be [n, {columns}], received {list(values.shape)}")
    return values


_KINDS: dict[str, type[ReturnReading] | type[ProfitReading]] = {
    "regression": ReturnReading,
    "classification": ProfitReading,
}
