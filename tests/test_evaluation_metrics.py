"""Metrics and bootstrap, with the arithmetic beside the number."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perpcast.evaluation import metrics
from perpcast.evaluation.bootstrap import confidence_interval, stationary_draws, sums_by_day

STEP = 900_000
DAY = 86_400_000


def test_errors_by_hand() -> None:
    realised, predicted = np.array([1.0, 2.0, -3.0]), np.array([1.0, 0.0, 1.0])
    assert metrics.mae(realised, predicted) == pytest.approx((0 + 2 + 4) / 3)
    assert metrics.rmse(realised, predicted) == pytest.approx(np.sqrt((0 + 4 + 16) / 3))
    assert metrics.r2(realised, predicted) == pytest.approx(1 - 20 / 14)  # mean 0: 1 + 4 + 9
    assert metrics.direction_accuracy(realised, predicted) == pytest.approx(1 / 3)
    assert metrics.pinball_loss(realised, predicted, 0.75) == pytest.approx((0 + 0.75 * 2 + 0.25 * 4) / 3)
    assert np.isnan(metrics.r2(np.ones(3), predicted))


def test_quantile_coverage_sees_both_edges_of_an_atom() -> None:
    realised = np.array([-1.0, -1.0, -1.0, 2.0])
    assert metrics.quantile_coverage(realised, np.full(4, -1.0)) == (0.0, 0.75)


def test_rank_ic_by_day_ties_and_small_bars() -> None:
    times = np.array([0, 0, 0, STEP, STEP, STEP, DAY, DAY])
    symbol = np.array([0, 1, 2, 0, 1, 2, 0, 1])
    realised = np.array([1.0, 2.0, 3.0, 1.0, 2.0, 2.0, 5.0, 6.0])
    predicted = np.array([10.0, 20.0, 30.0, 1.0, 3.0, 2.0, 5.0, 6.0])
    # Bar 0: 1. Bar 1: ranks (1, 2.5, 2.5) against (1, 3, 2): 1.5 / sqrt(1.5 x 2). Day 1 has two symbols only.
    daily = metrics.rank_ic_by_day(realised, predicted, symbol, times)
    assert daily.index.tolist() == [0]
    assert daily[0] == pytest.approx((1 + 1.5 / np.sqrt(3)) / 2)
    assert metrics.rank_ic_by_day(realised, np.ones(8), symbol, times).empty


def test_rank_ic_by_symbol_constant_forecast_has_none() -> None:
    values = metrics.rank_ic_by_symbol(
        np.array([1.0, 2.0, 3.0, 1.0, 2.0, 3.0]), np.array([3.0, 2.0, 1.0, 5.0, 5.0, 5.0]), np.repeat([0, 1], 3)
    )
    assert values[0] == pytest.approx(-1)
    assert np.isnan(values[1])


def test_calls_by_hand() -> None:
    """Called are the first three, of which two earned; three earned in all."""
    profit = np.array([True, True, False, True, False])
    probability = np.array([0.9, 0.6, 0.51, 0.5, 0.1])
    # Right: calls 1 and 2, no call 5. F1 is the harmonic mean of 2/3 and 2/3.
    expected = {"accuracy": 3 / 5, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3}
    assert metrics.classified(profit, probability) == pytest.approx(expected)
    # Above 0.55 two calls, both right: precision 1, recall 2/3, F1 2 x 2 / (2 + 3).
    expected = {"accuracy": 4 / 5, "precision": 1, "recall": 2 / 3, "f1": 4 / 5}
    assert metrics.classified(profit, probability, cut=0.55) == pytest.approx(expected)


def test_calls_that_are_never_made_have_no_precision() -> None:
    never = metrics.classified(np.array([True, False, False, False]), np.full(4, 0.25))
    assert never == pytest.approx({"accuracy": 3 / 4, "precision": np.nan, "recall": 0, "f1": 0}, nan_ok=True)
    nothing = metrics.classified(np.zeros(4, bool), np.full(4, 0.25))
    assert nothing == pytest.approx({"accuracy": 1, "precision": np.nan, "recall": np.nan, "f1": np.nan}, nan_ok=True)


def test_probabilities_by_hand() -> None:
    profit, probability = np.array([True, False, True]), np.array([0.8, 0.4, 0.5])
    assert metrics.brier(profit, probability) == pytest.approx((0.04 + 0.16 + 0.25) / 3)
    assert metrics.log_loss(profit, probability) == pytest.approx(-np.log(0.8 * 0.6 * 0.5) / 3)
    # Pairs (0.8, 0.4) and (0.5, 0.4), both in order; a tie is half a pair.
    assert metrics.auc(profit, probability) == 1
    assert metrics.auc(profit, np.array([0.8, 0.5, 0.5])) == pytest.approx(1.5 / 2)
    assert metrics.auc(profit, np.array([0.1, 0.4, 0.4])) == pytest.approx(0.5 / 2)
    assert np.isnan(metrics.auc(np.ones(3, bool), probability))
    # A float32 that was rounded to 1 and was wrong is no more certain than a float32 can be.
    assert metrics.log_loss(np.array([False]), np.ones(1, np.float32)) == pytest.approx(23 * np.log(2))


pairs = st.lists(st.tuples(st.booleans(), st.integers(0, 8)), min_size=2, max_size=40)


@given(pairs)
def test_auc_is_the_share_of_pairs_in_order(drawn: list[tuple[bool, int]]) -> None:
    profit, probability = np.array([won for won, _ in drawn]), np.array([eighths / 8 for _, eighths in drawn])
    wins, losses = probability[profit], probability[~profit]
    if len(wins) and len(losses):
        order = np.sign(wins[:, None] - losses[None])
        assert metrics.auc(profit, probability) == pytest.approx(((order + 1) / 2).mean())


def test_calibration_bins_by_hand() -> None:
    """Ten windows in five bins of two; the upper half is given 0.9 and shares one bin."""
    probability = np.array([0.05, 0.15, 0.2, 0.3, 0.4, 0.9, 0.9, 0.9, 0.9, 0.9])
    profit = np.array([0, 0, 0, 1, 1, 1, 1, 1, 0, 1], bool)
    bins = metrics.calibration_bins(profit, probability, bins=5)
    # Edges at the quantiles 0.2, 0.4, 0.6, 0.8 of 10 values: 0.19, 0.36, 0.9, 0.9.
    assert [row["count"] for row in bins] == [2, 2, 1, 5]
    assert [row["predicted"] for row in bins] == pytest.approx([0.1, 0.25, 0.4, 0.9])
    assert [row["realised"] for row in bins] == pytest.approx([0, 0.5, 1, 0.8])


@given(pairs)
def test_calibration_bins_hold_every_window_once(drawn: list[tuple[bool, int]]) -> None:
    profit, probability = np.array([won for won, _ in drawn]), np.array([eighths / 8 for _, eighths in drawn])
    bins = metrics.calibration_bins(profit, probability)
    count = np.array([row["count"] for row in bins])
    assert count.sum() == len(drawn)
    assert count @ [row["predicted"] for row in bins] == pytest.approx(probability.sum())
    assert count @ [row["realised"] for row in bins] == pytest.approx(profit.sum())
    assert (np.diff([row["predicted"] for row in bins]) > 0).all()


def test_sums_by_day_keep_empty_days() -> None:
    assert sums_by_day(np.array([5, 5, 7]), np.array([1.0, 2.0, 4.0])).tolist() == [[3.0], [0.0], [4.0]]


def test_stationary_draws_have_blocks_of_the_asked_mean_length() -> None:
    draws = stationary_draws(200, 5, 500, np.random.default_rng(1))
    follows = (draws[:, 1:] - draws[:, :-1]) % 200 == 1
    # A block goes on with probability 4/5, and a new one starts by chance at the following day with 1/200.
    assert follows.mean() == pytest.approx(0.8 + 0.2 / 200, abs=0.005)
    assert np.bincount(draws.ravel(), minlength=200).std() < 0.1 * draws.size / 200


def test_confidence_interval_covers_the_truth_where_days_depend_on_each_other() -> None:
    """Weekly-persistent days: blocks of a day are too narrow, blocks of 15 cover about as often as they say."""

    def covered(mean_block: float) -> float:
        hits = 0
        for seed in range(120):
            rng = np.random.default_rng(seed)
            shocks = rng.normal(size=407)
            days = np.convolve(shocks, np.ones(7), mode="valid")[:400]
            sums = np.stack([days, np.ones(400)], axis=1)
            lower, upper = confidence_interval(
                sums, lambda s: s[..., 0] / s[..., 1], rng, mean_block=mean_block, replicates=300
            )
            hits += lower <= 0 <= upper
        return hits / 120

    assert covered(1) < 0.65
    assert covered(15) > 0.85


def test_confidence_interval_too_few_days_is_undefined() -> None:
    sums = np.ones((9, 2))
    assert np.isnan(confidence_interval(sums, lambda s: s[..., 0], np.random.default_rng(1))).all()
