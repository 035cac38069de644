"""No candles, however broken, give infinity, a crash, or a value inside its warm-up: stored, and as model input."""

import numpy as np
import pandas as pd
from hypothesis import example, given, settings
from hypothesis import strategies as st

from perpcast.features.indicators import CANDLES_49, COLUMNS, compute_indicators
from perpcast.features.inputs import CANDLE_SHAPE, OBSERVED, observed_inputs, rounded_as_stored
from perpcast.market import FLAT_RUN_BARS
from tests.test_features_indicators import TIME_COLUMNS, market, troubled_market

NAMES = ["open", "high", "low", "close", "volume"]
STEP_MS = 900_000
WARMUP = {each.name: 0 if each.name in TIME_COLUMNS else each.warmup for each in CANDLES_49}
INPUT_WARMUP = {
    **{each.name: each.input_warmup or each.warmup for each in CANDLES_49},
    **dict.fromkeys(CANDLE_SHAPE, WARMUP["atr_pct"]),
}

prices = st.one_of(
    st.floats(1e-9, 1e9),
    st.sampled_from([1.0, 1.0, 2.0, 5e-324, 1e-300, 1e-12, 1e300, 1.7e308, 0.0, -1.0, np.nan, np.inf]),
)
volumes = st.one_of(st.floats(0, 1e15), st.sampled_from([0.0, 0.0, 5e-324, 1e-300, 1e308, np.nan, -1.0]))
parts = st.tuples(
    st.one_of(st.integers(1, 60), st.integers(200, 320)),  # bars in a row
    st.integers(1, 12),  # steps to the bar before them
    prices,
    st.sampled_from([0.0, 1e-12, 1e-3, 0.3, 2.0, 300.0]),  # how much they move
    volumes,
    st.sampled_from([0.0, 1.0, 30.0]),  # how much the volume does
)
replacements = st.tuples(st.integers(0, 2_000), st.sampled_from(NAMES), st.floats())


def candles_of(drawn: list[tuple[int, int, float, float, float, float]], seed: int) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    steps, blocks = [], [np.empty((0, 5))]
    for bars, gap, price, move, volume, turmoil in drawn:
        steps += [gap] + [1] * (bars - 1)
        with np.errstate(all="ignore"):
            four = price * np.exp(move * random.normal(size=(bars, 4)))
            traded = volume * np.exp(turmoil * random.normal(size=bars))
        blocks.append(np.column_stack([four[:, 0], four.max(axis=1), four.min(axis=1), four[:, 3], traded]))
    frame = pd.DataFrame(np.concatenate(blocks), columns=NAMES)
    frame.insert(
        0,
        "open_time",
        pd.to_datetime(1_704_067_200_000 + STEP_MS * np.cumsum(np.array(steps, int)), unit="ms", utc=True),
    )
    return frame


def ages(frame: pd.DataFrame, max_gap_bars: int) -> np.ndarray:
    """Bars of the same stretch before each, told bar by bar; -1 for a missing bar."""
    out, age, run, fresh, last_ms = [], -1, 0, True, 0
    times_ms = frame["open_time"].astype("datetime64[ms, UTC]").astype("int64").tolist()
    for time_ms, row in zip(times_ms, frame[NAMES].to_numpy().tolist(), strict=True):
        open, high, low, close, volume = row
        sound = bool(np.isfinite(row).all()) and min(open, high, low, close) > 0 and volume >= 0
        run = run + 1 if sound and high == low and volume == 0 else 0
        fresh = fresh or run >= FLAT_RUN_BARS
        if not sound or run >= FLAT_RUN_BARS:
            out.append(-1)
            continue
        age = 0 if fresh or time_ms - last_ms > STEP_MS * (1 + max_gap_bars) else age + 1
        last_ms, fresh = time_ms, False
        out.append(age)
    return np.array(out, int)


def check(frame: pd.DataFrame, max_gap_bars: int = 0) -> None:
    values = compute_indicators(frame, max_gap_bars=max_gap_bars)
    assert list(values.columns) == list(COLUMNS)
    assert values.index.equals(frame.index)
    inputs = observed_inputs(frame, values.to_numpy(), max_gap_bars=max_gap_bars)
    age = ages(frame, max_gap_bars)
    for array, names, warmup in (
        (values.to_numpy(), COLUMNS, WARMUP),
        (rounded_as_stored(values.to_numpy()), COLUMNS, WARMUP),
        (inputs, OBSERVED, INPUT_WARMUP),
    ):
        assert array.shape == (len(frame), len(names))
        assert not np.isinf(array).any()
        for column, name in zip(array.T, names, strict=True):
            if name not in TIME_COLUMNS:
                assert np.isnan(column[age < warmup[name]]).all(), name


@given(st.lists(parts, max_size=5), st.lists(replacements, max_size=4), st.integers(0, 3), st.integers(0, 2**32 - 1))
@example([], [], 0, 0)
@example([(1, 1, 1.0, 0.0, 1.0, 0.0)], [], 0, 0)
@example([(320, 1, 50.0, 0.0, 0.0, 0.0)], [], 0, 0)  # one price, no volume
@example([(320, 1, 50.0, 0.0, 3.0, 0.0)], [], 0, 0)  # one price, with volume
@example([(320, 1, 50.0, 0.01, 0.0, 0.0)], [], 0, 0)  # no volume throughout
@example([(320, 1, 1.7e308, 1e-3, 1e308, 0.0)], [], 0, 0)
@example([(320, 1, 5e-324, 0.0, 5e-324, 0.0), (320, 1, 1e300, 0.3, 1.0, 1.0)], [], 0, 0)
@settings(max_examples=4 * settings.default.max_examples)  # type: ignore[union-attr]
def test_no_candles_give_infinity_a_crash_or_a_value_inside_the_warmup(
    drawn: list[tuple[int, int, float, float, float, float]],
    replaced: list[tuple[int, str, float]],
    max_gap_bars: int,
    seed: int,
) -> None:
    frame = candles_of(drawn, seed)
    for row, column, value in replaced:
        if len(frame):
            frame.loc[row % len(frame), column] = value  # also such that high < low
    check(frame, max_gap_bars)


def test_warmup_of_every_input_ends_where_the_registry_says() -> None:
    frame = market(300)
    inputs = observed_inputs(frame, compute_indicators(frame).to_numpy())
    for column, name in zip(inputs.T, OBSERVED, strict=True):
        assert int(np.isfinite(column).argmax()) == INPUT_WARMUP[name], name
        assert np.isfinite(column[INPUT_WARMUP[name] :]).all(), name


def test_ages_are_those_of_the_stretches() -> None:
    """The test above would see nothing if every bar counted as missing."""
    frame = troubled_market()
    age = ages(frame, 0)
    known = compute_indicators(frame)["obv"].notna().to_numpy()
    np.testing.assert_array_equal(age >= 0, known)
    assert (age == 0).sum() == 5
    check(frame)
