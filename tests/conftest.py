"""What the tests share: a PostgreSQL server of their own on a free port, an empty database in it for each test, and the
two budgets: `pytest` takes every case once, `pytest --soak` takes what chance has a part in, many times, and writes its
table to docs/soak.md.

A test marked `soak(25)` draws all that it leaves to chance from `seed`: 0, and in a soak 0 to 24. Property tests draw
the same examples at every `pytest`, so that what fails was broken by the change; a soak draws new ones."""

import signal
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path

import hypothesis
import pytest
from sqlalchemy import Engine, text

from perpcast.database import DatabaseAddress, ensure_server, free_port, migrate, open_engine, remove_server

_numbers = count()

SOAK_EXAMPLES = 500
SOAK_KILLS = 10

# Files whose few tests take minutes, or an hour in a soak: begun first, no processor waits for the last of them.
LONGEST = ("test_models_volatility.py", "test_planted_edge.py", "test_training_killed.py", "test_end_to_end.py")

hypothesis.settings.register_profile("once", max_examples=30, deadline=None, derandomize=True)
hypothesis.settings.register_profile("soak", max_examples=SOAK_EXAMPLES, deadline=None)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--soak", action="store_true", help="large budgets for property and kill tests (make soak)")


def pytest_configure(config: pytest.Config) -> None:
    # Where the tests were started in the background, Ctrl-C is ignored; what they start would inherit that.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # likewise, by nohup
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
    hypothesis.settings.load_profile("soak" if config.getoption("--soak") else "once")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A soak repeats whatever kills something: the moment of the kill is never twice the same, or drawn by `seed`."""
    soaking = metafunc.config.getoption("--soak")
    own = metafunc.definition.get_closest_marker("soak")
    if own is not None:
        metafunc.parametrize("seed", range(own.args[0] if soaking else 1))
    elif soaking and "_killed_" in metafunc.function.__name__:
        metafunc.fixturenames.append("kill_round")
        metafunc.parametrize("kill_round", range(SOAK_KILLS))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A soak leaves out what would be the same again. The longest files come first, then those of many tests."""
    if config.getoption("--soak"):
        config.hook.pytest_deselected(items=[item for item in items if not _is_soaked(item)])
        items[:] = filter(_is_soaked, items)
    tests = Counter(item.path.name for item in items)
    items.sort(key=lambda item: (item.path.name not in LONGEST, -tests[item.path.name], item.path.name))


def _is_soaked(item: pytest.Item) -> bool:
    assert isinstance(item, pytest.Function)
    repeated = hasattr(item, "callspec") and not {"seed", "kill_round"}.isdisjoint(item.callspec.params)
    return repeated or "soaking" in item.fixturenames or hypothesis.is_hypothesis_test(item.obj)


@pytest.fixture
def soaking(request: pytest.FixtureRequest) -> None:
    """Asked for by a test that is too long for `make test`."""
    if not request.config.getoption("--soak"):
        pytest.skip("takes many minutes: make soak")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not config.getoption("--soak") or config.getoption("--collect-only"):
        return
    rows: dict[str, list[float]] = defaultdict(lambda: [0, 0, 0.0])
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            row = rows[report.nodeid.split("::")[0]]
            row[outcome == "failed"] += report.when == "call" or outcome == "failed"
            row[2] += report.duration
    path = Path(__file__).parents[1] / "docs" / "soak.md"
    lines = _other_files(path, rows)
    lines |= {name: f"| {name} | {n:.0f} | {bad:.0f} | {s:.0f} |" for name, (n, bad, s) in rows.items()}
    table = "\n".join(lines[name] for name in sorted(lines))
    path.write_text(
        f"# Soak\n\nWritten by `make soak`: {SOAK_EXAMPLES} examples for each property, {SOAK_KILLS} rounds of each "
        "test that kills, or as many seeds as its mark `soak` names. Each line is that of the file's last run.\n\n"
        f"| file | passed | failed | seconds |\n|---|---|---|---|\n{table}\n",
        encoding="utf-8",
    )


def _other_files(path: Path, rows: Collection[str]) -> dict[str, str]:
    """The lines of files that were not run this time and still exist."""
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("| tests/")]
    named = {line.split(" ")[1]: line for line in kept}
    return {name: line for name, line in named.items() if name not in rows and (path.parents[1] / name).exists()}


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DatabaseAddress]:
    """A server with its data in the tests' temporary folder, ended and deleted with the session."""
    directory = tmp_path_factory.mktemp("server") / "postgres"
    try:
        address = ensure_server(DatabaseAddress("127.0.0.1", free_port(), "template", "perpcast"), directory)
        engine = open_engine(address)
        migrate(engine)
        engine.dispose()
        yield address
    finally:
        remove_server(directory)


@pytest.fixture
def empty_database(postgres: DatabaseAddress) -> Iterator[DatabaseAddress]:
    """A database without tables."""
    yield from _new_database(postgres, "template1")


@pytest.fixture
def database(postgres: DatabaseAddress) -> Iterator[Engine]:
    """An empty database with the newest schema."""
    for address in _new_database(postgres, "template"):
        engine = open_engine(address)
        yield engine
        engine.dispose()


def _new_database(server: DatabaseAddress, template: str) -> Iterator[DatabaseAddress]:
    name = f"test_{next(_numbers)}"
    admin = open_engine(replace(server, name="postgres"))
    statements = admin.execution_options(isolation_level="AUTOCOMMIT")
    with statements.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name} TEMPLATE {template}"))
    yield replace(server, name=name)
    with statements.connect() as connection:
        connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    admin.dispose()
