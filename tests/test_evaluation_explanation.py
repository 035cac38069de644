"""Explanations by hand: two windows of two bars and three variables."""

import numpy as np
import pytest

from perpcast.evaluation.explanation import Explanation

SELECTION = np.array(
    [
        [[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]],
        [[0.0, 1.0, 0.0], [0.4, 0.4, 0.2]],
    ],
    np.float32,
)
ATTENTION = np.array([[0.25, 0.75], [0.5, 0.5]], np.float32)
EXPLANATION = Explanation(("rsi", "macd", "hour"), SELECTION, ATTENTION)


def test_importance_is_the_mean_over_windows_and_bars() -> None:
    # (0.5 + 0.1 + 0.0 + 0.4) / 4, (0.25 + 0.2 + 1 + 0.4) / 4, (0.25 + 0.7 + 0 + 0.2) / 4
    np.testing.assert_allclose(EXPLANATION.importance(), [0.25, 0.4625, 0.2875], atol=1e-7)
    assert EXPLANATION.importance().sum() == pytest.approx(1)


def test_by_lag_is_the_mean_over_windows_oldest_first() -> None:
    np.testing.assert_allclose(EXPLANATION.by_lag(), [0.375, 0.625], atol=1e-7)


def test_newest_names_the_strongest_variables_of_the_signal_bar() -> None:
    first, second = EXPLANATION.newest(2)
    assert [name for name, _ in first] == ["hour", "macd"]
    assert [weight for _, weight in first] == pytest.approx([0.7, 0.2])
    assert [name for name, _ in second] == ["rsi", "macd"]  # equal weights stay in the order of the variables
    assert [len(each) for each in EXPLANATION.newest(9)] == [3, 3]
    assert EXPLANATION.newest(0) == [[], []]


def test_concatenated_holds_the_windows_of_all_parts() -> None:
    parts = [Explanation(EXPLANATION.variables, SELECTION[i : i + 1], ATTENTION[i : i + 1]) for i in range(2)]
    whole = Explanation.concatenated(parts)
    assert len(whole) == 2
    np.testing.assert_array_equal(whole.selection, SELECTION)
    np.testing.assert_array_equal(whole.attention, ATTENTION)
    other = Explanation(("rsi", "macd", "day"), SELECTION, ATTENTION)
    with pytest.raises(ValueError, match="same variables"):
        Explanation.concatenated([EXPLANATION, other])


@pytest.mark.parametrize(
    ("selection", "attention", "message"),
    [
        (SELECTION[..., :2], ATTENTION, "3 variables"),
        (SELECTION, ATTENTION[:, :1], r"\[n, T\]"),
        (SELECTION[0], ATTENTION[0], r"\[n, T\]"),
        (SELECTION[:0], ATTENTION[:0], "nothing to explain"),
    ],
)
def test_explanation_of_other_shapes_is_refused(selection: np.ndarray, attention: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Explanation(("rsi", "macd", "hour"), selection, attention)
