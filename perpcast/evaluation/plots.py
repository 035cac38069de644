"""The pictures of a training and of a test span; each function returns a figure, `save_figure` writes it.

Blue is the model or a buy, orange a sell, grey whatever it has to beat. Drawn without pyplot: no global state. The
house's width is that of half a page, so that its letters can still be read where a telephone shows it at 3.6 inches.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter, DateFormatter, MonthLocator
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.ticker import FixedLocator, Formatter, Locator, MaxNLocator, PercentFormatter

from perpcast.evaluation.certificate import NullScore
from perpcast.evaluation.scores import Evaluation, ProfitScores, Score, daily_rank_ic
from perpcast.evaluation.threshold import ThresholdChoice
from perpcast.evaluation.windows import Windows
from perpcast.market import SIDES
from perpcast.timeframe import DAY_MS

INK, MUTED, GRID = "#1f2933", "#7b8794", "#e4e7eb"
BLUE, ORANGE, GREEN, RED = "#1d6fb8", "#d9730d", "#2a9d6f", "#c8453b"
SIDE_COLOURS = {"buy": BLUE, "sell": ORANGE}
DECILES = 10
_MARKED_EPOCHS = 40  # a curve of more has no dots
_SMALL_PANELS = {
    "learning_rate": ("learning rate", "{x:g}"),
    "gradient_norm": ("gradient norm", "{x:g}"),
    "samples_per_second": ("samples per second", "{x:,.0f}"),
}
_MONTHS_FROM_DAYS, _DAYS_FROM_DAYS = 75, 4
_LABELLED = 10  # bars with their number written beside them
_WEEKS = 8  # a longer span is cut into months
_TENTHS_BELOW = 10  # numbers in cells that stay below it have a decimal

# Scores of a slice: what columns call them, their form, and where neither good nor bad lies; None is the mean of all.
SLICE_METRICS: dict[str, tuple[str, str, float | None]] = {
    "rank_ic": ("rank IC", "{:+.2f}", 0.0),
    "mae": ("MAE", "{:.2%}", None),
    "direction": ("direction", "{:.0%}", 0.5),
    "side_return": ("side's return", "{:+.2%}", 0.0),
}
WIDTH = 5.2  # inches
_LETTERS = 14  # of a subtitle, on an inch
DPI = 200


def save_figure(figure: Figure, path: Path) -> Path:
    """Writes a PNG of `DPI` dots per inch; a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    figure.savefig(aside, format="png", dpi=DPI, facecolor="white")
    aside.replace(path)
    return path


class Judged(Protocol):
    """Forecasts beside what came true: an `Evaluation`, or a look at a network in training."""

    @property
    def windows(self) -> Windows:
        """The windows that were forecast."""

    @property
    def predicted(self) -> Mapping[str, np.ndarray]:
        """Outputs by name, each [windows]."""


def training_curve(history: Mapping[str, Sequence[float]]) -> Figure:
    """Loss by epoch on the training windows and on V1, with the epoch whose weights were kept.

    `history` holds `loss` and `val_loss`, one value an epoch; learning rate, gradient norm and samples per second have
    small panels of their own below where it holds them too.
    """
    small = [name for name in _SMALL_PANELS if name in history]
    figure = Figure(figsize=(WIDTH, 6.2 if small else 4.2), layout="constrained")
    epochs = np.arange(1, len(history["loss"]) + 1)
    kept = epochs[int(np.nanargmin(history["val_loss"]))]
    titles(figure, "Training: loss by epoch", "The weights kept are those of the epoch with the lowest V1 loss")
    rows = figure.add_gridspec(2 if small else 1, max(1, len(small)), height_ratios=[2.4, 1] if small else None)
    marker = "o" if len(epochs) <= _MARKED_EPOCHS else None
    axes = _epoch_axes(figure, rows[0, :], epochs, kept)
    axes.plot(epochs, history["loss"], color=MUTED, marker=marker, markersize=4, label="training windows")
    axes.plot(epochs, history["val_loss"], color=BLUE, marker=marker, markersize=4, linewidth=2, label="V1")
    axes.scatter(
        [kept], [history["val_loss"][kept - 1]], s=110, facecolor="white", edgecolor=BLUE, linewidth=2, zorder=5,
        label=f"kept: epoch {kept}",
    )  # fmt: skip
    axes.set_xlabel("epoch")
    axes.set_ylabel("loss")
    axes.legend(frameon=False)
    for column, name in enumerate(small):
        panel = _epoch_axes(figure, rows[1, column], epochs, kept)
        panel.plot(epochs, history[name], color=INK, marker=marker, markersize=3, linewidth=1.4)
        title, form = _SMALL_PANELS[name]
        panel.set_title(title, fontsize=8.5, color=INK, loc="left")
        panel.margins(y=0.12)
        panel.set_ylim(bottom=0)
        panel.xaxis.set_major_locator(MaxNLocator(3, integer=True, min_n_ticks=1))
        panel.yaxis.set_major_locator(MaxNLocator(4))
        panel.yaxis.set_major_formatter(form)
    return figure


def _epoch_axes(figure: Figure, place: SubplotSpec, epochs: np.ndarray, kept: int) -> Axes:
    axes = figure.add_subplot(place)
    bare(axes)
    axes.axvline(kept, color=BLUE, linewidth=1, linestyle=":")
    axes.set_xlim(0.5, len(epochs) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    return axes


def predicted_against_realised(judged: Judged, span: str) -> Figure:
    """Mean realised return by decile of the prediction, each side; on the dashed line the two agree.

    Deciles and not single trades: half of all labels are the same stop, and a cloud of points shows only that.
    """
    deciles: dict[str, list[dict[str, float]]] = {}
    for side in SIDES:
        means = decile_means(judged.predicted[f"{side}_mean"], judged.windows.realised[side])
        deciles[side] = [
            {"predicted": predicted, "realised": realised}
            for predicted, realised in zip(means["predicted"], means["realised"], strict=True)
        ]
    return expected_against_realised(deciles, f"{span}; on the dashed line expectation and outcome agree")


def expected_against_realised(deciles: Mapping[str, Sequence[Mapping[str, float]]], subtitle: str) -> Figure:
    """`predicted` and `realised` means by decile of the prediction, each side, with the interval `lower` to `upper`."""
    figure, axes = new_figure("Expected against realised return, by decile", subtitle)
    for side, rows in deciles.items():
        places, colour = [row["predicted"] for row in rows], SIDE_COLOURS[side]
        lower, upper = ([row.get(name, np.nan) for row in rows] for name in ("lower", "upper"))
        axes.vlines(places, lower, upper, color=colour, linewidth=4, alpha=0.3)
        axes.plot(places, [row["realised"] for row in rows], color=colour, marker="o", linewidth=1.6, label=side)
    ends = [end for rows in deciles.values() for end in (rows[0]["predicted"], rows[-1]["predicted"])]
    agreed = [min(ends), max(ends)]
    axes.plot(agreed, agreed, color=MUTED, linestyle="--", linewidth=1.2, label="perfectly calibrated")
    axes.axhline(0, color=INK, linewidth=0.8)
    percent_axes(axes, "xy")
    axes.set_xlabel("mean predicted net return")
    axes.set_ylabel("mean realised net return")
    axes.legend(frameon=False)
    return figure


def decile_means(predicted: np.ndarray, realised: np.ndarray) -> pd.DataFrame:
    """Mean of both (columns `predicted`, `realised`) by decile of the prediction, 1 to 10 (the index).

    Equal predictions are never told apart: a constant has one decile.
    """
    rank = pd.Series(predicted).rank(method="average").to_numpy()
    decile = ((rank - 0.5) * DECILES // len(predicted)).astype(int) + 1
    return pd.DataFrame({"predicted": predicted, "realised": realised}, dtype=np.float64).groupby(decile).mean()


def score_intervals(evaluation: Evaluation) -> Figure:
    """Rank IC by day and return per trade, model beside baselines, with 95 % intervals; grey bars are the baselines."""
    figure = Figure(figsize=(WIDTH, 1.5 + 0.4 * len(evaluation.cards)), layout="constrained")
    titles(figure, "Model beside its baselines", "Bars are 95 % intervals; right of the line is better than nothing")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, metric, title in (
        (panels[0], "rank_ic", "rank IC by day"),
        (panels[1], "trade_return", "net return per trade"),
    ):
        bare(axes)
        names = [card.name for card in evaluation.cards]
        for place, card in enumerate(evaluation.cards):
            score = card.scores[metric]
            colour = BLUE if place == 0 else MUTED
            if not np.isfinite(score.value):
                why = "no trade" if metric == "trade_return" else "cannot rank"
                axes.text(0, place, f"  {why}", va="center", color=MUTED, fontsize=9)
                continue
            if np.isfinite(score.lower):
                axes.plot([score.lower, score.upper], [place, place], color=colour, linewidth=5, alpha=0.35)
            axes.scatter([score.value], [place], color=colour, s=46, zorder=4)
        axes.axvline(0, color=INK, linewidth=0.8)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_title(title, fontsize=10, color=INK, loc="left")
        axes.margins(x=0.12)
        axes.locator_params(axis="x", nbins=4)
        if metric == "trade_return":
            percent_axes(axes, "x")
    return figure


def equity_of_decisions(evaluation: Evaluation) -> Figure:
    """Cumulated return of the trades that the frozen threshold took, in notionals of one trade, with drawdown."""
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    trades = evaluation.model.trades
    titles(
        figure,
        "What the decisions would have earned",
        "Sum of net returns, equal sizes, after fees and slippage, before funding; 100 % is one trade's notional",
    )
    curve, fall = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    if not len(trades):
        for axes in (curve, fall):
            bare(axes)
            axes.set_yticks([])
        curve.text(0.5, 0.5, "The threshold took no trade", transform=curve.transAxes, ha="center", color=MUTED)
        return figure
    times = _times(evaluation.windows.open_time_ms[trades.row])
    earned = np.cumsum(trades.earned)
    for axes in (curve, fall):
        bare(axes)
        percent_axes(axes, "y")
    for code, side in enumerate(SIDES):
        part = np.cumsum(np.where(trades.side == code, trades.earned, 0))
        curve.plot(times, part, color=SIDE_COLOURS[side], linewidth=1, alpha=0.6, label=f"{side} only", linestyle=":")
    curve.plot(times, earned, color=INK, linewidth=1.9, label="both sides", drawstyle="steps-post")
    curve.axhline(0, color=INK, linewidth=0.8)
    curve.set_ylabel("cumulated return")
    curve.legend(frameon=False, loc="upper left", ncols=3)
    below = earned - np.maximum.accumulate(np.maximum(earned, 0))
    fall.fill_between(times, below, 0, color=RED, alpha=0.3, linewidth=0, step="post")
    fall.plot(times, below, color=RED, linewidth=0.9, drawstyle="steps-post")
    fall.set_ylabel("drawdown")
    date_axis(fall)
    return figure


def threshold_curve(choice: ThresholdChoice, test: Score) -> Figure:
    """Mean return and number of trades by threshold on V2, where it was chosen; the chosen point is marked.

    Beside it stands what that threshold came to on the test span: the mean return `test` with its interval.
    """
    figure, axes = new_figure(
        "The decision threshold, chosen on V2",
        "Frozen before the test span was looked at. Grey: number of trades. What was chosen because it was best looks "
        "better than what follows",
    )
    points = [point for point in choice.curve if point.trades]
    places = [point.threshold for point in points]
    counts = axes.twinx()
    bare(counts)
    counts.grid(visible=False)
    counts.fill_between(places, [point.trades for point in points], color=GRID, step="mid", alpha=0.9, linewidth=0)
    counts.set_ylabel("trades", color=MUTED)
    counts.set_ylim(bottom=0)
    counts.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_zorder(counts.get_zorder() + 1)
    axes.patch.set_visible(False)
    axes.plot(places, [point.mean_return for point in points], color=BLUE, marker="o", markersize=3.5)
    axes.axhline(0, color=INK, linewidth=0.8)
    if choice.chosen.trades:
        axes.scatter(
            [choice.threshold], [choice.chosen.mean_return], s=120, facecolor="white", edgecolor=ORANGE, linewidth=2.2,
            zorder=5, label=f"chosen on V2: {choice.chosen.trades:,} trades above {choice.threshold:.2%}",
        )  # fmt: skip
    if np.isfinite(test.value):
        if np.isfinite(test.lower):
            axes.plot([choice.threshold] * 2, [test.lower, test.upper], color=GREEN, linewidth=5, alpha=0.4)
        axes.scatter([choice.threshold], [test.value], s=60, color=GREEN, marker="D", zorder=6, label="then, on test")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize=9)
    percent_axes(axes, "xy")
    axes.set_xlabel("predicted net return must exceed")
    axes.set_ylabel("mean net return per trade", color=BLUE)
    return figure


def rank_ic_days(evaluation: Evaluation) -> Figure:
    """Rank IC of each day, with its 7-day mean: is it there all along, or was it one lucky week?"""
    figure, axes = new_figure(
        "Rank IC of each day", "Spearman correlation across symbols; above zero the order was right"
    )
    mean: dict[str, np.ndarray] = {side: evaluation.predicted[f"{side}_mean"] for side in SIDES}
    daily = daily_rank_ic(evaluation.windows, mean)
    times = _times(daily.index.to_numpy() * DAY_MS)
    axes.bar(times, daily, color=np.where(daily > 0, GREEN, RED), alpha=0.45, width=0.85)
    axes.plot(times, daily.rolling(7, min_periods=1).mean(), color=INK, linewidth=1.9, label="7-day mean")
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_ylabel("rank IC")
    axes.legend(frameon=False)
    date_axis(axes)
    return figure


def symbol_heat_map(
    symbols: Sequence[str], symbol: np.ndarray, entry_ms: np.ndarray, earned: np.ndarray, unit: str
) -> Figure:
    """What trades [trades] earned together, in `unit`, by symbol and week of entry; by month where weeks are many."""
    table = earned_by_symbol(symbols, symbol, entry_ms, earned)
    figure = Figure(figsize=(WIDTH, 1.1 + 0.26 * len(table)), layout="constrained")
    titles(figure, "Where it came from", f"{unit} earned by symbol and time of entry; grey is without a trade")
    axes = figure.subplots()
    heat(axes, table, np.nanmax(np.abs(table.to_numpy()), initial=0))
    return figure


def earned_by_symbol(
    symbols: Sequence[str], symbol: np.ndarray, entry_ms: np.ndarray, earned: np.ndarray
) -> pd.DataFrame:
    """Sums of `earned` [trades] by symbol (rows) and week or month of entry (columns); NaN where there is no trade."""
    times = _times(entry_ms)
    weeks = times.to_period("W-SUN").start_time
    many = weeks.nunique() > _WEEKS
    spans = times.to_period("M").start_time if many else weeks
    frame = pd.DataFrame({"symbol": np.array(symbols)[symbol], "span": spans, "earned": earned})
    table = frame.pivot_table(index="symbol", columns="span", values="earned", aggfunc="sum")
    table.columns = pd.DatetimeIndex(table.columns).strftime("%b %y" if many else "%d %b")
    return table.reindex(list(symbols))


def slice_heat_map(title: str, slices: Mapping[str, Mapping[str, float]]) -> Figure:
    """Scores of each symbol, month or regime: `slices` by name, then by the names of SLICE_METRICS.

    A column has a scale of its own; an error is coloured by its distance from the mean, lower is better.
    """
    figure = Figure(figsize=(WIDTH, 1.1 + 0.26 * len(slices)), layout="constrained")
    titles(figure, title, "Green is better than zero, than a coin, or (MAE) than the mean")
    panels = figure.subplots(1, len(SLICE_METRICS), sharey=True, squeeze=False)[0]
    for axes, (metric, (name, form, centre)) in zip(panels, SLICE_METRICS.items(), strict=True):
        values = np.array([row[metric] for row in slices.values()], np.float64)
        middle = float(np.nanmean(values)) if centre is None and np.isfinite(values).any() else centre or 0.0
        better = (middle - values) if centre is None else (values - middle)
        table = pd.DataFrame({name: better}, index=list(slices))
        words = np.array([[true_minus(form.format(value)) if np.isfinite(value) else ""] for value in values])
        heat(axes, table, float(np.nanmax(np.abs(better), initial=0)), words)
    return figure


def heat(axes: Axes, table: pd.DataFrame, reach: float, words: np.ndarray | None = None) -> None:
    """A table as cells, green above zero and red below it, full colour at `reach`, with its numbers or with `words`."""
    axes.set_facecolor("#f1f3f5")
    if table.empty:
        axes.set_xticks([])
        axes.set_yticks([])
        axes.text(0.5, 0.5, "no trade", transform=axes.transAxes, ha="center", color=MUTED)
        return
    form = "{:+,.1f}" if reach < _TENTHS_BELOW else "{:+,.0f}"
    if words is None:
        words = table.map(lambda value: true_minus(form.format(value)) if np.isfinite(value) else "").to_numpy()
    full = reach or 1.0
    sns.heatmap(
        table, ax=axes, cmap=sns.diverging_palette(18, 160, s=75, l=55, as_cmap=True), vmin=-full, vmax=full,
        linewidths=1.2, annot=words, fmt="", annot_kws={"fontsize": 8}, cbar=False, xticklabels=True, yticklabels=True,
    )  # fmt: skip
    axes.set_xlabel("")
    axes.set_ylabel("")
    axes.xaxis.tick_top()
    axes.tick_params(length=0, labelsize=8.5, rotation=0)


def quantile_calibration(quantiles: Mapping[str, Mapping[str, float]]) -> Figure:
    """Share of outcomes below and at or below each predicted quantile, beside the share that it promised."""
    figure, axes = new_figure(
        "Do the quantiles hold what they promise?",
        "Right where the bar meets the dashed line. A bar is high where outcomes equal the quantile, as stops do",
    )
    axes.plot([0, 1], [0, 1], color=MUTED, linestyle="--", linewidth=1.2)
    levels = sorted({row["quantile"] for row in quantiles.values()})
    for side, shift in zip(SIDES, (-0.012, 0.012), strict=True):
        for row in (row for name, row in quantiles.items() if name.startswith(f"{side}_")):
            place, ends = row["quantile"] + shift, [row["below"], row["at_or_below"]]
            axes.plot([place, place], ends, color=SIDE_COLOURS[side], linewidth=6, alpha=0.45, solid_capstyle="butt")
            axes.plot([place, place], ends, color=SIDE_COLOURS[side], marker="_", markersize=13, markeredgewidth=2.2)
        axes.plot([], [], color=SIDE_COLOURS[side], linewidth=5, label=side)
    axes.set_xticks(levels, [f"{level:.0%}" for level in levels])
    axes.set_xlim(max(0, levels[0] - 0.12), min(1, levels[-1] + 0.1))
    axes.set_ylim(0, 1.02)
    percent_axes(axes, "y")
    axes.set_xlabel("predicted quantile")
    axes.set_ylabel("share of outcomes below it")
    axes.legend(frameon=False, loc="lower right")
    return figure


def profit_calibration(profits: Mapping[str, ProfitScores]) -> Figure:
    """Share of trades that ended in profit by tenth of the probability given; on the dashed line the two agree."""
    figure, axes = new_figure(
        "Does a probability happen as often as it says?",
        "Test span, by tenth of the probability of profit; on the dashed line it does",
    )
    ends = []
    for side, found in profits.items():
        given, happened = ([row[name] for row in found.calibration] for name in ("predicted", "realised"))
        axes.plot(given, happened, color=SIDE_COLOURS[side], marker="o", markersize=5, linewidth=1.6, label=side)
        ends += [min(given), max(given)]
    if ends:
        axes.plot([min(ends), max(ends)], [min(ends), max(ends)], color=MUTED, linestyle="--", linewidth=1.2)
        axes.legend(frameon=False)
    percent_axes(axes, "xy")
    axes.set_xlabel("probability given")
    axes.set_ylabel("share that ended in profit")
    return figure


def variable_importance(
    variables: Sequence[str],
    importance: np.ndarray,
    span: str = "Windows and bars together",
    strongest: int | None = None,
) -> Figure:
    """Mean selection weight of each variable [V], the strongest on top, beside what each had if all counted alike.

    `strongest` leaves out all but so many of them.
    """
    order, even = np.argsort(-importance, kind="stable")[:strongest], 1 / len(variables)
    those = "each" if len(order) == len(variables) else f"the {len(order)} strongest of {len(variables)}"
    figure, axes = new_figure(
        "Which inputs the network uses",
        f"{span}: mean weight of {those}; grey is below {even:.1%}, what all would have that count alike",
        height=1.2 + 0.19 * len(order),
    )
    places, weights = np.arange(len(order)), importance[order]
    axes.barh(places, weights, color=np.where(weights > even, BLUE, MUTED), height=0.72)
    axes.axvline(even, color=INK, linewidth=0.9, linestyle="--")
    axes.set_yticks(places, [variables[number] for number in order])
    axes.set_ylim(len(order) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    percent_axes(axes, "x")
    axes.xaxis.tick_top()
    for place, weight in enumerate(weights[:_LABELLED]):
        axes.annotate(
            f"{weight:.1%}", (weight, place), (4, 0), textcoords="offset points", va="center", fontsize=9, color=INK
        )
    axes.margins(x=0.08)
    return figure


def attention_curve(attention: np.ndarray, step_ms: int) -> Figure:
    """Mean attention [T] of the signal bar on each bar of its window, oldest first; they sum to 1."""
    bars = len(attention)
    figure, axes = new_figure(
        "How far back the network looks", "Mean attention on each bar; the dashed line is all bars alike"
    )
    lags = np.arange(1 - bars, 1)
    axes.fill_between(lags, attention, color=BLUE, alpha=0.15, linewidth=0)
    axes.plot(lags, attention, color=BLUE, linewidth=1.9)
    axes.axhline(1 / bars, color=MUTED, linestyle="--", linewidth=1.2)
    axes.set_xlim(0.5 - bars, 0.5)
    axes.set_ylim(bottom=0)
    percent_axes(axes, "y")
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    axes.set_xlabel(f"bars of {step_ms // 60_000} minutes before the signal bar, which is 0")
    axes.set_ylabel("attention")
    return figure


def null_scores(null: NullScore, found: float) -> Figure:
    """Rank IC of ridge where labels were shifted in time, one dot a shift, and the model's own: `found`."""
    figure, axes = new_figure(
        "Against what cannot be known",
        "Grey: rank IC of ridge on labels of another time, one dot for each shift. A score among them is no skill",
        height=2.3,
    )
    levels = np.linspace(-0.3, 0.3, len(null.rank_ic))[
        np.argsort(np.argsort(null.rank_ic)) * 7 % max(len(null.rank_ic), 1)
    ]
    axes.scatter(null.rank_ic, levels, color=MUTED, s=34, alpha=0.75, label="labels shifted")
    axes.axvline(0, color=INK, linewidth=0.8)
    if np.isfinite(found):
        axes.axvline(found, color=BLUE, linewidth=2.4, label="model")
    axes.set_ylim(-0.6, 0.6)
    axes.set_yticks([])
    axes.margins(x=0.15)
    axes.set_xlabel("rank IC by day")
    axes.legend(frameon=False, loc="upper left", ncols=2, bbox_to_anchor=(0, 1.22), borderaxespad=0)
    return figure


def paper_equity(open_time_ms: np.ndarray, equity: np.ndarray, initial: float) -> Figure:
    """Equity of the paper session at every closed bar, in USDT, against what it started with."""
    figure, axes = new_figure("Paper session: equity", "USDT at every closed bar, open positions included")
    times = _times(open_time_ms)
    axes.axhline(initial, color=MUTED, linewidth=1, linestyle="--", label="start")
    axes.plot(times, equity, color=INK, linewidth=1.8, label="equity")
    axes.fill_between(times, equity, initial, where=equity >= initial, color=GREEN, alpha=0.22, linewidth=0)
    axes.fill_between(times, equity, initial, where=equity < initial, color=RED, alpha=0.22, linewidth=0)
    axes.yaxis.set_major_formatter("{x:,.0f}" if np.ptp(equity) > 20 else "{x:,.1f}")
    axes.legend(frameon=False)
    date_axis(axes)
    return figure


def new_figure(title: str, subtitle: str, height: float = 3.7) -> tuple[Figure, Axes]:
    """A figure of the house's width and look, `height` inches tall, with one axes."""
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    titles(figure, title, subtitle)
    axes = figure.subplots()
    bare(axes)
    return figure, axes


def titles(figure: Figure, title: str, subtitle: str) -> None:
    """Title and subtitle at a fixed distance from the top, however tall the figure is; the axes begin below them."""
    inch = 1 / figure.get_figheight()
    lines = textwrap.wrap(subtitle, round(_LETTERS * figure.get_figwidth()))
    left = 0.08 / figure.get_figwidth()
    figure.suptitle(title, x=left, y=1 - 0.09 * inch, ha="left", fontsize=13, fontweight="bold", color=INK)
    figure.text(left, 1 - 0.35 * inch, "\n".join(lines), ha="left", va="top", fontsize=9, color=MUTED)
    top = 1 - (0.4 + 0.15 * len(lines)) * inch
    figure.get_layout_engine().set(rect=(0, 0, 1, top))  # type: ignore[union-attr, call-arg]


def bare(axes: Axes) -> None:
    """A quiet grid and no frame."""
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9, labelcolor=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)


def true_minus(number: str) -> str:
    """A number as it was formatted, with a true minus sign, and with no sign where all digits are zeros."""
    text = number if any(digit in number for digit in "123456789") else number.lstrip("+-")
    return text.replace("-", "\N{MINUS SIGN}")


def percent_axes(axes: Axes, which: str) -> None:
    """Fractions written as percent, on the axes named in `which` (x, y, xy)."""
    if "x" in which:
        axes.xaxis.set_major_formatter(PercentFormatter(1))
    if "y" in which:
        axes.yaxis.set_major_formatter(PercentFormatter(1))


def date_axis(axes: Axes) -> None:
    """Few dates along x, as far apart as one another: months of a long span, days of a short one, else times of day."""
    low, high = axes.get_xlim()
    days = high - low
    if days >= _MONTHS_FROM_DAYS:
        locator: Locator = MonthLocator(interval=math.ceil(days / 210))
        rest = [""] * 4  # finer than months
        formatter: Formatter = ConciseDateFormatter(
            locator, formats=["%Y", "%b", *rest], zero_formats=["", "%b\n%Y", *rest], show_offset=False
        )
    elif days >= _DAYS_FROM_DAYS:
        # None of them so far left that its letters reach the other axis.
        locator = FixedLocator(np.arange(math.ceil(low + 0.05 * days), high, math.ceil(days / 6)).tolist())
        formatter = DateFormatter("%d %b")
    else:
        locator = AutoDateLocator(minticks=3, maxticks=6)
        formatter = DateFormatter("%H:%M\n%d %b" if days > 1 else "%H:%M")
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(formatter)


def _times(open_time_ms: np.ndarray) -> pd.DatetimeIndex:
    return pd.to_datetime(open_time_ms, unit="ms")
