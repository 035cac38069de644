"""Networks by name. Only training imports this room, and Keras only comes in when a network is built.

A network takes scaled inputs {observed [B, T, F], known [B, T, K], symbol [B] int32} and answers [B, outputs] in units
of the scaled targets, in the order of `Task.outputs`. A new architecture is a new name in `VERSIONS` and `build_model`.
"""

from typing import TYPE_CHECKING

from perpcast.task import Task

if TYPE_CHECKING:
    import keras

# Declared versions of the code whose change makes another model of the same data; they enter the model's id.
VERSIONS = {"tft": "tft/1"}


def build_model(
    task: Task,
    architecture: str,
    *,
    d_model: int,
    num_heads: int,
    dropout: float,
    variable_width: int | None = None,
) -> "keras.Model":
    """The named network for a task, with fresh weights. Raises ValueError for a name that is not in `VERSIONS`."""
    if architecture not in VERSIONS:
        raise ValueError(f"architecture must be one of {', '.join(VERSIONS)}, received {architecture!r}")
    from perpcast.models.tft import build_tft

    return build_tft(task, d_model=d_model, num_heads=num_heads, dropout=dropout, variable_width=variable_width)
