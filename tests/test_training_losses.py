"""What training minimises, by hand, and where its minimum lies."""

from dataclasses import replace

import keras
import numpy as np
import pytest

from perpcast.task import Target, Task
from perpcast.training.losses import task_loss
from tests.model_world import HORIZON, TASK

CLASSIFIER = replace(TASK, targets=tuple(Target(side, "classification", HORIZON) for side in ("buy", "sell")))
MIXED = replace(TASK, targets=(Target("buy", "classification", HORIZON), Target("sell", "regression", HORIZON, (0.5,))))
PLAIN = replace(TASK, targets=(Target("buy", "regression", HORIZON),))


def losses(
    task: Task, labels: list[list[float]], raw: list[list[float]], weights: list[list[float]] | None = None
) -> np.ndarray:
    loss = task_loss(task, None if weights is None else np.array(weights))
    found = loss(np.array(labels, np.float32), np.array(raw, np.float32))
    return np.asarray(keras.ops.convert_to_numpy(found))


def test_returns_cost_squared_error_and_pinball() -> None:
    """Buy: mean off by 1, then quantiles .5 .75 .9 below by 2, 0, -1: 1 + 1 + 0 + .1; sell exact: 0. Then sell off."""
    labels, raw = [[2.0, 5.0], [0.0, 0.0]], [[1.0, 0, 2, 3, 5, 5, 5, 5], [0.0, 0, 0, 0, -3, 0, 0, 2]]
    np.testing.assert_allclose(losses(TASK, labels, raw), [2.1, 9 + 0.1 * 2], rtol=1e-6)


def test_returns_without_quantiles_cost_squared_error() -> None:
    np.testing.assert_allclose(losses(PLAIN, [[2.0], [0.5]], [[1.0], [0.5]]), [1, 0])


def test_profits_cost_the_cross_entropy_of_their_logits() -> None:
    """sigmoid(log 3) = 3/4: a profit costs log 4/3, a loss log 4; sigmoid(0) costs log 2."""
    labels, raw = [[1.0, 0.0], [0.0, 1.0]], [[np.log(3), 0.0], [np.log(3), 0.0]]
    np.testing.assert_allclose(losses(CLASSIFIER, labels, raw), np.log([4 / 3 * 2, 4 * 2]), rtol=1e-6)


def test_class_weights_multiply_each_outcome_of_each_target() -> None:
    labels, raw = [[1.0, 0.0], [0.0, 1.0]], [[np.log(3), 0.0], [np.log(3), 0.0]]
    weighted = losses(CLASSIFIER, labels, raw, [[0.5, 3.0], [2.0, 0.0]])
    # Buy: 3 log 4/3, sell: 2 log 2; then buy: half of log 4, sell: a profit that counts nothing.
    np.testing.assert_allclose(weighted, [3 * np.log(4 / 3) + 2 * np.log(2), 0.5 * np.log(4)], rtol=1e-6)
    np.testing.assert_array_equal(
        losses(CLASSIFIER, labels, raw, [[1.0, 1.0], [1.0, 1.0]]), losses(CLASSIFIER, labels, raw)
    )


def test_targets_of_both_kinds_take_their_own_columns() -> None:
    """Profit log 2; return 2 against mean 1 and median 4: 1 + half of 2."""
    np.testing.assert_allclose(losses(MIXED, [[1.0, 2.0]], [[0.0, 1.0, 4.0]]), [np.log(2) + 2], rtol=1e-6)


@pytest.mark.parametrize("logit", [1e4, -1e4])
def test_surest_logits_cost_finite_numbers(logit: float) -> None:
    """Right costs nothing, wrong the logit itself."""
    right = float(logit > 0)
    cost = losses(CLASSIFIER, [[right, 1 - right]], [[logit, logit]])
    np.testing.assert_allclose(cost, [1e4], rtol=1e-6)


@pytest.mark.parametrize("shape", [(2,), (1, 2), (2, 3)])
def test_class_weights_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"class_weights must be \[2, 2\], received"):
        task_loss(CLASSIFIER, np.ones(shape))


@pytest.mark.parametrize("quantile", [0.5, 0.75, 0.9])
def test_the_least_pinball_loss_is_at_the_quantile(quantile: float) -> None:
    task = replace(TASK, targets=(Target("buy", "regression", HORIZON, (quantile,)),))
    labels = np.random.default_rng(1).normal(size=2001).astype(np.float32)
    levels = np.linspace(-2, 2, 201, dtype=np.float32)
    means = [losses(task, labels[:, None].tolist(), [[0.0, float(level)]] * 2001).mean() for level in levels]
    assert levels[int(np.argmin(means))] == pytest.approx(np.quantile(labels, quantile), abs=0.02)
