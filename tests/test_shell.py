"""shellcheck finds nothing in any shell script of the repository."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def scripts() -> list[str]:
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.sh", ".ci/run"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return sorted(set(listed.stdout.split()))


def test_shellcheck_finds_nothing() -> None:
    beside = Path(sys.executable).parent / "shellcheck"
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if not shellcheck:
        pytest.skip("no shellcheck: make setup installs it into .venv, or apt-get install shellcheck")
    found = scripts()
    if not found:
        pytest.skip("no git here that lists the scripts")
    assert {".ci/run", "requirements/install.sh", "vast/target.sh"} <= set(found)
    run = subprocess.run([shellcheck, "-x", *found], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
