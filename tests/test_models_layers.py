"""Every layer against plain numpy of the paper's equations; through its configuration, a file, mixed precision."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from perpcast.models import layers
from tests.tft_reference import Weights, attention, gate, grn, rising, softmax, variable_selection

BATCH, BARS, VARIABLES, UNITS = 5, 7, 4, 6


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def shake(layer: Any, seed: int = 5) -> None:
    """Other weights than the initial ones, biases included."""
    rng = np.random.default_rng(seed)
    layer.set_weights([rng.normal(0, 0.4, weight.shape).astype(np.float32) for weight in layer.get_weights()])


def array(tensor: Any) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(tensor))


def with_one_hot(reals: np.ndarray, categories: tuple[int, ...], seed: int = 3) -> np.ndarray:
    """Reals, then a one-hot group for each category."""
    rng = np.random.default_rng(seed)
    groups = [np.eye(count, dtype=np.float32)[rng.integers(0, count, reals.shape[:-1])] for count in categories]
    return np.concatenate([reals, *groups], axis=-1)


# --- the equations --------------------------------------------------------------------------------------------------


def test_gated_linear_unit_equals_the_papers_equation() -> None:
    layer = layers.GatedLinearUnit(3)
    x = draw(BATCH, BARS, UNITS)
    layer(x)
    shake(layer)
    np.testing.assert_allclose(array(layer(x)), gate(Weights(layer), x), atol=1e-5)


@pytest.mark.parametrize(("outputs", "dense_skip"), [(UNITS, False), (UNITS, True), (3, False)])
def test_gated_residual_network_equals_the_papers_equations(outputs: int, dense_skip: bool) -> None:
    layer = layers.GatedResidualNetwork(UNITS, outputs, dense_skip=dense_skip)
    x, context = draw(BATCH, BARS, UNITS), draw(BATCH, 2, seed=1)
    layer(x, context)
    shake(layer)
    assert (layer.skip is not None) == (outputs != UNITS or dense_skip)
    np.testing.assert_allclose(array(layer(x, context)), grn(Weights(layer), x, context), atol=1e-5)


@pytest.mark.parametrize("categories", [(), (3,), (2, 5)])
@pytest.mark.parametrize("reals", [VARIABLES, 0])
def test_stacked_variable_selection_equals_a_loop_over_the_papers_networks(
    reals: int, categories: tuple[int, ...]
) -> None:
    """And the fused one with its weights is the same function."""
    if not reals + len(categories):
        return
    layer = layers.StackedVariableSelection(UNITS, categories=categories)
    x, context = with_one_hot(draw(BATCH, BARS, reals), categories), draw(BATCH, UNITS, seed=1)
    layer(x, context)
    shake(layer)
    expected, weights = variable_selection(Weights(layer), x, categories, context)
    selected, chosen = (array(part) for part in layer(x, context))
    np.testing.assert_allclose(selected, expected, atol=1e-5)
    np.testing.assert_allclose(chosen, weights, atol=1e-5)
    assert chosen.shape == (BATCH, BARS, reals + len(categories))

    fused = layers.VariableSelection(UNITS, categories=categories)
    fused(x, context)
    fused.set_weights(layer.fused_weights())
    selected, chosen = (array(part) for part in fused(x, context))
    np.testing.assert_allclose(selected, expected, atol=1e-5)
    np.testing.assert_allclose(chosen, weights, atol=1e-5)


def test_variable_selection_without_context_equals_the_loop() -> None:
    layer = layers.StackedVariableSelection(UNITS)
    x = draw(BATCH, 1, VARIABLES)
    layer(x)
    shake(layer)
    expected, weights = variable_selection(Weights(layer), x, (), None)
    np.testing.assert_allclose(array(layer(x)[0]), expected, atol=1e-5)
    np.testing.assert_allclose(array(layer(x)[1]), weights, atol=1e-5)


def test_gradients_of_the_stacked_selection_are_those_of_a_loop_over_single_variables() -> None:
    """One variable at a time with that variable's slice of the weights: the same gradients."""
    import tensorflow as tf

    layer = layers.StackedVariableSelection(UNITS)
    x, context = draw(BATCH, BARS, VARIABLES), draw(BATCH, UNITS, seed=1)
    layer(x, context)
    shake(layer)
    own = layer.weights_of_own()
    target = draw(BATCH, BARS, UNITS, seed=2)

    def loss_of_loop() -> Any:
        total = 0.0
        weights = tf.nn.softmax(layer.weigher(layer.transform(x, BARS, False)[0], context), axis=-1)
        for v in range(VARIABLES):
            w = {weight.name: weight.value[v] for weight in own}
            embedded = x[..., v : v + 1] @ w["embedding"] + w["embedding_bias"]
            hidden = tf.nn.elu(embedded @ w["hidden"] + w["hidden_bias"]) @ w["linear"] + w["linear_bias"]
            value, opening = tf.split(hidden @ w["gate"] + w["gate_bias"], 2, axis=-1)
            summed = embedded + value * tf.sigmoid(opening)
            mean, variance = tf.nn.moments(summed, axes=[-1], keepdims=True)
            normal = (summed - mean) / tf.sqrt(variance + layers.EPSILON) * w["gamma"] + w["beta"]
            total += weights[..., v : v + 1] * normal
        return tf.reduce_mean(tf.square(total - target))

    variables = [weight.value for weight in layer.trainable_variables]
    with tf.GradientTape() as tape:
        ours = tf.reduce_mean(tf.square(layer(x, context)[0] - target))
    gradients = tape.gradient(ours, variables)
    with tf.GradientTape() as tape:
        loop = loss_of_loop()
    np.testing.assert_allclose(float(ours), float(loop), rtol=1e-5)
    for mine, its in zip(gradients, tape.gradient(loop, variables), strict=True):
        np.testing.assert_allclose(array(tf.convert_to_tensor(mine)), array(tf.convert_to_tensor(its)), atol=1e-5)


def test_narrow_variable_selection_is_widened_after_the_selection() -> None:
    narrow, wide = layers.VariableSelection(UNITS, rank=2), layers.VariableSelection(2)
    x, context = draw(BATCH, BARS, VARIABLES), draw(BATCH, UNITS, seed=1)
    narrow(x, context)
    shake(narrow)
    assert array(narrow.gate).shape == (VARIABLES, 2, 4)
    selected, weights = narrow(x, context)
    assert selected.shape == (BATCH, BARS, UNITS)
    kernel, bias = narrow.widen.get_weights()
    back = (array(selected) - bias) @ np.linalg.pinv(kernel)
    wide(x, context)
    for name in ("embedding", "embedding_bias", "inner", "inner_bias", "gate", "gate_bias", "gamma", "beta"):
        getattr(wide, name).assign(array(getattr(narrow, name)))
    values = array(wide.transform(x, BARS, False)[1])  # [V, B * T, 2]
    normal = (values - values.mean(-1, keepdims=True)) / np.sqrt(values.var(-1, keepdims=True) + layers.EPSILON)
    normal = normal * array(wide.gamma)[:, None] + array(wide.beta)[:, None]
    expected = np.einsum("vnd,nv->nd", normal, array(weights).reshape(-1, VARIABLES)).reshape(BATCH, BARS, 2)
    np.testing.assert_allclose(back, expected, atol=1e-4)


@pytest.mark.parametrize("form", [layers.VariableSelection, layers.StackedVariableSelection])
def test_variable_selection_drops_a_unit_for_all_bars_of_a_window(form: Any) -> None:
    layer = form(UNITS, dropout=0.5)
    layer(draw(BATCH, BARS, VARIABLES), draw(BATCH, UNITS, seed=1))
    hidden = np.ones((VARIABLES, BATCH * BARS, UNITS), np.float32)
    dropped = array(layer.drop(hidden, BARS, True)).reshape(VARIABLES, BATCH, BARS, UNITS)
    assert (dropped == dropped[:, :, :1]).all()
    assert set(np.unique(dropped)) == {0.0, 2.0}
    assert not (dropped[:, :1] == dropped).all()
    np.testing.assert_array_equal(array(layer.drop(hidden, BARS, False)), hidden)


def test_dropout_drops_a_unit_for_all_bars_of_a_window() -> None:
    dropped = array(layers.WindowDropout(0.5, seed=1)(np.ones((40, BARS, UNITS), np.float32), training=True))
    assert (dropped == dropped[:, :1]).all()
    assert 0.3 < (dropped == 0).mean() < 0.7
    flat = array(layers.WindowDropout(0.5, seed=1)(np.ones((40, UNITS), np.float32), training=True))
    assert 0.3 < (flat == 0).mean() < 0.7


@pytest.mark.parametrize("asked", [1, 3])
def test_attention_equals_the_papers_equations(asked: int) -> None:
    layer = layers.InterpretableAttention(2)
    sequence = draw(BATCH, BARS, UNITS)
    query = sequence[:, -asked:]
    layer(query, sequence)
    shake(layer)
    expected, weights = attention(Weights(layer), query, sequence, 2)
    attended, looked = layer(query, sequence)
    np.testing.assert_allclose(array(attended), expected, atol=1e-5)
    np.testing.assert_allclose(array(looked), weights, atol=1e-5)


def test_attention_never_looks_ahead() -> None:
    layer = layers.InterpretableAttention(2)
    sequence = draw(BATCH, BARS, UNITS)
    _, looked = layer(sequence[:, -3:], sequence)
    for query in range(3):
        later = BARS - 3 + query + 1
        assert (array(looked)[:, query, later:] == 0).all()
        assert (array(looked)[:, query, :later] > 0).all()


def test_attention_width_not_a_multiple_of_heads_is_refused() -> None:
    with pytest.raises(ValueError, match="width 6 must be a multiple of heads 4"):
        layers.InterpretableAttention(4)(draw(1, 1, UNITS), draw(1, BARS, UNITS))


def test_positions_are_sines_and_cosines() -> None:
    marked = array(layers.PositionalEncoding()(np.zeros((1, 3, 4), np.float32)))[0]
    np.testing.assert_allclose(marked[2], [np.sin(2), np.cos(2), np.sin(0.02), np.cos(0.02)], atol=1e-6)
    assert layers.PositionalEncoding()(np.zeros((1, 3, 5), np.float32)).shape == (1, 3, 5)


@pytest.mark.parametrize("anchor", [0, 1, 2])
def test_quantiles_never_cross_and_the_anchor_stays(anchor: int) -> None:
    raw = draw(100, 3) * 10
    quantiles = array(layers.RisingQuantiles(anchor)(raw))
    assert (np.diff(quantiles, axis=-1) >= 0).all()
    np.testing.assert_array_equal(quantiles[:, anchor], raw[:, anchor])
    np.testing.assert_allclose(quantiles, rising(raw, anchor), atol=1e-4)


# --- configuration, file, precision ---------------------------------------------------------------------------------

X, CONTEXT = draw(BATCH, BARS, UNITS), draw(BATCH, UNITS, seed=1)
EVERY_LAYER: list[tuple[Any, tuple[np.ndarray, ...]]] = [
    (layers.WindowDropout(0.1), (X,)),
    (layers.GatedLinearUnit(3, 0.1), (X,)),
    (layers.GatedResidualNetwork(3, 2, 0.1, dense_skip=True), (X, CONTEXT)),
    (layers.GatedResidualNetwork(UNITS, dropout=0.1), (X,)),
    (layers.VariableSelection(UNITS, 0.1, categories=(2,), rank=4), (with_one_hot(X, (2,)), CONTEXT)),
    (layers.StackedVariableSelection(UNITS, 0.1, categories=(2,)), (with_one_hot(X, (2,)), CONTEXT)),
    (layers.PositionalEncoding(), (X,)),
    (layers.InterpretableAttention(2, 0.1), (X[:, -2:], X)),
    (layers.RisingQuantiles(1), (X,)),
]


def test_every_layer_is_in_this_list() -> None:
    public = {value for name, value in vars(layers).items() if isinstance(value, type) and not name.startswith("_")}
    assert {type(layer) for layer, _ in EVERY_LAYER} == {cls for cls in public if issubclass(cls, keras.layers.Layer)}


@pytest.mark.parametrize(("layer", "inputs"), EVERY_LAYER, ids=lambda value: type(value).__name__)
def test_layer_survives_its_configuration_and_a_file(
    layer: Any, inputs: tuple[np.ndarray, ...], tmp_path: Path
) -> None:
    again = type(layer).from_config(layer.get_config())
    assert again.get_config() == layer.get_config()

    symbolic = [keras.Input(x.shape[1:]) for x in inputs]
    network = keras.Model(symbolic, layer(*symbolic))
    shake(network)
    network.save(tmp_path / "layer.keras")
    loaded = keras.saving.load_model(tmp_path / "layer.keras")
    for mine, its in zip(flat(network(list(inputs))), flat(loaded(list(inputs))), strict=True):
        np.testing.assert_array_equal(mine, its)


@pytest.mark.parametrize(("layer", "inputs"), EVERY_LAYER, ids=lambda value: type(value).__name__)
def test_layer_in_mixed_precision_is_near_the_layer(layer: Any, inputs: tuple[np.ndarray, ...]) -> None:
    mixed = type(layer).from_config({**layer.get_config(), "dtype": "mixed_bfloat16"})
    exact = type(layer).from_config(layer.get_config())
    mixed(*inputs), exact(*inputs)
    shake(exact)
    mixed.set_weights(exact.get_weights())
    assert {weight.dtype for weight in mixed.weights} <= {"float32"}
    for mine, its in zip(flat(mixed(*inputs)), flat(exact(*inputs)), strict=True):
        assert mine.shape == its.shape
        np.testing.assert_allclose(mine, its, atol=0.15)
    first = mixed(*inputs, training=True) if "training" in mixed._call_signature.parameters else mixed(*inputs)
    assert all(np.isfinite(part).all() for part in flat(first))


def flat(outputs: Any) -> list[np.ndarray]:
    parts = outputs if isinstance(outputs, list | tuple) else [outputs]
    return [array(keras.ops.cast(part, "float32")) for part in parts]


def test_softmax_of_the_reference_is_one() -> None:
    np.testing.assert_allclose(softmax(draw(3, 4)).sum(axis=-1), 1, atol=1e-6)
