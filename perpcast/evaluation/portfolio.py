"""What trading the predictions of a span would have earned, beside everything that a sceptic would compare it with."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from perpcast.backtest import Backtest, MarketPanel, Terms, TradeTable, backtest, buy_and_hold
from perpcast.errors import DataError
from perpcast.evaluation.bootstrap import confidence_interval
from perpcast.evaluation.performance import (
    Performance,
    daily_returns,
    deflated_sharpe_ratio,
    finite,
    performance_of,
    probabilistic_sharpe_ratio,
)
from perpcast.evaluation.scores import Score
from perpcast.evaluation.windows import Windows
from perpcast.exit_policy import label_sides
from perpcast.market import SIDES, Instrument
from perpcast.timeframe import format_time

SLIPPAGES = (0.0, 0.0002, 0.0005)
STRESS_SLIDE = 0.5


@dataclass(frozen=True)
class Line:
    """One account and its measures; `daily_return` [days] is a fraction of the equity of the day before."""

    name: str
    backtest: Backtest
    performance: Performance
    day: np.ndarray  # int64 [days], since the epoch
    daily_return: np.ndarray


@dataclass(frozen=True)
class RandomEntries:
    """Accounts that enter as many trades as the model, at random: net returns as fractions."""

    runs: int
    trades: float  # mean number
    mean: float
    lower: float  # 5 %
    upper: float  # 95 %
    percentile: float  # share of them that the model's net return beats


@dataclass(frozen=True)
class SharpeTest:
    """How sure the model's Sharpe ratio is: above 0, and above the best of so many tries without skill."""

    probabilistic: float
    deflated: float
    trials: int


@dataclass(frozen=True)
class Portfolio:
    """Everything that trading on the test span has to show. Both `gains` and returns are fractions a day or a trade."""

    model: Line
    baselines: Mapping[str, Line]
    slippage: Mapping[float, Performance]  # of the model, by fraction of price; what is decided stays the same
    stress: Performance  # of the model, stops filled half-way to their bar's extreme
    buy_and_hold: Line
    always_on: Line  # the model's ranking without a threshold: every free place is taken
    random: RandomEntries
    gains: Mapping[str, Score]  # model minus each baseline, and `best`: mean daily net return, the same days drawn
    best_baseline: str  # by net return on these very windows, which favours it
    both_orders: Mapping[str, float]  # mean label of the model's trades: adverse_first, favourable_first
    sharpe: SharpeTest

    def to_json(self) -> dict[str, Any]:
        """Numbers only; None in place of NaN and infinity."""
        return {
            "model": self.model.performance.to_json(),
            "baselines": {name: line.performance.to_json() for name, line in self.baselines.items()},
            "slippage": {str(price): performance.to_json() for price, performance in self.slippage.items()},
            "stress": self.stress.to_json(),
            "buy_and_hold": self.buy_and_hold.performance.to_json(),
            "always_on": self.always_on.performance.to_json(),
            "random": finite(asdict(self.random)),
            "gains": {name: score.to_json() for name, score in self.gains.items()},
            "best_baseline": self.best_baseline,
            "both_orders": finite(self.both_orders),
            "sharpe": finite(asdict(self.sharpe)),
            "refused": dict(self.model.backtest.refused),
        }


def evaluate_portfolio(
    market: MarketPanel,
    scores: Mapping[str, np.ndarray],
    instruments: Mapping[str, Instrument],
    terms: Terms,
    *,
    trials: int,
    seed: int,
    thresholds: Mapping[str, float] | None = None,
    random_runs: int = 20,
) -> Portfolio:
    """Trades the scores [2 sides, symbols, bars] of `model` and of each baseline, NaN where not predicted.

    `thresholds` are the baselines' own, by name; `terms.threshold`, the model's, stands for those without one.
    `trials` is the number of configurations that were tried, looks at this span included.
    """
    if next(iter(scores), None) != "model" or len(scores) < 2:
        raise ValueError(f"expected the scores of `model`, then of at least one baseline, received {list(scores)}")

    def traded(score: np.ndarray, changed: Terms, **options: Any) -> Backtest:
        return backtest(market, score, instruments, changed, **options)

    own = {"model": terms.threshold, **(thresholds or {})}
    lines = {
        name: line(name, traded(score, replace(terms, threshold=own.get(name, terms.threshold))))
        for name, score in scores.items()
    }
    model, score = lines.pop("model"), scores["model"]
    best = max(lines, key=lambda name: lines[name].performance.total_return)
    gains = {name: paired_gain(model.daily_return, each.daily_return, seed) for name, each in lines.items()}
    return Portfolio(
        model=model,
        baselines=lines,
        slippage={price: performance_of(traded(score, with_slippage(terms, price))) for price in SLIPPAGES},
        stress=performance_of(traded(score, terms, stop_slide=STRESS_SLIDE)),
        buy_and_hold=line("buy and hold", buy_and_hold(market, terms)),
        always_on=line("always on", traded(score, replace(terms, threshold=-np.inf))),
        random=_random_entries(traded, score, terms, model, seed, random_runs),
        gains={**gains, "best": gains[best]},
        best_baseline=best,
        both_orders=_both_orders(market, model.backtest.trades, terms),
        sharpe=SharpeTest(
            probabilistic_sharpe_ratio(model.daily_return), deflated_sharpe_ratio(model.daily_return, trials), trials
        ),
    )


def line(name: str, account: Backtest) -> Line:
    """An account with its measures."""
    days, returns = daily_returns(account.equity, account.open_time_ms, account.initial)
    return Line(name, account, performance_of(account), days, returns)


def with_slippage(terms: Terms, slippage: float) -> Terms:
    """The same terms where takers pay this fraction of the price."""
    policies = {side: replace(policy, slippage=slippage) for side, policy in terms.policies.items()}
    return replace(terms, policies=policies)


def score_grid(windows: Windows, predicted: Mapping[str, np.ndarray], market: MarketPanel) -> np.ndarray:
    """Expected returns by side [n] at their windows' places: float64 [2 sides, symbols, bars], NaN elsewhere.

    Raises DataError for windows that the market does not hold.
    """
    unknown = {windows.symbols[code] for code in np.unique(windows.symbol)} - set(market.symbols)
    bar, off = np.divmod(windows.open_time_ms - market.open_time_ms[0], market.step_ms)
    if unknown or off.any() or np.any((bar < 0) | (bar >= len(market.open_time_ms))):
        raise DataError(
            f"expected windows on the market's bars and symbols, received {len(unknown)} other symbols and bars from "
            f"{format_time(int(windows.open_time_ms.min()))} to {format_time(int(windows.open_time_ms.max()))}; "
            "build the market from the candles of the same dataset and span"
        )
    rows = {symbol: row for row, symbol in enumerate(market.symbols)}
    symbol = np.array([rows.get(name, -1) for name in windows.symbols])[windows.symbol]
    grid = np.full((len(SIDES), *market.open.shape), np.nan)
    for number, side in enumerate(SIDES):
        grid[number, symbol, bar] = predicted[side]
    return grid


def paired_gain(daily: np.ndarray, other: np.ndarray, seed: int, level: float = 0.95) -> Score:
    """Mean difference of two accounts' net returns by day [days] over the same days, with its interval.

    The stationary bootstrap draws each day's difference, so that both accounts always see the same days. The bounds
    are NaN where there are too few days to know.
    """
    if daily.shape != other.shape:
        raise ValueError(f"expected returns of the same days, received {daily.shape} and {other.shape}")
    sums = np.stack([daily - other, np.ones(len(daily))], axis=1)

    def mean(drawn: np.ndarray) -> np.ndarray:
        return drawn[..., 0] / drawn[..., 1]

    bounds = confidence_interval(sums, mean, np.random.default_rng(seed), level=level)
    return Score(float(np.mean(daily - other)), *bounds)


def _random_entries(
    traded: Callable[..., Backtest], score: np.ndarray, terms: Terms, model: Line, seed: int, runs: int
) -> RandomEntries:
    """Symbols and sides drawn among those predicted, as many entries as the model's, at bars drawn with them."""
    predicted = np.isfinite(score)
    bars = np.flatnonzero(predicted.any(axis=(0, 1)))
    wanted, anything = len(model.backtest.trades), replace(terms, threshold=-np.inf)
    returns, counts = np.empty(runs), np.empty(runs)
    for run in range(runs):
        rng = np.random.default_rng([seed, run])
        drawn = np.where(predicted, rng.random(score.shape), np.nan)
        # An entry that finds no place free at its bar waits for the next one that has.
        due = np.cumsum(np.bincount(rng.choice(bars, wanted), minlength=score.shape[2]))
        account = traded(drawn, anything, entries_until=due)
        returns[run], counts[run] = account.equity[-1] / account.initial - 1, len(account.trades)
    lower, upper = np.quantile(returns, [0.05, 0.95])
    beaten = float(np.mean(model.performance.total_return > returns))
    return RandomEntries(runs, float(np.mean(counts)), float(np.mean(returns)), float(lower), float(upper), beaten)


def _both_orders(market: MarketPanel, trades: TradeTable, terms: Terms) -> dict[str, float]:
    """Mean label of these trades where bars go adverse extreme first, as the policy says, and favourable first."""
    found: dict[str, list[float]] = {"adverse_first": [], "favourable_first": []}
    signal = (trades.signal_ms - market.open_time_ms[0]) // market.step_ms
    for symbol in np.unique(trades.symbol):
        prices = market.open[symbol], market.high[symbol], market.low[symbol], market.close[symbol]
        mine = trades.symbol == symbol
        for name, earned in found.items():
            labels = label_sides(*prices, terms.policies, ambiguous=False, adverse_first=name == "adverse_first")
            by_side = np.stack([labels[side].expected_return for side in SIDES])
            earned += by_side[trades.side[mine], signal[mine]].tolist()
    # The last trades of the span have no label yet.
    return {name: float(np.nanmean(earned)) if np.isfinite(earned).any() else np.nan for name, earned in found.items()}
