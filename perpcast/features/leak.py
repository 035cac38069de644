"""The leak test: what an indicator said of a bar may not change when the bars after it are other ones.

It runs over candles of the user's own. At each of many cuts the bars from there on are exchanged for others, cut off,
or replaced by a few foreign ones, and all values before the cut are compared with those that came of the true future,
to the bit: each of the 49 allows that. Cuts lie at random, and where algorithms stumble: at gaps and broken bars, in
long flat runs, at the most extreme bars. Most look at a piece of history around the cut, which takes milliseconds; some
at all of it, for what reaches further.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from perpcast.features.indicators import CANDLES_49, C, Indicator, compute_indicators
from perpcast.features.inputs import WARMUP_BARS, observed_inputs, observed_names
from perpcast.features.stretch import PRICES, Stretch, bars_of
from perpcast.features.transforms import unchanged
from perpcast.market import FLAT_RUN_BARS
from perpcast.timeframe import interval_ms

Test = Literal["truncation", "perturbation", "append"]
Form = Literal["stored value", "model input"]
Values = Callable[[pd.DataFrame], dict[Form, np.ndarray]]

CUTS = 60  # each in a piece of history
WHOLE_CUTS = 2  # through all of it
PAST_BARS = 900  # of a piece, at most: enough for every mean over 200 bars
FUTURE_BARS = 120
EXTREMES = 5  # bars of each kind: the largest moves, ranges and volumes


@dataclass(frozen=True)
class Leak:
    """A value that depended on a bar after it. `name` is that of the indicator, or of an input of the candle's shape.

    The bars from `cut_ms` on were changed, and of those before it the one at `time_ms` was the first whose value
    changed with them: from `value` to `changed`, NaN where unknown.
    """

    name: str
    form: Form
    test: Test
    cut_ms: int
    time_ms: int
    value: float
    changed: float

    @property
    def relative(self) -> float:
        """How much it changed, as a share of the larger of both; 1 where one of them is unknown."""
        if np.isnan(self.value) or np.isnan(self.changed):
            return 1.0
        return abs(self.value - self.changed) / max(abs(self.value), abs(self.changed))


def check_indicators(
    candles: pd.DataFrame,
    registry: Sequence[Indicator] = CANDLES_49,
    interval: str = "15",
    max_gap_bars: int = 0,
    *,
    seed: int = 0,
) -> list[Leak]:
    """The leaks of one symbol's `candles` (as `compute_indicators` takes them): the first of each indicator and test.

    Both the stored values and the model inputs made of them are compared. The cuts are drawn from `seed`.
    """

    def values(frame: pd.DataFrame) -> dict[Form, np.ndarray]:
        stored = compute_indicators(frame, interval, max_gap_bars, registry).to_numpy()
        inputs = observed_inputs(frame, stored, interval, max_gap_bars, registry)
        return {"stored value": stored, "model input": inputs}

    bars, random = bars_of(candles, interval), np.random.default_rng(seed)
    whole = _frame_of(bars)
    tried: list[tuple[pd.DataFrame, int]] = []
    if len(whole) > 1:
        tried += [_piece(whole, cut, random) for cut in _cuts(bars, CUTS, random)]
        tried += [(whole, cut) for cut in _cuts(bars, WHOLE_CUTS, random)]
    first: dict[tuple[str, Form, Test], Leak] = {}
    for frame, cut in tried:
        futures = _other_futures(frame, cut, interval_ms(interval), random)
        for leak in _changes(frame, cut, futures, values, registry):
            first.setdefault((leak.name, leak.form, leak.test), leak)
    return list(first.values())


def foreign_inputs(
    candles: pd.DataFrame,
    stored: np.ndarray,
    rows: np.ndarray,
    lookback: int,
    interval: str = "15",
    max_gap_bars: int = 0,
    registry: Sequence[Indicator] = CANDLES_49,
    *,
    seed: int = 0,
) -> list[Leak]:
    """Where `stored` inputs are not those of someone who knows no bar after the window's: the first of each window.

    `stored` is [n, observed] for the bars of `candles`, `rows` the last bars of the windows that are looked at. Each is
    computed again from its own bars and the warm-up before them, by turns with nothing after it and with bars in place
    of the true ones that are drawn from `seed`. What differs by less than a hundred thousandth is the same.
    """
    bars, random = bars_of(candles, interval), np.random.default_rng(seed)
    whole, names = _frame_of(bars), observed_names(registry)
    found = []
    for number, row in enumerate(rows.tolist()):
        begin = max(row + 1 - WARMUP_BARS - lookback, 0)
        past, future = whole[begin : row + 1], whole[row + 1 : row + 1 + FUTURE_BARS]
        cut_off = number % 2 == 0
        other = future[:0] if cut_off else _moved(future, random, 0.5, up=1000.0)
        frame = pd.concat([past, other], ignore_index=True)
        indicators = compute_indicators(frame, interval, max_gap_bars, registry).to_numpy()
        again = observed_inputs(frame, indicators, interval, max_gap_bars, registry)
        window = slice(max(row + 1 - lookback, 0), row + 1)
        mine, theirs = stored[window], again[window.start - begin : window.stop - begin]
        differs = ~np.isclose(mine, theirs, rtol=1e-5, atol=1e-8, equal_nan=True)
        if differs.any():
            bar, column = np.argwhere(differs)[0].tolist()
            found.append(
                Leak(
                    name=names[column],
                    form="model input",
                    test="truncation" if cut_off else "perturbation",
                    cut_ms=int(bars.open_time_ms[row]) + bars.step_ms,
                    time_ms=int(bars.open_time_ms[window.start + bar]),
                    value=float(mine[bar, column]),
                    changed=float(theirs[bar, column]),
                )
            )
    return found


def planted_leak() -> Indicator:
    """An indicator that knows the next bar's close: a check that does not report it has shown nothing."""

    def next_change(stretch: Stretch) -> np.ndarray:
        return np.append(stretch.close[1:] / stretch.close[:-1] - 1, np.nan)

    return Indicator("planted_leak", "derived", (C,), 0, next_change, unchanged, "Change of close over the next bar")


def _frame_of(bars: Stretch) -> pd.DataFrame:
    """The bars with `open_time` as numbers, which can be moved."""
    frame = pd.DataFrame({name: getattr(bars, name) for name in (*PRICES, "volume")})
    frame.insert(0, "open_time", bars.open_time_ms)
    return frame


def _changes(
    frame: pd.DataFrame,
    cut: int,
    futures: Sequence[tuple[Test, pd.DataFrame]],
    values: Values,
    registry: Sequence[Indicator],
) -> Iterator[Leak]:
    """What changes before row `cut` of `frame` with what comes after it."""
    names = {"stored value": [each.name for each in registry], "model input": observed_names(registry)}
    times, true = frame["open_time"].to_numpy(), values(frame)
    for test, future in futures:
        for form, other in values(pd.concat([frame[:cut], future], ignore_index=True)).items():
            before, after = true[form][:cut], other[:cut]
            differs = (before != after) & ~(np.isnan(before) & np.isnan(after))
            for column in np.flatnonzero(differs.any(axis=0)).tolist():
                row = int(differs[:, column].argmax())
                yield Leak(
                    name=names[form][column],
                    form=form,
                    test=test,
                    cut_ms=int(times[cut]),
                    time_ms=int(times[row]),
                    value=float(before[row, column]),
                    changed=float(after[row, column]),
                )


def _other_futures(
    frame: pd.DataFrame, cut: int, step_ms: int, random: np.random.Generator
) -> list[tuple[Test, pd.DataFrame]]:
    """What may follow on row `cut` - 1 instead: nothing, other bars in two ways, or a few at once or after a gap."""
    future = frame[cut:]
    violent = (_moved(future, random, 0.5, up=1000.0), _moved(future, random, 0.5, up=0.001))
    quiet = (_moved(future, random, 0.002), _stilled(future, volume=0.0), _broken(future))
    few = _moved(future[: int(random.integers(1, 4))], random, 0.05)
    few["open_time"] += step_ms * int(random.choice([0, 1, 40]))
    return [
        ("truncation", future[:0]),
        ("perturbation", violent[int(random.integers(2))]),
        ("perturbation", quiet[int(random.integers(3))]),
        ("append", few),
    ]


def _cuts(bars: Stretch, count: int, random: np.random.Generator) -> list[int]:
    """Rows from which on the future is changed: half of them at random, half around nasty ones."""
    rows, kinds = random.integers(1, len(bars), count - count // 2).tolist(), _nasty_rows(bars)
    for _ in range(count // 2):
        kind = kinds[int(random.integers(len(kinds)))]
        rows.append(int(random.choice(kind) + random.integers(-1, 3)))
    return [min(max(row, 1), len(bars) - 1) for row in rows]


def _nasty_rows(bars: Stretch) -> list[np.ndarray]:
    """By kind: gaps, missing bars, flat runs that grow long, bars without volume, extremes, the first bars."""
    spread, price = bars.high - bars.low, np.where(bars.close > 0, bars.close, np.nan)
    flat = (spread == 0) & (bars.volume == 0)
    grown = np.zeros(len(bars), bool)
    for back in range(1, min(FLAT_RUN_BARS, len(bars))):
        grown[back:] |= flat[back:] & flat[:-back]
    kinds = [
        np.diff(bars.open_time_ms, prepend=bars.open_time_ms[0]) > bars.step_ms,
        ~np.isfinite(bars.open + bars.high + bars.low + bars.close + bars.volume),
        grown,
        bars.volume == 0,
    ]
    with np.errstate(all="ignore"):
        sizes = (np.abs(np.diff(np.log(price), prepend=np.nan)), spread / price, bars.volume)
    rows = [np.flatnonzero(kind) for kind in kinds]
    rows += [np.argsort(np.nan_to_num(size))[-EXTREMES:] for size in sizes]
    return [*(each for each in rows if len(each)), np.arange(3)]


def _piece(whole: pd.DataFrame, cut: int, random: np.random.Generator) -> tuple[pd.DataFrame, int]:
    """Some bars around row `cut`, and its row there.

    In some of them the last bars before it stand still, with or without volume, or one is broken: where values are
    unknown, it is seen when one is filled in from the future.
    """
    begin = max(cut - int(random.integers(1, PAST_BARS)), 0)
    past, future = whole[begin:cut], whole[cut : cut + int(random.integers(1, FUTURE_BARS))]
    bars, kind = int(random.integers(1, 40)), int(random.integers(8))
    if kind <= 2 and bars < len(past):
        last = past[-bars:]
        dull = (_stilled(last, volume=1.0), _stilled(last, volume=0.0), _broken(last))[kind]
        past = pd.concat([past[:-bars], dull])
    return pd.concat([past, future], ignore_index=True), len(past)


def _moved(bars: pd.DataFrame, random: np.random.Generator, width: float, up: float = 1.0) -> pd.DataFrame:
    """Prices times `up`, each bar's also times a random factor; volumes likewise."""
    price_factor, volume_factor = up * np.exp(width * random.normal(size=(2, len(bars))))
    prices = {name: bars[name] * price_factor for name in PRICES}
    return bars.assign(**prices, volume=(bars["volume"] + 1.0) * volume_factor)


def _stilled(bars: pd.DataFrame, volume: float) -> pd.DataFrame:
    """No bar moves any more; volumes times `volume`."""
    return bars.assign(**dict.fromkeys(PRICES, bars["open"].iloc[0]), volume=bars["volume"] * volume)


def _broken(bars: pd.DataFrame) -> pd.DataFrame:
    """The first bar has no close."""
    return bars.assign(close=bars["close"].where(np.arange(len(bars)) > 0))
