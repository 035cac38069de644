"""Two libraries' Temporal Fusion Transformers behind the inputs of ours: the networks alone, without loaders.

Inputs are a dict of those present: observed [B, T, n], known [B, T+D, n], static [B, n], observed_categories,
known_categories and static_categories (int64, the same shapes). Every step's answer is [B, D, outputs]. Both libraries
have a decoder always: D is at least 1.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch  # type: ignore[import-not-found]
from torch import nn


@dataclass(frozen=True)
class Shape:
    """The problem's shape and the network's size; the counts are those of real inputs, the categories cardinalities."""

    encoder_steps: int
    decoder_steps: int
    observed: int
    known: int
    outputs: int
    d_model: int
    num_heads: int
    dropout: float
    static: int = 0
    observed_categories: tuple[int, ...] = ()
    known_categories: tuple[int, ...] = ()
    static_categories: tuple[int, ...] = ()


def build(library: str, shape: Shape, seed: int, hidden_continuous: int | None = None) -> nn.Module:
    """The named library's network with fresh weights of a seed. `hidden_continuous` is d_model unless given."""
    torch.manual_seed(seed)
    logging.getLogger("lightning").setLevel(logging.ERROR)
    if library == "pytorch-forecasting":
        return PytorchForecasting(shape, hidden_continuous or shape.d_model)
    if library == "neuralforecast":
        return NeuralForecast(shape, seed)
    raise ValueError(f"library must be pytorch-forecasting or neuralforecast, received {library!r}")


class PytorchForecasting(nn.Module):
    """pytorch-forecasting's; the scaling of its outputs is switched off."""

    def __init__(self, shape: Shape, hidden_continuous: int) -> None:
        super().__init__()
        from pytorch_forecasting import TemporalFusionTransformer  # type: ignore[import-not-found]
        from pytorch_forecasting.metrics import RMSE  # type: ignore[import-not-found]

        def names(kind: str, count: int) -> list[str]:
            return [f"{kind}_{number}" for number in range(count)]

        categories = {
            name: cardinality
            for kind in ("observed", "known", "static")
            for name, cardinality in zip(
                names(f"{kind}_category", len(getattr(shape, f"{kind}_categories"))),
                getattr(shape, f"{kind}_categories"),
                strict=True,
            )
        }
        reals = [name for kind in ("observed", "known", "static") for name in names(kind, getattr(shape, kind))]

        def of(kinds: tuple[str, ...], every: Any) -> list[str]:
            return [name for name in every if name.startswith(kinds)]

        self.shape = shape
        self.network = TemporalFusionTransformer(
            hidden_size=shape.d_model,
            hidden_continuous_size=hidden_continuous,
            attention_head_size=shape.num_heads,
            dropout=shape.dropout,
            output_size=shape.outputs,
            max_encoder_length=shape.encoder_steps,
            static_categoricals=of(("static",), categories),
            static_reals=of(("static",), reals),
            time_varying_categoricals_encoder=of(("observed", "known"), categories),
            time_varying_categoricals_decoder=of(("known",), categories),
            time_varying_reals_encoder=of(("observed", "known"), reals),
            time_varying_reals_decoder=of(("known",), reals),
            x_reals=reals,
            x_categoricals=list(categories),
            embedding_sizes={name: (cardinality, shape.d_model) for name, cardinality in categories.items()},
            loss=RMSE(),  # the loss is ours; this one only must exist
            logging_metrics=nn.ModuleList(),
            output_transformer=lambda output: output["prediction"],
        )

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """[B, D, outputs]."""
        encoder, steps, batch = self.shape.encoder_steps, self.shape.decoder_steps, len(next(iter(inputs.values())))
        reals, categories = self._wide(inputs, ""), self._wide(inputs, "_categories")
        answer = self.network(
            {
                "encoder_cont": reals[:, :encoder],
                "decoder_cont": reals[:, encoder:],
                "encoder_cat": categories[:, :encoder],
                "decoder_cat": categories[:, encoder:],
                "encoder_lengths": torch.full((batch,), encoder),
                "decoder_lengths": torch.full((batch,), steps),
                "target_scale": torch.zeros(batch, 2),
            }
        )
        return answer["prediction"]

    def _wide(self, inputs: dict[str, torch.Tensor], suffix: str) -> torch.Tensor:
        """All reals, or all categories, on all steps: [B, T+D, n]; what is observed only is 0 in the decoder."""
        batch = len(next(iter(inputs.values())))
        steps = self.shape.encoder_steps + self.shape.decoder_steps
        parts = []
        if (observed := inputs.get(f"observed{suffix}")) is not None:
            parts.append(nn.functional.pad(observed, (0, 0, 0, self.shape.decoder_steps)))
        if (known := inputs.get(f"known{suffix}")) is not None:
            parts.append(known)
        if (static := inputs.get(f"static{suffix}")) is not None:
            parts.append(static[:, None].expand(-1, steps, -1))
        return torch.cat(parts, 2) if parts else torch.zeros(batch, steps, 0, dtype=torch.long if suffix else None)


class NeuralForecast(nn.Module):
    """neuralforecast's. It has no categories: as its users do, each is a real number, here from -1 to 1.

    The first observed input is its target's past.
    """

    def __init__(self, shape: Shape, seed: int) -> None:
        super().__init__()
        from neuralforecast.losses.pytorch import MAE, MQLoss  # type: ignore[import-not-found]
        from neuralforecast.models import TFT  # type: ignore[import-not-found]

        def names(*counts: int) -> list[str]:
            return [f"{position}_{number}" for position, count in enumerate(counts) for number in range(count)]

        # Only the number of outputs of this loss is used.
        loss = (
            MAE()
            if shape.outputs == 1
            else MQLoss(quantiles=[(1 + k) / (1 + shape.outputs) for k in range(shape.outputs)])
        )
        self.shape = shape
        self.network = TFT(
            h=shape.decoder_steps,
            input_size=shape.encoder_steps,
            hist_exog_list=names(shape.observed - 1, len(shape.observed_categories)),
            futr_exog_list=names(shape.known, len(shape.known_categories)),
            stat_exog_list=names(shape.static, len(shape.static_categories)),
            hidden_size=shape.d_model,
            n_head=shape.num_heads,
            dropout=shape.dropout,
            loss=loss,
            random_seed=seed,  # it seeds torch by itself, with 1 unless told
            accelerator="cpu",
        )

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """[B, D, outputs]."""
        wide = {kind: self._wide(inputs, kind) for kind in ("observed", "known", "static")}
        observed = wide["observed"]
        return self.network(
            {
                "insample_y": observed[..., :1],
                "hist_exog": observed[..., 1:] if observed.shape[-1] > 1 else None,
                "futr_exog": wide["known"],
                "stat_exog": wide["static"],
            }
        )

    def _wide(self, inputs: dict[str, torch.Tensor], kind: str) -> Any:
        """Reals and then categories of one kind, None where it has neither."""
        parts = [inputs[kind]] if kind in inputs else []
        if (codes := inputs.get(f"{kind}_categories")) is not None:
            largest = torch.tensor(getattr(self.shape, f"{kind}_categories")) - 1
            parts.append(codes / largest.clamp(min=1) * 2.0 - 1.0)
        return torch.cat(parts, -1) if parts else None
