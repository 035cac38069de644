"""The settings: every tunable once, validated on load; below the scripts only plain values are passed on.

Read from `config.yaml`, then from any overlay on top of it, key by key (`--demo` is such an overlay). Secrets are not
here: they come from the environment or `.env`.
"""

from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from perpcast.errors import ConfigError
from perpcast.timeframe import INTERVAL_MINUTES, parse_time

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(gt=0)]


class Section(BaseModel):
    """A part of the configuration: frozen, and closed to keys that it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DatabaseSettings(Section):
    """Where PostgreSQL listens, and where the embedded server keeps its data if none does."""

    host: str
    port: Annotated[int, Field(ge=1, le=65535)]
    name: str
    user: str
    directory: Path


class ExchangeSettings(Section):
    """Which Bybit; the two URLs override the environment's own hosts."""

    environment: Literal["mainnet", "testnet", "demo", "local"]
    rest_url: str | None = None
    ws_url: str | None = None

    @model_validator(mode="after")
    def _local_needs_urls(self) -> "ExchangeSettings":
        if self.environment == "local" and not (self.rest_url and self.ws_url):
            raise ValueError("environment 'local' needs both rest_url and ws_url")
        return self


class DownloadSettings(Section):
    """Which candles are wanted."""

    interval: str
    days: Positive
    symbols: Annotated[tuple[str, ...], Field(min_length=1)]
    universe_as_of: str

    @field_validator("interval")
    @classmethod
    def _known_interval(cls, interval: str) -> str:
        if interval not in INTERVAL_MINUTES:
            raise ValueError(f"must be one of {', '.join(INTERVAL_MINUTES)}")
        return interval

    @field_validator("symbols")
    @classmethod
    def _distinct_symbols(cls, symbols: tuple[str, ...]) -> tuple[str, ...]:
        return _checked_symbols(symbols)


def symbols_from_text(text: str) -> tuple[str, ...]:
    """Symbols from a command line, separated by commas. Raises ConfigError for what cannot be one."""
    try:
        return _checked_symbols(tuple(part.strip() for part in text.split(",")))
    except ValueError as error:
        raise ConfigError(f"--symbols: {error}") from None


def _checked_symbols(symbols: tuple[str, ...]) -> tuple[str, ...]:
    for symbol in symbols:
        if not (symbol.isascii() and symbol.isalnum() and symbol.isupper() and symbol.endswith("USDT")):
            raise ValueError(f"{symbol!r} is not a USDT perpetual: expected a name such as BTCUSDT")
    twice = sorted({symbol for symbol in symbols if symbols.count(symbol) > 1})
    if twice:
        raise ValueError(f"listed twice: {', '.join(twice)}")
    return symbols


class PartialClose(Section):
    """One target of the exit policy: at `target_pct` percent in favour, `close_fraction` of the entry size is closed
    and the stop moves to `stop_pct` percent in favour (0 is breakeven)."""

    target_pct: Annotated[Decimal, Field(gt=0)]
    close_fraction: Annotated[Decimal, Field(gt=0, le=1)]
    stop_pct: Annotated[Decimal, Field(ge=0)]


class RiskProfile(Section):
    """The trade: stops and targets as multiples of the entry price, partial closes, leverage."""

    leverage: Annotated[int, Field(ge=1, le=100)]
    stop_loss_pct_buy: Annotated[Decimal, Field(gt=0)]
    take_profit_pct_buy: Annotated[Decimal, Field(gt=0)]
    stop_loss_pct_sell: Annotated[Decimal, Field(gt=0)]
    take_profit_pct_sell: Annotated[Decimal, Field(gt=0)]
    partial_closes: tuple[PartialClose, ...]

    @model_validator(mode="after")
    def _possible_trade(self) -> "RiskProfile":
        one = Decimal(1)
        if not self.stop_loss_pct_buy < one:
            raise ValueError(f"stop_loss_pct_buy must lie below 1 (a buy loses downwards), is {self.stop_loss_pct_buy}")
        if not self.stop_loss_pct_sell > one:
            raise ValueError(
                f"stop_loss_pct_sell must lie above 1 (a sell loses upwards), is {self.stop_loss_pct_sell}"
            )
        if not self.take_profit_pct_buy > one:
            raise ValueError(f"take_profit_pct_buy must lie above 1, is {self.take_profit_pct_buy}")
        if not self.take_profit_pct_sell < one:
            raise ValueError(f"take_profit_pct_sell must lie below 1, is {self.take_profit_pct_sell}")
        total = sum((close.close_fraction for close in self.partial_closes), Decimal(0))
        if total > one:
            raise ValueError(f"the close_fraction values of partial_closes add up to {total}, more than 1")
        farthest = min(self.take_profit_pct_buy - one, one - self.take_profit_pct_sell) * 100
        previous = Decimal(0)
        for number, close in enumerate(self.partial_closes, 1):
            if not previous < close.target_pct < farthest:
                raise ValueError(
                    f"target_pct of partial close {number} must lie between {previous} and {farthest} "
                    f"(targets rise up to the take profit), is {close.target_pct}"
                )
            if not close.stop_pct < close.target_pct:
                raise ValueError(f"stop_pct of partial close {number} must lie below its target_pct {close.target_pct}")
            previous = close.target_pct
        return self


class FeeSettings(Section):
    """Costs as fractions of the traded value."""

    taker: Annotated[Decimal, Field(ge=0, lt=Decimal("0.1"))]
    maker: Annotated[Decimal, Field(gt=Decimal("-0.1"), lt=Decimal("0.1"))]
    slippage: Annotated[Decimal, Field(ge=0, lt=Decimal("0.1"))]


class CapitalSettings(Section):
    """How much is traded: margin per trade is `per_trade_percentage` of equity, notional is margin x leverage."""

    initial: Annotated[float, Field(gt=0)]
    per_trade_percentage: Annotated[float, Field(gt=0, le=100)]
    max_positions: Positive
    max_drawdown_percentage: Annotated[float, Field(gt=0, le=100)]


class DatasetSettings(Section):
    """How the span of the candles is cut in time: train | V1 | V2 | test, with a purge between each two."""

    train_fraction: Fraction
    stop_fraction: Fraction
    threshold_fraction: Fraction
    test_fraction: Fraction
    max_gap_bars: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _whole_span(self) -> "DatasetSettings":
        parts = (self.train_fraction, self.stop_fraction, self.threshold_fraction, self.test_fraction)
        if abs(sum(parts) - 1) > 1e-9:
            raise ValueError(f"the four fractions must add up to 1, they add up to {sum(parts):.10g}")
        if min(parts) == 0:
            raise ValueError("every one of the four fractions must be larger than 0")
        return self


class ModelSettings(Section):
    """The network and its training."""

    architecture: Literal["tft"]
    sequence_length: Annotated[int, Field(ge=2, le=1000)]
    prediction_horizon: Annotated[int, Field(ge=1, le=10_000)]
    d_model: Positive
    num_heads: Positive
    variable_selection: Literal["fused", "stacked"]
    vsn_rank: Positive | None
    dropout: Annotated[float, Field(ge=0, lt=1)]
    batch_size: Positive
    batch_size_gpu: Positive
    epochs: Positive
    samples_per_epoch: Positive | None
    window_stride: Positive
    learning_rate: Annotated[float, Field(gt=0)]
    warm_up_share: Annotated[float, Field(ge=0, lt=1)]
    gradient_clip_norm: Annotated[float, Field(gt=0)]
    early_stopping_patience: Positive
    class_weighting: Literal["none", "balanced"]
    sample_weighting: Literal["none", "uniqueness"]
    xla: bool
    precision: Literal["float32", "mixed_bfloat16"]
    pictures_every: Positive
    seed: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _heads_divide_width(self) -> "ModelSettings":
        if self.d_model % self.num_heads:
            raise ValueError(f"d_model {self.d_model} must be a multiple of num_heads {self.num_heads}")
        return self


class VastSettings(Section):
    """The machine with a GPU that a training is sent to: one of the user's own, else one that is rented for it."""

    host: Annotated[str, Field(pattern=r"^[^\s@]+@[^\s@]+$")] | None
    folder: str
    setup: str
    device: Literal["gpu", "cpu"]
    gpu_name: str
    min_cuda: Annotated[float, Field(gt=0)]
    min_reliability: Fraction
    max_price: Annotated[float, Field(gt=0)]
    disk_gb: Positive
    image: str
    max_cost: Annotated[float, Field(gt=0)]
    max_hours: Annotated[float, Field(gt=0)]
    start_minutes: Annotated[float, Field(gt=0)]
    lost_minutes: Annotated[float, Field(gt=0)]
    fetch_minutes: Annotated[float, Field(gt=0)]

    @field_validator("folder")
    @classmethod
    def _is_absolute(cls, folder: str) -> str:
        # Its contents are made equal to the clone's: it must be a folder of our own.
        if not folder.startswith("/") or folder.rstrip("/").count("/") < 2:
            raise ValueError("must be an absolute path of at least two parts, as /workspace/perpcast")
        return folder


class DemoSettings(Section):
    """The market of `run_futures_pipeline.py --demo`."""

    market_seed: Annotated[int, Field(ge=0)]
    planted_edge: Annotated[float, Field(ge=0)]
    now: str
    speed: Annotated[float, Field(gt=0)]
    replay_bars: Positive

    @field_validator("now")
    @classmethod
    def _is_time(cls, now: str) -> str:
        parse_time(now)
        return now


class Settings(Section):
    """The whole configuration, and the files that it came from; relative paths start at the folder of the first."""

    database: DatabaseSettings
    exchange: ExchangeSettings
    data_download: DownloadSettings
    risk_profile: RiskProfile
    fees: FeeSettings
    capital: CapitalSettings
    dataset: DatasetSettings
    model: ModelSettings
    vast: VastSettings
    demo: DemoSettings
    files: tuple[Path, ...] = Field(exclude=True)

    def path(self, *parts: str | Path) -> Path:
        """A path below the folder of the first file, unless it is absolute already."""
        return self.files[0].parent.joinpath(*parts)


def load_settings(paths: Sequence[Path]) -> Settings:
    """The settings from `config.yaml` and the overlays after it. Raises ConfigError with the path of the key."""
    merged: dict[str, Any] = {}
    for path in paths:
        merged = _overlay(merged, _read_yaml(path))
    names = ", ".join(str(path) for path in paths)
    try:
        return Settings(**merged, files=tuple(Path(path).resolve() for path in paths))
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(item, names) for item in error.errors()[:5])) from None
    except TypeError:
        raise ConfigError(f"{names}: 'files' is not a key of the configuration: remove it") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"configuration {path} cannot be read: {error.strerror}; name it with --config") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration {path} is not valid YAML: {' '.join(str(error).split())}") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise ConfigError(f"configuration {path}: expected sections (name: values), received {type(values).__name__}")
    return values


def _overlay(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` wins, key by key; a list is replaced as a whole."""
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _overlay(merged[key], value) if both else value
    return merged


def _explain(item: Any, names: str) -> str:
    """One line for one mistake: where, what was expected, what was found."""
    where = ".".join(str(part) for part in item["loc"]) or "configuration"
    if item["type"] == "extra_forbidden":
        return f"{names}: unknown key {where}: remove it or check its spelling"
    if item["type"] == "missing":
        return f"{names}: {where} is missing"
    message = item["msg"].removeprefix("Value error, ")
    found = "" if isinstance(item["input"], Mapping | BaseModel) else f", received {item['input']!r}"
    return f"{names}: {where}: {message}{found}"
