"""A checkpoint holds what it was given to the last bit, and what is no whole checkpoint of this training is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from perpcast.errors import DataError
from perpcast.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

ARRAYS: list[np.ndarray] = [
    np.array([0.1, np.pi, -0.0], np.float32),
    np.array([7, 2**32 - 1], np.uint32),
    np.array(3, np.int64),
]
CHECKPOINT = Checkpoint(
    run="a" * 64,
    epoch=2,
    history={"loss": [0.1 + 0.2, 1 / 3], "val_loss": [5e-324, 1e300]},
    best_loss=1 / 3,
    waited=1,
    constant=0,
    events_bytes=99,
    network=ARRAYS,
    optimizer=ARRAYS[:1],
    best=[np.empty((0, 2), np.float32)],
)


def assert_same(one: Checkpoint, other: Checkpoint) -> None:
    for part in ("network", "optimizer", "best"):
        for left, right in zip(getattr(one, part), getattr(other, part), strict=True):
            assert left.dtype == right.dtype
            assert left.shape == right.shape
            assert left.tobytes() == right.tobytes()
    assert replace(one, network=[], optimizer=[], best=[]) == replace(other, network=[], optimizer=[], best=[])


def test_checkpoint_comes_back_to_the_last_bit(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path, "a" * 64) is None
    save_checkpoint(tmp_path, CHECKPOINT)
    loaded = load_checkpoint(tmp_path, "a" * 64)
    assert loaded is not None
    assert_same(loaded, CHECKPOINT)


def test_checkpoint_replaces_the_one_before_and_what_a_killed_process_left_aside(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, CHECKPOINT)
    (tmp_path / "checkpoint.npz.aside").write_bytes(b"half of a chec")
    later = replace(CHECKPOINT, epoch=3, network=[*ARRAYS, *ARRAYS])
    save_checkpoint(tmp_path, later)
    loaded = load_checkpoint(tmp_path, "a" * 64)
    assert loaded is not None
    assert_same(loaded, later)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.npz"]


def test_checkpoint_of_another_training_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, CHECKPOINT)
    with pytest.raises(DataError, match=r"checkpoint\.npz is of another training: .* with --restart"):
        load_checkpoint(tmp_path, "b" * 64)


@pytest.mark.parametrize("place", range(0, 100, 4))
def test_checkpoint_with_a_flipped_bit_is_refused_or_the_same(tmp_path: Path, place: int) -> None:
    """At 25 places from the first byte to the last; a few bits of a zip file mean nothing."""
    save_checkpoint(tmp_path, CHECKPOINT)
    path = tmp_path / "checkpoint.npz"
    data = bytearray(path.read_bytes())
    data[place * len(data) // 100] ^= 1
    path.write_bytes(data)
    try:
        loaded = load_checkpoint(tmp_path, "a" * 64)
    except DataError as error:
        assert "is damaged" in str(error)  # noqa: PT017
        assert "delete it" in str(error)  # noqa: PT017
    else:
        assert loaded is not None
        assert_same(loaded, CHECKPOINT)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.7, 0.99])
def test_checkpoint_cut_off_is_refused(tmp_path: Path, share: float) -> None:
    save_checkpoint(tmp_path, CHECKPOINT)
    path = tmp_path / "checkpoint.npz"
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(DataError, match="is damaged"):
        load_checkpoint(tmp_path, "a" * 64)


def test_checkpoint_of_another_kind_is_refused(tmp_path: Path) -> None:
    """A zip file without our entries, and one that pickles: the program must not read it."""
    (tmp_path / "checkpoint.npz").write_bytes(b"")
    np.savez(tmp_path / "checkpoint.npz", other=np.zeros(3))
    with pytest.raises(DataError, match="is damaged"):
        load_checkpoint(tmp_path, "a" * 64)
    np.savez(tmp_path / "checkpoint.npz", allow_pickle=True, plain=np.array([{"run": "a" * 64}], object))
    with pytest.raises(DataError, match="is damaged"):
        load_checkpoint(tmp_path, "a" * 64)
