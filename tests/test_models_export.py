"""Exported networks answer as Keras, whole and in parts; what does not is refused."""

import json
from typing import Any

import keras
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from perpcast.bundle import Bundle
from perpcast.errors import DataError
from perpcast.features.scaler import Scaler
from perpcast.models import build_model, export
from perpcast.models.export import TOLERANCE, Exported, Latency, Timing, export_onnx
from perpcast.outputs import OutputReading, ReturnReading
from perpcast.task import Target, Task
from tests.model_world import LOOKBACK, TASK, settings, task_of

COLUMNS = (*TASK.observed, *TASK.known)
PLAIN = Scaler(COLUMNS, (0.0,) * len(COLUMNS), (1.0,) * len(COLUMNS))


def windows(n: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Scaled inputs of n windows."""
    rng = np.random.default_rng(seed)
    return {
        "observed": rng.normal(size=(n, LOOKBACK, len(TASK.observed))).astype(np.float32),
        "known": rng.uniform(-1, 1, (n, LOOKBACK, len(TASK.known))).astype(np.float32),
        "static_categories": rng.integers(0, len(TASK.symbols), (n, 1)).astype(np.int32),
    }


def network_of(task: Task = TASK, **changes: object) -> keras.Model:
    """A network with weights away from the zeros and ones of fresh biases and norms, as after a training."""
    network = build_model(task, settings(**changes))
    rng = np.random.default_rng(5)
    for variable in network.trainable_variables:
        variable.assign(variable + 0.2 * rng.normal(size=variable.shape))
    return network


def by_keras(network: keras.Model, inputs: dict[str, np.ndarray]) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(network(inputs)))


def buys(raw: np.ndarray) -> np.ndarray:
    """The decisions of a threshold of 0 on the first column."""
    return raw[:, 0] > 0


@pytest.fixture(scope="module")
def network() -> keras.Model:
    return network_of(variable_selection="stacked")


@pytest.fixture(scope="module")
def exported(network: keras.Model) -> Exported:
    return export_onnx(network, windows(51), buys, symbols=3)


@pytest.fixture
def again(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Lets `export_onnx` find these graphs, which a test may replace, without making them once more."""
    graphs = {name: getattr(exported, name) for name in ("model", "step", "readout")}
    monkeypatch.setattr(export, "_to_onnx", lambda name, *_: graphs[name])
    monkeypatch.setattr(export, "_latency", lambda *_: Latency(()))
    return graphs


def shifted(graph: bytes, by: float, output: int = -1) -> bytes:
    """The same network, one of its outputs larger."""
    model = onnx.load_from_string(graph)
    name = model.graph.output[output].name
    for node in model.graph.node:
        node.output[:] = ["before" if each == name else each for each in node.output]
    model.graph.node.append(
        helper.make_node("Constant", [], ["by"], value=helper.make_tensor("by", TensorProto.FLOAT, [], [by]))
    )
    model.graph.node.append(helper.make_node("Add", ["before", "by"], [name]))
    return model.SerializeToString()


# --- parity ---------------------------------------------------------------------------------------------------------


def bundle_of(exported: Exported, task: Task = TASK) -> Bundle:
    """Its inputs are scaled and its outputs raw."""
    reading = OutputReading(task, (ReturnReading(0.0, 1.0),) * len(task.targets))
    return Bundle(exported.step, exported.readout, task, PLAIN, reading, threshold=0.0)


def ask(bundle: Bundle, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """The raw columns [n, columns] of a bundle."""
    symbols = [bundle.task.symbols[code] for code in inputs["static_categories"][:, 0]]
    return np.column_stack(list(bundle.predict(inputs["observed"], inputs["known"], symbols).values()))


@pytest.mark.parametrize("n", [1, 7, 51, 130])
def test_whole_and_parts_answer_as_keras(exported: Exported, network: keras.Model, n: int) -> None:
    """Other windows than those of the export, by any batch; the network was stacked, what is exported is fused."""
    inputs = windows(n, seed=n)
    expected = by_keras(network, inputs)
    session = onnxruntime.InferenceSession(exported.model, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(np.asarray(session.run(None, inputs)[0]), expected, atol=TOLERANCE / 5)
    np.testing.assert_allclose(ask(bundle_of(exported), inputs), expected, atol=TOLERANCE / 5)
    assert 0 < exported.difference < TOLERANCE / 5


def test_explanation_of_the_parts_is_that_of_keras(exported: Exported, network: keras.Model) -> None:
    inputs = windows(20, seed=9)
    expected = network.explanation()(inputs)
    symbols = [TASK.symbols[code] for code in inputs["static_categories"][:, 0]]
    selection, attention = bundle_of(exported).explain(inputs["observed"], inputs["known"], symbols)
    np.testing.assert_allclose(selection, keras.ops.convert_to_numpy(expected["selection"]), atol=1e-5)
    np.testing.assert_allclose(attention, keras.ops.convert_to_numpy(expected["attention"]), atol=1e-5)
    np.testing.assert_allclose(selection.sum(axis=-1), 1, atol=1e-5)


def test_bundle_that_remembers_answers_as_one_that_does_not(exported: Exported) -> None:
    """Twelve bars of three symbols, one after the other; each third time one symbol is late."""
    rows = windows(9, seed=3)
    observed, known = (rows[name].reshape(3, 3 * LOOKBACK, -1) for name in ("observed", "known"))
    bundle = bundle_of(exported)
    for bar in range(2 * LOOKBACK):
        present = np.array([0, 1, 2] if bar % 3 else [2, 0])
        inputs = {
            "observed": observed[present, bar : bar + LOOKBACK],
            "known": known[present, bar : bar + LOOKBACK],
            "static_categories": present[:, None].astype(np.int32),
        }
        answers, alone = ask(bundle, inputs), ask(bundle_of(exported), inputs)
        np.testing.assert_allclose(answers, alone, atol=1e-6)
        np.testing.assert_array_equal(buys(answers), buys(alone))
    # Of each symbol the 6 bars of its first window, then every later bar once: 11, and 10 of the one that came late.
    assert bundle.bars_embedded == 3 * LOOKBACK + 2 * (2 * LOOKBACK - 1) + (2 * LOOKBACK - 2)


def test_classification_in_mixed_precision_is_exported_in_float32() -> None:
    """Against its float32 form: in half the digits Keras itself is off by 1e-2."""
    task = task_of(targets=tuple(Target(side, "classification", 8) for side in ("buy", "sell")))
    mixed = network_of(task, precision="mixed_bfloat16", vsn_rank=4)
    exact = network_of(task, vsn_rank=4)
    exact.set_weights(mixed.get_weights())
    exported = export_onnx(mixed, windows(51), buys, symbols=1)
    inputs = windows(30, seed=1)
    session = onnxruntime.InferenceSession(exported.model, providers=["CPUExecutionProvider"])
    received = np.asarray(session.run(None, inputs)[0])
    assert received.shape == (30, 2)
    np.testing.assert_allclose(received, by_keras(exact, inputs), atol=TOLERANCE / 5)
    assert np.abs(received - by_keras(mixed, inputs)).max() > TOLERANCE
    assert [timing.windows for timing in exported.latency.timings] == [1] * 4  # one symbol: once


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [("model", "exported network differs"), ("readout", "exported pair of step and readout differs")],
)
def test_graph_that_answers_otherwise_is_refused(
    again: dict[str, bytes], network: keras.Model, name: str, message: str
) -> None:
    """All outputs larger by twice the tolerance; half of the tolerance is let pass, and told."""
    whole = again[name]
    outputs = [each.name for each in onnx.load_from_string(whole).graph.output]
    place = outputs.index("outputs") if "outputs" in outputs else 0
    again[name] = shifted(whole, TOLERANCE / 2, place)
    assert export_onnx(network, windows(51), lambda raw: raw[:, 0] > 9).difference == pytest.approx(5e-5, abs=1e-5)
    again[name] = shifted(whole, 2 * TOLERANCE, place)
    with pytest.raises(DataError, match=rf"{message} from Keras by 0\.0002 in 1 windows, at most 0\.0001"):
        export_onnx(network, windows(51), buys)
    again[name] = shifted(whole, float("nan"), place)
    with pytest.raises(DataError, match="differs from Keras by nan"):
        export_onnx(network, windows(51), buys)


def test_other_decision_is_forgiven_only_at_the_threshold(again: dict[str, bytes], network: keras.Model) -> None:
    inputs = windows(51)
    score = float(by_keras(network, inputs)[7, 0])
    again["model"] = shifted(again["model"], TOLERANCE / 2)

    def above(threshold: float) -> Any:
        return lambda raw: raw[:, 0] > threshold

    # Window 7 is let in by the export alone; both are within the tolerance of the threshold.
    assert export_onnx(network, inputs, above(score + TOLERANCE / 4)).difference < TOLERANCE

    def in_a_gap(raw: np.ndarray) -> np.ndarray:
        """Only what the export alone answers: a column moved by the tolerance is not in it."""
        return np.abs(raw[:, [0]] - (score + TOLERANCE / 2)) < TOLERANCE / 8

    with pytest.raises(DataError, match=r"exported network decides 1 of 51 windows otherwise than Keras, although"):
        export_onnx(network, inputs, in_a_gap)


def test_operator_that_onnxruntime_lacks_is_refused() -> None:
    """The exact GELU becomes Erfc, and the export says that all went well."""
    inputs = keras.Input((3,), name="bars")
    network = keras.Model({"bars": inputs}, keras.layers.Dense(2, activation="gelu")(inputs))
    with pytest.raises(DataError, match=r"step\.onnx holds Erfc, which onnxruntime does not have"):
        export._to_onnx("step", network, {"bars": np.zeros((1, 3), np.float32)})


def test_operators_are_found_inside_branches() -> None:
    inner = helper.make_graph([helper.make_node("TensorListReserve", [], ["y"])], "inner", [], [])
    outer = helper.make_node("If", ["condition"], ["y"], then_branch=inner, else_branch=inner)
    graph = helper.make_graph([helper.make_node("Not", ["x"], ["condition"]), outer], "outer", [], [])
    assert list(export._operators(graph)) == ["Not", "If", "TensorListReserve", "TensorListReserve"]


def test_export_from_another_backend_is_refused(network: keras.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(DataError, match="only the TensorFlow backend exports to ONNX, this one is jax"):
        export_onnx(network, windows(51), buys)


def test_export_with_too_few_windows_is_refused(network: keras.Model) -> None:
    with pytest.raises(ValueError, match="inputs must be at least 51 windows, received 50"):
        export_onnx(network, windows(50), buys)


# --- latency --------------------------------------------------------------------------------------------------------


def test_latency_is_measured_for_one_window_and_for_one_of_each_symbol(exported: Exported) -> None:
    timings = exported.latency.timings
    measured = [(timing.threads, timing.windows, timing.new_bars) for timing in timings]
    assert measured == [(threads, n, new) for threads in (2, 1) for n in (1, 3) for new in (LOOKBACK, 1)]
    for timing in timings:
        assert 0 < timing.p50_ms <= timing.p99_ms
        assert timing.runs > 1
    assert json.loads(json.dumps(exported.latency.to_json())) == exported.latency.to_json()
    titles, *rows = exported.latency.rows()
    assert [len(row) for row in rows] == [len(titles)] * len(timings)


def test_latency_for_a_reader() -> None:
    rows = Latency((Timing(51, 1, 2, 9.5812, 11.894, 300),)).rows()
    assert rows[1] == ("51", "1", "2", "9.58", "11.89", "300")
    assert " ".join(rows[0]) == "windows new bars of each threads p50 ms p99 ms runs"
