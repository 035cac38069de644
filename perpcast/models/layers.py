"""The building blocks of the Temporal Fusion Transformer (Lim et al. 2021, arXiv 1912.09363), in `keras.ops` alone.

Shapes: B windows, T bars, V variables, d units. LayerNormalization keeps the epsilon of the authors' code, 1e-3.
Dropout masks are shared by the bars of a window (Gal and Ghahramani 2016): T times fewer random numbers, which is what
makes XLA the fastest way on a CPU and not the slowest (`docs/experiments.md`). Under a mixed policy sums of squares,
softmax and logarithms stay in float32.
"""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

EPSILON = 1e-3


class _Block(keras.layers.Layer):
    """What the blocks share: `units` wide, a dropout rate, both in the configuration."""

    def __init__(self, units: int, dropout: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.units, self.rate = units, dropout

    def dense(self, units: int, *, bias: bool = True) -> keras.layers.Dense:
        """A Dense layer of this block's precision."""
        return keras.layers.Dense(units, use_bias=bias, dtype=self.dtype_policy)

    def compute_output_shape(self, inputs_shape: tuple[int | None, ...], *others: Any, **named: Any) -> Any:
        """[..., units]."""
        return (*inputs_shape[:-1], self.units)

    def get_config(self) -> dict[str, Any]:
        """Plain arguments."""
        return {**super().get_config(), "units": self.units, "dropout": self.rate}


@keras.saving.register_keras_serializable("perpcast")
class WindowDropout(keras.layers.Dropout):
    """Dropout of [B, ..., d] with one mask for all bars of a window: [B, 1, ..., d]."""

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """The inputs, units dropped where `training`."""
        if not training or not self.rate:
            return inputs
        shape = (ops.shape(inputs)[0], *(1 for _ in inputs.shape[1:-1]), inputs.shape[-1])
        return keras.random.dropout(inputs, self.rate, noise_shape=shape, seed=self.seed_generator)


@keras.saving.register_keras_serializable("perpcast")
class GatedLinearUnit(_Block):
    """Dense(x) * sigmoid(Dense(x)) after dropout: [..., any] to [..., units]. Both Dense are one product."""

    def __init__(self, units: int, dropout: float = 0.0, **kwargs: Any) -> None:
        super().__init__(units, dropout, **kwargs)
        self.dropout = WindowDropout(dropout, dtype=self.dtype_policy)
        self.both = self.dense(2 * units)

    def build(self, inputs_shape: tuple[int | None, ...]) -> None:
        """Makes the weights of both halves."""
        self.both.build(inputs_shape)
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """The gated values."""
        return _gated(self.both(self.dropout(inputs, training=training)))


@keras.saving.register_keras_serializable("perpcast")
class GatedResidualNetwork(_Block):
    """LayerNorm(skip + GLU(Dense(ELU(Dense(x) + Dense(context))))), equations 2-5.

    `context` [B, any] is shared by all steps of `inputs` [B, ..., any]. The skip is the input itself, or a Dense where
    `outputs` differs from the input's width, or where `dense_skip` asks for one.
    """

    def __init__(
        self, units: int, outputs: int | None = None, dropout: float = 0.0, dense_skip: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(units, dropout, **kwargs)
        self.outputs, self.dense_skip = units if outputs is None else outputs, dense_skip
        self.hidden = self.dense(units)
        self.from_context = self.dense(units, bias=False)
        self.linear = self.dense(units)
        self.gate = GatedLinearUnit(self.outputs, dropout, dtype=self.dtype_policy)
        self.skip: Any = None
        self.norm = keras.layers.LayerNormalization(epsilon=EPSILON, dtype=self.dtype_policy)

    def build(self, inputs_shape: tuple[int | None, ...], context_shape: tuple[int | None, ...] | None = None) -> None:
        """Makes the weights; those of the context only where one is given."""
        self.hidden.build(inputs_shape)
        if context_shape is not None:
            self.from_context.build(context_shape)
        inner = (*inputs_shape[:-1], self.units)
        self.linear.build(inner)
        self.gate.build(inner)
        if self.dense_skip or inputs_shape[-1] != self.outputs:
            self.skip = self.dense(self.outputs)
            self.skip.build(inputs_shape)
        self.norm.build((*inputs_shape[:-1], self.outputs))
        self.built = True

    def call(self, inputs: Any, context: Any = None, training: bool | None = None) -> Any:
        """[B, ..., outputs]."""
        hidden = self.hidden(inputs)
        if context is not None:
            added = self.from_context(context)
            for _ in range(len(inputs.shape) - 2):
                added = ops.expand_dims(added, 1)
            hidden = hidden + added
        gated = self.gate(self.linear(_elu(hidden)), training=training)
        return self.norm((inputs if self.skip is None else self.skip(inputs)) + gated)

    def compute_output_shape(self, inputs_shape: tuple[int | None, ...], *others: Any, **named: Any) -> Any:
        """[B, ..., outputs]."""
        return (*inputs_shape[:-1], self.outputs)

    def get_config(self) -> dict[str, Any]:
        """Plain arguments."""
        return {**super().get_config(), "outputs": self.outputs, "dense_skip": self.dense_skip}


class _Selection(_Block):
    """Selects among V variables at every bar, equations 6-8: [B, T, inputs] and a context to ([B, T, d], [B, T, V]).

    `inputs` are the real variables, then one one-hot group for each number in `categories`. A softmax over V weighs
    networks of the variables' own, one for each. Answers the weighted sum and the weights. What is left to the two
    forms below is how the variables are embedded and transformed: all V at once, as batched products [V, B * T, d].
    """

    def __init__(self, units: int, dropout: float = 0.0, categories: Sequence[int] = (), **kwargs: Any) -> None:
        super().__init__(units, dropout, **kwargs)
        self.categories = tuple(categories)
        self.dropout = WindowDropout(dropout, dtype=self.dtype_policy)
        self.weigher: Any = None

    def build(self, inputs_shape: tuple[int | None, ...], context_shape: tuple[int | None, ...] | None = None) -> None:
        """Makes V sets of weights, each drawn by Glorot's rule for one variable, whatever their number."""
        self.width = int(inputs_shape[-1] or 0)
        self.reals = self.width - sum(self.categories)
        self.count = self.reals + len(self.categories)
        self.build_variables()
        self.gamma = self.add_weight(name="gamma", shape=(self.count, self.inner_units), initializer="ones")
        self.beta = self.add_weight(name="beta", shape=(self.count, self.inner_units), initializer="zeros")
        if self.count > 1:
            self.weigher = GatedResidualNetwork(
                self.units, self.count, self.rate, dense_skip=True, dtype=self.dtype_policy
            )
            self.weigher.build((*inputs_shape[:-1], self.weigher_width), context_shape)
        self.built = True

    @property
    def inner_units(self) -> int:
        """Width of a variable's own network."""
        return self.units

    def kernel(self, name: str, inputs: int, outputs: int, *, fan_out: int, variables: int = 0) -> Any:
        """Weights [V, inputs, outputs] of V Dense layers; a merged pair of Dense is drawn as its halves would be."""
        limit = float(np.sqrt(6 / (inputs + fan_out)))
        draw = keras.initializers.RandomUniform(-limit, limit)
        return self.add_weight(name=name, shape=(variables or self.count, inputs, outputs), initializer=draw)

    def table(self, name: str, count: int, outputs: int) -> Any:
        """A row for each value of a category [count, outputs], as large as what a real variable of 1 becomes.

        Not Keras' own much smaller draw for embeddings: the normalisation after the network of a variable would magnify
        it, and with it every step of the optimizer.
        """
        limit = float(np.sqrt(6 / (1 + outputs)))
        return self.add_weight(
            name=name, shape=(count, outputs), initializer=keras.initializers.RandomUniform(-limit, limit)
        )

    def bias(self, name: str, outputs: int) -> Any:
        """Biases [V, 1, outputs]."""
        return self.add_weight(name=name, shape=(self.count, 1, outputs), initializer="zeros")

    def split(self, inputs: Any) -> tuple[Any, list[Any]]:
        """The real variables [R, B * T, 1] and each categorical one, one-hot [B * T, n]."""
        reals = ops.transpose(inputs[..., : self.reals], (2, 0, 1))
        if self.reals:  # of none, JAX cannot work out how many -1 is
            reals = ops.reshape(reals, (self.reals, -1, 1))
        groups, first = [], self.reals
        for count in self.categories:
            groups.append(ops.reshape(inputs[..., first : first + count], (-1, count)))
            first += count
        return reals, groups

    def drop(self, hidden: Any, bars: int, training: bool | None) -> Any:
        """Dropout of [V, B * T, d], one mask for all bars of a window."""
        if not training or not self.rate:
            return hidden
        variables, units = hidden.shape[0], hidden.shape[-1]
        hidden = ops.reshape(hidden, (variables, -1, bars, units))
        shape = (variables, ops.shape(hidden)[1], 1, units)
        hidden = keras.random.dropout(hidden, self.rate, noise_shape=shape, seed=self.dropout.seed_generator)
        return ops.reshape(hidden, (variables, -1, units))

    def call(self, inputs: Any, context: Any = None, training: bool | None = None) -> Any:
        """The selected values [B, T, d] and the weight of every variable at every bar [B, T, V], adding up to 1."""
        bars = inputs.shape[1]
        read, values = self.transform(inputs, bars, training)
        if self.count > 1:
            weights = ops.softmax(ops.cast(self.weigher(read, context, training=training), "float32"), axis=-1)
        else:
            weights = ops.ones_like(inputs[..., :1], dtype="float32")
        values = ops.cast(values, "float32")  # [V, B * T, d], normalised below
        centred = values - ops.mean(values, axis=-1, keepdims=True)
        variance = ops.mean(ops.square(centred), axis=-1, keepdims=True)
        weight = ops.reshape(ops.transpose(weights, (2, 0, 1)), (self.count, -1, 1))
        gamma, beta = ops.cast(self.gamma, "float32"), ops.cast(self.beta, "float32")
        weighted = (weight * ops.rsqrt(variance + EPSILON)) * centred * ops.expand_dims(gamma, 1)
        selected = ops.reshape(ops.sum(weighted, axis=0), (-1, bars, self.inner_units)) + ops.matmul(weights, beta)
        return ops.cast(selected, self.compute_dtype), weights

    def build_variables(self) -> None:
        """Makes the weights of the variables' own networks."""
        raise NotImplementedError

    @property
    def weigher_width(self) -> int:
        """Width of what the network of the weights reads."""
        raise NotImplementedError

    def transform(self, inputs: Any, bars: int, training: bool | None) -> tuple[Any, Any]:
        """What the network of the weights reads [B, T, weigher_width], and every variable through its own network,
        before the normalisation: [V, B * T, d]."""
        raise NotImplementedError

    def compute_output_shape(self, inputs_shape: tuple[int | None, ...], *others: Any, **named: Any) -> Any:
        """[B, T, d] and [B, T, V]."""
        variables = int(inputs_shape[-1] or 0) - sum(self.categories) + len(self.categories)
        return (*inputs_shape[:-1], self.units), (*inputs_shape[:-1], variables)

    def get_config(self) -> dict[str, Any]:
        """Plain arguments."""
        return {**super().get_config(), "categories": self.categories}


@keras.saving.register_keras_serializable("perpcast")
class StackedVariableSelection(_Selection):
    """Variable selection with the matrices of the paper, stacked: [V, in, out]."""

    def build_variables(self) -> None:
        """Embedding, the two Dense of the gated residual network, its gate."""
        units = self.units
        self.embedding = self.kernel("embedding", 1, units, fan_out=units, variables=self.reals) if self.reals else None
        self.tables = [self.table(f"table_{number}", count, units) for number, count in enumerate(self.categories)]
        self.embedding_bias = self.bias("embedding_bias", units)
        self.hidden = self.kernel("hidden", units, units, fan_out=units)
        self.hidden_bias = self.bias("hidden_bias", units)
        self.linear = self.kernel("linear", units, units, fan_out=units)
        self.linear_bias = self.bias("linear_bias", units)
        self.gate = self.kernel("gate", units, 2 * units, fan_out=units)
        self.gate_bias = self.bias("gate_bias", 2 * units)

    @property
    def weigher_width(self) -> int:
        """All embeddings side by side."""
        return self.count * self.units

    def embed(self, inputs: Any) -> Any:
        """[V, B * T, d]."""
        reals, groups = self.split(inputs)
        parts = [] if self.embedding is None else [ops.matmul(reals, self.embedding)]
        parts += [
            ops.expand_dims(ops.matmul(group, table), 0) for group, table in zip(groups, self.tables, strict=True)
        ]
        return (parts[0] if len(parts) == 1 else ops.concatenate(parts, axis=0)) + self.embedding_bias

    def transform(self, inputs: Any, bars: int, training: bool | None) -> tuple[Any, Any]:
        """The embeddings side by side, and every variable through its own gated residual network."""
        embedded = self.embed(inputs)
        read = ops.reshape(ops.transpose(embedded, (1, 0, 2)), (-1, bars, self.weigher_width))
        hidden = _elu(ops.matmul(embedded, self.hidden) + self.hidden_bias)
        hidden = self.drop(ops.matmul(hidden, self.linear) + self.linear_bias, bars, training)
        return read, embedded + _gated(ops.matmul(hidden, self.gate) + self.gate_bias)

    def fused_weights(self) -> list[np.ndarray]:
        """The weights of a VariableSelection that is the same function, in the order of its `get_weights`.

        Two Dense with nothing but dropout between them are one; so are an embedding and the Dense after it. Computed in
        float64.
        """
        arrays = {weight.name: np.asarray(ops.convert_to_numpy(weight), np.float64) for weight in self.weights_of_own()}
        bias, embedding = arrays["embedding_bias"], arrays.get("embedding")
        tables = [arrays[f"table_{number}"] + bias[self.reals + number] for number in range(len(self.categories))]
        real_bias = bias[: self.reals]
        hidden, hidden_bias = arrays["hidden"], arrays["hidden_bias"]
        found: dict[str, np.ndarray] = {}
        if embedding is not None:
            found["embedding"], found["embedding_bias"] = embedding, real_bias
            found["inner"] = embedding @ hidden[: self.reals]
            found["inner_bias"] = real_bias @ hidden[: self.reals] + hidden_bias[: self.reals]
        for number, table in enumerate(tables):
            found[f"table_{number}"] = table
            found[f"inner_table_{number}"] = table @ hidden[self.reals + number] + hidden_bias[self.reals + number]
        found["gate"] = arrays["linear"] @ arrays["gate"]
        found["gate_bias"] = arrays["linear_bias"] @ arrays["gate"] + arrays["gate_bias"]
        found["gamma"], found["beta"] = arrays["gamma"], arrays["beta"]
        if self.weigher is None:
            return list(found.values())
        return [*found.values(), *self._fused_weigher(embedding, bias, tables)]

    def weights_of_own(self) -> list[Any]:
        """The weights but those of the weigher."""
        weigher = set() if self.weigher is None else {id(weight) for weight in self.weigher.weights}
        return [weight for weight in self.weights if id(weight) not in weigher]

    def _fused_weigher(self, embedding: Any, bias: np.ndarray, tables: Sequence[np.ndarray]) -> list[Any]:
        """The weigher's weights where it reads reals and one-hot groups in place of embeddings."""
        weigher = self.weigher

        def reads(layer: Any) -> list[np.ndarray]:
            kernel, offset = (np.asarray(array, np.float64) for array in layer.get_weights())
            blocks = kernel.reshape(self.count, self.units, -1)
            rows = [] if embedding is None else [np.einsum("vo,vok->vk", embedding[:, 0], blocks[: self.reals])]
            rows += [table @ blocks[self.reals + number] for number, table in enumerate(tables)]
            constant = np.einsum("vo,vok->k", bias[: self.reals, 0], blocks[: self.reals])
            return [np.concatenate(rows), offset + constant]

        parts = [weigher.hidden, weigher.from_context, weigher.linear, weigher.gate, weigher.norm]
        weights = {id(part): part.get_weights() for part in parts}
        weights[id(weigher.hidden)] = reads(weigher.hidden)
        return [*(array for part in parts for array in weights[id(part)]), *reads(weigher.skip)]


@keras.saving.register_keras_serializable("perpcast")
class VariableSelection(_Selection):
    """Variable selection in the fewest operations: the function of `StackedVariableSelection`, other parameters.

    A real variable is a scalar x, so that its embedding and the first Dense after it are together one affine map of x
    (`inner`), and the network of the weights reads the scalars themselves; the second Dense is merged into the gate's
    two, with the dropout between them moved before. A categorical one is a row of a table. Affine maps are products
    [x, 1] @ [a; c], whose gradients are products too: 20 to 30 % less time on a CPU than broadcasting.

    `rank` is the width of the variables' own networks, `units` unless given (the paper's): the work is in proportion
    to it. What is selected is then widened by one Dense.
    """

    def __init__(
        self, units: int, dropout: float = 0.0, categories: Sequence[int] = (), rank: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(units, dropout, categories, **kwargs)
        self.rank = rank
        self.widen: Any = None if rank in (None, units) else self.dense(units)

    @property
    def inner_units(self) -> int:
        """Width of a variable's own network."""
        return self.rank or self.units

    def build_variables(self) -> None:
        """Embedding and inner map of every variable, their gates."""
        units, reals = self.inner_units, self.reals
        self.embedding: Any = None
        if reals:
            self.embedding = self.kernel("embedding", 1, units, fan_out=units, variables=reals)
            self.embedding_bias = self.add_weight(name="embedding_bias", shape=(reals, 1, units), initializer="zeros")
            self.inner = self.kernel("inner", 1, units, fan_out=units, variables=reals)
            self.inner_bias = self.add_weight(name="inner_bias", shape=(reals, 1, units), initializer="zeros")
        self.tables = [
            tuple(self.table(f"{name}_{number}", count, units) for name in ("table", "inner_table"))
            for number, count in enumerate(self.categories)
        ]
        self.gate, self.gate_bias = (
            self.kernel("gate", units, 2 * units, fan_out=units),
            self.bias("gate_bias", 2 * units),
        )

    @property
    def weigher_width(self) -> int:
        """The variables themselves."""
        return self.width

    def build(self, inputs_shape: tuple[int | None, ...], context_shape: tuple[int | None, ...] | None = None) -> None:
        """Makes the weights, last those of the widening Dense."""
        super().build(inputs_shape, context_shape)
        if self.widen is not None:
            self.widen.build((*inputs_shape[:-1], self.inner_units))

    def call(self, inputs: Any, context: Any = None, training: bool | None = None) -> Any:
        """The selected values [B, T, d] and the weight of every variable at every bar [B, T, V], adding up to 1."""
        selected, weights = super().call(inputs, context, training)
        return (selected if self.widen is None else self.widen(selected)), weights

    def transform(self, inputs: Any, bars: int, training: bool | None) -> tuple[Any, Any]:
        """The variables themselves, and each through its own gated residual network, `rank` wide."""
        reals, groups = self.split(inputs)
        skips, inners = [], []
        if self.embedding is not None:
            one = ops.concatenate([reals, ops.ones_like(reals)], axis=-1)
            skips.append(ops.matmul(one, ops.concatenate([self.embedding, self.embedding_bias], axis=1)))
            inners.append(ops.matmul(one, ops.concatenate([self.inner, self.inner_bias], axis=1)))
        for group, (table, inner_table) in zip(groups, self.tables, strict=True):
            skips.append(ops.expand_dims(ops.matmul(group, table), 0))
            inners.append(ops.expand_dims(ops.matmul(group, inner_table), 0))
        skip, inner = (part[0] if len(part) == 1 else ops.concatenate(part, axis=0) for part in (skips, inners))
        hidden = self.drop(_elu(inner), bars, training)
        return inputs, skip + _gated(ops.matmul(hidden, self.gate) + self.gate_bias)

    def get_config(self) -> dict[str, Any]:
        """Plain arguments."""
        return {**super().get_config(), "rank": self.rank}


@keras.saving.register_keras_serializable("perpcast")
class PositionalEncoding(keras.layers.Layer):
    """Adds sine and cosine of the bar's place in the window (Vaswani et al. 2017): [B, T, d] to [B, T, d]."""

    def build(self, inputs_shape: tuple[int | None, ...]) -> None:
        """Fixes the table for T bars and d units."""
        bars, units = int(inputs_shape[1] or 0), int(inputs_shape[2] or 0)
        rates = 10_000.0 ** (-np.arange(0, units, 2) / units)
        angles = np.arange(bars)[:, None] * rates[None, :]
        table = np.zeros((bars, units), np.float32)
        table[:, 0::2] = np.sin(angles)
        table[:, 1::2] = np.cos(angles[:, : units // 2])
        self.table = table
        self.built = True

    def call(self, inputs: Any) -> Any:
        """The inputs, each bar marked."""
        return inputs + ops.cast(self.table, inputs.dtype)

    def compute_output_shape(self, inputs_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """As the inputs."""
        return inputs_shape


@keras.saving.register_keras_serializable("perpcast")
class InterpretableAttention(keras.layers.Layer):
    """Multi-head attention whose heads share their values, so that its weights can be read: equations 13-16.

    From `query` [B, Q, d] over `sequence` [B, T, d] to [B, Q, d] and the attention [B, Q, T]. The queries are the last
    Q bars of the sequence; each looks at itself and what came before it. With shared values the mean over heads may be
    taken of the weights first, which is the same sum in another order.
    """

    def __init__(self, heads: int, dropout: float = 0.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.heads, self.rate = heads, dropout
        self.dropout = WindowDropout(dropout, dtype=self.dtype_policy)
        self.query: Any = None

    def build(self, query_shape: tuple[int | None, ...], sequence_shape: tuple[int | None, ...]) -> None:
        """Makes one projection of queries and keys per head and one of values for all."""
        units = int(sequence_shape[-1] or 0)
        if units % self.heads:
            raise ValueError(f"width {units} must be a multiple of heads {self.heads}")
        self.head_units = units // self.heads
        self.query, self.key, self.value, self.output_dense = (
            keras.layers.Dense(width, use_bias=False, dtype=self.dtype_policy)
            for width in (units, units, self.head_units, units)
        )
        self.query.build(query_shape)
        self.key.build(sequence_shape)
        self.value.build(sequence_shape)
        self.output_dense.build((*query_shape[:-1], self.head_units))
        self.built = True

    def attention(self, query: Any, sequence: Any) -> Any:
        """How much each query looks at each bar, mean over heads: [B, Q, T], rows add up to 1."""
        heads, head_units, asked, bars = self.heads, self.head_units, query.shape[1], sequence.shape[1]
        queries = ops.reshape(self.query(query), (-1, asked, heads, head_units))
        keys = ops.reshape(self.key(sequence), (-1, bars, heads, head_units))
        scores = ops.matmul(ops.transpose(queries, (0, 2, 1, 3)), ops.transpose(keys, (0, 2, 3, 1)))
        scores = ops.cast(scores, "float32") * head_units**-0.5
        if asked > 1:
            later = np.triu(np.ones((asked, bars), np.float32), bars - asked + 1)
            scores = scores - 1e9 * later
        return ops.mean(ops.softmax(scores, axis=-1), axis=1)

    def call(self, query: Any, sequence: Any, training: bool | None = None) -> Any:
        """[B, Q, d] and [B, Q, T]."""
        attention = self.attention(query, sequence)
        attended = ops.matmul(ops.cast(attention, self.compute_dtype), self.value(sequence))
        return self.dropout(self.output_dense(attended), training=training), attention

    def compute_output_shape(self, query_shape: tuple[int | None, ...], sequence_shape: Any = None) -> Any:
        """[B, Q, d] and [B, Q, T]."""
        return query_shape, (*query_shape[:-1], sequence_shape[1])

    def get_config(self) -> dict[str, Any]:
        """Plain arguments."""
        return {**super().get_config(), "heads": self.heads, "dropout": self.rate}


@keras.saving.register_keras_serializable("perpcast")
class RisingQuantiles(keras.layers.Layer):
    """Makes quantiles that cannot cross; keeps the shape.

    The one at `anchor` stays as it is, each next one is larger by a softplus, each one before smaller by one. Should be
    the median, or what is nearest to it: the errors of all of them move it.
    """

    def __init__(self, anchor: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.anchor = anchor

    def call(self, inputs: Any) -> Any:
        """The quantiles, in rising order."""
        steps, anchor = ops.softplus(inputs), inputs[..., self.anchor : self.anchor + 1]
        above = anchor + ops.cumsum(steps[..., self.anchor + 1 :], axis=-1)
        if not self.anchor:
            return ops.concatenate([anchor, above], axis=-1)
        below = anchor - ops.flip(ops.cumsum(ops.flip(steps[..., : self.anchor], axis=-1), axis=-1), axis=-1)
        return ops.concatenate([below, anchor, above], axis=-1)

    def get_config(self) -> dict[str, Any]:
        """Plain arguments."""
        return {**super().get_config(), "anchor": self.anchor}

    def compute_output_shape(self, inputs_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        """As the inputs."""
        return inputs_shape


def _elu(values: Any) -> Any:
    """ELU by `exp`: XLA turns it into vector instructions, which it does not with the `expm1` of `ops.elu`."""
    return ops.where(values > 0, values, ops.exp(ops.minimum(values, 0.0)) - 1.0)


def _gated(both: Any) -> Any:
    """The first half times the sigmoid of the second: [..., 2 n] to [..., n]."""
    half = both.shape[-1] // 2
    return both[..., :half] * ops.sigmoid(both[..., half:])
