"""The forecasting problem as a frozen value: what goes in, what comes out, how far ahead; kept with the weights."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Target:
    """One thing to predict: a column of the labels, its kind, and how many bars its outcome may take."""

    name: str  # "buy", "sell"
    kind: Literal["regression", "classification"]
    horizon: int
    quantiles: tuple[float, ...] = ()

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what a reader is told of this target, in order: `buy_mean`, `buy_q50`, …

        Every kind tells a `_mean`, the expected net return: decisions need no more.
        """
        if self.kind == "classification":
            return (f"{self.name}_profit_probability", f"{self.name}_mean")
        return (f"{self.name}_mean", *(f"{self.name}_q{round(q * 100)}" for q in self.quantiles))

    @property
    def columns(self) -> int:
        """Columns of the network for this target: the logit of a profit; or a mean, then the quantiles."""
        return 1 if self.kind == "classification" else 1 + len(self.quantiles)


@dataclass(frozen=True)
class Task:
    """Everything that training, bundle and runner must agree on; equal tasks mean interchangeable data.

    `exit_policies` holds the fields of the exit policy per side, as plain numbers, so that a bundle explains by which
    rule its labels were made.
    """

    interval: str
    lookback: int
    feature_set: str  # name and version, e.g. "candles_49/1"
    static: tuple[str, ...]
    known: tuple[str, ...]
    observed: tuple[str, ...]
    targets: tuple[Target, ...]
    exit_policies: Mapping[str, Mapping[str, Any]]
    symbols: tuple[str, ...]

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the model's outputs in order, over all targets: what `OutputReading.read` answers."""
        return tuple(name for target in self.targets for name in target.outputs)

    @property
    def horizon(self) -> int:
        """The longest horizon of any target, in bars."""
        return max(target.horizon for target in self.targets)

    def to_json(self) -> dict[str, Any]:
        """Plain lists, dicts and numbers; the inverse of `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Task":
        """The task from its JSON form. Raises KeyError or TypeError where a field is missing or unknown."""
        values = dict(data)
        targets = tuple(Target(**{**t, "quantiles": tuple(t["quantiles"])}) for t in values.pop("targets"))
        for name in ("static", "known", "observed", "symbols"):
            values[name] = tuple(values[name])
        return cls(targets=targets, **values)
