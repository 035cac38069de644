"""The report of a model, put together: its judgement, what it looks at, and what the database knows of its candles."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from perpcast.bundle import load_bundle, read_card
from perpcast.config import Settings
from perpcast.database import Database, read_candle_spans, read_flat_runs
from perpcast.evaluation.certificate import Certificate
from perpcast.evaluation.performance import Performance
from perpcast.evaluation.portfolio import Portfolio
from perpcast.evaluation.report import (
    Coverage,
    PaperSession,
    ReportExplanation,
    RunReport,
    Stage,
    money_sentence,
    write_report,
)
from perpcast.timeframe import interval_ms
from perpcast.training.card import profit_rows, profit_titles, score_rows
from perpcast.training.dataset import spread
from perpcast.training.judgement import Judgement

# Of the test span: enough for a mean, and some seconds of work.
EXPLAINED_WINDOWS = 256


def report_of(
    settings: Settings,
    database: Database,
    judgement: Judgement,
    *,
    market: str,
    reproduce: str,
    stages: tuple[Stage, ...] = (),
    paper: PaperSession | None = None,
) -> RunReport:
    """What the page of a judged model shows. `market` says what its numbers come from, `reproduce` how to get them."""
    model, dataset, outcome = judgement.model, judgement.dataset, judgement.outcome
    card = read_card(settings.path(model.bundle_path))
    return RunReport(
        title=f"Perpcast {model.model_id}",
        market=market,
        evaluation=outcome.evaluation,
        choice=outcome.choice,
        history=model.metrics["history"],
        stages=stages,
        facts={
            "model": model.model_id,
            "state": model.state,
            "dataset": model.dataset_id,
            "fingerprint": model.dataset_fingerprint,
            "code revision": model.code_revision or "unknown",
            **{f"{name} span": line for name, line in _instants(dataset.manifest["instants"]).items()},
        },
        reproduce=reproduce,
        paper=paper,
        portfolio=judgement.portfolio,
        certificate=_certificate(card),
        explanation=_explanation(settings, judgement),
        quality=_coverage(database, dataset.task.symbols, interval_ms(dataset.task.interval)),
        looks=judgement.looks,
        universe_as_of=dataset.manifest["universe_as_of"],
    )


def write_page(
    settings: Settings,
    database: Database,
    judgement: Judgement,
    *,
    market: str | None = None,
    stages: tuple[Stage, ...] = (),
    paper: PaperSession | None = None,
) -> Path:
    """Writes reports/<model id>/; returns the page's path. `market` is as in `report_of`, by default from settings."""
    model_id = judgement.model.model_id
    report = report_of(
        settings,
        database,
        judgement,
        market=market or market_of(settings),
        reproduce=f"python evaluate_model.py --model {model_id}",
        stages=stages,
        paper=paper,
    )
    return write_report(report, settings.path("reports", model_id))


def tables(judgement: Judgement) -> list[tuple[list[str], list[list[str]]]]:
    """Titles and rows of what a terminal shows: scores, probabilities of a classifier, accounts."""
    evaluation = judgement.outcome.evaluation
    found = [(["test span", *(card.name for card in evaluation.cards)], score_rows(judgement.outcome))]
    if evaluation.profits:
        found.append((profit_titles(judgement.outcome), profit_rows(judgement.outcome)))
    return [*found, account_rows(judgement.portfolio)]


def _instants(instants: Mapping[str, Any]) -> dict[str, str]:
    return {name: f"{first} to {last}" for name, (first, last) in instants.items()}


def _certificate(card: Mapping[str, Any]) -> Certificate | None:
    """The card's, None where it is of a time before there were any."""
    try:
        return Certificate.from_json(card["leak_certificate"])
    except (KeyError, TypeError):
        return None


def _explanation(settings: Settings, judgement: Judgement) -> ReportExplanation:
    dataset = judgement.dataset
    bundle = load_bundle(settings.path(judgement.model.bundle_path))
    rows = spread(dataset.index["test"], min(EXPLAINED_WINDOWS, len(dataset.index["test"])))
    symbols = [dataset.task.symbols[code] for code in dataset.symbol[rows]]
    selection, attention = bundle.explain(*dataset.gather(rows), symbols)
    weights = selection.mean(axis=(0, 1), dtype=np.float64)
    names = (*dataset.task.observed, *dataset.task.known)
    return ReportExplanation(dict(zip(names, weights.tolist(), strict=True)), attention.mean(axis=0, dtype=np.float64))


def _coverage(database: Database, symbols: tuple[str, ...], step_ms: int) -> dict[str, Coverage]:
    spans, flat = read_candle_spans(database), read_flat_runs(database)
    found = {}
    for symbol in symbols:
        if (span := spans.get(symbol)) is not None:
            whole = (span.last_ms - span.first_ms) // step_ms + 1
            standing = sum((last - first) // step_ms + 1 for first, last in flat.get(symbol, ()))
            found[symbol] = Coverage(span.count, whole - span.count, standing)
    return found


def market_of(settings: Settings) -> str:
    """What a report's numbers come from, in a sentence."""
    if settings.exchange.environment == "local":
        return "The local exchange: recorded or synthetic candles."
    chosen = settings.data_download.universe_as_of
    return f"Bybit {settings.exchange.environment}, survivor-biased: symbols chosen on {chosen}."


def verdict_of(judgement: Judgement) -> str:
    """What to believe of the scores, what trading came to, and how often the span was looked at."""
    times = "once" if judgement.looks == 1 else f"{judgement.looks} times"
    verdict = judgement.outcome.evaluation.verdict.sentence
    return f"{verdict} {money_sentence(judgement.portfolio)} This test span was looked at {times}."


def account_rows(portfolio: Portfolio) -> tuple[list[str], list[list[str]]]:
    """Titles and rows of the accounts, the model's first; then what changes in it where the market is unkinder."""
    titles = ["account", "net return", "trades", "won", "profit factor", "Sharpe", "drawdown"]
    lines = (portfolio.model, *portfolio.baselines.values(), portfolio.always_on, portfolio.buy_and_hold)
    rows = [_account_row(line.name, line.performance) for line in lines]
    rows += [
        _account_row(f"slippage {slippage * 10_000:.0f} bp", performance)
        for slippage, performance in portfolio.slippage.items()
    ]
    rows.append(_account_row("stops slide", portfolio.stress))
    return titles, rows


def _account_row(name: str, performance: Performance) -> list[str]:
    numbers = (
        (performance.total_return, "+.1%"),
        (performance.trades, ",.0f"),
        (performance.win_rate, ".0%"),
        (performance.profit_factor, ".2f"),
        (performance.sharpe, "+.1f"),
        (performance.max_drawdown, ".1%"),
    )
    return [name, *(f"{value:{form}}" if np.isfinite(value) else "-" for value, form in numbers)]
