"""Splits, metrics, bootstrap, baselines, threshold and verdict, with the arithmetic beside the number."""

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perpcast.errors import MissingInputError
from perpcast.evaluation import metrics
from perpcast.evaluation.baselines import Baseline, Constant, LastSign
from perpcast.evaluation.bootstrap import confidence_interval, stationary_draws, sums_by_day
from perpcast.evaluation.scores import PROFIT_METRICS, Evaluation, Windows, baseline_forecasts, evaluate
from perpcast.evaluation.splits import SPLITS, TimeSplit, label_overlaps, split_by_time
from perpcast.evaluation.threshold import choose_threshold, take_trades
from perpcast.market import SIDES

STEP = 900_000
DAY = 86_400_000
FRACTIONS = (0.7, 0.075, 0.075, 0.15)


def synthetic(edge: float, days: int = 30, symbols: int = 8, seed: int = 1) -> tuple[Windows, np.ndarray]:
    """Windows whose return is `edge` x a slow state + noise, and that state: buy gains what sell loses."""
    rng = np.random.default_rng(seed)
    bars = days * 96
    state = rng.normal(size=(bars // 48, symbols)).repeat(48, axis=0).ravel()
    noise = rng.normal(size=(bars // 12, symbols)).repeat(12, axis=0).ravel()
    returns = 0.01 * (edge * state + noise)
    windows = Windows(
        tuple(f"S{number}USDT" for number in range(symbols)),
        np.tile(np.arange(symbols), bars),
        np.repeat(np.arange(bars) * STEP, symbols) + 20_000 * DAY,
        {"buy": returns, "sell": -returns},
        {side: np.full(len(returns), 10) for side in SIDES},
        STEP,
    )
    return windows, state


def scored(edge: float, forecast_scale: float, days: int = 30) -> Evaluation:
    windows, state = synthetic(edge, days)
    train, _ = synthetic(edge, days, seed=2)
    rng = np.random.default_rng(3)
    baselines: list[Baseline] = [
        Constant.fit(train.realised),
        LastSign.fit(train.realised, rng.normal(size=len(train))),
    ]
    predicted = {"buy_mean": forecast_scale * state, "sell_mean": -forecast_scale * state}
    return evaluate(windows, predicted, baseline_forecasts(baselines, rng.normal(size=len(windows))), 0.0, seed=7)


def test_split_by_time_leaves_more_than_the_purge_between_signal_bars() -> None:
    split = split_by_time(0, 9_999 * STEP, STEP, FRACTIONS, purge=101)
    spans = list(split.spans.values())
    # 10,000 bars: train 0 to 6999, v1 7000 to 7749, v2 7750 to 8499, test 8500 to 9999; each but the last less 101.
    assert [(s.first_ms // STEP, s.last_ms // STEP) for s in spans] == [
        (0, 6898), (7000, 7648), (7750, 8398), (8500, 9999),
    ]  # fmt: skip
    assert all((b.first_ms - a.last_ms) // STEP == 102 for a, b in pairwise(spans))
    assert TimeSplit.from_json(split.to_json()) == split


@pytest.mark.parametrize(("purge", "overlap"), [(0, 3 * 101), (50, 3 * 51), (100, 3), (101, 0), (150, 0)])
def test_label_overlaps_purge_zero_leaks_and_101_does_not(purge: int, overlap: int) -> None:
    split = split_by_time(0, 9_999 * STEP, STEP, FRACTIONS, purge=purge)
    assert label_overlaps(split, STEP, horizon=100) == overlap


def test_purge_zero_shares_bars_of_labels_and_101_shares_none() -> None:
    """Counted over the bars themselves: those of a training label, t + 1 to t + 101, that reach the signals of V1."""
    for purge, shared in ((0, 101), (101, 0)):
        split = split_by_time(0, 9_999 * STEP, STEP, FRACTIONS, purge=purge)
        last, first = split.train.last_ms // STEP, split.v1.first_ms // STEP
        assert len(set(range(last + 1, last + 102)) & set(range(first, first + 750))) == shared


def test_split_codes_purged_bars_belong_to_no_split() -> None:
    split = split_by_time(0, 9_999 * STEP, STEP, FRACTIONS, purge=101)
    codes = split.codes(np.array([-1, 0, 6898, 6899, 6999, 7000, 9999, 10_000]) * STEP)
    assert codes.tolist() == [-1, 0, 0, -1, -1, 1, 3, -1]
    assert len(split.instants()) == len(SPLITS)


def test_split_by_time_too_short_a_span_is_refused() -> None:
    with pytest.raises(MissingInputError, match="v1 has 75 and the purge takes 101"):
        split_by_time(0, 999 * STEP, STEP, FRACTIONS, purge=101)


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


def test_baselines_by_hand() -> None:
    realised = {"buy": np.array([1.0, 2.0, 6.0]), "sell": np.array([0.0, 0.0, 3.0])}
    change = np.array([-0.1, -0.2, 0.3])
    assert Constant.fit(realised).predict(change)["buy"].tolist() == [3.0, 3.0, 3.0]
    last_sign = LastSign.fit(realised, change)
    # After a fall (1 + 2) / 2, after a rise 6, no change never occurred: the mean 3.
    assert last_sign.predict(np.array([-1.0, 0.0, 1.0]))["buy"].tolist() == [1.5, 3.0, 6.0]


def test_take_trades_one_position_per_symbol_and_the_better_side() -> None:
    times = np.arange(6) * STEP
    symbol = np.zeros(6, int)
    predicted = {"buy": np.array([2.0, 9, 9, 0, 1, 3]), "sell": np.array([1.0, 0, 0, 4, 1, 0])}
    realised = {"buy": np.arange(6.0), "sell": -np.arange(6.0)}
    held = {"buy": np.full(6, 3), "sell": np.full(6, 1)}
    trades = take_trades(predicted, realised, held, symbol, times, STEP, threshold=0.5)
    # Buy at 0 ends inside bar 3 and may enter on its signal: sell at 3, ends in 4; there a tie, buy first, ends in 7.
    assert trades.row.tolist() == [0, 3, 4]
    assert trades.side.tolist() == [0, 1, 0]
    assert trades.earned.tolist() == [0.0, -3.0, 4.0]


@pytest.mark.parametrize("threshold", [9.0, 10.0])
def test_take_trades_nothing_above_the_threshold(threshold: float) -> None:
    windows, _ = synthetic(0.5, days=1)
    predicted: dict[str, np.ndarray] = {side: np.full(len(windows), 9.0) for side in SIDES}
    trades = take_trades(
        predicted, windows.realised, windows.bars_held, windows.symbol, windows.open_time_ms, STEP, threshold
    )
    assert len(trades) == 0


def test_take_trades_symbols_do_not_hinder_each_other_in_any_row_order() -> None:
    windows, state = synthetic(0.5, days=3)
    shuffled = np.random.default_rng(5).permutation(len(windows))
    results = []
    for rows in (np.arange(len(windows)), shuffled):
        part = windows[rows]
        predicted = {"buy": state[rows], "sell": -state[rows]}
        trades = take_trades(predicted, part.realised, part.bars_held, part.symbol, part.open_time_ms, STEP, 0.3)
        results.append((part.open_time_ms[trades.row], part.symbol[trades.row], trades.earned))
    for left, right in zip(*results, strict=True):
        assert np.array_equal(left, right)


def test_choose_threshold_takes_what_earned_most_and_never_a_trade_expected_to_lose() -> None:
    windows, state = synthetic(0.8)
    predicted = {"buy": state - 0.5, "sell": -state - 0.5}
    choice = choose_threshold(
        predicted, windows.realised, windows.bars_held, windows.symbol, windows.open_time_ms, STEP
    )
    assert choice.threshold >= 0
    enough = [point.total_return for point in choice.curve if point.trades >= 30]
    assert choice.chosen.total_return == max(enough)
    again = take_trades(
        predicted, windows.realised, windows.bars_held, windows.symbol, windows.open_time_ms, STEP, choice.threshold
    )
    assert (len(again), again.earned.sum()) == (choice.chosen.trades, pytest.approx(choice.chosen.total_return))


def test_choose_threshold_nothing_expected_to_earn_stays_at_zero() -> None:
    windows, _ = synthetic(0.0, days=2)
    predicted: dict[str, np.ndarray] = {side: np.full(len(windows), -0.001) for side in SIDES}
    choice = choose_threshold(
        predicted, windows.realised, windows.bars_held, windows.symbol, windows.open_time_ms, STEP
    )
    assert (choice.threshold, choice.chosen.trades) == (0.0, 0)
    assert choice.to_json()["chosen"]["mean_return"] is None


def test_evaluate_planted_edge_is_found() -> None:
    evaluation = scored(edge=0.5, forecast_scale=0.005)
    assert evaluation.verdict.level == "better"
    assert evaluation.model.scores["rank_ic"].lower > 0.2
    assert evaluation.gains["squared_error_saved"].lower > 0


def test_evaluate_right_order_on_a_wrong_scale_ranks_only() -> None:
    evaluation = scored(edge=0.5, forecast_scale=0.05)
    assert evaluation.verdict.level == "ranks"
    assert "no more accurate" in evaluation.verdict.sentence


def test_evaluate_no_edge_says_so_first() -> None:
    evaluation = scored(edge=0.0, forecast_scale=0.002)
    assert evaluation.verdict.sentence.startswith("The model is not better than its baselines.")


def test_evaluate_a_short_span_has_no_intervals_and_no_claim() -> None:
    evaluation = scored(edge=0.5, forecast_scale=0.005, days=6)
    assert evaluation.verdict.sentence.startswith("Too few days")
    assert np.isnan(evaluation.model.scores["rank_ic"].lower)
    assert evaluation.to_json()["scores"]["model"]["rank_ic"]["lower"] is None


def test_evaluate_points_equal_the_plain_metrics() -> None:
    evaluation = scored(edge=0.3, forecast_scale=0.003)
    realised = np.concatenate([evaluation.windows.realised[side] for side in SIDES])
    predicted = np.concatenate([evaluation.predicted[f"{side}_mean"] for side in SIDES])
    scores = evaluation.model.scores
    assert scores["mae"].value == pytest.approx(metrics.mae(realised, predicted))
    assert scores["rmse"].value == pytest.approx(metrics.rmse(realised, predicted))
    assert scores["r2"].value == pytest.approx(metrics.r2(realised, predicted))
    assert scores["direction"].value == pytest.approx(metrics.direction_accuracy(realised, predicted))


def classified(edge: float, sharpness: float) -> Evaluation:
    """Probabilities sigmoid(sharpness x state), payoffs +- 1 %; a fifth of the training trades are said to have won."""
    windows, state = synthetic(edge)
    baselines: list[Baseline] = [Constant.fit(windows.realised)]
    predicted: dict[str, np.ndarray] = {}
    for side, sign in (("buy", 1), ("sell", -1)):
        probability = 1 / (1 + np.exp(-sign * sharpness * state))
        predicted[f"{side}_profit_probability"] = probability.astype(np.float32)
        predicted[f"{side}_mean"] = 0.02 * probability - 0.01
    forecasts = baseline_forecasts(baselines, np.zeros(len(windows)))
    return evaluate(windows, predicted, forecasts, 0.0, seed=7, base_rates={"buy": 0.2, "sell": 0.2})


def test_evaluate_probabilities_beside_the_base_rate() -> None:
    evaluation = classified(edge=1.0, sharpness=2.0)
    assert evaluation.verdict.level == "better"
    for side in SIDES:
        found = evaluation.profits[side]
        profit = evaluation.windows.realised[side] > 0
        probability = evaluation.predicted[f"{side}_profit_probability"]
        assert list(found.scores) == list(found.base) == list(PROFIT_METRICS)
        assert found.scores["auc"] > 0.75
        assert found.scores["log_loss"] == pytest.approx(metrics.log_loss(profit, probability))
        assert found.scores["log_loss"] < found.base["log_loss"]
        assert found.scores["brier"] < found.base["brier"]
        # The base rate is that of training, 0.2, not that of the windows themselves.
        won = profit.mean()
        assert found.base["brier"] == pytest.approx(won * 0.64 + (1 - won) * 0.04)
        assert found.base["log_loss"] == pytest.approx(-won * np.log(0.2) - (1 - won) * np.log(0.8))
        assert (found.base["auc"], found.base["recall"]) == (0.5, 0)
        assert found.base["accuracy"] == pytest.approx(1 - won)
        # The state lasts 48 bars and takes 240 values a symbol: bins of ties, yet close to a tenth each.
        assert [row["count"] for row in found.calibration] == pytest.approx([len(profit) / 10] * 10, rel=0.05)


def test_evaluate_probabilities_without_an_edge_lose_to_the_base_rate_of_their_own() -> None:
    found = classified(edge=0.0, sharpness=2.0).profits["buy"]
    assert found.scores["auc"] == pytest.approx(0.5, abs=0.05)
    assert found.scores["log_loss"] > np.log(2) + 0.1  # that of a coin's own rate


def test_evaluation_of_probabilities_is_plain_json_and_that_of_returns_has_none() -> None:
    described = json.loads(json.dumps(classified(1.0, 2.0).to_json(), allow_nan=False))
    buy = described["profits"]["buy"]
    assert buy["base"]["precision"] is None  # nothing is called at a rate of 0.2
    assert buy["base_rate"] == 0.2
    assert set(buy["scores"]) == set(PROFIT_METRICS)
    assert set(buy["calibration"][0]) == {"count", "predicted", "realised"}
    assert scored(edge=0.3, forecast_scale=0.003).to_json()["profits"] == {}
