"""The pictures of a training and of a test span; each function returns a figure, `save_figure` writes it.

Blue is the model or a buy, orange a sell, grey whatever it has to beat. Drawn without pyplot: no global state.
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.ticker import MaxNLocator, PercentFormatter

from perpcast.evaluation.scores import Evaluation, Windows, daily_rank_ic
from perpcast.evaluation.threshold import ThresholdChoice
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
_LABELLED = 10  # bars with their number written beside them
_SUBTITLE_WIDTH = 112  # characters that fit beside each other in a figure of the house's width


def save_figure(figure: Figure, path: Path) -> Path:
    """Writes a PNG of 160 dots per inch; a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".part")
    figure.savefig(aside, format="png", dpi=160, facecolor="white")
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
    figure = Figure(figsize=(8, 6.2 if small else 4.2), layout="constrained")
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
        panel.set_title(title, fontsize=10, color=INK, loc="left")
        panel.margins(y=0.12)
        panel.set_ylim(bottom=0)
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


def predicted_against_realised(judged: Judged, span: str = "Test span") -> Figure:
    """Mean realised return by decile of the prediction, each side; on the dashed line the two agree.

    Deciles and not single trades: half of all labels are the same stop, and a cloud of points shows only that.
    """
    figure, axes = new_figure(
        "Expected against realised return, by decile", f"{span}; on the dashed line expectation and outcome agree"
    )
    spans = []
    for side in SIDES:
        means = decile_means(judged.predicted[f"{side}_mean"], judged.windows.realised[side])
        axes.plot(
            means["predicted"], means["realised"], color=SIDE_COLOURS[side], marker="o", linewidth=1.6, label=side,
        )  # fmt: skip
        spans += [means["predicted"].min(), means["predicted"].max()]
    low, high = min(spans), max(spans)
    axes.plot([low, high], [low, high], color=MUTED, linestyle="--", linewidth=1.2, label="perfectly calibrated")
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
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    titles(figure, "Model beside its baselines", "Bars are 95 % intervals; right of the line is better than nothing")
    panels = figure.subplots(1, 2)
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
        if metric == "trade_return":
            percent_axes(axes, "x")
    return figure


def equity_of_decisions(evaluation: Evaluation) -> Figure:
    """Cumulated return of the trades that the frozen threshold took, in notionals of one trade, with drawdown."""
    figure = Figure(figsize=(8, 4.6), layout="constrained")
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


def threshold_curve(choice: ThresholdChoice) -> Figure:
    """Mean return and number of trades by threshold on V2, where it was chosen; the chosen point is marked."""
    figure, axes = new_figure("The decision threshold, chosen on V2", "Frozen before the test span was looked at")
    points = [point for point in choice.curve if point.trades]
    places = [point.threshold for point in points]
    counts = axes.twinx()
    bare(counts)
    counts.grid(visible=False)
    counts.fill_between(places, [point.trades for point in points], color=GRID, step="mid", alpha=0.9, linewidth=0)
    counts.set_ylabel("trades", color=MUTED)
    counts.set_ylim(bottom=0)
    axes.set_zorder(counts.get_zorder() + 1)
    axes.patch.set_visible(False)
    axes.plot(places, [point.mean_return for point in points], color=BLUE, marker="o", markersize=3.5)
    axes.axhline(0, color=INK, linewidth=0.8)
    if choice.chosen.trades:
        axes.scatter(
            [choice.threshold], [choice.chosen.mean_return], s=120, facecolor="white", edgecolor=ORANGE, linewidth=2.2,
            zorder=5, label=f"chosen: {choice.threshold:.2%}, {choice.chosen.trades:,} trades",
        )  # fmt: skip
        axes.legend(frameon=False)
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


def symbol_heat_map(evaluation: Evaluation) -> Figure:
    """Mean net return per trade by symbol and week of the test span; grey where no trade was taken."""
    trades, windows = evaluation.model.trades, evaluation.windows
    weeks = _times(windows.open_time_ms[trades.row]).to_period("W-SUN").start_time.strftime("%d %b")
    order = list(dict.fromkeys(weeks))
    names = np.array(windows.symbols)[windows.symbol[trades.row]]
    table = (
        pd.DataFrame({"symbol": names, "week": weeks, "earned": trades.earned * 100})
        .pivot_table(index="symbol", columns="week", values="earned")
        .reindex(index=sorted(windows.symbols), columns=order)
        .round(1)
        + 0.0  # no "-0.0"
    )
    figure = Figure(figsize=(8, 1.7 + 0.27 * len(table)), layout="constrained")
    titles(figure, "Where it came from", "Mean net return per trade in percent, by symbol and week of entry")
    axes = figure.subplots()
    axes.set_facecolor("#f1f3f5")
    limit = float(np.nanmax(np.abs(table.to_numpy()))) if len(trades) else 1.0
    if len(order):
        sns.heatmap(
            table, ax=axes, cmap=sns.diverging_palette(18, 160, s=75, l=55, as_cmap=True), vmin=-limit,
            vmax=limit, linewidths=1.5, annot=len(order) <= 10, fmt="+.1f", annot_kws={"fontsize": 8},
            cbar_kws={"label": "% per trade", "shrink": 0.7},
        )  # fmt: skip
    axes.set_xlabel("")
    axes.set_ylabel("")
    axes.tick_params(length=0, labelsize=8.5, rotation=0)
    return figure


def variable_importance(
    variables: Sequence[str], importance: np.ndarray, span: str = "Windows and bars together"
) -> Figure:
    """Mean selection weight of each variable [V], the strongest on top, beside what each had if all counted alike."""
    order, even = np.argsort(-importance, kind="stable"), 1 / len(variables)
    figure, axes = new_figure(
        "Which inputs the network uses",
        f"{span}: mean weight of each; grey is below {even:.1%}, what all would have that count alike",
        height=1.2 + 0.19 * len(variables),
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


def new_figure(title: str, subtitle: str, height: float = 4.2) -> tuple[Figure, Axes]:
    """A figure of the house's width and look, `height` inches tall, with one axes."""
    figure = Figure(figsize=(8, height), layout="constrained")
    titles(figure, title, subtitle)
    axes = figure.subplots()
    bare(axes)
    return figure, axes


def titles(figure: Figure, title: str, subtitle: str) -> None:
    """Title and subtitle at a fixed distance from the top, however tall the figure is; the axes begin below them."""
    inch = 1 / figure.get_figheight()
    lines = textwrap.wrap(subtitle, _SUBTITLE_WIDTH)
    figure.suptitle(title, x=0.012, y=1 - 0.09 * inch, ha="left", fontsize=13, fontweight="bold", color=INK)
    figure.text(0.012, 1 - 0.35 * inch, "\n".join(lines), ha="left", va="top", fontsize=9, color=MUTED)
    top = 1 - (0.4 + 0.15 * len(lines)) * inch
    figure.get_layout_engine().set(rect=(0, 0, 1, top))  # type: ignore[union-attr, call-arg]


def bare(axes: Axes) -> None:
    """A quiet grid and no frame."""
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0, labelsize=9, labelcolor=INK)
    for spine in axes.spines.values():
        spine.set_visible(False)


def percent_axes(axes: Axes, which: str) -> None:
    """Fractions written as percent, on the axes named in `which` (x, y, xy)."""
    if "x" in which:
        axes.xaxis.set_major_formatter(PercentFormatter(1))
    if "y" in which:
        axes.yaxis.set_major_formatter(PercentFormatter(1))


def date_axis(axes: Axes) -> None:
    """Few, concise dates along x."""
    locator = AutoDateLocator(minticks=3, maxticks=8)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator))


def _times(open_time_ms: np.ndarray) -> pd.DatetimeIndex:
    return pd.to_datetime(open_time_ms, unit="ms")
