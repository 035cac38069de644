"""`python -m metabase preview`: every question in one page, on a telephone, a desk and paper, filled and empty."""

from pathlib import Path

import pandas as pd
import pytest
import yaml
from click.testing import CliRunner
from sqlalchemy.engine import make_url

from metabase.__main__ import main
from metabase.preview import Column, columns_of, draw, write_preview
from metabase.questions import Question, load_dashboards
from perpcast.database import Database, DatabaseAddress, open_engine
from perpcast.errors import MissingInputError
from tests.bi_world import CLASSIFICATION, FIRST, REGRESSION, SECOND, filled_world
from tests.browser import NAMES, browser_on_path, look_at
from tests.test_report_in_browser import DESK, PAPER, TELEPHONE, assert_sound

ROOT = Path(__file__).parents[1]
TILES = [question for dashboard in load_dashboards() for question in dashboard.questions]
DRAWN = [question for question in TILES if question.display not in ("scalar", "table")]
needs_browser = pytest.mark.skipif(browser_on_path() is None, reason=f"no browser on PATH: none of {', '.join(NAMES)}")
VIEWS = (("screen", TELEPHONE), ("screen", DESK), ("print", PAPER))


@pytest.fixture(scope="module")
def world(postgres: DatabaseAddress, tmp_path_factory: pytest.TempPathFactory) -> DatabaseAddress:
    return filled_world(postgres, tmp_path_factory.mktemp("datasets"))


@needs_browser
def test_page_of_a_filled_database_shows_every_question(world: DatabaseAddress, tmp_path: Path) -> None:
    engine = open_engine(world)
    page = write_preview(engine, tmp_path, {"model": CLASSIFICATION})
    engine.dispose()
    assert [path.name for path in tmp_path.iterdir()] == ["index.html"]
    without_rows = {"exchange_slippage", "rejected_orders", "order_latency", "quantile_calibration"}
    pictures = len(DRAWN) - len(without_rows & {question.key for question in DRAWN})
    for look, (_, width) in zip(look_at(page, *VIEWS), VIEWS, strict=True):
        assert_sound(look, width, pictures)
        assert look.text.startswith(f"database bi_world · session {SECOND} · model {CLASSIFICATION} · all symbols")
        for question in TILES:
            assert question.name in look.text
            assert " ".join(question.description.split()) in look.text
        assert look.text.count("No rows.") == len(without_rows)


@needs_browser
def test_page_of_an_empty_database_says_so(database: Database, tmp_path: Path) -> None:
    page = write_preview(database, tmp_path, {})
    for look, (_, width) in zip(look_at(page, *VIEWS), VIEWS, strict=True):
        assert_sound(look, width, pictures=0)
        assert "no session yet · no model yet" in look.text
        assert look.text.count("No rows.") == sum(question.display != "scalar" for question in TILES)


def test_preview_of_one_symbol_model_and_session_from_the_command_line(
    world: DatabaseAddress, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PERPCAST_DB_PASSWORD", world.password or "")
    values = yaml.safe_load((ROOT / "config.yaml").read_text())
    values["database"].update(port=world.port, name=world.name)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(values))
    command = ["preview", "--config", str(config)]
    chosen = ["--symbol", "BBBUSDT", "--model", REGRESSION, "--session", FIRST]
    done = CliRunner().invoke(main, [*command, *chosen])
    assert (done.exit_code, done.stderr) == (0, "")
    page = (tmp_path / "reports" / "metabase" / "index.html").read_text()
    assert f"preview: {tmp_path / 'reports' / 'metabase' / 'index.html'}" in done.stdout.replace("\n", "")
    assert f"session {FIRST} · model {REGRESSION} · BBBUSDT" in page
    refused = CliRunner().invoke(main, [*command, "--symbol", "XUSDT"])
    assert refused.exit_code == 2
    assert "error: the database holds no symbol XUSDT; it holds AAAUSDT, BBBUSDT, CCCUSDT" in refused.stderr


def test_only_what_the_database_holds_can_be_chosen(database: Database, tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="holds no run r; it holds none"):
        write_preview(database, tmp_path, {"run": "r"})
    assert not list(tmp_path.iterdir())
    assert make_url(database.url).database


# --- numbers and pictures ---------------------------------------------------------------------------------------------

TEXTS = [
    ({}, None, "\N{EN DASH}"),
    ({}, float("nan"), "\N{EN DASH}"),
    ({}, 1234567, "1,234,567"),
    ({}, 0.000123456, "0.000123456"),
    ({"decimals": 2, "suffix": " USDT"}, -1234.5, "\N{MINUS SIGN}1,234.50 USDT"),
    ({"number_style": "percent", "decimals": 2}, 0.01234, "1.23\N{NO-BREAK SPACE}%"),
    ({"number_style": "percent", "decimals": 1}, -0.0000001, "0.0\N{NO-BREAK SPACE}%"),
    ({}, "stop", "stop"),
    ({}, pd.Timestamp("2024-01-02T03:45Z"), "2024-01-02 03:45"),
    ({}, pd.Timestamp("2024-01-02").date(), "2024-01-02"),
]


@pytest.mark.parametrize(("style", "value", "shown"), TEXTS)
def test_value_is_shown_as_its_settings_ask(style: dict[str, object], value: object, shown: str) -> None:
    assert Column("x", "x", "number", style).text(value) == shown


def question_of(display: str, columns: tuple[str, ...], dimensions: list[str], metrics: list[str]) -> Question:
    settings = {"graph.dimensions": dimensions, "graph.metrics": metrics}
    return Question("q", "Q", "Why?", "", display, columns, settings, 0, 0, 12, 6, ())  # type: ignore[arg-type]


def test_bar_chart_stacks_its_series_and_names_months() -> None:
    months = [pd.Timestamp(f"2024-0{month}-01").date() for month in (1, 1, 2)]
    answer = pd.DataFrame({"month": months, "cause": ["a", "b", "a"], "bars": [3, 4, 5]})
    question = question_of("bar", ("month", "cause", "bars"), ["month", "cause"], ["bars"])
    (axes,) = draw(question, answer).axes
    boxes = [(patch.get_y(), patch.get_height()) for patch in axes.patches]  # type: ignore[attr-defined]
    assert boxes == [(0, 3), (0, 5), (3, 4), (5, 0)]  # a of both months, then b on top of it
    assert [label.get_text() for label in axes.get_xticklabels()] == ["2024-01", "2024-02"]


def test_long_row_chart_shows_both_ends() -> None:
    names = [f"S{number:02}" for number in range(51)]
    answer = pd.DataFrame({"symbol": names, "pnl": range(25, -26, -1)})
    (axes,) = draw(question_of("row", ("symbol", "pnl"), ["symbol"], ["pnl"]), answer).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == names[:12] + names[-12:]


def test_columns_are_numbers_words_or_long_texts() -> None:
    answer = pd.DataFrame({"n": [1.0], "w": ["stop"], "l": ["x" * 50], "d": [pd.Timestamp("2024-01-01")], "e": [None]})
    question = question_of("table", ("n", "w", "l", "d", "e"), [], [])
    assert [column.kind for column in columns_of(question, answer)] == ["number", "word", "long", "word", "number"]
