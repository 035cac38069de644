"""A small world with everything a report can show: drawn candles, forecasts of their labels, and what came of them."""

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from perpcast.evaluation.certificate import (
    CERTIFICATE_VERSION,
    DATASET_CHECKS,
    MODEL_CHECKS,
    Certificate,
    Check,
    NullScore,
)
from perpcast.evaluation.portfolio import Portfolio, evaluate_portfolio, score_grid
from perpcast.evaluation.report import (
    Coverage,
    PaperSession,
    PaperTrade,
    ReportExplanation,
    RunReport,
    Stage,
)
from perpcast.evaluation.scores import REGIMES, Evaluation, evaluate
from perpcast.evaluation.threshold import ThresholdChoice, choose_threshold
from perpcast.evaluation.windows import Windows
from perpcast.exit_policy import label_sides
from perpcast.market import SIDES
from perpcast.timeframe import DAY_MS
from tests.live_world import STEP
from tests.test_backtest import INSTRUMENTS, SYMBOLS, TERMS, random_panel

BARS = 96 * 16  # 16 days, enough for intervals
MARKET = random_panel(11, BARS, funded=True)
QUANTILES = (0.5, 0.75, 0.9)
TRAINING_MEAN = -0.001


def labelled_windows() -> Windows:
    """Every bar of every symbol of MARKET that has labels."""
    found = []
    for symbol in range(len(SYMBOLS)):
        prices = MARKET.open[symbol], MARKET.high[symbol], MARKET.low[symbol], MARKET.close[symbol]
        labels = label_sides(*prices, TERMS.policies, ambiguous=False)
        rows = np.flatnonzero(np.isfinite([labels[side].expected_return for side in SIDES]).all(axis=0))
        found.append((rows, [labels[side] for side in SIDES]))
    return Windows(
        SYMBOLS,
        np.repeat(np.arange(len(SYMBOLS)), [len(rows) for rows, _ in found]),
        np.concatenate([MARKET.open_time_ms[rows] for rows, _ in found]),
        {side: np.concatenate([of[n].expected_return[rows] for rows, of in found]) for n, side in enumerate(SIDES)},
        {side: np.concatenate([of[n].bars_held[rows] for rows, of in found]) for n, side in enumerate(SIDES)},
        STEP,
    )


def forecast(windows: Windows, skill: float, seed: int) -> dict[str, np.ndarray]:
    """By side, `skill` of the label and the rest noise of its size; with no skill at all, nothing is hoped for."""
    rng = np.random.default_rng(seed)
    return {
        side: skill * label + (1 - skill) * rng.normal(TRAINING_MEAN, np.std(label), len(label))
        for side, label in windows.realised.items()
    }


def scored(windows: Windows, model: Mapping[str, np.ndarray]) -> tuple[Evaluation, ThresholdChoice]:
    """The model beside a constant and a weak forecast; its threshold is chosen on the same windows, which is a lie."""
    choice = choose_threshold(model, windows)
    outputs = {f"{side}_mean": values for side, values in model.items()}
    for side, label in windows.realised.items():
        outputs |= {f"{side}_q{round(q * 100)}": np.full(len(label), np.quantile(label, q)) for q in QUANTILES}
    regime = windows.open_time_ms // DAY_MS % len(REGIMES)
    found = evaluate(windows, outputs, baselines(windows), choice.threshold, seed=7, quantiles=QUANTILES, regime=regime)
    return found, choice


def baselines(windows: Windows) -> dict[str, dict[str, np.ndarray]]:
    constant: dict[str, np.ndarray] = {side: np.full(len(windows), TRAINING_MEAN) for side in SIDES}
    return {"constant": constant, "ridge": forecast(windows, 0.02, seed=2)}


def report(skill: float = 0.3) -> RunReport:
    """A run without any of the parts that a run may lack."""
    windows = labelled_windows()
    evaluation, choice = scored(windows, forecast(windows, skill, seed=1))
    return RunReport(
        title="A run",
        market="Synthetic market with a planted edge <5 %>",
        evaluation=evaluation,
        choice=choice,
        history={"loss": [1.0, 0.5], "val_loss": [0.9, 0.8]},
        stages=(Stage("download", 1.25, 1000), Stage("prepare", 0.0, skipped=True)),
        facts={"model": "m1"},
        reproduce="make demo",
    )


def whole_report() -> RunReport:
    """A run with every part."""
    run = report()
    return replace(
        run,
        portfolio=portfolio(run.evaluation),
        certificate=certificate(passed=True),
        explanation=ReportExplanation(
            {f"input_{number}": (number + 1) / 465 for number in range(30)}, np.arange(1, 61) / 1830
        ),
        quality={f"COIN{number}USDT": Coverage(1000, 10 * number, number) for number in range(20)},
        looks=3,
        universe_as_of="2025-06-28",
        paper=session(),
    )


def portfolio(evaluation: Evaluation) -> Portfolio:
    """What trading the model and its baselines on MARKET comes to."""
    windows = evaluation.windows
    model: dict[str, np.ndarray] = {side: evaluation.predicted[f"{side}_mean"] for side in SIDES}
    forecasts: dict[str, Mapping[str, np.ndarray]] = {"model": model, **baselines(windows)}
    scores = {name: score_grid(windows, values, MARKET) for name, values in forecasts.items()}
    terms = replace(TERMS, threshold=evaluation.threshold)
    return evaluate_portfolio(MARKET, scores, INSTRUMENTS, terms, trials=3, seed=5, random_runs=4)


def certificate(passed: bool) -> Certificate:
    """One of a model, whose last check passed or failed."""
    names = (*DATASET_CHECKS, *MODEL_CHECKS)
    checks = tuple(Check(name, passed or name != names[-1], f"what was found of {name}") for name in names)
    return Certificate(CERTIFICATE_VERSION, "f" * 64, checks, NullScore((30, 31, 32), (-0.02, 0.0, 0.01), 0.1))


def session() -> PaperSession:
    """Five bars, one trade closed, one open."""
    trade = PaperTrade("AUSDT", "buy", 0, 900_000, "take_profit", 0.021, 4.2)
    return PaperSession(np.arange(5) * 900_000, np.array([1e4, 1e4, 10_003.0, 9_999.0, 10_004.2]), 1e4, (trade,), 1)
