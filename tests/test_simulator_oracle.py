"""The oracle of the planted edge: its arithmetic where a formula exists, its law against the market's own bars."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from perpcast.config import load_settings
from perpcast.exit_policy import ExitPolicy, label_sides
from perpcast.market import SIDES, Side
from perpcast.simulator.oracle import oracle_returns
from perpcast.simulator.synthetic import START_MS, SyntheticMarket, season

ROOT = Path(__file__).parents[1]
STEP_MS = 900_000
SETTINGS = load_settings([ROOT / "config.yaml", ROOT / "config.demo.yaml"])
POLICIES = {side: ExitPolicy.from_config(SETTINGS.risk_profile, SETTINGS.fees, side) for side in SIDES}
# Nothing is ever reached, nothing is paid: the label is the price change over the horizon.
OPEN_END = ExitPolicy(0.9, 9.0, (), (), 16, 0.0, 0.0, 0.0)


@cache
def market(edge: float) -> SyntheticMarket:
    return SyntheticMarket(5, edge, START_MS + 700 * 86_400_000)


def test_without_exits_the_oracle_expects_the_drift_that_the_pressure_leaves() -> None:
    """E[label] = sum over k of edge x pressure x 0.5^((k-1)/32) x E[volatility k bars on], for 16 bars.

    Four swings of log volatility fade by their persistence and stray by deviation^2 x (1 - persistence^2k); the mean of
    a log-normal factor is exp(half of that variance).
    """
    symbol, bars, ahead = "ADAUSDT", np.array([20_000, 30_007, 40_200]), np.arange(1, 17)
    state, times = market(0.1).hidden_state(symbol), market(0.1).candles(symbol).open_time_ms
    deviation, persistence = np.array([[0.30, 0.25, 0.15, 0.25], [0.9995, 0.98, 0.999, 0.95]])[:, :, None]
    strays = (deviation**2 * (1 - persistence ** (2 * ahead))).sum(axis=0)
    means = []
    for bar in bars:
        fading = (state.swings[bar][:, None] * persistence**ahead).sum(axis=0)
        volatility = np.exp(fading + season(times[bar] + STEP_MS * ahead) + strays / 2) * state.typical_volatility
        means.append(np.sum(0.1 * state.pressure[bar] * 0.5 ** ((ahead - 1) / 32) * volatility))
    found = oracle_returns(market(0.1), symbol, bars, {"buy": OPEN_END, "sell": OPEN_END}, paths=4000, seed=1)
    assert np.abs(means).min() > 0.001
    # Jumps, which are symmetric in logarithms, add about 16 x 0.002 x (4 x sqrt 2 x 0.0035)^2 / 2 = 0.00001.
    assert found["buy"] == pytest.approx(means, rel=0.03, abs=0.00005)
    assert found["sell"] == pytest.approx(-found["buy"], abs=1e-12)


def test_state_is_what_the_candles_were_made_of() -> None:
    """The bars' own moves, in units of the volatility that the state says, have the deviation of moves with jumps."""
    state, series = market(0.0).hidden_state("DOTUSDT"), market(0.0).candles("DOTUSDT")
    volatility = state.typical_volatility * np.exp(state.swings.sum(axis=1) + season(series.open_time_ms))
    moves = np.log(series.close / series.open) / volatility
    # Variance 1, and jumps of variance 2 x 4^2 at one in 480 bars: 1.067.
    assert np.std(moves) == pytest.approx(1.067**0.5, rel=0.02)
    blocks = np.abs(moves[: len(moves) // 2000 * 2000]).reshape(-1, 2000).mean(axis=1)
    assert np.std(blocks) < 0.03  # 0.16 in units of their own deviation: three weeks are twice as wild as others


@pytest.mark.parametrize("edge", [0.0, 0.15])
def test_oracle_expects_what_trades_earn(edge: float) -> None:
    """Realised labels of windows far apart: the oracle's mean is theirs, and so, with an edge, is its slope."""
    realised: dict[Side, list[np.ndarray]] = {side: [] for side in SIDES}
    expected: dict[Side, list[np.ndarray]] = {side: [] for side in SIDES}
    for number, symbol in enumerate(("BTCUSDT", "ADAUSDT", "XRPUSDT", "DOTUSDT")):
        series = market(edge).candles(symbol)
        bars = np.arange(400 + 50 * number, len(series) - 101, 211)
        labels = label_sides(series.open, series.high, series.low, series.close, POLICIES, ambiguous=False)
        for side, means in oracle_returns(market(edge), symbol, bars, POLICIES, paths=500, seed=1).items():
            realised[side].append(labels[side].expected_return[bars])
            expected[side].append(means)
    came = {side: np.concatenate(parts) for side, parts in realised.items()}
    said = {side: np.concatenate(parts) for side, parts in expected.items()}
    # Common moves cancel in the mean of both sides, which deviates by 0.6 %: 0.00017 is the standard error of 1,265.
    both = np.mean([came[side] - said[side] for side in SIDES], axis=0)
    assert abs(both.mean()) < 4 * both.std() / len(both) ** 0.5
    if edge:
        slope = np.polyfit(said["buy"] - said["sell"], came["buy"] - came["sell"], 1)[0]
        # The labels' difference deviates by 2.8 %, the oracle's by 1.24 %: the slope's standard error is 0.063.
        assert slope == pytest.approx(1.0, abs=0.2)


def test_oracle_is_a_function_of_seed_and_state_alone() -> None:
    bars = np.array([500, 9_000, 31_000])
    whole = oracle_returns(market(0.1), "BTCUSDT", bars, POLICIES, paths=100, seed=1)
    alone = oracle_returns(market(0.1), "BTCUSDT", bars[1:2], POLICIES, paths=100, seed=1)
    other = oracle_returns(market(0.1), "BTCUSDT", bars, POLICIES, paths=100, seed=2)
    for side in SIDES:
        assert whole[side][1] == alone[side][0]
        assert not np.array_equal(whole[side], other[side])


def test_what_the_paths_leave_to_chance_does_not_reorder_windows() -> None:
    bars = np.arange(1_000, 60_000, 1_999)
    few, many = (
        oracle_returns(market(0.1), "ADAUSDT", bars, POLICIES, paths=paths, seed=paths)["buy"] for paths in (500, 4000)
    )
    assert np.corrcoef(few, many)[0, 1] > 0.97


def test_oracle_without_an_edge_knows_nothing_of_the_pressure() -> None:
    bars = np.arange(1_000, 60_000, 1_999)
    expected = oracle_returns(market(0.0), "ADAUSDT", bars, POLICIES, paths=200, seed=1)
    assert abs(np.corrcoef(expected["buy"], market(0.0).pressure("ADAUSDT")[bars])[0, 1]) < 0.5
    # Every trade earns minus its costs, 0.1 to 0.15 %, and what the pessimistic order of a bar's extremes takes.
    assert -0.004 < np.min(expected["buy"]) < np.max(expected["buy"]) < 0


@pytest.mark.parametrize("paths", [0, 1, 501])
def test_paths_without_their_mirror_images_are_refused(paths: int) -> None:
    with pytest.raises(ValueError, match="even number"):
        oracle_returns(market(0.0), "BTCUSDT", np.array([500]), POLICIES, paths=paths, seed=1)
