"""Every layer against plain numpy of the paper's equations, and through its configuration and back."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from perpcast.models import build_model, layers
from tests.model_world import TASK, task_of

BATCH, BARS, VARIABLES, UNITS = 5, 7, 4, 6
EPSILON = 1e-3


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def shake(layer: Any) -> None:
    """Other weights than the initial ones, biases included."""
    rng = np.random.default_rng(5)
    layer.set_weights([rng.normal(0, 0.4, weight.shape).astype(np.float32) for weight in layer.get_weights()])


def array(tensor: Any) -> np.ndarray:
    value = tensor.value if isinstance(tensor, keras.Variable) else tensor
    return np.asarray(keras.ops.convert_to_numpy(value))


def elu(x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, np.expm1(np.minimum(x, 0)))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def normalised(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray) -> np.ndarray:
    mean = x.mean(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(x.var(axis=-1, keepdims=True) + EPSILON) * gamma + beta


def dense(layer: Any, x: np.ndarray) -> np.ndarray:
    kernel, *bias = layer.get_weights()
    return x @ kernel + (bias[0] if bias else 0)


def gate(layer: Any, x: np.ndarray) -> np.ndarray:
    value, opening = np.split(dense(layer.dense, x), 2, axis=-1)
    return value * sigmoid(opening)


def grn(layer: Any, x: np.ndarray, context: np.ndarray | None = None) -> np.ndarray:
    """Equations 2 to 5."""
    inner = dense(layer.hidden, x)
    if context is not None:
        inner = inner + dense(layer.from_context, context)
    skip = x if layer.skip is None else dense(layer.skip, x)
    return normalised(skip + gate(layer.gate, dense(layer.linear, elu(inner))), *layer.norm.get_weights())


@pytest.mark.parametrize("outputs", [UNITS, 3])
def test_gated_residual_network_equals_the_papers_equations(outputs: int) -> None:
    layer = layers.GatedResidualNetwork(UNITS, outputs)
    x, context = draw(BATCH, BARS, UNITS), draw(BATCH, 2, seed=1)
    layer(x, context)
    shake(layer)
    expected = grn(layer, x, context[:, None, :])
    np.testing.assert_allclose(array(layer(x, context)), expected, atol=1e-5)


def test_variable_selection_equals_a_loop_over_the_papers_networks() -> None:
    """Embedding, two Dense, gate, norm, one variable after the other; `inner` is the product of the first two."""
    layer = layers.VariableSelection(UNITS)
    x, context = draw(BATCH, BARS, VARIABLES), draw(BATCH, UNITS, seed=1)
    layer(x, context)
    shake(layer)
    weights = softmax(grn(layer.weigher, x, context[:, None, :]))
    expected = np.zeros((BATCH, BARS, UNITS))
    rng = np.random.default_rng(8)
    embedding, embedding_bias = array(layer.embedding), array(layer.embedding_bias)
    inner, inner_bias = np.empty_like(embedding), np.empty_like(embedding_bias)
    merged, merged_bias = np.empty_like(array(layer.gate)), np.empty_like(array(layer.gate_bias))
    for v in range(VARIABLES):
        second, second_bias = rng.normal(0, 0.4, (UNITS, UNITS)), rng.normal(0, 0.4, UNITS)
        first, first_bias = rng.normal(0, 0.4, (UNITS, UNITS)), rng.normal(0, 0.4, UNITS)
        both, both_bias = rng.normal(0, 0.4, (UNITS, 2 * UNITS)), rng.normal(0, 0.4, 2 * UNITS)
        embedded = x[..., v : v + 1] @ embedding[v] + embedding_bias[v]
        hidden = elu(embedded @ second + second_bias) @ first + first_bias
        value, opening = np.split(hidden @ both + both_bias, 2, axis=-1)
        norm = normalised(embedded + value * sigmoid(opening), array(layer.gamma)[v], array(layer.beta)[v])
        expected += weights[..., v : v + 1] * norm
        inner[v], inner_bias[v] = embedding[v] @ second, embedding_bias[v] @ second + second_bias
        merged[v], merged_bias[v] = first @ both, first_bias @ both + both_bias
    for weight, value in (
        (layer.inner, inner),
        (layer.inner_bias, inner_bias),
        (layer.gate, merged),
        (layer.gate_bias, merged_bias),
    ):
        weight.assign(value)
    np.testing.assert_allclose(array(layer(x, context)), expected, atol=1e-5)
    np.testing.assert_allclose(array(layer.selection(x, context)).sum(axis=-1), 1, atol=1e-6)


def test_variable_selection_drops_whole_windows_of_a_unit() -> None:
    layer = layers.VariableSelection(UNITS, dropout=0.5)
    x, context = draw(BATCH, BARS, VARIABLES), draw(BATCH, UNITS, seed=1)
    assert np.abs(array(layer(x, context, training=True)) - array(layer(x, context))).max() > 1e-3
    np.testing.assert_array_equal(array(layer(x, context)), array(layer(x, context)))


def test_attention_equals_the_papers_equations() -> None:
    heads, width = 2, UNITS // 2
    layer = layers.InterpretableAttention(heads)
    sequence = draw(BATCH, BARS, UNITS)
    query = sequence[:, -1:]
    layer(query, sequence)
    shake(layer)
    queries, keys, values = (dense(layer.query, query), dense(layer.key, sequence), dense(layer.value, sequence))
    by_head = []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = queries[..., part] @ keys[..., part].transpose(0, 2, 1) / np.sqrt(width)
        by_head.append(softmax(scores) @ values)
    expected = dense(layer.output_dense, np.mean(by_head, axis=0))
    np.testing.assert_allclose(array(layer(query, sequence)), expected, atol=1e-5)
    np.testing.assert_allclose(array(layer.attention(query, sequence)).sum(axis=-1), 1, atol=1e-6)


def test_attention_width_not_a_multiple_of_heads_is_refused() -> None:
    with pytest.raises(ValueError, match="width 6 must be a multiple of heads 4"):
        layers.InterpretableAttention(4)(draw(1, 1, UNITS), draw(1, BARS, UNITS))


def test_positions_are_sines_and_cosines() -> None:
    marked = array(layers.PositionalEncoding()(np.zeros((1, 3, 4), np.float32)))[0]
    np.testing.assert_allclose(marked[2], [np.sin(2), np.cos(2), np.sin(0.02), np.cos(0.02)], atol=1e-6)
    assert layers.PositionalEncoding()(np.zeros((1, 3, 5), np.float32)).shape == (1, 3, 5)


def test_quantiles_never_cross() -> None:
    quantiles = array(layers.RisingQuantiles()(draw(100, 3) * 10))
    assert (np.diff(quantiles, axis=-1) >= 0).all()


@pytest.mark.parametrize(
    "layer",
    [
        layers.GatedLinearUnit(3, 0.1),
        layers.GatedResidualNetwork(3, 2, 0.1),
        layers.VariableSelection(3, 0.1),
        layers.PositionalEncoding(),
        layers.InterpretableAttention(2, 0.1),
        layers.RisingQuantiles(),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_layer_survives_its_configuration(layer: Any) -> None:
    again = type(layer).from_config(layer.get_config())
    assert again.get_config() == layer.get_config()


def test_network_survives_saving_and_loading(tmp_path: Path) -> None:
    network = build_model(TASK, "tft", d_model=8, num_heads=2, dropout=0.1)
    shake(network)
    windows = {"observed": draw(4, 6, 3), "known": draw(4, 6, 2), "symbol": np.array([0, 1, 2, 0], np.int32)}
    network.save(tmp_path / "network.keras")
    loaded = keras.saving.load_model(tmp_path / "network.keras")
    np.testing.assert_array_equal(array(loaded(windows)), array(network(windows)))


def test_network_reads_every_input_and_every_bar() -> None:
    network = build_model(TASK, "tft", d_model=8, num_heads=2, dropout=0.1)
    shake(network)
    windows = {"observed": draw(1, 6, 3), "known": draw(1, 6, 2), "symbol": np.array([0], np.int32)}
    before = array(network(windows))
    assert before.shape == (1, len(TASK.outputs))
    for name in ("observed", "known"):
        for bar in range(6):
            for column in range(windows[name].shape[2]):
                other = {key: value.copy() for key, value in windows.items()}
                other[name][0, bar, column] += 1
                assert np.abs(array(network(other)) - before).max() > 1e-7, (name, bar, column)
    assert np.abs(array(network({**windows, "symbol": np.array([1], np.int32)})) - before).max() > 1e-7


def test_network_for_what_is_not_built_says_so() -> None:
    with pytest.raises(ValueError, match="architecture must be one of tft, received 'lstm'"):
        build_model(TASK, "lstm", d_model=8, num_heads=2, dropout=0.1)
    with pytest.raises(ValueError, match="knows one static input, 'symbol'"):
        build_model(task_of(static=("symbol", "sector")), "tft", d_model=8, num_heads=2, dropout=0.1)
