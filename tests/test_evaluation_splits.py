"""The rows that windows are made of; the spans themselves are tested with the scores and the folds."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from perpcast.evaluation.splits import rows_of_windows


def test_rows_of_windows_that_overlap_touch_and_stand_alone() -> None:
    """Windows of 3 rows that end at 4, 5 and 8: rows 2 to 5, and 6 to 8."""
    assert np.flatnonzero(rows_of_windows(np.array([4, 5, 8]), 3, 12)).tolist() == [2, 3, 4, 5, 6, 7, 8]
    assert not rows_of_windows(np.array([], np.int64), 3, 4).any()


@given(ends=st.lists(st.integers(9, 99), max_size=20), lookback=st.integers(1, 10))
def test_rows_of_windows_are_the_rows_of_each(ends: list[int], lookback: int) -> None:
    expected = {row for end in ends for row in range(end - lookback + 1, end + 1)}
    assert set(np.flatnonzero(rows_of_windows(np.array(ends, np.int64), lookback, 100)).tolist()) == expected
