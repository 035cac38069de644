"""The questions that the dashboards ask: one JSON file for each dashboard, one SQL file for each question, checked.

SQL stands in Metabase's own template form: `{{symbol}}` is a filter's value, `[[AND symbol = {{symbol}}]]` is left out
where that filter has none. A question takes the filters that its SQL names.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from perpcast.errors import ConfigError

FOLDER = Path(__file__).parent / "dashboards"
GRID = 24  # columns of a dashboard

_KEY = re.compile(r"[a-z][a-z0-9_]*")
_TAG = re.compile(r"{{\s*([a-z][a-z0-9_]*)\s*}}")
_OPTIONAL = re.compile(r"\[\[(.*?)\]\]", re.DOTALL)
_CLOSED = ConfigDict(extra="forbid", strict=False)


@dataclass(frozen=True, config=_CLOSED)
class Filter:
    """A value that the reader of a dashboard may choose.

    `values` is a closed list, None where it is free or read from the database, then `source` says which list it is.
    """

    key: str
    name: str
    kind: Literal["text", "date", "number"]
    values: tuple[str, ...] | None = None
    source: Literal["symbols", "models", "runs"] | None = None


@dataclass(frozen=True, config=_CLOSED)
class Question:
    """One question: its SQL, the columns that it answers with, how it is shown, and where on the grid.

    `description` says what it answers, in a sentence; `settings` are Metabase's visualization settings; `tags` are the
    keys of the filters that the SQL takes, in their order there.
    """

    key: str
    name: str
    description: str
    sql: str
    display: Literal["scalar", "table", "line", "area", "bar", "row", "scatter"]
    columns: tuple[str, ...]
    settings: Mapping[str, Any]
    row: int
    col: int
    width: int
    height: int
    tags: tuple[str, ...]


@dataclass(frozen=True, config=_CLOSED)
class Text:
    """A heading, or a tile of Markdown."""

    text: str
    row: int
    col: int
    width: int
    height: int
    heading: bool = False


@dataclass(frozen=True, config=_CLOSED)
class Dashboard:
    """What belongs on one page; questions and texts share a grid of `GRID` columns. The lowest `position` is first."""

    key: str
    name: str
    description: str
    filters: tuple[Filter, ...]
    questions: tuple[Question, ...]
    texts: tuple[Text, ...] = ()
    position: int = 0


def load_dashboards(folder: Path = FOLDER) -> tuple[Dashboard, ...]:
    """The dashboards of a folder in their order: `<key>.json` each, with `<key>/<question>.sql`.

    Raises ConfigError with the file and the key's path for whatever Metabase would refuse, or show wrongly.
    """
    files = sorted(folder.glob("*.json"))
    if not files:
        raise ConfigError(f"{folder}: expected a JSON file for each dashboard, found none")
    dashboards = tuple(sorted(map(_load, files), key=lambda dashboard: (dashboard.position, dashboard.key)))
    for what, keys in (
        ("question", [question.key for dashboard in dashboards for question in dashboard.questions]),
        ("dashboard's name", [dashboard.name for dashboard in dashboards]),
    ):
        twice = [key for key, count in Counter(keys).items() if count > 1]
        _check(not twice, folder, f"each {what} must be there once, received {twice} more often")
    return dashboards


def tags_of(sql: str) -> tuple[str, ...]:
    """The filters that a question's SQL takes, in their order there, each once."""
    return tuple(dict.fromkeys(_TAG.findall(sql)))


def bound_sql(question: Question, values: Mapping[str, object]) -> tuple[str, dict[str, object]]:
    """The question for these values of its filters: SQL with named parameters (`%(symbol)s`), and what they hold.

    A clause in double brackets stays where all of its filters have a value. Values are handed over beside the SQL,
    never written into it; those of other filters are left out. Raises ConfigError for a filter that must have one.
    """
    values = {key: value for key, value in values.items() if key in question.tags and value is not None}

    def keep(clause: re.Match[str]) -> str:
        return clause[1] if set(tags_of(clause[1])) <= set(values) else ""

    sql = _OPTIONAL.sub(keep, question.sql)
    needed = tags_of(sql)
    missing = [tag for tag in needed if tag not in values]
    if missing:
        raise ConfigError(f"the question {question.key} needs a value for {', '.join(missing)}, received none")
    return _TAG.sub(r"%(\1)s", sql.replace("%", "%%")), {tag: values[tag] for tag in needed}


def _load(path: Path) -> Dashboard:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON: {error}") from None
    _check(isinstance(data, dict), path, "expected an object")
    folder = path.with_suffix("")
    for number, question in enumerate(data.get("questions", [])):
        _check(isinstance(question, dict) and "key" in question, path, f"questions.{number}: expected a key")
        _check(not {"sql", "tags"} & set(question), path, f"questions.{number}: the SQL has a file of its own")
        question["sql"] = _read_sql(folder / f"{question['key']}.sql")
        question["tags"] = tags_of(question["sql"])
    try:
        dashboard = TypeAdapter(Dashboard).validate_python({"key": path.stem, **data})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path}: {place}: {first['msg']}, received {first['input']!r}") from None
    strays = {file.stem for file in folder.glob("*.sql")} - {question.key for question in dashboard.questions}
    _check(not strays, path, f"SQL without a question: {sorted(strays)}")
    _check_dashboard(dashboard, path)
    return dashboard


def _read_sql(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        raise ConfigError(f"{path}: a question without its SQL") from None


def _check_dashboard(dashboard: Dashboard, path: Path) -> None:
    declared = [each.key for each in dashboard.filters]
    _check(len(declared) == len(set(declared)), path, f"a filter is declared twice: {declared}")
    used = {tag for question in dashboard.questions for tag in question.tags}
    _check(used == set(declared), path, f"filters: expected those that the SQL takes, {sorted(used)}, not {declared}")
    for question in dashboard.questions:
        _check(_KEY.fullmatch(question.key) is not None, path, f"{question.key!r}: expected lower case and underscores")
        _check(
            bool(question.description.strip()), path, f"{question.key}: expected a sentence that says what it answers"
        )
        named = set(_columns_named(question.settings))
        strange = sorted(named - set(question.columns))
        _check(not strange, path, f"{question.key}: settings name columns that it does not answer with: {strange}")
    _check_places([*dashboard.questions, *dashboard.texts], path)


def _columns_named(settings: Mapping[str, Any]) -> Iterator[str]:
    """Every column that visualization settings speak of."""
    for key in ("graph.dimensions", "graph.metrics"):
        yield from settings.get(key, ())
    if "scalar.field" in settings:
        yield settings["scalar.field"]
    yield from (column["name"] for column in settings.get("table.columns", ()))
    for rule in settings.get("table.column_formatting", ()):
        yield from rule["columns"]
    for name in settings.get("column_settings", {}):
        kind, column = json.loads(name)
        assert kind == "name", f'columns are named by ["name", column], received {name}'
        yield column


def _check_places(tiles: Sequence[Question | Text], path: Path) -> None:
    """Every tile lies on the grid, none on another."""
    for tile in tiles:
        inside = tile.row >= 0 and 0 <= tile.col < tile.col + tile.width <= GRID and tile.height > 0
        _check(inside, path, f"{_name(tile)}: expected a place on the {GRID} columns")
    for one, other in combinations(tiles, 2):
        apart = (
            one.col + one.width <= other.col
            or other.col + other.width <= one.col
            or one.row + one.height <= other.row
            or other.row + other.height <= one.row
        )
        _check(apart, path, f"{_name(one)} and {_name(other)} lie on one another")


def _name(tile: Question | Text) -> str:
    return tile.key if isinstance(tile, Question) else repr(tile.text)


def _check(holds: bool, path: Path, complaint: str) -> None:
    if not holds:
        raise ConfigError(f"{path}: {complaint}")
