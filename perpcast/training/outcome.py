"""What a trained model is worth: its predictions on V2 and test, thresholds from V2, its scores and its baselines'.

The predictions are kept in `model_predictions`, so that scores and pictures can be made again without the network. The
baselines are not kept: they are fitted again, in a minute or two where there are a million windows.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from perpcast.database import Database, read_predictions, replace_predictions
from perpcast.errors import MissingInputError
from perpcast.evaluation.baselines import BaselineInputs, fit_baselines
from perpcast.evaluation.scores import Evaluation, evaluate, volatility_regimes
from perpcast.evaluation.threshold import ThresholdChoice, choose_threshold
from perpcast.market import SIDES
from perpcast.outputs import ProfitReading
from perpcast.training.dataset import Dataset

# V2 chooses the threshold before test is looked at; what came before them is what the model was made of.
JUDGED = ("v2", "test")

# The share of the price that a bar moves on average: what regimes are told by.
_VOLATILITY = "atr_14"

Predictions = Mapping[str, np.ndarray]  # outputs by name, float32 [windows of a split]


@dataclass(frozen=True)
class Outcome:
    """The frozen thresholds, the scores on the test span that they were frozen for, and the baselines' forecasts."""

    choice: ThresholdChoice  # the model's
    evaluation: Evaluation
    thresholds: Mapping[str, float]  # of the baselines, by name
    baselines: Mapping[str, Mapping[str, np.ndarray]]  # by name and side: expected returns, float64 [windows of test]


def judge(dataset: Dataset, predicted: Mapping[str, Predictions], seed: int) -> Outcome:
    """Fits the baselines, chooses every threshold on V2, then scores all on test; `predicted` is by split.

    The threshold is one on `{side}_mean`, the expected return, for returns and for probabilities alike.
    """
    v2, test, targets = dataset.windows("v2"), dataset.windows("test"), dataset.task.targets
    inputs = baseline_inputs(dataset)
    fitted = fit_baselines(inputs)
    before, now = ({each.name: each.predict(inputs, split) for each in fitted} for split in JUDGED)
    choice = choose_threshold({side: predicted["v2"][f"{side}_mean"] for side in SIDES}, v2)
    thresholds = {name: choose_threshold(by_side, v2).threshold for name, by_side in before.items()}
    realised = dataset.windows("train").realised
    profits = [target.name for target in targets if target.kind == "classification"]
    evaluation = evaluate(
        test,
        predicted["test"],
        now,
        choice.threshold,
        seed,
        thresholds=thresholds,
        quantiles=targets[0].quantiles,
        base_rates={side: float(np.mean(realised[side] > 0)) for side in profits},
        probabilities={
            name: {side: _probability(before[name][side], v2.realised[side], now[name][side]) for side in profits}
            for name in now
        },
        regime=_regime(dataset),
    )
    return Outcome(choice, evaluation, thresholds, now)


def baseline_inputs(dataset: Dataset) -> BaselineInputs:
    """What the baselines see of a dataset: the rows that the network sees, by the same scaler and splits."""
    return BaselineInputs(
        inputs=dataset.inputs,
        scaler=dataset.scaler,
        symbol=dataset.symbol,
        expected_return=dataset.expected_return,
        index=dataset.index,
        lookback=dataset.task.lookback,
        symbols=len(dataset.task.symbols),
    )


def _probability(before: np.ndarray, realised: np.ndarray, now: np.ndarray) -> np.ndarray:
    """Platt-scaled on V2 as the network's logits are: [n]."""
    reading = ProfitReading.fit(realised).calibrated(before[:, None], realised)
    return reading.read(now[:, None])[:, 0]


def _regime(dataset: Dataset) -> np.ndarray | None:
    """The volatility regime of the test windows' signal bars; None where no input tells it."""
    if _VOLATILITY not in dataset.task.observed:
        return None
    column = dataset.task.observed.index(_VOLATILITY)
    test, train = (
        (dataset.inputs[rows, column], dataset.symbol[rows]) for rows in (dataset.index["test"], dataset.index["train"])
    )
    return volatility_regimes(*test, *train)


def store_predictions(
    database: Database, dataset: Dataset, model_id: str, predicted: Mapping[str, Predictions]
) -> None:
    """Makes the predictions on V2 and test all that is stored of the model."""
    rows = np.concatenate([dataset.index[split] for split in JUDGED])
    outputs = {name: np.concatenate([predicted[split][name] for split in JUDGED]) for name in dataset.task.outputs}
    for code, symbol in enumerate(dataset.task.symbols):
        own = dataset.symbol[rows] == code
        times = dataset.open_time_ms[rows[own]]
        replace_predictions(database, model_id, symbol, times, {name: out[own] for name, out in outputs.items()})


def read_outcome(database: Database, dataset: Dataset, model_id: str, seed: int) -> Outcome:
    """The outcome again, from stored predictions. Raises MissingInputError where some of them are not there."""
    rows = np.concatenate([dataset.index[split] for split in JUDGED])
    stored = {name: np.full(len(rows), np.nan, np.float32) for name in dataset.task.outputs}
    for code, symbol in enumerate(dataset.task.symbols):
        open_time_ms, outputs = read_predictions(database, model_id, symbol, dataset.task.outputs)
        own = np.flatnonzero(dataset.symbol[rows] == code)
        _, mine, theirs = np.intersect1d(dataset.open_time_ms[rows[own]], open_time_ms, return_indices=True)
        for name, values in outputs.items():
            stored[name][own[mine]] = values[theirs]
    if any(np.isnan(values).any() for values in stored.values()):
        raise MissingInputError(
            f"model_predictions lacks predictions of {model_id} for its dataset {dataset.dataset_id}: "
            "run train_universal_transformer.py --force"
        )
    first = len(dataset.index["v2"])
    predicted = {
        "v2": {name: values[:first] for name, values in stored.items()},
        "test": {name: values[first:] for name, values in stored.items()},
    }
    return judge(dataset, predicted, seed)
