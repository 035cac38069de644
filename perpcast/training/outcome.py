"""What a trained model is worth: its predictions on V2 and test, the threshold from V2, its scores on test.

The predictions are kept in `model_predictions`, so that scores and pictures can be made again without the network.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from perpcast.database import Database, read_predictions, replace_predictions
from perpcast.errors import MissingInputError
from perpcast.evaluation.baselines import Constant, LastSign
from perpcast.evaluation.scores import Evaluation, baseline_forecasts, evaluate
from perpcast.evaluation.threshold import ThresholdChoice, choose_threshold
from perpcast.market import SIDES
from perpcast.training.dataset import Dataset

# V2 chooses the threshold before test is looked at; what came before them is what the model was made of.
JUDGED = ("v2", "test")

Predictions = Mapping[str, np.ndarray]  # outputs by name, float32 [windows of a split]


@dataclass(frozen=True)
class Outcome:
    """The frozen threshold and the scores on the test span that it was frozen for."""

    choice: ThresholdChoice
    evaluation: Evaluation


def judge(dataset: Dataset, predicted: Mapping[str, Predictions], seed: int) -> Outcome:
    """Chooses the threshold on V2, then scores model and baselines on test; `predicted` is by split.

    The threshold is one on `{side}_mean`, the expected return, for returns and for probabilities alike.
    """
    v2, targets = dataset.windows("v2"), dataset.task.targets
    means: dict[str, np.ndarray] = {side: predicted["v2"][f"{side}_mean"] for side in SIDES}
    choice = choose_threshold(means, v2.realised, v2.bars_held, v2.symbol, v2.open_time_ms, v2.step_ms)
    realised = dataset.windows("train").realised
    baselines = (Constant.fit(realised), LastSign.fit(realised, dataset.last_change("train")))
    evaluation = evaluate(
        dataset.windows("test"),
        predicted["test"],
        baseline_forecasts(baselines, dataset.last_change("test")),
        choice.threshold,
        seed,
        quantiles=targets[0].quantiles,
        base_rates={t.name: float(np.mean(realised[t.name] > 0)) for t in targets if t.kind == "classification"},
    )
    return Outcome(choice, evaluation)


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
