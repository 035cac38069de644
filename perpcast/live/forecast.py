"""From candles to forecasts: model inputs of a block of bars, and one batched prediction for each bar."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from perpcast.bundle import Bundle
from perpcast.errors import ConfigError, DataError
from perpcast.exit_policy import ExitPolicy
from perpcast.features.indicators import FEATURE_SET
from perpcast.features.inputs import KNOWN, OBSERVED, WARMUP_BARS, compute_inputs, known_inputs
from perpcast.market import CandleSeries, Side
from perpcast.timeframe import interval_ms


class Predictor(Protocol):
    """A model: unscaled inputs float32 [n, lookback, F] and [n, lookback, K] and n symbols to arrays [n] by name."""

    def predict(self, observed: np.ndarray, known: np.ndarray, symbols: Sequence[str]) -> dict[str, np.ndarray]:
        """The outputs of one batch."""
        ...


@dataclass(frozen=True)
class Forecast:
    """What the model says after one bar: outputs [symbols] by name, and why each other symbol has none."""

    open_time_ms: int
    symbols: tuple[str, ...]
    outputs: Mapping[str, np.ndarray]
    missing: Mapping[str, str]


class Forecaster:
    """Predicts bars; `inputs` makes observed inputs float32 [n, F] of n candles, `known` known ones [n, K] of n times.

    Features are computed once for a whole block of bars: each of their values depends on its own bar and those before
    it alone. The model itself is asked bar by bar, so that a batch never depends on what else had arrived.
    """

    def __init__(
        self,
        predictor: Predictor,
        inputs: Callable[[CandleSeries], np.ndarray],
        known: Callable[[np.ndarray], np.ndarray],
        *,
        lookback: int,
        step_ms: int,
    ) -> None:
        self._predictor, self._inputs, self._known = predictor, inputs, known
        self._lookback, self._step_ms = lookback, step_ms
        self._span_ms = (lookback - 1) * step_ms

    def forecast(
        self, histories: Mapping[str, CandleSeries], bars: Sequence[tuple[int, Sequence[str]]]
    ) -> list[Forecast]:
        """A forecast for each bar (its open time, the symbols that have it); `histories` reach at least to the last."""
        observed = {symbol: self._inputs(series) for symbol, series in histories.items() if len(series)}
        return [self._bar(histories, observed, open_time_ms, present) for open_time_ms, present in bars]

    def _bar(
        self,
        histories: Mapping[str, CandleSeries],
        observed: Mapping[str, np.ndarray],
        open_time_ms: int,
        present: Sequence[str],
    ) -> Forecast:
        missing = {symbol: "no candle" for symbol in histories if symbol not in present}
        windows = {}
        for symbol in present:
            times = histories[symbol].open_time_ms
            end = int(np.searchsorted(times, open_time_ms, side="right"))
            window = observed[symbol][max(0, end - self._lookback) : end]
            if len(window) < self._lookback:
                missing[symbol] = "history too short"
            elif times[end - 1] - times[end - self._lookback] != self._span_ms:
                missing[symbol] = "gap in the window"
            elif not np.isfinite(window).all():
                missing[symbol] = "model input unknown"
            else:
                windows[symbol] = window
        if not windows:
            return Forecast(open_time_ms, (), {}, missing)
        symbols = tuple(windows)
        calendar = self._known(np.arange(open_time_ms - self._span_ms, open_time_ms + 1, self._step_ms))
        known = np.repeat(calendar[None], len(symbols), axis=0)
        outputs = self._predictor.predict(np.stack(list(windows.values())), known, symbols)
        return Forecast(open_time_ms, symbols, outputs, missing)


def history_bars(bundle: Bundle) -> int:
    """Candles, the newest included, that the newest window's inputs depend on."""
    return WARMUP_BARS + bundle.task.lookback - 1


def bundle_forecaster(bundle: Bundle, max_gap_bars: int) -> Forecaster:
    """Forecasts by a model bundle, from candles as training derived its inputs. Raises DataError for other inputs."""
    task = bundle.task
    if (task.feature_set, task.observed, task.known) != (FEATURE_SET, OBSERVED, KNOWN):
        raise DataError(
            f"the model was trained on feature set {task.feature_set} with {len(task.observed)} + {len(task.known)} "
            f"inputs, this program makes {FEATURE_SET} with {len(OBSERVED)} + {len(KNOWN)}: train again"
        )
    return Forecaster(
        bundle,
        lambda candles: compute_inputs(candles.frame(), task.interval, max_gap_bars),
        known_inputs,
        lookback=task.lookback,
        step_ms=interval_ms(task.interval),
    )


def check_model(bundle: Bundle, interval: str, policies: Mapping[Side, ExitPolicy]) -> None:
    """Raises ConfigError where the model was made for other trades than the configuration's."""
    task = bundle.task
    if task.interval != interval:
        raise ConfigError(f"data_download.interval is {interval}, the model was trained on {task.interval}")
    for side, policy in policies.items():
        if f"{side}_mean" not in task.outputs:
            raise ConfigError(f"the model does not predict {side}_mean, only {', '.join(task.outputs)}: train again")
        trained = ExitPolicy(**task.exit_policies[side])
        if trained != policy:
            mine, its = policy.to_json(), trained.to_json()
            changed = ", ".join(f"{key} {its[key]} against {mine[key]}" for key in mine if mine[key] != its[key])
            raise ConfigError(
                f"the model was trained for another {side} trade than risk_profile and fees say now ({changed}): "
                "put them back, or prepare and train again"
            )
