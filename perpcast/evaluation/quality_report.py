"""The page about the processed table: what every symbol holds, what its trades would have earned, what looks odd."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure

from perpcast.evaluation import plots
from perpcast.evaluation.report import embedded, render_page, write_aside
from perpcast.market import SIDES
from perpcast.quality import RETURN_EDGES, Quality, SideQuality
from perpcast.timeframe import format_time

SAMPLE_ROWS = 20_000  # of which the correlations are taken: ranks of more say the same


@dataclass(frozen=True)
class QualityReport:
    """What there is to show of the processed table.

    `months` by symbol and start of month in ms; `gap_bars` by symbol and cause; `sample` is model inputs of all symbols
    [n, columns] in the order of `columns`, NaN where unknown: prices would only tell one symbol from another.
    """

    market: str
    months: Mapping[str, Mapping[int, Quality]]
    gap_bars: Mapping[str, Mapping[str, int]]
    columns: Sequence[str]
    sample: np.ndarray

    @property
    def symbols(self) -> dict[str, Quality]:
        """The quality of each symbol over all of its months."""
        return {symbol: sum(months.values(), Quality()) for symbol, months in self.months.items()}

    @property
    def calendar(self) -> dict[int, Quality]:
        """The quality of each month over all symbols, oldest first."""
        months: dict[int, Quality] = {}
        for of_symbol in self.months.values():
            for month_ms, quality in of_symbol.items():
                months[month_ms] = months.get(month_ms, Quality()) + quality
        return dict(sorted(months.items()))


def write_quality_report(report: QualityReport, folder: Path) -> Path:
    """Writes `index.html`, its pictures and `quality.json` into `folder`; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    whole = sum(report.symbols.values(), Quality())
    figures = {
        "label_distribution": label_distribution(whole),
        "base_rates": base_rates(report.calendar),
        "indicator_correlation": indicator_correlation(report.columns, report.sample),
    }
    pictures = {name: plots.save_figure(figure, folder / f"{name}.png") for name, figure in figures.items()}
    page = render_page(
        "quality.html",
        {"date": lambda time_ms: format_time(time_ms)[:10]},
        report=report,
        mean=mean_return,
        share=share,
        whole=whole,
        sides=SIDES,
        pictures=embedded(pictures),
    )
    symbols = {
        symbol: quality.to_json() | {"gap_bars": dict(report.gap_bars.get(symbol, {}))}
        for symbol, quality in report.symbols.items()
    }
    write_aside(folder / "quality.json", json.dumps(symbols, indent=2, allow_nan=False))
    write_aside(folder / "index.html", page)
    return folder / "index.html"


def mean_return(side: SideQuality) -> str:
    """The mean label in percent; a dash without labels."""
    return f"{side.return_sum / side.labels:+.3%}" if side.labels else "\N{EN DASH}"


def share(part: int, whole: int) -> str:
    """A part of the whole in percent; a dash of nothing."""
    return f"{part / whole:.1%}" if whole else "\N{EN DASH}"


def label_distribution(whole: Quality) -> Figure:
    """How often a trade earned what, both sides; everything beyond the edges stands in the outermost bars."""
    figure, axes = plots.new_figure("What a trade earns", "Share of all labels by net return, before funding")
    step = RETURN_EDGES[1] - RETURN_EDGES[0]
    middles = np.concatenate((RETURN_EDGES - step / 2, [RETURN_EDGES[-1] + step / 2]))
    for number, side in enumerate(SIDES):
        counts = np.array(whole.sides[side].histogram)
        shares = counts / max(counts.sum(), 1)
        offset = (number - 0.5) * step * 0.4
        axes.bar(middles + offset, shares, width=step * 0.4, color=plots.SIDE_COLOURS[side], label=side)
    axes.axvline(0, color=plots.MUTED, linewidth=1)
    axes.set_xlabel("net return of a trade")
    plots.percent_axes(axes, "xy")
    axes.legend(frameon=False)
    return figure


def base_rates(calendar: Mapping[int, Quality]) -> Figure:
    """The mean label of each month, both sides: what a trade at every bar would have earned."""
    figure, axes = plots.new_figure(
        "Base rates over time", "Mean net return of a trade at every bar, by month of its signal, all symbols"
    )
    times = pd.to_datetime(list(calendar), unit="ms")
    for side in SIDES:
        sides = [quality.sides[side] for quality in calendar.values()]
        means = [each.return_sum / each.labels if each.labels else np.nan for each in sides]
        axes.plot(times, means, color=plots.SIDE_COLOURS[side], marker="o", markersize=4, linewidth=1.8, label=side)
    axes.axhline(0, color=plots.MUTED, linewidth=1)
    plots.percent_axes(axes, "y")
    plots.date_axis(axes)
    axes.legend(frameon=False)
    return figure


def indicator_correlation(columns: Sequence[str], sample: np.ndarray) -> Figure:
    """Spearman correlation of every pair of columns over rows that have all of them; a constant column stays white."""
    figure = Figure(figsize=(9.5, 8.6), layout="constrained")
    axes = figure.subplots()
    complete = sample[np.isfinite(sample).all(axis=1)]
    complete = complete[:: len(complete) // SAMPLE_ROWS + 1]
    correlation = np.full((len(columns), len(columns)), np.nan)
    if len(complete) > 1:
        with np.errstate(invalid="ignore", divide="ignore"):
            correlation = np.corrcoef(pd.DataFrame(complete).rank().to_numpy(), rowvar=False)
    frame = pd.DataFrame(correlation, list(columns), list(columns))
    sns.heatmap(
        frame,
        ax=axes,
        vmin=-1,
        vmax=1,
        cmap="RdBu_r",
        square=True,
        cbar_kws={"shrink": 0.6},
        linewidths=0,
        xticklabels=True,
        yticklabels=True,
    )
    axes.set_title(
        f"Which model inputs say the same (Spearman, {len(complete):,} bars)",
        loc="left",
        fontsize=13,
        fontweight="bold",
    )
    axes.tick_params(length=0, labelsize=6.5)
    return figure
