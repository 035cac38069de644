"""What a network looked at: the weight of each variable in each bar, and the weight of each bar of a window."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Explanation:
    """The weights inside the network for n windows of T bars, oldest bar first; each row of weights sums to 1.

    Raises ValueError where the shapes do not agree, or where there is no window to explain.
    """

    variables: tuple[str, ...]  # V names, observed ones first, then the known ones
    selection: np.ndarray  # float32 [n, T, V]
    attention: np.ndarray  # float32 [n, T], of the newest bar on all of them

    def __post_init__(self) -> None:
        expected = (*self.attention.shape, len(self.variables))
        if self.attention.ndim != 2 or self.selection.shape != expected:
            raise ValueError(
                f"selection must be [n, T, {len(self.variables)} variables] and attention [n, T], "
                f"received {self.selection.shape} and {self.attention.shape}"
            )
        if not self.selection.size:
            raise ValueError(f"there is nothing to explain: received weights of shape {self.selection.shape}")

    def __len__(self) -> int:
        return len(self.attention)

    @classmethod
    def concatenated(cls, parts: "Sequence[Explanation]") -> "Explanation":
        """The windows of all parts, in the order given. Raises ValueError where they are of different variables."""
        if len({part.variables for part in parts}) != 1:
            raise ValueError("only explanations of the same variables can be put together")
        selection, attention = ([getattr(part, name) for part in parts] for name in ("selection", "attention"))
        return cls(parts[0].variables, np.concatenate(selection), np.concatenate(attention))

    def importance(self) -> np.ndarray:
        """Mean weight of each variable over windows and bars: float64 [V], sums to 1."""
        return self.selection.mean(axis=(0, 1), dtype=np.float64)

    def by_lag(self) -> np.ndarray:
        """Mean attention on each bar of a window, oldest first: float64 [T], sums to 1."""
        return self.attention.mean(axis=0, dtype=np.float64)

    def newest(self, n: int) -> list[list[tuple[str, float]]]:
        """For each window the `n` variables that weigh most in its newest bar, the signal bar, strongest first."""
        newest = self.selection[:, -1]
        order = np.argsort(-newest, axis=1, kind="stable")[:, :n]
        return [
            [(self.variables[number], float(weights[number])) for number in strongest]
            for strongest, weights in zip(order, newest, strict=True)
        ]
