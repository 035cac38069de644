"""The pictures of a training: all six are written, whatever was learned, and their numbers are right by hand."""

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
from matplotlib.figure import Figure

from perpcast.evaluation import plots
from perpcast.evaluation.explanation import Explanation
from perpcast.evaluation.windows import Windows
from perpcast.market import SIDES
from perpcast.training.pictures import (
    Look,
    attention_by_lag,
    draw_pictures,
    newest_half,
    per_symbol_error,
    probability_calibration,
    regression_calibration,
    reliability,
    symbol_errors,
)

STEP = 900_000
NAMES = ("curves", "predicted_against_realised", "calibration", "per_symbol_error", "variable_importance",
         "attention_by_lag")  # fmt: skip
HISTORY = {
    "loss": [3.0, 2.0, 1.0],
    "val_loss": [2.5, 2.0, 2.2],
    "learning_rate": [4e-5, 1e-3, 5e-4],
    "gradient_norm": [0.4, 7.5, 0.6],
    "samples_per_second": [800.0, 810.0, 805.0],
    "seconds": [1.0, 1.0, 1.0],
}


def look(
    kind: Literal["regression", "classification"] = "regression", count: int = 400, symbols: int = 5, variables: int = 6
) -> Look:
    rng = np.random.default_rng(0)
    state = rng.normal(size=count)
    realised: dict[str, np.ndarray] = {side: np.maximum(-0.01, 0.01 * rng.normal(size=count)) for side in SIDES}
    windows = Windows(
        tuple(f"SYMBOL{number}USDT" for number in range(symbols)),
        np.arange(count) % symbols,
        np.arange(count) * STEP,
        realised,
        {side: np.full(count, 3) for side in SIDES},
        STEP,
    )
    predicted: dict[str, np.ndarray] = {}
    for side in SIDES:
        predicted[f"{side}_mean"] = (0.001 * state).astype(np.float32)
        if kind == "classification":
            predicted[f"{side}_profit_probability"] = (1 / (1 + np.exp(-0.2 * state))).astype(np.float32)
        else:
            predicted |= {f"{side}_q{q}": np.full(count, q / 10_000, np.float32) for q in (50, 75, 90)}
    weights = rng.dirichlet(np.ones(variables), (7, 12)).astype(np.float32)
    attention = rng.dirichlet(np.ones(12), 7).astype(np.float32)
    explanation = Explanation(tuple(f"variable_{number}" for number in range(variables)), weights, attention)
    return Look(3, HISTORY, windows, predicted, explanation, kind)


def by_hand(predicted: Mapping[str, np.ndarray], realised: Mapping[str, np.ndarray], symbol: np.ndarray) -> Look:
    whole = look()
    windows = replace(
        whole.windows, symbols=("A", "B", "C"), symbol=symbol, open_time_ms=np.arange(len(symbol)), realised=realised
    )
    return replace(whole, windows=windows, predicted=predicted)


def texts(figure: Figure) -> str:
    figure.draw_without_rendering()
    found = [text.get_text() for text in figure.findobj(lambda each: hasattr(each, "get_text"))]  # type: ignore[attr-defined]
    return " ".join(found)


@pytest.mark.parametrize("kind", ["regression", "classification"])
def test_draw_pictures_writes_all_six_and_writes_over_them(
    tmp_path: Path, kind: Literal["regression", "classification"]
) -> None:
    first = draw_pictures(tmp_path / "plots", look(kind))
    before = [path.read_bytes() for path in first]
    assert [path.name for path in first] == [f"{name}.png" for name in NAMES]
    assert all(content.startswith(b"\x89PNG") for content in before)
    second = draw_pictures(tmp_path / "plots", replace(look(kind), epoch=4))
    assert second == first
    assert second[2].read_bytes() != before[2]  # its subtitle names the epoch
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {path.name for path in first}


@pytest.mark.parametrize("kind", ["regression", "classification"])
@pytest.mark.parametrize("count", [1, 9])
def test_draw_pictures_of_a_constant_forecast_and_few_windows(
    tmp_path: Path, kind: Literal["regression", "classification"], count: int
) -> None:
    few = look(kind, count, symbols=3)
    constant = {name: np.full_like(values, 0.25) for name, values in few.predicted.items()}
    one = {name: values[:1] for name, values in HISTORY.items()}
    assert len(draw_pictures(tmp_path, replace(few, predicted=constant, history=one))) == 6


def test_labels_of_54_variables_and_51_symbols_do_not_overlap() -> None:
    crowded = look(symbols=51, variables=54, count=510)
    importance = plots.variable_importance(crowded.explanation.variables, crowded.explanation.importance())
    for figure, expected in ((importance, 54), (per_symbol_error(crowded), 51)):
        figure.draw_without_rendering()
        labels = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
        assert len(labels) == expected
        assert all(above.y0 >= below.y1 for above, below in pairwise(labels))
        assert min(label.x0 for label in labels) >= 0
        titles = [text.get_window_extent() for text in figure.texts]
        assert min(title.y0 for title in titles) >= max(axes.get_tightbbox().y1 for axes in figure.axes)  # type: ignore[union-attr]


def test_decile_means_by_hand_and_never_tells_equal_predictions_apart() -> None:
    means = plots.decile_means(np.arange(20) % 10 * 1.0, np.arange(20) * 1.0)  # each decile: one number twice
    assert list(means.index) == list(range(1, 11))
    assert means["predicted"].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert means["realised"].tolist() == [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    constant = plots.decile_means(np.full(7, 0.5), np.arange(7))
    assert constant.to_numpy().tolist() == [[0.5, 3.0]]


def test_variable_importance_has_the_strongest_on_top_and_grey_below_the_even_share() -> None:
    figure = plots.variable_importance(("a", "b", "c", "d"), np.array([0.2, 0.5, 0.05, 0.25]))
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["b", "d", "a", "c"]
    colours = [bar.get_facecolor() for bar in axes.patches]
    assert len({*colours[1:]}) == 1  # 0.25 is the even share of four: not above it
    assert colours[0] != colours[1]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]


def test_training_curve_marks_the_kept_epoch_in_every_panel_that_the_history_has() -> None:
    figure = plots.training_curve(HISTORY)
    assert "kept: epoch 2" in texts(figure)  # V1: 2.5, 2.0, 2.2
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "", "learning rate", "gradient norm", "samples per second",
    ]  # fmt: skip
    assert all(axes.lines[0].get_xdata()[0] == 2 for axes in figure.axes)  # type: ignore[index]
    assert len(plots.training_curve({"loss": [1.0], "val_loss": [1.0]}).axes) == 1


def test_regression_calibration_shows_the_atom_as_a_bar_from_below_to_at_or_below() -> None:
    # Of four outcomes one is below -1 %, two are the stop itself, one is above: the bar spans 25 % to 75 %.
    outcome = np.array([-0.02, -0.01, -0.01, 0.03])
    forecast = by_hand(
        {f"{side}_{name}": np.full(4, -0.01) for side in SIDES for name in ("mean", "q50")},
        dict.fromkeys(SIDES, outcome),
        np.zeros(4, int),
    )
    shares = regression_calibration(forecast).axes[0]
    bars = [line.get_ydata() for line in shares.lines if line.get_linewidth() == 4 and len(line.get_ydata())]  # type: ignore[arg-type]
    assert [list(bar) for bar in bars] == [[0.25, 0.75]] * 2  # type: ignore[arg-type]


def test_reliability_by_hand() -> None:
    probability = np.array([0.2, 0.3, 0.3, 0.6, 0.8])
    number, predicted, share = reliability(probability, np.array([0, 1, 0, 1, 1]) > 0, np.array([0.2, 0.4, 0.5, 0.8]))
    assert number.tolist() == [3, 0, 2]
    np.testing.assert_allclose(predicted, [0.8 / 3, np.nan, 0.7])
    np.testing.assert_allclose(share, [1 / 3, np.nan, 1.0])


def test_probability_calibration_counts_every_window() -> None:
    curve, counts = probability_calibration(look("classification")).axes
    assert sum(bar.get_height() for bar in counts.patches) == len(SIDES) * 400  # type: ignore[attr-defined]
    assert {line.get_label() for line in curve.lines} == {"buy", "sell", "as often as it says"}


def test_symbol_errors_by_hand() -> None:
    # Mean outcome 1. A: outcomes 0 and 2, said 0 and 2: 0 of (1 + 1) / 2. B: outcome 1, said 3: 4 of 0. C: no window.
    outcome, said = np.array([0.0, 2.0, 1.0]), np.array([0.0, 2.0, 3.0])
    errors = by_hand({f"{side}_mean": said for side in SIDES}, dict.fromkeys(SIDES, outcome), np.array([0, 0, 1]))
    saved, ours, theirs = symbol_errors(errors)
    np.testing.assert_allclose(saved["buy"], [1.0, np.nan, np.nan])
    np.testing.assert_allclose(ours, [0.0, 2.0, np.nan])
    np.testing.assert_allclose(theirs, [1.0, 0.0, np.nan])
    # Of probabilities, whether it ended in profit: outcomes 0, 1, 1, mean 2/3.
    said = np.array([0.5, 0.5, 1.0])
    brier = replace(errors, kind="classification", predicted={f"{side}_profit_probability": said for side in SIDES})
    saved, ours, theirs = symbol_errors(brier)
    np.testing.assert_allclose(ours, [0.5, 0.0, np.nan])
    np.testing.assert_allclose(theirs, [np.sqrt((4 / 9 + 1 / 9) / 2), 1 / 3, np.nan])
    np.testing.assert_allclose(saved["sell"], [1 - 0.25 / (5 / 18), 1.0, np.nan])


@pytest.mark.parametrize(
    ("by_lag", "half"),
    [([0.25, 0.25, 0.25, 0.25], 2), ([0.1, 0.1, 0.2, 0.6], 1), ([0.6, 0.2, 0.1, 0.1], 4), ([1.0], 1)],
)
def test_newest_half_counts_bars_from_the_newest(by_lag: list[float], half: int) -> None:
    assert newest_half(np.array(by_lag)) == half


def test_attention_by_lag_ends_at_the_signal_bar() -> None:
    figure = attention_by_lag(look())
    (curve,) = [line for line in figure.axes[0].lines if len(line.get_xdata()) == 12]  # type: ignore[arg-type]
    assert list(curve.get_xdata()) == list(range(-11, 1))  # type: ignore[arg-type]
    np.testing.assert_allclose(np.asarray(curve.get_ydata()).sum(), 1, atol=1e-6)
    assert "bars of 15 minutes" in texts(figure)
