"""The registry of models: one champion for each kind of task, the way back, and an event for each step."""

import threading
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError, StatementError

from perpcast.database import (
    REGISTRY,
    Database,
    ModelRecord,
    count_looks,
    promote_model,
    promotions_on,
    read_champion,
    read_events,
    read_models,
    read_previous_champion,
    record_look,
    record_refusal,
    retire_model,
    rollback,
    upsert_model,
)
from perpcast.errors import MissingInputError, PerpcastError

NOW = datetime(2025, 7, 1, 12, tzinfo=UTC)
HOUR_MS = 3_600_000


def model(model_id: str, kind: str = "regression", sha256: str = "00") -> ModelRecord:
    return ModelRecord(
        model_id=model_id,
        created_at=NOW,
        task={"targets": [{"name": "buy", "kind": kind}, {"name": "sell", "kind": kind}]},
        architecture="tft",
        parameters={},
        dataset_id="d1",
        dataset_fingerprint="abc",
        metrics={},
        baselines={},
        bundle_path=f"trained_model/{model_id}",
        bundle_sha256=sha256,
    )


def promote(database: Database, model_id: str, kind: str = "regression", first_ms: int = 0, last_ms: int = 9) -> None:
    """Over whatever is the champion."""
    champion = read_champion(database, kind)
    promote_model(
        database,
        model_id,
        over=champion.model_id if champion else None,
        first_ms=first_ms,
        last_ms=last_ms,
        evidence={"gain": 0.001},
        now=NOW,
    )


def states(database: Database) -> dict[str, str]:
    return {each.model_id: each.state for each in read_models(database)}


def steps(database: Database) -> list[str]:
    """The events, a word or two each; fails where their numbers have a hole."""
    found = read_events(database, REGISTRY)
    assert [event.number for event in found] == list(range(len(found)))
    return [f"{event.kind} {event.detail['model_id']} {event.detail.get('reason', '')}".strip() for event in found]


@pytest.fixture
def models(database: Database) -> Database:
    """A database with the candidates a, b and c, and z of the other kind."""
    for model_id in "abc":
        upsert_model(database, model(model_id))
    upsert_model(database, model("z", "classification"))
    return database


def test_promotion_retires_the_champion_before_of_its_own_kind_only(models: Database) -> None:
    promote(models, "a")
    promote(models, "z", "classification")
    promote(models, "b")
    assert states(models) == {"a": "retired", "b": "champion", "c": "candidate", "z": "champion"}
    champion = read_champion(models, "regression")
    assert champion is not None
    assert (champion.model_id, champion.task_kind) == ("b", "regression")
    assert steps(models) == [
        "model_promoted a", "model_promoted z", "model_retired a superseded", "model_promoted b",
    ]  # fmt: skip
    promoted = read_events(models, REGISTRY)[-1]
    assert promoted.time == NOW
    assert promoted.detail == {
        "model_id": "b", "task_kind": "regression", "over": "a", "first_ms": 0, "last_ms": 9,
        "evidence": {"gain": 0.001},
    }  # fmt: skip


def test_second_champion_of_a_kind_is_refused_by_the_database_itself(models: Database) -> None:
    promote(models, "a")
    with pytest.raises(IntegrityError, match="one_champion"), models.begin() as connection:
        connection.execute(text("UPDATE model_metadata SET state = 'champion' WHERE model_id = 'b'"))
    with models.begin() as connection:
        connection.execute(text("UPDATE model_metadata SET state = 'champion' WHERE model_id = 'z'"))


def test_model_of_no_kind_is_refused_by_the_database_itself(database: Database) -> None:
    """Else it would be nobody's rival."""
    nameless = ModelRecord(**{**vars(model("a")), "task": {"lookback": 60}})
    with pytest.raises(IntegrityError, match="task_kind"):
        upsert_model(database, nameless)


def test_promotion_that_fails_half_way_changes_nothing(models: Database) -> None:
    promote(models, "a")
    with pytest.raises(StatementError, match="not JSON serializable"):
        promote_model(models, "b", over="a", first_ms=0, last_ms=9, evidence={"what": object()}, now=NOW)
    assert states(models) == {"a": "champion", "b": "candidate", "c": "candidate", "z": "candidate"}
    assert steps(models) == ["model_promoted a"]


def test_promotion_against_a_champion_of_yesterday_is_refused(models: Database) -> None:
    promote(models, "a")
    for over, told in ((None, "nobody"), ("c", "c")):
        with pytest.raises(PerpcastError, match=f"champion of regression is a by now, .* holds b against {told}; run"):
            promote_model(models, "b", over=over, first_ms=0, last_ms=9, evidence={}, now=NOW)
    assert states(models)["a"] == "champion"
    with pytest.raises(PerpcastError, match="the champion of classification is nobody by now"):
        promote_model(models, "z", over="a", first_ms=0, last_ms=9, evidence={}, now=NOW)


def test_of_many_promotions_at_once_one_wins(models: Database) -> None:
    outcomes: Counter[str] = Counter()

    def try_it(model_id: str) -> None:
        try:
            promote_model(models, model_id, over=None, first_ms=0, last_ms=9, evidence={}, now=NOW)
            outcomes["promoted"] += 1
        except PerpcastError:
            outcomes["refused"] += 1

    threads = [threading.Thread(target=try_it, args=(model_id,)) for model_id in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes == {"promoted": 1, "refused": 2}
    assert Counter(states(models).values()) == {"champion": 1, "candidate": 3}


def test_events_of_many_writers_have_no_hole_and_no_number_twice(models: Database) -> None:
    def look() -> None:
        for _ in range(5):
            record_look(models, "abc", 0, HOUR_MS, "a", "training", NOW)

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert steps(models) == ["test_span_looked_at a"] * 20
    assert count_looks(models, 0, 0) == 20


# What is done, one letter a model: lower case promotes, "<" rolls back, "-x" retires x, "+x" trains x again; then the
# champion, and those that further rollbacks lead to.
HISTORIES = [
    ("a", "a", ""),
    ("ab", "b", "a"),
    ("abc", "c", "ba"),
    ("abc<", "b", "a"),
    ("abc<<", "a", ""),
    ("ab<c", "c", "a"),  # b was left behind
    ("aba", "a", "ba"),
    ("aba<", "b", "a"),
    ("abc-b", "c", "a"),
    ("abc-c", None, "ba"),
    ("abc-c<", "b", "a"),
    ("ab-b<-a", None, ""),
    ("ab+b", None, "a"),  # its bundle is another one now
    ("ab+a", "b", ""),
    ("ab+aa", "a", "b"),
]


def play(database: Database, history: str) -> None:
    letters = iter(history)
    for letter in letters:
        if letter == "<":
            rollback(database, "regression", NOW)
        elif letter == "-":
            retire_model(database, next(letters), NOW)
        elif letter == "+":
            upsert_model(database, model(next(letters), sha256="11"))
        else:
            promote(database, letter)


@pytest.mark.parametrize(("history", "champion", "way_back"), HISTORIES)
def test_rollback_goes_back_through_the_champions(
    models: Database, history: str, champion: str | None, way_back: str
) -> None:
    play(models, history)
    found = read_champion(models, "regression")
    assert (found and found.model_id) == champion
    for previous in way_back:
        assert read_previous_champion(models, "regression").model_id == previous
        assert rollback(models, "regression", NOW) == previous
        assert states(models)[previous] == "champion"
        assert list(states(models).values()).count("champion") == 1
    before = states(models)
    for attempt in (lambda: rollback(models, "regression", NOW), lambda: read_previous_champion(models, "regression")):
        with pytest.raises(MissingInputError, match="regression has no champion before .* promote MODEL_ID"):
            attempt()
    assert states(models) == before


class Reference:
    """The registry of one kind in a few lines: the champions that there is a way back to, and the one of now."""

    def __init__(self) -> None:
        self.former: list[str] = []
        self.champion: str | None = None

    def promote(self, model_id: str) -> None:
        self.former += [self.champion] if self.champion else []
        self.champion = model_id

    def rollback(self) -> bool:
        if not self.former:
            return False
        self.champion = self.former.pop()
        return True

    def retire(self, model_id: str) -> None:
        self.former = [each for each in self.former if each != model_id]
        self.champion = None if self.champion == model_id else self.champion


STEPS = st.lists(st.tuples(st.sampled_from(["promote", "rollback", "retire"]), st.sampled_from("abc")), max_size=10)


@given(STEPS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
def test_any_history_ends_as_the_reference_says(models: Database, history: Sequence[tuple[str, str]]) -> None:
    with models.begin() as connection:
        connection.execute(text("DELETE FROM events"))
        connection.execute(text("UPDATE model_metadata SET state = 'candidate'"))
    reference = Reference()
    for step, model_id in history:
        if step == "retire":
            reference.retire(model_id)
            retire_model(models, model_id, NOW)
        elif step == "rollback":
            if reference.rollback():
                rollback(models, "regression", NOW)
        elif model_id != reference.champion:
            reference.promote(model_id)
            promote(models, model_id)
    found = read_models(models, "champion")
    assert [each.model_id for each in found] == ([reference.champion] if reference.champion else [])
    assert not {"champion"} & {state for name, state in states(models).items() if name != reference.champion}


def test_every_step_back_and_aside_leaves_its_event(models: Database) -> None:
    play(models, "ab<-a")
    assert steps(models) == [
        "model_promoted a",
        "model_retired a superseded",
        "model_promoted b",
        "model_retired b rolled back",
        "model_rolled_back a",
        "model_retired a by hand",
    ]
    assert read_events(models, REGISTRY)[4].detail["in_place_of"] == "b"


def test_training_again_keeps_the_state_of_the_same_bundle_only(models: Database) -> None:
    promote(models, "a")
    upsert_model(models, model("a"))
    assert (states(models)["a"], len(steps(models))) == ("champion", 1)
    later = ModelRecord(**{**vars(model("a", sha256="11")), "created_at": NOW + timedelta(days=1)})
    upsert_model(models, later)
    assert states(models)["a"] == "candidate"
    assert steps(models)[1:] == ["model_retired a trained again"]
    assert read_events(models, REGISTRY)[1].time == later.created_at
    upsert_model(models, model("a", sha256="22"))
    assert len(steps(models)) == 2, "a candidate has nothing to lose"


def test_new_model_is_a_candidate_whatever_it_says(database: Database) -> None:
    upsert_model(database, ModelRecord(**{**vars(model("a")), "state": "champion"}))
    assert states(database) == {"a": "candidate"}


def test_unknown_model_is_told_where_to_look(models: Database) -> None:
    for attempt in (
        lambda: promote(models, "nobody"),
        lambda: retire_model(models, "nobody", NOW),
        lambda: record_refusal(models, "nobody", ["evidence"], {}, NOW),
    ):
        with pytest.raises(
            MissingInputError, match=r"no model nobody in model_metadata; python model_registry\.py list"
        ):
            attempt()
    assert steps(models) == []


def test_refusal_is_kept_with_its_reasons(models: Database) -> None:
    record_refusal(models, "a", ["a certificate"], {"gain": float("nan")}, NOW)
    (event,) = read_events(models, REGISTRY)
    assert event.kind == "promotion_refused"
    assert event.detail == {
        "model_id": "a", "task_kind": "regression", "unmet": ["a certificate"], "evidence": {"gain": None},
    }  # fmt: skip


# Looks at [10, 20] and [20, 30], promotions on the same.
@pytest.mark.parametrize(
    ("first", "last", "shared"), [(0, 9, 0), (0, 10, 1), (20, 20, 2), (0, 99, 2), (21, 25, 1), (31, 99, 0), (12, 13, 1)]
)
def test_looks_and_promotions_count_where_the_spans_share_a_bar(
    models: Database, first: int, last: int, shared: int
) -> None:
    for model_id, begin in (("a", 10), ("b", 20)):
        record_look(models, "abc", begin, begin + 10, model_id, "training", NOW)
        promote(models, model_id, first_ms=begin, last_ms=begin + 10)
    assert count_looks(models, first, last) == shared
    assert len(promotions_on(models, first, last)) == shared


def test_look_keeps_what_was_looked_at_and_why(models: Database) -> None:
    record_look(models, "abc", 10, 20, "a", "training", NOW)
    (event,) = read_events(models, REGISTRY)
    assert (event.kind, event.time) == ("test_span_looked_at", NOW)
    assert event.detail == {
        "model_id": "a", "dataset_fingerprint": "abc", "first_ms": 10, "last_ms": 20, "purpose": "training",
    }  # fmt: skip
