"""The leak certificate's checks, each on what is honest and on what leaks, its record, and its null."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from perpcast.errors import MissingInputError
from perpcast.evaluation.certificate import (
    CERTIFICATE_VERSION,
    DATASET_CHECKS,
    MODEL_CHECKS,
    NULL_SHIFTS,
    Certificate,
    Check,
    NullScore,
    check_calibration,
    check_certificate,
    check_label_reach,
    check_reading,
    check_scaler,
    check_threshold,
    null_score,
)
from perpcast.evaluation.splits import TimeSplit, split_by_time
from perpcast.evaluation.threshold import choose_threshold
from perpcast.evaluation.windows import Windows
from perpcast.features.scaler import Scaler
from perpcast.outputs import OutputReading
from perpcast.task import Task
from tests.model_world import TASK, task_of

STEP = 900_000
HORIZON = 100
FRACTIONS = (0.7, 0.075, 0.075, 0.15)
FINGERPRINT = "ab" * 32


# --- labels ---------------------------------------------------------------------------------------------------------


def signals(split: TimeSplit) -> dict[str, np.ndarray]:
    """Every bar of each span."""
    return {name: np.arange(span.first_ms, span.last_ms + 1, STEP) for name, span in split.spans.items()}


def held(times: dict[str, np.ndarray], bars: int = HORIZON + 1) -> dict[str, np.ndarray]:
    return {name: np.full((len(each), 2), bars, np.int16) for name, each in times.items()}


def test_label_reach_of_purged_spans_passes_and_says_how_far_apart_they_are() -> None:
    """v - t > 101 is 102 bars or more; a time-out of the last signal t ends in t + 101: 1 bar is left."""
    times = signals(split := split_by_time(0, 9_999 * STEP, STEP, FRACTIONS, 101))
    check = check_label_reach(split, times, held(times), STEP, HORIZON)
    assert check.passed
    assert "train to v1 102 bars (102 between windows, 1 from the last exit)" in check.detail
    assert check.detail.endswith("a label reaches 101")


@pytest.mark.parametrize("purge", [0, 50, 100])
def test_label_reach_of_spans_that_are_purged_too_little_fails(purge: int) -> None:
    times = signals(split := split_by_time(0, 9_999 * STEP, STEP, FRACTIONS, purge))
    assert not check_label_reach(split, times, held(times), STEP, HORIZON).passed
    # Nor does it help that all trades happened to end early.
    assert not check_label_reach(split, times, held(times, 1), STEP, HORIZON).passed


def test_label_reach_looks_at_the_windows_and_at_the_trades_themselves() -> None:
    times = signals(split := split_by_time(0, 9_999 * STEP, STEP, FRACTIONS, 101))
    # A window of another span than its own; one between two spans; a trade that lasted longer than labels may.
    foreign = {**times, "train": np.append(times["train"], times["test"][5])}
    assert not check_label_reach(split, foreign, held(foreign), STEP, HORIZON).passed
    purged = {**times, "train": np.append(times["train"], times["train"][-1] + STEP)}
    assert not check_label_reach(split, purged, held(purged), STEP, HORIZON).passed
    long = held(times)
    long["v2"][0, 1] = HORIZON + 2
    assert not check_label_reach(split, times, long, STEP, HORIZON).passed


# --- scaler, reading, calibration, threshold ------------------------------------------------------------------------


def rows_of_columns(rows: int = 3_000) -> np.ndarray:
    """Five columns; the last one stands still, the second one drifts."""
    inputs = np.random.default_rng(1).normal(size=(rows, 5)) * [1, 2, 50, 1e-4, 0] + [0, 0, 1000, 1e-3, 7]
    inputs[:, 1] += np.linspace(0, 1, rows)
    return inputs.astype(np.float32)


COLUMNS = tuple("abcde")


def test_scaler_of_training_rows_passes() -> None:
    inputs, train = rows_of_columns(), np.arange(3_000) < 2_000
    train[500:600] = False
    check = check_scaler(Scaler.fit(inputs[train], COLUMNS), inputs, train)
    assert check.passed
    assert "1,900 rows in training windows" in check.detail


@pytest.mark.parametrize(
    ("fitted_on", "column"),
    [(slice(None), "b"), (slice(2_000, None), "b"), (slice(1, 2_000), "")],
    ids=["everything", "what came after", "all but one row"],
)
def test_scaler_of_other_rows_fails(fitted_on: slice, column: str) -> None:
    inputs, train = rows_of_columns(), np.arange(3_000) < 2_000
    check = check_scaler(Scaler.fit(inputs[fitted_on], COLUMNS), inputs, train)
    assert not check.passed
    assert f"({column}" in check.detail


def test_reading_is_that_of_the_labels_it_was_trained_on() -> None:
    realised = np.random.default_rng(2).normal(-0.003, 0.01, (900, 2))
    task: Task = TASK
    profits = task_of(targets=tuple(replace(t, kind="classification", quantiles=()) for t in task.targets))
    for each in (task, profits):
        own = OutputReading.fit(each, realised[:600])
        assert check_reading(own, realised[:600]).passed
        assert not check_reading(OutputReading.fit(each, realised), realised[:600]).passed
        assert not check_reading(own, realised[:599]).passed


def test_reading_calibrated_on_v2_is_still_that_of_the_training_labels() -> None:
    rng = np.random.default_rng(3)
    realised = rng.normal(-0.003, 0.01, (900, 2))
    profits = task_of(targets=tuple(replace(t, kind="classification", quantiles=()) for t in TASK.targets))
    reading = OutputReading.fit(profits, realised[:600])
    calibrated = reading.calibrated(rng.normal(size=(300, 2)) + 5 * np.sign(realised[600:]), realised[600:])
    assert calibrated != reading
    assert check_reading(calibrated, realised[:600]).passed


def test_calibration_on_v2_passes_and_on_another_span_fails() -> None:
    rng = np.random.default_rng(4)
    task = task_of(targets=tuple(replace(t, kind="classification", quantiles=()) for t in TASK.targets))
    realised = rng.normal(-0.003, 0.01, (900, 2))
    raw = 100 * realised + rng.normal(size=(900, 2))  # a network that knows something, in no unit
    v2, test = slice(0, 400), slice(400, 900)
    reading = OutputReading.fit(task, realised)

    def given(calibrated_on: slice) -> dict[str, np.ndarray]:
        outputs = reading.calibrated(raw[calibrated_on], realised[calibrated_on]).read(raw[v2])
        return {side: outputs[f"{side}_profit_probability"] for side in ("buy", "sell")}

    came_true = {"buy": realised[v2, 0], "sell": realised[v2, 1]}
    assert check_calibration(given(v2), came_true).passed
    assert not check_calibration(given(test), came_true).passed
    raw_alone = reading.read(raw[v2])
    uncalibrated = {side: raw_alone[f"{side}_profit_probability"] for side in ("buy", "sell")}
    assert not check_calibration(uncalibrated, came_true).passed


def test_calibration_of_what_knows_nothing_or_everything_passes_and_without_probabilities_there_is_none() -> None:
    rng = np.random.default_rng(5)
    task = task_of(targets=tuple(replace(t, kind="classification", quantiles=()) for t in TASK.targets))
    realised = rng.normal(-0.003, 0.01, (300, 2))
    came_true = {"buy": realised[:, 0], "sell": realised[:, 1]}
    noisy = realised + rng.normal(0, 0.002, (300, 2))
    for raw in (np.zeros((300, 2)), -realised, realised, noisy, 1e4 * noisy):
        outputs = OutputReading.fit(task, realised).calibrated(raw, realised).read(raw)
        assert check_calibration({s: outputs[f"{s}_profit_probability"] for s in came_true}, came_true).passed
    assert check_calibration({}, came_true) == Check(
        "calibration", True, "returns are read as they are: there is nothing to calibrate"
    )


def test_threshold_chosen_on_v2_passes_and_on_test_fails() -> None:
    rng = np.random.default_rng(6)
    rows = 2_000
    times = np.arange(rows) * STEP
    signal = rng.normal(size=(2, rows))
    predicted = {"buy": 0.01 * signal[0], "sell": 0.01 * signal[1]}
    realised = {
        side: 0.005 * signal[number] + rng.normal(0, 0.01, rows) - 0.003 for number, side in enumerate(("buy", "sell"))
    }
    lasted = {side: rng.integers(1, 6, rows) for side in ("buy", "sell")}

    whole = Windows(("A",), np.zeros(rows, int), times, realised, lasted, STEP)

    def part(rows: np.ndarray) -> tuple[dict[str, np.ndarray], Windows]:
        return {side: values[rows] for side, values in predicted.items()}, whole[rows]

    v2, test = np.arange(700), np.arange(900, rows)
    chosen = choose_threshold(*part(v2)).threshold
    on_test = choose_threshold(*part(test)).threshold
    assert check_threshold(chosen, *part(v2)).passed
    check = check_threshold(on_test, *part(v2))
    assert not check.passed
    assert check.detail == f"chosen again on V2 it is {chosen:+.6%}, frozen was {on_test:+.6%}"


# --- the null -------------------------------------------------------------------------------------------------------

HOUR = 3_600_000
DAYS, SYMBOLS = 79, 5  # days of hourly bars: the 20 shifts are 30, 31, … 49 days


def panel(leads: int | None, symbols: int = SYMBOLS, days: int = DAYS, seed: int = 7) -> dict[str, Any]:
    """Inputs of pure noise; the label of a bar is the input of `leads` days before it, or noise for None."""
    rng = np.random.default_rng(seed)
    bars = days * 24
    inputs = rng.normal(size=(symbols, bars, 3)).astype(np.float32)
    signal = rng.normal(size=(symbols, bars)) if leads is None else np.roll(inputs[..., 1], leads * 24, axis=1)
    labels = np.stack([signal, -signal], axis=-1).reshape(-1, 2)
    place = np.tile(np.arange(bars), symbols)
    return {
        "inputs": (flat := inputs.reshape(-1, 3)),
        "scaler": Scaler.fit(flat, COLUMNS[:3]),
        "labels": labels,
        "symbol": np.repeat(np.arange(symbols), bars),
        "open_time_ms": place * HOUR,
        "train": np.flatnonzero(place < 0.7 * bars),
        "judged": np.flatnonzero(place > 0.85 * bars),
        "step_ms": HOUR,
    }


def test_null_score_finds_what_comes_true_just_so_many_days_later() -> None:
    """Of 285 bars with 5 symbols each, the rank IC of noise deviates by 1 / sqrt(285 * 4) = 0.03."""
    null = null_score(**panel(leads=40))
    assert null.shifts == tuple(range(30, 50))
    assert null.rank_ic[10] == pytest.approx(1.0, abs=0.02)
    assert np.abs(np.delete(null.rank_ic, 10)).max() < 0.12
    assert null.candidate is None
    assert null.exceeded is None
    assert replace(null, candidate=0.5).exceeded == NULL_SHIFTS - 1


def test_null_score_does_not_see_what_holds_at_the_time_itself() -> None:
    """An edge that is there, and would be seen without a shift: shifted, nothing of it is left."""
    null = null_score(**panel(leads=0))
    assert np.abs(null.rank_ic).max() < 0.12
    assert abs(np.mean(null.rank_ic)) < 0.03


def test_null_score_keeps_what_symbols_are_like_at_any_time() -> None:
    """Labels that differ by symbol and inputs that tell the symbol: no leak, and no forecast either."""
    world = panel(leads=None)
    world["inputs"][:, 0] = world["symbol"]
    world["labels"] = 0.5 * world["labels"] + world["symbol"][:, None]
    world["scaler"] = Scaler.fit(world["inputs"], COLUMNS[:3])
    assert min(null_score(**world).rank_ic) > 0.8


def test_null_score_labels_that_are_missing_are_left_out() -> None:
    world = panel(leads=40)
    rng = np.random.default_rng(8)
    world["labels"][rng.random(len(world["labels"])) < 0.2] = np.nan
    late = (world["symbol"] == 4) & (world["open_time_ms"] < 30 * 24 * HOUR)  # listed a month later
    world = {
        **world,
        "labels": np.where(late[:, None], np.nan, world["labels"]),
        "train": world["train"][~late[world["train"]]],
    }
    null = null_score(**world)
    assert null.rank_ic[10] > 0.95
    assert np.abs(np.delete(null.rank_ic, 10)).max() < 0.15


@pytest.mark.parametrize(("symbols", "days"), [(2, DAYS), (SYMBOLS, 59)], ids=["two symbols", "59 days"])
def test_null_score_of_too_little_is_empty(symbols: int, days: int) -> None:
    assert null_score(**panel(None, symbols, days)) == NullScore((), ())


def test_null_score_of_60_days_has_one_shift() -> None:
    assert null_score(**panel(None, days=60)).shifts == (30,)


# --- the record -----------------------------------------------------------------------------------------------------


def certificate(*names: str, **failed: str) -> Certificate:
    checks = tuple(Check(name, name not in failed, failed.get(name, "as it should be")) for name in names)
    return Certificate(CERTIFICATE_VERSION, FINGERPRINT, checks, NullScore((30, 31), (0.01, -0.02)))


def test_certificate_passes_whole_only_and_is_a_round_trip() -> None:
    whole = certificate(*DATASET_CHECKS)
    assert whole.passed
    assert whole.failures() == ()
    assert Certificate.from_json(json.loads(json.dumps(whole.to_json()))) == whole
    assert not certificate(*DATASET_CHECKS[1:]).passed
    broken = certificate(*DATASET_CHECKS, scaler="fitted on everything")
    assert not broken.passed
    assert broken.failures() == ("scaler: fitted on everything",)
    model = whole.extended((Check("threshold", True, "the same"),), 0.03)
    assert (model.null.candidate, model.null.exceeded) == (0.03, 2)
    assert model.passed
    assert model.failures(MODEL_CHECKS) == (
        "training rows: was not checked",
        "reading: was not checked",
        "calibration: was not checked",
    )
    assert not model.extended((Check("reading", False, "another's"),), None).passed
    assert whole.null.candidate is None


CARD = {
    "dataset": {"fingerprint": FINGERPRINT},
    "leak_certificate": certificate(*DATASET_CHECKS, *MODEL_CHECKS).to_json(),
}


def test_check_certificate_gives_back_what_passed() -> None:
    assert check_certificate(CARD, "model a").passed


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"leak_certificate": None}, "has no leak certificate"),
        ({"leak_certificate": {"checks": []}}, "has no leak certificate"),
        ({"dataset": {}}, "has no leak certificate"),
        (
            {"dataset": {"fingerprint": "0" * 64}},
            "expected leak_certificate/1 of dataset 0000000000000000, found .* ab",
        ),
        ({"leak_certificate": {**CARD["leak_certificate"], "version": "leak_certificate/0"}}, "found .*/0 of abab"),
        ({"leak_certificate": certificate(*DATASET_CHECKS).to_json()}, "training rows: was not checked; reading: was"),
        (
            {"leak_certificate": certificate(*DATASET_CHECKS, *MODEL_CHECKS, inputs="future").to_json()},
            r"is not certified \(inputs: future\)",
        ),
    ],
)
def test_check_certificate_refuses_and_says_what_to_run(changed: dict[str, Any], told: str) -> None:
    with pytest.raises(MissingInputError, match=rf"^model a .*{told}.*run train_universal_transformer.py --force"):
        check_certificate({**CARD, **changed}, "model a")
