"""The whole network against plain numpy of the paper, its parts against the whole, and what it may not look at."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from perpcast.models import build_model, tft_shape
from perpcast.models.tft import Head, TemporalFusionTransformer, TftShape
from tests.model_world import TASK, settings, task_of
from tests.tft_reference import temporal_fusion_transformer

SHAPES = {
    "ours": TftShape(6, 3, 2, static_categories=(4,), heads=(Head("buy", 1, 3), Head("sell", 1, 3))),
    "a logit a side": TftShape(6, 3, 2, static_categories=(4,), heads=(Head("buy", 1), Head("sell", 1))),
    "everything": TftShape(7, 3, 2, 2, (3,), (5, 2), (4, 2), 3, (Head("a", 1), Head("b", 0, 3, 1))),
    "observed only": TftShape(5, 2),
    "one variable": TftShape(5, 1),
    "known categories only": TftShape(4, 0, known_categories=(3, 7), decoder_steps=2, heads=(Head("a", 0, 2),)),
    "static reals": TftShape(4, 2, static=3),
}


def draw(shape: TftShape, batch: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    """Inputs of a network of that shape."""
    rng = np.random.default_rng(seed)
    found: dict[str, np.ndarray] = {}
    for name, symbolic in shape.inputs().items():
        steps = symbolic.shape[1:-1]
        if name.endswith("_categories"):
            codes = [rng.integers(0, count, (batch, *steps)) for count in getattr(shape, name)]
            found[name] = np.stack(codes, axis=-1).astype(np.int32)
        else:
            found[name] = rng.normal(size=(batch, *symbolic.shape[1:])).astype(np.float32)
    return found


def network_of(shape: TftShape, form: str = "fused", **options: Any) -> TemporalFusionTransformer:
    """A small network with other weights than the initial ones."""
    network = TemporalFusionTransformer(shape, d_model=8, num_heads=2, dropout=0.1, variable_selection=form, **options)
    rng = np.random.default_rng(5)
    network.set_weights([rng.normal(0, 0.4, weight.shape).astype(np.float32) for weight in network.get_weights()])
    return network


def array(tensor: Any) -> np.ndarray:
    return np.asarray(keras.ops.convert_to_numpy(tensor))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_network_equals_the_papers_equations_in_numpy(shape: TftShape) -> None:
    """With stacked variable selection, and in the fused form of the same weights."""
    network, inputs = network_of(shape, "stacked"), draw(shape)
    expected = temporal_fusion_transformer(network, inputs)
    columns = sum(head.plain + head.quantiles for head in shape.heads)
    assert expected.shape == ((4, shape.decoder_steps, columns) if shape.decoder_steps else (4, columns))
    np.testing.assert_allclose(array(network(inputs)), expected, atol=1e-5)
    np.testing.assert_allclose(array(network.fused()(inputs)), expected, atol=1e-5)
    np.testing.assert_array_equal(array(network.fused().fused()(inputs)), array(network.fused()(inputs)))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("form", ["fused", "stacked"])
def test_network_survives_saving_and_loading(shape: TftShape, form: str, tmp_path: Path) -> None:
    network, inputs = network_of(shape, form), draw(shape)
    network.save(tmp_path / "network.keras")
    loaded = keras.saving.load_model(tmp_path / "network.keras")
    assert loaded.get_config() == network.get_config()
    np.testing.assert_array_equal(array(loaded(inputs)), array(network(inputs)))
    np.testing.assert_allclose(array(loaded.fused()(inputs)), array(network(inputs)), atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_network_reads_every_input_at_every_step(shape: TftShape) -> None:
    network, inputs = network_of(shape), draw(shape, batch=1)
    before = array(network(inputs))
    for name, values in inputs.items():
        for place in np.ndindex(values.shape):
            other = {key: value.copy() for key, value in inputs.items()}
            if name.endswith("_categories"):
                count = getattr(shape, name)[place[-1]]
                other[name][place] = (other[name][place] + 1) % count
            else:
                other[name][place] += 1
            assert np.abs(array(network(other)) - before).max() > 1e-7, (name, place)


def test_a_decoder_step_never_sees_what_is_known_of_later_ones() -> None:
    shape = SHAPES["everything"]
    network, inputs = network_of(shape), draw(shape)
    before = array(network(inputs))
    for step in range(shape.decoder_steps):
        other = {key: value.copy() for key, value in inputs.items()}
        other["known"][:, shape.encoder_steps + step] += 3
        changed = np.abs(array(network(other)) - before).max(axis=(0, 2)) > 1e-7
        assert changed.tolist() == [later >= step for later in range(shape.decoder_steps)]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_explanation_has_weights_that_add_up_to_one(shape: TftShape) -> None:
    network, inputs = network_of(shape), draw(shape)
    told = {name: array(value) for name, value in network.explanation()(inputs).items()}
    variables = shape.observed + shape.known + len(shape.observed_categories) + len(shape.known_categories)
    assert told["selection"].shape == (4, shape.encoder_steps, variables)
    assert told["attention"].shape == (4, shape.encoder_steps + shape.decoder_steps)
    for weights in told.values():
        assert (weights >= 0).all()
        np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=1e-5)


@pytest.mark.parametrize("name", ["ours", "observed only", "static reals"])
@pytest.mark.parametrize("options", [{"form": "fused"}, {"form": "fused", "vsn_rank": 3}, {"form": "stacked"}])
def test_step_and_readout_are_the_network(name: str, options: dict[str, Any]) -> None:
    shape = SHAPES[name]
    network, inputs = network_of(shape, **options), draw(shape)
    step, readout = network.split()
    static = {key: value for key, value in inputs.items() if key.startswith("static")}
    bars = np.concatenate([inputs[kind] for kind in ("observed", "known") if kind in inputs], axis=-1)
    batch, steps, width = bars.shape
    repeated = {key: np.repeat(value, steps, axis=0) for key, value in static.items()}
    told = step({"bars": bars.reshape(-1, width), **repeated})
    embeddings = array(told["embedding"]).reshape(batch, steps, -1)
    read = readout({"embeddings": embeddings, **static})
    np.testing.assert_allclose(array(read["outputs"]), array(network(inputs)), atol=1e-6)
    whole = network.explanation()(inputs)
    np.testing.assert_allclose(array(told["selection"]).reshape(batch, steps, -1), array(whole["selection"]), atol=1e-6)
    np.testing.assert_allclose(array(read["attention"]), array(whole["attention"]), atol=1e-6)


def test_mixed_precision_answers_in_float32_near_the_network() -> None:
    shape = SHAPES["everything"]
    exact, inputs = network_of(shape), draw(shape)
    mixed = network_of(shape, precision="mixed_bfloat16")
    answer = mixed(inputs)
    assert answer.dtype == "float32"
    assert {weight.dtype for weight in mixed.weights} == {"float32"}
    difference = np.abs(array(answer) - array(exact(inputs))).max()
    assert 1e-5 < difference < 0.5
    np.testing.assert_array_equal(array(mixed.fused()(inputs)), array(exact(inputs)))  # fused is float32


def test_known_inputs_are_needed_where_there_are_steps_to_come() -> None:
    with pytest.raises(ValueError, match="2 decoder steps need a known input"):
        TftShape(4, 2, decoder_steps=2)
    with pytest.raises(ValueError, match="at least one observed or known input"):
        TftShape(4, 0, static=2)


def test_a_network_with_decoder_steps_is_not_split() -> None:
    with pytest.raises(ValueError, match="only a network of one output step"):
        network_of(SHAPES["everything"]).split()


# --- by name, for a task --------------------------------------------------------------------------------------------


def test_network_of_a_task_has_its_inputs_and_columns() -> None:
    network = build_model(TASK, settings())
    assert {name: tensor.shape[1:] for name, tensor in network.input.items()} == {
        "observed": (6, 3),
        "known": (6, 2),
        "static_categories": (1,),
    }
    assert network.output.shape[1:] == (8,)
    assert tft_shape(TASK).static_categories == (3,)
    logits = task_of(targets=tuple(replace(target, kind="classification", quantiles=()) for target in TASK.targets))
    assert build_model(logits, settings()).output.shape[1:] == (2,)


@pytest.mark.parametrize(
    "change", [{"variable_selection": "stacked"}, {"vsn_rank": 3}, {"precision": "mixed_bfloat16"}]
)
def test_settings_reach_the_network(change: dict[str, Any]) -> None:
    assert build_model(TASK, settings(**change)).get_config() != build_model(TASK, settings()).get_config()
    assert build_model(TASK, settings(**change), precision="float32").precision == "float32"


def test_network_for_what_is_not_built_says_so() -> None:
    unknown = settings().model_copy(update={"architecture": "lstm"})
    with pytest.raises(ValueError, match="architecture must be one of tft, received 'lstm'"):
        build_model(TASK, unknown)
    with pytest.raises(ValueError, match="static input that is made is 'symbol', received"):
        build_model(task_of(static=("symbol", "sector")), settings())
    with pytest.raises(ValueError, match="stacked variable selection is 8 wide: vsn_rank must be null, received 3"):
        build_model(TASK, settings(variable_selection="stacked", vsn_rank=3))
