"""The decision threshold and the trades that it takes."""

import numpy as np
import pytest

from perpcast.evaluation.threshold import choose_threshold, take_trades
from perpcast.evaluation.windows import Windows
from perpcast.market import SIDES
from tests.test_evaluation_scores import STEP, synthetic


def test_take_trades_one_position_per_symbol_and_the_better_side() -> None:
    times = np.arange(6) * STEP
    symbol = np.zeros(6, int)
    predicted = {"buy": np.array([2.0, 9, 9, 0, 1, 3]), "sell": np.array([1.0, 0, 0, 4, 1, 0])}
    realised = {"buy": np.arange(6.0), "sell": -np.arange(6.0)}
    held = {"buy": np.full(6, 3), "sell": np.full(6, 1)}
    trades = take_trades(predicted, Windows(("A",), symbol, times, realised, held, STEP), threshold=0.5)
    # Buy at 0 ends inside bar 3 and may enter on its signal: sell at 3, ends in 4; there a tie, buy first, ends in 7.
    assert trades.row.tolist() == [0, 3, 4]
    assert trades.side.tolist() == [0, 1, 0]
    assert trades.earned.tolist() == [0.0, -3.0, 4.0]


@pytest.mark.parametrize("threshold", [9.0, 10.0])
def test_take_trades_nothing_above_the_threshold(threshold: float) -> None:
    windows, _ = synthetic(0.5, days=1)
    predicted: dict[str, np.ndarray] = {side: np.full(len(windows), 9.0) for side in SIDES}
    trades = take_trades(predicted, windows, threshold)
    assert len(trades) == 0


def test_take_trades_symbols_do_not_hinder_each_other_in_any_row_order() -> None:
    windows, state = synthetic(0.5, days=3)
    shuffled = np.random.default_rng(5).permutation(len(windows))
    results = []
    for rows in (np.arange(len(windows)), shuffled):
        part = windows[rows]
        predicted = {"buy": state[rows], "sell": -state[rows]}
        trades = take_trades(predicted, part, 0.3)
        results.append((part.open_time_ms[trades.row], part.symbol[trades.row], trades.earned))
    for left, right in zip(*results, strict=True):
        assert np.array_equal(left, right)


def test_choose_threshold_takes_what_earned_most_and_never_a_trade_expected_to_lose() -> None:
    windows, state = synthetic(0.8)
    predicted = {"buy": state - 0.5, "sell": -state - 0.5}
    choice = choose_threshold(predicted, windows)
    assert choice.threshold >= 0
    enough = [point.total_return for point in choice.curve if point.trades >= 30]
    assert choice.chosen.total_return == max(enough)
    again = take_trades(predicted, windows, choice.threshold)
    assert (len(again), again.earned.sum()) == (choice.chosen.trades, pytest.approx(choice.chosen.total_return))


def test_choose_threshold_nothing_expected_to_earn_stays_at_zero() -> None:
    windows, _ = synthetic(0.0, days=2)
    predicted: dict[str, np.ndarray] = {side: np.full(len(windows), -0.001) for side in SIDES}
    choice = choose_threshold(predicted, windows)
    assert (choice.threshold, choice.chosen.trades) == (0.0, 0)
    assert choice.to_json()["chosen"]["mean_return"] is None
