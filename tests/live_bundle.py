"""A model bundle for the runner's tests, without training: what rose over four bars is expected to go on rising."""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from perpcast.bundle import Bundle, BundleParts, save_bundle
from perpcast.database import Database, ModelRecord, upsert_model
from perpcast.exit_policy import ExitPolicy
from perpcast.features.indicators import FEATURE_SET
from perpcast.features.inputs import KNOWN, OBSERVED
from perpcast.features.scaler import Scaler
from perpcast.market import Side
from perpcast.task import Target, Task

LOOKBACK = 60
QUANTILES = (0.5, 0.75, 0.9)


def linear_model(outputs: int) -> bytes:
    """outputs = observed[:, -1] @ weights, the sell half with the other sign; known inputs and symbol are ignored."""
    weights = np.zeros((len(OBSERVED), outputs), np.float32)
    weights[OBSERVED.index("price_change_4")] = np.repeat([0.3, -0.3], outputs // 2)
    shapes = {"observed": [None, LOOKBACK, len(OBSERVED)], "known": [None, LOOKBACK, len(KNOWN)]}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    inputs.append(helper.make_tensor_value_info("symbol", TensorProto.INT32, [None]))
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["observed", "last"], ["newest"], axis=1),
            helper.make_node("MatMul", ["newest", "weights"], ["outputs"]),
        ],
        "momentum",
        inputs,
        [helper.make_tensor_value_info("outputs", TensorProto.FLOAT, [None, outputs])],
        [numpy_helper.from_array(np.array(LOOKBACK - 1), "last"), numpy_helper.from_array(weights, "weights")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model.SerializeToString()


def make_model(
    database: Database,
    folder: Path,
    symbols: tuple[str, ...],
    policies: dict[Side, ExitPolicy],
    model_id: str = "momentum",
) -> Bundle:
    """Writes the bundle and its row in model_metadata."""
    task = Task(
        interval="15",
        lookback=LOOKBACK,
        feature_set=FEATURE_SET,
        static=("symbol",),
        known=KNOWN,
        observed=OBSERVED,
        targets=tuple(Target(side, "regression", 100, QUANTILES) for side in ("buy", "sell")),
        exit_policies={side: policy.to_json() for side, policy in policies.items()},
        symbols=symbols,
    )
    columns = (*OBSERVED, *KNOWN)
    plain = Scaler(columns, (0.0,) * len(columns), (1.0,) * len(columns))
    observed = np.full((2, LOOKBACK, len(OBSERVED)), 0.01, np.float32)
    known = np.zeros((2, LOOKBACK, len(KNOWN)), np.float32)
    parts = BundleParts(
        model=linear_model(len(task.outputs)),
        task=task,
        scaler=plain,
        target_scaler=Scaler(("buy", "sell"), (0.0, 0.0), (1.0, 1.0)),
        threshold=0.001,
        card={},
        card_text="",
        golden=(observed, known, symbols[:2]),
    )
    bundle = save_bundle(folder / model_id, parts)
    upsert_model(
        database,
        ModelRecord(
            model_id=model_id,
            created_at=datetime(2025, 7, 1, tzinfo=UTC),
            task=task.to_json(),
            architecture="momentum",
            parameters={},
            dataset_id="none",
            dataset_fingerprint="none",
            metrics={},
            baselines={},
            bundle_path=str(folder / model_id),
            bundle_sha256=bundle.sha256,
        ),
    )
    return bundle
