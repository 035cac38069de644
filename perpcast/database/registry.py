"""The registry of models: which one trades for each kind of task, how it came to that, and every look at a test span.

One transaction at a time changes it, and each step leaves an event of the run `REGISTRY`:

model_promoted          became champion, with its evidence
model_retired           is champion no longer, or will not be again; the reason says why
model_rolled_back       is champion again, in place of the one after it
promotion_refused       did not become champion, with the conditions that it lacked
test_span_looked_at     something was scored on a test span, and what for
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Engine, select, update

from perpcast.database.journal import EventRecord, append_event, lock_events, read_events
from perpcast.database.models import REGISTRY, ModelRecord, read_models
from perpcast.database.schema import events, model_metadata
from perpcast.errors import MissingInputError, PerpcastError


def read_champion(engine: Engine, task_kind: str) -> ModelRecord | None:
    """The champion of a kind of task, None where there is none."""
    return next((model for model in read_models(engine, "champion") if model.task_kind == task_kind), None)


def read_previous_champion(engine: Engine, task_kind: str) -> ModelRecord:
    """The model that `rollback` would make champion again. Raises MissingInputError where there is none."""
    with engine.connect() as connection:
        previous = _previous_champion(connection, task_kind)
    return next(model for model in read_models(engine) if model.model_id == previous)


def promote_model(
    engine: Engine, model_id: str, *, over: str | None, first_ms: int, last_ms: int, evidence: Mapping[str, Any],
    now: datetime,
) -> None:  # fmt: skip
    """Makes a model the champion of its kind of task, and retires the one before.

    `over` is the champion that the evidence holds it against, `first_ms` to `last_ms` the signal bars of the test span
    that the evidence comes from. Whether the evidence suffices is for `training.promotion` to say. Raises
    MissingInputError where there is no such model, PerpcastError where the champion is another one by now.
    """
    with engine.begin() as connection:
        lock_events(connection, REGISTRY)
        task_kind = _task_kind(connection, model_id)
        champion = _champion(connection, task_kind)
        if champion != over:
            raise PerpcastError(
                f"the champion of {task_kind} is {champion or 'nobody'} by now, the evidence holds {model_id} against "
                f"{over or 'nobody'}; run the same command again"
            )
        detail = {"over": over, "first_ms": first_ms, "last_ms": last_ms, "evidence": dict(evidence)}
        _replace_champion(connection, task_kind, model_id, "superseded", now)
        _append(connection, now, "model_promoted", model_id, task_kind, detail)


def rollback(engine: Engine, task_kind: str, now: datetime) -> str:
    """Makes the champion before this one champion again, and retires this one; returns the id of the champion.

    Again and again it goes back through all champions; one that was retired by hand is left out. Raises
    MissingInputError where none is left.
    """
    with engine.begin() as connection:
        lock_events(connection, REGISTRY)
        previous = _previous_champion(connection, task_kind)
        champion = _champion(connection, task_kind)
        _replace_champion(connection, task_kind, previous, "rolled back", now)
        _append(connection, now, "model_rolled_back", previous, task_kind, {"in_place_of": champion})
    return previous


def retire_model(engine: Engine, model_id: str, now: datetime) -> None:
    """Takes a model out of use: no session chooses it, no rollback goes back to it.

    A champion leaves its place empty. Raises MissingInputError where there is no such model.
    """
    with engine.begin() as connection:
        lock_events(connection, REGISTRY)
        task_kind = _task_kind(connection, model_id)
        _set_state(connection, model_id, "retired")
        _append(connection, now, "model_retired", model_id, task_kind, {"reason": "by hand"})


def record_refusal(
    engine: Engine, model_id: str, unmet: Sequence[str], evidence: Mapping[str, Any], now: datetime
) -> None:
    """Keeps that a model was not promoted, and why. Raises MissingInputError where there is no such model."""
    with engine.begin() as connection:
        task_kind = _task_kind(connection, model_id)
        detail = {"unmet": list(unmet), "evidence": dict(evidence)}
        _append(connection, now, "promotion_refused", model_id, task_kind, detail)


def record_look(
    engine: Engine, dataset_fingerprint: str, first_ms: int, last_ms: int, model_id: str, purpose: str, now: datetime
) -> None:
    """Keeps that a model was scored on a test span, the signal bars from `first_ms` to `last_ms`, both included."""
    detail = {
        "model_id": model_id,
        "dataset_fingerprint": dataset_fingerprint,
        "first_ms": first_ms,
        "last_ms": last_ms,
        "purpose": purpose,
    }
    with engine.begin() as connection:
        append_event(connection, REGISTRY, now, "test_span_looked_at", detail)


def count_looks(engine: Engine, first_ms: int, last_ms: int) -> int:
    """How often any test span was looked at that shares a bar with `first_ms` to `last_ms`."""
    return len(_on_span(engine, "test_span_looked_at", first_ms, last_ms))


def promotions_on(engine: Engine, first_ms: int, last_ms: int) -> list[EventRecord]:
    """The promotions whose test span shares a bar with `first_ms` to `last_ms`, oldest first, of all kinds of task."""
    return _on_span(engine, "model_promoted", first_ms, last_ms)


def _on_span(engine: Engine, kind: str, first_ms: int, last_ms: int) -> list[EventRecord]:
    return [
        event
        for event in read_events(engine, REGISTRY)
        if event.kind == kind and event.detail["first_ms"] <= last_ms and event.detail["last_ms"] >= first_ms
    ]


def _previous_champion(connection: Connection, task_kind: str) -> str:
    former = _champions(connection, task_kind)
    champion = _champion(connection, task_kind)
    if former and former[-1] == champion:
        former.pop()
    if not former:
        raise MissingInputError(
            f"{task_kind} has no champion before {champion or 'this'} to go back to; "
            "promote another model: python model_registry.py promote MODEL_ID"
        )
    return former[-1]


def _champions(connection: Connection, task_kind: str) -> list[str]:
    """The champions that could be gone back to, oldest first, the present one last: the events played again."""
    query = select(events.c.kind, events.c.detail).where(events.c.run == REGISTRY).order_by(events.c.number)
    champions: list[str] = []
    for kind, detail in connection.execute(query):
        if detail.get("task_kind") != task_kind:
            continue
        model_id = detail["model_id"]
        if kind == "model_promoted":
            champions.append(model_id)
        elif kind == "model_rolled_back":
            while champions[-1] != model_id:
                champions.pop()
        elif kind == "model_retired" and detail["reason"] in ("by hand", "trained again"):
            champions = [each for each in champions if each != model_id]
    return champions


def _replace_champion(connection: Connection, task_kind: str, model_id: str, reason: str, now: datetime) -> None:
    """The old one first: at no moment are there two."""
    champion = _champion(connection, task_kind)
    if champion is not None:
        _set_state(connection, champion, "retired")
        _append(connection, now, "model_retired", champion, task_kind, {"reason": reason, "successor": model_id})
    _set_state(connection, model_id, "champion")


def _champion(connection: Connection, task_kind: str) -> str | None:
    table = model_metadata
    query = select(table.c.model_id).where(table.c.task_kind == task_kind, table.c.state == "champion")
    return connection.execute(query).scalar_one_or_none()


def _task_kind(connection: Connection, model_id: str) -> str:
    query = select(model_metadata.c.task_kind).where(model_metadata.c.model_id == model_id)
    task_kind = connection.execute(query).scalar_one_or_none()
    if task_kind is None:
        raise MissingInputError(f"no model {model_id} in model_metadata; python model_registry.py list shows them all")
    return task_kind


def _set_state(connection: Connection, model_id: str, state: str) -> None:
    connection.execute(update(model_metadata).where(model_metadata.c.model_id == model_id).values(state=state))


def _append(
    connection: Connection, now: datetime, kind: str, model_id: str, task_kind: str, detail: Mapping[str, Any]
) -> None:
    append_event(connection, REGISTRY, now, kind, {"model_id": model_id, "task_kind": task_kind, **detail})
