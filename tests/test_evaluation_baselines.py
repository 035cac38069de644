"""The baselines: what they see of a window, their closed forms by hand, and that they learn from train and V1 alone."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perpcast.evaluation import baselines
from perpcast.evaluation.baselines import (
    PENALTIES,
    BaselineInputs,
    BoostedTrees,
    Constant,
    LastSign,
    Ridge,
    fit_baselines,
)
from perpcast.features.scaler import Scaler
from perpcast.market import SIDES
from perpcast.training.outcome import baseline_inputs
from tests.model_world import small_dataset

COLUMNS = ("price_change_1", "level")
PLAIN = Scaler(COLUMNS, (0.0, 0.0), (1.0, 1.0))


def world(change: list[float], labels: list[list[float]], train: int) -> BaselineInputs:
    """Windows of a single bar: the first `train` are training rows, the others those of V1 and test."""
    inputs = np.column_stack([change, np.zeros(len(change))]).astype(np.float32)
    rows = np.arange(len(change))
    index = {"train": rows[:train], "v1": rows[train:], "test": rows[train:]}
    return BaselineInputs(inputs, PLAIN, np.zeros(len(change), int), np.array(labels), index, lookback=1, symbols=1)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> BaselineInputs:
    """Labels are the newest `level` in units of 1 %, less 0.3 %, with noise of 0.3 %; sells earn what buys lose."""
    return baseline_inputs(small_dataset(tmp_path_factory.mktemp("planted")))


def with_labels(inputs: BaselineInputs, split: str, labels: np.ndarray) -> BaselineInputs:
    changed = inputs.expected_return.copy()
    changed[inputs.index[split]] = labels
    return replace(inputs, expected_return=changed)


def explained(inputs: BaselineInputs, predicted: dict[str, np.ndarray], split: str = "test") -> float:
    """Share of the variance of both sides' labels that the forecast explains."""
    labels = inputs.expected_return[inputs.index[split]]
    guess = np.column_stack([predicted[side] for side in SIDES])
    return float(1 - np.mean((labels - guess) ** 2) / np.mean((labels - labels.mean(axis=0)) ** 2))


# --- what they see --------------------------------------------------------------------------------------------------


def test_summaries_by_hand() -> None:
    """Look-back 3: no more than RECENT_BARS, so that the newest bar and the mean of all three are what there is."""
    level = np.array([5.0, 1.0, 2.0, 6.0, np.nan, 4.0, 4.0, 7.0])
    inputs = BaselineInputs(
        np.column_stack([level, level]).astype(np.float32),
        Scaler(COLUMNS, (1.0, 0.0), (2.0, 1.0)),
        np.zeros(8, int),
        np.zeros((8, 2)),
        {"train": np.array([3, 7])},
        lookback=3,
        symbols=1,
    )
    found = np.concatenate([summaries for _, summaries in inputs.summaries(inputs.index["train"])])
    # (6 - 1) / 2 and 6; the mean of 1, 2, 6 is 3: (3 - 1) / 2 and 3. After the missing bar 4, 4, 7: 3 and 7, 2 and 5.
    assert found == pytest.approx(np.array([[2.5, 6, 1, 3], [3, 7, 2, 5]]))


@given(
    lookback=st.integers(1, 40),
    gaps=st.lists(st.integers(0, 199), max_size=4),
    block=st.integers(1, 50),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, deadline=None)
def test_summaries_are_means_of_whole_windows_wherever_bars_are_missing(
    lookback: int, gaps: list[int], block: int, seed: int
) -> None:
    values = np.random.default_rng(seed).normal(3, 2, (200, 2)).astype(np.float32)
    values[gaps] = np.nan
    ends = [e for e in range(lookback - 1, 200) if np.isfinite(values[e + 1 - lookback : e + 1]).all()]
    if not ends:
        return
    inputs = BaselineInputs(
        values, PLAIN, np.zeros(200, int), np.zeros((200, 2)), {"train": np.array(ends)}, lookback, symbols=1
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baselines, "_BLOCK_WINDOWS", block)
        parts = list(inputs.summaries(inputs.index["train"]))
    assert np.concatenate([rows for rows, _ in parts]).tolist() == ends
    lengths = sorted({1, min(12, lookback), lookback})
    wanted = [np.concatenate([values[e + 1 - n : e + 1].mean(axis=0) for n in lengths]) for e in ends]
    np.testing.assert_allclose(np.concatenate([part for _, part in parts]), wanted, rtol=1e-4, atol=1e-5)


# --- constant and last sign -----------------------------------------------------------------------------------------


def test_constant_and_last_sign_by_hand() -> None:
    inputs = world(
        [-0.1, -0.2, 0.3, -1.0, 0.0, 1.0], [[1.0, 0.0], [2.0, 0.0], [6.0, 3.0], [9, 9], [9, 9], [9, 9]], train=3
    )
    constant, last_sign = (each.fit(inputs).predict(inputs, "test") for each in (Constant, LastSign))
    assert {side: values.tolist() for side, values in constant.items()} == {"buy": [3.0] * 3, "sell": [1.0] * 3}
    # After a fall (1 + 2) / 2, after a rise 6, no change never occurred: the mean 3.
    assert last_sign["buy"].tolist() == [1.5, 3.0, 6.0]
    assert last_sign["sell"].tolist() == [0.0, 1.0, 3.0]


# --- ridge ----------------------------------------------------------------------------------------------------------


def design(inputs: BaselineInputs, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels of a split, at once and without blocks."""
    rows = inputs.index[split]
    windows = inputs.scaler.apply(inputs.inputs[rows[:, None] + np.arange(1 - inputs.lookback, 1)]).astype(float)
    symbols = np.eye(inputs.symbols)[inputs.symbol[rows]]
    return np.column_stack([windows[:, -1], windows.mean(axis=1), symbols]), inputs.expected_return[rows]


def test_ridge_is_the_closed_form_and_the_penalty_the_best_on_v1(planted: BaselineInputs) -> None:
    """(X'X / n + penalty) w = X'y / n about the training means, for every penalty; noise in V1 asks for a large one."""
    inputs = with_labels(planted, "v1", 0.05 * np.random.default_rng(1).normal(size=(len(planted.index["v1"]), 2)))
    (x, y), (x_stop, y_stop) = design(inputs, "train"), design(inputs, "v1")
    x_mean, y_mean = x.mean(axis=0), y.mean(axis=0)
    gram, shared = (x - x_mean).T @ (x - x_mean) / len(x), (x - x_mean).T @ (y - y_mean) / len(x)
    weights = {penalty: np.linalg.solve(gram + penalty * np.eye(len(gram)), shared) for penalty in PENALTIES}
    errors = {penalty: np.sum((y_stop - y_mean - (x_stop - x_mean) @ w) ** 2) for penalty, w in weights.items()}

    ridge = Ridge.fit(inputs)
    assert ridge.penalty == min(errors, key=lambda penalty: errors[penalty])
    assert ridge.penalty > Ridge.fit(planted).penalty
    np.testing.assert_allclose(ridge.weights, weights[ridge.penalty], atol=1e-9)
    x_test, _ = design(inputs, "test")
    wanted = y_mean + (x_test - x_mean) @ weights[ridge.penalty]
    predicted = ridge.predict(inputs, "test")
    np.testing.assert_allclose(np.column_stack([predicted[side] for side in SIDES]), wanted, atol=1e-9)


def test_ridge_finds_a_planted_line_and_the_mean_of_each_symbol(planted: BaselineInputs) -> None:
    """Of the variance 1 + 0.3^2, noise is 0.09 / 1.09 = 8 %; then labels that are nothing but their symbol's own."""
    assert explained(planted, Ridge.fit(planted).predict(planted, "test")) == pytest.approx(1 / 1.09, abs=0.02)
    own = np.array([0.01, -0.02, 0.03])[planted.symbol]
    by_symbol = replace(planted, expected_return=np.stack([own, -own], axis=1))
    predicted = Ridge.fit(by_symbol).predict(by_symbol, "test")
    np.testing.assert_allclose(predicted["buy"], own[planted.index["test"]], atol=3e-4)


def test_ridge_finds_nothing_where_nothing_is(tmp_path: Path) -> None:
    inputs = baseline_inputs(small_dataset(tmp_path, edge=0.0))
    assert explained(inputs, Ridge.fit(inputs).predict(inputs, "test")) == pytest.approx(0, abs=0.01)


# --- boosted trees --------------------------------------------------------------------------------------------------


def test_trees_find_what_no_line_can(planted: BaselineInputs) -> None:
    """A label of |level|: the line explains nothing, the trees most of it."""
    level = np.abs(planted.inputs[:, 1].astype(float) - 1000) / 50
    bent = replace(planted, expected_return=0.01 * np.stack([level, -level], axis=1))
    assert explained(bent, Ridge.fit(bent).predict(bent, "test")) < 0.02
    assert explained(bent, BoostedTrees.fit(bent).predict(bent, "test")) > 0.9


def test_trees_are_those_that_v1_left(planted: BaselineInputs) -> None:
    """V1 that agrees keeps dozens; where it shows the opposite each tree makes it worse, and only one is asked."""
    agreeing = BoostedTrees.fit(planted)
    stop = planted.index["v1"]
    denying = BoostedTrees.fit(with_labels(planted, "v1", planted.expected_return[stop][:, ::-1]))
    assert min(agreeing.trees) > 20
    assert denying.trees == (1, 1)
    for side, (model, trees) in enumerate(zip(agreeing.models, agreeing.trees, strict=True)):
        blocks = planted.summaries(stop)
        features = np.concatenate([np.column_stack([s, planted.symbol[rows]]) for rows, s in blocks]).astype(np.float32)
        errors = [np.mean((planted.expected_return[stop, side] - g) ** 2) for g in model.staged_predict(features)]
        assert trees == int(np.argmin(errors)) + 1


def test_trees_grow_on_so_many_windows_spread_over_all(
    planted: BaselineInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "BOOSTED_WINDOWS", 1500)
    train = planted.index["train"]
    labels = np.full((len(train), 2), 7.0)
    labels[np.linspace(0, len(train) - 1, 1500).round().astype(int)] = 0.01
    predicted = BoostedTrees.fit(with_labels(planted, "train", labels)).predict(planted, "test")
    assert len(train) > 2 * 1500
    np.testing.assert_allclose(predicted["buy"], 0.01)  # the labels of 7 were never read


# --- all of them ----------------------------------------------------------------------------------------------------


def test_baselines_know_the_labels_of_train_and_v1_only(planted: BaselineInputs) -> None:
    other = planted
    for split in ("v2", "test"):
        other = with_labels(other, split, -7 * planted.expected_return[planted.index[split]])
    for left, right in zip(fit_baselines(planted), fit_baselines(other), strict=True):
        for split in ("v2", "test"):
            before, after = left.predict(planted, split), right.predict(other, split)
            assert all(np.array_equal(before[side], after[side]) for side in SIDES)
            assert before.keys() == set(SIDES)
            assert len(before["buy"]) == len(planted.index[split])


def test_baselines_do_not_depend_on_how_windows_are_blocked(
    planted: BaselineInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = [each.predict(planted, "test") for each in fit_baselines(planted)]
    monkeypatch.setattr(baselines, "_BLOCK_WINDOWS", 97)
    for left, each in zip(whole, fit_baselines(planted), strict=True):
        right = each.predict(planted, "test")
        for side in SIDES:
            np.testing.assert_allclose(left[side], right[side], atol=1e-9)


def test_baselines_have_names_of_their_own(planted: BaselineInputs) -> None:
    assert [each.name for each in fit_baselines(planted)] == ["constant", "last sign", "ridge", "boosted trees"]
