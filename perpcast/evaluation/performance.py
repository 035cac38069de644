"""What an account did, in the field's measures: returns by day, ratios, drawdown, trades by side and by exit reason.

Returns are fractions, by UTC day [days]; a year has 365 of them. NaN where a measure is not defined.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from perpcast.backtest import Backtest, TradeTable
from perpcast.exit_policy import EXIT_REASONS
from perpcast.market import SIDES
from perpcast.timeframe import DAY_MS

DAYS_A_YEAR = 365
_NORMAL = NormalDist()


def daily_returns(equity: np.ndarray, open_time_ms: np.ndarray, initial: float) -> tuple[np.ndarray, np.ndarray]:
    """(Numbers of the UTC days since the epoch, return of each), from equity at the close of every bar [bars].

    A bar belongs to the day of its open, so that a day ends with the close at midnight; the first day starts from
    `initial`. Nothing can be earned on equity that is gone: 0.
    """
    day = open_time_ms // DAY_MS
    last = np.flatnonzero(np.diff(day, append=day[-1] + 1))
    days = np.arange(day[0], day[-1] + 1)
    # A day without a bar ends as the day before it did.
    ends = equity[last][np.searchsorted(day[last], days, side="right") - 1]
    before = np.concatenate(([initial], ends[:-1]))
    return days, np.where(before > 0, ends / np.where(before > 0, before, 1) - 1, 0.0)


def total_return(returns: np.ndarray) -> float:
    """What all of them compound to."""
    return float(np.prod(1 + returns) - 1)


def sharpe_ratio(returns: np.ndarray) -> float:
    """Mean over standard deviation of daily returns, a year's; no interest is subtracted. NaN without any spread."""
    return _daily_sharpe(returns) * np.sqrt(DAYS_A_YEAR)


def sortino_ratio(returns: np.ndarray) -> float:
    """As Sharpe's, over the root of the mean squared loss (target 0) instead of the standard deviation."""
    downside = float(np.sqrt(np.mean(np.minimum(returns, 0) ** 2)))
    return float(np.mean(returns)) / downside * np.sqrt(DAYS_A_YEAR) if downside > 0 else np.nan


def drawdown(equity: np.ndarray, initial: float) -> np.ndarray:
    """Loss since the highest equity until each bar, a fraction of that, 0 or more: float64 [bars]."""
    return 1 - equity / np.maximum.accumulate(np.maximum(equity, initial))


def max_drawdown(equity: np.ndarray, initial: float) -> float:
    """The largest drawdown."""
    return float(np.max(drawdown(equity, initial)))


def win_rate(profits: np.ndarray) -> float:
    """Share of trades that ended above 0."""
    return float(np.mean(profits > 0)) if len(profits) else np.nan


def profit_factor(profits: np.ndarray) -> float:
    """Sum of what winners earned over the sum of what losers lost; infinite without a loser."""
    won, lost = float(np.sum(profits[profits > 0])), -float(np.sum(profits[profits < 0]))
    if not won and not lost:
        return np.nan
    return won / lost if lost else np.inf


def exposure(open_positions: np.ndarray) -> float:
    """Share of bars with an open position."""
    return float(np.mean(open_positions > 0))


def turnover(notional: np.ndarray, equity: np.ndarray, days: int) -> float:
    """Value entered a day, as a multiple of the mean equity; every entry is followed by exits of about its size."""
    return float(np.sum(notional)) / float(np.mean(equity)) / days


def sharpe_deviation(sharpe: float, observations: int, skewness: float, kurtosis: float) -> float:
    """Standard deviation of an estimated Sharpe ratio (Bailey and Lopez de Prado 2012, Mertens 2002).

    `sharpe` is that of one observation, not annualised; `kurtosis` is 3 for a normal distribution.
    """
    variance = 1 - skewness * sharpe + (kurtosis - 1) / 4 * sharpe**2
    return float(np.sqrt(variance / (observations - 1))) if observations > 1 and variance > 0 else np.nan


def probabilistic_sharpe_ratio(returns: np.ndarray, benchmark: float = 0.0) -> float:
    """Probability that the true Sharpe ratio lies above `benchmark` (Bailey and Lopez de Prado 2012).

    `benchmark` is that of one day, not annualised. Days are taken as independent: overlapping trades are less so.
    """
    deviation = _deviation(returns)
    return _probability((_daily_sharpe(returns) - benchmark) / deviation) if deviation > 0 else np.nan


def expected_maximum_sharpe(trials: int, variance_of_trials: float) -> float:
    """The best Sharpe ratio to expect of so many configurations without any skill; `variance_of_trials` across them.

    Bailey and Lopez de Prado (2014), equation 1; one trial is no choice: 0.
    """
    if trials < 1:
        raise ValueError(f"trials must be at least 1, received {trials}")
    if trials == 1:
        return 0.0
    euler = float(np.euler_gamma)
    largest = (1 - euler) * _NORMAL.inv_cdf(1 - 1 / trials) + euler * _NORMAL.inv_cdf(1 - 1 / (trials * np.e))
    return float(np.sqrt(variance_of_trials)) * largest


def deflated_sharpe_ratio(returns: np.ndarray, trials: int, variance_of_trials: float | None = None) -> float:
    """Probability that the Sharpe ratio is more than the best of so many tries without skill would have shown.

    `variance_of_trials` is that of the tries' daily Sharpe ratios; where it was not kept, that of this ratio's own
    estimate stands in: tries without skill differ by chance alone.
    """
    variance = _deviation(returns) ** 2 if variance_of_trials is None else variance_of_trials
    return probabilistic_sharpe_ratio(returns, expected_maximum_sharpe(trials, variance))


@dataclass(frozen=True)
class TradeStatistics:
    """Closed trades together; returns and profits are net of fees, slippage and funding."""

    trades: int
    win_rate: float
    profit_factor: float
    mean_return: float  # a fraction of the entry notional
    mean_bars_held: float
    net_profit: float  # USDT


@dataclass(frozen=True)
class Performance:
    """An account over a span. Trade figures are those of closed trades, net of fees, slippage and funding."""

    days: int
    initial: float  # USDT, as the rest of the money
    final: float
    total_return: float
    sharpe: float
    sortino: float
    max_drawdown: float
    exposure: float
    turnover: float
    fees: float  # paid
    funding: float  # received; below 0 where paid
    trades: int
    open_trades: int  # at the end of the span
    win_rate: float
    profit_factor: float
    mean_return: float
    mean_bars_held: float
    by_side: Mapping[str, TradeStatistics]
    by_reason: Mapping[str, TradeStatistics]  # those that happened, in the order of EXIT_REASONS

    def to_json(self) -> dict[str, Any]:
        """Numbers by name; None in place of NaN and infinity."""
        return finite(asdict(self))


def performance_of(backtest: Backtest) -> Performance:
    """The measures of one account."""
    trades, equity = backtest.trades, backtest.equity
    days, returns = daily_returns(equity, backtest.open_time_ms, backtest.initial)
    closed = trades[trades.closed]
    together = trade_statistics(closed)
    reasons = [code for code in range(len(EXIT_REASONS)) if np.any(closed.exit_reason == code)]
    return Performance(
        days=len(days),
        initial=backtest.initial,
        final=float(equity[-1]),
        total_return=total_return(returns),
        sharpe=sharpe_ratio(returns),
        sortino=sortino_ratio(returns),
        max_drawdown=max_drawdown(equity, backtest.initial),
        exposure=exposure(backtest.open_positions),
        turnover=turnover(trades.notional, equity, len(days)),
        fees=float(backtest.fees[-1]),
        funding=float(backtest.funding[-1]),
        trades=together.trades,
        open_trades=len(trades) - len(closed),
        win_rate=together.win_rate,
        profit_factor=together.profit_factor,
        mean_return=together.mean_return,
        mean_bars_held=together.mean_bars_held,
        by_side={side: trade_statistics(closed[closed.side == code]) for code, side in enumerate(SIDES)},
        by_reason={EXIT_REASONS[code]: trade_statistics(closed[closed.exit_reason == code]) for code in reasons},
    )


def trade_statistics(trades: TradeTable) -> TradeStatistics:
    """The measures of closed trades."""
    profits, any_trade = trades.pnl + trades.funding, len(trades) > 0
    return TradeStatistics(
        trades=len(trades),
        win_rate=win_rate(profits),
        profit_factor=profit_factor(profits),
        mean_return=float(np.mean(profits / trades.notional)) if any_trade else np.nan,
        mean_bars_held=float(np.mean(trades.bars_held)) if any_trade else np.nan,
        net_profit=float(np.sum(profits)),
    )


def _daily_sharpe(returns: np.ndarray) -> float:
    if len(returns) < 2 or np.ptp(returns) == 0:
        return np.nan
    return float(np.mean(returns) / np.std(returns, ddof=1))


def _deviation(returns: np.ndarray) -> float:
    """Of the daily Sharpe ratio of these returns, from their own skewness and kurtosis."""
    sharpe = _daily_sharpe(returns)
    if np.isnan(sharpe):
        return np.nan
    standard = (returns - np.mean(returns)) / np.std(returns)
    return sharpe_deviation(sharpe, len(returns), float(np.mean(standard**3)), float(np.mean(standard**4)))


def _probability(deviations: float) -> float:
    return _NORMAL.cdf(deviations) if np.isfinite(deviations) else np.nan


def finite(value: Any) -> Any:
    """The same numbers for JSON: None in place of NaN and infinity, in mappings of mappings too."""
    if isinstance(value, Mapping):
        return {key: finite(each) for key, each in value.items()}
    return None if isinstance(value, float) and not np.isfinite(value) else value
