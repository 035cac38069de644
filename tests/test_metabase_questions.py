"""The questions of the dashboards: each runs on a filled database under every choice of its filters, as the role that
only reads, and answers with the columns that it declares; and what is wrong in a file is refused by name."""

import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from metabase.questions import Filter, Question, Text, bound_sql, load_dashboards
from perpcast.database import (
    Database,
    DatabaseAddress,
    make_bi_role,
    open_engine,
    read_defaults,
    read_filter_values,
    read_question,
)
from perpcast.database.bi import BI_ROLE
from perpcast.errors import ConfigError
from tests.bi_world import CLASSIFICATION, FIRST, REGRESSION, SECOND, SYMBOLS, filled_world

DASHBOARDS = load_dashboards()
QUESTIONS = [question for dashboard in DASHBOARDS for question in dashboard.questions]
CHOICES: dict[str, Any] = {
    "symbol": "BBBUSDT",
    "side": "sell",
    "model": CLASSIFICATION,
    "run": FIRST,
    "first_day": date(2023, 11, 20),
    "last_day": date(2030, 1, 1),
}
NOTHING_SENDS_ORDERS = "nothing sends orders yet"

# Without rows in the filled world: for no filter, or for the one named.
EMPTY = {
    ("exchange_slippage", None): NOTHING_SENDS_ORDERS,
    ("rejected_orders", None): NOTHING_SENDS_ORDERS,
    ("order_latency", None): NOTHING_SENDS_ORDERS,
    ("probability_calibration", None): "the champion tells returns, not probabilities",
    ("quantile_calibration", "model"): "a classifier tells no quantiles",
    ("revised_candles", "symbol"): "CCCUSDT alone was revised",
    ("open_positions", "side"): "those that are open are buys",
    ("newest_troubles", "run"): "the first session met none",
    ("newest_troubles", "symbol"): "CCCUSDT alone came late",
}


@pytest.fixture(scope="module")
def world(postgres: DatabaseAddress, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    """The filled database, as the role of the dashboards sees it."""
    address = filled_world(postgres, tmp_path_factory.mktemp("datasets"))
    owner = open_engine(address)
    make_bi_role(owner, "reads2024")
    owner.dispose()
    engine = open_engine(replace(address, user=BI_ROLE, password="reads2024"))
    yield engine
    engine.dispose()


def ask(world: Database, question: Question, **values: object) -> pd.DataFrame:
    return read_question(world, *bound_sql(question, values))


def is_empty_for(question: Question, *filters: str | None) -> bool:
    return any((question.key, each) in EMPTY for each in filters)


@pytest.mark.parametrize("question", QUESTIONS, ids=lambda question: question.key)
def test_question_answers_with_its_columns_under_every_choice_of_filters(world: Database, question: Question) -> None:
    for chosen in ((), *((tag,) for tag in question.tags), question.tags):
        answer = ask(world, question, **{tag: CHOICES[tag] for tag in chosen})
        assert tuple(answer.columns) == question.columns
        assert not [value for name in answer for value in answer[name] if isinstance(value, Decimal)]
        if len(chosen) < 2 and not is_empty_for(question, None, *chosen):
            assert len(answer), f"no rows for {chosen}"
        if "symbol" in chosen and "symbol" in answer:
            assert set(answer["symbol"]) <= {"BBBUSDT"}
        if "side" in chosen and "side" in answer:
            assert set(answer["side"]) <= {"sell"}
        if question.display in ("line", "bar", "area", "row", "scatter"):
            assert len(answer) <= 2000, "Metabase draws no more"


def test_what_may_be_empty_is_empty(world: Database) -> None:
    keys = {question.key: question for question in QUESTIONS}
    for key, chosen in EMPTY:
        values = {} if chosen is None else {chosen: CHOICES[chosen]}
        assert ask(world, keys[key], **values).empty, key


@pytest.mark.parametrize(
    ("key", "column", "first", "last"),
    [
        ("equity", "time", date(2023, 12, 6), date(2023, 12, 6)),
        ("events_by_day", "day", date(2023, 12, 6), date(2023, 12, 6)),
        ("closed_trades", "entry_time", date(2023, 12, 6), date(2023, 12, 6)),
        ("longest_gaps", "first_missing", date(2023, 11, 25), date(2023, 11, 26)),
        ("coverage_by_month", "month", date(2023, 12, 9), date(2023, 12, 10)),
        ("label_base_rates", None, date(2023, 11, 30), date(2023, 11, 30)),
    ],
)
def test_dates_choose_days_both_included_or_whole_months(
    world: Database, key: str, column: str | None, first: date, last: date
) -> None:
    question = next(question for question in QUESTIONS if question.key == key)
    chosen, everything = ask(world, question, first_day=first, last_day=last), ask(world, question)
    if column is None:  # bars of November alone: 1512 of BBBUSDT and 1567 of the others, less those without a label
        assert 0 < chosen["trades"].sum() < everything["trades"].sum()
        return
    days = {date(each.year, each.month, each.day) for each in chosen[column]}
    expected = {date(2023, 12, 1)} if column == "month" else {first, last}
    assert days == expected
    assert len(chosen) < len(everything)


def test_without_a_choice_it_is_the_champion_and_the_newest_session(world: Database) -> None:
    assert read_defaults(world) == {"model": REGRESSION, "run": SECOND}
    for key, tag in (("bars_processed", "run"), ("forecast_deciles", "model"), ("closed_trades", "run")):
        question = next(question for question in QUESTIONS if question.key == key)
        default, chosen = ask(world, question), ask(world, question, **{tag: {"model": REGRESSION, "run": SECOND}[tag]})
        pd.testing.assert_frame_equal(default, chosen)


def test_a_value_is_never_a_part_of_the_sql(world: Database) -> None:
    question = next(question for question in QUESTIONS if question.key == "coverage_by_symbol")
    for value in ("x' OR true --", "%s", "{{symbol}}", "]]", ":symbol"):
        assert ask(world, question, symbol=value).empty
    percent = replace(question, sql="SELECT '100 %' AS a, '%(b)s' AS b [[, {{symbol}} AS c]]", tags=("symbol",))
    assert read_question(world, *bound_sql(percent, {})).iloc[0].tolist() == ["100 %", "%(b)s"]
    assert read_question(world, *bound_sql(percent, {"symbol": "%"})).iloc[0].tolist() == ["100 %", "%(b)s", "%"]


# --- bound_sql --------------------------------------------------------------------------------------------------------

BASE = Question("a", "A", "Why?", "", "table", ("x",), {}, 0, 0, 4, 4, ("symbol", "side"))


@pytest.mark.parametrize(
    ("sql", "values", "bound", "parameters"),
    [
        ("SELECT 1 WHERE true [[AND s = {{symbol}}]]", {}, "SELECT 1 WHERE true ", {}),
        ("SELECT 1 [[AND s = {{ symbol }}]]", {"symbol": "A"}, "SELECT 1 AND s = %(symbol)s", {"symbol": "A"}),
        ("SELECT 1 [[AND s = {{symbol}}]]", {"symbol": None, "side": "buy"}, "SELECT 1 ", {}),
        ("coalesce([[{{symbol}}, ]](SELECT 1))", {"symbol": "A"}, "coalesce(%(symbol)s, (SELECT 1))", {"symbol": "A"}),
        ("[[a {{symbol}} b {{side}}]]c", {"side": "buy"}, "c", {}),
        ("[[a\n{{symbol}}]]\n[[b {{side}}]]", {"side": "buy"}, "\nb %(side)s", {"side": "buy"}),
        ("{{symbol}} % {{symbol}}", {"symbol": "A"}, "%(symbol)s %% %(symbol)s", {"symbol": "A"}),
    ],
)
def test_bound_sql_keeps_a_clause_whose_filters_have_values(
    sql: str, values: dict[str, object], bound: str, parameters: dict[str, object]
) -> None:
    assert bound_sql(replace(BASE, sql=sql), values) == (bound, parameters)


def test_bound_sql_refuses_a_filter_that_must_have_a_value() -> None:
    with pytest.raises(ConfigError, match="the question a needs a value for symbol, received none"):
        bound_sql(replace(BASE, sql="SELECT {{symbol}}"), {"side": "buy"})


# --- the files --------------------------------------------------------------------------------------------------------


def test_dashboards_are_what_the_issue_names() -> None:
    assert [each.name for each in DASHBOARDS] == [
        "Trading", "Models", "Labels and features", "Market data", "Operations",
    ]  # fmt: skip
    assert len({question.name for question in QUESTIONS}) >= len(QUESTIONS) - 1
    for question in QUESTIONS:
        assert question.description[0].isupper(), question.key
        assert question.description.endswith((".", "?")), question.key
        assert "bi." in question.sql, question.key
        assert not {"raw_market_data", "positions ", "processed_market_data"} & set(question.sql.split()), question.key


def test_same_filter_is_the_same_on_every_dashboard() -> None:
    seen: dict[str, Filter] = {}
    for each in (each for dashboard in DASHBOARDS for each in dashboard.filters):
        assert seen.setdefault(each.key, each) == each
    assert set(seen) == set(CHOICES)


def write(folder: Path, **changes: Any) -> Path:
    """A folder with one dashboard of one question, some of its keys changed; None takes one away."""
    question = {
        "key": "a", "name": "A", "description": "Why?", "display": "table", "columns": ["x"], "settings": {},
        "row": 0, "col": 0, "width": 12, "height": 4,
    }  # fmt: skip
    sql = changes.pop("sql", "SELECT 1 AS x WHERE true [[AND symbol = {{symbol}}]]")
    question |= changes.pop("question", {})
    filters = [{"key": "symbol", "name": "Symbol", "kind": "text", "source": "symbols"}]
    data = {"name": "D", "description": "d", "filters": filters, "questions": [question], **changes}
    (folder / "d").mkdir(parents=True)
    (folder / "d" / "a.sql").write_text(sql + "\n")
    (folder / "d.json").write_text(json.dumps({key: value for key, value in data.items() if value is not None}))
    return folder


def test_load_reads_what_was_written(tmp_path: Path) -> None:
    text = {"text": "Head", "row": 4, "col": 0, "width": 24, "height": 1, "heading": True}
    (dashboard,) = load_dashboards(write(tmp_path, texts=[text]))
    assert (dashboard.key, dashboard.name, dashboard.texts) == ("d", "D", (Text("Head", 4, 0, 24, 1, True),))
    assert dashboard.filters == (Filter("symbol", "Symbol", "text", None, "symbols"),)
    (question,) = dashboard.questions
    assert (question.sql, question.tags) == ("SELECT 1 AS x WHERE true [[AND symbol = {{symbol}}]]", ("symbol",))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"colour": "red"}, "colour: Unexpected keyword argument"),
    ({"name": None}, "name: Field required"),
    ({"question": {"display": "pie"}}, "questions.0.display: .*received 'pie'"),
    ({"question": {"sizeX": 4}}, "questions.0.sizeX: Unexpected"),
    ({"question": {"sql": "SELECT 1"}}, "questions.0: the SQL has a file of its own"),
    ({"question": {"key": "b"}}, "b.sql: a question without its SQL"),
    ({"question": {"description": " "}}, "a: expected a sentence"),
    ({"question": {"col": 13}}, "a: expected a place on the 24 columns"),
    ({"texts": [{"text": "T", "row": 3, "col": 11, "width": 2, "height": 1}]}, "a and 'T' lie on one another"),
    ({"sql": "SELECT 1 AS x"}, r"filters: expected those that the SQL takes, \[\], not \['symbol'\]"),
    ({"sql": "SELECT {{symbol}}, {{day}}"}, r"expected those that the SQL takes, \['day', 'symbol'\]"),
    ({"question": {"settings": {"graph.metrics": ["y"]}}}, r"settings name columns that it does not .*\['y'\]"),
    ({"question": {"settings": {"column_settings": {'["name","z"]': {}}}}}, r"\['z'\]"),
]


@pytest.mark.parametrize(("changes", "complaint"), WRONG, ids=[complaint for _, complaint in WRONG])
def test_load_refuses_and_names_what_is_wrong(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        load_dashboards(write(tmp_path, **changes))


def test_load_refuses_what_is_no_json_and_sql_without_a_question(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a JSON file for each dashboard, found none"):
        load_dashboards(tmp_path)
    write(tmp_path)
    (tmp_path / "d" / "left_over.sql").write_text("SELECT 1")
    with pytest.raises(ConfigError, match=r"SQL without a question: \['left_over'\]"):
        load_dashboards(tmp_path)
    (tmp_path / "d.json").write_text("{")
    with pytest.raises(ConfigError, match="not JSON"):
        load_dashboards(tmp_path)


def test_load_refuses_a_question_that_two_dashboards_have(tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "d").rename(tmp_path / "e")
    data = json.loads((tmp_path / "d.json").read_text())
    (tmp_path / "e.json").write_text(json.dumps({**data, "name": "E"}))
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "a.sql").write_text((tmp_path / "e" / "a.sql").read_text())
    with pytest.raises(ConfigError, match=r"each question must be there once, received \['a'\] more often"):
        load_dashboards(tmp_path)


def test_symbols_of_the_world_are_those_of_the_filters(world: Database) -> None:
    assert read_filter_values(world) == {
        "symbols": list(SYMBOLS), "models": [CLASSIFICATION, REGRESSION], "runs": [SECOND, FIRST],
    }  # fmt: skip
