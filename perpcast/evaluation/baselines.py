"""What a forecast has to beat: two trivial ones, fitted on training rows only and scored on the very same windows."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np


class Baseline(Protocol):
    """A cheap forecast. `last_change` is the signal bar's own price change (close / close before - 1) [n]."""

    @property
    def name(self) -> str:
        """What tables call it."""
        ...

    def predict(self, last_change: np.ndarray) -> dict[str, np.ndarray]:
        """Expected return by side, float64 [n]."""
        ...


@dataclass(frozen=True)
class Constant:
    """Every trade earns what the average training trade earned."""

    means: Mapping[str, float]
    name: str = "constant"

    @classmethod
    def fit(cls, realised: Mapping[str, np.ndarray]) -> "Constant":
        """From the training rows' realised returns by side."""
        return cls({side: float(np.mean(values)) for side, values in realised.items()})

    def predict(self, last_change: np.ndarray) -> dict[str, np.ndarray]:
        """The training mean of each side, everywhere."""
        return {side: np.full(len(last_change), mean) for side, mean in self.means.items()}


@dataclass(frozen=True)
class LastSign:
    """Every trade earns what the average training trade earned after a bar of the same sign."""

    means: Mapping[str, tuple[float, float, float]]  # after a fall, no change, a rise
    name: str = "last sign"

    @classmethod
    def fit(cls, realised: Mapping[str, np.ndarray], last_change: np.ndarray) -> "LastSign":
        """From the training rows; a sign that never occurred takes the mean of all."""
        signs = np.sign(last_change)

        def mean_after(values: np.ndarray, sign: int) -> float:
            rows = signs == sign
            return float(np.mean(values[rows])) if rows.any() else float(np.mean(values))

        return cls(
            {
                side: (mean_after(values, -1), mean_after(values, 0), mean_after(values, 1))
                for side, values in realised.items()
            }
        )

    def predict(self, last_change: np.ndarray) -> dict[str, np.ndarray]:
        """The training mean after that sign."""
        cell = np.sign(last_change).astype(int) + 1
        return {side: np.array(means)[cell] for side, means in self.means.items()}
