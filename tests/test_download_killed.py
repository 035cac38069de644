"""A download that is killed at any of its places and run again ends with the tables of one that was never disturbed."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

import numpy as np
import pytest

from perpcast.database import DatabaseAddress
from perpcast.kill_point import kill_points
from tests.download_world import (
    ROOT,
    SYMBOLS,
    SmallExchange,
    Stage,
    Tables,
    assert_part_of,
    assert_same_tables,
    small_exchange,
    stage,
    undisturbed_tables,
)

# Of the modules that tests.download_world imports: all that a download consists of.
PLACES = [name for name in kill_points() if name.startswith("dl.")]

# Written in small parts, so that several belong to one symbol, whatever is fastest on a real network.
PROGRAM = "import perpcast.download.run as run; run.STRETCH_PAGES = 2; import download_data; download_data.main()"

# Every run passes every place once for each symbol; an empty database takes three writes of candles for each, or more.
PASSES = {place: len(SYMBOLS) * (3 if place.endswith("_insert") else 1) for place in PLACES}
LATE_PLACES = [name for name in PLACES if not name.endswith("_insert")]  # a second run passes them as often


@pytest.fixture(scope="module")
def exchange() -> Iterator[SmallExchange]:
    with small_exchange() as running:
        yield running


@pytest.fixture(scope="module")
def undisturbed(postgres: DatabaseAddress, exchange: SmallExchange, tmp_path_factory: pytest.TempPathFactory) -> Tables:
    return undisturbed_tables(postgres, tmp_path_factory.mktemp("undisturbed"), exchange)


def kill(own: Stage, place: str, draw: np.random.Generator, undisturbed: Tables) -> None:
    """Runs the stage until it dies there, at some passing; what it leaves is part of the truth, and nothing else."""
    passing = draw.integers(1, PASSES[place], endpoint=True)
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, *own.configuration],
        env=own.environment(PERPCAST_KILL_POINT=f"{place}:{passing}"),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ended.returncode == -signal.SIGKILL, f"{place}:{passing} was not reached\n{ended.stdout}{ended.stderr}"
    assert_part_of(own.tables(), undisturbed)


def run_again(own: Stage, undisturbed: Tables) -> None:
    result = own.run()
    assert result.exit_code == 0, result.stderr
    assert_same_tables(own.tables(), undisturbed)


def test_places_are_where_the_faults_of_a_download_are() -> None:
    parts = ("insert", "cursor", "funding")
    assert set(PLACES) == {f"dl.{when}_{part}" for when in ("before", "after") for part in parts}


@pytest.mark.fault("D02")
@pytest.mark.soak(25)
@pytest.mark.parametrize("place", PLACES)
def test_download_killed_and_run_again_stores_what_an_undisturbed_one_does(
    postgres: DatabaseAddress, exchange: SmallExchange, undisturbed: Tables, tmp_path: Path, place: str, seed: int
) -> None:
    draw = np.random.default_rng([seed, crc32(place.encode())])
    with stage(postgres, tmp_path, exchange.section) as own:
        kill(own, place, draw, undisturbed)
        run_again(own, undisturbed)


@pytest.mark.fault("D02")
@pytest.mark.soak(25)
def test_download_killed_twice_and_run_again_stores_what_an_undisturbed_one_does(
    postgres: DatabaseAddress, exchange: SmallExchange, undisturbed: Tables, tmp_path: Path, seed: int
) -> None:
    draw = np.random.default_rng(seed)
    first, second = str(draw.choice(PLACES)), str(draw.choice(LATE_PLACES))
    with stage(postgres, tmp_path, exchange.section) as own:
        for place in (first, second):
            kill(own, place, draw, undisturbed)
        run_again(own, undisturbed)
