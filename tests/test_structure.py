"""The house keeps its laws: imports go down the ladder, and each thing that must live in one place lives only there."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The floors of the design, lowest first. A room imports rooms on lower floors and itself, never a neighbour.
FLOORS = [
    ["config", "errors", "kill_point", "timeframe", "market", "task"],
    ["features", "exit_policy", "decision", "sizing", "backtest", "quality", "outputs"],
    ["evaluation", "models", "bundle", "simulator", "database", "exchange"],
    ["live", "training", "download", "prepare", "universe"],
    ["command_line"],
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# (importer, imported) on one floor, with the reason.
NEIGHBOURS = {
    ("config", "errors"): "the ground's own error tree",
    ("config", "timeframe"): "the ground's own interval names",
    ("quality", "exit_policy"): "what is counted are outcomes of the policy",
    ("models", "bundle"): "an export is compared and timed in the very sessions that will run it",
    ("decision", "exit_policy"): "a decision is about trades under the policy",
    ("backtest", "exit_policy"): "what a trade earns, and by which walk",
    ("backtest", "decision"): "which trades are taken",
    ("backtest", "sizing"): "how large they are",
}

MODULES = sorted((ROOT / "perpcast").rglob("*.py"))
SCRIPTS = sorted(ROOT.glob("*.py")) + sorted((ROOT / "metabase").rglob("*.py")) + sorted((ROOT / "vast").rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(ROOT / "perpcast").parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Every module that the file imports, lazily or not, by its dotted name."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def rooms_imported(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imports(path) if name.startswith("perpcast.")}


def identifiers(path: Path) -> set[str]:
    """Dotted attribute chains such as `time.time` and `os.environ`."""
    return {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}


def strings(path: Path) -> set[str]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down_the_ladder(path: Path) -> None:
    own = room(path)
    if own == "__init__":
        return
    for other in rooms_imported(path) - {own}:
        allowed = FLOOR[other] < FLOOR[own] or (own, other) in NEIGHBOURS or path.name == "__main__.py"
        assert allowed, f"{own} (floor {FLOOR[own] + 1}) imports {other} (floor {FLOOR[other] + 1})"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_below_the_scripts_no_clock_no_environment_no_global_randomness(path: Path) -> None:
    if room(path) == "command_line" or path.name == "__main__.py":
        return
    used = identifiers(path)
    clocks = {"time.time", "time.time_ns", "datetime.now", "datetime.utcnow", "datetime.today", "date.today"}
    assert not used & clocks
    assert not used & {"os.environ", "os.getenv"}
    assert "random" not in imports(path)
    seeded = {"np.random.default_rng", "np.random.Generator", "np.random.SeedSequence", "np.random"}
    assert (
        not {name for name in used if name.startswith("np.random.")}
        - seeded
        - {name for name in used if name.startswith("np.random.default_rng.")}
    )


@pytest.mark.parametrize("path", MODULES + SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_sql_bybit_names_and_pickle_stay_where_they_belong(path: Path) -> None:
    home = room(path) if path in MODULES else ""
    if home != "database":
        assert not {name.split(".")[0] for name in imports(path)} & {"sqlalchemy", "psycopg2"}
    if home not in ("exchange", "simulator"):
        bybit = {
            "retCode",
            "retMsg",
            "retExtInfo",
            "nextPageCursor",
            "lotSizeFilter",
            "launchTime",
            "fundingRateTimestamp",
        }
        assert not strings(path) & bybit
    if home != "config" and path.suffix == ".py":
        assert "yaml.safe_load" not in identifiers(path)
    assert not imports(path) & {"pickle", "cloudpickle", "joblib", "dill"}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_drawer_for_leftovers(path: Path) -> None:
    assert not set(path.stem.split("_")) & {"utils", "util", "helpers", "helper", "common", "core", "manager", "misc"}


def test_live_runner_reaches_no_training_stack() -> None:
    """Statically, over every import that the runner can reach, lazy ones included."""
    reached, queue = set(), [ROOT / "live_runner.py"]
    while queue:
        path = queue.pop()
        if path in reached:
            continue
        reached.add(path)
        names = imports(path)
        tops = {name.split(".")[0] for name in names}
        assert not tops & {"tensorflow", "keras", "tf2onnx", "tensorboard", "matplotlib", "seaborn"}, path
        for name in names:
            if name.startswith("perpcast"):
                base = ROOT.joinpath(*name.split("."))
                queue += [found for found in (base.with_suffix(".py"), base / "__init__.py") if found.exists()]
    assert ROOT / "perpcast" / "exit_policy.py" in reached


@pytest.mark.parametrize("script", sorted(ROOT.glob("*.py")), ids=lambda path: path.name)
def test_script_explains_itself_with_an_example(script: Path) -> None:
    run = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=True)
    assert "Example" in run.stdout
    assert "--config" in run.stdout


def test_readme_names_every_file_at_the_top_and_every_room() -> None:
    readme = (ROOT / "README.md").read_text()
    rooms = [path for path in (ROOT / "perpcast").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    named = [
        path.name for path in [*ROOT.glob("*.py"), *ROOT.glob("config*.yaml"), *rooms] if path.name != "__init__.py"
    ]
    assert not [name for name in named if name not in readme]


def test_nothing_of_a_machine_or_a_registry_is_written_down() -> None:
    """Lock files hold no host names, and no file a path of the machine that it was written on."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    for name in tracked:
        if name.endswith(".png"):
            continue
        text = (ROOT / name).read_text(encoding="utf-8")
        assert "://" not in text or not name.endswith(".lock"), name
        assert "/home/" not in text or name.startswith("tests/"), name
