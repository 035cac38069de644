"""The oracle of the synthetic market: what a trade earns on average, for who knows the state of the generator.

No forecast can rank trades better than E[label | state], so its score on the same windows is what there is to attain.
The expectation is taken over simulated futures: from the signal bar on, the generator's own law makes the bars of a
label, and the label kernel says what the trade earned.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numba import njit

from perpcast.exit_policy import ExitPolicy, label_sides
from perpcast.market import Side
from perpcast.simulator.market import BASE_MS
from perpcast.simulator.synthetic import (
    COMMON_JUMPS,
    COMMON_SWINGS,
    JUMP_SIZE,
    JUMPS_PER_BAR,
    OWN_SWINGS,
    PRESSURE_PERSISTENCE,
    SyntheticMarket,
    season,
)

# With 500, by the seed, what is found correlates with what is so to 0.95 to 0.99; with 1000 half as much is missing.
PATHS = 1000

_SWINGS = (*COMMON_SWINGS, *OWN_SWINGS)

_CACHED = os.access(Path(__file__).parent, os.W_OK)


def oracle_returns(
    market: SyntheticMarket,
    symbol: str,
    bars: np.ndarray,
    policies: Mapping[Side, ExitPolicy],
    *,
    paths: int = PATHS,
    seed: int,
) -> dict[Side, np.ndarray]:
    """E[label | state at the signal bar] of both sides, from so many futures: float64 [n] by side.

    `bars` [n] are rows of `market.candles(symbol)`; the state of a bar is that at its close, which is the entry. The
    same seed draws the same noise for every bar and every symbol, and every future comes with its mirror image, so that
    what is left to chance hardly changes the order of two windows. Prices are not rounded to ticks.
    """
    if paths < 2 or paths % 2:
        raise ValueError(f"paths must be an even number from 2 on, received {paths}")
    steps = max(policy.horizon for policy in policies.values()) + 1
    times, state = market.candles(symbol).open_time_ms, market.hidden_state(symbol)
    noise = _Noise.draw(paths, steps, np.random.default_rng(seed))
    ahead = np.arange(1, steps + 1)
    fading = np.array([swing.persistence for swing in _SWINGS])[:, None] ** ahead
    prices = np.full((4, paths, 1 + steps + 1), np.nan)  # the signal bar, the label's bars, a missing bar
    expected: dict[Side, np.ndarray] = {side: np.empty(len(bars)) for side in policies}
    for number, bar in enumerate(np.asarray(bars)):
        level = state.typical_volatility * np.exp(state.swings[bar] @ fading + season(times[bar] + BASE_MS * ahead))
        drift = market.edge * state.pressure[bar] * PRESSURE_PERSISTENCE ** (ahead - 1)
        _write_futures(prices, level, drift, market.edge, *noise.arrays)
        first, high, low, close = (column.ravel() for column in prices)
        labels = label_sides(first, high, low, close, policies, ambiguous=False)
        for side, outcome in labels.items():
            # A path is cut off from the next by its missing bar: of all its bars the first alone has a whole label.
            expected[side][number] = outcome.expected_return[:: prices.shape[2]].mean()
    return expected


@dataclass(frozen=True)
class _Noise:
    """What chance adds to the state on the way, float64 [paths, steps]; the second half mirrors the first."""

    volatility: np.ndarray  # factor
    pressure: np.ndarray  # before the bar
    move: np.ndarray  # in units of volatility, jumps included
    above: np.ndarray  # exponential draws for the extremes
    below: np.ndarray

    @property
    def arrays(self) -> tuple[np.ndarray, ...]:
        return self.volatility, self.pressure, self.move, self.above, self.below

    @classmethod
    def draw(cls, paths: int, steps: int, random: np.random.Generator) -> "_Noise":
        shape = (paths // 2, steps)
        swings = [s.deviation * _wandering(random.standard_normal(shape), s.persistence) for s in _SWINGS]
        volatility = np.exp(np.sum(swings, axis=0))
        pressure = _wandering(random.standard_normal(shape), PRESSURE_PERSISTENCE)
        known = np.zeros((len(pressure), 1))  # the first bar drifts by the pressure that the state holds
        pressure = np.hstack([known, pressure[:, :-1]])
        jumps = random.random(shape) < JUMPS_PER_BAR * (1 + COMMON_JUMPS)
        move = random.standard_normal(shape) + np.where(jumps, JUMP_SIZE * random.laplace(size=shape), 0.0)
        above, below = random.exponential(size=(2, *shape))
        return cls(
            np.vstack([volatility, volatility]),
            np.vstack([pressure, -pressure]),
            np.vstack([move, -move]),
            np.vstack([above, below]),
            np.vstack([below, above]),
        )


def _wandering(noise: np.ndarray, persistence: float) -> np.ndarray:
    """How far an AR(1) process of variance 1 has strayed from where it was headed, after 1, 2, … bars."""
    strayed, now = np.empty_like(noise), np.zeros(len(noise))
    for step in range(noise.shape[1]):
        now = persistence * now + np.sqrt(1 - persistence**2) * noise[:, step]
        strayed[:, step] = now
    return strayed


@njit(cache=_CACHED, error_model="numpy")
def _write_futures(
    prices: np.ndarray,
    level: np.ndarray,
    drift: np.ndarray,
    edge: float,
    volatility: np.ndarray,
    pressure: np.ndarray,
    move: np.ndarray,
    above: np.ndarray,
    below: np.ndarray,
) -> None:
    """Open, high, low, close of every path from a price of 1, behind the signal bar: what `SyntheticMarket` makes."""
    for path in range(len(move)):
        price = 1.0
        prices[:, path, 0] = price
        for step in range(len(level)):
            size = level[step] * volatility[path, step]
            change = size * (drift[step] + edge * pressure[path, step] + move[path, step]) - size * size / 2
            up = (change + np.sqrt(change * change + 2 * size * size * above[path, step])) / 2
            down = (change - np.sqrt(change * change + 2 * size * size * below[path, step])) / 2
            prices[0, path, step + 1] = price
            prices[1, path, step + 1] = price * np.exp(up)
            prices[2, path, step + 1] = price * np.exp(down)
            price *= np.exp(change)
            prices[3, path, step + 1] = price
