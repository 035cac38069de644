"""The Temporal Fusion Transformer in plain numpy, equation by equation of the paper, one variable after the other.

Nothing is shared with `perpcast.models` but the weights, read by name. Float64.
"""

from collections.abc import Mapping
from typing import Any

import keras
import numpy as np

EPSILON = 1e-3


class Weights:
    """A Keras layer's weights by their path within it: `w("gate", "both")` are the arrays of a Dense."""

    def __init__(self, layer: Any) -> None:
        self._layer = layer

    def __call__(self, name: str) -> np.ndarray:
        """One weight of the layer's own."""
        return np.asarray(keras.ops.convert_to_numpy(getattr(self._layer, name)), np.float64)

    def inside(self, name: str) -> "Weights":
        """The weights of a layer within."""
        return Weights(getattr(self._layer, name))

    def has(self, name: str) -> bool:
        """Whether there is such a layer within."""
        return getattr(self._layer, name) is not None

    def arrays(self) -> list[np.ndarray]:
        """All of them, in Keras' order."""
        return [np.asarray(array, np.float64) for array in self._layer.get_weights()]


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


def dense(weights: Weights, x: np.ndarray) -> np.ndarray:
    kernel, *bias = weights.arrays()
    return x @ kernel + (bias[0] if bias else 0)


def gate(weights: Weights, x: np.ndarray) -> np.ndarray:
    """Equation 5."""
    value, opening = np.split(dense(weights.inside("both"), x), 2, axis=-1)
    return value * sigmoid(opening)


def grn(weights: Weights, x: np.ndarray, context: np.ndarray | None = None) -> np.ndarray:
    """Equations 2 to 5; the context [B, any] is the same for every step."""
    inner = dense(weights.inside("hidden"), x)
    if context is not None:
        added = dense(weights.inside("from_context"), context)
        inner = inner + added.reshape(added.shape[0], *(1 for _ in x.shape[1:-1]), -1)
    skip = dense(weights.inside("skip"), x) if weights.has("skip") else x
    gated = gate(weights.inside("gate"), dense(weights.inside("linear"), elu(inner)))
    return normalised(skip + gated, *weights.inside("norm").arrays())


def variable_selection(
    weights: Weights, x: np.ndarray, categories: tuple[int, ...], context: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Equations 6 to 8, one variable after the other: selected [B, T, d], weights [B, T, V]."""
    reals = x.shape[-1] - sum(categories)
    embedded, first = [], reals
    for v in range(reals):
        embedded.append(x[..., v : v + 1] @ weights("embedding")[v] + weights("embedding_bias")[v])
    tables = [np.asarray(keras.ops.convert_to_numpy(table), np.float64) for table in weights._layer.tables]
    for number, count in enumerate(categories):
        code = x[..., first : first + count].argmax(axis=-1)
        embedded.append(tables[number][code] + weights("embedding_bias")[reals + number])
        first += count
    if len(embedded) == 1:
        chosen = np.ones((*x.shape[:-1], 1))
    else:
        chosen = softmax(grn(weights.inside("weigher"), np.concatenate(embedded, axis=-1), context))
    selected = np.zeros_like(embedded[0])
    for v, e in enumerate(embedded):
        hidden = elu(e @ weights("hidden")[v] + weights("hidden_bias")[v]) @ weights("linear")[v]
        hidden = hidden + weights("linear_bias")[v]
        value, opening = np.split(hidden @ weights("gate")[v] + weights("gate_bias")[v], 2, axis=-1)
        transformed = normalised(e + value * sigmoid(opening), weights("gamma")[v], weights("beta")[v])
        selected = selected + chosen[..., v : v + 1] * transformed
    return selected, chosen


def attention(weights: Weights, query: np.ndarray, sequence: np.ndarray, heads: int) -> tuple[np.ndarray, np.ndarray]:
    """Equations 13 to 16, head by head; the queries are the last steps of the sequence and see none after them."""
    asked, bars = query.shape[1], sequence.shape[1]
    queries, keys = dense(weights.inside("query"), query), dense(weights.inside("key"), sequence)
    values = dense(weights.inside("value"), sequence)
    width = queries.shape[-1] // heads
    ahead = np.arange(bars)[None, :] > (bars - asked + np.arange(asked))[:, None]
    by_head, looked = [], []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = queries[..., part] @ keys[..., part].transpose(0, 2, 1) / np.sqrt(width)
        looked.append(softmax(np.where(ahead, -np.inf, scores)))
        by_head.append(looked[-1] @ values)
    return dense(weights.inside("output_dense"), np.mean(by_head, axis=0)), np.mean(looked, axis=0)


def lstm(weights: Weights, x: np.ndarray, state: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, tuple[Any, Any]]:
    """Hochreiter and Schmidhuber's, gates in Keras' order: input, forget, cell, output."""
    kernel, recurrent, bias = weights.arrays()
    h, c = state
    steps = []
    for step in range(x.shape[1]):
        i, f, g, o = np.split(x[:, step] @ kernel + h @ recurrent + bias, 4, axis=-1)
        c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * np.tanh(c)
        steps.append(h)
    return np.stack(steps, axis=1), (h, c)


def rising(raw: np.ndarray, anchor: int) -> np.ndarray:
    """Quantiles from the anchor on, upwards and downwards, each a softplus further."""
    found, steps = raw.copy(), np.log1p(np.exp(raw))
    for place in range(anchor + 1, raw.shape[-1]):
        found[..., place] = found[..., place - 1] + steps[..., place]
    for place in range(anchor - 1, -1, -1):
        found[..., place] = found[..., place + 1] - steps[..., place]
    return found


def positions(bars: int, units: int) -> np.ndarray:
    """Sines in even columns, cosines in odd ones."""
    table = np.zeros((bars, units))
    for bar in range(bars):
        for column in range(units):
            angle = bar / 10_000 ** (2 * (column // 2) / units)
            table[bar, column] = np.sin(angle) if column % 2 == 0 else np.cos(angle)
    return table


def temporal_fusion_transformer(network: Any, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """The whole network with stacked variable selection, from inputs by name to its outputs."""
    shape = network.tft_shape
    part = {name: Weights(layer) for name, layer in network.parts.items()}

    def one_hot(kind: str, steps: slice) -> np.ndarray | None:
        found = []
        if kind in inputs:
            found.append(inputs[kind][:, steps] if kind != "static" else inputs[kind][:, None])
        return found[0] if found else None

    def groups(kind: str, steps: slice) -> list[np.ndarray]:
        codes = inputs.get(f"{kind}_categories")
        if codes is None:
            return []
        codes = codes[:, steps] if kind != "static" else codes[:, None]
        counts = getattr(shape, f"{kind}_categories")
        return [np.eye(count)[codes[..., number]] for number, count in enumerate(counts)]

    def gathered(kinds: tuple[str, ...], steps: slice) -> np.ndarray:
        reals = [value for kind in kinds if (value := one_hot(kind, steps)) is not None]
        return np.concatenate([*reals, *(group for kind in kinds for group in groups(kind, steps))], axis=-1)

    batch = len(next(iter(inputs.values())))
    units = network.arguments["d_model"]
    contexts: dict[str, np.ndarray | None] = dict.fromkeys(("selection", "enrichment", "state_h", "state_c"))
    if "static_selection" in part:
        static = gathered(("static",), slice(None))
        chosen, _ = variable_selection(part["static_selection"], static, shape.static_categories, None)
        contexts = {name: grn(part[f"context_{name}"], chosen[:, 0]) for name in contexts}
    past, later = slice(None, shape.encoder_steps), slice(shape.encoder_steps, None)
    categories = (*shape.observed_categories, *shape.known_categories)
    selected, _ = variable_selection(
        part["history_selection"], gathered(("observed", "known"), past), categories, contexts["selection"]
    )
    zero = np.zeros((batch, units))
    h, c = contexts["state_h"], contexts["state_c"]
    recurrent, state = lstm(part["lstm"], selected, (zero if h is None else h, zero if c is None else c))
    if shape.decoder_steps:
        future, _ = variable_selection(
            part["future_selection"], gathered(("known",), later), shape.known_categories, contexts["selection"]
        )
        decoded, _ = lstm(part["lstm_decoder"], future, state)
        selected, recurrent = np.concatenate([selected, future], 1), np.concatenate([recurrent, decoded], 1)

    def skip(name: str, values: np.ndarray, around: np.ndarray) -> np.ndarray:
        return normalised(gate(part[f"{name}_gate"], values) + around, *part[f"{name}_norm"].arrays())

    temporal = skip("lstm", recurrent, selected)
    enriched = grn(part["enrichment"], temporal, contexts["enrichment"]) + positions(temporal.shape[1], units)
    asked = max(1, shape.decoder_steps)
    attended, _ = attention(part["attention"], enriched[:, -asked:], enriched, network.arguments["num_heads"])
    attended = skip("attention", attended, enriched[:, -asked:])
    result = skip("output", grn(part["feed_forward"], attended), temporal[:, -asked:])
    columns = []
    for head in shape.heads:
        if head.plain:
            columns.append(dense(part[f"{head.name}_plain"], result))
        if head.quantiles:
            raw = dense(part[f"{head.name}_quantiles"], result)
            columns.append(rising(raw, head.anchor))
    outputs = np.concatenate(columns, axis=-1)
    return outputs if shape.decoder_steps else outputs[:, 0]
