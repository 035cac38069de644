"""The cheap baselines through time: fitted and tested on purged folds of the history before a dataset's test span.

How far a score swings from fold to fold says more about the next months than its mean. No network is trained here, and
the test span stays unseen.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from perpcast.errors import MissingInputError
from perpcast.evaluation.baselines import Baseline, BaselineInputs, Constant, LastSign, Ridge
from perpcast.evaluation.folds import Fold, combinatorial_folds, walk_forward
from perpcast.evaluation.scores import daily_rank_ic
from perpcast.evaluation.splits import SPLITS
from perpcast.market import SIDES
from perpcast.timeframe import interval_ms
from perpcast.training.dataset import Dataset
from perpcast.training.outcome import baseline_inputs

FoldKind = Literal["expanding", "sliding", "combinatorial"]
WALK_FORWARD_FOLDS = 5
GROUPS, TEST_GROUPS = 6, 2
# The newest part of each training, on which a baseline chooses what there is to choose.
_STOP_SHARE = 0.1


@dataclass(frozen=True)
class FoldScore:
    """One fold: rank IC by day of each baseline, and the share of the constant's squared error that it saves."""

    fold: Fold
    windows: int  # tested
    rank_ic: Mapping[str, float]  # NaN where a forecast ranks nothing
    saved: Mapping[str, float]


def make_folds(dataset: Dataset, kind: FoldKind) -> tuple[Fold, ...]:
    """Folds of everything before the test span: purged by the reach of a label, embargoed by the look-back."""
    first_ms, last_ms = dataset.split.train.first_ms, dataset.split.v2.last_ms
    step_ms, purge = interval_ms(dataset.task.interval), dataset.task.horizon + 1
    if kind == "combinatorial":
        return combinatorial_folds(
            first_ms,
            last_ms,
            step_ms,
            groups=GROUPS,
            test_groups=TEST_GROUPS,
            purge=purge,
            embargo=dataset.task.lookback,
        )
    sliding = kind == "sliding"
    return walk_forward(first_ms, last_ms, step_ms, folds=WALK_FORWARD_FOLDS, purge=purge, sliding=sliding)


def score_folds(
    dataset: Dataset,
    folds: tuple[Fold, ...],
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[FoldScore, ...]:
    """Fits constant, last sign and ridge in each fold, and scores them on its test windows."""
    found = []
    for number, fold in enumerate(folds, 1):
        found.append(_score(dataset, fold))
        on_progress(number, len(folds))
    return tuple(found)


def _score(dataset: Dataset, fold: Fold) -> FoldScore:
    inputs = _inputs(dataset, fold)
    fitted: tuple[Baseline, ...] = (Constant.fit(inputs), LastSign.fit(inputs), Ridge.fit(inputs))
    windows = replace(dataset, index=inputs.index).windows("test")
    rank_ic, squared = {}, {}
    for baseline in fitted:
        predicted = baseline.predict(inputs, "test")
        daily = daily_rank_ic(windows, predicted)
        rank_ic[baseline.name] = float(daily.mean()) if len(daily) else np.nan
        squared[baseline.name] = sum(float(np.sum((windows.realised[s] - predicted[s]) ** 2)) for s in SIDES)
    constant = squared[fitted[0].name]
    return FoldScore(fold, len(windows), rank_ic, {name: 1 - error / constant for name, error in squared.items()})


def _inputs(dataset: Dataset, fold: Fold) -> BaselineInputs:
    """The fold's windows: `train`, `v1` for its newest part, purged in between, and `test`.

    Raises MissingInputError where one of them is empty.
    """
    rows = np.sort(np.concatenate([dataset.index[split] for split in SPLITS[:-1]]))
    times = dataset.open_time_ms[rows]
    code, step_ms = fold.codes(times), interval_ms(dataset.task.interval)
    newest = fold.train[-1]
    stop_ms = newest.last_ms - round((newest.last_ms - newest.first_ms) * _STOP_SHARE / step_ms) * step_ms
    stops = (code == 0) & newest.contains(times) & (times > stop_ms)
    trains = (code == 0) & (times <= stop_ms - (dataset.task.horizon + 1) * step_ms)
    index = {"train": rows[trains], "v1": rows[stops], "test": rows[code == 1]}
    if empty := [name for name, part in index.items() if not len(part)]:
        raise MissingInputError(
            f"no valid window in {', '.join(empty)} of the fold {'; '.join(fold.instants())}: download more days"
        )
    return replace(baseline_inputs(dataset), index=index)
