"""The Temporal Fusion Transformer (Lim et al. 2021) for one output step, read at the signal bar.

Our case has no step after the signal bar: the known inputs end with it, so the LSTM decoder of the paper has nothing
to read and the encoder's last bar takes its place. Of everything after the attention only that bar is computed.
"""

from typing import Any

import keras

from perpcast.models.layers import (
    EPSILON,
    GatedLinearUnit,
    GatedResidualNetwork,
    InterpretableAttention,
    PositionalEncoding,
    RisingQuantiles,
    VariableSelection,
)
from perpcast.task import Target, Task


def build_tft(
    task: Task, *, d_model: int, num_heads: int, dropout: float, variable_width: int | None = None
) -> keras.Model:
    """{observed [B, T, F], known [B, T, K], symbol [B]} to [B, outputs] in scaled units, `Task.outputs` in order.

    `variable_width` is the width of each variable's own network, d_model unless given (the paper's). The variable
    selection is nearly all of the work and costs in proportion to it; a narrow one is widened after the selection.
    """
    if task.static != ("symbol",):
        raise ValueError(f"the network knows one static input, 'symbol', received {task.static}")
    inputs = {
        "observed": keras.Input((task.lookback, len(task.observed)), name="observed"),
        "known": keras.Input((task.lookback, len(task.known)), name="known"),
        "symbol": keras.Input((), dtype="int32", name="symbol"),
    }
    static = keras.layers.Embedding(len(task.symbols), d_model, name="symbol_embedding")(inputs["symbol"])
    static = GatedResidualNetwork(d_model, dropout=dropout, name="static_selection")(static)
    contexts = {
        purpose: GatedResidualNetwork(d_model, dropout=dropout, name=f"context_{purpose}")(static)
        for purpose in ("selection", "enrichment", "state_h", "state_c")
    }

    bars = keras.layers.Concatenate(name="variables")([inputs["observed"], inputs["known"]])
    width = variable_width or d_model
    selected = VariableSelection(width, dropout, name="variable_selection")(bars, contexts["selection"])
    if width != d_model:
        selected = keras.layers.Dense(d_model, name="widened")(selected)
    # Not cuDNN: it keeps XLA from compiling the model, and its node has no form in ONNX.
    lstm = keras.layers.LSTM(d_model, return_sequences=True, use_cudnn=False, name="lstm")(
        selected, initial_state=[contexts["state_h"], contexts["state_c"]]
    )
    temporal = _gated_skip(lstm, selected, dropout, "lstm")
    enriched = GatedResidualNetwork(d_model, dropout=dropout, name="enrichment")(temporal, contexts["enrichment"])
    enriched = PositionalEncoding(name="position")(enriched)

    newest, newest_temporal = enriched[:, -1:], temporal[:, -1:]
    attended = InterpretableAttention(num_heads, dropout, name="attention")(newest, enriched)
    attended = _gated_skip(attended, newest, dropout, "attention")
    result = GatedResidualNetwork(d_model, dropout=dropout, name="feed_forward")(attended)
    result = _gated_skip(result, newest_temporal, 0.0, "output")[:, 0]

    outputs = [output for target in task.targets for output in _heads(target, result)]
    return keras.Model(inputs, keras.layers.Concatenate(name="outputs")(outputs), name="tft")


def _gated_skip(values: Any, skip: Any, dropout: float, name: str) -> Any:
    """LayerNorm(GLU(values) + skip): how every block of the paper may be passed by."""
    gated = GatedLinearUnit(skip.shape[-1], dropout, name=f"{name}_gate")(values)
    return keras.layers.LayerNormalization(epsilon=EPSILON, name=f"{name}_norm")(gated + skip)


def _heads(target: Target, result: Any) -> list[Any]:
    if target.kind != "regression":
        raise ValueError(f"target {target.name!r}: only regression is built so far, received {target.kind!r}")
    heads = [keras.layers.Dense(1, name=f"{target.name}_mean")(result)]
    if target.quantiles:
        raw = keras.layers.Dense(len(target.quantiles), name=f"{target.name}_quantiles")(result)
        heads.append(RisingQuantiles(name=f"{target.name}_rising")(raw))
    return heads
