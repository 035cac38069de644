"""The scaler: mean 0 and deviation 1 for every model input, by numbers from training rows alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_BLOCK_ROWS = 1 << 16


@dataclass(frozen=True)
class Scaler:
    """`apply` and `invert` are a pair: (x - mean) / deviation, column by column."""

    columns: tuple[str, ...]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    @classmethod
    def fit(cls, inputs: np.ndarray, columns: Sequence[str]) -> "Scaler":
        """Mean and population deviation of each column of [n, columns]; NaN is left out, in float64, block by block.

        Hand in training rows only: a scaler that has seen later rows leaks them. A column without any spread (or
        without any value) keeps deviation 1. Raises ValueError for rows that have another number of columns.
        """
        if inputs.ndim != 2 or inputs.shape[1] != len(columns):
            raise ValueError(f"inputs must be [n, {len(columns)}], received {list(inputs.shape)}")
        blocks = [inputs[first : first + _BLOCK_ROWS] for first in range(0, len(inputs), _BLOCK_ROWS)]
        counts = sum((np.isfinite(block).sum(axis=0) for block in blocks), np.zeros(len(columns), np.int64))
        counts = np.maximum(counts, 1)
        mean = sum((_finite_sum(block, 0.0, 1) for block in blocks), np.zeros(len(columns))) / counts
        variance = sum((_finite_sum(block, mean, 2) for block in blocks), np.zeros(len(columns))) / counts
        deviation = np.sqrt(variance)
        # A constant column has the rounding error of its mean as deviation.
        deviation[deviation <= 1e-12 * np.maximum(np.abs(mean), 1e-300)] = 1.0
        return cls(tuple(columns), tuple(mean.tolist()), tuple(deviation.tolist()))

    def apply(self, inputs: np.ndarray) -> np.ndarray:
        """Scaled inputs, float32 [..., columns]; NaN stays NaN."""
        return ((inputs - np.array(self.mean)) / np.array(self.deviation)).astype(np.float32)

    def invert(self, scaled: np.ndarray) -> np.ndarray:
        """The inverse of `apply`, float32 [..., columns]."""
        return (scaled * np.array(self.deviation) + np.array(self.mean)).astype(np.float32)

    def to_json(self) -> dict[str, Any]:
        """Plain lists, exact to the last bit; `from_json` is the inverse."""
        return {"columns": list(self.columns), "mean": list(self.mean), "deviation": list(self.deviation)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Scaler":
        """The scaler from its JSON form. Raises KeyError where a field is missing."""
        return cls(tuple(data["columns"]), tuple(data["mean"]), tuple(data["deviation"]))


def _finite_sum(block: np.ndarray, centre: np.ndarray | float, power: int) -> np.ndarray:
    return np.nansum(np.where(np.isfinite(block), block - centre, np.nan).astype(np.float64) ** power, axis=0)
