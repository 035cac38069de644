"""Provisioning against a strict stand-in of Metabase: one of each after any number of runs, however they ended."""

import os
import re
import signal
import socket
import socketserver
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg2
import pytest
import yaml
from click.testing import CliRunner, Result
from psycopg2 import sql

from metabase import provision, smoke
from metabase.api import (
    Account,
    Answer,
    Metabase,
    MetabaseError,
    OtherProgramError,
    UnreachableError,
    part,
    version_of,
    version_warning,
)
from metabase.provision import FILTER_TYPES, NAME, Outcome, Provisioning, ask_questions, digest, managed, placements
from metabase.questions import Dashboard, Filter, Question, Text, bound_sql, load_dashboards
from metabase.smoke import check_instance
from perpcast.config import load_settings
from perpcast.database import (
    DatabaseAddress,
    free_port,
    make_bi_role,
    open_engine,
    read_filter_values,
    read_question,
)
from perpcast.database.bi import BI_ROLE
from perpcast.errors import ConfigError, MissingInputError, SetupError
from tests.bi_world import filled_world
from tests.fake_metabase import FakeMetabase, substituted

ROOT = Path(__file__).parents[1]
ACCOUNT = Account("admin@localhost.localdomain", "secret2024")
LISTS = {"symbols": ["AAA", "BBB"], "models": []}

SYMBOL = Filter("symbol", "Symbol", "text", source="symbols")
SIDE = Filter("side", "Side", "text", values=("buy", "sell"))
DAY = Filter("first_day", "From", "date")
LEAST = Filter("least", "At least", "number")
MODEL = Filter("model", "Model", "text", source="models")

TRADES = """
SELECT symbol, day, value FROM (
    VALUES ('AAA', date '2024-01-01', 1), ('AAA', date '2024-01-02', 2), ('BBB', date '2024-01-02', 3)
) AS trades (symbol, day, value)
WHERE true [[AND symbol = {{symbol}}]] [[AND day >= {{first_day}}]] [[AND value >= {{least}}]]
"""


def question(key: str, query: str, columns: tuple[str, ...], tags: tuple[str, ...], row: int, **more: Any) -> Question:
    facts = {"name": key.capitalize(), "description": f"What {key} says.", "display": "table", "settings": {}}
    place = {"row": row, "col": 0, "width": 12, "height": 6}
    return Question(key=key, sql=query, columns=columns, tags=tags, **{**facts, **place, **more})


TABLE = question("trades", TRADES, ("symbol", "day", "value"), ("symbol", "first_day", "least"), 1)
COUNT = question("count", "SELECT 3 AS trades", ("trades",), (), 1, col=12, display="scalar")
SIDES = question("sides", "SELECT 'buy' AS side WHERE true [[AND 'buy' = {{side}}]]", ("side",), ("side",), 0)
NAMES = question("names", "SELECT 1 AS one WHERE true [[AND 'm' = {{model}}]]", ("one",), ("model",), 6)

TRADING = Dashboard(
    "trading", "Trading", "What was traded.", (SYMBOL, DAY, LEAST), (TABLE, COUNT), (Text("Trades", 0, 0, 24, 1, True),)
)
MODELS = Dashboard("models", "Models", "What is known.", (SIDE, MODEL), (SIDES, NAMES), (Text("*text*", 0, 12, 6, 3),))
DASHBOARDS = (TRADING, MODELS)

# The first user, connection, collection, then two requests for each of 4 questions and 2 dashboards.
FIRST_WRITES = 1 + 1 + 1 + 2 * 4 + 2 * 2


@pytest.fixture
def fake() -> Iterator[FakeMetabase]:
    with FakeMetabase() as running:
        yield running


@pytest.fixture
def address(postgres: DatabaseAddress) -> DatabaseAddress:
    return replace(postgres, name="postgres")


def signed_in(fake: FakeMetabase) -> Metabase:
    metabase = Metabase(fake.url)
    metabase.sign_in(metabase.wait_until_ready(5, print), ACCOUNT)
    return metabase


def run(
    fake: FakeMetabase,
    address: DatabaseAddress,
    dashboards: tuple[Dashboard, ...] = DASHBOARDS,
    lists: provision.Lists = LISTS,
    notes: list[str] | None = None,
) -> Outcome:
    """One provisioning, from the login on."""
    fake.writes.clear()
    tell = print if notes is None else notes.append
    return Provisioning(signed_in(fake), tell).run(dashboards, lists, address)


def names(things: list[dict[str, Any]]) -> list[str]:
    return sorted(thing["name"] for thing in things)


def assert_one_of_each(fake: FakeMetabase, outcome: Outcome) -> None:
    assert names(fake.living(fake.databases)) == [NAME]
    assert names(fake.living(fake.collections)) == [NAME]
    assert names(fake.living(fake.cards)) == ["Count", "Names", "Sides", "Trades"]
    assert names(fake.living(fake.dashboards)) == ["Models", "Trading"]
    for dashboard in DASHBOARDS:
        held = fake.dashboards[outcome.dashboards[dashboard.key]]
        assert len(held["dashcards"]) == len(dashboard.questions) + len(dashboard.texts)
        assert {tile["card_id"] for tile in held["dashcards"] if tile["card_id"]} == {
            outcome.cards[each.key] for each in dashboard.questions
        }


# --- runs that end well -----------------------------------------------------------------------------------------------


def test_provisioning_makes_one_of_each_and_a_second_run_writes_nothing(
    fake: FakeMetabase, address: DatabaseAddress
) -> None:
    first = run(fake, address)
    assert len(fake.writes) == FIRST_WRITES
    assert_one_of_each(fake, first)
    created = {("connection", "created"): 1, ("collection", "created"): 1}
    assert first.changes == created | {("question", "created"): 4, ("dashboard", "created"): 2}
    second = run(fake, address)
    assert fake.writes == []
    assert {how for _, how in second.changes} == {"unchanged"}
    assert (second.cards, second.dashboards) == (first.cards, first.dashboards)


def test_provisioning_filters_reach_the_questions_through_the_dashboard(
    fake: FakeMetabase, address: DatabaseAddress
) -> None:
    outcome = run(fake, address)
    metabase = signed_in(fake)
    number, card = outcome.dashboards["trading"], outcome.cards["trades"]
    tile = next(each for each in fake.dashboards[number]["dashcards"] if each["card_id"] == card)
    path = f"/api/dashboard/{number}/dashcard/{tile['id']}/card/{card}/query"
    kinds = {"symbol": "string/=", "first_day": "date/single", "least": "number/="}
    # Three rows: AAA 1 on the first, AAA 2 and BBB 3 on the second.
    for values, rows in (
        ({}, 3),
        ({"symbol": ["AAA"]}, 2),
        ({"first_day": "2024-01-02"}, 2),
        ({"least": [2]}, 2),
        ({"symbol": ["AAA"], "first_day": "2024-01-02"}, 1),
        ({"symbol": ["BBB"], "first_day": "2024-01-02", "least": [4]}, 0),
    ):
        chosen = [{"id": key, "type": kinds[key], "value": value} for key, value in values.items()]
        assert metabase.query(path, {"parameters": chosen}).rows == rows, values
    parameters = {each["id"]: each for each in fake.dashboards[number]["parameters"]}
    assert parameters["symbol"]["values_source_config"] == {"values": [["AAA"], ["BBB"]]}
    assert parameters["symbol"]["isMultiSelect"] is False
    models = {each["id"]: each for each in fake.dashboards[outcome.dashboards["models"]]["parameters"]}
    assert "values_source_type" not in models["model"]  # no model yet: typed in


def test_provisioning_writes_what_differs_alone(fake: FakeMetabase, address: DatabaseAddress) -> None:
    first = run(fake, address)
    trading = fake.dashboards[first.dashboards["trading"]]
    before = {tile["card_id"]: tile["id"] for tile in trading["dashcards"]}
    changed = replace(TRADING, questions=(replace(TABLE, sql=TRADES + "ORDER BY day"), replace(COUNT, width=6)))
    second = run(fake, address, (changed, MODELS))
    assert second.changes == Counter(
        {
            ("connection", "unchanged"): 1,
            ("collection", "unchanged"): 1,
            ("question", "updated"): 1,
            ("question", "unchanged"): 3,
            ("dashboard", "updated"): 1,
            ("dashboard", "unchanged"): 1,
        }
    )
    assert len(fake.writes) == 2
    trading = fake.dashboards[first.dashboards["trading"]]
    assert {tile["card_id"]: tile["id"] for tile in trading["dashcards"]} == before  # the same tiles, one smaller
    assert {tile["size_x"] for tile in trading["dashcards"]} == {24, 12, 6}
    third = run(fake, address, (changed, MODELS), {"symbols": ["AAA", "BBB", "CCC"], "models": ["m1"]})
    assert third.changes["dashboard", "updated"] == 2  # both have a list that grew
    assert third.changes["question", "unchanged"] == 4


def test_provisioning_takes_away_what_left_the_files_and_nothing_else(
    fake: FakeMetabase, address: DatabaseAddress
) -> None:
    first = run(fake, address)
    metabase = signed_in(fake)
    collection = fake.cards[first.cards["count"]]["collection_id"]
    # His own: a question and a dashboard of the same names, and copies of ours, whose descriptions bear our marks.
    native = {"query": "SELECT 1", "template-tags": {}}
    blank = {"type": "native", "database": next(iter(fake.databases)), "native": native}
    card = {"name": "Count", "display": "table", "visualization_settings": {}, "dataset_query": blank}
    his = [metabase.post("/api/card", card | {"collection_id": collection})["id"]]
    for key in ("count", "names"):
        kept = ("name", "description", "display", "visualization_settings", "dataset_query", "collection_id")
        his.append(metabase.post("/api/card", {name: fake.cards[first.cards[key]][name] for name in kept})["id"])
    pages = [metabase.post("/api/dashboard", {"name": "Trading", "collection_id": collection})["id"]]
    copy = {name: fake.dashboards[first.dashboards["models"]][name] for name in ("name", "description")}
    pages.append(metabase.post("/api/dashboard", copy | {"collection_id": collection})["id"])

    notes: list[str] = []
    second = run(fake, address, (replace(TRADING, questions=(TABLE,)),), notes=notes)
    assert notes == []  # the tile of a question that left is none of others
    assert second.changes["question", "archived"] == 3  # count, sides, names
    assert second.changes["dashboard", "archived"] == 1
    assert {card["id"] for card in fake.living(fake.cards)} == {first.cards["trades"], *his}
    assert {page["id"] for page in fake.living(fake.dashboards)} == {first.dashboards["trading"], *pages}
    # What comes back is made anew; what went to the trash stays there.
    third = run(fake, address)
    assert third.changes["question", "created"] == 3
    assert third.cards["trades"] == first.cards["trades"]
    assert {card["id"] for card in fake.living(fake.cards)} == {*third.cards.values(), *his}


def test_provisioning_puts_its_dashboards_right_and_says_whose_tiles_it_takes_off(
    fake: FakeMetabase, address: DatabaseAddress
) -> None:
    first = run(fake, address)
    page = fake.dashboards[first.dashboards["trading"]]
    stranger = {**fake.cards[first.cards["count"]], "id": 999, "description": None}
    fake.cards[999] = stranger
    page["dashcards"] += [{**page["dashcards"][0], "id": 998, "card_id": 999, "row": 20}]
    page["dashcards"][0]["col"] = 3
    notes: list[str] = []
    second = run(fake, address, notes=notes)
    assert second.changes["dashboard", "updated"] == 1
    del fake.cards[999]
    assert_one_of_each(fake, second)
    assert len(notes) == 1
    assert "1 tiles of others" in notes[0]
    assert not stranger["archived"]
    run(fake, address)
    assert fake.writes == []


def test_provisioning_takes_tabs_away(fake: FakeMetabase, address: DatabaseAddress) -> None:
    page = fake.dashboards[run(fake, address).dashboards["trading"]]
    page["tabs"] = [{"id": 5, "name": "Mine"}, {"id": 6, "name": "Also mine"}]
    for tile in page["dashcards"]:
        tile["dashboard_tab_id"] = 5
    assert run(fake, address).changes["dashboard", "updated"] == 1
    assert page["tabs"] == []
    run(fake, address)
    assert fake.writes == []


def test_provisioning_renames_back_and_remakes_what_was_thrown_away(
    fake: FakeMetabase, address: DatabaseAddress
) -> None:
    first = run(fake, address)
    fake.cards[first.cards["count"]]["name"] = "Something else"
    fake.cards[first.cards["trades"]]["archived"] = True
    fake.dashboards[first.dashboards["models"]]["archived"] = True
    second = run(fake, address)
    assert_one_of_each(fake, second)
    assert second.changes["question", "updated"] == 1
    assert second.changes["question", "created"] == 1
    assert second.changes["dashboard", "created"] == 1
    run(fake, address)
    assert fake.writes == []


def test_provisioning_reads_a_collection_of_many_pages(
    fake: FakeMetabase, address: DatabaseAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("metabase.api._PAGE", 3)  # 4 questions, 2 dashboards
    run(fake, address)
    run(fake, address)
    assert fake.writes == []


# --- runs that do not -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", [True, False], ids=["not done", "done"])
def test_provisioning_broken_off_at_any_write_and_run_again_leaves_one_of_each(
    fake: FakeMetabase, address: DatabaseAddress, before: bool
) -> None:
    """The connection breaks at each write in turn, before it is done or after, when its answer is lost."""
    for at in range(1, FIRST_WRITES + 1):
        with FakeMetabase() as broken:
            broken.break_at, broken.break_before = at, before
            with pytest.raises(MetabaseError, match="broke off .* run the same command again"):
                run(broken, address)
            assert len(broken.writes) == at
            broken.break_at = None
            assert_one_of_each(broken, run(broken, address))
            run(broken, address)
            assert broken.writes == []


def test_provisioning_broken_off_while_it_updates_and_archives_ends_right(
    fake: FakeMetabase, address: DatabaseAddress
) -> None:
    changed = (replace(TRADING, name="Trades", questions=(replace(TABLE, name="All trades"),)),)
    run(fake, address)
    run(fake, address, changed)
    writes = len(fake.writes)
    assert writes == 2 + 4  # one question and one dashboard written, a dashboard and three questions archived
    for at in range(1, writes + 1):
        with FakeMetabase() as broken:
            run(broken, address)
            broken.break_at = at
            with pytest.raises(MetabaseError, match="broke off"):
                run(broken, address, changed)
            broken.break_at = None
            run(broken, address, changed)
            assert names(broken.living(broken.cards)) == ["All trades"]
            assert names(broken.living(broken.dashboards)) == ["Trades"]


def test_provisioning_two_of_one_are_not_chosen_from(fake: FakeMetabase, address: DatabaseAddress) -> None:
    first = run(fake, address)
    mark = "managed-by: perpcast key=count"
    fake.cards[900] = {**fake.cards[first.cards["count"]], "id": 900, "description": mark}
    with pytest.raises(SetupError, match=f"question count more than once, as numbers {first.cards['count']} and 900"):
        run(fake, address)
    assert fake.writes == []


def test_provisioning_two_connections_of_its_name_are_not_chosen_from(
    fake: FakeMetabase, address: DatabaseAddress
) -> None:
    run(fake, address)
    fake.databases[900] = {**next(iter(fake.databases.values())), "id": 900}
    with pytest.raises(SetupError, match="2 connections called Perpcast"):
        run(fake, address)


def test_provisioning_reads_back_what_it_wrote(fake: FakeMetabase, address: DatabaseAddress) -> None:
    def without_a_tile(path: str, answer: Any) -> Any:
        if path.startswith("/api/dashboard/") and answer["dashcards"]:
            return {**answer, "dashcards": answer["dashcards"][1:]}
        return answer

    fake.reshape = without_a_tile
    with pytest.raises(MetabaseError, match="dashboard Trading: wrote 3 tiles, read back 2"):
        run(fake, address)


def test_provisioning_follows_a_new_password_and_a_new_place_of_the_database(
    fake: FakeMetabase, address: DatabaseAddress
) -> None:
    set_password(address, "bi_test", "first1")
    reader = replace(address, user="bi_test", password="first1")
    run(fake, reader)
    set_password(address, "bi_test", "second2")
    with pytest.raises(SetupError, match=r"cannot connect to bi_test@.*password authentication failed.*--metabase"):
        run(fake, reader)
    rotated = replace(reader, password="second2")
    assert run(fake, rotated).changes["connection", "updated"] == 1
    assert run(fake, rotated).changes["connection", "unchanged"] == 1
    assert fake.writes == []
    moved = run(fake, replace(rotated, name="template1")).changes
    assert moved["connection", "updated"] == 1
    assert moved["question", "unchanged"] == 4
    nowhere = replace(rotated, port=free_port())
    with pytest.raises(SetupError, match=r"Connection refused.*METABASE_DB_HOST"):
        run(fake, nowhere)


def set_password(address: DatabaseAddress, role: str, password: str) -> None:
    connection = psycopg2.connect(
        host=address.host, port=address.port, dbname=address.name, user=address.user, password=address.password
    )
    with connection, connection.cursor() as cursor:
        cursor.execute("SELECT 1 FROM pg_roles WHERE rolname = %s", (role,))
        verb = sql.SQL("ALTER ROLE {} PASSWORD {}" if cursor.fetchone() else "CREATE ROLE {} LOGIN PASSWORD {}")
        cursor.execute(verb.format(sql.Identifier(role), sql.Literal(password)))
    connection.close()


def test_questions_are_asked_and_what_fails_is_named(fake: FakeMetabase, address: DatabaseAddress) -> None:
    wrong = (replace(COUNT, sql="SELECT * FROM nothing_of_that_name"), replace(TABLE, columns=("symbol", "day", "v")))
    dashboards = (replace(TRADING, questions=wrong), MODELS)
    outcome = run(fake, address, dashboards)
    progress: list[tuple[int, int]] = []
    answers = ask_questions(signed_in(fake), dashboards, outcome.cards, lambda *done: progress.append(done))
    assert progress == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert "does not exist" in str(answers["count"])
    assert answers["trades"] == "expected the columns symbol, day, v, received symbol, day, value"
    assert not isinstance(answers["sides"], str)
    assert answers["sides"].rows == 1


# --- waiting, logging in, versions ------------------------------------------------------------------------------------


def test_waits_for_health_and_says_for_what(fake: FakeMetabase) -> None:
    fake.starting = 2
    told: list[str] = []
    Metabase(fake.url).wait_until_ready(30, told.append)
    assert told == [f"waiting for Metabase at {fake.url}: initializing, 30%"]


def test_not_ready_in_time_ends_with_what_to_do(fake: FakeMetabase) -> None:
    fake.starting = 1000
    with pytest.raises(SetupError, match=r"not ready after 0 s: initializing, 30%.*docker compose"):
        Metabase(fake.url).wait_until_ready(0, print)
    with pytest.raises(SetupError, match="nothing listens there yet"):
        Metabase(f"http://127.0.0.1:{free_port()}").wait_until_ready(0, print)


OTHERS = {
    "a page": b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\n\r\n<html></html>",
    "another API": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}",
    "not found": b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
    "no HTTP": b"SSH-2.0-OpenSSH_9.2\r\n",
}


@contextmanager
def program(answer: bytes) -> Iterator[str]:
    """Something that gives every question the same answer."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(65536)
            self.request.sendall(answer)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("answer", OTHERS.values(), ids=OTHERS)
def test_other_program_on_the_port_is_said_at_once(answer: bytes) -> None:
    with program(answer) as url, pytest.raises(OtherProgramError, match="a program that is not Metabase"):
        Metabase(url).wait_until_ready(60, print)


def test_postgres_on_the_port_is_not_metabase(postgres: DatabaseAddress) -> None:
    with pytest.raises(SetupError, match="is not Metabase|does not answer yet"):
        Metabase(f"http://127.0.0.1:{postgres.port}").wait_until_ready(0, print)


@pytest.mark.parametrize("url", ["localhost:3333", "ftp://localhost", "http://", "http://localhost:3333/path", ""])
def test_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="expected one like http://127.0.0.1:3333"):
        Metabase(url)


def test_first_user_is_made_once_then_logged_in(fake: FakeMetabase) -> None:
    metabase = Metabase(fake.url)
    assert metabase.sign_in(metabase.wait_until_ready(5, print), ACCOUNT)
    assert fake.users == {ACCOUNT.email: ACCOUNT.password}
    assert fake.token is None
    assert not metabase.sign_in(metabase.wait_until_ready(5, print), ACCOUNT)
    assert ACCOUNT.password not in repr(ACCOUNT)


def test_wrong_login_says_what_metabase_said_and_where_to_look(fake: FakeMetabase) -> None:
    metabase = signed_in(fake)
    properties = metabase.wait_until_ready(5, print)
    wrong = replace(ACCOUNT, password="wrong1234")
    with pytest.raises(SetupError, match=r"refuses the login.*did not match stored password.*metabase/\.env"):
        metabase.sign_in(properties, wrong)
    for _ in range(9):
        with pytest.raises(SetupError):
            metabase.sign_in(properties, wrong)
    with pytest.raises(SetupError, match="Too many attempts! You must wait 15 seconds"):
        metabase.sign_in(properties, ACCOUNT)
    with pytest.raises(SetupError, match="only be used to create the first user"):
        metabase.sign_in({"has-user-setup": False, "setup-token": "old"}, ACCOUNT)


def test_account_that_is_no_administrator_is_refused(fake: FakeMetabase) -> None:
    fake.users = {ACCOUNT.email: ACCOUNT.password}
    fake.ordinary = {ACCOUNT.email}
    with pytest.raises(SetupError, match="is not an administrator"):
        signed_in(fake)


def test_instance_that_takes_a_request_and_never_answers_is_waited_for_in_vain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("metabase.api._HEALTH_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(SetupError, match="not ready after 0 s: it does not answer yet"):
            Metabase(url).wait_until_ready(0, print)


def test_weak_password_of_the_first_user_is_said(fake: FakeMetabase) -> None:
    metabase = Metabase(fake.url)
    properties = metabase.wait_until_ready(5, print)
    with pytest.raises(SetupError, match=r"does not accept the first user.*password is too common.*metabase/\.env"):
        metabase.sign_in(properties, replace(ACCOUNT, password="weak"))
    assert fake.users == {}


@pytest.mark.parametrize(
    ("tag", "warning"),
    [
        ("v0.58.0", None),
        ("v0.63.18.4", None),
        ("v1.64.2", None),
        ("v0.57.9", "outside 0.58 to 0.64"),
        ("v0.65.0-RC1", "outside 0.58 to 0.64"),
        ("?", "unknown version '?'"),
        ("vLOCAL_DEV", "unknown version 'vLOCAL_DEV'"),
    ],
)
def test_version_outside_the_tested_range_warns(tag: str, warning: str | None) -> None:
    said = version_warning(tag)
    assert (said is None) == (warning is None)
    assert said is None or (warning is not None and warning in said)


@pytest.mark.parametrize("properties", [{}, {"version": None}, {"version": {}}, {"version": "0.63"}])
def test_version_that_is_not_told_is_a_question_mark(properties: dict[str, Any]) -> None:
    assert version_of(properties) == "?"


def test_answers_of_another_shape_are_an_error_of_ours(fake: FakeMetabase, address: DatabaseAddress) -> None:
    run(fake, address)
    for path in ("/api/database", "/api/collection", "/items", "/api/dashboard/", "/api/user/current"):
        fake.reshape = lambda asked, answer, path=path: {"results": []} if path in asked else answer  # type: ignore[misc]
        with pytest.raises(MetabaseError, match="another shape.*pin an image"):
            run(fake, address)
    assert part({"id": 3}, "id") == 3
    with pytest.raises(MetabaseError, match="received list"):
        part([], "id")


def test_session_that_ended_is_refused_in_words(fake: FakeMetabase, address: DatabaseAddress) -> None:
    metabase = signed_in(fake)
    fake.sessions.clear()
    with pytest.raises(MetabaseError, match=r"GET /api/database: HTTP 401: Unauthenticated"):
        Provisioning(metabase, print).run(DASHBOARDS, LISTS, address)
    with pytest.raises(UnreachableError):
        Metabase(f"http://127.0.0.1:{free_port()}").get("/api/health")


# --- marks ------------------------------------------------------------------------------------------------------------


def test_marks_tell_ours_from_copies() -> None:
    def item(number: int, description: str | None) -> dict[str, Any]:
        return {"id": number, "name": "n", "description": description}

    mark = "Text.\n\nmanaged-by: perpcast key={} id={} hash=0123456789abcdef"
    found = managed(
        "card",
        [
            item(1, mark.format("a", 1)),
            item(2, mark.format("a", 1)),  # a copy of the first
            item(3, "Text.\n\nmanaged-by: perpcast key=b"),  # unfinished
            item(4, None),
            item(5, "managed-by: somebody key=c"),
        ],
    )
    assert {key: (one.id, one.digest) for key, one in found.items()} == {"a": (1, "0123456789abcdef"), "b": (3, None)}


def test_digest_and_placements_do_not_depend_on_order() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1}) != digest({"a": 1, "b": [2, 1]})
    one = {"id": 7, "row": 0, "col": 0, "size_x": 6, "size_y": 3, "card_id": None}
    other = {"id": 8, "row": 0, "col": 6, "size_x": 6, "size_y": 3, "card_id": 4}
    assert placements([one, other]) == placements([other, {**one, "id": 9}]) != placements([one, {**other, "col": 7}])


def test_stand_in_writes_sql_as_metabase_does() -> None:
    tags = {"a": {"type": "text"}, "b": {"type": "number"}, "c": {"type": "date"}}
    query = "SELECT 1 WHERE true [[AND a = {{a}}]] [[AND b > {{ b }} AND c = {{c}}]]"
    assert substituted(query, tags, {}) == "SELECT 1 WHERE true  "
    assert substituted(query, tags, {"a": ["it's"], "b": 2}) == "SELECT 1 WHERE true AND a = CAST('it''s' AS varchar) "
    assert "AND b > 2.0 AND c = date '2024-01-01'" in substituted(query, tags, {"b": ["2"], "c": "2024-01-01"})


# --- the smoke check --------------------------------------------------------------------------------------------------


def test_smoke_finds_everything_right_then_what_is_not(fake: FakeMetabase, address: DatabaseAddress) -> None:
    metabase = signed_in(fake)
    with pytest.raises(MissingInputError, match="python -m metabase provision"):
        check_instance(metabase, DASHBOARDS, LISTS, lambda done, total: None)
    outcome = run(fake, address)
    fake.writes.clear()

    def complaints() -> dict[str, str]:
        checks = check_instance(metabase, DASHBOARDS, LISTS, lambda done, total: None)
        assert len(checks) == 6
        return {check.what: check.complaint for check in checks if check.complaint is not None}

    assert complaints() == {}
    fake.cards[outcome.cards["count"]]["dataset_query"]["native"]["query"] = "SELECT 4 AS trades"
    fake.cards[outcome.cards["names"]]["archived"] = True
    page = fake.dashboards[outcome.dashboards["trading"]]
    next(tile for tile in page["dashcards"] if tile["parameter_mappings"])["parameter_mappings"].pop()
    assert complaints() == {
        "question count": "holds other SQL than its file",
        "question names": "is not there",
        "dashboard trading": "trades: takes the filters ['first_day', 'least', 'symbol'], reached by "
        "['first_day', 'symbol']",
        "dashboard models": "its questions are not there: ['names']",
    }
    page["dashcards"].pop()
    assert "expected 3 tiles, found 2" in complaints()["dashboard trading"]
    set_password(address, "bi_smoke", "smoke1")
    next(iter(fake.databases.values()))["details"].update(user="bi_smoke", password="other2")
    assert "password authentication failed" in complaints()["question trades"]
    assert fake.writes == []


# --- the commands -----------------------------------------------------------------------------------------------------


@pytest.fixture
def overlay(database: Any, postgres: DatabaseAddress, tmp_path: Path) -> Path:
    """A configuration that leads to an empty database with the newest schema."""
    path = tmp_path / "overlay.yaml"
    section = {"port": postgres.port, "name": database.url.database, "directory": str(tmp_path / "postgres")}
    path.write_text(yaml.safe_dump({"database": section}))
    return path


@pytest.fixture
def own_config(overlay: Path, tmp_path: Path) -> Path:
    """The same as one file in a folder of its own, so that no .env of this clone has a say."""
    path = tmp_path / "config.yaml"
    whole = yaml.safe_load((ROOT / "config.yaml").read_text())
    whole["database"] |= yaml.safe_load(overlay.read_text())["database"]
    path.write_text(yaml.safe_dump(whole))
    return path


def environment(postgres: DatabaseAddress) -> dict[str, str]:
    return {
        "PERPCAST_DB_PASSWORD": str(postgres.password),
        "PERPCAST_BI_PASSWORD": "reads2024",
        "METABASE_ADMIN_EMAIL": ACCOUNT.email,
        "METABASE_ADMIN_PASSWORD": ACCOUNT.password,
        "METABASE_DB_HOST": postgres.host,
        "METABASE_DB_PORT": str(postgres.port),
    }


def invoke(command: Any, overlay: Path, env: Mapping[str, str | None], *arguments: str) -> Result:
    config = ["--config", str(ROOT / "config.yaml"), "--config", str(overlay)]
    return CliRunner().invoke(command, [*config, *arguments], env=env)


def test_commands_on_the_real_dashboards_twice_then_smoke(
    fake: FakeMetabase, postgres: DatabaseAddress, database: Any, overlay: Path
) -> None:
    make_bi_role(database, "reads2024")
    env = environment(postgres)
    fake.tag = "v0.99.1"
    first = invoke(provision.main, overlay, env, "--url", fake.url)
    assert first.exit_code == 0, first.output
    assert f"Metabase v0.99.1 at {fake.url}" in first.stdout
    assert "note: version v0.99.1 is outside 0.58 to 0.64" in first.stdout
    assert f"made the first user, {ACCOUNT.email}" in first.stdout
    assert ACCOUNT.password not in first.output
    dashboards = load_dashboards()
    for dashboard in dashboards:
        assert re.search(rf"{dashboard.name}: {fake.url}/dashboard/\d+", first.stdout)
    questions = [each for dashboard in dashboards for each in dashboard.questions]
    assert len(fake.living(fake.cards)) == len(questions)
    fake.writes.clear()
    fake.tag = "v0.63.18.4"
    second = invoke(provision.main, overlay, env, "--url", fake.url)
    assert second.exit_code == 0, second.output
    assert fake.writes == []
    assert "note:" not in second.stdout
    looked = invoke(smoke.main, overlay, env, "--url", fake.url)
    assert looked.exit_code == 0, looked.output
    assert f"all {len(questions) + len(dashboards)} checks hold" in looked.stdout
    fake.cards[next(iter(fake.cards))]["archived"] = True
    looked = invoke(smoke.main, overlay, env, "--url", fake.url)
    assert looked.exit_code == 1
    assert "is not there" in looked.stderr
    assert f"of {len(questions) + len(dashboards)} checks fail" in looked.stderr


def test_filters_through_the_dashboards_answer_as_the_preview_does(
    fake: FakeMetabase, postgres: DatabaseAddress, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Two ways to write a value into a question: as Metabase does, a literal; as the preview does, a parameter."""
    address = filled_world(postgres, tmp_path_factory.mktemp("datasets"))
    engine = open_engine(address)
    make_bi_role(engine, "reads2024")
    dashboards, lists = load_dashboards(), read_filter_values(engine)
    outcome = run(fake, replace(address, user=BI_ROLE, password="reads2024"), dashboards, lists)
    metabase = signed_in(fake)
    compared: Counter[str] = Counter()
    for dashboard in dashboards:
        number = outcome.dashboards[dashboard.key]
        tiles = {tile["card_id"]: tile["id"] for tile in fake.dashboards[number]["dashcards"]}
        for each in dashboard.filters:
            value = (each.values or lists.get(each.source or "") or ["2023-11-20"])[-1]
            sent = [{"id": each.key, "type": FILTER_TYPES[each.kind], "value": value}]
            for asked in (question for question in dashboard.questions if each.key in question.tags):
                card = outcome.cards[asked.key]
                path = f"/api/dashboard/{number}/dashcard/{tiles[card]}/card/{card}/query"
                expected = read_question(engine, *bound_sql(asked, {each.key: value}))
                assert metabase.query(path, {"parameters": sent}) == Answer(asked.columns, len(expected))
                compared[each.key] += len(expected) > 0
    engine.dispose()
    assert set(compared) == {"symbol", "side", "first_day", "last_day", "model", "run"}
    assert min(compared.values()) > 3  # answers with rows, for each filter


def test_provision_with_a_question_that_fails_names_it(
    fake: FakeMetabase, postgres: DatabaseAddress, overlay: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_password(replace(postgres, name="postgres"), "perpcast_bi", "reads2024")
    broken = (replace(TRADING, questions=(replace(COUNT, sql="SELECT 1 / 0 AS trades"),)),)
    monkeypatch.setattr(provision, "load_dashboards", lambda: broken)
    result = invoke(provision.main, overlay, environment(postgres), "--url", fake.url)
    assert result.exit_code == 1
    assert "question count: division by zero" in result.stderr
    assert "1 of 1 questions do not answer" in result.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"METABASE_ADMIN_PASSWORD": None}, "METABASE_ADMIN_PASSWORD is neither in the environment nor in"),
        ({"PERPCAST_BI_PASSWORD": None}, "PERPCAST_BI_PASSWORD is neither in the environment nor in"),
        ({"METABASE_DB_PORT": "default"}, "METABASE_DB_PORT in metabase/.env: expected a port, received 'default'"),
    ],
)
def test_provision_without_what_it_needs_says_so(
    fake: FakeMetabase,
    postgres: DatabaseAddress,
    own_config: Path,
    change: dict[str, str | None],
    message: str,
) -> None:
    env = {**environment(postgres), **change}
    result = CliRunner().invoke(provision.main, ["--config", str(own_config), "--url", fake.url], env=env)
    assert (result.exit_code, result.output.count("\n")) == (2, 1)
    assert message in result.stderr


def test_secrets_come_from_the_file_that_compose_reads(
    postgres: DatabaseAddress, own_config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "metabase").mkdir()
    (tmp_path / "metabase" / ".env").write_text("PERPCAST_BI_PASSWORD=one\nMETABASE_DB_HOST=host.docker.internal\n")
    (tmp_path / ".env").write_text("PERPCAST_BI_PASSWORD=two\nMETABASE_DB_PORT=5556\n")
    for name in environment(postgres):
        monkeypatch.delenv(name, raising=False)
    settings = load_settings([own_config])
    seen = provision.seen_from_metabase(settings)
    assert (seen.host, seen.port, seen.password) == ("host.docker.internal", 5556, "one")
    assert (seen.name, seen.user) == (settings.database.name, "perpcast_bi")
    monkeypatch.setenv("PERPCAST_BI_PASSWORD", "three")
    assert provision.seen_from_metabase(settings).password == "three"


def test_provision_process_killed_half_way_and_run_again_leaves_one_of_each(
    fake: FakeMetabase, postgres: DatabaseAddress, database: Any, overlay: Path
) -> None:
    make_bi_role(database, "reads2024")
    config = ["--config", str(ROOT / "config.yaml"), "--config", str(overlay)]
    command = [sys.executable, "-m", "metabase.provision", *config, "--url", fake.url]
    env = {**os.environ, **environment(postgres)}

    def kill(number: int) -> None:
        if number == 12:
            os.kill(process.pid, signal.SIGKILL)

    fake.on_write = kill
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert process.wait(60) == -signal.SIGKILL
    fake.on_write = lambda number: None
    again = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert again.returncode == 0, again.stderr
    dashboards = load_dashboards()
    assert names(fake.living(fake.dashboards)) == sorted(dashboard.name for dashboard in dashboards)
    titles = sorted(question.name for dashboard in dashboards for question in dashboard.questions)
    assert names(fake.living(fake.cards)) == titles
