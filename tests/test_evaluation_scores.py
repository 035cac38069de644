"""Splits, scores beside baselines, slices and the verdict, with the arithmetic beside the number."""

import json
from itertools import pairwise

import numpy as np
import pytest

from perpcast.errors import MissingInputError
from perpcast.evaluation import metrics
from perpcast.evaluation.scores import (
    PROFIT_METRICS,
    SLICE_SCORES,
    Evaluation,
    Windows,
    daily_rank_ic,
    evaluate,
    volatility_regimes,
)
from perpcast.evaluation.splits import SPLITS, TimeSplit, label_overlaps, split_by_time
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
    """A forecast of the state beside a constant and one that is nothing but noise."""
    windows, state = synthetic(edge, days)
    predicted = {"buy_mean": forecast_scale * state, "sell_mean": -forecast_scale * state}
    return evaluate(windows, predicted, trivial(windows), 0.0, seed=7)


def trivial(windows: Windows) -> dict[str, dict[str, np.ndarray]]:
    """Baselines that know nothing: what never earns, and two numbers by the toss of a coin."""
    coin = np.random.default_rng(3).random(len(windows)) < 0.5
    return {
        "constant": {side: np.full(len(windows), -1e-4) for side in SIDES},
        "coin": {side: np.where(coin, 1e-4, -1e-4) for side in SIDES},
    }


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


# --- the verdict ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("edge", "forecast_scale", "days", "level", "words"),
    [
        (0.5, 0.005, 30, "better", "Edge found: the model beats every baseline"),
        (0.5, 0.05, 30, "ranks", "Edge in ranking only: "),  # the right order, ten times too large
        (0.0, 0.002, 30, "none", "No edge found: the model is not better than its baselines"),
        (0.5, 0.005, 6, "none", "No edge found: too few days"),
    ],
)
def test_verdict_begins_with_what_to_believe(
    edge: float, forecast_scale: float, days: int, level: str, words: str
) -> None:
    verdict = scored(edge, forecast_scale, days).verdict
    assert verdict.level == level
    assert verdict.sentence.startswith(words)


def against(others: dict[str, float], scale: float = 0.005, edge: float = 0.5) -> Evaluation:
    """The forecast of the state beside others of the same state, each with its own scale."""
    windows, state = synthetic(edge)
    baselines = {name: {"buy": each * state, "sell": -each * state} for name, each in others.items()}
    return evaluate(windows, {"buy_mean": scale * state, "sell_mean": -scale * state}, baselines, 0.0, seed=7)


def test_verdict_one_baseline_as_good_is_enough_for_no_edge() -> None:
    """It beats the constant by far; beside its own double nothing is won, on any of the drawn days."""
    evaluation = against({"constant": 0.0, "double": 0.005})
    assert evaluation.verdict.level == "none"
    assert evaluation.verdict.sentence.startswith("No edge of its own: the model ranks trades better than chance")
    assert "not better than double" in evaluation.verdict.sentence
    assert evaluation.gains_over["constant"]["squared_error_saved"].lower > 0.1
    assert evaluation.gains_over["constant"]["rank_ic_won"].lower > 0.2
    for gain in evaluation.gains_over["double"].values():
        assert (gain.value, gain.lower, gain.upper) == (0, 0, 0)
    assert evaluation.gains == evaluation.gains_over["double"]


def test_verdict_accurate_where_all_rank_alike() -> None:
    evaluation = against({"too large": 0.02})
    assert evaluation.verdict.sentence.startswith("Edge in accuracy only: ")


def test_verdict_a_better_constant_is_no_edge() -> None:
    """Labels of pure noise, a deviation of 1 %: who was off by 0.2 % loses 4 % of the squared error to who was not."""
    windows, state = synthetic(edge=0.0)
    off: dict[str, np.ndarray] = {side: np.full(len(state), 0.002) for side in SIDES}
    nearly_nothing = {f"{side}_mean": 1e-5 * state for side in SIDES}
    evaluation = evaluate(windows, nearly_nothing, {"constant": off}, 0.0, seed=7)
    assert evaluation.gains["squared_error_saved"].lower > 0.01
    assert evaluation.verdict.sentence.startswith("No edge found: ")


def test_gains_are_the_smallest_over_the_baselines_and_none_is_won_on_one_that_ranks_backwards() -> None:
    evaluation = against({"backwards": -0.005, "constant": 0.0, "flat": 0.001})
    for name, gain in evaluation.gains.items():
        assert gain.value == min(gains[name].value for gains in evaluation.gains_over.values())
    # Nobody would follow a forecast that ranks backwards: what is won on it is what is won on nothing.
    over = evaluation.gains_over
    assert over["backwards"]["rank_ic_won"].value == over["constant"]["rank_ic_won"].value > 0.2
    # 0.005 s + 0.01 e against 0.001 s: errors 0.01 e alone against 0.01 e + 0.004 s, so 16 in 116 are saved.
    assert over["flat"]["squared_error_saved"].value == pytest.approx(0.16 / 1.16, abs=0.03)


def test_evaluate_without_a_baseline_or_a_window_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one baseline"):
        against({})
    windows, _ = synthetic(0.5, days=1)
    with pytest.raises(ValueError, match="no windows"):
        evaluate(windows[np.array([], int)], {}, trivial(windows), 0.0, seed=1)


def test_evaluate_a_short_span_has_no_intervals() -> None:
    evaluation = scored(edge=0.5, forecast_scale=0.005, days=6)
    assert np.isnan(evaluation.model.scores["rank_ic"].lower)
    described = json.loads(json.dumps(evaluation.to_json(), allow_nan=False))
    assert described["scores"]["model"]["rank_ic"]["lower"] is None
    assert described["deciles"]["buy"][0]["lower"] is None


# --- scores ---------------------------------------------------------------------------------------------------------


def test_evaluate_points_equal_the_plain_metrics() -> None:
    evaluation = scored(edge=0.3, forecast_scale=0.003)
    realised = np.concatenate([evaluation.windows.realised[side] for side in SIDES])
    predicted = np.concatenate([evaluation.predicted[f"{side}_mean"] for side in SIDES])
    scores = evaluation.model.scores
    assert scores["mae"].value == pytest.approx(metrics.mae(realised, predicted))
    assert scores["rmse"].value == pytest.approx(metrics.rmse(realised, predicted))
    assert scores["r2"].value == pytest.approx(metrics.r2(realised, predicted))
    assert scores["direction"].value == pytest.approx(metrics.direction_accuracy(realised, predicted))


def test_every_forecast_is_traded_by_its_own_threshold() -> None:
    """All forecast 0.5 % times the state: above 0 % about every other window is worth a buy, above 0.5 % a sixth."""
    windows, state = synthetic(0.5)
    means = {"buy": 0.005 * state, "sell": np.full(len(state), -1.0)}
    baselines = {"own": means, "model's": means}
    predicted = {f"{side}_mean": values for side, values in means.items()}
    evaluation = evaluate(windows, predicted, baselines, 0.0, seed=1, thresholds={"own": 0.005})
    model, own, models = (card.trades for card in evaluation.cards)
    assert np.array_equal(model.row, models.row)
    assert state[model.row].min() > 0
    assert state[own.row].min() > 1
    assert 0 < len(own) < 0.5 * len(model)
    assert evaluation.threshold == 0


# --- slices and deciles ---------------------------------------------------------------------------------------------


def test_slices_by_hand() -> None:
    """Two symbols on the last bar of January 2024 and the first of February; errors and sides counted by hand."""
    last = 1_706_744_700_000  # 2024-01-31 23:45
    windows = Windows(
        ("AUSDT", "BUSDT"),
        np.array([0, 0, 1, 1]),
        np.array([last, last + STEP] * 2),
        {"buy": np.array([0.03, -0.01, -0.02, 0.04]), "sell": np.array([-0.01, -0.01, 0.02, -0.02])},
        {side: np.ones(4, int) for side in SIDES},
        STEP,
    )
    predicted = {"buy_mean": np.array([0.01, 0.01, -0.01, -0.01]), "sell_mean": np.array([-0.01, -0.01, 0.01, -0.01])}
    constant: dict[str, np.ndarray] = {side: np.zeros(4) for side in SIDES}
    slices = evaluate(windows, predicted, {"constant": constant}, 0.0, seed=1, regime=np.array([0, 2, 0, 2])).slices
    # A buys at 3 % and -1 % (forecast 1 %): errors 2 and 2 %; its sells 0 and 0: mean 1 %. Right: 1 of 2, and 2 of 2.
    # B: buys -2 and 4 % (forecast -1 %): 1 and 5 %; sells 2 and -2 % (1 and -1 %): 1 and 1 %. Right: 1 of 2; 2 of 2.
    # B sells first at 2 %, then both sides are forecast alike: a buy, 4 %.
    a, b = slices["symbol"]["AUSDT"], slices["symbol"]["BUSDT"]
    assert list(a) == list(SLICE_SCORES)
    assert [a[name] for name in ("windows", "mae", "direction", "side_return")] == pytest.approx([2, 0.01, 0.75, 0.01])
    assert [b[name] for name in ("windows", "mae", "direction", "side_return")] == pytest.approx([2, 0.02, 0.75, 0.03])
    # Errors of January: 2, 0, 1, 1 %; of February: 2, 0, 5, 1 %. No bar has three symbols to rank.
    january, february = slices["month"]["2024-01"], slices["month"]["2024-02"]
    assert [january[name] for name in ("windows", "mae", "side_return")] == pytest.approx([2, 0.01, 0.025])
    assert [february[name] for name in ("windows", "mae", "side_return")] == pytest.approx([2, 0.02, 0.015])
    assert np.isnan([january["rank_ic"], february["rank_ic"]]).all()
    assert list(slices["regime"]) == ["low", "high"]
    for regime, month in (("low", january), ("high", february)):
        assert {n: v for n, v in slices["regime"][regime].items() if v == v} == {
            n: v for n, v in month.items() if v == v
        }


def test_slices_tell_where_a_forecast_ranks() -> None:
    """The forecast is the state in the middle regime, and noise elsewhere: its rank IC is there, and nowhere else."""
    windows, state = synthetic(1.0, days=40)
    rng = np.random.default_rng(4)
    regime = np.repeat(rng.integers(0, 3, 40 * 96), 8)  # one of each bar
    guess = 0.01 * np.where(regime == 1, state, rng.normal(size=len(state)))
    predicted = {"buy_mean": guess, "sell_mean": -guess}
    evaluation = evaluate(windows, predicted, trivial(windows), 0.0, seed=1, regime=regime)
    rank_ic = {name: found["rank_ic"] for name, found in evaluation.slices["regime"].items()}
    assert rank_ic["middle"] > 0.5
    assert max(abs(rank_ic["low"]), abs(rank_ic["high"])) < 0.05


def test_slices_add_up_to_the_whole() -> None:
    evaluation = scored(edge=0.3, forecast_scale=0.003, days=40)
    daily = daily_rank_ic(evaluation.windows, {side: evaluation.predicted[f"{side}_mean"] for side in SIDES})
    for kind in ("symbol", "month"):
        found = evaluation.slices[kind].values()
        count = np.array([each["windows"] for each in found])
        assert count.sum() == len(evaluation.windows)
        for name in ("mae", "direction"):
            mean = count @ [each[name] for each in found] / count.sum()
            assert mean == pytest.approx(evaluation.model.scores[name].value)
    ranks = {symbol: found["rank_ic"] for symbol, found in evaluation.slices["symbol"].items()}
    assert ranks == evaluation.model.by_symbol_ic
    # Day 20,000 is 2024-10-04: 28 days of October, then 12 of November.
    assert list(evaluation.slices["month"]) == ["2024-10", "2024-11"]
    assert evaluation.slices["month"]["2024-10"]["rank_ic"] == pytest.approx(daily[:28].mean())
    assert evaluation.slices["month"]["2024-11"]["rank_ic"] == pytest.approx(daily[28:].mean())
    assert "regime" not in evaluation.slices


def test_volatility_regimes_are_thirds_of_each_symbols_own_training() -> None:
    """Edges of 0 … 9 at 3 and 6, of ten times that at 30 and 60."""
    trained, trained_symbol = np.concatenate([np.arange(10.0), 10 * np.arange(10.0)]), np.repeat([0, 1], 10)
    volatility, symbol = np.array([2.9, 3.1, 6.1, 29, 31, 61]), np.repeat([0, 1], 3)
    assert volatility_regimes(volatility, symbol, trained, trained_symbol).tolist() == [0, 1, 2, 0, 1, 2]


def test_deciles_are_expected_beside_realised() -> None:
    """A forecast of the state as large as its effect: each tenth earns what was expected, within its interval."""
    evaluation = scored(edge=0.5, forecast_scale=0.005, days=60)
    for side in SIDES:
        rows, realised = evaluation.deciles[side], evaluation.windows.realised[side]
        predicted = evaluation.predicted[f"{side}_mean"]
        # The state lasts 48 bars: ties share a tenth.
        assert [row["count"] for row in rows] == pytest.approx([len(realised) / 10] * 10, rel=0.05)
        assert (np.diff([row["predicted"] for row in rows]) > 0).all()
        top = predicted >= np.quantile(predicted, 0.9)
        assert rows[-1]["realised"] == pytest.approx(realised[top].mean())
        within = [row["lower"] <= row["predicted"] <= row["upper"] for row in rows]
        assert sum(within) >= 8
        count = np.array([row["count"] for row in rows])
        assert count @ [row["realised"] for row in rows] == pytest.approx(realised.sum())


def test_deciles_never_tell_equal_forecasts_apart() -> None:
    assert [len(rows) for rows in scored(edge=0.5, forecast_scale=0.0).deciles.values()] == [1, 1]


# --- probabilities --------------------------------------------------------------------------------------------------


def classified(edge: float, sharpness: float) -> Evaluation:
    """Probabilities sigmoid(sharpness x state), payoffs +- 1 %; a fifth of the training trades are said to have won."""
    windows, state = synthetic(edge)
    predicted: dict[str, np.ndarray] = {}
    for side, sign in (("buy", 1), ("sell", -1)):
        probability = 1 / (1 + np.exp(-sign * sharpness * state))
        predicted[f"{side}_profit_probability"] = probability.astype(np.float32)
        predicted[f"{side}_mean"] = 0.02 * probability - 0.01
    half: dict[str, np.ndarray] = {
        side: 0.25 + 0.5 * predicted[f"{side}_profit_probability"].astype(float) for side in SIDES
    }
    return evaluate(
        windows,
        predicted,
        trivial(windows),
        0.0,
        seed=7,
        base_rates={"buy": 0.2, "sell": 0.2},
        probabilities={"half as sure": half, "coin": {side: np.full(len(windows), 0.5) for side in SIDES}},
    )


def test_evaluate_probabilities_beside_the_base_rate() -> None:
    evaluation = classified(edge=1.0, sharpness=2.0)
    assert evaluation.verdict.level == "better"
    for side in SIDES:
        found = evaluation.profits[side]
        profit = evaluation.windows.realised[side] > 0
        probability = evaluation.predicted[f"{side}_profit_probability"]
        assert list(found.scores) == list(found.base) == list(PROFIT_METRICS)
        half, coin = found.baselines["half as sure"], found.baselines["coin"]
        assert list(half) == list(coin) == list(PROFIT_METRICS)
        # The same order, and the same calls above one half: only how sure they are differs.
        assert {name: half[name] for name in ("auc", "accuracy", "f1")} == pytest.approx(
            {name: found.scores[name] for name in ("auc", "accuracy", "f1")}
        )
        assert half["brier"] > found.scores["brier"]
        assert (coin["auc"], coin["brier"], coin["log_loss"]) == pytest.approx((0.5, 0.25, np.log(2)))
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
    assert buy["baselines"]["coin"]["precision"] is None
    assert set(buy["calibration"][0]) == {"count", "predicted", "realised"}
    assert scored(edge=0.3, forecast_scale=0.003).to_json()["profits"] == {}
