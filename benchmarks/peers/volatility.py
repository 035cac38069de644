"""One library's training on S&P 500 volatility in a process of its own, by the protocol of tests/volatility.py.

python -m benchmarks.peers.volatility '{"library": "neuralforecast", "seed": 0, "threads": 2, "predictions": "one.npz"}'
"""

import json
import sys
import warnings
from typing import Any

import numpy as np
import torch  # type: ignore[import-not-found]

from benchmarks.peers.networks import Shape, build
from tests.volatility import DECODER_DAYS, ENCODER_DAYS, KNOWN, QUANTILES, Budget, train_and_save


class PeerTft:
    """A library's network as a `tests.volatility.Learner`."""

    def __init__(self, library: str, budget: Budget, seed: int) -> None:
        shape = Shape(
            encoder_steps=ENCODER_DAYS,
            decoder_steps=DECODER_DAYS,
            observed=2,
            known=KNOWN,
            static_categories=(1,),
            outputs=len(QUANTILES),
            d_model=budget.d_model,
            num_heads=budget.num_heads,
            dropout=budget.dropout,
        )
        self.clip_norm = budget.clip_norm
        self.network = build(library, shape, seed)
        self.optimizer = torch.optim.Adam(self.network.parameters(), budget.learning_rate, eps=1e-8)

    def step(self, inputs: dict[str, np.ndarray], targets: np.ndarray, rate: float) -> float:
        """One step at a learning rate; the loss before it."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.network.train()
        self.optimizer.zero_grad(set_to_none=True)
        error = torch.as_tensor(targets)[..., None] - self.network(_tensors(inputs))
        quantiles = torch.tensor(QUANTILES)
        loss = torch.maximum(quantiles * error, (quantiles - 1) * error).sum(-1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.clip_norm)
        self.optimizer.step()
        return loss.item()

    def predict(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Scaled quantiles."""
        self.network.eval()
        with torch.no_grad():
            return self.network(_tensors(inputs)).numpy()

    def weights(self) -> Any:
        """Tensors by name."""
        return {name: value.clone() for name, value in self.network.state_dict().items()}

    def restore(self, weights: Any) -> None:
        """Sets them."""
        self.network.load_state_dict(weights)


def _tensors(inputs: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {
        name: torch.as_tensor(values.astype(np.int64) if name.endswith("_categories") else values)
        for name, values in inputs.items()
    }


def _main(told: dict[str, Any]) -> None:
    torch.set_num_threads(told["threads"])
    train_and_save(PeerTft(told["library"], Budget(**told.get("budget", {})), told["seed"]), told)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    _main(json.loads(sys.argv[1]))
