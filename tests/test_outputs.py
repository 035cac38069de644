"""From raw columns to what a trader reads: units, payoffs, calibration, and back from JSON."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perpcast.outputs import OutputReading, ProfitReading, ReturnReading, platt_scaling
from perpcast.task import Target, Task
from tests.model_world import HORIZON, TASK

CLASSIFIER = replace(TASK, targets=tuple(Target(side, "classification", HORIZON) for side in ("buy", "sell")))
MIXED = replace(TASK, targets=(Target("buy", "classification", HORIZON), Target("sell", "regression", HORIZON, (0.5,))))
LABELS = np.array([[0.03, -0.01], [-0.01, -0.02], [0.01, 0.00], [-0.03, 0.09]])


def cross_entropy(logit: np.ndarray, wanted: np.ndarray, slope: float, intercept: float) -> float:
    score = slope * logit + intercept
    return float(np.sum(np.logaddexp(0, score) - wanted * score))


@pytest.mark.parametrize(
    ("task", "outputs", "columns"),
    [
        (TASK, [f"{side}_{name}" for side in ("buy", "sell") for name in ("mean", "q50", "q75", "q90")], 8),
        (CLASSIFIER, ["buy_profit_probability", "buy_mean", "sell_profit_probability", "sell_mean"], 2),
        (MIXED, ["buy_profit_probability", "buy_mean", "sell_mean", "sell_q50"], 3),
    ],
)
def test_read_answers_the_outputs_of_the_task_from_its_columns(task: Task, outputs: list[str], columns: int) -> None:
    reading = OutputReading.fit(task, LABELS)
    assert sum(target.columns for target in task.targets) == columns
    assert list(task.outputs) == outputs
    values = reading.read(np.zeros((5, columns)))
    assert list(values) == list(reading.units) == outputs
    assert {(each.shape, each.dtype) for each in values.values()} == {((5,), np.dtype(np.float32))}
    assert reading.read(np.zeros((0, columns)))[outputs[0]].shape == (0,)
    for wrong in ((5, columns + 1), (columns,)):
        with pytest.raises(ValueError, match=rf"raw columns must be \[n, {columns}\], received"):
            reading.read(np.zeros(wrong))


def test_returns_by_hand() -> None:
    """Buy: mean 0, deviation sqrt((9 + 1 + 1 + 9) / 4) = 2.236 %."""
    reading = OutputReading.fit(TASK, LABELS)
    deviation = np.sqrt(20 / 4) / 100
    buy = reading.readings[0]
    assert isinstance(buy, ReturnReading)
    assert (buy.mean, buy.deviation) == pytest.approx((0, deviation))
    np.testing.assert_allclose(reading.targets(LABELS)[:, 0], np.array([3, -1, 1, -3]) / np.sqrt(5), rtol=1e-6)
    values = reading.read(np.array([[1.0, -1.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0]]))
    assert values["buy_mean"] == pytest.approx([deviation])
    assert values["buy_q90"] == pytest.approx([2 * deviation])
    # Sell: (-1 - 2 + 0 + 9) / 4 = 1.5 %.
    assert values["sell_q50"] == pytest.approx([0.015])
    assert reading.units["buy_q50"] == pytest.approx(deviation)


def test_profits_by_hand() -> None:
    """Buy wins 3 and 1 %, loses 1 and 3 %; sell wins 9 % once, and a return of exactly 0 is no profit."""
    reading = OutputReading.fit(CLASSIFIER, LABELS)
    np.testing.assert_array_equal(reading.targets(LABELS), [[1, 0], [0, 0], [1, 0], [0, 1]])
    described = reading.to_json()
    assert described["buy"] == pytest.approx({"win": 0.02, "loss": -0.02, "slope": 1, "intercept": 0})
    assert described["sell"] == pytest.approx({"win": 0.09, "loss": -0.01, "slope": 1, "intercept": 0})
    values = reading.read(np.array([[np.log(3), 0.0], [0.0, -1000.0]]))
    assert values["buy_profit_probability"] == pytest.approx([3 / 4, 1 / 2])
    assert values["buy_mean"] == pytest.approx([0.75 * 0.02 - 0.25 * 0.02, 0], abs=1e-9)
    assert values["sell_profit_probability"] == pytest.approx([1 / 2, 0])
    assert values["sell_mean"] == pytest.approx([0.5 * 0.09 - 0.5 * 0.01, -0.01])
    assert reading.units == pytest.approx(
        {"buy_profit_probability": 1, "buy_mean": 0.04, "sell_profit_probability": 1, "sell_mean": 0.1}
    )


def test_the_mean_over_the_training_rows_is_what_they_earned_where_the_base_rate_is_predicted() -> None:
    reading = OutputReading.fit(CLASSIFIER, LABELS)
    base = reading.targets(LABELS).mean(axis=0, dtype=np.float64)
    values = reading.read(np.log(base / (1 - base))[None])
    for side, earned in zip(("buy", "sell"), LABELS.mean(axis=0), strict=True):
        assert values[f"{side}_mean"] == pytest.approx([earned], abs=1e-8)


def test_labels_of_one_kind_leave_finite_readings() -> None:
    constant, losses = np.full((3, 2), 0.013), np.full((3, 2), -0.01)
    assert OutputReading.fit(TASK, constant).to_json()["buy"] == pytest.approx({"mean": 0.013, "deviation": 1})
    # Nothing ever won: no win to hope for.
    hopeless = {"win": 0, "loss": -0.01, "slope": 1, "intercept": 0}
    assert OutputReading.fit(CLASSIFIER, losses).to_json()["buy"] == pytest.approx(hopeless)


@pytest.mark.parametrize("labels", [np.zeros((0, 2)), np.array([[0.1, np.nan]]), np.zeros((3, 1))])
def test_fit_without_a_label_is_refused(labels: np.ndarray) -> None:
    with pytest.raises(ValueError, match="realised must"):
        OutputReading.fit(TASK, labels)


# --- calibration ----------------------------------------------------------------------------------------------------


def test_calibration_recovers_the_slope_and_intercept_that_were_planted() -> None:
    """200,000 outcomes drawn from sigmoid(0.5 z - 1): the standard error of either is below 0.01."""
    rng = np.random.default_rng(1)
    logit = 2 * rng.normal(size=200_000)
    profit = rng.random(200_000) < 1 / (1 + np.exp(1 - 0.5 * logit))
    assert platt_scaling(logit, profit) == pytest.approx((0.5, -1), abs=0.03)


def test_calibration_minimises_the_cross_entropy() -> None:
    rng = np.random.default_rng(2)
    logit = rng.normal(1, 3, 400)
    profit = rng.random(400) < 1 / (1 + np.exp(-0.3 * logit))
    wins = int(profit.sum())
    wanted = np.where(profit, (wins + 1) / (wins + 2), 1 / (400 - wins + 2))
    slope, intercept = platt_scaling(logit, profit)
    best = cross_entropy(logit, wanted, slope, intercept)
    for move in ((1e-3, 0), (-1e-3, 0), (0, 1e-3), (0, -1e-3)):
        assert cross_entropy(logit, wanted, slope + move[0], intercept + move[1]) > best


@pytest.mark.parametrize(
    ("logit", "profit"),
    [
        ([-2.0, -1.0, 1.0, 2.0], [True, True, False, False]),  # the wrong way round
        ([0.7, 0.7, 0.7, 0.7], [True, True, False, False]),  # says nothing
        ([1.0, -1.0, 1.0, -1.0], [True, True, False, False]),  # orders nothing
    ],
)
def test_a_useless_model_has_the_base_rate_everywhere(logit: list[float], profit: list[bool]) -> None:
    assert platt_scaling(np.array(logit), np.array(profit)) == (pytest.approx(0, abs=1e-9), pytest.approx(0, abs=1e-9))


def test_calibration_of_separable_data_is_finite_and_sure() -> None:
    """Eight wins above eight losses: the smoothed targets are 0.9 and 0.1, and reached where only two logits occur."""
    logit = np.repeat([1.0, -1.0], 8)
    slope, intercept = platt_scaling(logit, logit > 0)
    assert (slope, intercept) == (pytest.approx(np.log(9)), pytest.approx(0, abs=1e-9))


def test_calibration_arrives_where_a_full_newton_step_would_fly_off() -> None:
    """A hundred losses beside two far wins: at the minimum the residuals vanish, in sum and against the logits."""
    logit = np.concatenate([np.linspace(-1, 1, 100), [100.0, 100.0]])
    slope, intercept = platt_scaling(logit, logit > 1)
    residual = 1 / (1 + np.exp(-slope * logit - intercept)) - np.where(logit > 1, 3 / 4, 1 / 102)
    assert (residual.sum(), residual @ logit / 100) == pytest.approx((0, 0), abs=1e-6)


@pytest.mark.parametrize("logit", [[], [0.0, np.nan], [np.inf, 0.0]])
def test_calibration_without_logits_is_refused(logit: list[float]) -> None:
    with pytest.raises(ValueError, match="calibration needs finite logits"):
        platt_scaling(np.array(logit), np.zeros(len(logit), bool))


rows = st.lists(st.tuples(st.floats(-50, 50, width=32), st.booleans()), min_size=1, max_size=40)


@given(rows)
def test_calibrated_probabilities_are_monotone_and_have_the_base_rate(drawn: list[tuple[float, bool]]) -> None:
    logit, profit = np.array([z for z, _ in drawn]), np.array([won for _, won in drawn])
    slope, intercept = platt_scaling(logit, profit)
    assert slope >= 0
    assert np.isfinite([slope, intercept]).all()
    reading = ProfitReading(0.02, -0.01, slope, intercept)
    probability, mean = reading.read(logit[:, None]).T
    order = np.argsort(logit, kind="stable")
    assert (np.diff(probability[order]) >= 0).all()
    assert (np.diff(mean[order]) >= -1e-15).all()
    assert abs(probability.mean() - profit.mean()) < 1 / len(drawn) + 1e-6
    # Never worse than the base rate, nor than the network's own word, by the rows it was fitted to.
    wins, losses = int(profit.sum()), int((~profit).sum())
    wanted = np.where(profit, (wins + 1) / (wins + 2), 1 / (losses + 2))
    best = cross_entropy(logit, wanted, slope, intercept)
    base = float(np.mean(wanted))
    assert best <= cross_entropy(logit, wanted, 0, float(np.log(base / (1 - base)))) + 1e-9
    assert best <= cross_entropy(logit, wanted, 1, 0) + 1e-9


def test_calibrated_of_every_target_by_its_own_columns_and_again_the_same() -> None:
    rng = np.random.default_rng(3)
    raw = rng.normal(size=(500, 2))
    returns = np.where(
        rng.random((500, 2)) < 1 / (1 + np.exp(np.array([0.5, 2]) - np.array([2, 0.5]) * raw)), 0.02, -0.01
    )
    first = OutputReading.fit(CLASSIFIER, returns)
    calibrated = first.calibrated(raw, returns)
    assert calibrated.calibrated(raw, returns) == calibrated
    probability = calibrated.read(raw)
    for number, side in enumerate(("buy", "sell")):
        reading = calibrated.readings[number]
        assert isinstance(reading, ProfitReading)
        assert (reading.slope, reading.intercept) == platt_scaling(raw[:, number], returns[:, number] > 0)
        assert (reading.win, reading.loss) == pytest.approx((0.02, -0.01))
        won = (returns[:, number] > 0).mean()
        assert probability[f"{side}_profit_probability"].mean() == pytest.approx(won, abs=1 / 500)


def test_calibration_leaves_returns_alone() -> None:
    regression = OutputReading.fit(TASK, LABELS)
    assert regression.calibrated(np.ones((4, 8)), LABELS) == regression
    mixed = OutputReading.fit(MIXED, LABELS)
    calibrated = mixed.calibrated(np.array([[2.0, 0, 0], [-1, 0, 0], [1, 0, 0], [0, 0, 0]]), LABELS)
    assert calibrated.readings[1] == mixed.readings[1]
    assert calibrated.readings[0] != mixed.readings[0]


# --- kept with the weights ------------------------------------------------------------------------------------------


@given(st.sampled_from([TASK, CLASSIFIER, MIXED]), st.integers(0, 1000))
def test_json_and_back_reads_alike_to_the_last_bit(task: Task, seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.normal(size=(30, 2))
    raw = rng.normal(size=(30, sum(target.columns for target in task.targets)))
    reading = OutputReading.fit(task, labels).calibrated(raw, labels)
    again = OutputReading.from_json(task, json.loads(json.dumps(reading.to_json(), allow_nan=False)))
    assert again == reading
    for name, values in again.read(raw).items():
        np.testing.assert_array_equal(values, reading.read(raw)[name])


@given(st.integers(0, 1000))
def test_read_inverts_targets_of_returns(seed: int) -> None:
    """A network that answers its targets is read as the labels themselves."""
    labels = np.random.default_rng(seed).normal(-0.003, 0.02, (20, 2))
    reading = OutputReading.fit(TASK, labels)
    values = reading.read(np.repeat(reading.targets(labels), 4, axis=1))
    for number, side in enumerate(("buy", "sell")):
        for name in ("mean", "q50", "q75", "q90"):
            np.testing.assert_allclose(values[f"{side}_{name}"], labels[:, number], atol=1e-8)


@pytest.mark.parametrize(
    ("task", "change"),
    [
        (CLASSIFIER, {"sell": {}}),
        (CLASSIFIER, {"sell": {"win": 0.1, "loss": -0.1, "slope": 1.0}}),
        (CLASSIFIER, {"sell": {"mean": 0.1, "deviation": 0.1}}),
        (TASK, {"buy": {"mean": 0.1}}),
        (replace(TASK, targets=(*TASK.targets, Target("best", "regression", 3))), {}),
    ],
)
def test_json_of_another_task_is_refused(task: Task, change: dict[str, dict[str, float]]) -> None:
    described = OutputReading.fit(replace(task, targets=task.targets[:2]), LABELS).to_json()
    with pytest.raises((KeyError, TypeError)):
        OutputReading.from_json(task, {**described, **change})
