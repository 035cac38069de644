"""The pictures: every letter inside its picture and on no other, whatever is drawn; and what their numbers are."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from perpcast.evaluation import plots, trading_plots
from perpcast.evaluation.certificate import NullScore
from perpcast.evaluation.report import RunReport, figures_of
from perpcast.evaluation.scores import Score
from perpcast.evaluation.threshold import ThresholdChoice, ThresholdPoint
from perpcast.timeframe import DAY_MS, parse_time, to_ms
from tests.report_world import whole_report

FIRST = to_ms(parse_time("2024-01-01"))


@pytest.fixture(scope="module")
def run() -> RunReport:
    return whole_report()


Box = tuple[float, float, float, float]  # left, bottom, right, top, in dots


def letters(figure: Figure) -> Iterator[tuple[str, Box]]:
    """Every text that is drawn, with its box."""
    figure.draw_without_rendering()  # lays it out
    hidden = {id(label) for axes in figure.axes for label in beyond_the_ends(axes)}
    for text in figure.findobj(Text):
        if text.get_visible() and text.get_text().strip() and id(text) not in hidden:
            left, bottom, right, top = map(float, text.get_window_extent().extents)
            yield text.get_text(), (left, bottom, right, top)


def beyond_the_ends(axes: Axes) -> Iterator[Text]:
    """Labels of ticks that lie beyond the ends of their axis: they are there, and never shown."""
    for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
        low, high = sorted(limits)
        for tick in axis.get_major_ticks():
            if not low - 1e-9 <= tick.get_loc() <= high + 1e-9:
                yield from (tick.label1, tick.label2)


def assert_legible(figure: Figure) -> None:
    """No text sticks out of the figure by a dot or more, or lies on another by two dots."""
    texts, boxes = zip(*letters(figure), strict=True)
    left, bottom, right, top = np.array(boxes).T
    for sticks_out, where in (
        (left < -1, "begins outside"),
        (bottom < -1, "lies below"),
        (right > figure.bbox.width + 1, "ends outside"),
        (top > figure.bbox.height + 1, "lies above"),
    ):
        assert not sticks_out.any(), f"{texts[int(np.argmax(sticks_out))]!r} {where}"
    across = np.minimum(right[:, None], right) - np.maximum(left[:, None], left)
    along = np.minimum(top[:, None], top) - np.maximum(bottom[:, None], bottom)
    shared = np.triu(np.minimum(across, along) >= 2, k=1)
    one, other = np.unravel_index(int(np.argmax(shared)), shared.shape)
    assert not shared.any(), f"{texts[other]!r} lies on {texts[one]!r}"


def test_every_picture_of_a_report_is_legible(run: RunReport) -> None:
    for name, figure in figures_of(run).items():
        try:
            assert_legible(figure)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from None


def test_legible_means_inside_and_not_on_one_another() -> None:
    for x, y, said in ((-0.1, 0.5, "begins outside"), (0.9, 0.5, "ends outside"), (0.1, 0.97, "lies on")):
        figure, _ = plots.new_figure("Title of a picture", "Subtitle")
        figure.text(x, y, "words that are put somewhere")
        with pytest.raises(AssertionError, match=said):
            assert_legible(figure)


@pytest.mark.parametrize("days", [0.05, 0.9, 3, 4, 11, 30, 75, 164, 400, 1100])
def test_dates_are_legible_over_every_span(days: float) -> None:
    figure, axes = plots.new_figure("A span of time", "In days")
    end = FIRST + int(days * DAY_MS)
    times = pd.to_datetime(np.linspace(FIRST, end, 50).astype(np.int64), unit="ms")
    axes.plot(times, np.arange(50))
    plots.date_axis(axes)
    assert_legible(figure)
    labels = [label.get_text() for label in axes.get_xticklabels() if label.get_text()]
    assert 2 <= len(labels) <= 12


def heat_map_of_many(symbols: int) -> Figure:
    names = [f"1000COIN{number}USDT" for number in range(symbols)]
    rng = np.random.default_rng(4)
    return plots.symbol_heat_map(
        names,
        rng.integers(0, symbols, 500),
        FIRST + rng.integers(0, 200, 500) * DAY_MS,
        rng.normal(0, 900, 500),
        "USDT",
    )


@pytest.mark.parametrize("symbols", [1, 51])
def test_heat_maps_of_few_and_of_many_symbols_are_legible(symbols: int) -> None:
    assert_legible(heat_map_of_many(symbols))
    row = {"rank_ic": -0.123, "mae": 0.0123, "direction": np.nan, "side_return": -0.0012}
    slices = {f"1000COIN{number}USDT": row for number in range(symbols)}
    assert_legible(plots.slice_heat_map("Scores by symbol", slices))


def test_earned_by_symbol_adds_up_by_week_and_by_month() -> None:
    """1 Jan 2024 is a Monday. Days 0 and 6 are one week, 7 the next; by months where weeks are many."""
    day = np.array([0, 6, 7, 7])
    table = plots.earned_by_symbol(
        ("B", "A", "C"), np.array([0, 0, 0, 1]), FIRST + day * DAY_MS, np.array([1.0, 2, 4, 8])
    )
    assert list(table.index) == ["B", "A", "C"]
    assert list(table.columns) == ["01 Jan", "08 Jan"]
    np.testing.assert_array_equal(table.to_numpy(), [[3, 4], [np.nan, 8], [np.nan, np.nan]])
    day = np.arange(0, 91)  # 31 days of January, 29 of February, 31 of March
    months = plots.earned_by_symbol(("B",), np.zeros(91, int), FIRST + day * DAY_MS, np.ones(91))
    assert months.loc["B"].to_dict() == {"Jan 24": 31, "Feb 24": 29, "Mar 24": 31}


def test_pictures_without_a_trade_or_a_number_are_drawn(tmp_path: Path) -> None:
    none = np.empty(0, np.int64)
    nothing = ThresholdPoint(0.0, 0, np.nan, 0.0)
    for name, figure in {
        "heat": plots.symbol_heat_map(("A", "B"), none, none, np.empty(0), "USDT"),
        "threshold": plots.threshold_curve(ThresholdChoice(0.0, nothing, (nothing,)), Score(np.nan)),
        "null": plots.null_scores(NullScore((30,), (0.01,)), np.nan),
        "attention": plots.attention_curve(np.ones(1), 900_000),
        "slices": plots.slice_heat_map("Scores", {"A": dict.fromkeys(plots.SLICE_METRICS, np.nan)}),
    }.items():
        assert_legible(figure)
        assert imread(plots.save_figure(figure, tmp_path / f"{name}.png")).shape[1] == plots.WIDTH * plots.DPI


def test_threshold_curve_marks_what_was_chosen_and_what_came_of_it() -> None:
    points = tuple(ThresholdPoint(t, n, r, n * r) for t, n, r in ((0.0, 90, 0.001), (0.002, 40, 0.004)))
    figure = plots.threshold_curve(ThresholdChoice(0.002, points[1], points), Score(-0.003, -0.005, -0.001))
    (axes,) = [axes for axes in figure.axes if axes.get_ylabel().startswith("mean")]
    assert [np.asarray(dots.get_offsets()).tolist() for dots in axes.collections] == [
        [[0.002, 0.004]],
        [[0.002, -0.003]],
    ]
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["chosen on V2: 40 trades above 0.20%", "then, on test"]


def test_equity_curve_ends_where_the_account_does_and_shows_its_deepest_fall(run: RunReport) -> None:
    assert run.portfolio is not None
    model = run.portfolio.model
    curve, fall = trading_plots.equity_curve(run.portfolio).axes
    (own,) = [line for line in curve.lines if line.get_color() == plots.BLUE]
    assert np.asarray(own.get_ydata())[-1] == pytest.approx(model.performance.total_return)
    assert np.asarray(fall.lines[0].get_ydata()).min() == pytest.approx(-model.performance.max_drawdown)
    named = " ".join(text.get_text() for text in curve.texts)
    for name in ("model", "constant", "ridge", "buy and hold", "always on", "random"):
        assert name in named


def test_exit_reasons_count_closed_trades_and_what_they_earned(run: RunReport) -> None:
    assert run.portfolio is not None
    model = run.portfolio.model
    count, sums = trading_plots.exit_reasons(model).axes
    widths = [sum(bar.get_width() for bar in axes.patches if isinstance(bar, Rectangle)) for axes in (count, sums)]
    assert widths[0] == model.performance.trades
    assert widths[1] == pytest.approx(sum(found.net_profit for found in model.performance.by_reason.values()))


@pytest.mark.parametrize(
    ("number", "text"),
    [("+0.00", "0.00"), ("-0.0%", "0.0%"), ("-12", "\N{MINUS SIGN}12"), ("+3", "+3"), ("-0.01", "\N{MINUS SIGN}0.01")],
)
def test_true_minus(number: str, text: str) -> None:
    assert plots.true_minus(number) == text
