"""Every question as a picture or a table in one self-contained page, from the same SQL, without Metabase."""

import base64
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from jinja2 import Environment, FileSystemLoader, PackageLoader, StrictUndefined
from jinja2.loaders import ChoiceLoader
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.dates import date2num
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from metabase.questions import Dashboard, Question, Text, bound_sql, load_dashboards
from perpcast.database import Database, read_defaults, read_filter_values, read_question
from perpcast.errors import MissingInputError
from perpcast.evaluation import plots
from perpcast.evaluation.report import DASH, number_text, percent_text, write_aside

TABLE_ROWS = 12  # that the page shows; Metabase scrolls
BARS = 24  # of a chart with a bar for each name: the first and the last half

_COLUMN_INCHES = 5.4 / 12  # of the 24 columns: what is drawn for one is read on a telephone and on a desk
_HEIGHT, _BAR_INCHES = 2.9, 0.21
_DPI = 160
_MARKED = 40  # points, up to which each has a dot
_NAMED = 8  # bars with their name below
_ALONE_DAYS = 20  # either side of the only point of time
_LONG = 40  # letters, from which a cell is broken into lines


@dataclass(frozen=True)
class Column:
    """How a column is read: its title, its kind (`number`, `word` or `long`), and Metabase's settings for it."""

    name: str
    title: str
    kind: str
    style: Mapping[str, Any]

    def text(self, value: Any) -> str:
        """A value as the page shows it."""
        if value is None or value is pd.NaT or (isinstance(value, float) and not np.isfinite(value)):
            return DASH
        if isinstance(value, datetime):
            return f"{value:%Y-%m-%d %H:%M}"
        if isinstance(value, date):
            return f"{value:%Y-%m}" if "month" in self.name else f"{value:%Y-%m-%d}"
        if isinstance(value, bool | np.bool_ | str):
            return str(value)
        return self._number(float(value)) + self.style.get("suffix", "")

    def _number(self, value: float) -> str:
        digits = self.style.get("decimals")
        if self.style.get("number_style") == "percent":
            return percent_text(value, 1 if digits is None else digits)
        if digits is None:
            return plots.true_minus(f"{value:,.0f}" if value == round(value) else f"{value:,.6g}")
        return number_text(value, digits)


@dataclass(frozen=True)
class Tile:
    """One tile of the page: what it is of (`place`), its kind, and what it shows."""

    place: Question | Text
    kind: str  # heading, text, scalar, table, picture or empty
    value: str = ""
    picture: str = ""
    columns: tuple[Column, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    rest: str = ""


def write_preview(database: Database, folder: Path, chosen: Mapping[str, str | None]) -> Path:
    """Answers every question and writes `index.html` into `folder`; returns the page's path.

    `chosen` holds values of the filters `symbol`, `model` and `run`, None where all, or the usual one, is meant. Raises
    MissingInputError for one that the database does not hold.
    """
    values = {key: value for key, value in chosen.items() if value is not None}
    _check_chosen(database, values)
    sections = [
        {"dashboard": dashboard, "tiles": [_tile(database, tile, values) for tile in _in_order(dashboard)]}
        for dashboard in load_dashboards()
    ]
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "index.html"
    write_aside(page, _render(sections=sections, report={"market": _headline(database, values)}))
    return page


def _check_chosen(database: Database, values: Mapping[str, str]) -> None:
    known = read_filter_values(database)
    for key, value in values.items():
        if value not in known[f"{key}s"]:
            some = ", ".join(known[f"{key}s"][:5]) or "none"
            raise MissingInputError(f"the database holds no {key} {value}; it holds {some}")


def _headline(database: Database, values: Mapping[str, str]) -> str:
    """What the answers are about."""
    chosen = {**read_defaults(database), **values}
    about = [
        f"database {database.url.database}",
        f"session {chosen['run']}" if chosen["run"] else "no session yet",
        f"model {chosen['model']}" if chosen["model"] else "no model yet",
        chosen.get("symbol", "all symbols"),
    ]
    return " · ".join(map(str, about))


def _in_order(dashboard: Dashboard) -> list[Question | Text]:
    """As they are read where the screen is narrow."""
    return sorted([*dashboard.questions, *dashboard.texts], key=lambda tile: (tile.row, tile.col))


def _tile(database: Database, place: Question | Text, values: Mapping[str, str]) -> Tile:
    if isinstance(place, Text):
        return Tile(place, "heading" if place.heading else "text")
    answer = read_question(database, *bound_sql(place, values))
    columns = columns_of(place, answer)
    if place.display == "scalar":
        field = place.settings["scalar.field"]
        column = next(column for column in columns if column.name == field)
        return Tile(place, "scalar", value=column.text(answer[field].iloc[0]) if len(answer) else DASH)
    if not len(answer):
        return Tile(place, "empty")
    if place.display == "table":
        return _table(place, answer, columns)
    figure = draw(place, answer)
    rest = f"The first and the last {BARS // 2} of {len(answer)}." if _is_cut(place, answer) else ""
    return Tile(place, "picture", picture=_png(figure), rest=rest)


def columns_of(question: Question, answer: pd.DataFrame) -> tuple[Column, ...]:
    """How each column of the answer is read."""
    styles = question.settings.get("column_settings", {})
    found = []
    for name in question.columns:
        style = styles.get(f'["name","{name}"]', {})
        values = [value for value in answer[name] if value is not None]
        texts = [value for value in values if isinstance(value, str)]
        longest = max((len(value) for value in texts), default=0)
        dated = any(isinstance(value, date) for value in values)
        kind = "long" if longest > _LONG else "word" if texts or dated else "number"
        found.append(Column(name, style.get("column_title", name.replace("_", " ")), kind, style))
    return tuple(found)


def _table(question: Question, answer: pd.DataFrame, columns: Sequence[Column]) -> Tile:
    shown = answer.head(TABLE_ROWS)
    cells = [[column.text(value) for value in shown[column.name]] for column in columns]
    rest = f"The first {TABLE_ROWS} of {len(answer)} rows." if len(answer) > TABLE_ROWS else ""
    return Tile(question, "table", columns=tuple(columns), rows=tuple(zip(*cells, strict=True)), rest=rest)


# --- pictures ---------------------------------------------------------------------------------------------------------


def draw(question: Question, answer: pd.DataFrame) -> Figure:
    """The picture of a question's answer, which has rows, in its display's kind."""
    settings = question.settings
    dimensions, metrics = settings["graph.dimensions"], settings["graph.metrics"]
    columns = {column.name: column for column in columns_of(question, answer)}
    wide = question.width * _COLUMN_INCHES
    if question.display == "row":
        answer = _cut(answer)
        figure, axes = _figure(wide, 0.7 + _BAR_INCHES * len(answer))
        _draw_row(axes, answer, columns[dimensions[0]], columns[metrics[0]])
        return figure
    figure, axes = _figure(wide, _HEIGHT)
    if question.display == "scatter":
        _draw_scatter(axes, answer, columns[dimensions[0]], columns[metrics[0]])
    else:
        series = _by_series(answer, columns, dimensions, metrics)
        colours = _colours(list(series.columns), settings.get("series_settings", {}))
        if question.display == "bar":
            _draw_bars(axes, series, colours, columns[dimensions[0]])
        else:
            _draw_lines(axes, series, colours, filled=question.display == "area")
        _finish_series(axes, series)
        _name_values(axes.yaxis, columns[metrics[0]])
    axes.set_xlabel(settings.get("graph.x_axis.title_text", ""), fontsize=9)
    return figure


def _by_series(
    answer: pd.DataFrame, columns: Mapping[str, Column], dimensions: Sequence[str], metrics: Sequence[str]
) -> pd.DataFrame:
    """A column for each line or colour, by the first dimension; gaps stay unknown."""
    if len(dimensions) == 2:
        return answer.pivot(index=dimensions[0], columns=dimensions[1], values=metrics[0]).astype(float)
    wide = answer.set_index(dimensions[0])[list(metrics)].astype(float)
    return wide.rename(columns={name: columns[name].title for name in metrics})


def _draw_lines(axes: Axes, series: pd.DataFrame, colours: Mapping[str, Any], *, filled: bool) -> None:
    dated = isinstance(series.index[0], date)
    places = pd.to_datetime(series.index, utc=True) if dated else series.index
    if filled:
        axes.stackplot(places, series.fillna(0).to_numpy().T, colors=[*colours.values()], labels=[*colours], alpha=0.85)
    else:
        marker = "o" if len(series) <= _MARKED else None
        for name, colour in colours.items():
            axes.plot(places, series[name], color=colour, marker=marker, markersize=3.5, label=name)
    if dated:
        if len(series) == 1:
            alone = date2num(places[0])
            axes.set_xlim(alone - _ALONE_DAYS, alone + _ALONE_DAYS)
        plots.date_axis(axes)


def _draw_bars(axes: Axes, series: pd.DataFrame, colours: Mapping[str, Any], dimension: Column) -> None:
    """Stacked where there are several, as far as they are above zero."""
    places = np.arange(len(series))
    base = np.zeros(len(series))
    for name, colour in colours.items():
        heights = series[name].fillna(0).to_numpy()
        signed = len(colours) == 1 and (heights < 0).any()
        shades = np.where(heights < 0, plots.RED, plots.GREEN) if signed else colour
        axes.bar(places, heights, bottom=base, color=shades, width=0.72, label=name)
        base = base + heights
    names = [dimension.text(at) for at in series.index]
    every = -(-len(names) // _NAMED)
    axes.set_xticks(places[::every], names[::every], rotation=30 if max(map(len, names)) > 7 else 0)
    axes.grid(visible=False, axis="x")


def _finish_series(axes: Axes, series: pd.DataFrame) -> None:
    """A line at zero where values lie on both of its sides, and names where there are several."""
    if series.min().min() < 0 < series.max().max():
        axes.axhline(0, color=plots.MUTED, linewidth=0.9)
    if len(series.columns) > 1:
        axes.legend(
            frameon=False, fontsize=8.5, ncols=3, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0,
            handlelength=1.2, columnspacing=1.2,
        )  # fmt: skip


def _draw_row(axes: Axes, answer: pd.DataFrame, name: Column, metric: Column) -> None:
    values = answer[metric.name].astype(float).to_numpy()
    places = np.arange(len(answer))
    colours = np.where(values < 0, plots.RED, plots.GREEN if (values < 0).any() else plots.BLUE)
    axes.barh(places, values, color=colours, height=0.7)
    axes.axvline(0, color=plots.MUTED, linewidth=0.9)
    axes.set_yticks(places, [name.text(value) for value in answer[name.name]])
    axes.set_ylim(len(answer) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    _name_values(axes.xaxis, metric)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.margins(x=0.05)


def _draw_scatter(axes: Axes, answer: pd.DataFrame, x: Column, y: Column) -> None:
    known = answer[[x.name, y.name]].astype(float).dropna()
    axes.scatter(known[x.name], known[y.name], s=16, color=plots.BLUE, alpha=0.5, linewidth=0)
    axes.axhline(0, color=plots.MUTED, linewidth=0.9)
    for axis, column in ((axes.xaxis, x), (axes.yaxis, y)):
        _name_values(axis, column)
        axis.set_major_locator(MaxNLocator(6))
    axes.set_ylabel(y.title, fontsize=9)


def _name_values(axis: Any, column: Column) -> None:
    """Numbers along an axis: percent where the column is read so, as many decimals as the steps need, no unit."""
    percent = column.style.get("number_style") == "percent"

    def text(value: float, place: int) -> str:
        return plots.true_minus(f"{value * 100:,.8g}\N{NO-BREAK SPACE}%" if percent else f"{value:,.8g}")

    axis.set_major_formatter(FuncFormatter(text))


def _colours(names: Sequence[str], settings: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Those that the settings name, else one after the other; what is alone has the house's blue."""
    palette = [plots.BLUE] if len(names) == 1 else sns.color_palette("deep", len(names))
    return {name: settings.get(name, {}).get("color", other) for name, other in zip(names, palette, strict=True)}


def _figure(wide: float, high: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(wide, high), layout="constrained")
    axes = figure.subplots()
    plots.bare(axes)
    return figure, axes


def _is_cut(question: Question, answer: pd.DataFrame) -> bool:
    return question.display == "row" and len(answer) > BARS


def _cut(answer: pd.DataFrame) -> pd.DataFrame:
    if len(answer) <= BARS:
        return answer
    return pd.concat([answer.head(BARS // 2), answer.tail(BARS // 2)])


def _png(figure: Figure) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=_DPI, facecolor="white")
    return base64.b64encode(stream.getvalue()).decode()


def _render(**values: Any) -> str:
    loader = ChoiceLoader([FileSystemLoader(Path(__file__).parent), PackageLoader("perpcast", "evaluation")])
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["bold"] = _bold
    return environment.get_template("preview.html").render(**values)


def _bold(markdown: str) -> Markup:
    """The one thing of Markdown that our texts use."""
    return Markup(re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", str(escape(markdown))))
