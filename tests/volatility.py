"""A problem that is not ours: S&P 500 realised volatility as the paper has it, and one training for three libraries.

252 days in, 5 days out, trained before 2016, validated on 2016 and 2017, tested from 2018 to June 2019, where the
paper's file ends. Windows of validation and test look back into the split before them; no target is in two splits.
The libraries' processes import this file too: Keras comes in with `OurTft` alone.

    python -m tests.volatility '{"seed": 0, "predictions": "ours.npz"}'
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

DATA = Path(__file__).parents[2] / "shared" / "data" / "models" / "omi_SPX_2000_2019.csv"
ENCODER_DAYS, DECODER_DAYS = 252, 5
QUANTILES = (0.1, 0.5, 0.9)
# Numbers for all networks, since neuralforecast knows no categories; the codes of each, from 0.
CALENDAR = {"day_of_week": 7, "day_of_month": 31, "week_of_year": 53, "month": 12}
KNOWN = 1 + len(CALENDAR)
LAST_DAY = "2019-06-28"


@dataclass(frozen=True)
class Problem:
    """Days of one index. A window is named by its origin, the last day that is observed.

    `observed` [n, 2] (log volatility, the day's return) and the first column of `known` [n, 5] (days since the first)
    are scaled with mean and deviation of the training days; the others are CALENDAR's codes, from -1 to 1.
    """

    log_volatility: np.ndarray
    observed: np.ndarray
    known: np.ndarray
    mean: float
    deviation: float
    origins: Mapping[str, np.ndarray]  # train, validation, test

    def inputs(self, origins: np.ndarray) -> dict[str, np.ndarray]:
        """What the networks of all libraries are given: arrays by input kind, the index itself as a static category."""
        past = origins[:, None] + np.arange(1 - ENCODER_DAYS, 1)
        whole = origins[:, None] + np.arange(1 - ENCODER_DAYS, DECODER_DAYS + 1)
        return {
            "observed": self.observed[past],
            "known": self.known[whole],
            "static_categories": np.zeros((len(origins), 1), np.int32),
        }

    def realised(self, origins: np.ndarray) -> np.ndarray:
        """Log volatility of the five days after each origin: [n, 5]."""
        return self.log_volatility[origins[:, None] + np.arange(1, DECODER_DAYS + 1)]

    def targets(self, origins: np.ndarray) -> np.ndarray:
        """The same, scaled: float32 [n, 5]."""
        return ((self.realised(origins) - self.mean) / self.deviation).astype(np.float32)


def load_problem(path: Path = DATA) -> Problem:
    """The days of the file up to `LAST_DAY`."""
    frame = pd.read_csv(path, parse_dates=["date"])
    frame = frame[frame["date"] <= LAST_DAY]
    date = frame["date"].dt
    year = date.year.to_numpy()
    log_volatility = np.log(frame["rv5_ss"].to_numpy(float))
    days = (frame["date"] - frame["date"].iloc[0]).dt.days.to_numpy(float)
    reals = np.stack([log_volatility, frame["open_to_close"].to_numpy(float), days], axis=1)
    mean, deviation = reals[year < 2016].mean(axis=0), reals[year < 2016].std(axis=0)
    scaled = ((reals - mean) / deviation).astype(np.float32)
    codes = (date.day_of_week, date.day - 1, date.isocalendar()["week"] - 1, date.month - 1)
    calendar = [
        code.to_numpy(float) / (count - 1) * 2 - 1 for code, count in zip(codes, CALENDAR.values(), strict=True)
    ]
    every = np.arange(ENCODER_DAYS - 1, len(frame) - DECODER_DAYS)
    first, last = year[every + 1], year[every + DECODER_DAYS]
    return Problem(
        log_volatility=log_volatility,
        observed=scaled[:, :2],
        known=np.column_stack([scaled[:, 2], *calendar]).astype(np.float32),
        mean=float(mean[0]),
        deviation=float(deviation[0]),
        origins={
            "train": every[last < 2016],
            "validation": every[(first >= 2016) & (last < 2018)],
            "test": every[first >= 2018],
        },
    )


def quantile_risk(realised: np.ndarray, predicted: np.ndarray, quantile: float) -> float:
    """The paper's normalised quantile loss: twice the pinball loss over the sum of |realised|."""
    error = realised - predicted
    return float(2 * np.maximum(quantile * error, (quantile - 1) * error).sum() / np.abs(realised).sum())


def har_forecast(problem: Problem, split: str = "test") -> np.ndarray:
    """HAR-RV (Corsi 2009): least squares on the log volatility's day, week and month, for each of the five days.

    The quantiles are those of the training residuals around it, and 0.5 the regression itself: [n, 5, 3].
    """
    sums = np.cumsum(np.concatenate([[0.0], problem.log_volatility]))

    def regressors(origins: np.ndarray) -> np.ndarray:
        means = [(sums[origins + 1] - sums[origins + 1 - days]) / days for days in (1, 5, 22)]
        return np.stack([np.ones(len(origins)), *means], axis=1)

    train, asked = problem.origins["train"], problem.origins[split]
    x, y = regressors(train), problem.realised(train)
    weights = np.linalg.lstsq(x, y, rcond=None)[0]
    spread = np.quantile(y - x @ weights, QUANTILES, axis=0)  # [3, 5]
    spread[QUANTILES.index(0.5)] = 0.0
    return (regressors(asked) @ weights)[..., None] + spread.T


# --- one training for all ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Budget:
    """What every library is given alike. Weights are those of the best validation loss."""

    d_model: int = 16
    num_heads: int = 4
    dropout: float = 0.3  # the paper's for this problem
    batch: int = 64
    learning_rate: float = 0.003  # at its peak
    clip_norm: float = 1.0  # of all gradients together
    steps: int = 300
    check_every: int = 20

    def rate(self, step: int) -> float:
        """The learning rate of a step, from 0: up along a line in the first twentieth, then down along a cosine."""
        warm_up = max(1, self.steps // 20)
        if step < warm_up:
            return self.learning_rate * (step + 1) / warm_up
        return self.learning_rate * 0.5 * (1 + np.cos(np.pi * (step - warm_up) / (self.steps - warm_up)))


class Learner(Protocol):
    """A network with its optimizer: Adam, epsilon 1e-8, on the mean over days of the quantiles' summed pinball loss."""

    def step(self, inputs: dict[str, np.ndarray], targets: np.ndarray, rate: float) -> float:
        """One step at a learning rate; the loss before it."""

    def predict(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Scaled quantiles [n, 5, 3], without dropout."""

    def weights(self) -> Any:
        """A copy of the weights."""

    def restore(self, weights: Any) -> None:
        """Sets what `weights` gave."""


@dataclass
class Course:
    """How a training went: the losses at every check."""

    steps: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)  # mean of the steps since the last check
    validation_loss: list[float] = field(default_factory=list)


def pinball(targets: np.ndarray, predicted: np.ndarray) -> float:
    """The loss that all are trained on: of targets [n, 5] and quantiles [n, 5, 3]."""
    error = targets[..., None] - predicted
    quantiles = np.array(QUANTILES)
    return float(np.maximum(quantiles * error, (quantiles - 1) * error).sum(axis=-1).mean())


def fit(learner: Learner, problem: Problem, budget: Budget, seed: int) -> Course:
    """Trains by the budget, and leaves the best weights in. The draw of batches depends on `seed` alone."""
    train, validation = problem.origins["train"], problem.origins["validation"]
    order = np.random.default_rng(seed)
    drawn = np.concatenate([order.permutation(train) for _ in range(1 + budget.steps * budget.batch // len(train))])
    course, losses, best = Course(), [], learner.weights()
    for step in range(budget.steps):
        batch = drawn[step * budget.batch : (step + 1) * budget.batch]
        losses.append(learner.step(problem.inputs(batch), problem.targets(batch), budget.rate(step)))
        if (step + 1) % budget.check_every:
            continue
        course.steps.append(step + 1)
        course.loss.append(float(np.mean(losses)))
        course.validation_loss.append(pinball(problem.targets(validation), predict(learner, problem, validation)))
        losses.clear()
        checks = course.validation_loss
        if checks[-1] == min(checks):
            best = learner.weights()
    learner.restore(best)
    return course


def predict(learner: Learner, problem: Problem, origins: np.ndarray, batch: int = 256) -> np.ndarray:
    """Scaled quantiles for all origins, by batches."""
    parts = [origins[first : first + batch] for first in range(0, len(origins), batch)]
    return np.concatenate([learner.predict(problem.inputs(part)) for part in parts])


def train_and_save(learner: Learner, told: Mapping[str, Any]) -> None:
    """What each library's process does: trains, writes the course and the test's log volatility [n, 5, 3]."""
    problem = load_problem()
    course = fit(learner, problem, Budget(**told.get("budget", {})), told["seed"])
    predicted = predict(learner, problem, problem.origins["test"]) * problem.deviation + problem.mean
    np.savez(told["predictions"], allow_pickle=False, predicted=predicted, **asdict(course))


class OurTft:
    """Our network as a learner."""

    def __init__(self, budget: Budget, seed: int) -> None:
        import keras
        from keras import ops

        from perpcast.models.tft import Head, TemporalFusionTransformer, TftShape

        keras.utils.set_random_seed(seed)
        shape = TftShape(
            encoder_steps=ENCODER_DAYS,
            decoder_steps=DECODER_DAYS,
            observed=2,
            known=KNOWN,
            static_categories=(1,),
            heads=(Head("log_volatility", 0, len(QUANTILES), QUANTILES.index(0.5)),),
        )
        self.network = TemporalFusionTransformer(
            shape, d_model=budget.d_model, num_heads=budget.num_heads, dropout=budget.dropout
        )

        def loss(targets: Any, predicted: Any) -> Any:
            error = ops.expand_dims(targets, -1) - predicted
            quantiles = ops.convert_to_tensor(QUANTILES, "float32")
            return ops.mean(ops.sum(ops.maximum(quantiles * error, (quantiles - 1) * error), axis=-1))

        optimizer = keras.optimizers.Adam(budget.learning_rate, epsilon=1e-8, global_clipnorm=budget.clip_norm)
        self.network.compile(optimizer=optimizer, loss=loss, jit_compile=False)
        optimizer.build(self.network.trainable_variables)

    def step(self, inputs: dict[str, np.ndarray], targets: np.ndarray, rate: float) -> float:
        """One step; Keras' loss is a running mean, which is reset at each step."""
        self.network.reset_metrics()
        self.network.optimizer.learning_rate.assign(rate)
        return float(self.network.train_on_batch(inputs, targets))

    def predict(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Scaled quantiles."""
        return np.asarray(self.network.predict_on_batch(inputs))

    def weights(self) -> Any:
        """Arrays."""
        return self.network.get_weights()

    def restore(self, weights: Any) -> None:
        """Sets them."""
        self.network.set_weights(weights)


def _main(told: dict[str, Any]) -> None:
    train_and_save(OurTft(Budget(**told.get("budget", {})), told["seed"]), told)


if __name__ == "__main__":
    _main(json.loads(sys.argv[1]))
