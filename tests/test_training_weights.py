"""How much each label counts, by hand and against a plain loop."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perpcast.training.dataset import Dataset
from perpcast.training.weights import class_weights, sample_weights
from tests.model_world import BEGIN_MS, STEP_MS, small_dataset


@pytest.mark.parametrize(
    ("profits", "expected"),
    [
        ([1, 0, 0, 0], [2 / 3, 2]),  # three losses weigh 2, one profit 2: 4 in all
        ([1, 0], [1, 1]),
        ([1, 1, 1, 1, 0], [2.5, 0.625]),
        ([0, 0, 0], [1, 1]),  # nothing to balance
        ([1, 1], [1, 1]),
    ],
)
def test_class_weights_by_hand(profits: list[int], expected: list[float]) -> None:
    weights = class_weights(np.array([profits, profits]).T)
    np.testing.assert_allclose(weights, [expected, expected], rtol=1e-6)
    assert weights.dtype == np.float32


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60))
def test_class_weights_have_mean_one_and_halve_the_total(drawn: list[tuple[bool, bool]]) -> None:
    profit = np.array(drawn)
    weights = class_weights(profit)
    for side in (0, 1):
        own = weights[side][profit[:, side].astype(int)]
        assert own.mean() == pytest.approx(1, rel=1e-5)
        if 0 < profit[:, side].sum() < len(profit):
            assert own[profit[:, side]].sum() == pytest.approx(len(profit) / 2, rel=1e-5)


def dataset_of(symbol: list[int], bar: list[int], held: list[tuple[int, int]]) -> Dataset:
    """Rows of these symbols and bars, whose trades were held so long; nothing else of it is read."""
    made = small_dataset(Path("unused"), bars=400)
    return replace(
        made,
        symbol=np.array(symbol, np.int16),
        open_time_ms=BEGIN_MS + STEP_MS * np.array(bar, np.int64),
        bars_held=np.array(held, np.int16),
    )


def test_uniqueness_by_hand() -> None:
    """Buys of A at bars 0, 1, 5, held 3, 2, 2: they live in 1-3, 2-3, 6-7. Sells live one bar each, alone.

    Bar 1 has one buy, bars 2 and 3 two: uniqueness (1 + 1/2 + 1/2) / 3 = 2/3, then 1/2, then 1; sells 1 each.
    B's buy lives in 1-3 as well and is alone in its symbol.
    """
    dataset = dataset_of([0, 0, 0, 1], [0, 1, 5, 0], [(3, 1), (2, 1), (2, 1), (3, 1)])
    raw = np.array([(2 / 3 + 1) / 2, (1 / 2 + 1) / 2, 1, 1])
    weights = sample_weights(dataset, np.arange(4))
    np.testing.assert_allclose(weights, raw / raw.mean(), rtol=1e-6)
    assert weights.dtype == np.float32
    # Of two rows that never meet, both count alike: what is not trained on takes no room.
    np.testing.assert_allclose(sample_weights(dataset, np.array([1, 2])), [1, 1], rtol=1e-6)


def by_loop(dataset: Dataset, rows: np.ndarray) -> np.ndarray:
    """The same by the words of the definition."""
    bars = {row: int(dataset.open_time_ms[row] - BEGIN_MS) // STEP_MS for row in rows}
    weights = []
    for row in rows:
        sides = []
        for side in (0, 1):
            shares = []
            for bar in range(bars[row] + 1, bars[row] + dataset.bars_held[row, side] + 1):
                alive = [
                    other
                    for other in rows
                    if dataset.symbol[other] == dataset.symbol[row]
                    and bars[other] < bar <= bars[other] + dataset.bars_held[other, side]
                ]
                shares.append(1 / len(alive))
            sides.append(sum(shares) / len(shares))
        weights.append(sum(sides) / 2)
    return np.array(weights) / np.mean(weights)


@given(st.data())
def test_uniqueness_is_that_of_the_plain_loop(data: st.DataObject) -> None:
    """Any symbols, gaps and holding times, and any share of the rows, in any order."""
    places = data.draw(
        st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30)), min_size=1, max_size=25, unique=True).map(sorted)
    )
    symbol, bar = ([place[n] for place in places] for n in (0, 1))
    times = st.tuples(st.integers(1, 9), st.integers(1, 9))
    held = data.draw(st.lists(times, min_size=len(places), max_size=len(places)))
    dataset = dataset_of(symbol, bar, held)
    rows = np.array(data.draw(st.lists(st.sampled_from(range(len(places))), min_size=1, unique=True)))
    np.testing.assert_allclose(sample_weights(dataset, rows), by_loop(dataset, rows), rtol=1e-5)
