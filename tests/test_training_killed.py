"""A training that is killed at any of its places and goes on ends with the very result of one that was not disturbed.

To the last bit on a CPU, whichever backend: measured as zero difference in every number of the history and every
weight, over the seeds of the soak. Nothing is compared with a tolerance here.
"""

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from perpcast.kill_point import kill_points
from perpcast.training.dataset import Dataset
from perpcast.training.loop import Trained, train
from perpcast.training.progress import read_history, read_progress
from tests.model_world import settings, small_dataset
from tests.tensorboard_events import points_of

ROOT = Path(__file__).parents[1]
PLACES = [name for name in kill_points() if name.startswith("train.")]
EPOCHS, STEPS = 8, 4
SETTINGS = settings(epochs=EPOCHS, samples_per_epoch=STEPS * 64, d_model=4, pictures_every=6, early_stopping_patience=9)
BARS = 600
MEASURED = ("loss", "val_loss", "learning_rate", "gradient_norm")

PROGRAM = """
import sys
from pathlib import Path
from perpcast.kill_point import arm
from perpcast.training.loop import train
from tests.model_world import small_dataset
from tests.test_training_killed import BARS, SETTINGS
arm(sys.argv[1], int(sys.argv[2]))
train(small_dataset(Path(), BARS), SETTINGS, Path(sys.argv[3]), resume=True)
"""


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return small_dataset(Path(), BARS)


@pytest.fixture(scope="module")
def undisturbed(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, Path]:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "training"
    return train(dataset, SETTINGS, run_dir), run_dir


def kill(run_dir: Path, place: str, passing: int) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, place, str(passing), str(run_dir)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert ended.returncode == -signal.SIGKILL, f"{place}:{passing} was not reached\n{ended.stdout}{ended.stderr}"


def test_places_are_all_that_a_checkpoint_can_be_lost_at() -> None:
    checkpoint = {"train.ckpt_mid_write", "train.ckpt_before_rename", "train.ckpt_after_rename"}
    assert set(PLACES) == {"train.in_epoch", "train.epoch_end"} | checkpoint


@pytest.mark.soak(3)
def test_training_killed_at_every_place_and_resumed_ends_as_an_undisturbed_one(
    dataset: Dataset, undisturbed: tuple[Trained, Path], tmp_path: Path, seed: int
) -> None:
    """One training killed five times: at each place, in an order and at passings that the seed draws."""
    draw = np.random.default_rng(seed)
    for place in draw.permutation(PLACES):
        passings = STEPS + STEPS // 2 if place == "train.in_epoch" else 2
        kill(tmp_path / "run", str(place), int(draw.integers(1, passings, endpoint=True)))
        progress = read_progress(tmp_path / "run")
        assert progress is not None
        assert progress.state == "running"
    looks: list[int] = []
    result = train(dataset, SETTINGS, tmp_path / "run", resume=True, on_look=lambda epoch, _: looks.append(epoch))
    assert looks[-1] == 1 + int(np.argmin(result.history["val_loss"]))
    expected, expected_dir = undisturbed
    assert {name: result.history[name] for name in MEASURED} == {name: expected.history[name] for name in MEASURED}
    for weights, others in zip(result.network.get_weights(), expected.network.get_weights(), strict=True):
        np.testing.assert_array_equal(weights, others)
    written = read_history(tmp_path / "run")
    assert written == dict(result.history)
    assert len(written["loss"]) == EPOCHS
    points, others = points_of(tmp_path / "run"), points_of(expected_dir)
    assert points["loss/V1"] == others["loss/V1"] == list(enumerate(map(np.float32, expected.history["val_loss"]), 1))
    assert {tag: len(found) for tag, found in points.items()} == {tag: len(found) for tag, found in others.items()}


def test_resuming_what_has_ended_answers_at_once(undisturbed: tuple[Trained, Path], dataset: Dataset) -> None:
    expected, run_dir = undisturbed
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    calls: list[int] = []
    result = train(
        dataset,
        SETTINGS,
        run_dir,
        resume=True,
        on_epoch=lambda epoch, _: calls.append(epoch),
        on_step=lambda done, _: calls.append(done),
        on_look=lambda epoch, _: calls.append(epoch),
    )
    assert calls == []
    assert result.history == expected.history
    rows = dataset.index["test"][:20]
    np.testing.assert_array_equal(result.raw(rows), expected.raw(rows))
    assert {path.name: path.read_bytes() for path in run_dir.iterdir()} == before
