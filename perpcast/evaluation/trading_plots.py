"""The pictures of trading the test span: equity with drawdown, how trades ended, gains over each baseline."""

from collections.abc import Callable, Sequence
from itertools import cycle, pairwise, repeat

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from perpcast.evaluation.performance import drawdown
from perpcast.evaluation.plots import (
    BLUE,
    GREEN,
    INK,
    MUTED,
    RED,
    SIDE_COLOURS,
    WIDTH,
    bare,
    date_axis,
    new_figure,
    percent_axes,
    titles,
    true_minus,
)
from perpcast.evaluation.portfolio import Line, Portfolio
from perpcast.exit_policy import EXIT_REASONS
from perpcast.market import SIDES

PAGE_WIDTH = 10.6  # inches: both halves of a page
_POINTS = 800  # of a curve on an inch there is no place for more than a hundred
_RIVALS = ("#9aa5b1", "#616e7c", "#8a63b8", "#b07d2b", "#4b8b8b")  # baselines, in their order
_MARKET, _ALWAYS = "#323f4b", "#c0747c"


def equity_curve(portfolio: Portfolio, width: float = WIDTH) -> Figure:
    """Net return so far of the model and of all it has to beat, above the model's drawdown at every bar."""
    figure = Figure(figsize=(width, 4.6), layout="constrained")
    titles(
        figure,
        "Net return, and how deep it fell",
        "Test span, after fees, slippage and funding; open positions at their last close. Grey bar: where 90 % of "
        "accounts end that enter as often at random",
    )
    curve, fall = figure.subplots(2, 1, sharex=True, height_ratios=[3.2, 1])
    for axes in (curve, fall):
        bare(axes)
        percent_axes(axes, "y")
    rivals = zip(portfolio.baselines.values(), cycle(_RIVALS), repeat("-"))
    others = ((portfolio.buy_and_hold, _MARKET, ":"), (portfolio.always_on, _ALWAYS, ":"))
    ends = []
    for line, colour, dash in (*rivals, *others, (portfolio.model, BLUE, "-")):
        times, earned = _return_so_far(line)
        own = line is portfolio.model
        curve.plot(times, earned, color=colour, linewidth=2.4 if own else 1.1, linestyle=dash, zorder=5 if own else 3)
        ends.append((float(earned[-1]), line.name, colour))
    curve.axhline(0, color=INK, linewidth=0.8)
    if portfolio.random.runs:
        chance = portfolio.random
        curve.plot(times[[-1, -1]], [chance.lower, chance.upper], color=MUTED, linewidth=7, alpha=0.35)
        ends.append((chance.mean, "random", MUTED))
    _name_ends(curve, ends)
    account = portfolio.model.backtest
    times, low = _thinned(account.open_time_ms, -drawdown(account.equity, account.initial), np.min)
    fall.fill_between(times, low, 0, color=RED, alpha=0.3, linewidth=0)
    fall.plot(times, low, color=RED, linewidth=0.8)
    fall.set_ylabel("drawdown")
    curve.set_ylabel("net return")
    date_axis(fall)
    return figure


def exit_reasons(line: Line) -> Figure:
    """How the trades ended: their number and what they earned together, by exit reason and side."""
    figure = Figure(figsize=(WIDTH, 3.4), layout="constrained")
    titles(figure, "How trades ended", "Closed trades, and what all of them earned together")
    trades = line.backtest.trades[line.backtest.trades.closed]
    count, sums = figure.subplots(1, 2, sharey=True)
    places = np.arange(1, len(EXIT_REASONS))
    for number, side in enumerate(SIDES):
        own = trades[trades.side == number]
        reason, height = own.exit_reason, 0.36
        for axes, weights in ((count, None), (sums, own.pnl + own.funding)):
            values = np.bincount(reason, weights, len(EXIT_REASONS))[1:]
            axes.barh(places + (number - 0.5) * height, values, height, color=SIDE_COLOURS[side], label=side)
    for axes, title in ((count, "trades"), (sums, "USDT")):
        bare(axes)
        axes.grid(visible=False, axis="y")
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_title(title, fontsize=10, color=INK, loc="left")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.locator_params(axis="x", nbins=4)
    count.set_yticks(places, [reason.replace("_", " ") for reason in EXIT_REASONS[1:]])
    count.set_ylim(len(EXIT_REASONS) - 0.4, 0.4)
    sums.legend(frameon=False, fontsize=9, loc="best")
    return figure


def gain_intervals(portfolio: Portfolio) -> Figure:
    """What a day of the model earned more than a day of each baseline, with 95 % intervals of the paired difference."""
    gains = {name: score for name, score in portfolio.gains.items() if name in portfolio.baselines}
    figure, axes = new_figure(
        "Model less baseline, day by day",
        "Daily net return, the same days drawn for both; bars: 95 % intervals",
        height=1.4 + 0.4 * len(gains),
    )
    for place, score in enumerate(gains.values()):
        sure = np.isfinite(score.lower)
        colour = MUTED if not sure or score.lower <= 0 <= score.upper else GREEN if score.lower > 0 else RED
        if sure:
            axes.plot([score.lower, score.upper], [place, place], color=colour, linewidth=6, alpha=0.4)
        axes.scatter([score.value], [place], color=colour, s=46, zorder=4)
    axes.axvline(0, color=INK, linewidth=0.8)
    axes.set_yticks(range(len(gains)), [f"less {name}" for name in gains])
    axes.set_ylim(len(gains) - 0.5, -0.5)
    axes.margins(x=0.12)
    axes.locator_params(axis="x", nbins=6)
    percent_axes(axes, "x")
    axes.set_xlabel("net return a day")
    return figure


def _return_so_far(line: Line) -> tuple[pd.DatetimeIndex, np.ndarray]:
    account = line.backtest
    return _thinned(account.open_time_ms, account.equity / account.initial - 1, lambda part: part[-1])


def _thinned(
    open_time_ms: np.ndarray, values: np.ndarray, of_part: Callable[[np.ndarray], float]
) -> tuple[pd.DatetimeIndex, np.ndarray]:
    """One value for each of at most `_POINTS` parts of the span, at the last bar of each."""
    cuts = np.unique(np.linspace(0, len(values), min(len(values), _POINTS) + 1).round().astype(int))
    parts = [values[first:last] for first, last in pairwise(cuts)]
    return pd.to_datetime(open_time_ms[cuts[1:] - 1], unit="ms"), np.array([of_part(part) for part in parts])


def _name_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Names at the right end of curves, moved apart where they would lie on one another."""
    low, high = axes.get_ylim()
    gap = 0.062 * (high - low)
    ordered = sorted(ends)
    places = [value for value, _, _ in ordered]
    for _ in range(100):
        for at in range(1, len(places)):
            short = gap - (places[at] - places[at - 1])
            if short > 0:
                places[at], places[at - 1] = places[at] + short / 2, places[at - 1] - short / 2
    for place, (value, name, colour) in zip(places, ordered, strict=True):
        words = f"{name} {true_minus(f'{value:+.1%}')}"
        axes.annotate(
            words, (1, place), (4, 0), xycoords=("axes fraction", "data"), textcoords="offset points", va="center",
            fontsize=8.5, color=colour, annotation_clip=False, fontweight="bold" if colour == BLUE else "normal",
        )  # fmt: skip
    axes.set_ylim(min(low, places[0] - gap / 2), max(high, places[-1] + gap / 2))
