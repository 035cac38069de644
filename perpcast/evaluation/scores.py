"""A model's scores beside its baselines' on the same untouched windows, with intervals, and a verdict."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import pandas as pd

from perpcast.evaluation import metrics
from perpcast.evaluation.bootstrap import MEAN_BLOCK_DAYS, confidence_interval, sums_by_day
from perpcast.evaluation.threshold import Trades, take_trades
from perpcast.evaluation.windows import Windows
from perpcast.market import SIDES
from perpcast.timeframe import DAY_MS


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
    baselines: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # the same scores, by name

    def to_json(self) -> dict[str, Any]:
        """None in place of NaN."""
        return {
            "scores": _without_nan(self.scores),
            "base_rate": self.base_rate,
            "base": _without_nan(self.base),
            "calibration": [dict(row) for row in self.calibration],
            "baselines": {name: _without_nan(scores) for name, scores in self.baselines.items()},
        }


@dataclass(frozen=True)
class Verdict:
    """What a reader should believe: `better` than every baseline, in one thing only (`ranks`), or in `none`."""

    level: Literal["better", "ranks", "none"]
    sentence: str


@dataclass(frozen=True)
class Evaluation:
    """The test span's scores. `cards` start with the model; gains are paired, the same days drawn for both."""

    windows: Windows
    predicted: Mapping[str, np.ndarray]  # every output of the model by name
    threshold: float  # the model's
    cards: tuple[Scorecard, ...]
    gains: Mapping[str, Score]  # by GAINS, on the best baseline: the smallest of `gains_over`
    gains_over: Mapping[str, Mapping[str, Score]]  # by baseline
    quantiles: Mapping[str, Mapping[str, float]]
    verdict: Verdict
    days: int
    notes: tuple[str, ...] = field(default=())
    profits: Mapping[str, ProfitScores] = field(default_factory=dict)  # by side, of a classifier
    slices: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)  # by kind, name, SLICE_SCORES
    deciles: Mapping[str, tuple[Mapping[str, float], ...]] = field(default_factory=dict)  # by side, lowest first

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
            "gains_over": {
                baseline: {name: score.to_json() for name, score in gains.items()}
                for baseline, gains in self.gains_over.items()
            },
            "quantiles": {name: dict(values) for name, values in self.quantiles.items()},
            "profits": {side: scores.to_json() for side, scores in self.profits.items()},
            "rank_ic_by_symbol": _without_nan(self.model.by_symbol_ic),
            "slices": {
                kind: {name: _without_nan(scores) for name, scores in parts.items()}
                for kind, parts in self.slices.items()
            },
            "deciles": {side: [_without_nan(row) for row in rows] for side, rows in self.deciles.items()},
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

# What a model wins on a baseline: the share of its squared error that is saved, and rank IC by day.
GAINS = ("squared_error_saved", "rank_ic_won")

# Of a part of the windows: their number, rank IC, errors, and what a trade on the side that the forecast prefers earns.
SLICE_SCORES = ("windows", "rank_ic", "mae", "direction", "side_return")

# Thirds of a symbol's own training windows by volatility.
REGIMES = ("low", "middle", "high")

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
    thresholds: Mapping[str, float] | None = None,
    quantiles: Sequence[float] = (),
    base_rates: Mapping[str, float] | None = None,
    probabilities: Mapping[str, Mapping[str, np.ndarray]] | None = None,
    regime: np.ndarray | None = None,
) -> Evaluation:
    """Scores the model's outputs (`buy_mean`, `buy_q50`, …) and the baselines' (by name and side) on the same windows.

    `threshold`, and the baselines' own by name in `thresholds`, were frozen before these windows were looked at; one
    without its own is traded by the model's. `base_rates`, the training trades' shares of profits by side, are what a
    classifier's probabilities have to beat, with the baselines' `probabilities` by name and side. `regime` is each
    window's index into REGIMES.
    """
    if not len(windows):
        raise ValueError("there are no windows to score")
    if not baselines:
        raise ValueError("a model is scored beside at least one baseline")
    mean: dict[str, np.ndarray] = {side: np.asarray(predicted[f"{side}_mean"], np.float64) for side in SIDES}
    limits = {"model": threshold, **dict.fromkeys(baselines, threshold), **(thresholds or {})}
    tested = {name: _Tested.of(windows, values) for name, values in {"model": mean, **baselines}.items()}
    cards = tuple(_scorecard(name, windows, each, limits[name], seed) for name, each in tested.items())
    gains_over = {name: _gains(tested["model"], tested[name], seed) for name in baselines}
    days = int(windows.day.max() - windows.day.min()) + 1
    return Evaluation(
        windows=windows,
        predicted=predicted,
        threshold=threshold,
        cards=cards,
        gains={name: min((gains[name] for gains in gains_over.values()), key=_value_or_infinity) for name in GAINS},
        gains_over=gains_over,
        quantiles=_quantile_scores(windows, predicted, quantiles),
        verdict=_verdict(cards[0], gains_over),
        days=days,
        notes=_notes(days),
        profits=_profit_scores(windows, predicted, base_rates or {}, probabilities or {}),
        slices=_slices(windows, tested["model"], regime),
        deciles={side: _deciles(windows, side, mean[side], seed) for side in SIDES},
    )


def volatility_regimes(
    volatility: np.ndarray, symbol: np.ndarray, trained_volatility: np.ndarray, trained_symbol: np.ndarray
) -> np.ndarray:
    """Index into REGIMES of each window: int [n]; edges are the thirds of its symbol's own training windows.

    Each symbol by its own: a regime is a state of a market through time, not the kind of coin that it is.
    """
    regime = np.zeros(len(symbol), np.int64)
    for code in np.unique(symbol):
        own = symbol == code
        edges = np.quantile(trained_volatility[trained_symbol == code], [1 / 3, 2 / 3])
        regime[own] = np.searchsorted(edges, volatility[own], side="right")
    return regime


def daily_rank_ic(windows: Windows, predicted: Mapping[str, np.ndarray]) -> pd.Series:
    """Rank IC across symbols by day, the mean of both sides; empty where the forecast never tells symbols apart."""
    sides = [
        metrics.rank_ic_by_day(windows.realised[side], predicted[side], windows.symbol, windows.open_time_ms)
        for side in SIDES
    ]
    return pd.concat(sides, axis=1).mean(axis=1).sort_index()


@dataclass(frozen=True)
class _Tested:
    """One forecast beside what came true: what more than one score is made of."""

    predicted: Mapping[str, np.ndarray]  # by side
    sums: np.ndarray  # by day, the columns above
    rank_ic: pd.Series  # by day number
    rank_ic_by_symbol: pd.Series  # through time, by the symbol's index

    @classmethod
    def of(cls, windows: Windows, predicted: Mapping[str, np.ndarray]) -> "_Tested":
        through_time = [
            metrics.rank_ic_by_symbol(windows.realised[side], predicted[side], windows.symbol) for side in SIDES
        ]
        return cls(
            predicted,
            _error_sums(windows, predicted),
            daily_rank_ic(windows, predicted),
            pd.concat(through_time, axis=1).mean(axis=1),
        )


def _scorecard(name: str, windows: Windows, tested: _Tested, threshold: float, seed: int) -> Scorecard:
    scores = {}
    for metric, statistic in _POOLED.items():
        interval = confidence_interval(tested.sums, statistic, _rng(seed))
        scores[metric] = Score(float(statistic(tested.sums.sum(axis=0))), *interval)
    scores["rank_ic"] = _mean_score(tested.rank_ic.index.to_numpy(), tested.rank_ic.to_numpy(), seed)
    scores["rank_ic_symbol"] = Score(float(tested.rank_ic_by_symbol.mean()))
    trades = take_trades(tested.predicted, windows, threshold)
    day = windows.day[trades.row]
    scores["trades"] = Score(float(len(trades)))
    scores["trade_return"] = _mean_score(day, trades.earned, seed)
    scores["win_rate"] = _mean_score(day, (trades.earned > 0).astype(float), seed)
    return Scorecard(name, {metric: scores[metric] for metric in METRICS}, _named(windows, tested), trades)


def _named(windows: Windows, tested: _Tested) -> dict[str, float]:
    by_symbol = tested.rank_ic_by_symbol
    return {windows.symbols[code]: value for code, value in zip(by_symbol.index.tolist(), by_symbol, strict=True)}


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


def _gains(model: _Tested, baseline: _Tested, seed: int) -> dict[str, Score]:
    """By GAINS, model minus baseline, the same days drawn for both.

    A baseline that ranks nothing, or the wrong way round, has rank IC 0: nobody would follow it.
    """
    pair = np.stack([model.sums[:, _SQUARED], baseline.sums[:, _SQUARED]], axis=1)

    def saved(sums: np.ndarray) -> np.ndarray:
        return 1 - sums[..., 0] / sums[..., 1]

    daily = pd.concat({"model": model.rank_ic, "baseline": baseline.rank_ic}, axis=1).sort_index()
    rival = daily["baseline"].fillna(0) * (daily["baseline"].mean() > 0)
    won = daily["model"].fillna(0) - rival
    return {
        "squared_error_saved": Score(float(saved(pair.sum(axis=0))), *confidence_interval(pair, saved, _rng(seed))),
        "rank_ic_won": _mean_score(won.index.to_numpy(np.int64), won.to_numpy(), seed),
    }


def _value_or_infinity(score: Score) -> float:
    return score.value if np.isfinite(score.value) else np.inf


def _slices(windows: Windows, model: _Tested, regime: np.ndarray | None) -> dict[str, dict[str, dict[str, float]]]:
    """SLICE_SCORES of the model by symbol, by month and, where it is known, by regime."""
    month = windows.open_time_ms.astype("datetime64[ms]").astype("datetime64[M]").astype(np.int64)
    day_month = (model.rank_ic.index.to_numpy() * DAY_MS).astype("datetime64[ms]").astype("datetime64[M]")
    by_month = model.rank_ic.groupby(day_month.astype(np.int64)).mean()
    slices = {
        "symbol": _slice_scores(windows, model, windows.symbol, model.rank_ic_by_symbol),
        "month": _slice_scores(windows, model, month, by_month),
    }
    names: dict[str, Callable[[int], str]] = {
        "symbol": lambda code: windows.symbols[code],
        "month": lambda number: str(np.datetime64(number, "M")),
        "regime": lambda number: REGIMES[number],
    }
    if regime is not None:
        parts = {number: np.flatnonzero(regime == number) for number in np.unique(regime)}
        ranks = {
            number: daily_rank_ic(windows[rows], {side: model.predicted[side][rows] for side in SIDES}).mean()
            for number, rows in parts.items()
        }
        slices["regime"] = _slice_scores(windows, model, regime, pd.Series(ranks))
    return {kind: {names[kind](key): scores for key, scores in found.items()} for kind, found in slices.items()}


def _slice_scores(windows: Windows, model: _Tested, key: np.ndarray, rank_ic: pd.Series) -> dict[int, dict[str, float]]:
    """SLICE_SCORES by key, in its order; `rank_ic` by key, NaN where it is missing."""
    realised, guess = (np.stack([values[side] for side in SIDES]) for values in (windows.realised, model.predicted))
    preferred = np.argmax(guess, axis=0)  # of equals the first: buy before sell
    values = {
        "mae": np.abs(realised - guess).mean(axis=0),
        "direction": ((realised > 0) == (guess > 0)).mean(axis=0),
        "side_return": np.take_along_axis(realised, preferred[None], axis=0)[0],
    }
    groups = pd.DataFrame(values).groupby(key)
    table = groups.mean().assign(windows=groups.size().astype(float), rank_ic=rank_ic)
    rows = table[list(SLICE_SCORES)].to_numpy().tolist()
    return {key: dict(zip(SLICE_SCORES, row, strict=True)) for key, row in zip(table.index.tolist(), rows, strict=True)}


def _deciles(windows: Windows, side: str, predicted: np.ndarray, seed: int) -> tuple[dict[str, float], ...]:
    """Expected beside realised return by decile of the forecast, with the interval of what was realised."""
    rows = []
    place = metrics.quantile_bin(predicted)
    for number in np.unique(place):
        own = place == number
        realised = _mean_score(windows.day[own], windows.realised[side][own], seed)
        means = {"predicted": float(np.mean(predicted[own])), "realised": realised.value}
        rows.append({"count": float(own.sum()), **means, "lower": realised.lower, "upper": realised.upper})
    return tuple(rows)


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
    windows: Windows,
    predicted: Mapping[str, np.ndarray],
    base_rates: Mapping[str, float],
    probabilities: Mapping[str, Mapping[str, np.ndarray]],
) -> dict[str, ProfitScores]:
    found = {}
    for side, base_rate in base_rates.items():
        profit = windows.realised[side] > 0
        probability = np.asarray(predicted[f"{side}_profit_probability"], np.float64)
        scores, base = (_of_probability(profit, each) for each in (probability, np.full(len(profit), base_rate)))
        baselines = {name: _of_probability(profit, by_side[side]) for name, by_side in probabilities.items()}
        calibration = tuple(metrics.calibration_bins(profit, probability))
        found[side] = ProfitScores(scores, base_rate, base, calibration, baselines)
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


def _verdict(model: Scorecard, gains_over: Mapping[str, Mapping[str, Score]]) -> Verdict:
    """An edge is what the intervals show against every baseline; money is the backtest's business.

    Baselines are off by the drift of their training span. A model that is off by less saves squared error on them
    without knowing anything, so accuracy also asks for more than any constant would have had, chosen in hindsight: R2.
    """
    lower = {name: [gains[name].lower for gains in gains_over.values()] for name in GAINS}
    lower["squared_error_saved"].append(model.scores["r2"].lower)
    accurate, ranking = (all(bound > 0 for bound in lower[name]) for name in GAINS)
    if all(np.isnan(bound) for bounds in lower.values() for bound in bounds):
        return Verdict("none", "No edge found: too few days to tell the model from its baselines.")
    if accurate and ranking:
        return Verdict("better", "Edge found: the model beats every baseline, in accuracy and in ranking.")
    if ranking:
        return Verdict(
            "ranks", "Edge in ranking only: the model ranks trades better than every baseline, but is no more accurate."
        )
    if accurate:
        return Verdict(
            "ranks",
            "Edge in accuracy only: the model is more accurate than every baseline, but ranks trades no better.",
        )
    if model.scores["rank_ic"].lower > 0:
        rival = min(gains_over, key=lambda name: gains_over[name]["rank_ic_won"].value)
        return Verdict(
            "none",
            f"No edge of its own: the model ranks trades better than chance, but not better than {rival}, which is "
            "simpler.",
        )
    return Verdict("none", "No edge found: the model is not better than its baselines.")


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
