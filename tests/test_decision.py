"""Decisions: the order of candidates, one position per symbol, no more than are allowed; drawn signals beside."""

from collections.abc import Callable
from dataclasses import replace
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perpcast.decision import Refused, Taken, decide, ranked, signals_from_returns
from perpcast.errors import ConfigError
from perpcast.exit_policy import ExitPolicy
from perpcast.live.forecast import check_model
from perpcast.market import SIDES, Side, Signal
from perpcast.outputs import OutputReading
from perpcast.task import Target
from tests.model_world import HORIZON, TASK

ONE = Decimal(1)


def always(signal: Signal) -> Decimal | str:
    return ONE


def signal(symbol: str, side: Side, score: float) -> Signal:
    return Signal(symbol, 0, side, score, "model")


def outcome(
    signals: list[Signal],
    *,
    threshold: float = 0.0,
    occupied: tuple[str, ...] = (),
    max_positions: int = 5,
    size: Callable[[Signal], Decimal | str] = always,
    halted: str = "",
) -> list[tuple[str, str, str]]:
    decisions = decide(
        signals, threshold=threshold, occupied=occupied, max_positions=max_positions, size=size, halted=halted
    )
    return [(d.signal.symbol, d.signal.side, "taken" if isinstance(d, Taken) else d.reason) for d in decisions]


def test_signals_carry_expected_funding_by_side() -> None:
    predicted = {"buy_mean": np.array([0.002, 0.001]), "sell_mean": np.array([0.003, -0.001])}
    signals = signals_from_returns(predicted, ["A", "B"], 900_000, "m", {"A": 0.0005})
    # Positive funding: a long pays 0.0005, a short receives it.
    assert [(s.symbol, s.side) for s in signals] == [("A", "buy"), ("A", "sell"), ("B", "buy"), ("B", "sell")]
    assert [s.score for s in signals] == pytest.approx([0.0015, 0.0035, 0.001, -0.001])
    assert {(s.open_time_ms, s.source) for s in signals} == {(900_000, "m")}


POLICY = ExitPolicy(0.011, 0.058, ((0.012, 0.2), (0.024, 0.3), (0.035, 0.3)), (0.0, 0.012, 0.024), 20, 5e-4, 2e-4, 2e-4)
CLASSIFIER = replace(
    TASK,
    targets=tuple(Target(side, "classification", HORIZON) for side in SIDES),
    exit_policies={side: POLICY.to_json() for side in SIDES},
)


def test_probabilities_are_traded_by_the_return_that_they_imply() -> None:
    """Wins of 3 % and losses of 1 % in training: at 3/4 a buy is worth 2 %, at 1/4 it earns nothing."""
    reading = OutputReading.fit(CLASSIFIER, np.array([[0.03, 0.01], [-0.01, -0.02]]))
    logits = np.log([[3.0, 1.0], [1 / 3, 3.0]])
    signals = signals_from_returns(reading.read(logits), ["A", "B"], 0, "m", {"A": 0.001})
    # Sells win 1 and lose 2 %: -0.5 % at 1/2, plus the funding that A's short receives; 0.25 % at 3/4.
    assert [s.score for s in signals] == pytest.approx([0.02 - 0.001, -0.005 + 0.001, 0.0, 0.0025], abs=1e-8)
    assert outcome(signals, threshold=0.001) == [
        ("A", "buy", "taken"),
        ("B", "sell", "taken"),
        ("B", "buy", "not above the threshold"),
        ("A", "sell", "not above the threshold"),
    ]


def test_check_model_asks_for_an_expected_return_of_every_side_and_for_no_kind_of_model() -> None:
    policies: dict[Side, ExitPolicy] = dict.fromkeys(SIDES, POLICY)

    def check(**changes: Any) -> None:
        bundle: Any = SimpleNamespace(task=replace(CLASSIFIER, **changes))
        check_model(bundle, "15", policies)

    check()
    check(targets=TASK.targets)
    with pytest.raises(ConfigError, match="does not predict sell_mean, only buy_profit_probability, buy_mean"):
        check(targets=CLASSIFIER.targets[:1])
    wider = {**CLASSIFIER.exit_policies, "buy": replace(POLICY, stop=0.02).to_json()}
    with pytest.raises(ConfigError, match=r"another buy trade .* \(stop 0.02 against 0.011\)"):
        check(exit_policies=wider)
    with pytest.raises(ConfigError, match="interval is 15, the model was trained on 5"):
        check(interval="5")


def test_rank_is_score_then_symbol_then_buy_before_sell() -> None:
    best, a_buy, a_sell, b_buy, unknown = (
        signal("Z", "sell", 0.5),
        signal("A", "buy", 0.1),
        signal("A", "sell", 0.1),
        signal("B", "buy", 0.1),
        signal("A", "buy", np.nan),
    )
    assert ranked([unknown, b_buy, a_sell, a_buy, best]) == [best, a_buy, a_sell, b_buy, unknown]


def test_the_threshold_itself_is_not_above_it() -> None:
    assert outcome([signal("A", "buy", 0.01)], threshold=0.01) == [("A", "buy", "not above the threshold")]
    assert outcome([signal("A", "buy", np.nextafter(0.01, 1))], threshold=0.01) == [("A", "buy", "taken")]


def test_one_position_per_symbol_and_no_flip() -> None:
    signals = [signal("A", "buy", 0.03), signal("A", "sell", 0.04), signal("B", "sell", 0.02)]
    assert outcome(signals, occupied=("B",)) == [
        ("A", "sell", "taken"),
        ("A", "buy", "the other side ranks higher"),
        ("B", "sell", "position open"),
    ]


def test_places_go_to_the_best_and_open_positions_count() -> None:
    signals = [signal(symbol, "buy", score) for symbol, score in (("A", 0.1), ("B", 0.3), ("C", 0.2))]
    assert outcome(signals, occupied=("X",), max_positions=2) == [
        ("B", "buy", "taken"),
        ("C", "buy", "max_positions reached"),
        ("A", "buy", "max_positions reached"),
    ]


def test_a_signal_without_a_size_leaves_its_place_to_the_next() -> None:
    signals = [signal("A", "buy", 0.2), signal("B", "buy", 0.1)]
    sizes: dict[str, Decimal | str] = {"A": "too small", "B": Decimal(3)}
    assert outcome(signals, max_positions=1, size=lambda s: sizes[s.symbol]) == [
        ("A", "buy", "too small"),
        ("B", "buy", "taken"),
    ]


def test_halted_refuses_every_entry_but_names_simpler_reasons_first() -> None:
    signals = [signal("A", "buy", 0.2), signal("B", "buy", -0.1)]
    assert outcome(signals, halted="drawdown") == [("A", "buy", "drawdown"), ("B", "buy", "not above the threshold")]


def test_a_score_that_is_not_a_number_is_refused() -> None:
    assert outcome([signal("A", "buy", np.nan)], threshold=-1.0) == [("A", "buy", "score is not a number")]


drawn = st.lists(
    st.builds(
        signal,
        st.sampled_from("ABCDEF"),
        st.sampled_from(["buy", "sell"]),
        st.sampled_from([-0.1, 0.0, 0.1, 0.2, np.nan]),
    ),
    unique_by=lambda s: (s.symbol, s.side),
)


@given(drawn, st.permutations(range(12)), st.sets(st.sampled_from("ABCDEF")), st.integers(1, 6))
def test_every_signal_is_answered_once_whatever_its_place(
    signals: list[Signal], shuffle: list[int], occupied: set[str], max_positions: int
) -> None:
    def run(order: list[Signal]) -> list[Taken | Refused]:
        return decide(order, threshold=0.0, occupied=occupied, max_positions=max_positions, size=always)

    decisions = run(signals)
    taken = [d.signal for d in decisions if isinstance(d, Taken)]
    assert len(decisions) == len(signals)
    assert len({s.symbol for s in taken} | occupied) == len(taken) + len(occupied)
    assert len(taken) + len(occupied) <= max(max_positions, len(occupied))
    assert all(s.score > 0 for s in taken)
    # Nobody better was passed over without a reason of its own.
    for refused in (d for d in decisions if isinstance(d, Refused) and d.reason == "max_positions reached"):
        assert all(s.score >= refused.signal.score for s in taken)
    order = [signals[place] for place in shuffle if place < len(signals)]
    assert repr(run(order)) == repr(decisions)
