"""Networks by name. Only training imports this room, and Keras only comes in when a network is built.

A network takes scaled inputs {observed [B, T, F], known [B, T, K], static_categories [B, 1] int32, the symbol's code}
and answers [B, columns]: of a regression target the mean and the quantiles in units of its scaled labels, of a
classification target the logit of a profit. A new architecture is a new name in `VERSIONS` and a branch of
`build_model`.
"""

from typing import TYPE_CHECKING

from perpcast.config import ModelSettings
from perpcast.task import Target, Task

if TYPE_CHECKING:
    from perpcast.models.tft import Head, TemporalFusionTransformer, TftShape

# Declared versions of the code whose change makes another model of the same data; they enter the model's id.
VERSIONS = {"tft": "tft/2"}


def build_model(task: Task, settings: ModelSettings, *, precision: str | None = None) -> "TemporalFusionTransformer":
    """The settings' network for a task, with fresh weights; `precision` in place of the settings' own.

    Raises ValueError for an architecture that is not in `VERSIONS`, or a task that it cannot do.
    """
    if settings.architecture not in VERSIONS:
        raise ValueError(f"architecture must be one of {', '.join(VERSIONS)}, received {settings.architecture!r}")
    from perpcast.models.tft import TemporalFusionTransformer

    return TemporalFusionTransformer(
        tft_shape(task),
        d_model=settings.d_model,
        num_heads=settings.num_heads,
        dropout=settings.dropout,
        variable_selection=settings.variable_selection,
        vsn_rank=settings.vsn_rank,
        precision=precision or settings.precision,
    )


def tft_shape(task: Task) -> "TftShape":
    """The task as the network sees it. Raises ValueError for static inputs that no code makes."""
    from perpcast.models.tft import TftShape

    if task.static != ("symbol",):
        raise ValueError(f"the one static input that is made is 'symbol', received {task.static}")
    return TftShape(
        encoder_steps=task.lookback,
        observed=len(task.observed),
        known=len(task.known),
        static_categories=(len(task.symbols),),
        heads=tuple(_head(target) for target in task.targets),
    )


def _head(target: Target) -> "Head":
    from perpcast.models.tft import Head

    if target.kind == "classification":
        return Head(target.name, 1)
    anchor = min(range(len(target.quantiles)), key=lambda n: abs(target.quantiles[n] - 0.5), default=0)
    return Head(target.name, 1, len(target.quantiles), anchor)
