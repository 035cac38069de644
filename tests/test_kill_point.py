"""Kill points: only the place that is armed kills, at the very passing that was asked for."""

import ast
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from perpcast import kill_point as module
from perpcast.kill_point import arm, kill_point, kill_points

ROOT = Path(__file__).parents[1]


@pytest.fixture
def kills(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """The signals that would have been sent; places and arming of this test are forgotten with it."""
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(module, "_passes", {})
    monkeypatch.setattr(module, "_armed", None)
    monkeypatch.setattr(module.os, "kill", lambda process, number: sent.append((process, number)))
    return sent


def test_place_that_is_not_armed_is_passed(kills: list[tuple[int, int]]) -> None:
    here, there = kill_point("here"), kill_point("there")
    here()
    arm("there", 1)
    here()
    assert kills == []
    there()
    assert kills == [(os.getpid(), signal.SIGKILL)]


def test_place_kills_at_the_passing_that_was_armed_counted_from_then_on(kills: list[tuple[int, int]]) -> None:
    here = kill_point("here")
    here()
    arm("here", 3)
    deaths = []
    for _ in range(5):
        here()
        deaths.append(len(kills))
    assert deaths == [0, 0, 1, 1, 1]


def test_places_are_named_by_their_modules(kills: list[tuple[int, int]]) -> None:
    for name in ("b", "a"):
        kill_point(name)
    assert kill_points() == ("a", "b")


def test_every_place_in_the_code_has_a_name_of_its_own() -> None:
    names: Counter[str] = Counter()
    for path in (ROOT / "perpcast").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "kill_point":
                (name,) = node.args
                assert isinstance(name, ast.Constant), path
                names[str(name.value)] += 1
    assert names
    assert set(names.values()) == {1}


def test_process_ends_as_by_kill_9() -> None:
    program = (
        "from perpcast.kill_point import arm, kill_point\n"
        "here = kill_point('here'); arm('here', 2)\n"
        "try:\n    here(); print('once', flush=True); here()\nfinally:\n    print('tidied up', flush=True)"
    )
    ended = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGKILL, "once\n", "")
