"""The pictures of a network in training, on a sample of V1: how it learns, how right it is, what it looks at."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from perpcast.evaluation.explanation import Explanation
from perpcast.evaluation.metrics import quantile_coverage
from perpcast.evaluation.plots import (
    BLUE,
    DECILES,
    GRID,
    INK,
    MUTED,
    SIDE_COLOURS,
    bare,
    decile_means,
    new_figure,
    percent_axes,
    predicted_against_realised,
    save_figure,
    titles,
    training_curve,
    variable_importance,
)
from perpcast.evaluation.windows import Windows
from perpcast.market import SIDES

# Bins of the reliability curve, between the lowest and the highest probability; in a bin of less than this share of
# all windows the realised share is chance.
PROBABILITY_BINS = 12
_FEW = 0.01


@dataclass(frozen=True)
class Look:
    """What one look at a network in training sees."""

    epoch: int  # of which the weights are, from 1
    history: Mapping[str, Sequence[float]]  # loss, val_loss and more, one value an epoch
    windows: Windows  # a sample of V1
    predicted: Mapping[str, np.ndarray]  # by the names of task.outputs, each [windows]
    explanation: Explanation
    kind: Literal["regression", "classification"]

    @property
    def span(self) -> str:
        """What the pictures are of, for a subtitle."""
        return f"V1 after epoch {self.epoch}, {len(self.windows):,} windows"


def draw_pictures(folder: Path, look: Look) -> list[Path]:
    """Writes six PNG files into the folder, over those of an earlier look; returns their paths."""
    calibration = regression_calibration if look.kind == "regression" else probability_calibration
    variables, importance = look.explanation.variables, look.explanation.importance()
    figures = {
        "curves": training_curve(look.history),
        "predicted_against_realised": predicted_against_realised(look, look.span),
        "calibration": calibration(look),
        "per_symbol_error": per_symbol_error(look),
        "variable_importance": variable_importance(variables, importance, f"V1 after epoch {look.epoch}"),
        "attention_by_lag": attention_by_lag(look),
    }
    return [save_figure(figure, folder / f"{name}.png") for name, figure in figures.items()]


def regression_calibration(look: Look) -> Figure:
    """Share of outcomes at or below each predicted quantile, and predicted beside realised means by decile."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    titles(
        figure,
        "Do the numbers mean what they say?",
        f"{look.span}. Left: right where the bar meets the dashed line (a bar is high where outcomes equal the "
        "quantile, as stops do). Right: dots on their line are expectations that came true",
    )
    shares, deciles = figure.subplots(1, 2)
    _quantile_shares(shares, look)
    _decile_returns(deciles, look)
    return figure


def _quantile_shares(axes: Axes, look: Look) -> None:
    bare(axes)
    axes.plot([0, 1], [0, 1], color=MUTED, linestyle="--", linewidth=1.2)
    levels = []
    for side, shift in zip(SIDES, (-0.012, 0.012), strict=True):
        for name, predicted in look.predicted.items():
            if match := re.fullmatch(rf"{side}_q(\d+)", name):
                level = int(match[1]) / 100
                below, at_or_below = quantile_coverage(look.windows.realised[side], predicted)
                _share_bar(axes, level + shift, below, at_or_below, SIDE_COLOURS[side])
                levels.append(level)
        axes.plot([], [], color=SIDE_COLOURS[side], linewidth=4, label=side)
    levels = sorted({*levels})
    if levels:
        axes.set_xticks(levels, [f"{level:.0%}" for level in levels])
        axes.set_xlim(max(0, levels[0] - 0.12), min(1, levels[-1] + 0.1))
    axes.set_ylim(0, 1.02)
    percent_axes(axes, "y")
    axes.set_xlabel("predicted quantile")
    axes.set_ylabel("share of outcomes")
    _head(axes, "outcomes below the quantile")


def _share_bar(axes: Axes, place: float, below: float, at_or_below: float, colour: str) -> None:
    """From the share strictly below to the share at or below; their ends are marked, for they may be one."""
    axes.plot([place, place], [below, at_or_below], color=colour, linewidth=4, alpha=0.5, solid_capstyle="butt")
    axes.plot([place, place], [below, at_or_below], color=colour, marker="_", markersize=11, markeredgewidth=2)


def _decile_returns(axes: Axes, look: Look) -> None:
    bare(axes)
    for side in SIDES:
        means = decile_means(look.predicted[f"{side}_mean"], look.windows.realised[side])
        axes.plot(means.index, means["predicted"], color=SIDE_COLOURS[side], linewidth=1.4, linestyle="--", alpha=0.8)
        axes.scatter(means.index, means["realised"], color=SIDE_COLOURS[side], s=30, zorder=4)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.plot([], [], color=INK, linestyle="--", linewidth=1.4, label="predicted")
    axes.scatter([], [], color=INK, s=30, label="realised")
    axes.set_xlim(0.5, DECILES + 0.5)
    axes.set_xticks(range(1, DECILES + 1))
    percent_axes(axes, "y")
    axes.set_xlabel("decile, lowest to highest")
    _head(axes, "return by decile of the prediction")


def _head(axes: Axes, title: str) -> None:
    """Title and legend above the axes, where no point can lie under them."""
    axes.set_title(title, fontsize=10, color=INK, loc="left", pad=24)
    axes.legend(frameon=False, ncols=2, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0, handletextpad=0.4)


def probability_calibration(look: Look) -> Figure:
    """Share of trades that ended in profit by predicted probability, each side, above the number of windows."""
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    titles(
        figure,
        "Does a probability happen as often as it says?",
        f"{look.span}. On the dashed line it does; hollow dots are of few windows",
    )
    curve, counts = figure.subplots(2, 1, sharex=True, height_ratios=[2.6, 1])
    bare(curve)
    bare(counts)
    probability = {side: look.predicted[f"{side}_profit_probability"] for side in SIDES}
    ends = [extreme for values in probability.values() for extreme in (values.min(), values.max())]
    edges = np.linspace(min(ends), max(ends), PROBABILITY_BINS + 1)
    width = edges[1] - edges[0]
    for side, shift in zip(SIDES, (-0.2, 0.2), strict=True):
        colour = SIDE_COLOURS[side]
        number, predicted, happened = reliability(probability[side], look.windows.realised[side] > 0, edges)
        many = number >= _FEW * len(look.windows)
        curve.plot(predicted[many], happened[many], color=colour, marker="o", linewidth=1.6, label=side)
        few = ~many & (number > 0)
        curve.scatter(predicted[few], happened[few], facecolor="white", edgecolor=colour, s=26, linewidth=1.2)
        counts.bar(edges[:-1] + (0.5 + shift) * width, number, 0.4 * width, color=colour)
    curve.plot(edges[[0, -1]], edges[[0, -1]], color=MUTED, linestyle="--", linewidth=1.2, label="as often as it says")
    curve.set_ylabel("share that ended in profit")
    curve.legend(frameon=False)
    counts.set_ylabel("windows")
    counts.set_xlabel("predicted probability of profit")
    counts.yaxis.set_major_locator(MaxNLocator(3))
    counts.yaxis.set_major_formatter("{x:,.0f}")
    percent_axes(curve, "xy")
    return figure


def reliability(
    probability: np.ndarray, happened: np.ndarray, edges: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Windows, mean probability, and share that happened in each bin between `edges`; NaN where a bin is empty."""
    bins = len(edges) - 1
    place = np.clip(np.searchsorted(edges, probability, side="right") - 1, 0, bins - 1)
    number = np.bincount(place, minlength=bins)
    some = np.where(number > 0, number, np.nan)
    predicted, share = (np.bincount(place, values, bins) / some for values in (probability, happened))
    return number, predicted, share


def per_symbol_error(look: Look) -> Figure:
    """Error by symbol beside that of one number for all, and the share of squared error saved by it, each side.

    Returns by their mean output; probabilities by whether the trade ended in profit (the Brier score).
    """
    saved, error, constant = symbol_errors(look)
    order = np.argsort(-np.mean([saved[side] for side in SIDES], axis=0))
    order = order[np.isfinite(error[order])]
    figure = Figure(figsize=(8, 2.1 + 0.19 * len(order)), layout="constrained")
    titles(
        figure,
        "Where the model errs, by symbol",
        f"{look.span}. The rival says one number for all of them, their mean, known in advance; right of the line "
        "the model is better",
    )
    errors, gains = figure.subplots(1, 2, sharey=True, width_ratios=[1, 1.2])
    places = np.arange(len(order))
    bare(errors)
    bare(gains)
    errors.hlines(places, error[order], constant[order], color=GRID, linewidth=3)
    errors.scatter(constant[order], places, color=MUTED, marker="|", s=70, linewidth=2, label="one number for all")
    errors.scatter(error[order], places, color=BLUE, s=24, label="model", zorder=4)
    both = np.array([saved[side][order] for side in SIDES])
    gains.hlines(places, both.min(axis=0), both.max(axis=0), color=GRID, linewidth=3)
    for side, values in zip(SIDES, both, strict=True):
        gains.scatter(values, places, color=SIDE_COLOURS[side], s=24, label=side, zorder=4)
    gains.axvline(0, color=INK, linewidth=0.8)
    for axes, title in ((errors, "root mean squared error"), (gains, "squared error saved")):
        _head(axes, title)
        axes.xaxis.set_major_locator(MaxNLocator(5))
    errors.set_yticks(places, [look.windows.symbols[code] for code in order])
    errors.set_ylim(len(order) - 0.4, -0.6)
    percent_axes(gains, "x")
    if look.kind == "regression":
        percent_axes(errors, "x")
    return figure


def symbol_errors(look: Look) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """By symbol: share of squared error saved on a constant, each side; the model's root mean squared error over both
    sides; the constant's. Arrays [symbols], NaN where a symbol has no window. The constant is a side's mean outcome.
    """
    symbol, symbols = look.windows.symbol, len(look.windows.symbols)
    number = np.bincount(symbol, minlength=symbols).astype(float)
    number[number == 0] = np.nan
    saved: dict[str, np.ndarray] = {}
    ours, theirs = np.zeros(symbols), np.zeros(symbols)
    for side in SIDES:
        outcome = look.windows.realised[side]
        predicted = look.predicted[f"{side}_{'mean' if look.kind == 'regression' else 'profit_probability'}"]
        if look.kind == "classification":
            outcome = (outcome > 0).astype(float)
        own = np.bincount(symbol, (outcome - predicted) ** 2, symbols) / number
        rival = np.bincount(symbol, (outcome - np.mean(outcome)) ** 2, symbols) / number
        saved[side] = 1 - own / np.where(rival > 0, rival, np.nan)
        ours, theirs = ours + own / len(SIDES), theirs + rival / len(SIDES)
    return saved, np.sqrt(ours), np.sqrt(theirs)


def attention_by_lag(look: Look) -> Figure:
    """Mean attention on each bar of the window, with the band of 8 windows in 10, and where half of it lies."""
    mean, attention = look.explanation.by_lag(), look.explanation.attention
    bars = len(mean)
    lags = np.arange(1 - bars, 1)
    half = newest_half(mean)
    figure, axes = new_figure(
        "How far back the network looks",
        f"V1 after epoch {look.epoch}: mean attention on each bar; the band holds 8 windows of 10, the dashed line is "
        "all bars alike",
    )
    low, high = np.quantile(attention, (0.1, 0.9), axis=0)
    axes.fill_between(lags, low, high, color=BLUE, alpha=0.15, linewidth=0)
    axes.axvspan(0.5 - half, 0.5, color=GRID, alpha=0.7, linewidth=0, zorder=0)
    axes.axhline(1 / bars, color=MUTED, linestyle="--", linewidth=1.2)
    axes.plot(lags, mean, color=BLUE, linewidth=1.9, marker="o", markersize=3)
    axes.set_title(
        f"grey: the newest {half} of {bars} bars hold half of the attention", fontsize=9.5, color=INK, loc="right"
    )
    axes.set_xlim(0.5 - bars, 0.5)
    axes.set_ylim(bottom=0)
    percent_axes(axes, "y")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    minutes = look.windows.step_ms // 60_000
    axes.set_xlabel(f"bars of {minutes} minutes before the signal bar, which is 0")
    axes.set_ylabel("attention")
    return figure


def newest_half(by_lag: np.ndarray) -> int:
    """How many of the newest bars together hold at least half of the attention [T], oldest first."""
    return int(np.searchsorted(np.cumsum(by_lag[::-1]), 0.5 * by_lag.sum() * (1 - 1e-9))) + 1
