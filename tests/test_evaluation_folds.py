"""Folds: which bars are trained and tested on, and what a purge is worth, on labels that overlap by construction."""

from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perpcast.errors import MissingInputError
from perpcast.evaluation.folds import Fold, combinatorial_folds, walk_forward
from perpcast.evaluation.splits import SPLITS, Span, split_by_time

STEP = 900_000
HORIZON = 100
REACH = HORIZON + 1


def bars(fold: Fold, first: int, last: int) -> tuple[list[int], list[int]]:
    """Numbers of the bars that are trained and tested on."""
    codes = fold.codes(np.arange(first, last + 1) * STEP)
    return (first + np.flatnonzero(codes == 0)).tolist(), (first + np.flatnonzero(codes == 1)).tolist()


def test_walk_forward_expanding_and_sliding_bar_by_bar() -> None:
    """40 bars in 4 groups of 10; a purge of 2 and an embargo of 1 take the last 3 before each test."""
    expanding = walk_forward(0, 39 * STEP, STEP, folds=3, purge=2, embargo=1)
    sliding = walk_forward(0, 39 * STEP, STEP, folds=3, purge=2, embargo=1, sliding=True)
    assert [bars(fold, 0, 39) for fold in expanding] == [
        (list(range(7)), list(range(10, 20))),
        (list(range(17)), list(range(20, 30))),
        (list(range(27)), list(range(30, 40))),
    ]
    assert [bars(fold, 0, 39) for fold in sliding] == [
        (list(range(7)), list(range(10, 20))),
        (list(range(10, 17)), list(range(20, 30))),
        (list(range(20, 27)), list(range(30, 40))),
    ]


def test_combinatorial_folds_bar_by_bar() -> None:
    """40 bars in 4 groups, 2 of them tested: 6 folds. Training gives up 2 bars before a test, 2 + 3 after one."""
    folds = combinatorial_folds(0, 39 * STEP, STEP, groups=4, test_groups=2, purge=2, embargo=3)
    assert len(folds) == comb(4, 2)
    trained = [bars(fold, 0, 39)[0] for fold in folds]
    tested = [bars(fold, 0, 39)[1] for fold in folds]
    r = range
    assert tested[0] == [*r(20)]
    assert trained[0] == [*r(25, 40)]
    assert tested[1] == [*r(10), *r(20, 30)]
    assert trained[1] == [*r(15, 18), *r(35, 40)]
    assert tested[3] == [*r(10, 30)]
    assert trained[3] == [*r(8), *r(35, 40)]
    # Every group is tested in the same number of folds.
    assert np.bincount(np.concatenate(tested), minlength=40).tolist() == [comb(3, 1)] * 40


def test_instants_are_lines_oldest_first() -> None:
    day = 86_400_000
    (fold, *_) = combinatorial_folds(0, 30 * day - STEP, STEP, groups=3, test_groups=1, purge=0, embargo=0)
    assert fold.instants() == [
        "test  1970-01-01 00:00 to 1970-01-10 23:45",
        "train 1970-01-11 00:00 to 1970-01-30 23:45",
    ]


@pytest.mark.parametrize(("purge", "shared"), [(0, 101), (1, 100), (100, 1), (101, 0), (150, 0)])
def test_label_overlaps_counts_the_shared_bars(purge: int, shared: int) -> None:
    """Neighbouring bars, v - t = 1: labels are made of t + 1..t + 101 and t + 2..t + 102, and v's reaches 101 on."""
    (fold,) = walk_forward(0, 999 * STEP, STEP, folds=1, purge=purge)
    assert fold.label_overlaps(STEP, HORIZON) == shared


@given(
    count=st.integers(300, 700),
    groups=st.integers(3, 5),
    tested=st.integers(1, 2),
    purge=st.integers(0, 20),
    embargo=st.integers(0, 10),
)
@settings(max_examples=60, deadline=None)
def test_every_training_bar_keeps_its_distance(count: int, groups: int, tested: int, purge: int, embargo: int) -> None:
    last = (count - 1) * STEP
    combinatorial = combinatorial_folds(0, last, STEP, groups=groups, test_groups=tested, purge=purge, embargo=embargo)
    forward = walk_forward(0, last, STEP, folds=groups, purge=purge, embargo=embargo)
    for fold in (*combinatorial, *forward):
        trained, held_out = (np.array(each) for each in bars(fold, 0, count - 1))
        apart = held_out[:, None] - trained
        assert apart[apart > 0].min(initial=count) > purge
        assert (-apart[apart < 0]).min(initial=count) > purge + embargo
        assert fold.label_overlaps(STEP, purge - 1) == 0
    assert all(fold.train[-1].last_ms < fold.test[0].first_ms for fold in forward)


def test_too_few_bars_and_counts_that_cannot_be() -> None:
    with pytest.raises(MissingInputError, match="3 bars of labels are too few for 4 groups"):
        walk_forward(0, 2 * STEP, STEP, folds=3, purge=0)
    with pytest.raises(MissingInputError, match=r"tests from 1970-01-01 02:30 on has no bar left .* take 10"):
        walk_forward(0, 39 * STEP, STEP, folds=3, purge=10)
    with pytest.raises(ValueError, match="groups must be 4 or more, received 3"):
        combinatorial_folds(0, 39 * STEP, STEP, groups=3, test_groups=3, purge=0, embargo=0)
    with pytest.raises(ValueError, match="purge must be 0 or more, received -1"):
        walk_forward(0, 39 * STEP, STEP, folds=1, purge=-1)


# What a purge is worth. The label of bar t is the sum of the returns of the bars t + 1 to t + 101, which are pure
# noise: nothing about it can be known at t. Labels d bars apart share 101 - d returns: they correlate by 1 - d / 101. A
# learner that says the label of the training bar nearest in time knows just that.

SERIES = 1500


def overlapping_labels(count: int, seed: int = 5) -> np.ndarray:
    """[count, SERIES]"""
    noise = np.random.default_rng(seed).normal(size=(count + REACH, SERIES))
    summed = np.concatenate([np.zeros((1, SERIES)), np.cumsum(noise, axis=0)])
    return summed[1 + REACH :] - summed[1:-REACH]


def skill_by_bar(labels: np.ndarray, trained: np.ndarray, tested: np.ndarray) -> np.ndarray:
    """Correlation over all series of each tested label with the trained one that is nearest in time: [tested]."""
    nearest = trained[np.abs(tested[:, None] - trained).argmin(axis=1)]
    left, right = labels[tested], labels[nearest]
    return (left * right).mean(axis=1) / np.sqrt((left**2).mean(axis=1) * (right**2).mean(axis=1))


@pytest.mark.parametrize(
    ("purge", "of_first_bar", "of_stretch"),
    [
        (0, 100 / 101, 50 / 101),  # d = 1..101: the mean of 1 - d / 101 is 1 - 51 / 101
        (50, 50 / 101, 25 * 51 / 101**2),  # d = 51..151: 50 / 101 down to 0; the sum is 50 * 51 / 2 / 101
        (101, 0.0, 0.0),  # d = 102 and more: nothing is shared
    ],
)
def test_purge_0_leaks_and_purge_101_does_not(purge: int, of_first_bar: float, of_stretch: float) -> None:
    """The standard error of one correlation is 1 / sqrt(1500) = 0.026: both tolerances are four of them."""
    count = 2 * REACH + 606
    labels, last = overlapping_labels(count), (count - 1) * STEP
    cut = {
        "walk-forward": walk_forward(0, last, STEP, folds=1, purge=purge)[0],
        "combinatorial": combinatorial_folds(0, last, STEP, groups=2, test_groups=1, purge=purge, embargo=0)[0],
    }
    split = split_by_time(0, last, STEP, (0.4, 0.2, 0.2, 0.2), purge)
    cut["train | V1"] = Fold((split.spans[SPLITS[0]],), (split.spans[SPLITS[1]],))
    for name, fold in cut.items():
        trained, tested = (np.array(each) for each in bars(fold, 0, count - 1))
        if name == "combinatorial":  # trained after its test: the nearest bars are the last ones
            tested = tested[::-1]
        skill = skill_by_bar(labels, trained, tested[:REACH])
        assert skill[0] == pytest.approx(of_first_bar, abs=0.104), name
        assert skill.mean() == pytest.approx(of_stretch, abs=0.104), name
        assert (fold.label_overlaps(STEP, HORIZON) == 0) == (of_stretch == 0), name


def test_embargo_keeps_the_windows_of_later_training_off_the_tests_labels() -> None:
    """The window of t holds the bars t - 59 to t; the label of v the bars v + 1 to v + 101: apart where t - v > 160."""
    lookback = 60
    (fold, *_) = combinatorial_folds(0, 1999 * STEP, STEP, groups=2, test_groups=1, purge=REACH, embargo=lookback)
    trained, tested = bars(fold, 0, 1999)
    assert trained[0] - (lookback - 1) > tested[-1] + REACH
    assert fold.test == (Span(0, 999 * STEP),)
