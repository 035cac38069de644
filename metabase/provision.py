"""Brings a Metabase instance to what the dashboard files say: connection, collection, questions, dashboards.

Run: python -m metabase provision. Reads `config.yaml`, `metabase/dashboards`, `metabase/.env` (who logs in) and, from
the database, the lists of the filters; writes into the instance alone. A second run changes nothing.

What is ours bears a mark in its description, with its own number: a copy that somebody made keeps the number of its
original, so it is his. Dashboards are ours as a whole; whatever bears no mark of ours is left alone.
"""

import hashlib
import json
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal
from uuid import NAMESPACE_OID, uuid5

import click

from metabase.api import (
    DEFAULT_URL,
    Account,
    Answer,
    Metabase,
    MetabaseError,
    QuestionError,
    part,
    version_of,
    version_warning,
)
from metabase.questions import Dashboard, Filter, Question, Text, load_dashboards
from perpcast.command_line import notice, open_database, progress_bar, secret, show_table, stage
from perpcast.config import Settings
from perpcast.database import DatabaseAddress, exclusive, read_filter_values
from perpcast.database.bi import BI_ROLE
from perpcast.errors import ConfigError, PerpcastError, SetupError

NAME = "Perpcast"  # of the connection and of the collection
FILTER_TYPES = {"text": "string/=", "number": "number/=", "date": "date/single"}

Kind = Literal["collection", "card", "dashboard"]
Lists = Mapping[str, Sequence[str]]  # the values of filters that are read from the database, by their source

_WORDS = {"collection": "collection", "card": "question", "dashboard": "dashboard"}
_MARK = re.compile(r"managed-by: perpcast key=(\w+)(?: id=(\d+) hash=([0-9a-f]+))?")


# --- what there is to be ---------------------------------------------------------------------------------------------


def card_content(question: Question, filters: Sequence[Filter], database: int, collection: int) -> dict[str, Any]:
    """A question as POST and PUT of a card take it, without its mark."""
    tags = {
        each.key: {
            "id": str(uuid5(NAMESPACE_OID, f"perpcast/{question.key}/{each.key}")),
            "name": each.key,
            "display-name": each.name,
            "type": each.kind,
        }
        for each in filters
        if each.key in question.tags
    }
    native = {"query": question.sql, "template-tags": tags}
    return {
        "name": question.name,
        "description": question.description,
        "display": question.display,
        "visualization_settings": dict(question.settings),
        "dataset_query": {"type": "native", "database": database, "native": native},
        "collection_id": collection,
    }


def dashboard_content(dashboard: Dashboard, cards: Mapping[str, int], lists: Lists, collection: int) -> dict[str, Any]:
    """A dashboard as PUT takes it, without its mark and the numbers of its tiles; `cards` by the questions' keys."""
    return {
        "name": dashboard.name,
        "description": dashboard.description,
        "parameters": [_parameter(each, lists) for each in dashboard.filters],
        "dashcards": [_question_tile(question, cards[question.key]) for question in dashboard.questions]
        + [_text_tile(text) for text in dashboard.texts],
        "width": "full",
        "collection_id": collection,
    }


def _parameter(each: Filter, lists: Lists) -> dict[str, Any]:
    kind = FILTER_TYPES[each.kind]
    parameter: dict[str, Any] = {"id": each.key, "slug": each.key, "name": each.name}
    parameter |= {"type": kind, "sectionId": kind.partition("/")[0]}
    if each.kind == "text":
        parameter["isMultiSelect"] = False  # `symbol = {{symbol}}` takes one
    values = each.values or lists.get(each.source or "")
    if values:  # Metabase has no empty list: without one, the value is typed in
        config = {"values": [[value] for value in values]}
        parameter |= {
            "values_source_type": "static-list",
            "values_source_config": config,
            "values_query_type": "list",
        }
    return parameter


def _question_tile(question: Question, card: int) -> dict[str, Any]:
    """Every filter that the question takes reaches it as the variable of that name."""
    mappings = [
        {"parameter_id": tag, "card_id": card, "target": ["variable", ["template-tag", tag]]} for tag in question.tags
    ]
    return {"card_id": card, **_place(question), "parameter_mappings": mappings, "visualization_settings": {}}


def _text_tile(text: Text) -> dict[str, Any]:
    display = "heading" if text.heading else "text"
    empty: dict[str, Any] = {"name": None, "dataset_query": {}, "archived": False, "visualization_settings": {}}
    settings = {"virtual_card": {"display": display, **empty}, "text": text.text}
    return {"card_id": None, **_place(text), "parameter_mappings": [], "visualization_settings": settings}


def _place(tile: Question | Text) -> dict[str, int]:
    return {"row": tile.row, "col": tile.col, "size_x": tile.width, "size_y": tile.height}


# --- what is there ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Managed:
    """Something of ours in the instance; `digest` is that of the content last written, None while it is unfinished."""

    id: int
    key: str
    name: str
    digest: str | None


def managed(kind: Kind, items: Iterable[Mapping[str, Any]]) -> dict[str, Managed]:
    """What of these items is ours, by key. Raises SetupError where two claim to be the same."""
    ours: dict[str, list[Managed]] = defaultdict(list)
    for item in items:
        mark = _MARK.search(item.get("description") or "")
        if mark is not None and mark[2] in (None, str(item["id"])):
            ours[mark[1]].append(Managed(item["id"], mark[1], item["name"], mark[3]))
    for key, alike in ours.items():
        if len(alike) > 1:
            numbers = " and ".join(str(one.id) for one in alike)
            raise SetupError(
                f"Metabase holds the {_WORDS[kind]} {key} more than once, as numbers {numbers}: move all but one into "
                "its trash, then run the command again"
            )
    return {key: alike[0] for key, alike in ours.items()}


def managed_collection(metabase: Metabase) -> Managed | None:
    """Our collection, wherever it lies and whatever it is called; None where there is none."""
    return managed("collection", metabase.collections()).get("collection")


def placements(tiles: Iterable[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """What lies where on a dashboard, in a comparable order."""
    names = ("dashboard_tab_id", "row", "col", "size_x", "size_y", "card_id")
    return sorted(tuple(tile.get(name) or 0 for name in names) for tile in tiles)


def digest(content: Mapping[str, Any]) -> str:
    """Names a content; equal where nothing has to be written."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _marked(content: Mapping[str, Any], key: str, number: int | None = None) -> dict[str, Any]:
    """The content with its mark; without a number it is unfinished: what a copy of it is, nobody could tell."""
    finished = "" if number is None else f" id={number} hash={digest(content)}"
    return {**content, "description": f"{content['description']}\n\nmanaged-by: perpcast key={key}{finished}"}


# --- from one to the other -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What provisioning did: `changes` counts by what and how; the numbers of `cards` and `dashboards` by key."""

    changes: Counter[tuple[str, str]]
    cards: Mapping[str, int]
    dashboards: Mapping[str, int]


class Provisioning:
    """One pass over an instance; `tell` hears what a person should know. Each step is safe to do again."""

    def __init__(self, metabase: Metabase, tell: Callable[[str], None]) -> None:
        self._metabase = metabase
        self._tell = tell
        self._changes: Counter[tuple[str, str]] = Counter()

    def run(self, dashboards: Sequence[Dashboard], lists: Lists, address: DatabaseAddress) -> Outcome:
        """Creates and updates what differs, then archives what is ours and left the files.

        Questions come before the dashboards that show them, and leave after them. Raises SetupError, MetabaseError.
        """
        database = self._bring_database(address)
        collection = self._bring_collection()
        old_cards = managed("card", self._metabase.items(collection, "card"))
        old_dashboards = managed("dashboard", self._metabase.items(collection, "dashboard"))
        cards = {
            question.key: self._bring_card(
                question.key,
                card_content(question, dashboard.filters, database, collection),
                old_cards.pop(question.key, None),
            )
            for dashboard in dashboards
            for question in dashboard.questions
        }
        ours = {*cards.values(), *(card.id for card in old_cards.values())}
        numbers = {
            dashboard.key: self._bring_dashboard(
                dashboard.key,
                dashboard_content(dashboard, cards, lists, collection),
                old_dashboards.pop(dashboard.key, None),
                ours,
            )
            for dashboard in dashboards
        }
        for old in old_dashboards.values():
            self._archive("dashboard", old)
        for old in old_cards.values():
            self._archive("card", old)
        return Outcome(self._changes, cards, numbers)

    def _bring_database(self, address: DatabaseAddress) -> int:
        details = {"host": address.host, "port": address.port, "dbname": address.name, "user": address.user}
        body = {"name": NAME, "engine": "postgres", "details": {**details, "password": address.password, "ssl": False}}
        listed = part(self._metabase.get("/api/database"), "data")
        alike = [each["id"] for each in listed if (each["engine"], each["name"]) == ("postgres", NAME)]
        if len(alike) > 1:
            raise SetupError(f"Metabase holds {len(alike)} connections called {NAME}; remove all but one, then go on")
        try:
            if not alike:
                created = self._metabase.post("/api/database", body | {"is_full_sync": True, "auto_run_queries": True})
                return self._count("connection", "created", part(created, "id"))
            present = part(self._metabase.get(f"/api/database/{alike[0]}"), "details")
            if all(present.get(name) == value for name, value in details.items()) and self._answers(alike[0]):
                return self._count("connection", "unchanged", alike[0])
            self._metabase.put(f"/api/database/{alike[0]}", body)
        except MetabaseError as error:
            if error.status != 400:
                raise
            raise SetupError(
                f"Metabase cannot connect to {address}: {error}; run `python init_database.py --metabase`; a container "
                "that does not share this machine's network needs METABASE_DB_HOST in metabase/.env"
            ) from None
        return self._count("connection", "updated", alike[0])

    def _answers(self, database: int) -> bool:
        """Whether the connection works: its password is never read back, so a new one shows here alone."""
        native = {"query": "SELECT 1", "template-tags": {}}
        try:
            self._metabase.query("/api/dataset", {"type": "native", "database": database, "native": native})
        except QuestionError:
            return False
        return True

    def _bring_collection(self) -> int:
        content = {
            "name": NAME,
            "description": "Market data, models and trading; made by `python -m metabase provision`.",
        }
        present = managed_collection(self._metabase)
        if present is None:
            created = self._metabase.post("/api/collection", _marked(content, "collection") | {"parent_id": None})
            return self._count("collection", "created", part(created, "id"))
        return self._count("collection", "unchanged", present.id)

    def _bring_card(self, key: str, content: dict[str, Any], present: Managed | None) -> int:
        if present is None:
            number = part(self._metabase.post("/api/card", _marked(content, key)), "id")
        else:
            number = present.id
            if (present.digest, present.name) == (digest(content), content["name"]):
                return self._count("card", "unchanged", number)
        self._metabase.put(f"/api/card/{number}", _marked(content, key, number))
        return self._count("card", "created" if present is None else "updated", number)

    def _bring_dashboard(self, key: str, content: dict[str, Any], present: Managed | None, ours: set[int]) -> int:
        """A dashboard is written whole, all of its tiles and no tabs, in one request: half of one is never seen."""
        if present is None:
            shell = {name: _marked(content, key)[name] for name in ("name", "description", "collection_id")}
            number = part(self._metabase.post("/api/dashboard", shell), "id")
            tiles = []
        else:
            number = present.id
            tiles = part(self._metabase.get(f"/api/dashboard/{number}"), "dashcards")
            same = (present.digest, present.name) == (digest(content), content["name"])
            if same and placements(tiles) == placements(content["dashcards"]):
                return self._count("dashboard", "unchanged", number)
        foreign = sum(tile.get("card_id") is not None and tile["card_id"] not in ours for tile in tiles)
        if foreign:
            self._tell(
                f"dashboard {content['name']}: {foreign} tiles of others are taken off; put yours on a duplicate of it"
            )
        body = _marked(content, key, number) | {"dashcards": _numbered(content["dashcards"], tiles)}
        self._metabase.put(f"/api/dashboard/{number}", body)
        written = part(self._metabase.get(f"/api/dashboard/{number}"), "dashcards")
        if placements(written) != placements(content["dashcards"]):
            raise MetabaseError(
                f"dashboard {content['name']}: wrote {len(content['dashcards'])} tiles, read back {len(written)} that "
                "differ; this version of Metabase may be one that this program does not know"
            )
        return self._count("dashboard", "created" if present is None else "updated", number)

    def _archive(self, kind: Literal["card", "dashboard"], old: Managed) -> None:
        self._metabase.put(f"/api/{kind}/{old.id}", {"archived": True})
        self._count(kind, "archived", old.id)

    def _count(self, what: str, how: str, number: int) -> int:
        self._changes[_WORDS.get(what, what), how] += 1
        return number


def _numbered(tiles: Sequence[Mapping[str, Any]], present: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The tiles with the numbers of those that show the same already; a negative number asks for a new tile."""
    free: dict[Any, list[int]] = defaultdict(list)
    for tile in present:
        free[_shown(tile)].append(tile["id"])
    return [
        {"id": free[_shown(tile)].pop() if free[_shown(tile)] else -number, **tile}
        for number, tile in enumerate(tiles, start=1)
    ]


def _shown(tile: Mapping[str, Any]) -> Any:
    return tile.get("card_id") or (tile.get("visualization_settings") or {}).get("text")


def ask_questions(
    metabase: Metabase,
    dashboards: Sequence[Dashboard],
    cards: Mapping[str, int],
    on_progress: Callable[[int, int], None],
) -> dict[str, Answer | str]:
    """Runs every question without its filters: its answer, or what is wrong with it, by key."""
    questions = [question for dashboard in dashboards for question in dashboard.questions]
    answers: dict[str, Answer | str] = {}
    for done, question in enumerate(questions, start=1):
        try:
            answer = metabase.query(f"/api/card/{cards[question.key]}/query", {"parameters": []})
            expected = f"expected the columns {', '.join(question.columns)}, received {', '.join(answer.columns)}"
            answers[question.key] = answer if answer.columns == question.columns else expected
        except QuestionError as error:
            answers[question.key] = str(error)
        on_progress(done, len(questions))
    return answers


# --- the command -----------------------------------------------------------------------------------------------------

EXAMPLES = """
\b
Examples:
  python -m metabase provision                               after `docker compose up -d` in the folder metabase
  python -m metabase provision --url http://localhost:3000   an instance of your own
"""


@click.command(epilog=EXAMPLES)
@click.option("--url", default=DEFAULT_URL, show_default=True, help="Where Metabase listens.")
@click.option(
    "--wait-seconds",
    type=click.FloatRange(min=0),
    default=300,
    show_default=True,
    help="How long to wait for an instance that is starting.",
)
@stage
def main(settings: Settings, url: str, wait_seconds: float) -> None:
    """Make connection, questions and dashboards in Metabase, or bring them up to date; safe to repeat."""
    dashboards = load_dashboards()
    account, address = account_of(settings), seen_from_metabase(settings)
    with open_database(settings) as engine:  # first: Metabase keeps its own database on that server
        metabase = open_metabase(url, account, wait_seconds)
        with exclusive(engine, "provisioning of Metabase"):
            outcome = Provisioning(metabase, notice).run(dashboards, read_filter_values(engine), address)
    _show_changes(outcome.changes)
    with progress_bar("questions asked") as on_progress:
        answers = ask_questions(metabase, dashboards, outcome.cards, on_progress)
    failed = {key: answer for key, answer in answers.items() if isinstance(answer, str)}
    for key, complaint in failed.items():
        click.echo(f"question {key}: {complaint}", err=True)
    if failed:
        raise PerpcastError(f"{len(failed)} of {len(answers)} questions do not answer; look at the lines above")
    for dashboard in dashboards:
        click.echo(f"{dashboard.name}: {metabase.url}/dashboard/{outcome.dashboards[dashboard.key]}")


def account_of(settings: Settings) -> Account:
    """Who logs in. Raises SetupError where that is not written down."""
    return Account(_needed(settings, "METABASE_ADMIN_EMAIL"), _needed(settings, "METABASE_ADMIN_PASSWORD"))


def open_metabase(url: str, account: Account, wait_seconds: float) -> Metabase:
    """An instance that is up, its version told, logged in as administrator. Raises SetupError."""
    metabase = Metabase(url)
    properties = metabase.wait_until_ready(wait_seconds, click.echo)
    version = version_of(properties)
    click.echo(f"Metabase {version} at {metabase.url}")
    warning = version_warning(version)
    if warning is not None:
        notice(warning)
    if metabase.sign_in(properties, account):
        click.echo(f"made the first user, {account.email}; the password is METABASE_ADMIN_PASSWORD in metabase/.env")
    return metabase


def seen_from_metabase(settings: Settings) -> DatabaseAddress:
    """Our database as Metabase reaches it, as the role that sees the views alone. Raises SetupError, ConfigError."""
    host = _secret(settings, "METABASE_DB_HOST") or settings.database.host
    port = _secret(settings, "METABASE_DB_PORT") or str(settings.database.port)
    if not port.isdecimal():
        raise ConfigError(f"METABASE_DB_PORT in metabase/.env: expected a port, received {port!r}")
    password = _needed(settings, "PERPCAST_BI_PASSWORD")
    return DatabaseAddress(host, int(port), settings.database.name, BI_ROLE, password)


def _secret(settings: Settings, name: str) -> str | None:
    """A secret; the folder's `.env` is the file that compose reads too."""
    return secret(settings, name, "metabase")


def _needed(settings: Settings, name: str) -> str:
    value = _secret(settings, name)
    if not value:
        raise SetupError(
            f"{name} is neither in the environment nor in {settings.path('metabase', '.env')}; run: "
            "python init_database.py --metabase"
        )
    return value


def _show_changes(changes: Mapping[tuple[str, str], int]) -> None:
    hows = ("created", "updated", "unchanged", "archived")
    whats = ("connection", "collection", "question", "dashboard")
    show_table(["", *hows], [[what, *(str(changes.get((what, how), 0)) for how in hows)] for what in whats])


if __name__ == "__main__":
    main()
