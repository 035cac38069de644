"""Checks a running Metabase against the dashboard files: that everything is there, as written, and answers.

Run: python -m metabase smoke. Reads what `python -m metabase provision` reads; writes nothing, anywhere. It is what a
person runs once on his own machine: the rest of this program was tested against a stand-in of Metabase alone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import click

from metabase.api import DEFAULT_URL, Metabase, MetabaseError, part
from metabase.provision import (
    FILTER_TYPES,
    Lists,
    Managed,
    account_of,
    dashboard_content,
    managed,
    managed_collection,
    open_metabase,
    placements,
)
from metabase.questions import Dashboard, Filter, Question, load_dashboards
from perpcast.command_line import open_database, progress_bar, show_table, stage
from perpcast.config import Settings
from perpcast.database import read_filter_values
from perpcast.errors import MissingInputError, PerpcastError

EXAMPLES = """
\b
Examples:
  python -m metabase smoke                               after `python -m metabase provision`
  python -m metabase smoke --url http://localhost:3000   an instance of your own
"""

_A_DAY = "2024-01-01"


@dataclass(frozen=True)
class Check:
    """Something that was looked at; `complaint` is None where it is as it should be."""

    what: str
    found: str
    complaint: str | None = None


@click.command(epilog=EXAMPLES)
@click.option("--url", default=DEFAULT_URL, show_default=True, help="Where Metabase listens.")
@stage
def main(settings: Settings, url: str) -> None:
    """Check that Metabase holds every question and dashboard as written, and that each answers."""
    dashboards = load_dashboards()
    account = account_of(settings)
    with open_database(settings) as engine:
        lists = read_filter_values(engine)
    metabase = open_metabase(url, account, wait_seconds=0)
    with progress_bar("looked at") as on_progress:
        checks = check_instance(metabase, dashboards, lists, on_progress)
    show_table(["", "found"], [[check.what, check.found if check.complaint is None else "WRONG"] for check in checks])
    wrong = [check for check in checks if check.complaint is not None]
    for check in wrong:
        click.echo(f"{check.what}: {check.complaint}", err=True)
    if wrong:
        raise PerpcastError(
            f"{len(wrong)} of {len(checks)} checks fail; run `python -m metabase provision`, then again"
        )
    click.echo(f"all {len(checks)} checks hold")


def check_instance(
    metabase: Metabase, dashboards: Sequence[Dashboard], lists: Lists, on_progress: Callable[[int, int], None]
) -> list[Check]:
    """Looks at every question, then at every dashboard. Raises MissingInputError before the first provisioning."""
    collection = managed_collection(metabase)
    if collection is None:
        raise MissingInputError(f"{metabase.url} holds nothing of ours; run: python -m metabase provision")
    cards = managed("card", metabase.items(collection.id, "card"))
    pages = managed("dashboard", metabase.items(collection.id, "dashboard"))
    questions = [question for dashboard in dashboards for question in dashboard.questions]
    total = len(questions) + len(dashboards)
    checks = []
    for question in questions:
        checks.append(_check_question(metabase, question, cards.get(question.key)))
        on_progress(len(checks), total)
    numbers = {key: card.id for key, card in cards.items()}
    for dashboard in dashboards:
        checks.append(_check_dashboard(metabase, dashboard, pages.get(dashboard.key), numbers, lists))
        on_progress(len(checks), total)
    return checks


def _check_question(metabase: Metabase, question: Question, card: Managed | None) -> Check:
    """It holds our SQL and its variables, and answers in the columns that we declare."""
    what = f"question {question.key}"
    if card is None:
        return Check(what, "", "is not there")
    try:
        held = metabase.get(f"/api/card/{card.id}", **{"legacy-mbql": "true"})
        native = part(part(held, "dataset_query"), "native")
        if part(native, "query") != question.sql or set(native.get("template-tags") or {}) != set(question.tags):
            return Check(what, "", "holds other SQL than its file")
        answer = metabase.query(f"/api/card/{card.id}/query", {"parameters": []})
    except MetabaseError as error:
        return Check(what, "", str(error))
    if answer.columns != question.columns:
        return Check(what, "", f"expected the columns {list(question.columns)}, received {list(answer.columns)}")
    return Check(what, f"{answer.rows} rows")


def _check_dashboard(
    metabase: Metabase, dashboard: Dashboard, page: Managed | None, cards: Mapping[str, int], lists: Lists
) -> Check:
    """It holds our tiles in their places, and each of them answers when every filter is set."""
    what = f"dashboard {dashboard.key}"
    missing = [question.key for question in dashboard.questions if question.key not in cards]
    if page is None or missing:
        return Check(what, "", "is not there" if page is None else f"its questions are not there: {missing}")
    try:
        tiles = part(metabase.get(f"/api/dashboard/{page.id}"), "dashcards")
        expected = dashboard_content(dashboard, cards, lists, 0)["dashcards"]
        if placements(tiles) != placements(expected):
            return Check(what, "", f"expected {len(expected)} tiles, found {len(tiles)}, or in other places")
        for complaint in _ask_tiles(metabase, dashboard, page.id, tiles, cards, lists):
            return Check(what, "", complaint)
    except MetabaseError as error:
        return Check(what, "", str(error))
    return Check(what, f"{len(tiles)} tiles")


def _ask_tiles(
    metabase: Metabase,
    dashboard: Dashboard,
    number: int,
    tiles: Sequence[Mapping[str, Any]],
    cards: Mapping[str, int],
    lists: Lists,
) -> Iterator[str]:
    """What is wrong with its tiles when a reader sets all the filters."""
    of_card = {tile["card_id"]: tile for tile in tiles}
    for question in dashboard.questions:
        tile = of_card[cards[question.key]]
        reached = {mapping["parameter_id"] for mapping in tile.get("parameter_mappings") or []}
        if reached != set(question.tags):
            yield f"{question.key}: takes the filters {sorted(question.tags)}, reached by {sorted(reached)}"
        chosen = [_chosen(each, lists) for each in dashboard.filters if each.key in question.tags]
        path = f"/api/dashboard/{number}/dashcard/{tile['id']}/card/{tile['card_id']}/query"
        try:
            metabase.query(path, {"parameters": chosen})
        except MetabaseError as error:
            yield f"{question.key} with {', '.join(question.tags)} set: {error}"


def _chosen(each: Filter, lists: Lists) -> dict[str, Any]:
    """A filter as a reader's browser sends it."""
    values = each.values or lists.get(each.source or "") or ["BTCUSDT"]
    value: Any = {"text": [values[0]], "number": [1], "date": _A_DAY}[each.kind]
    target = ["variable", ["template-tag", each.key]]
    return {"id": each.key, "type": FILTER_TYPES[each.kind], "value": value, "target": target}


if __name__ == "__main__":
    main()
