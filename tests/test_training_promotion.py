"""The rule of promotion: each condition alone, and the step with its events."""

from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest

from perpcast.database import REGISTRY, Database, EventRecord, read_champion, read_events, retire_model, upsert_model
from perpcast.errors import MissingInputError, PerpcastError
from perpcast.evaluation.scores import Score
from perpcast.evaluation.splits import Span
from perpcast.timeframe import DAY_MS, parse_time, to_ms
from perpcast.training.promotion import Comparison, Evidence, PromotionRefusedError, promote, unmet_conditions
from tests.test_database_registry import model, states

NOW = datetime(2025, 7, 1, 12, tzinfo=UTC)
FIRST, LAST = to_ms(parse_time("2025-01-01")), to_ms(parse_time("2025-06-01"))
SPAN = Span(FIRST, LAST)
CLEAR, DOUBTFUL, UNKNOWN = Score(0.002, 0.0005, 0.0035), Score(0.002, -0.0005, 0.0045), Score(0.002)
RIDGE = Comparison("ridge", CLEAR, SPAN, FIRST - 1)
CHAMPION = Comparison("a", CLEAR, SPAN, FIRST - 1)
GOOD = Evidence(True, "", SPAN, RIDGE, None)
AGAINST_A = replace(GOOD, gain_over_champion=CHAMPION)

BASELINE = "a daily net return above that of the best baseline ridge: expected a lower 95 % bound above 0, received "
NOW_CHAMPION = "a daily net return above that of the champion a: expected a lower 95 % bound above 0, received "
OVERLAP = (
    "windows after the training of both, candidate and champion a: expected the first one after 2025-01-01 00:00, "
)


@pytest.mark.parametrize(
    ("evidence", "champion", "expected"),
    [
        (GOOD, None, []),
        (AGAINST_A, "a", []),
        (
            replace(GOOD, certificate_passed=False, certificate_detail="scaler: fitted on 9 rows of test"),
            None,
            ["a leak certificate that passes: scaler: fitted on 9 rows of test"],
        ),
        (
            replace(GOOD, gain_over_best_baseline=replace(RIDGE, gain=DOUBTFUL)),
            None,
            [BASELINE + "-0.0500% (mean +0.2000%, upper bound +0.4500%)"],
        ),
        (replace(GOOD, gain_over_best_baseline=replace(RIDGE, gain=UNKNOWN)), None, [BASELINE + "none: too few days"]),
        (
            replace(GOOD, gain_over_best_baseline=replace(RIDGE, gain=Score(0.0, 0.0, 0.0))),  # neither ever traded
            None,
            [BASELINE + "+0.0000% (mean +0.0000%, upper bound +0.0000%)"],
        ),
        (
            replace(GOOD, gain_over_champion=replace(CHAMPION, gain=DOUBTFUL)),
            "a",
            [NOW_CHAMPION + "-0.0500% (mean +0.2000%, upper bound +0.4500%)"],
        ),
        (GOOD, "a", ["a comparison with the champion a; run the same command again"]),
        (AGAINST_A, "b", ["a comparison with the champion b; run the same command again"]),
        # The last bar that the champion was made of is the first one compared: one too early.
        (
            replace(GOOD, gain_over_champion=replace(CHAMPION, trained_until_ms=FIRST)),
            "a",
            [OVERLAP + "received 2025-01-01 00:00; train on newer candles"],
        ),
        (
            Evidence(False, "none", SPAN, replace(RIDGE, gain=UNKNOWN), replace(CHAMPION, gain=UNKNOWN)),
            "a",
            [
                "a leak certificate that passes: none",
                BASELINE + "none: too few days",
                NOW_CHAMPION + "none: too few days",
            ],
        ),
    ],
)
def test_each_condition_is_named(evidence: Evidence, champion: str | None, expected: list[str]) -> None:
    assert list(unmet_conditions(evidence, champion, ())) == expected


def test_used_test_span_is_named_with_what_it_decided() -> None:
    detail = {"model_id": "a", "first_ms": FIRST, "last_ms": LAST}
    used = EventRecord(REGISTRY, 0, NOW, "model_promoted", None, detail)
    assert unmet_conditions(GOOD, None, (used,)) == (
        "a test span of its own: 2025-01-01 00:00 to 2025-06-01 00:00 promoted a on 2025-07-01; "
        "--force promotes on it again",
    )


@pytest.fixture
def models(database: Database) -> Database:
    for model_id in "ab":
        upsert_model(database, model(model_id))
    return database


def kinds(database: Database) -> list[str]:
    return [event.kind for event in read_events(database, REGISTRY)]


def later(evidence: Evidence, days: int) -> Evidence:
    """The same on a test span that begins so many days later, both trained until then."""
    span = Span(FIRST + days * DAY_MS, LAST + days * DAY_MS)
    moved = [
        compared and replace(compared, span=span, trained_until_ms=span.first_ms - 1)
        for compared in (evidence.gain_over_best_baseline, evidence.gain_over_champion)
    ]
    assert moved[0] is not None
    return replace(evidence, test_span=span, gain_over_best_baseline=moved[0], gain_over_champion=moved[1])


def test_first_and_second_champion_on_spans_of_their_own(models: Database) -> None:
    assert promote(models, "a", GOOD, now=NOW) is None
    assert promote(models, "b", later(AGAINST_A, 152), now=NOW) == "a"  # 2025-06-02, a day after the first one ends
    assert states(models) == {"a": "retired", "b": "champion"}
    assert kinds(models) == [
        "test_span_looked_at", "model_promoted", "test_span_looked_at", "model_retired", "model_promoted",
    ]  # fmt: skip
    look, promoted = (event.detail for event in read_events(models, REGISTRY)[:2])
    assert (look["first_ms"], look["last_ms"], look["purpose"]) == (FIRST, LAST, "promotion")
    assert look["dataset_fingerprint"] == "abc"
    assert promoted["evidence"] == {
        "certificate_passed": True,
        "certificate_detail": "",
        "gain_over_best_baseline": {
            "against": "ridge",
            "gain": {"value": 0.002, "lower": 0.0005, "upper": 0.0035},
            "first_ms": FIRST,
            "last_ms": LAST,
            "trained_until_ms": FIRST - 1,
        },
        "gain_over_champion": None,
        "forced": False,
    }


@pytest.mark.parametrize("days", [0, 151])  # the same span, and one that shares its last bar, 2025-06-01
def test_second_promotion_on_a_used_span_needs_force(models: Database, days: int) -> None:
    promote(models, "a", GOOD, now=NOW)
    evidence = later(AGAINST_A, days)
    with pytest.raises(PromotionRefusedError, match="b is not promoted, it lacks 1 .*\n  - a test span of its own"):
        promote(models, "b", evidence, now=NOW)
    assert states(models) == {"a": "champion", "b": "candidate"}
    assert promote(models, "b", evidence, force=True, now=NOW) == "a"
    assert kinds(models)[2:] == [
        "test_span_looked_at", "promotion_refused", "test_span_looked_at", "model_retired", "model_promoted",
    ]  # fmt: skip
    assert read_events(models, REGISTRY)[-1].detail["evidence"]["forced"] is True


def test_span_stays_used_when_its_champion_is_gone(models: Database) -> None:
    promote(models, "a", GOOD, now=NOW)
    retire_model(models, "a", NOW)
    with pytest.raises(PromotionRefusedError, match="promoted a on 2025-07-01"):
        promote(models, "b", GOOD, now=NOW)
    assert promote(models, "b", GOOD, force=True, now=NOW) is None


def test_force_lifts_no_other_condition(models: Database) -> None:
    weak = Evidence(False, "no certificate", SPAN, replace(RIDGE, gain=replace(CLEAR, lower=np.nan)), None)
    with pytest.raises(PromotionRefusedError) as refused:
        promote(models, "a", weak, force=True, now=NOW)
    assert isinstance(refused.value, PerpcastError)
    assert refused.value.exit_code == 1
    assert len(refused.value.unmet) == 2
    assert read_champion(models, "regression") is None
    assert kinds(models) == ["test_span_looked_at", "promotion_refused"]
    kept = read_events(models, REGISTRY)[-1].detail
    assert kept["unmet"] == list(refused.value.unmet)
    assert kept["evidence"]["gain_over_best_baseline"]["gain"] == {"value": 0.002, "lower": None, "upper": 0.0035}


def test_unknown_model_leaves_no_event(models: Database) -> None:
    with pytest.raises(MissingInputError, match="no model nobody"):
        promote(models, "nobody", GOOD, now=NOW)
    assert kinds(models) == []
