"""A model on its test span, as somebody who has to trade it would judge it: its account beside everybody else's.

The predictions are those that were stored when it was trained; nothing here runs the network, but for bars that a
champion has not seen yet. Every judgement is a look at the test span, and is counted as one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime

import numpy as np

from perpcast.backtest import MarketPanel, Terms, backtest
from perpcast.bundle import load_bundle, read_card
from perpcast.config import Settings
from perpcast.database import (
    Database,
    ModelRecord,
    count_looks,
    read_candles,
    read_champion,
    read_funding_rates,
    read_instruments,
    read_model,
    read_predictions,
    record_look,
)
from perpcast.errors import MissingInputError
from perpcast.evaluation.certificate import check_certificate
from perpcast.evaluation.performance import daily_returns
from perpcast.evaluation.portfolio import Portfolio, evaluate_portfolio, paired_gain, score_grid
from perpcast.evaluation.scores import Score
from perpcast.evaluation.splits import Span, TimeSplit
from perpcast.exit_policy import ExitPolicy
from perpcast.market import SIDES
from perpcast.sizing import Sizing
from perpcast.task import Task
from perpcast.timeframe import interval_ms
from perpcast.training.dataset import Dataset, load_dataset
from perpcast.training.outcome import Outcome, read_outcome
from perpcast.training.promotion import Comparison, Evidence

# Windows that a champion is asked about at once.
_ASKED_WINDOWS = 2048


@dataclass(frozen=True)
class Judgement:
    """What a model did on its test span, and how often anybody has looked at any part of that span, now included."""

    model: ModelRecord
    dataset: Dataset
    outcome: Outcome
    portfolio: Portfolio
    looks: int


def judge_model(
    settings: Settings,
    database: Database,
    model_id: str,
    *,
    purpose: str,
    now: datetime,
    outcome: Outcome | None = None,
) -> Judgement:
    """Scores and trades a model's stored predictions; leaves an event of the look. `purpose` says what it was for.

    `outcome` are the scores where they are at hand.
    """
    return _judge(
        settings, database, model_id, outcome, lambda dataset: look(database, dataset, model_id, purpose, now)
    )


def _judge(
    settings: Settings, database: Database, model_id: str, outcome: Outcome | None, count: Callable[[Dataset], int]
) -> Judgement:
    """`count` says how often the dataset's test span was looked at, this time included."""
    model = read_model(database, model_id)
    dataset = load_dataset(settings.path("datasets", model.dataset_id))
    outcome = outcome or read_outcome(database, dataset, model_id, settings.model.seed)
    looks = count(dataset)
    return Judgement(model, dataset, outcome, trade(settings, database, dataset, outcome, looks), looks)


def look(database: Database, dataset: Dataset, model_id: str, purpose: str, now: datetime) -> int:
    """Leaves an event of a look at the dataset's test span; returns how often it was looked at so far."""
    span = dataset.split.test
    record_look(database, dataset.fingerprint, span.first_ms, span.last_ms, model_id, purpose, now)
    return count_looks(database, span.first_ms, span.last_ms)


def trade(settings: Settings, database: Database, dataset: Dataset, outcome: Outcome, trials: int) -> Portfolio:
    """What trading the test span's predictions would have earned, the model's and each baseline's.

    `trials` is the number of tries that the deflated Sharpe ratio makes up for.
    """
    windows = dataset.windows("test")
    market = read_market(database, dataset, dataset.split.test)
    model: dict[str, np.ndarray] = {side: outcome.evaluation.predicted[f"{side}_mean"] for side in SIDES}
    forecasts: dict[str, Mapping[str, np.ndarray]] = {"model": model, **outcome.baselines}
    return evaluate_portfolio(
        market,
        {name: score_grid(windows, predicted, market) for name, predicted in forecasts.items()},
        read_instruments(database),
        trading_terms(settings, dataset, outcome.choice.threshold),
        trials=trials,
        seed=settings.model.seed,
        thresholds=outcome.thresholds,
    )


def trading_terms(settings: Settings, dataset: Dataset, threshold: float) -> Terms:
    """The configuration's capital and limits, with the exit policies that the labels were made by."""
    capital = settings.capital
    policies = {side: ExitPolicy(**dataset.task.exit_policies[side]) for side in SIDES}
    fractions = [fraction for _, fraction in policies["buy"].targets]
    return Terms(
        threshold=threshold,
        policies=policies,
        sizing=Sizing.from_config(capital.per_trade_percentage, settings.risk_profile.leverage, fractions),
        max_positions=capital.max_positions,
        max_drawdown=capital.max_drawdown_percentage / 100,
        initial=capital.initial,
    )


def read_market(database: Database, dataset: Dataset, span: Span) -> MarketPanel:
    """Candles and funding of the dataset's symbols over a span of signal bars, and on to the end of the last label."""
    step_ms = interval_ms(dataset.task.interval)
    end_ms = span.last_ms + (dataset.task.horizon + 2) * step_ms
    candles, funding = {}, {}
    for symbol in dataset.task.symbols:
        candles[symbol] = read_candles(database, symbol, span.first_ms, end_ms)
        rates = read_funding_rates(database, symbol, span.first_ms, end_ms)
        funding[symbol] = (
            np.array([rate.funding_time_ms for rate in rates], np.int64),
            np.array([rate.rate for rate in rates], np.float64),
        )
    return MarketPanel.build(dataset.task.symbols, candles, funding, span.first_ms, end_ms - step_ms, step_ms)


def gather_evidence(
    settings: Settings, database: Database, model_id: str, judgement: Judgement | None = None
) -> Evidence:
    """Everything that `promotion.promote` wants to know of a model; `promote` itself counts the look.

    `judgement` is the model's, where it is at hand: else its baselines are fitted and all are traded here.
    """

    def count(dataset: Dataset) -> int:
        return count_looks(database, dataset.split.test.first_ms, dataset.split.test.last_ms) + 1

    judged = judgement or _judge(settings, database, model_id, None, count)
    model, span = judged.model, judged.dataset.split.test
    try:
        check_certificate(read_card(settings.path(model.bundle_path)), f"model {model_id}")
        missing = ""
    except MissingInputError as error:
        missing = str(error)
    champion = read_champion(database, model.task_kind)
    return Evidence(
        certificate_passed=not missing,
        certificate_detail=missing,
        test_span=span,
        gain_over_best_baseline=Comparison(
            judged.portfolio.best_baseline, judged.portfolio.gains["best"], span, made_until_ms(settings, model)
        ),
        gain_over_champion=None
        if champion is None or champion.model_id == model_id
        else _over_champion(settings, database, champion, judged),
    )


def made_until_ms(settings: Settings, model: ModelRecord) -> int:
    """The last bar that anything of a model was made of: labels of V2 reach `horizon` + 1 bars beyond its end."""
    split = TimeSplit.from_json(read_card(settings.path(model.bundle_path))["dataset"]["split"])
    task = Task.from_json(model.task)
    return split.v2.last_ms + (task.horizon + 1) * interval_ms(task.interval)


def _over_champion(settings: Settings, database: Database, champion: ModelRecord, judgement: Judgement) -> Comparison:
    """Both traded, each by its own threshold, on the candidate's test windows that are newer than both."""
    model, dataset, outcome = judgement.model, judgement.dataset, judgement.outcome
    until_ms = max(made_until_ms(settings, model), made_until_ms(settings, champion))
    test = dataset.split.test
    span = Span(max(test.first_ms, until_ms + interval_ms(dataset.task.interval)), test.last_ms)
    windows = dataset.windows("test")
    newer = np.flatnonzero(span.contains(windows.open_time_ms))
    if not len(newer):
        return Comparison(champion.model_id, Score(np.nan), test, until_ms)  # which `promote` refuses
    theirs, threshold = _champion_predictions(settings, database, champion, dataset, dataset.index["test"][newer])
    ours: dict[str, np.ndarray] = {side: outcome.evaluation.predicted[f"{side}_mean"][newer] for side in SIDES}
    market, instruments = read_market(database, dataset, span), read_instruments(database)

    def daily(predicted: Mapping[str, np.ndarray], threshold: float) -> np.ndarray:
        terms = trading_terms(settings, dataset, threshold)
        account = backtest(market, score_grid(windows[newer], predicted, market), instruments, terms)
        return daily_returns(account.equity, account.open_time_ms, account.initial)[1]

    gain = paired_gain(daily(ours, outcome.choice.threshold), daily(theirs, threshold), settings.model.seed)
    return Comparison(champion.model_id, gain, span, until_ms)


def _champion_predictions(
    settings: Settings, database: Database, champion: ModelRecord, dataset: Dataset, rows: np.ndarray
) -> tuple[dict[str, np.ndarray], float]:
    """The champion's expected returns by side at these rows, NaN for symbols that it does not know, and its threshold.

    What it once said is stored; the rest it is asked now. Raises MissingInputError where it reads other inputs.
    """
    bundle = load_bundle(settings.path(champion.bundle_path))
    names = tuple(f"{side}_mean" for side in SIDES)
    found = {name: np.full(len(rows), np.nan) for name in names}
    for code, symbol in enumerate(dataset.task.symbols):
        own = np.flatnonzero(dataset.symbol[rows] == code)
        times, outputs = read_predictions(database, champion.model_id, symbol, names)
        _, mine, stored = np.intersect1d(dataset.open_time_ms[rows[own]], times, return_indices=True)
        for name in names:
            found[name][own[mine]] = outputs[name][stored]
    known = np.isin(dataset.symbol[rows], [n for n, s in enumerate(dataset.task.symbols) if s in bundle.task.symbols])
    missing = np.flatnonzero(np.isnan(found[names[0]]) & known)
    read = (bundle.task.observed, bundle.task.known, bundle.task.lookback)
    if len(missing) and read != (dataset.task.observed, dataset.task.known, dataset.task.lookback):
        raise MissingInputError(
            f"the champion {champion.model_id} reads other inputs than {dataset.dataset_id} holds, and its predictions "
            "of these bars are not stored: retire it with model_registry.py, then promote again"
        )
    for part in np.array_split(missing, max(1, len(missing) // _ASKED_WINDOWS)):
        if len(part):
            symbols = [dataset.task.symbols[code] for code in dataset.symbol[rows[part]]]
            outputs = bundle.predict(*dataset.gather(rows[part]), symbols)
            for name in names:
                found[name][part] = outputs[name]
    return {side: found[f"{side}_mean"] for side in SIDES}, bundle.threshold
