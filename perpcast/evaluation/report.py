"""The report page: one self-contained HTML file, its pictures beside it as PNG, its numbers as JSON.

Everything on the page is handed in; the page measures nothing and knows no clock.
"""

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from perpcast.evaluation import plots
from perpcast.evaluation.scores import METRICS, Evaluation, Score
from perpcast.evaluation.threshold import ThresholdChoice
from perpcast.timeframe import format_time

# What the user expected to see (DESIGN 9); measured figures stand beside it, whatever they are.
EXPECTED = {"direction": "55 to 65 %", "mae": "1.5 to 2.5 %", "win_rate": "30 to 40 %"}


@dataclass(frozen=True)
class Stage:
    """One line of the pipeline's summary; `rows` None where a stage counts none, `skipped` where it was done before."""

    name: str
    seconds: float
    rows: int | None = None
    skipped: bool = False


@dataclass(frozen=True)
class PaperTrade:
    """One closed paper trade; `earned` in USDT after fees and slippage."""

    symbol: str
    side: str
    entry_time_ms: int
    exit_time_ms: int
    exit_reason: str
    return_fraction: float
    earned: float


@dataclass(frozen=True)
class PaperSession:
    """A paper session: equity at every closed bar in USDT, and its closed trades, oldest first."""

    open_time_ms: np.ndarray
    equity: np.ndarray
    initial: float
    trades: tuple[PaperTrade, ...]
    open_positions: int = 0


@dataclass(frozen=True)
class RunReport:
    """What one run has to show. `market` is the page's first line: what these numbers come from."""

    title: str
    market: str
    evaluation: Evaluation
    choice: ThresholdChoice
    history: Mapping[str, Sequence[float]]
    stages: tuple[Stage, ...]
    facts: Mapping[str, str]  # model id, dataset, fingerprint, revision, universe_as_of …
    reproduce: str  # the command
    paper: PaperSession | None = None


def write_report(report: RunReport, folder: Path) -> Path:
    """Writes `index.html`, the pictures and `report.json` into `folder`; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {name: plots.save_figure(figure, folder / f"{name}.png") for name, figure in _figures(report).items()}
    page = render_page(
        "report.html",
        {"time": format_time, "score": _score_text, "interval": _interval_text},
        report=report,
        evaluation=report.evaluation,
        cards=report.evaluation.cards,
        metrics=METRICS,
        expected=EXPECTED,
        tiles=_tiles(report),
        pictures=embedded(pictures),
    )
    write_aside(folder / "report.json", json.dumps(_json(report), indent=2, allow_nan=False))
    write_aside(folder / "index.html", page)
    return folder / "index.html"


def render_page(template: str, filters: Mapping[str, Callable[..., str]], **values: Any) -> str:
    """A page of this room from its template, in the frame and style that all of them share (page.*)."""
    environment = Environment(
        loader=PackageLoader("perpcast", "evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    return environment.get_template(template).render(**values)


def embedded(pictures: Mapping[str, Path]) -> dict[str, str]:
    """The pictures as base64, so that a page is one file."""
    return {name: base64.b64encode(path.read_bytes()).decode() for name, path in pictures.items()}


def _figures(report: RunReport) -> dict[str, Figure]:
    evaluation = report.evaluation
    figures = {
        "equity_of_decisions": plots.equity_of_decisions(evaluation),
        "score_intervals": plots.score_intervals(evaluation),
        "predicted_against_realised": plots.predicted_against_realised(evaluation),
        "rank_ic_days": plots.rank_ic_days(evaluation),
        "symbol_heat_map": plots.symbol_heat_map(evaluation),
        "threshold_curve": plots.threshold_curve(report.choice),
        "training_curve": plots.training_curve(report.history),
    }
    if report.paper is not None and len(report.paper.equity):
        figures["paper_equity"] = plots.paper_equity(
            report.paper.open_time_ms, report.paper.equity, report.paper.initial
        )
    return figures


def _tiles(report: RunReport) -> list[dict[str, str]]:
    """The four numbers a trader looks for first; `tone` colours them."""
    scores = report.evaluation.model.scores
    earned, rank = scores["trade_return"], scores["rank_ic"]
    tiles = [
        {
            "label": "Net return per trade",
            "value": _score_text(earned, "trade_return"),
            "detail": _interval_text(earned, "trade_return"),
            "tone": _tone(earned),
        },
        {
            "label": "Trades, win rate",
            "value": f"{scores['trades'].value:,.0f}",
            "detail": f"{_score_text(scores['win_rate'], 'win_rate')} won",
            "tone": "plain",
        },
        {
            "label": "Rank IC by day",
            "value": _score_text(rank, "rank_ic"),
            "detail": _interval_text(rank, "rank_ic"),
            "tone": _tone(rank),
        },
    ]
    if report.paper is not None and len(report.paper.equity):
        profit = float(report.paper.equity[-1]) - report.paper.initial
        tiles.append(
            {
                "label": "Paper session",
                "value": f"{profit:+,.2f} USDT",
                "detail": f"{len(report.paper.trades)} trades closed, {report.paper.open_positions} open",
                "tone": "good" if profit > 0 else "bad" if profit < 0 else "plain",
            }
        )
    return tiles


def _tone(score: Score) -> str:
    if score.lower > 0:
        return "good"
    return "bad" if score.upper < 0 else "plain"


def _score_text(score: Score, metric: str) -> str:
    return "\N{EN DASH}" if not np.isfinite(score.value) else _number(score.value, metric)


def _interval_text(score: Score, metric: str) -> str:
    if not np.isfinite(score.lower):
        return ""
    return f"{_number(score.lower, metric)} to {_number(score.upper, metric)}"


def _number(value: float, metric: str) -> str:
    if metric == "trades":
        return f"{value:,.0f}"
    signed = "+" if metric in ("rank_ic", "rank_ic_symbol", "r2", "trade_return") else ""
    digits = ".1%" if metric in ("direction", "win_rate") else ".2%" if METRICS[metric][1] else ".3f"
    text = f"{value:{signed}{digits}}"
    if not any(digit in text for digit in "123456789"):
        text = text.lstrip("+-")
    return text.replace("-", "\N{MINUS SIGN}").replace("%", " %")


def _json(report: RunReport) -> dict[str, Any]:
    paper = report.paper
    return {
        "title": report.title,
        "market": report.market,
        "facts": dict(report.facts),
        "evaluation": report.evaluation.to_json(),
        "threshold": report.choice.to_json(),
        "history": {name: [float(v) for v in values] for name, values in report.history.items()},
        "stages": [{"name": s.name, "seconds": s.seconds, "rows": s.rows, "skipped": s.skipped} for s in report.stages],
        "paper": None
        if paper is None
        else {
            "initial": paper.initial,
            "final": float(paper.equity[-1]) if len(paper.equity) else paper.initial,
            "trades": len(paper.trades),
            "open_positions": paper.open_positions,
        },
        "reproduce": report.reproduce,
    }


def write_aside(path: Path, text: str) -> None:
    """Writes a text file; a reader never sees half of it."""
    aside = path.with_suffix(".part")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
