"""What goes wrong out there, what has to come of it, and which tests show it: python -m tests.faults

Reads the marks `@pytest.mark.fault("D01")` of the tests; writes docs/faults.md.
"""

import ast
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "faults.md"

AREAS = {"D": "Download of history", "B": "Database", "M": "Live market data"}


@dataclass(frozen=True)
class Fault:
    """What happens, and what the program has to make of it."""

    id: str
    happens: str
    required: str


CATALOGUE = (
    Fault(
        "D01",
        "A connection is reset or gives no answer in the middle of a page",
        "The page is asked for again, after growing pauses and not for ever; in the end the tables are those of an "
        "undisturbed run",
    ),
    Fault(
        "D02",
        "The process is killed at any place, also between a page and the note of what is missing",
        "The next run completes the tables: no bar twice, none missing",
    ),
    Fault(
        "D03",
        "The exchange finds the requests too many (HTTP 429, retCode 10006) and says when there is room again",
        "Nothing is asked before that time, and never faster than the limits allow",
    ),
    Fault(
        "D04",
        "The exchange bans the IP (HTTP 403)",
        "Ten minutes of silence, said in a line; then it goes on by itself, with one question first",
    ),
    Fault("D05", "A GET that carries a body, which the exchange answers with 403", "No GET carries one"),
    Fault(
        "D06",
        "The newest row of a page is the bar that still runs",
        "It is not stored before the exchange's clock says that it has closed",
    ),
    Fault(
        "D07",
        "Rows come in another order, twice, or from outside the page that was asked for",
        "Sorted by their own times, each bar once, nothing from outside",
    ),
    Fault(
        "D08",
        "Bars are missing inside an answer, without a word about it",
        "They are asked for again, then recorded as a gap with its cause; nothing is filled in",
    ),
    Fault(
        "D09",
        "The exchange changes a candle that it had given as closed",
        "The new values count, those before are kept beside them, and the run says so",
    ),
    Fault(
        "D10",
        "An answer is no JSON: an HTML page, broken compression, an error under HTTP 200",
        "An error that names host, symbol and page; nothing of that page is stored",
    ),
    Fault(
        "D11",
        "A row holds what no candle can: NaN, a negative price, a high below the low, 1e308, one time with two values",
        "That row is rejected with its reason and counted; the rest of its page is stored and the run goes on",
    ),
    Fault("D12", "An answer is about another symbol or another interval", "It is not believed"),
    Fault(
        "D13",
        "A symbol is delisted, renamed, or does not trade yet",
        "It is skipped with the reason; the history that is stored stays",
    ),
    Fault(
        "D14",
        "This machine's clock, or its time zone, is wrong",
        "The exchange's clock decides what is closed and what is newest; a clock that is off by a day ends the run",
    ),
    Fault(
        "D15",
        "The database's disk fills up while candles are stored",
        "The run ends and says so, no page is stored in part, and the same command completes when there is room",
    ),
    Fault("D16", "Two downloads into one database at once", "The second one ends at once and says why"),
    Fault(
        "D17",
        "Ctrl-C or SIGTERM in the middle of a page",
        "A line, exit code 130 or 143, nothing stored in part; the next run goes on from there",
    ),
    Fault(
        "B01",
        "PostgreSQL does not run",
        "An embedded server is started; of any other, a line says where nothing answers",
    ),
    Fault("B02", "PostgreSQL stands still for a while", "It is waited for; nothing is lost"),
    Fault(
        "B03",
        "PostgreSQL crashes",
        "What was committed stays; the run goes on when the server is back within a minute, else it ends with a line",
    ),
    Fault(
        "B04",
        "The connection is lost when a COMMIT was sent, and its reply with it",
        "The write is done again so that no row is there twice and none is missing",
    ),
    Fault(
        "B06",
        "Another session is in the way: deadlock, serialization failure, a lock that is not given up",
        "The whole transaction is done again, a few times; then a line says what to do",
    ),
    Fault(
        "B07",
        "There is no room left for the database's log, and the server stops",
        "A line points to it, starting it again names the reason; when there is room the same command completes",
    ),
    Fault(
        "B10",
        "A transaction of ours is left open",
        "The server ends it after a minute and its locks with it; a write that was caught by that is done again",
    ),
    Fault(
        "B11",
        "The role may not write, or the database is read-only",
        "A line with the grant that is missing, or with what makes it read-only",
    ),
    Fault("B13", "The server and the process live in other time zones than UTC", "The same rows"),
    Fault(
        "B16",
        "Names and texts made to break a query: quotes, placeholders, control characters, NUL, emoji, 10 kB",
        "To every query they are values; what cannot be stored is refused and harms nothing else",
    ),
    Fault(
        "M01",
        "The stream's connection is closed",
        "It is opened anew after a pause that differs from client to client; bars missed meanwhile are fetched before "
        "anything is decided",
    ),
    Fault(
        "M02",
        "The stream's connection stays open, and nothing comes",
        "That is noticed in time and the connection replaced; what is too old is not acted upon",
    ),
    Fault(
        "M03",
        "Pings are answered, but one topic has fallen silent",
        "The silence of each topic is noticed by itself, and the topic subscribed anew",
    ),
    Fault(
        "M04",
        "A subscription is refused, or another one is answered",
        "It does not count as subscribed and is asked for again",
    ),
    Fault(
        "M05",
        "The end of a bar is confirmed twice, or never",
        "One decision for each bar; an unconfirmed one is fetched over REST",
    ),
    Fault("M06", "A bar comes late, out of order, or from the future", "It is never acted upon"),
    Fault(
        "M14",
        "A message is malformed, binary, huge, of an unknown topic, with nulls or with fields that nobody knows",
        "It is dropped and counted, unknown fields do no harm, and the stream goes on",
    ),
)


def marked_tests(folder: Path = ROOT / "tests") -> dict[str, list[str]]:
    """The tests that inject each fault, as `file::name`, by its id; nothing is imported for it.

    A mark stands in the decorators of a test, or in a constant of its module that these name.
    """
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted(folder.glob("test_*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        constants = {
            target.id: statement
            for statement in tree.body
            if isinstance(statement, ast.Assign)
            for target in statement.targets
            if isinstance(target, ast.Name)
        }
        loose = set(_marks(tree))
        for test in tree.body:
            if isinstance(test, ast.FunctionDef | ast.AsyncFunctionDef):
                marks = {mark for decorator in test.decorator_list for mark in _marks(decorator, constants)}
                loose -= marks
                for id in sorted({ast.literal_eval(argument) for mark in marks for argument in mark.args}):
                    found[id].append(f"{path.name}::{test.name}")
        if loose:
            raise ValueError(f"{path}: line {min(mark.lineno for mark in loose)}: a fault mark belongs to no test")
    return dict(found)


def _marks(tree: ast.AST, constants: Mapping[str, ast.AST] = {}) -> Iterator[ast.Call]:
    """Every `pytest.mark.fault(...)` inside, and inside the constants that are named there."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.fault":
            yield node
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in constants:
            yield from _marks(constants[node.id])


def page(catalogue: Sequence[Fault], tests: dict[str, list[str]]) -> str:
    """The catalogue in Markdown, a table for each area."""
    lines = [
        "# Faults",
        "",
        "What is injected on purpose, what has to come of it, and the tests that show it. Written by",
        "`python -m tests.faults` from the marks of the tests.",
    ]
    for letter, area in AREAS.items():
        lines += ["", f"## {area}", "", "| id | fault | required | tests |", "|---|---|---|---|"]
        for fault in catalogue:
            if fault.id.startswith(letter):
                shown = "<br>".join(f"`{test}`" for test in tests.get(fault.id, []))
                lines.append(f"| {fault.id} | {fault.happens} | {fault.required} | {shown} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(CATALOGUE, marked_tests()), encoding="utf-8")
