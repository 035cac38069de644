"""What is counted of candles, indicators and labels: by hand, and adding up whatever way the rows are cut."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from perpcast.exit_policy import EXIT_REASONS, Labels
from perpcast.market import SIDES, CandleSeries
from perpcast.quality import RETURN_EDGES, Quality, SideQuality, measure


def labels(returns: list[float], reasons: list[int], ambiguous: list[bool]) -> Labels:
    count = len(returns)
    return Labels(
        np.array(returns),
        np.array(reasons, np.int8),
        np.ones(count, np.int16),
        np.zeros(count, np.int8),
        np.array(ambiguous),
    )


def candles(close: list[float], volume: list[float]) -> CandleSeries:
    price, traded = np.array(close, float), np.array(volume, float)
    return CandleSeries(np.arange(len(close)) * 900_000, price, price, price, price, traded, traded)


def test_measure_counts_each_thing_once() -> None:
    # Bar 1 repeats bar 0, bar 2 moves by 25 %, bar 3 has no volume, bar 4 repeats it without volume.
    bars = candles([100, 100, 125, 125, 125], [5, 5, 5, 0, 0])
    indicators = np.array([[np.nan, 1], [1, 1], [1, 1], [1, np.nan], [1, 1]])
    buy = labels([-0.0115, 0.002, 0.031, np.nan, np.nan], [1, 2, 4, 0, 0], [False, True, False, False, False])
    sell = labels([np.nan] * 5, [0] * 5, [False] * 5)
    quality = measure(bars, indicators, {"buy": buy, "sell": sell})
    assert (quality.bars, quality.complete) == (5, 3)
    assert (quality.large_moves, quality.without_volume, quality.repeated) == (1, 2, 1)
    assert quality.suspicious == 4
    assert quality.sides["sell"] == SideQuality()
    side = quality.sides["buy"]
    assert (side.labels, side.profits, side.ambiguous) == (3, 2, 1)
    assert side.return_sum == -0.0115 + 0.002 + 0.031
    assert side.exits == tuple(int(number in (1, 2, 4)) for number in range(len(EXIT_REASONS)))
    # Bins are (edge, next edge]: -1.15 % lies above -1.25 %, 0.2 % above 0, 3.1 % above 3 %.
    filled = [RETURN_EDGES[number - 1] for number, count in enumerate(side.histogram) if count]
    assert filled == [-0.0125, 0.0, 0.03]


def test_measure_of_no_rows_is_nothing() -> None:
    empty = labels([], [], [])
    assert measure(CandleSeries.empty(), np.empty((0, 3)), dict.fromkeys(SIDES, empty)) == Quality()


@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 2**32 - 1))
def test_parts_add_up_to_the_whole_and_survive_json(first: int, second: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    count = 60
    bars = candles(random.choice([1.0, 1.1, 1.5], count).tolist(), random.choice([0.0, 2.0], count).tolist())
    indicators = np.where(random.random((count, 3)) < 0.1, np.nan, 1.0)
    sides = {}
    for side in SIDES:
        returns = np.where(random.random(count) < 0.2, np.nan, random.integers(-64, 64, count) / 1024)
        sides[side] = labels(
            returns.tolist(), random.integers(1, 6, count).tolist(), (random.random(count) < 0.5).tolist()
        )
    whole = measure(bars, indicators, sides)
    low, high = sorted((first, second))
    parts = [measure(bars, indicators, sides, slice(*ends)) for ends in ((0, low), (low, high), (high, count))]
    assert sum(parts, Quality()) == whole  # sums of binary fractions: exact in any order
    assert Quality.from_json(whole.to_json()) == whole
