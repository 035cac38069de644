"""The portfolio of a span: a planted edge beside none, the same days for both, random entries, every number once."""

import json
from dataclasses import replace

import numpy as np
import pytest

from perpcast.backtest import MarketPanel, Terms, backtest
from perpcast.errors import DataError
from perpcast.evaluation.performance import performance_of
from perpcast.evaluation.portfolio import Portfolio, evaluate_portfolio, paired_gain, score_grid, with_slippage
from perpcast.evaluation.windows import Windows
from perpcast.exit_policy import label_sides
from perpcast.market import SIDES
from tests.live_world import BEGIN, STEP
from tests.test_backtest import INSTRUMENTS, SYMBOLS, TERMS, random_panel

BARS = 96 * 16  # 16 days
MARKET = random_panel(11, BARS, funded=True)


def labels_of(market: MarketPanel, terms: Terms, *, adverse_first: bool = True) -> np.ndarray:
    """float64 [2 sides, symbols, bars]."""
    found = np.empty((2, *market.open.shape))
    for symbol in range(len(market.symbols)):
        prices = market.open[symbol], market.high[symbol], market.low[symbol], market.close[symbol]
        labels = label_sides(*prices, terms.policies, ambiguous=False, adverse_first=adverse_first)
        found[:, symbol] = [labels[side].expected_return for side in SIDES]
    return found


def forecasts(skill: float, seed: int) -> np.ndarray:
    """`skill` of the label, the rest noise of its size; NaN where there is no label."""
    label = labels_of(MARKET, TERMS)
    noise = np.random.default_rng(seed).normal(0, np.nanstd(label), label.shape)
    return np.where(np.isfinite(label), skill * label + (1 - skill) * noise, np.nan)


TERMS = replace(TERMS, threshold=0.01, max_drawdown=0.5)


@pytest.fixture(scope="module")
def portfolio() -> Portfolio:
    scores = {"model": forecasts(0.6, 1), "ridge": forecasts(0.0, 2), "constant": np.zeros((2, 5, BARS))}
    return evaluate_portfolio(
        MARKET, scores, INSTRUMENTS, TERMS, trials=7, seed=3, thresholds={"constant": -1.0}, random_runs=8
    )


def test_a_planted_edge_stands_above_everything_beside_it(portfolio: Portfolio) -> None:
    earned = portfolio.model.performance.total_return
    assert earned > 0.1
    assert all(earned > line.performance.total_return for line in portfolio.baselines.values())
    assert portfolio.random.percentile == 1.0
    assert portfolio.random.lower < portfolio.random.mean < portfolio.random.upper < earned
    assert portfolio.gains["ridge"].lower > 0
    assert portfolio.gains["best"] == portfolio.gains[portfolio.best_baseline]
    assert portfolio.sharpe.trials == 7
    assert 0.5 < portfolio.sharpe.deflated < portfolio.sharpe.probabilistic


def test_no_skill_is_no_better_than_random(portfolio: Portfolio) -> None:
    scores = {"model": forecasts(0.0, 5), "ridge": forecasts(0.0, 2)}
    found = evaluate_portfolio(MARKET, scores, INSTRUMENTS, TERMS, trials=1, seed=3, random_runs=20)
    assert found.random.lower - 0.05 < found.model.performance.total_return < found.random.upper + 0.05
    assert found.gains["best"].lower < 0
    assert found.sharpe.deflated == found.sharpe.probabilistic


def test_random_entries_are_as_many_as_the_models(portfolio: Portfolio) -> None:
    assert portfolio.random.trades == pytest.approx(len(portfolio.model.backtest.trades), rel=0.02)


def test_baselines_have_their_own_thresholds(portfolio: Portfolio) -> None:
    """The constant lies below the model's threshold of 0.01 and above its own."""
    assert portfolio.baselines["constant"].performance.trades > 0


def test_costs_only_cost(portfolio: Portfolio) -> None:
    """The policy's own slippage is 2 bp. Levels follow the entry's price: a trade may gain from paying."""
    assert portfolio.slippage[0.0005].total_return < portfolio.slippage[0.0].total_return
    assert portfolio.slippage[0.0002] == portfolio.model.performance
    assert portfolio.stress.total_return < portfolio.model.performance.total_return
    free = backtest(MARKET, forecasts(0.6, 1), INSTRUMENTS, with_slippage(TERMS, 0.0))
    assert performance_of(free) == portfolio.slippage[0.0]


def test_always_on_fills_every_place(portfolio: Portfolio) -> None:
    """At a bar's close a place is free only where a trade just ended in it, or where nothing is predicted any more."""
    account = portfolio.always_on.backtest
    ended = np.isin(account.open_time_ms, account.trades.exit_ms)
    predicted = np.arange(BARS) < BARS - TERMS.policies["buy"].horizon - 1
    assert np.all((account.open_positions == TERMS.max_positions) | ended | ~predicted | (np.arange(BARS) == 0))
    assert portfolio.always_on.performance.trades > portfolio.model.performance.trades


def test_both_orders_are_the_mean_labels_of_what_was_traded(portfolio: Portfolio) -> None:
    trades = portfolio.model.backtest.trades
    bar = (trades.signal_ms - BEGIN) // STEP
    for name, adverse_first in (("adverse_first", True), ("favourable_first", False)):
        label = labels_of(MARKET, TERMS, adverse_first=adverse_first)[trades.side, trades.symbol, bar]
        assert portfolio.both_orders[name] == pytest.approx(np.nanmean(label), abs=1e-12)
    closed = trades.expected_return[trades.closed]
    assert portfolio.both_orders["adverse_first"] == pytest.approx(closed.mean(), abs=1e-12)
    assert portfolio.both_orders["favourable_first"] != portfolio.both_orders["adverse_first"]


def test_lines_hold_the_days_of_their_accounts(portfolio: Portfolio) -> None:
    lines = [portfolio.model, portfolio.buy_and_hold, portfolio.always_on, *portfolio.baselines.values()]
    for line in lines:
        np.testing.assert_array_equal(line.day, portfolio.model.day)
        compounded = line.backtest.initial * np.prod(1 + line.daily_return)
        assert compounded == pytest.approx(line.backtest.equity[-1])


def test_numbers_are_plain_json(portfolio: Portfolio) -> None:
    found = json.loads(json.dumps(portfolio.to_json(), allow_nan=False))
    assert found["model"]["trades"] == portfolio.model.performance.trades
    assert set(found["slippage"]) == {"0.0", "0.0002", "0.0005"}
    assert found["gains"]["best"]["lower"] == portfolio.gains["best"].lower


def test_scores_need_a_model_and_a_baseline() -> None:
    with pytest.raises(ValueError, match="`model`, then of at least one baseline"):
        evaluate_portfolio(MARKET, {"model": forecasts(0, 1)}, INSTRUMENTS, TERMS, trials=1, seed=1)


def test_paired_gain_by_hand_and_beside_its_spread() -> None:
    """A constant difference has no spread; one of independent days has the normal one, 1.96 sd / root n."""
    rng = np.random.default_rng(1)
    market = rng.normal(0, 0.05, 400)
    same = paired_gain(market + 0.001, market, seed=2)
    assert (same.value, same.lower, same.upper) == pytest.approx((0.001, 0.001, 0.001))
    own = rng.normal(0.002, 0.01, 400)
    gain = paired_gain(market + own, market, seed=2)
    assert gain.value == pytest.approx(own.mean())
    assert gain.upper - gain.lower == pytest.approx(2 * 1.96 * own.std() / 20, rel=0.25)
    narrow = paired_gain(market + own, market, seed=2, level=0.5)
    assert gain.lower < narrow.lower < narrow.upper < gain.upper
    few = paired_gain(market[:9], own[:9], seed=2)  # fewer than two blocks of five days
    assert np.isnan([few.lower, few.upper]).all()
    with pytest.raises(ValueError, match="the same days"):
        paired_gain(market, own[:9], seed=2)


def test_score_grid_puts_every_forecast_at_its_window() -> None:
    windows = Windows(
        ("E", "gone", "A"),
        np.array([0, 2, 2]),
        BEGIN + STEP * np.array([3, 3, 5]),
        {side: np.zeros(3) for side in SIDES},
        {side: np.ones(3) for side in SIDES},
        STEP,
    )
    predicted = {"buy": np.array([1.0, 2.0, 3.0]), "sell": np.array([4.0, 5.0, 6.0])}
    grid = score_grid(windows, predicted, MARKET)
    assert grid[:, SYMBOLS.index("E"), 3].tolist() == [1.0, 4.0]
    assert grid[:, SYMBOLS.index("A"), [3, 5]].tolist() == [[2.0, 3.0], [5.0, 6.0]]
    assert np.isfinite(grid).sum() == 6
    for wrong in (
        replace(windows, symbol=np.array([0, 1, 2])),
        replace(windows, open_time_ms=windows.open_time_ms + 1),
    ):
        with pytest.raises(DataError, match="on the market's bars and symbols"):
            score_grid(wrong, predicted, MARKET)
