"""The Temporal Fusion Transformer (Lim et al. 2021), general in its inputs, outputs and steps.

Where there are no steps after the last observed one (our case), the known inputs end with it: the LSTM decoder of the
paper has nothing to read and the encoder's last bar takes its place. Of everything after the attention only the bars
that are asked for are computed.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import keras
from keras import ops

from perpcast.models.layers import (
    EPSILON,
    GatedLinearUnit,
    GatedResidualNetwork,
    InterpretableAttention,
    PositionalEncoding,
    RisingQuantiles,
    StackedVariableSelection,
    VariableSelection,
)

CONTEXTS = ("selection", "enrichment", "state_h", "state_c")


@dataclass(frozen=True)
class Head:
    """Outputs of one target: `plain` free ones, then `quantiles` that rise; the one at `anchor` is the median."""

    name: str
    plain: int
    quantiles: int = 0
    anchor: int = 0


@dataclass(frozen=True)
class TftShape:
    """Steps, inputs and outputs of a network: how many real inputs of each kind, how many values each category has.

    Inputs of the network are those that there are: `observed` [B, T, n], `known` [B, T + D, n], `static` [B, n], and
    the same names with `_categories`, int32. Outputs are [B, columns], or [B, D, columns] with decoder steps.
    """

    encoder_steps: int
    observed: int
    known: int = 0
    static: int = 0
    observed_categories: tuple[int, ...] = ()
    known_categories: tuple[int, ...] = ()
    static_categories: tuple[int, ...] = ()
    decoder_steps: int = 0
    heads: tuple[Head, ...] = (Head("value", 1),)

    def __post_init__(self) -> None:
        if not self.observed + self.known + len(self.observed_categories) + len(self.known_categories):
            raise ValueError("a network needs at least one observed or known input")
        if self.decoder_steps and not self.known + len(self.known_categories):
            raise ValueError(f"{self.decoder_steps} decoder steps need a known input: there is none")

    def inputs(self) -> dict[str, Any]:
        """Symbolic inputs by name, those that there are."""
        steps = {"observed": self.encoder_steps, "known": self.encoder_steps + self.decoder_steps, "static": None}
        found = {}
        for kind, length in steps.items():
            time = () if length is None else (length,)
            if reals := getattr(self, kind):
                found[kind] = keras.Input((*time, reals), name=kind)
            if categories := getattr(self, f"{kind}_categories"):
                name = f"{kind}_categories"
                found[name] = keras.Input((*time, len(categories)), dtype="int32", name=name)
        return found


Layers = Mapping[str, Any]


@keras.saving.register_keras_serializable("perpcast")
class TemporalFusionTransformer(keras.Model):
    """The network, with fresh weights: its inputs by name to its outputs, raw.

    `variable_selection` is fused or stacked (layers.py), `vsn_rank` the width of each variable's own network, d_model
    unless given. `precision` is a Keras dtype policy; weights and outputs are float32 under any.
    Raises ValueError for a `vsn_rank` with the stacked selection: the paper's networks are d_model wide.
    """

    def __init__(
        self,
        shape: TftShape,
        *,
        d_model: int,
        num_heads: int,
        dropout: float,
        variable_selection: str = "fused",
        vsn_rank: int | None = None,
        precision: str = "float32",
        name: str = "tft",
    ) -> None:
        if variable_selection == "stacked" and vsn_rank not in (None, d_model):
            raise ValueError(
                f"stacked variable selection is {d_model} wide: vsn_rank must be null, received {vsn_rank}"
            )
        parts = _layers(shape, d_model, num_heads, dropout, precision)
        for part, categories in _selections(shape).items():
            options: dict[str, Any] = {"categories": categories, "dtype": precision, "name": part}
            if variable_selection == "stacked":
                parts[part] = StackedVariableSelection(d_model, dropout, **options)
            else:
                parts[part] = VariableSelection(d_model, dropout, rank=vsn_rank, **options)
        inputs = shape.inputs()
        static = _static(parts, inputs)
        history, future, _ = _select(parts, shape, inputs, static)
        columns, _ = _read(parts, shape, history, future, static)
        super().__init__(inputs, columns, name=name)
        self.arguments: dict[str, Any] = {
            "d_model": d_model,
            "num_heads": num_heads,
            "dropout": dropout,
            "variable_selection": variable_selection,
            "vsn_rank": vsn_rank,
        }
        self.tft_shape, self.precision = shape, precision

    def get_config(self) -> dict[str, Any]:
        """Plain arguments."""
        return {"shape": asdict(self.tft_shape), **self.arguments, "precision": self.precision, "name": self.name}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "TemporalFusionTransformer":
        """The network of `get_config`, with fresh weights."""
        shape = dict(config["shape"])
        shape["heads"] = tuple(Head(**head) for head in shape["heads"])
        for kind in ("observed", "known", "static"):
            shape[f"{kind}_categories"] = tuple(shape[f"{kind}_categories"])
        return cls(**{**config, "shape": TftShape(**shape)})

    @property
    def parts(self) -> Layers:
        """The layers by name."""
        return {layer.name: layer for layer in self.layers}

    def explanation(self) -> keras.Model:
        """The same inputs to {selection [B, T, V], attention [B, T + D]}: encoder variables, bars of the last query."""
        inputs = self.tft_shape.inputs()
        static = _static(self.parts, inputs)
        history, future, weights = _select(self.parts, self.tft_shape, inputs, static)
        _, attention = _read(self.parts, self.tft_shape, history, future, static)
        return keras.Model(inputs, {"selection": weights, "attention": attention[:, -1]}, name="explanation")

    def split(self) -> tuple[keras.Model, keras.Model]:
        """The network in two: `step` for one bar, whose answers can be kept, and `readout` for the bars of a window.

        step: {bars [B, inputs of a bar], static…} to {embedding [B, d], selection [B, V]};
        readout: {embeddings [B, T, d], static…} to {outputs [B, columns], attention [B, T]}.
        Raises ValueError for a network with decoder steps or categories that change with time: no runner needs them.
        """
        shape = self.tft_shape
        if shape.decoder_steps or shape.observed_categories or shape.known_categories:
            raise ValueError("only a network of one output step and real inputs through time can be split")
        statics = {name: value for name, value in shape.inputs().items() if name.startswith("static")}
        bars = keras.Input((shape.observed + shape.known,), name="bars")
        context = _static(self.parts, statics).get("selection")
        selected, weights = self.parts["history_selection"](ops.expand_dims(bars, 1), context)
        answers = {"embedding": selected[:, 0], "selection": weights[:, 0]}
        step = keras.Model({"bars": bars, **statics}, answers, name="step")

        statics = {name: value for name, value in shape.inputs().items() if name.startswith("static")}
        embeddings = keras.Input((shape.encoder_steps, selected.shape[-1]), name="embeddings")
        columns, attention = _read(self.parts, shape, embeddings, None, _static(self.parts, statics))
        answers = {"outputs": columns, "attention": attention[:, -1]}
        return step, keras.Model({"embeddings": embeddings, **statics}, answers, name="readout")

    def fused(self) -> "TemporalFusionTransformer":
        """The same function in float32 with fused variable selection; dropout apart, which inference does not have."""
        again = TemporalFusionTransformer(self.tft_shape, **{**self.arguments, "variable_selection": "fused"})
        for name, layer in again.parts.items():
            mine = self.parts[name]
            stacked = isinstance(mine, StackedVariableSelection)
            layer.set_weights(mine.fused_weights() if stacked else mine.get_weights())
        return again


def _selections(shape: TftShape) -> dict[str, tuple[int, ...]]:
    """The variable selections that the shape asks for, with the categories of each."""
    found = {"history_selection": (*shape.observed_categories, *shape.known_categories)}
    if shape.decoder_steps:
        found["future_selection"] = shape.known_categories
    if shape.static or shape.static_categories:
        found["static_selection"] = shape.static_categories
    return found


def _layers(shape: TftShape, units: int, heads: int, dropout: float, precision: str) -> dict[str, Any]:
    """Every layer but the variable selections, by name."""
    made: list[Any] = []
    if shape.static or shape.static_categories:
        made += [
            GatedResidualNetwork(units, dropout=dropout, name=f"context_{purpose}", dtype=precision)
            for purpose in CONTEXTS
        ]
    for name in ("lstm", "lstm_decoder")[: 2 if shape.decoder_steps else 1]:
        # Not cuDNN: it keeps XLA from compiling the model, and its node has no form in ONNX.
        made.append(
            keras.layers.LSTM(
                units, return_sequences=True, return_state=True, use_cudnn=False, name=name, dtype=precision
            )
        )
    for name, rate in (("lstm", dropout), ("attention", dropout), ("output", 0.0)):
        made.append(GatedLinearUnit(units, rate, name=f"{name}_gate", dtype=precision))
        made.append(keras.layers.LayerNormalization(epsilon=EPSILON, name=f"{name}_norm", dtype=precision))
    made += [
        GatedResidualNetwork(units, dropout=dropout, name="enrichment", dtype=precision),
        PositionalEncoding(name="position", dtype=precision),
        InterpretableAttention(heads, dropout, name="attention", dtype=precision),
        GatedResidualNetwork(units, dropout=dropout, name="feed_forward", dtype=precision),
    ]
    for head in shape.heads:
        if head.plain:
            made.append(keras.layers.Dense(head.plain, name=f"{head.name}_plain", dtype="float32"))
        if head.quantiles:
            made.append(keras.layers.Dense(head.quantiles, name=f"{head.name}_quantiles", dtype="float32"))
            made.append(RisingQuantiles(head.anchor, name=f"{head.name}_rising", dtype="float32"))
    return {layer.name: layer for layer in made}


def _static(layers: Layers, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The four contexts [B, d]; none where nothing is static."""
    reals, codes = inputs.get("static"), inputs.get("static_categories")
    if reals is None and codes is None:
        return {}
    selection = layers["static_selection"]
    selected, _ = selection(ops.expand_dims(_one_hot(reals, codes, selection.categories), 1))
    return {purpose: layers[f"context_{purpose}"](selected[:, 0]) for purpose in CONTEXTS}


def _one_hot(reals: Any, codes: Any, categories: tuple[int, ...]) -> Any:
    """Real inputs, then a one-hot group for each categorical one: [..., reals + sum(categories)]."""
    parts = [] if reals is None else [reals]
    parts += [ops.one_hot(codes[..., number], count) for number, count in enumerate(categories)]
    return parts[0] if len(parts) == 1 else ops.concatenate(parts, axis=-1)


def _select(layers: Layers, shape: TftShape, inputs: Mapping[str, Any], static: Mapping[str, Any]) -> Any:
    """The selected encoder bars [B, T, d], decoder bars [B, D, d] or None, and the encoder's weights [B, T, V]."""
    steps, context = shape.encoder_steps, static.get("selection")
    known, known_codes = inputs.get("known"), inputs.get("known_categories")
    past = [
        part if name == "observed" else part[:, :steps]
        for name, part in inputs.items()
        if name in ("observed", "known")
    ]
    reals = None if not past else past[0] if len(past) == 1 else ops.concatenate(past, axis=-1)
    codes_of = [inputs[name][:, :steps] for name in ("observed_categories", "known_categories") if name in inputs]
    codes = None if not codes_of else codes_of[0] if len(codes_of) == 1 else ops.concatenate(codes_of, axis=-1)
    selection = layers["history_selection"]
    history, weights = selection(_one_hot(reals, codes, selection.categories), context)
    if not shape.decoder_steps:
        return history, None, weights
    selection = layers["future_selection"]
    reals, codes = (None if part is None else part[:, steps:] for part in (known, known_codes))
    future, _ = selection(_one_hot(reals, codes, selection.categories), context)
    return history, future, weights


def _read(layers: Layers, shape: TftShape, history: Any, future: Any, static: Mapping[str, Any]) -> tuple[Any, Any]:
    """From selected bars to the outputs [B, columns] or [B, D, columns], and the attention [B, Q, T + D]."""
    state = [static["state_h"], static["state_c"]] if static else None
    recurrent, *state = layers["lstm"](history, initial_state=state)
    selected = history
    if future is not None:
        decoded, *_ = layers["lstm_decoder"](future, initial_state=state)
        recurrent = ops.concatenate([recurrent, decoded], axis=1)
        selected = ops.concatenate([history, future], axis=1)
    temporal = _gated_skip(layers, "lstm", recurrent, selected)
    enriched = layers["position"](layers["enrichment"](temporal, static.get("enrichment")))
    asked = max(1, shape.decoder_steps)
    newest, newest_temporal = enriched[:, -asked:], temporal[:, -asked:]
    attended, attention = layers["attention"](newest, enriched)
    attended = _gated_skip(layers, "attention", attended, newest)
    result = _gated_skip(layers, "output", layers["feed_forward"](attended), newest_temporal)
    if not shape.decoder_steps:
        result = result[:, 0]
    columns = []
    for head in shape.heads:
        if head.plain:
            columns.append(layers[f"{head.name}_plain"](result))
        if head.quantiles:
            columns.append(layers[f"{head.name}_rising"](layers[f"{head.name}_quantiles"](result)))
    return (columns[0] if len(columns) == 1 else ops.concatenate(columns, axis=-1)), attention


def _gated_skip(layers: Layers, name: str, values: Any, skip: Any) -> Any:
    """LayerNorm(GLU(values) + skip): how every block of the paper may be passed by."""
    return layers[f"{name}_norm"](layers[f"{name}_gate"](values) + skip)
