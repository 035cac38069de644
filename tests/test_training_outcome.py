"""The outcome: the threshold knows V2 alone, and stored predictions tell it again."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from sqlalchemy import text

from perpcast.database import Database, read_predictions
from perpcast.errors import MissingInputError
from perpcast.evaluation.baselines import Ridge
from perpcast.outputs import OutputReading
from perpcast.task import Target
from perpcast.training.card import profit_rows, profit_titles, score_rows
from perpcast.training.dataset import Dataset
from perpcast.training.outcome import JUDGED, Outcome, baseline_inputs, judge, read_outcome, store_predictions
from tests.model_world import HORIZON, TASK, small_dataset

Predicted = dict[str, dict[str, np.ndarray]]
CLASSIFIER = replace(TASK, targets=tuple(Target(side, "classification", HORIZON) for side in ("buy", "sell")))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Every trade ends on the bar after its signal, so that each window can be traded."""
    made = small_dataset(tmp_path_factory.mktemp("dataset"))
    return replace(made, bars_held=np.ones_like(made.bars_held))


@pytest.fixture(scope="module")
def predicted(dataset: Dataset) -> Predicted:
    """Buys are expected to earn 0 ± 2 %, sells always to lose 5 %: only buys are ever taken."""
    rng = np.random.default_rng(5)
    found: Predicted = {}
    for split in JUDGED:
        n = len(dataset.index[split])
        found[split] = {
            name: (0.02 * rng.normal(size=n) if name.startswith("buy") else np.full(n, -0.05)).astype(np.float32)
            for name in TASK.outputs
        }
    return found


def with_labels(dataset: Dataset, split: str, buy: np.ndarray) -> Dataset:
    """The dataset with other outcomes of the buys of one split."""
    returns = dataset.expected_return.copy()
    returns[dataset.index[split], 0] = buy
    return replace(dataset, expected_return=returns)


def earning_above(predicted: Predicted, floor: float) -> np.ndarray:
    """What V2's buys earn if those forecast above `floor` win one percent and the others lose as much."""
    return np.where(predicted["v2"]["buy_mean"] > floor, 0.01, -0.01)


def of_every_window(dataset: Dataset, means: Mapping[str, float] | None = None) -> Predicted:
    """Every output is what came true, or a constant of its side."""
    found: Predicted = {}
    for split in JUDGED:
        realised = dataset.windows(split).realised
        found[split] = {
            name: (realised[side] if means is None else np.full(len(realised[side]), means[side])).astype(np.float32)
            for side in ("buy", "sell")
            for name in TASK.outputs
            if name.startswith(side)
        }
    return found


def assert_same_outcome(left: Outcome, right: Outcome) -> None:
    assert left.choice == right.choice
    assert left.evaluation.to_json() == right.evaluation.to_json()
    assert left.evaluation.predicted.keys() == right.evaluation.predicted.keys()
    for name, values in left.evaluation.predicted.items():
        np.testing.assert_array_equal(values, right.evaluation.predicted[name])


# --- the threshold --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("floor", [0.0, 0.005, 0.015])
def test_threshold_lies_where_the_trades_of_v2_begin_to_earn(
    dataset: Dataset, predicted: Predicted, floor: float
) -> None:
    """Candidates are about a tenth of the trades apart, near 1.5 % that is 0.15 % of return."""
    changed = with_labels(dataset, "v2", earning_above(predicted, floor))
    outcome = judge(changed, predicted, seed=1)
    assert outcome.choice.threshold == pytest.approx(floor, abs=0.002)
    assert outcome.choice.chosen.total_return == max(point.total_return for point in outcome.choice.curve)
    assert outcome.evaluation.threshold == outcome.choice.threshold


@pytest.mark.parametrize("split", ["train", "v1", "test"])
def test_threshold_does_not_know_other_labels_than_those_of_v2(
    dataset: Dataset, predicted: Predicted, split: str
) -> None:
    known = with_labels(dataset, "v2", earning_above(predicted, 0.015))
    changed = with_labels(known, split, -7 * known.expected_return[known.index[split], 1])
    before, after = (judge(each, predicted, seed=1) for each in (known, changed))
    assert before.choice == after.choice
    # Train and V1 are what the baselines are made of, and no score of the model; test enters all scores.
    model, same = (each.evaluation.to_json()["scores"]["model"] for each in (before, after))
    assert (model == same) == (split != "test")
    assert before.evaluation.to_json() != after.evaluation.to_json()


def test_thresholds_of_the_baselines_are_chosen_on_v2_each_its_own(dataset: Dataset, predicted: Predicted) -> None:
    """Ridge forecasts the planted level: only above 1 % do buys of V2 earn, and it is not the model's business."""
    inputs = baseline_inputs(dataset)
    ridge = Ridge.fit(inputs)
    forecast = ridge.predict(inputs, "v2")["buy"]
    changed = with_labels(dataset, "v2", np.where(forecast > 0.01, 0.01, -0.01))
    changed.expected_return[dataset.index["v2"], 1] = -0.01
    before, after = judge(dataset, predicted, seed=1), judge(changed, predicted, seed=1)
    assert list(after.thresholds) == list(after.baselines) == ["constant", "last sign", "ridge", "boosted trees"]
    assert after.thresholds["ridge"] == pytest.approx(0.01, abs=0.002)
    assert after.thresholds["ridge"] not in (before.thresholds["ridge"], after.choice.threshold)
    np.testing.assert_array_equal(after.baselines["ridge"]["buy"], ridge.predict(inputs, "test")["buy"])
    trades = next(card.trades for card in after.evaluation.cards if card.name == "ridge")
    best = np.maximum(*(after.baselines["ridge"][side] for side in ("buy", "sell")))
    assert len(trades) == (best > after.thresholds["ridge"]).sum()  # each ends on the next bar: all can be traded


def test_threshold_does_not_know_the_forecasts_of_test(dataset: Dataset, predicted: Predicted) -> None:
    other = {**predicted, "test": {name: values[::-1] for name, values in predicted["test"].items()}}
    before, after = (judge(dataset, each, seed=1) for each in (predicted, other))
    assert before.choice == after.choice
    assert before.evaluation.to_json() != after.evaluation.to_json()


def test_judge_twice_is_the_same_outcome(dataset: Dataset, predicted: Predicted) -> None:
    assert_same_outcome(judge(dataset, predicted, seed=1), judge(dataset, predicted, seed=1))


# --- model and baselines --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Test takes 15 % of 16,000 bars: 25 days, enough for intervals."""
    return small_dataset(tmp_path_factory.mktemp("long"), bars=16_000)


def test_perfect_forecast_beats_the_baselines(long_dataset: Dataset) -> None:
    evaluation = judge(long_dataset, of_every_window(long_dataset), seed=1).evaluation
    assert [card.name for card in evaluation.cards] == ["model", "constant", "last sign", "ridge", "boosted trees"]
    assert evaluation.verdict.level == "better"
    assert evaluation.gains["squared_error_saved"].value == pytest.approx(1)
    scores = evaluation.model.scores
    # Predictions are float32: exact to seven digits of about 1 %.
    assert scores["mae"].value == pytest.approx(0, abs=1e-9)
    assert scores["rank_ic"].value == pytest.approx(1)
    assert (scores["direction"].value, scores["win_rate"].value) == (1, 1)
    assert scores["trade_return"].value > max(
        0, *(np.nan_to_num(c.scores["trade_return"].value) for c in evaluation.cards[1:])
    )


def test_constant_forecast_does_not_beat_the_baselines(long_dataset: Dataset) -> None:
    """The best of all constants: the training mean, which is the baseline itself."""
    realised = long_dataset.windows("train").realised
    means = {side: float(np.mean(values)) for side, values in realised.items()}
    evaluation = judge(long_dataset, of_every_window(long_dataset, means), seed=1).evaluation
    assert evaluation.verdict.level == "none"
    assert "is not better than its baselines" in evaluation.verdict.sentence
    model, constant = evaluation.cards[:2]
    assert model.scores["mae"].value == pytest.approx(constant.scores["mae"].value)
    assert np.isnan(model.scores["rank_ic"].value)
    # Both means lie at -0.3 %: nothing is expected to earn, so nothing is taken.
    assert len(model.trades) == 0


# --- probabilities --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def classifier(dataset: Dataset) -> Dataset:
    return replace(dataset, task=CLASSIFIER)


@pytest.fixture(scope="module")
def probabilities(classifier: Dataset) -> Predicted:
    """What a network that reads the planted signal, and is far too sure of it, says when calibrated on V2."""
    reading = OutputReading.fit(CLASSIFIER, classifier.targets(classifier.index["train"]))

    def raw(split: str) -> np.ndarray:
        level = (classifier.inputs[classifier.index[split], 1].astype(float) - 1000) / 50
        return 20 * np.stack([level, -level], axis=1)

    calibrated = reading.calibrated(raw("v2"), classifier.targets(classifier.index["v2"]))
    return {split: calibrated.read(raw(split)) for split in JUDGED}


def test_probabilities_are_judged_as_returns_and_as_probabilities(
    classifier: Dataset, probabilities: Predicted
) -> None:
    """A trade earns level - 0.3 and a noise of 0.3: about a third win, and the level nearly tells which."""
    outcome = judge(classifier, probabilities, seed=1)
    evaluation = outcome.evaluation
    assert evaluation.model.scores["rank_ic"].value > 0.7
    assert evaluation.model.scores["trade_return"].value > 0
    train, test = classifier.windows("train").realised, classifier.windows("test").realised
    for side, scores in evaluation.profits.items():
        assert scores.base_rate == np.mean(train[side] > 0) != np.mean(test[side] > 0)
        assert scores.scores["auc"] > 0.9
        # Ridge knows the level as well, and its returns become probabilities on V2; a constant only has V2's base rate.
        assert list(scores.baselines) == ["constant", "last sign", "ridge", "boosted trees"]
        assert scores.baselines["ridge"]["auc"] > 0.9
        assert scores.baselines["ridge"]["log_loss"] < 0.6 * scores.base["log_loss"]
        won = np.mean(classifier.windows("v2").realised[side] > 0)
        share = np.mean(test[side] > 0)
        assert scores.baselines["constant"]["brier"] == pytest.approx(
            share * (1 - won) ** 2 + (1 - share) * won**2, abs=1e-3
        )
        assert scores.scores["log_loss"] < 0.6 * scores.base["log_loss"]
        for row in scores.calibration:
            assert row["realised"] == pytest.approx(row["predicted"], abs=5 * np.sqrt(0.25 / row["count"]))
    assert list(evaluation.profits) == ["buy", "sell"]
    assert judge(classifier, probabilities, seed=1).evaluation.to_json() == evaluation.to_json()


def test_tables_have_a_cell_for_each_title(classifier: Dataset, probabilities: Predicted) -> None:
    outcome = judge(classifier, probabilities, seed=1)
    titles = profit_titles(outcome)
    assert titles == ["probability of profit", "model", "base rate", "constant", "last sign", "ridge", "boosted trees"]
    assert {len(row) for row in profit_rows(outcome)} == {len(titles)}
    assert {len(row) for row in score_rows(outcome)} == {1 + len(outcome.evaluation.cards)}
    auc = next(row for row in profit_rows(outcome) if row[0] == "sell: AUC")
    scores = outcome.evaluation.profits["sell"]
    assert auc[1] == f"{scores.scores['auc']:.3f}"
    assert auc[5] == f"{scores.baselines['ridge']['auc']:.3f}"
    assert auc[2:4] == ["0.500", "0.500"]


def test_probabilities_choose_the_threshold_by_the_return_that_they_imply(
    classifier: Dataset, probabilities: Predicted
) -> None:
    """The same means told as returns lead to the same threshold and trades."""
    means = {
        split: {name: outputs[f"{name.split('_')[0]}_mean"] for name in TASK.outputs}
        for split, outputs in probabilities.items()
    }
    told, plain = judge(classifier, probabilities, seed=1), judge(replace(classifier, task=TASK), means, seed=1)
    assert told.choice == plain.choice
    assert told.choice.threshold > 0
    np.testing.assert_array_equal(told.evaluation.model.trades.row, plain.evaluation.model.trades.row)
    assert plain.evaluation.profits == {}


def test_stored_probabilities_tell_the_same_outcome(
    database: Database, classifier: Dataset, probabilities: Predicted
) -> None:
    store_predictions(database, classifier, "tft-1", probabilities)
    assert_same_outcome(read_outcome(database, classifier, "tft-1", seed=1), judge(classifier, probabilities, seed=1))
    # As returns they are not whole: there are no quantiles.
    with pytest.raises(MissingInputError, match="lacks predictions of tft-1"):
        read_outcome(database, replace(classifier, task=TASK), "tft-1", seed=1)


# --- kept in the database -------------------------------------------------------------------------------------------


def test_stored_predictions_tell_the_same_outcome(database: Database, dataset: Dataset, predicted: Predicted) -> None:
    other = {split: {name: -values for name, values in outputs.items()} for split, outputs in predicted.items()}
    store_predictions(database, dataset, "tft-other", other)
    store_predictions(database, dataset, "tft-1", other)
    store_predictions(database, dataset, "tft-1", predicted)
    assert_same_outcome(read_outcome(database, dataset, "tft-1", seed=1), judge(dataset, predicted, seed=1))
    assert_same_outcome(read_outcome(database, dataset, "tft-other", seed=1), judge(dataset, other, seed=1))

    rows = np.concatenate([dataset.index[split] for split in JUDGED])
    for code, symbol in enumerate(TASK.symbols):
        open_time_ms, outputs = read_predictions(database, "tft-1", symbol, ("buy_mean",))
        np.testing.assert_array_equal(open_time_ms, dataset.open_time_ms[rows[dataset.symbol[rows] == code]])
        assert np.isfinite(outputs["buy_mean"]).all()


def test_predictions_of_a_symbol_without_windows_are_none(
    database: Database, dataset: Dataset, predicted: Predicted
) -> None:
    """A symbol that left the exchange has training windows alone."""
    left = {split: dataset.symbol[rows] != 1 for split, rows in dataset.index.items()}
    index = {split: rows[left[split]] if split in JUDGED else rows for split, rows in dataset.index.items()}
    fewer = replace(dataset, index=index)
    kept = {split: {name: v[left[split]] for name, v in outputs.items()} for split, outputs in predicted.items()}
    store_predictions(database, dataset, "tft-1", predicted)
    store_predictions(database, fewer, "tft-1", kept)
    assert len(read_predictions(database, "tft-1", "BUSDT", ("buy_mean",))[0]) == 0
    assert_same_outcome(read_outcome(database, fewer, "tft-1", seed=1), judge(fewer, kept, seed=1))


@pytest.mark.parametrize(
    "loss",
    [
        "DELETE FROM model_predictions",
        "DELETE FROM model_predictions WHERE symbol = 'CUSDT'",
        "DELETE FROM model_predictions WHERE open_time = (SELECT max(open_time) FROM model_predictions)",
        "DELETE FROM model_predictions WHERE symbol = 'AUSDT'"
        " AND open_time = (SELECT min(open_time) FROM model_predictions)",
        "UPDATE model_predictions SET sell_q90 = NULL WHERE symbol = 'BUSDT'",
        "UPDATE model_predictions SET model_id = 'tft-2'",
    ],
)
def test_predictions_that_are_missing_name_the_next_step(
    database: Database, dataset: Dataset, predicted: Predicted, loss: str
) -> None:
    store_predictions(database, dataset, "tft-1", predicted)
    with database.begin() as connection:
        assert connection.execute(text(loss)).rowcount > 0
    complaint = r"lacks predictions of tft-1 for its dataset 0123456789abcdef: run .*transformer\.py --force"
    with pytest.raises(MissingInputError, match=complaint):
        read_outcome(database, dataset, "tft-1", seed=1)
