"""A network as ONNX, refused where onnxruntime answers anything else than Keras."""

import tempfile
import warnings
from pathlib import Path

import keras
import numpy as np
import onnxruntime

from perpcast.errors import DataError

# In units of the scaled targets, whose deviation is 1.
TOLERANCE = 1e-4
BATCHES = (1, 51)


def export_onnx(network: keras.Model, inputs: dict[str, np.ndarray]) -> tuple[bytes, float]:
    """The network as ONNX with a free batch size, and its largest difference from Keras on `inputs`, by batches.

    `inputs` are at least 51 scaled windows. Raises DataError where the difference is above TOLERANCE: that an export
    ran through proves nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        with warnings.catch_warnings():
            # Keras asks numpy for a name that numpy no longer has, to give it back to tf2onnx.
            warnings.filterwarnings("ignore", "In the future `np.object`", FutureWarning)
            network.export(path, format="onnx", verbose=False)
        model = path.read_bytes()
    difference = max(_difference(network, model, {name: x[:size] for name, x in inputs.items()}) for size in BATCHES)
    if not difference <= TOLERANCE:
        raise DataError(f"the exported network differs from Keras by {difference:.2g}, at most {TOLERANCE} is allowed")
    return model, difference


def _difference(network: keras.Model, model: bytes, inputs: dict[str, np.ndarray]) -> float:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    expected = keras.ops.convert_to_numpy(network(inputs, training=False))
    (received,) = session.run(None, inputs)
    return float(np.max(np.abs(np.asarray(received) - expected)))
