"""A model's scores beside its baselines' on the same untouched windows, with intervals, and a verdict."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd

from perpcast.evaluation import metrics
from perpcast.evaluation.baselines import Baseline
from perpcast.evaluation.bootstrap import MEAN_BLOCK_DAYS, confidence_interval, sums_by_day
from perpcast.evaluation.threshold import Trades, take_trades
from perpcast.market import SIDES
from perpcast.timeframe import DAY_MS


@dataclass(frozen=True)
class Windows:
    """The windows of one span with what came true: arrays [n], one row for a symbol's signal bar."""

    symbols: tuple[str, ...]
    symbol: np.ndarray  # int, index into `symbols`
    open_time_ms: np.ndarray  # int64
    realised: Mapping[str, np.ndarray]  # by side, net return of the trade, a fraction
    bars_held: Mapping[str, np.ndarray]  # by side
    step_ms: int

    def __len__(self) -> int:
        return len(self.symbol)

    @property
    def day(self) -> np.ndarray:
        """Number of the UTC day since the epoch."""
        return self.open_time_ms // DAY_MS

    def __getitem__(self, rows: np.ndarray) -> "Windows":
        return Windows(
            self.symbols,
            self.symbol[rows],
            self.open_time_ms[rows],
            {side: values[rows] for side, values in self.realised.items()},
            {side: values[rows] for side, values in self.bars_held.items()},
            self.step_ms,
        )


@dataclass(frozen=True)
class Score:
    """A number with its 95 % interval; NaN where the score, or its interval, is not defined."""

    value: float
    lower: float = np.nan
    upper: float = np.nan

    def to_json(self) -> dict[str, float | None]:
        """None in place of NaN."""
        return {key: value if np.isfinite(value) else None for key, value in asdict(self).items()}


@dataclass(frozen=True)
class Scorecard:
    """One forecast's scores over both sides; errors and returns are fractions."""

    name: str
    scores: Mapping[str, Score]  # by METRICS
    by_symbol_ic: Mapping[str, float]
    trades: Trades


@dataclass(frozen=True)
class ProfitScores:
    """How well one side's probabilities of profit were given; calls are those above one half."""

    scores: Mapping[str, float]  # by PROFIT_METRICS; NaN where a score is not defined
    base_rate: float  # share of profits among training trades
    base: Mapping[str, float]  # the same scores of that rate, given to every trade
    calibration: tuple[Mapping[str, float], ...]  # count, predicted and realised, by quantile of the probability

    def to_json(self) -> dict[str, Any]:
        """None in place of NaN."""
        return {
            "scores": _without_nan(self.scores),
            "base_rate": self.base_rate,
            "base": _without_nan(self.base),
            "calibration": [dict(row) for row in self.calibration],
        }


@dataclass(frozen=True)
class Verdict:
    """What a reader should believe: `better` than every baseline, `ranks` better only, or `none`."""

    level: Literal["better", "ranks", "none"]
    sentence: str


@dataclass(frozen=True)
class Evaluation:
    """The test span's scores. `cards` start with the model; `gains` are its paired gains on the best baseline."""

    windows: Windows
    predicted: Mapping[str, np.ndarray]  # every output of the model by name
    threshold: float
    cards: tuple[Scorecard, ...]
    gains: Mapping[str, Score]
    quantiles: Mapping[str, Mapping[str, float]]
    verdict: Verdict
    days: int
    notes: tuple[str, ...] = field(default=())
    profits: Mapping[str, "ProfitScores"] = field(default_factory=dict)  # by side, of a classifier

    @property
    def model(self) -> Scorecard:
        """The model's own card."""
        return self.cards[0]

    def to_json(self) -> dict[str, Any]:
        """What `model_metadata` and the bundle's card keep: numbers, no arrays."""
        return {
            "windows": len(self.windows),
            "days": self.days,
            "first_ms": int(self.windows.open_time_ms.min()),
            "last_ms": int(self.windows.open_time_ms.max()),
            "threshold": self.threshold,
            "verdict": asdict(self.verdict),
            "scores": {
                card.name: {name: score.to_json() for name, score in card.scores.items()} for card in self.cards
            },
            "gains": {name: score.to_json() for name, score in self.gains.items()},
            "quantiles": {name: dict(values) for name, values in self.quantiles.items()},
            "profits": {side: scores.to_json() for side, scores in self.profits.items()},
            "rank_ic_by_symbol": _without_nan(self.model.by_symbol_ic),
            "notes": list(self.notes),
        }


# Name, what tables call it, and whether it is shown in percent.
METRICS: dict[str, tuple[str, bool]] = {
    "rank_ic": ("Rank IC by day", False),
    "rank_ic_symbol": ("Rank IC through time", False),
    "mae": ("MAE", True),
    "rmse": ("RMSE", True),
    "r2": ("R²", False),
    "direction": ("Direction accuracy", True),
    "trade_return": ("Net return per trade", True),
    "win_rate": ("Win rate", True),
    "trades": ("Trades", False),
}

# Name and what tables call it, of the scores of a probability.
PROFIT_METRICS: dict[str, str] = {
    "accuracy": "Accuracy",
    "precision": "Precision",
    "recall": "Recall",
    "f1": "F1",
    "auc": "AUC",
    "brier": "Brier score",
    "log_loss": "Log loss",
}

# Columns of the daily sums that every pooled score is made of.
_COUNT, _ABSOLUTE, _SQUARED, _REALISED, _REALISED_SQUARED, _RIGHT = range(6)


def _r2_of_sums(sums: np.ndarray) -> np.ndarray:
    total = sums[..., _REALISED_SQUARED] - sums[..., _REALISED] ** 2 / sums[..., _COUNT]
    return 1 - sums[..., _SQUARED] / total


_POOLED: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "mae": lambda sums: sums[..., _ABSOLUTE] / sums[..., _COUNT],
    "rmse": lambda sums: np.sqrt(sums[..., _SQUARED] / sums[..., _COUNT]),
    "r2": _r2_of_sums,
    "direction": lambda sums: sums[..., _RIGHT] / sums[..., _COUNT],
}


def _mean_of_sums(sums: np.ndarray) -> np.ndarray:
    return sums[..., 0] / sums[..., 1]


def evaluate(
    windows: Windows,
    predicted: Mapping[str, np.ndarray],
    baselines: Mapping[str, Mapping[str, np.ndarray]],
    threshold: float,
    seed: int,
    *,
    quantiles: Sequence[float] = (),
    base_rates: Mapping[str, float] | None = None,
) -> Evaluation:
    """Scores the model's outputs (`buy_mean`, `buy_q50`, …) and the baselines' (by name and side) on the same windows.

    `threshold` was frozen before these windows were looked at; it decides the trades of model and baselines alike.
    `base_rates`, the training trades' shares of profits by side, are what a classifier's probabilities have to beat.
    """
    if not len(windows):
        raise ValueError("there are no windows to score")
    mean: dict[str, np.ndarray] = {side: np.asarray(predicted[f"{side}_mean"], np.float64) for side in SIDES}
    forecasts: dict[str, Mapping[str, np.ndarray]] = {"model": mean, **baselines}
    cards = tuple(_scorecard(name, windows, values, threshold, seed) for name, values in forecasts.items())
    gains = _gains(windows, forecasts, seed)
    days = int(windows.day.max() - windows.day.min()) + 1
    return Evaluation(
        windows=windows,
        predicted=predicted,
        threshold=threshold,
        cards=cards,
        gains=gains,
        quantiles=_quantile_scores(windows, predicted, quantiles),
        verdict=_verdict(gains, cards[0]),
        days=days,
        notes=_notes(days),
        profits=_profit_scores(windows, predicted, base_rates or {}),
    )


def baseline_forecasts(baselines: Sequence[Baseline], last_change: np.ndarray) -> dict[str, dict[str, np.ndarray]]:
    """The fitted baselines' expected returns by name and side, for `evaluate`."""
    return {baseline.name: baseline.predict(last_change) for baseline in baselines}


def daily_rank_ic(windows: Windows, predicted: Mapping[str, np.ndarray]) -> pd.Series:
    """Rank IC across symbols by day, the mean of both sides; empty where the forecast never tells symbols apart."""
    sides = [
        metrics.rank_ic_by_day(windows.realised[side], predicted[side], windows.symbol, windows.open_time_ms)
        for side in SIDES
    ]
    return pd.concat(sides, axis=1).mean(axis=1).sort_index()


def _scorecard(
    name: str, windows: Windows, predicted: Mapping[str, np.ndarray], threshold: float, seed: int
) -> Scorecard:
    sums = _error_sums(windows, predicted)
    scores = {}
    for metric, statistic in _POOLED.items():
        scores[metric] = Score(float(statistic(sums.sum(axis=0))), *confidence_interval(sums, statistic, _rng(seed)))
    daily = daily_rank_ic(windows, predicted)
    scores["rank_ic"] = _mean_score(daily.index.to_numpy(), daily.to_numpy(), seed)
    by_symbol = pd.concat(
        [metrics.rank_ic_by_symbol(windows.realised[side], predicted[side], windows.symbol) for side in SIDES], axis=1
    ).mean(axis=1)
    scores["rank_ic_symbol"] = Score(float(by_symbol.mean()))
    trades = take_trades(
        predicted,
        windows.realised,
        windows.bars_held,
        windows.symbol,
        windows.open_time_ms,
        windows.step_ms,
        threshold,
    )
    day = windows.day[trades.row]
    scores["trades"] = Score(float(len(trades)))
    scores["trade_return"] = _mean_score(day, trades.earned, seed)
    scores["win_rate"] = _mean_score(day, (trades.earned > 0).astype(float), seed)
    names = {windows.symbols[code]: float(by_symbol[code]) for code in by_symbol.index}
    return Scorecard(name, {metric: scores[metric] for metric in METRICS}, names, trades)


def _error_sums(windows: Windows, predicted: Mapping[str, np.ndarray]) -> np.ndarray:
    realised = np.concatenate([windows.realised[side] for side in SIDES])
    guess = np.concatenate([predicted[side] for side in SIDES])
    error = realised - guess
    right = ((realised > 0) == (guess > 0)).astype(float)
    day = np.tile(windows.day, len(SIDES))
    return sums_by_day(day, np.ones(len(error)), np.abs(error), error**2, realised, realised**2, right)


def _mean_score(day: np.ndarray, values: np.ndarray, seed: int) -> Score:
    if not len(values):
        return Score(np.nan)
    sums = sums_by_day(day, values, np.ones(len(values)))
    return Score(float(np.mean(values)), *confidence_interval(sums, _mean_of_sums, _rng(seed)))


def _gains(windows: Windows, forecasts: Mapping[str, Mapping[str, np.ndarray]], seed: int) -> dict[str, Score]:
    """Model minus best baseline, the same days drawn for both: squared error saved (as a share), and rank IC won.

    The best baseline is chosen on these very windows, which favours the baseline. One that ranks nothing has IC 0.
    """
    if len(forecasts) < 2:
        raise ValueError("a model is scored beside at least one baseline")
    squared = {name: _error_sums(windows, values)[:, _SQUARED] for name, values in forecasts.items()}
    best = min((name for name in forecasts if name != "model"), key=lambda name: squared[name].sum())
    pair = np.stack([squared["model"], squared[best]], axis=1)

    def saved(sums: np.ndarray) -> np.ndarray:
        return 1 - sums[..., 0] / sums[..., 1]

    first, last = int(windows.day.min()), int(windows.day.max())
    by_day = {
        name: daily_rank_ic(windows, values).reindex(range(first, last + 1)) for name, values in forecasts.items()
    }
    rival = max((name for name in forecasts if name != "model"), key=lambda name: _mean_or_zero(by_day[name]))
    won = by_day["model"].fillna(0) - by_day[rival].fillna(0) * (_mean_or_zero(by_day[rival]) > 0)
    known = by_day["model"].notna() | by_day[rival].notna()
    return {
        "squared_error_saved": Score(float(saved(pair.sum(axis=0))), *confidence_interval(pair, saved, _rng(seed))),
        "rank_ic_won": _mean_score(won.index.to_numpy()[known], won.to_numpy()[known], seed),
    }


def _mean_or_zero(values: pd.Series) -> float:
    known = values.dropna()
    return float(known.mean()) if len(known) else 0.0


def _quantile_scores(
    windows: Windows, predicted: Mapping[str, np.ndarray], quantiles: Sequence[float]
) -> dict[str, dict[str, float]]:
    scores = {}
    for side in SIDES:
        for quantile in quantiles:
            name = f"{side}_q{round(quantile * 100)}"
            if name in predicted:
                below, at_or_below = metrics.quantile_coverage(windows.realised[side], predicted[name])
                loss = metrics.pinball_loss(windows.realised[side], predicted[name], quantile)
                scores[name] = {"quantile": quantile, "below": below, "at_or_below": at_or_below, "pinball": loss}
    return scores


def _profit_scores(
    windows: Windows, predicted: Mapping[str, np.ndarray], base_rates: Mapping[str, float]
) -> dict[str, ProfitScores]:
    found = {}
    for side, base_rate in base_rates.items():
        profit = windows.realised[side] > 0
        probability = np.asarray(predicted[f"{side}_profit_probability"], np.float64)
        scores, base = (_of_probability(profit, each) for each in (probability, np.full(len(profit), base_rate)))
        found[side] = ProfitScores(scores, base_rate, base, tuple(metrics.calibration_bins(profit, probability)))
    return found


def _of_probability(profit: np.ndarray, probability: np.ndarray) -> dict[str, float]:
    scores = {
        **metrics.classified(profit, probability),
        "auc": metrics.auc(profit, probability),
        "brier": metrics.brier(profit, probability),
        "log_loss": metrics.log_loss(profit, probability),
    }
    return {name: scores[name] for name in PROFIT_METRICS}


def _without_nan(values: Mapping[str, float]) -> dict[str, float | None]:
    return {name: value if np.isfinite(value) else None for name, value in values.items()}


def _verdict(gains: Mapping[str, Score], model: Scorecard) -> Verdict:
    accuracy, ranking = gains["squared_error_saved"], gains["rank_ic_won"]
    earned = model.scores["trade_return"]
    if np.isnan(earned.value):
        money = "Its frozen threshold took no trade."
    else:
        doing = "earned" if earned.value > 0 else "lost"
        doubt = "" if earned.lower > 0 or earned.value <= 0 else ", which is not clearly above zero"
        money = f"Its trades {doing} {abs(earned.value) * 100:.2f} % each after fees and slippage{doubt}."
    if np.isnan(accuracy.lower) and np.isnan(ranking.lower):
        return Verdict("none", f"Too few days to tell the model from its baselines. {money}")
    if accuracy.lower > 0 and ranking.lower > 0:
        return Verdict("better", f"The model beats its baselines, in accuracy and in ranking. {money}")
    if ranking.lower > 0:
        return Verdict(
            "ranks", f"The model ranks trades better than its baselines, but its numbers are no more accurate. {money}"
        )
    if accuracy.lower > 0:
        return Verdict("ranks", f"The model is more accurate than its baselines, but ranks trades no better. {money}")
    return Verdict("none", f"The model is not better than its baselines. {money}")


def _notes(days: int) -> tuple[str, ...]:
    blocks = days / MEAN_BLOCK_DAYS
    if blocks < 2:
        return (f"The span of {days} days is shorter than two blocks of {MEAN_BLOCK_DAYS} days: no intervals.",)
    if blocks < 20:
        return (f"The span of {days} days holds about {blocks:.0f} independent blocks: the intervals are rough.",)
    return ()


def _rng(seed: int) -> np.random.Generator:
    """A fresh generator, so that every score of a span sees the same drawn days."""
    return np.random.default_rng(seed)
