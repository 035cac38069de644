"""The report page: one self-contained HTML file, its pictures beside it as PNG, its numbers as JSON.

Everything on the page is handed in; the page measures nothing and knows no clock.
"""

import base64
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from matplotlib.figure import Figure

from perpcast.evaluation import plots, trading_plots
from perpcast.evaluation.certificate import Certificate
from perpcast.evaluation.performance import drawdown
from perpcast.evaluation.portfolio import Line, Portfolio
from perpcast.evaluation.scores import METRICS, PROFIT_METRICS, Evaluation, Score, daily_rank_ic
from perpcast.evaluation.threshold import ThresholdChoice
from perpcast.market import SIDES
from perpcast.timeframe import DAY_MS, format_time

# What the user expected to see (DESIGN 9); measured figures stand beside it, whatever they are.
EXPECTED = {"direction": "55 to 65 %", "mae": "1.5 to 2.5 %", "win_rate": "30 to 40 %"}

SLICES = {"symbol": "Scores by symbol", "month": "Scores by month", "regime": "Scores by volatility"}
STRONGEST_INPUTS = 20
LEAST_COVERED = 8  # symbols that the page shows at once; the others can be unfolded
DASH, PERCENT = "\N{EN DASH}", "\N{NO-BREAK SPACE}%"


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
class ReportExplanation:
    """What the network looked at, means over some windows: weight by variable, attention on each bar, oldest first."""

    importance: Mapping[str, float]
    attention: np.ndarray  # [lookback], sums to 1


@dataclass(frozen=True)
class Coverage:
    """What is stored of one symbol: bars, those missing between the first and the last, those flat without volume."""

    bars: int
    missing: int
    flat: int

    @property
    def share(self) -> float:
        """Share of the bars between the first and the last that can be used."""
        whole = self.bars + self.missing
        return (self.bars - self.flat) / whole if whole else 0.0


@dataclass(frozen=True)
class RunReport:
    """What one run has to show. `market` is the page's first line: what these numbers come from."""

    title: str
    market: str
    evaluation: Evaluation
    choice: ThresholdChoice
    history: Mapping[str, Sequence[float]]
    stages: tuple[Stage, ...]
    facts: Mapping[str, str]  # model id, dataset, fingerprint, revision …
    reproduce: str  # the command
    paper: PaperSession | None = None
    portfolio: Portfolio | None = None
    certificate: Certificate | None = None
    explanation: ReportExplanation | None = None
    quality: Mapping[str, Coverage] | None = None  # by symbol
    looks: int | None = None  # at this test span so far, this one included
    universe_as_of: str | None = None  # the date on which the symbols were chosen


def write_report(report: RunReport, folder: Path) -> Path:
    """Writes `index.html`, the pictures and `report.json` into `folder`; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {name: plots.save_figure(figure, folder / f"{name}.png") for name, figure in figures_of(report).items()}
    filters: dict[str, Callable[..., str]] = {
        "time": format_time,
        "score": _score_text,
        "interval": _interval_text,
        "percent": percent_text,
        "range": range_text,
        "chance": chance_text,
        "number": number_text,
    }
    page = render_page(
        "report.html",
        filters,
        report=report,
        evaluation=report.evaluation,
        cards=report.evaluation.cards,
        portfolio=report.portfolio,
        level=verdict_level(report),
        money=None if report.portfolio is None else money_sentence(report.portfolio),
        metrics=METRICS,
        profit_metrics=PROFIT_METRICS,
        expected=EXPECTED,
        tiles=_tiles(report),
        quality=sorted((report.quality or {}).items(), key=lambda item: item[1].share),
        shown=LEAST_COVERED,
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


def money_sentence(portfolio: Portfolio) -> str:
    """What trading on the forecasts came to, beside the best baseline: the second half of the verdict."""
    account, best = portfolio.model.performance, portfolio.best_baseline
    if not account.trades and not account.open_trades:
        return f"Traded for {account.days} days, it took no trade."
    doing = "made" if account.total_return > 0 else "lost"
    gain, theirs = portfolio.gains["best"], portfolio.baselines[best].performance.total_return
    if not np.isfinite(gain.lower):
        beside = "too few days to compare it with"
    elif gain.lower > 0:
        beside = "clearly more than"
    else:
        beside = "clearly less than" if gain.upper < 0 else "not clearly different from"
    return (
        f"Traded for {account.days} days, it {doing} {percent_text(abs(account.total_return))} after fees, slippage "
        f"and funding: {beside} its best baseline ({best}, {percent_text(theirs, signed=True)})."
    )


def verdict_level(report: RunReport) -> str:
    """The colour of the verdict: an edge in the forecast that the account does not show is not yet good news."""
    level = report.evaluation.verdict.level
    earned = report.portfolio is None or report.portfolio.gains["best"].lower > 0
    return level if earned or level != "better" else "ranks"


def figures_of(report: RunReport) -> dict[str, Figure]:
    """Every picture by the name of its file."""
    evaluation, portfolio = report.evaluation, report.portfolio
    figures = {
        "score_intervals": plots.score_intervals(evaluation),
        "rank_ic_days": plots.rank_ic_days(evaluation),
        "expected_against_realised": plots.expected_against_realised(
            evaluation.deciles, "Test span; where both agree is dashed. Bars: 95 % intervals of what was realised"
        ),
        "threshold_curve": plots.threshold_curve(report.choice, evaluation.model.scores["trade_return"]),
        "training_curve": plots.training_curve(report.history),
        "symbol_heat_map": plots.symbol_heat_map(*_trades(report)),
    }
    if portfolio is None:
        figures["equity_of_decisions"] = plots.equity_of_decisions(evaluation)
    else:
        figures |= {
            "equity": trading_plots.equity_curve(portfolio, trading_plots.PAGE_WIDTH),
            "equity_narrow": trading_plots.equity_curve(portfolio),
            "exit_reasons": trading_plots.exit_reasons(portfolio.model),
            "gain_intervals": trading_plots.gain_intervals(portfolio),
        }
    if evaluation.quantiles:
        figures["quantile_calibration"] = plots.quantile_calibration(evaluation.quantiles)
    if evaluation.profits:
        figures["profit_calibration"] = plots.profit_calibration(evaluation.profits)
    for name, slices in evaluation.slices.items():
        figures[f"{name}_scores"] = plots.slice_heat_map(SLICES[name], slices)
    if report.explanation is not None:
        names, weights = list(report.explanation.importance), np.array([*report.explanation.importance.values()])
        figures["variable_importance"] = plots.variable_importance(names, weights, strongest=STRONGEST_INPUTS)
        figures["attention_by_lag"] = plots.attention_curve(report.explanation.attention, evaluation.windows.step_ms)
    if report.certificate is not None and report.certificate.null.rank_ic:
        figures["null_scores"] = plots.null_scores(report.certificate.null, evaluation.model.scores["rank_ic"].value)
    if report.paper is not None and len(report.paper.equity):
        figures["paper_equity"] = plots.paper_equity(
            report.paper.open_time_ms, report.paper.equity, report.paper.initial
        )
    return figures


def _trades(report: RunReport) -> tuple[Sequence[str], np.ndarray, np.ndarray, np.ndarray, str]:
    """Symbols, then symbol, entry and result of each trade, and the unit of results: the account's, or equal-sized."""
    if report.portfolio is not None:
        account = report.portfolio.model.backtest
        trades = account.trades[account.trades.closed]
        return account.symbols, trades.symbol, trades.entry_ms, trades.pnl + trades.funding, "USDT"
    windows, equal = report.evaluation.windows, report.evaluation.model.trades
    rows = equal.row
    return (
        windows.symbols,
        windows.symbol[rows],
        windows.open_time_ms[rows],
        equal.earned * 100,
        "Percent of a notional",
    )


def _tiles(report: RunReport) -> list[dict[str, str]]:
    """The numbers a trader looks for first; `tone` colours them."""
    scores = report.evaluation.model.scores
    rank = scores["rank_ic"]
    ranking = _tile("Rank IC by day", _score_text(rank, "rank_ic"), _interval_text(rank, "rank_ic"), _tone(rank))
    if report.portfolio is not None:
        return [*_account_tiles(report.portfolio), ranking]
    earned = scores["trade_return"]
    tiles = [
        _tile(
            "Net return per trade",
            _score_text(earned, "trade_return"),
            _interval_text(earned, "trade_return"),
            _tone(earned),
        ),
        _tile("Trades", f"{scores['trades'].value:,.0f}", f"{_score_text(scores['win_rate'], 'win_rate')} won"),
        ranking,
    ]
    if report.paper is not None and len(report.paper.equity):
        profit = float(report.paper.equity[-1]) - report.paper.initial
        detail = f"{len(report.paper.trades)} trades closed, {report.paper.open_positions} open"
        tiles.append(
            _tile("Paper session", f"{number_text(profit, signed=True)} USDT", detail, _tone(Score(0, profit, profit)))
        )
    return tiles


def _account_tiles(portfolio: Portfolio) -> list[dict[str, str]]:
    account, gain, sure = portfolio.model.performance, portfolio.gains["best"], portfolio.sharpe
    tries = f"{sure.trials} tries" if sure.trials > 1 else "one try"
    return [
        _tile(
            "Net return",
            percent_text(account.total_return, signed=True),
            f"buying and holding: {percent_text(portfolio.buy_and_hold.performance.total_return, signed=True)}",
            "good" if sure.probabilistic > 0.975 else "bad" if sure.probabilistic < 0.025 else "plain",
        ),
        _tile(
            f"Gain a day over {portfolio.best_baseline}",
            percent_text(gain.value, 3, signed=True),
            range_text(gain, 3) or "too few days for an interval",
            _tone(gain),
        ),
        _tile(
            "Sharpe ratio",
            number_text(account.sharpe),
            f"{chance_text(sure.deflated)} sure that it is not luck ({tries})",
        ),
        _tile(
            "Largest drawdown",
            percent_text(account.max_drawdown),
            f"in the market {percent_text(account.exposure, 0)} of the time",
        ),
        _tile(
            "Trades",
            f"{account.trades:,}",
            f"{percent_text(account.win_rate, 0)} won, profit factor {number_text(account.profit_factor)}",
        ),
    ]


def _tile(label: str, value: str, detail: str, tone: str = "plain") -> dict[str, str]:
    return {"label": label, "value": value, "detail": detail, "tone": tone}


def _tone(score: Score) -> str:
    if score.lower > 0:
        return "good"
    return "bad" if score.upper < 0 else "plain"


def percent_text(value: float, digits: int = 1, signed: bool = False) -> str:
    """A fraction in percent; a dash where it is not defined."""
    return number_text(value * 100, digits, signed) + PERCENT if np.isfinite(value) else DASH


def number_text(value: float, digits: int = 2, signed: bool = False) -> str:
    """A number with a true minus sign, and none before a zero; a dash where it is not defined."""
    if not np.isfinite(value):
        return DASH
    return plots.true_minus(f"{value:{'+' if signed else ''},.{digits}f}")


def chance_text(probability: float) -> str:
    """A probability in percent; none is ever sure."""
    if probability > 0.99:
        return f"over 99{PERCENT}"
    return f"under 1{PERCENT}" if probability < 0.01 else percent_text(probability, 0)


def range_text(score: Score, digits: int = 1) -> str:
    """The interval of a fraction in percent, signed; empty where there is none."""
    if not np.isfinite(score.lower):
        return ""
    lower, upper = (percent_text(value, digits, signed=True) for value in (score.lower, score.upper))
    return f"{lower.removesuffix(PERCENT)} to {upper}"


def _score_text(score: Score, metric: str) -> str:
    return _number(score.value, metric)


def _interval_text(score: Score, metric: str) -> str:
    if not np.isfinite(score.lower):
        return ""
    return f"{_number(score.lower, metric).removesuffix(PERCENT)} to {_number(score.upper, metric)}"


def _number(value: float, metric: str) -> str:
    if metric == "trades":
        return number_text(value, 0)
    signed = metric in ("rank_ic", "rank_ic_symbol", "r2", "trade_return")
    if METRICS[metric][1]:
        return percent_text(value, 1 if metric in ("direction", "win_rate") else 2, signed)
    return number_text(value, 3, signed)


def _json(report: RunReport) -> dict[str, Any]:
    """All numbers of the page, and those that its pictures were drawn from; null where one is not defined."""
    paper, portfolio, certificate = report.paper, report.portfolio, report.certificate
    return _plain(
        {
            "title": report.title,
            "market": report.market,
            "universe_as_of": report.universe_as_of,
            "verdict": [
                report.evaluation.verdict.sentence,
                *([] if portfolio is None else [money_sentence(portfolio)]),
            ],
            "looks": report.looks,
            "facts": report.facts,
            "evaluation": report.evaluation.to_json(),
            "portfolio": None if portfolio is None else portfolio.to_json(),
            "threshold": report.choice.to_json(),
            "certificate": None if certificate is None else certificate.to_json(),
            "explanation": None if report.explanation is None else asdict(report.explanation),
            "quality": {
                symbol: {**asdict(found), "share": found.share} for symbol, found in (report.quality or {}).items()
            },
            "history": report.history,
            "stages": [asdict(stage) for stage in report.stages],
            "paper": None
            if paper is None
            else {
                "initial": paper.initial,
                "final": float(paper.equity[-1]) if len(paper.equity) else paper.initial,
                "trades": len(paper.trades),
                "open_positions": paper.open_positions,
            },
            "series": _series(report),
            "reproduce": report.reproduce,
        }
    )


def _series(report: RunReport) -> dict[str, Any]:
    """What the pictures show and no table holds: values by UTC day, sums by symbol and time."""
    evaluation, portfolio = report.evaluation, report.portfolio
    mean: dict[str, np.ndarray] = {side: evaluation.predicted[f"{side}_mean"] for side in SIDES}
    rank_ic = daily_rank_ic(evaluation.windows, mean)
    earned = plots.earned_by_symbol(*_trades(report)[:4])
    series = {
        "rank_ic_by_day": dict(zip(map(_day, rank_ic.index.tolist()), rank_ic.tolist(), strict=True)),
        "earned_by_symbol": {"unit": _trades(report)[4], **{name: dict(row) for name, row in earned.iterrows()}},
    }
    if portfolio is not None:
        lines = (portfolio.model, *portfolio.baselines.values(), portfolio.buy_and_hold, portfolio.always_on)
        series["net_return_by_day"] = {line.name: _returns(line) for line in lines}
        series["drawdown_by_day"] = _drawdowns(portfolio.model)
    return series


def _returns(line: Line) -> dict[str, float]:
    so_far = np.cumprod(1 + line.daily_return) - 1
    return dict(zip(map(_day, line.day), so_far, strict=True))


def _drawdowns(line: Line) -> dict[str, float]:
    """The deepest of each day."""
    account = line.backtest
    depth, day = drawdown(account.equity, account.initial), account.open_time_ms // DAY_MS
    firsts = np.flatnonzero(np.diff(day, prepend=-1))
    return dict(zip(map(_day, day[firsts]), np.maximum.reduceat(depth, firsts), strict=True))


def _day(number: int) -> str:
    return format_time(int(number) * DAY_MS)[:10]


def _plain(value: Any) -> Any:
    """The value as JSON can hold it: arrays as lists, numbers that are not defined as None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def write_aside(path: Path, text: str) -> None:
    """Writes a text file; a reader never sees half of it."""
    aside = path.with_suffix(".part")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)
