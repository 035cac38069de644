"""Many cuts of history in time: walk-forward and combinatorial purged folds, the same instants for all symbols."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby, pairwise

import numpy as np

from perpcast.errors import MissingInputError
from perpcast.evaluation.splits import Span
from perpcast.timeframe import format_time


@dataclass(frozen=True)
class Fold:
    """Signal bars to train on and to test on: spans oldest first, none of which reach into another."""

    train: tuple[Span, ...]
    test: tuple[Span, ...]

    def codes(self, open_time_ms: np.ndarray) -> np.ndarray:
        """0 for signal bars of the training spans, 1 for those of the test spans, -1 for all others: int8 [n]."""
        codes = np.full(len(open_time_ms), -1, np.int8)
        for code, spans in enumerate((self.train, self.test)):
            for span in spans:
                codes[span.contains(open_time_ms)] = code
        return codes

    def instants(self) -> list[str]:
        """A line for each span, oldest first, the way a stage prints them."""
        named = [("train", span) for span in self.train] + [("test", span) for span in self.test]
        return [
            f"{name:5} {format_time(span.first_ms)} to {format_time(span.last_ms)}"
            for name, span in sorted(named, key=lambda each: each[1].first_ms)
        ]

    def label_overlaps(self, step_ms: int, horizon: int) -> int:
        """How many bars of label intervals training and test share, over all neighbouring spans; 0 is honest.

        The label of signal bar t is made of bars t + 1 to t + horizon + 1.
        """
        reach, shared = horizon + 1, 0
        for train in self.train:
            for test in self.test:
                apart = max(test.first_ms - train.last_ms, train.first_ms - test.last_ms) // step_ms
                shared += max(0, reach - apart + 1)
        return shared


def walk_forward(
    first_ms: int,
    last_ms: int,
    step_ms: int,
    *,
    folds: int,
    purge: int,
    embargo: int = 0,
    sliding: bool = False,
) -> tuple[Fold, ...]:
    """Tests on each of `folds` equal stretches after the first one, trained on what came before it.

    Training expands: it begins with the first bar of all; or slides: it is one stretch long. Before a test it gives up
    its last bars, so that signal bars t and v of both satisfy v - t > `purge` + `embargo` bars. A label reaches
    horizon + 1 bars ahead: a smaller purge is dishonest, and 0 leaks almost a whole horizon. Nothing is trained after
    its test, so that no embargo is needed; one leaves room for what else may take time. Raises MissingInputError where
    a training would be left without bars.
    """
    _check_counts(folds=(folds, 1), purge=(purge, 0), embargo=(embargo, 0))
    groups = _groups(first_ms, last_ms, step_ms, folds + 1)
    made = []
    for number in range(1, folds + 1):
        begin = groups[number - 1 if sliding else 0].first_ms
        train = Span(begin, groups[number].first_ms - (purge + embargo + 1) * step_ms)
        made.append(_fold([train], [groups[number]], purge + embargo))
    return tuple(made)


def combinatorial_folds(
    first_ms: int,
    last_ms: int,
    step_ms: int,
    *,
    groups: int,
    test_groups: int,
    purge: int,
    embargo: int,
) -> tuple[Fold, ...]:
    """Tests on every choice of `test_groups` of so many equal groups, trained on all others: López de Prado (2018), 12.

    Training signal bars t before a test bar v satisfy v - t > `purge` bars, those after it t - v > `purge` + `embargo`:
    what is trained on after a test has looked back into the test's labels, so that the embargo has to be the look-back
    at least. A label reaches horizon + 1 bars ahead: a smaller purge is dishonest. Raises MissingInputError where a
    fold would be left without training.
    """
    _check_counts(
        test_groups=(test_groups, 1), groups=(groups, test_groups + 1), purge=(purge, 0), embargo=(embargo, 0)
    )
    cut = _groups(first_ms, last_ms, step_ms, groups)
    folds = []
    for chosen in combinations(range(groups), test_groups):
        train = []
        for numbers in _runs(number for number in range(groups) if number not in chosen):
            begin = cut[numbers[0]].first_ms + (purge + embargo if numbers[0] > 0 else 0) * step_ms
            end = cut[numbers[-1]].last_ms - (purge if numbers[-1] < groups - 1 else 0) * step_ms
            train.append(Span(begin, end))
        test = [Span(cut[numbers[0]].first_ms, cut[numbers[-1]].last_ms) for numbers in _runs(chosen)]
        folds.append(_fold(train, test, purge + embargo))
    return tuple(folds)


def _fold(train: Sequence[Span], test: Sequence[Span], taken: int) -> Fold:
    left = tuple(span for span in train if span.last_ms >= span.first_ms)
    if not left:
        raise MissingInputError(
            f"the fold that tests from {format_time(test[0].first_ms)} on has no bar left to train on: purge and "
            f"embargo take {taken}; make fewer folds, or download more days"
        )
    return Fold(left, tuple(test))


def _groups(first_ms: int, last_ms: int, step_ms: int, count: int) -> list[Span]:
    """So many stretches, equal but for a bar, that hold every bar once."""
    bars = (last_ms - first_ms) // step_ms + 1
    if bars < count:
        raise MissingInputError(f"{bars} bars of labels are too few for {count} groups of them: download more days")
    edges = [round(number * bars / count) for number in range(count + 1)]
    return [Span(first_ms + begin * step_ms, first_ms + (end - 1) * step_ms) for begin, end in pairwise(edges)]


def _runs(numbers: Iterable[int]) -> list[list[int]]:
    """Runs of consecutive numbers."""
    grouped = groupby(enumerate(numbers), key=lambda each: each[1] - each[0])
    return [[number for _, number in run] for _, run in grouped]


def _check_counts(**counts: tuple[int, int]) -> None:
    for name, (value, least) in counts.items():
        if value < least:
            raise ValueError(f"{name} must be {least} or more, received {value}")
