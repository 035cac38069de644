"""A model bundle for the runner's tests, without training: what rose over four bars is expected to go on rising."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from perpcast.bundle import Bundle, BundleParts, save_bundle
from perpcast.database import Database, ModelRecord, upsert_model
from perpcast.evaluation.certificate import (
    CERTIFICATE_VERSION,
    DATASET_CHECKS,
    MODEL_CHECKS,
    Certificate,
    Check,
    NullScore,
)
from perpcast.exit_policy import ExitPolicy
from perpcast.features.indicators import FEATURE_SET
from perpcast.features.inputs import KNOWN, OBSERVED
from perpcast.features.scaler import Scaler
from perpcast.market import Side
from perpcast.outputs import OutputReading, ReturnReading
from perpcast.task import Target, Task

LOOKBACK = 60
QUANTILES = (0.5, 0.75, 0.9)
FINGERPRINT = "c0ffee" * 10 + "c0de"


@dataclass(frozen=True)
class LinearNetwork:
    """A network by hand, whole and in its two parts: columns = sum over bars of `of_bar` x embedding, + `offsets`.

    The embedding of a bar is its inputs @ `weights` + `of_symbol` x code; selection is the softmax of the inputs,
    attention the softmax of the embeddings' first units.
    """

    observed: int
    known: int
    weights: np.ndarray  # [observed + known, columns]
    of_bar: np.ndarray  # [lookback]
    offsets: np.ndarray  # [columns]
    of_symbol: float = 0.0

    def model(self) -> bytes:
        """{observed, known, static_categories} to columns."""
        join = helper.make_node("Concat", ["observed", "known"], ["bars"], axis=2)
        # [B, T, columns] + [B, 1, 1]
        widen = helper.make_node("Unsqueeze", ["of_code", "one"], ["of_windows_code"])
        add = helper.make_node("Add", ["linear", "of_windows_code"], ["embeddings"])
        nodes = [join, *self._embedding_nodes(), widen, add, *self._reading_nodes()]
        lookback = len(self.of_bar)
        inputs = {"observed": (lookback, self.observed), "known": (lookback, self.known), "static_categories": (1,)}
        return self._graph(nodes, inputs, {"outputs": (len(self.offsets),)})

    def step(self) -> bytes:
        """{bars, static_categories} to {embedding, selection}."""
        add = helper.make_node("Add", ["linear", "of_code"], ["embedding"])
        select = helper.make_node("Softmax", ["bars"], ["selection"], axis=-1)
        variables, columns = self.weights.shape
        outputs = {"embedding": (columns,), "selection": (variables,)}
        nodes = [*self._embedding_nodes(), add, select]
        return self._graph(nodes, {"bars": (variables,), "static_categories": (1,)}, outputs)

    def readout(self) -> bytes:
        """{embeddings, static_categories} to {outputs, attention}."""
        first = helper.make_node("Gather", ["embeddings", "zero"], ["first_units"], axis=2)
        attend = helper.make_node("Softmax", ["first_units"], ["attention"], axis=-1)
        lookback, columns = len(self.of_bar), len(self.offsets)
        inputs = {"embeddings": (lookback, columns), "static_categories": (1,)}
        outputs = {"outputs": (columns,), "attention": (lookback,)}
        return self._graph([*self._reading_nodes(), first, attend], inputs, outputs)

    def _embedding_nodes(self) -> list[onnx.NodeProto]:
        return [
            helper.make_node("MatMul", ["bars", "weights"], ["linear"]),
            helper.make_node("Cast", ["static_categories"], ["code"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["code", "of_symbol"], ["of_code"]),
        ]

    def _reading_nodes(self) -> list[onnx.NodeProto]:
        return [
            helper.make_node("Mul", ["embeddings", "of_bar"], ["weighed"]),
            helper.make_node("ReduceSum", ["weighed", "one"], ["sum"], keepdims=0),
            helper.make_node("Add", ["sum", "offsets"], ["outputs"]),
        ]

    def _graph(
        self, nodes: list[onnx.NodeProto], inputs: Mapping[str, tuple[int, ...]], outputs: Mapping[str, tuple[int, ...]]
    ) -> bytes:
        constants = {
            "weights": self.weights.astype(np.float32),
            "of_bar": self.of_bar.astype(np.float32)[:, None],
            "offsets": self.offsets.astype(np.float32),
            "of_symbol": np.array(self.of_symbol, np.float32),
            "one": np.array([1]),
            "zero": np.array(0),
        }
        used = {name for node in nodes for name in node.input}
        kinds = dict.fromkeys((*inputs, *outputs), TensorProto.FLOAT) | {"static_categories": TensorProto.INT32}
        ends = [
            [helper.make_tensor_value_info(name, kinds[name], [None, *shape]) for name, shape in these.items()]
            for these in (inputs, outputs)
        ]
        initial = [numpy_helper.from_array(value, name) for name, value in constants.items() if name in used]
        graph = helper.make_graph(nodes, "by_hand", ends[0], ends[1], initial)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model)
        return model.SerializeToString()


def certificate() -> Certificate:
    """One that has passed everything; the network was made by hand, from no data."""
    checks = tuple(Check(name, True, "made by hand") for name in (*DATASET_CHECKS, *MODEL_CHECKS))
    return Certificate(CERTIFICATE_VERSION, FINGERPRINT, checks, NullScore((), ()))


def momentum(task: Task) -> LinearNetwork:
    """What rose over four bars before the signal bar's end goes on rising: buy columns, and sell ones with a minus."""
    weights = np.zeros((len(OBSERVED) + len(KNOWN), len(task.outputs)))
    weights[OBSERVED.index("price_change_4")] = np.repeat([0.3, -0.3], len(task.outputs) // 2)
    newest = np.eye(LOOKBACK)[-1]
    return LinearNetwork(len(OBSERVED), len(KNOWN), weights, newest, np.zeros(len(task.outputs)))


def momentum_parts(symbols: tuple[str, ...], policies: dict[Side, ExitPolicy]) -> BundleParts:
    """Everything of a bundle of that network, inputs and outputs unscaled."""
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
    observed = np.full((2, LOOKBACK, len(OBSERVED)), 0.01, np.float32)
    known = np.zeros((2, LOOKBACK, len(KNOWN)), np.float32)
    network = momentum(task)
    return BundleParts(
        model=network.model(),
        step=network.step(),
        readout=network.readout(),
        task=task,
        scaler=Scaler(columns, (0.0,) * len(columns), (1.0,) * len(columns)),
        reading=OutputReading(task, (ReturnReading(0.0, 1.0), ReturnReading(0.0, 1.0))),
        threshold=0.001,
        card={"dataset": {"fingerprint": FINGERPRINT}, "leak_certificate": certificate().to_json()},
        card_text="",
        golden=(observed, known, symbols[:2]),
    )


def make_model(
    database: Database,
    folder: Path,
    symbols: tuple[str, ...],
    policies: dict[Side, ExitPolicy],
    model_id: str = "momentum",
    card: Mapping[str, Any] | None = None,
) -> Bundle:
    """Writes the bundle and its row in model_metadata; `card` in place of one with a certificate."""
    parts = momentum_parts(symbols, policies)
    if card is not None:
        parts = replace(parts, card=card)
    bundle = save_bundle(folder / model_id, parts)
    upsert_model(
        database,
        ModelRecord(
            model_id=model_id,
            created_at=datetime(2025, 7, 1, tzinfo=UTC),
            task=parts.task.to_json(),
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
