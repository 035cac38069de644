"""Adam that measures the gradients before it clips them, on every backend."""

from collections.abc import Sequence
from typing import Any

import keras
from keras import ops


@keras.saving.register_keras_serializable("perpcast")
class MeasuringAdam(keras.optimizers.Adam):
    """Adam whose variable `norm_total` adds up the norm of all gradients together, step by step, before the clipping.

    Being a variable, it is measured inside the compiled step under TensorFlow and JAX alike, and asked for only when
    somebody wants to know: nothing waits for it.
    """

    def build(self, variables: Sequence[Any]) -> None:
        """Makes the moments, and the sum."""
        if self.built:
            return
        super().build(variables)
        self.norm_total = self.add_variable(shape=(), initializer="zeros", dtype="float32", name="norm_total")

    def apply(self, grads: Sequence[Any], trainable_variables: Any = None) -> None:
        """One step; the optimizer has been built."""
        squares = [ops.sum(ops.square(ops.cast(gradient, "float32"))) for gradient in grads if gradient is not None]
        self.assign_add(self.norm_total, ops.sqrt(ops.sum(ops.stack(squares))))
        super().apply(grads, trainable_variables)

    def take_mean_norm(self, steps: int) -> float:
        """The mean norm over the steps since it was last taken, of which there were `steps`."""
        total = float(ops.convert_to_numpy(self.norm_total))
        self.norm_total.assign(0.0)
        return total / steps
