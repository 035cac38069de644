"""The same training on JAX, and compiled by XLA: from the same weights, without dropout, it has the same losses."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perpcast.models import build_model
from perpcast.training import loop
from perpcast.training.dataset import Dataset
from perpcast.training.progress import read_history
from tests.model_world import TASK, settings, small_dataset
from tests.tensorboard_events import points_of

ROOT = Path(__file__).parents[1]
SETTINGS = settings(dropout=0.0, epochs=3)

# What the backends draw from one seed differs: the weights to begin with are handed over.
PROGRAM = """
import json, sys
from pathlib import Path
import keras, numpy as np
from perpcast.training import loop
from tests.model_world import small_dataset
from tests.test_training_backends import SETTINGS, weights_to_begin_with
folder = Path(sys.argv[1])
with weights_to_begin_with(folder / "weights.npz"):
    trained = loop.train(small_dataset(folder), SETTINGS, folder / "jax")
rows = trained.dataset.index["v1"][:300]
importance = trained.explain(rows).importance().tolist()
print(json.dumps([keras.backend.backend(), trained.raw(rows).tolist(), importance]))
"""


@contextmanager
def weights_to_begin_with(path: Path) -> Iterator[None]:
    """Inside, every network that the loop builds begins with these weights."""
    with np.load(path) as stored:
        weights = [stored[name] for name in stored.files]

    def build(*arguments: Any, **named: Any) -> Any:
        network = build_model(*arguments, **named)
        network.set_weights(weights)
        return network

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "build_model", build)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backends")
    np.savez(folder / "weights.npz", *build_model(TASK, SETTINGS).get_weights())
    return folder


@pytest.fixture(scope="module")
def dataset(folder: Path) -> Dataset:
    return small_dataset(folder)


@pytest.fixture(scope="module")
def reference(folder: Path, dataset: Dataset) -> loop.Trained:
    """TensorFlow, not compiled by XLA."""
    with weights_to_begin_with(folder / "weights.npz"):
        return loop.train(dataset, SETTINGS, folder / "tensorflow")


def test_jax_learns_what_tensorflow_learns(folder: Path, reference: loop.Trained, dataset: Dataset) -> None:
    pytest.importorskip("jax")
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(folder)],
        env={**os.environ, "KERAS_BACKEND": "jax"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    backend, raw, importance = json.loads(ended.stdout.splitlines()[-1])
    assert backend == "jax"
    history = read_history(folder / "jax")
    # Measured: 2e-7 over all three epochs.
    for column in ("loss", "val_loss", "gradient_norm"):
        np.testing.assert_allclose(history[column], reference.history[column], rtol=1e-4)
    np.testing.assert_allclose(history["learning_rate"], reference.history["learning_rate"], rtol=1e-5)
    rows = dataset.index["v1"][:300]
    assert np.corrcoef(np.array(raw)[:, 0], dataset.expected_return[rows, 0])[0, 1] > 0.8
    np.testing.assert_allclose(importance, reference.explain(rows).importance(), atol=1e-4)
    points = points_of(folder / "jax")
    assert points["loss/V1"] == list(enumerate(map(np.float32, history["val_loss"]), 1))
    assert "variable_importance" in points


def test_xla_computes_the_same_training(folder: Path, reference: loop.Trained, dataset: Dataset) -> None:
    xla = settings(**{**SETTINGS.model_dump(), "xla": True})
    with weights_to_begin_with(folder / "weights.npz"):
        compiled = loop.train(dataset, xla, folder / "xla")
    assert compiled.reader.model.jit_compile
    for column in ("loss", "val_loss", "gradient_norm"):
        np.testing.assert_allclose(compiled.history[column], reference.history[column], rtol=1e-4)
