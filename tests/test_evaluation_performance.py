"""The measures of an account, with the arithmetic, and the published numbers of the Sharpe ratio's own doubt."""

import json
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perpcast.backtest import backtest
from perpcast.evaluation.performance import (
    daily_returns,
    deflated_sharpe_ratio,
    drawdown,
    expected_maximum_sharpe,
    exposure,
    max_drawdown,
    performance_of,
    probabilistic_sharpe_ratio,
    profit_factor,
    sharpe_deviation,
    sharpe_ratio,
    sortino_ratio,
    total_return,
    turnover,
    win_rate,
)
from tests.test_backtest import INSTRUMENTS, TERMS, random_panel, random_scores

HOUR = 3_600_000
DAY = 24 * HOUR


def test_daily_returns_end_with_the_days_last_bar() -> None:
    """Bars at 22:00, 23:00, 00:00 and, after a day without any, 05:00: 100 -> 110 | 121 | no bar | 60.5."""
    times = np.array([22 * HOUR, 23 * HOUR, DAY, 2 * DAY + DAY + 5 * HOUR]) + 10 * DAY
    days, returns = daily_returns(np.array([90.0, 110.0, 121.0, 60.5]), times, 100.0)
    assert days.tolist() == [10, 11, 12, 13]
    assert returns == pytest.approx([0.1, 0.1, 0.0, -0.5])
    assert total_return(returns) == pytest.approx(0.605 - 1)


def test_equity_that_is_gone_earns_nothing() -> None:
    _, returns = daily_returns(np.array([0.0, 0.0]), np.array([0, DAY]), 100.0)
    assert returns.tolist() == [-1.0, 0.0]


def test_ratios_by_hand() -> None:
    returns = np.array([0.02, -0.01, 0.03, 0.0])
    # Mean 0.01; squared deviations 1, 4, 4, 1 (x 1e-4) over 3; downside only (0.01)^2 over 4.
    assert sharpe_ratio(returns) == pytest.approx(0.01 / np.sqrt(10e-4 / 3) * np.sqrt(365))
    assert sortino_ratio(returns) == pytest.approx(0.01 / 0.005 * np.sqrt(365))
    assert np.isnan(sharpe_ratio(np.full(5, 0.01)))
    assert np.isnan(sharpe_ratio(np.array([0.01])))
    assert np.isnan(sortino_ratio(np.array([0.01, 0.02])))


def test_drawdown_counts_from_the_highest_equity_the_first_included() -> None:
    equity = np.array([90.0, 120.0, 60.0, 130.0])
    assert drawdown(equity, 100.0) == pytest.approx([0.1, 0.0, 0.5, 0.0])
    assert max_drawdown(equity, 100.0) == pytest.approx(0.5)


def test_trade_measures_by_hand() -> None:
    assert profit_factor(np.array([3.0, -1.0, -1.0])) == pytest.approx(1.5)
    assert profit_factor(np.array([3.0])) == np.inf
    assert np.isnan(profit_factor(np.array([])))
    assert win_rate(np.array([3.0, -1.0, 0.0, 2.0])) == pytest.approx(0.5)
    assert np.isnan(win_rate(np.array([])))
    assert exposure(np.array([0, 1, 2, 0])) == pytest.approx(0.5)
    assert turnover(np.array([1000.0, 3000.0]), np.array([900.0, 1100.0]), 2) == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("skewness", "kurtosis", "published"),
    [
        (0.0, 3.0, 0.982),  # as if normal
        (-2.448, 10.164, 0.913),
    ],
)
def test_probabilistic_sharpe_ratio_as_published(skewness: float, kurtosis: float, published: float) -> None:
    """Bailey and Lopez de Prado (2012), the example of 24 months with a monthly Sharpe ratio of 0.458."""
    deviation = sharpe_deviation(0.458, 24, skewness, kurtosis)
    assert NormalDist().cdf(0.458 / deviation) == pytest.approx(published, abs=5e-4)


def test_deflated_sharpe_ratio_as_published() -> None:
    """Bailey and Lopez de Prado (2014): Sharpe 2.5 a year of 250 days, five years, 100 trials whose Sharpe ratios vary
    by 1/2 a year, skewness -3, kurtosis 10: the threshold is 0.1132 a day, the ratio 0.9004."""
    threshold = expected_maximum_sharpe(100, 0.5 / 250)
    assert threshold == pytest.approx(0.1132, abs=5e-5)
    sharpe = 2.5 / np.sqrt(250)
    deviation = sharpe_deviation(sharpe, 1250, -3.0, 10.0)
    assert NormalDist().cdf((sharpe - threshold) / deviation) == pytest.approx(0.9004, abs=5e-5)


def test_sharpe_tests_of_returns() -> None:
    returns = np.random.default_rng(1).normal(0.002, 0.01, 400)
    assert 0.9 < probabilistic_sharpe_ratio(returns) < 1
    assert probabilistic_sharpe_ratio(returns, float(returns.mean() / returns.std(ddof=1))) == pytest.approx(0.5)
    assert deflated_sharpe_ratio(returns, 1) == probabilistic_sharpe_ratio(returns)
    deflated = [deflated_sharpe_ratio(returns, trials) for trials in (1, 2, 10, 1000)]
    assert deflated == sorted(deflated, reverse=True)
    assert np.isnan(deflated_sharpe_ratio(np.zeros(10), 5))
    with pytest.raises(ValueError, match="at least 1"):
        expected_maximum_sharpe(0, 1.0)


def test_expected_maximum_is_what_chance_shows() -> None:
    """The largest of 50 standard normal numbers, over 20,000 draws: within 1.5 % (the formula is an approximation)."""
    largest = np.random.default_rng(2).normal(size=(20_000, 50)).max(axis=1).mean()
    assert expected_maximum_sharpe(50, 1.0) == pytest.approx(largest, rel=0.015)


@given(st.integers(0, 10_000))
def test_performance_adds_up(seed: int) -> None:
    market = random_panel(seed, funded=True)
    account = backtest(market, random_scores(market, seed), INSTRUMENTS, TERMS)
    performance = performance_of(account)
    assert performance.final == pytest.approx(performance.initial * (1 + performance.total_return))
    for parts in (performance.by_side, performance.by_reason):
        assert sum(part.trades for part in parts.values()) == performance.trades
        wins = sum(part.win_rate * part.trades for part in parts.values() if part.trades)
        assert wins == pytest.approx(performance.win_rate * performance.trades)
    closed = account.trades[account.trades.closed]
    together = sum(part.net_profit for part in performance.by_side.values())
    assert together == pytest.approx(float(np.sum(closed.pnl + closed.funding)), abs=1e-9)
    assert performance.trades + performance.open_trades == len(account.trades)
    assert "none" not in performance.by_reason
    assert 0 <= performance.max_drawdown < 1
    json.dumps(performance.to_json(), allow_nan=False)


def test_an_account_without_trades_says_so() -> None:
    market = random_panel(1)
    performance = performance_of(backtest(market, np.full((2, 5, 160), np.nan), INSTRUMENTS, TERMS))
    assert (performance.trades, performance.total_return, performance.exposure) == (0, 0.0, 0.0)
    assert performance.to_json()["win_rate"] is None
    assert performance.by_reason == {}
