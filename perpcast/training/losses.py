"""What training minimises: for each window the losses of its targets, summed; pure `keras.ops`."""

from collections.abc import Callable
from typing import Any

import numpy as np
from keras import ops

from perpcast.task import Target, Task


def task_loss(task: Task, class_weights: np.ndarray | None = None) -> Callable[[Any, Any], Any]:
    """The loss of labels [B, targets] and raw columns [B, columns], as `OutputReading.targets` makes them: [B].

    A return costs its squared error plus the pinball losses of its quantiles, a profit the cross-entropy of its logit.
    `class_weights` [targets, 2] multiply the cross-entropy of a loss and of a profit.
    """
    if class_weights is not None and np.shape(class_weights) != (len(task.targets), 2):
        raise ValueError(f"class_weights must be [{len(task.targets)}, 2], received {list(np.shape(class_weights))}")

    def loss(labels: Any, raw: Any) -> Any:
        total, column = 0.0, 0
        for number, target in enumerate(task.targets):
            label, own = labels[:, number : number + 1], raw[:, column : column + target.columns]
            if target.kind == "classification":
                total += _cross_entropy(label, own, None if class_weights is None else class_weights[number])
            else:
                squared, pinball = _return_losses(target, label, own)
                total = total + squared + pinball
            column += target.columns
        return total

    return loss


def _return_losses(target: Target, label: Any, raw: Any) -> tuple[Any, Any]:
    squared = ops.square(label - raw[:, :1])[:, 0]
    levels = np.array(target.quantiles, np.float32)
    error = label - raw[:, 1:]
    return squared, ops.sum(ops.maximum(levels * error, (levels - 1) * error), axis=-1)


def _cross_entropy(label: Any, logit: Any, weights: np.ndarray | None) -> Any:
    # log(1 + e^z) - y z: finite for any logit.
    entropy = ops.softplus(logit) - label * logit
    if weights is not None:
        loss, profit = (float(weight) for weight in weights)
        entropy = entropy * (loss + (profit - loss) * label)
    return entropy[:, 0]
