"""The trader over whole markets: what positions earn, killed at every commit, in any blocks, with candles missing."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from perpcast.database.journal import PositionRecord
from perpcast.errors import DataError
from perpcast.exit_policy import EXIT_REASONS, label_trades
from perpcast.live.journal import SessionJournal, choose_session, sessions
from perpcast.market import SIDES, Candle, CandleSeries
from perpcast.sizing import Sizing
from perpcast.timeframe import to_ms
from tests.live_world import BEGIN, POLICY, SIZING, STEP, Exchange, KilledError, MemoryJournal, World, random_market

SYMBOLS = ("A", "B", "C", "D", "E")
FIRST = BEGIN + 40 * STEP
MARKET = random_market(SYMBOLS, 200, seed=3)


def played(**options: object) -> World:
    world = World(MARKET, FIRST)
    world.run(Exchange(MARKET, FIRST, **options))  # type: ignore[arg-type]
    return world


def labelled(world: World) -> list[PositionRecord]:
    """Closed positions whose signal bar has a label: the horizon after it lies inside the market."""
    end_ms = BEGIN + (len(MARKET["A"]) - POLICY.horizon - 1) * STEP
    return [p for p in world.journal.positions.values() if p.exit_time is not None and to_ms(p.entry_time) < end_ms]


def test_every_closed_position_earned_its_label() -> None:
    world = played()
    closed = labelled(world)
    assert len(closed) > 30
    assert {EXIT_REASONS[p.exit_reason or 0] for p in closed} >= {"stop", "breakeven", "lock", "timeout"}
    for symbol in SYMBOLS:
        bars = CandleSeries.from_candles(MARKET[symbol])
        labels = {side: label_trades(bars.open, bars.high, bars.low, bars.close, side, POLICY) for side in SIDES}
        for position in (p for p in closed if p.symbol == symbol):
            signal = int((to_ms(position.entry_time) - BEGIN) // STEP) - 1
            label = labels[position.side]
            assert position.realized_return == pytest.approx(label.expected_return[signal], abs=1e-12)
            assert position.exit_reason == label.exit_reason[signal]
            assert position.bars_held == label.bars_held[signal]
            assert position.targets_filled == label.targets_filled[signal]
            # Slices are rounded to a step of 0.001 of about 20: the money is the return up to that.
            notional = position.quantity * position.entry_price
            assert position.realized_pnl == pytest.approx(
                (position.realized_return or 0) * notional, abs=notional * 1e-5
            )


def test_every_prediction_is_kept_traded_or_not() -> None:
    """160 bars from the 41st on; what each says of the change over its window, buy and sell opposite."""
    world = played()
    kept = world.journal.predictions
    assert len(kept) == len(SYMBOLS) * (200 - 40)
    assert {model_id for model_id, _, _ in kept} == {world.rules.source}
    assert all(each.sell_mean == -each.buy_mean and each.buy_q50 is None for each in kept.values())
    taken = [signal for signal in world.journal.signals.values() if signal.decision == "taken"]
    assert 0 < len(taken) < len(kept)
    for signal in taken:
        said = kept[signal.source, signal.symbol, signal.open_time]
        assert signal.score == (said.buy_mean if signal.side == "buy" else said.sell_mean)


def test_the_books_agree() -> None:
    world = played()
    positions = world.journal.positions.values()
    equity = world.journal.read_equity("test")
    assert len(equity) == 160
    assert equity[-1].balance == pytest.approx(10_000 + sum(p.realized_pnl for p in positions), abs=1e-8)
    fills = [e.detail for e in world.journal.events.values() if e.kind == "fill"]
    for position in positions:
        mine = [f for f in fills if f["position_id"] == position.position_id]
        closed = sum(float(f["quantity"]) for f in mine)
        assert closed == pytest.approx(position.quantity * (1 - position.remaining_fraction), abs=1e-9)
        fee = position.quantity * position.entry_price * POLICY.taker_fee
        assert sum(f["pnl"] for f in mine) - fee == pytest.approx(position.realized_pnl, abs=1e-9)
    taken = [s for s in world.journal.signals.values() if s.decision == "taken"]
    assert {s.signal_id for s in taken} >= {p.signal_id for p in positions}
    assert len(world.journal.signals) == 160 * len(SYMBOLS) * 2


def test_never_more_positions_than_allowed_and_never_two_of_one_symbol() -> None:
    world = played()
    assert max(record.open_positions for record in world.journal.equity.values()) == world.rules.max_positions
    for symbol in SYMBOLS:
        spans = sorted(
            (to_ms(p.entry_time), to_ms(p.exit_time) if p.exit_time else 2**60)
            for p in world.journal.positions.values()
            if p.symbol == symbol
        )
        # Closed inside bar k, in again on k's signal, that is at the open of k + 1.
        assert all(after[0] > before[1] for before, after in pairwise(spans))


def test_a_quantity_is_the_share_of_equity_at_the_signals_close() -> None:
    world = played()
    equity = {record.time: record.equity for record in world.journal.equity.values()}
    entries = [e for e in world.journal.events.values() if e.kind == "entry"]
    assert entries
    for entry in entries:
        close = MARKET[entry.detail["symbol"]][(entry.detail["signal_ms"] - BEGIN) // STEP].close
        notional = float(SIZING.notional(equity[entry.time]))
        assert 0 <= notional / close - float(entry.detail["quantity"]) < 0.001


@pytest.mark.parametrize("hold", [1, 3, 8, 1000])
def test_tables_do_not_depend_on_how_fast_the_bars_come(hold: int) -> None:
    assert played(hold=hold).journal.tables() == played().journal.tables()


def test_killed_at_any_commit_and_continued_the_tables_are_the_same() -> None:
    whole = played().journal
    for dies_at in range(0, whole.commits, 19):
        world = World(MARKET, FIRST, MemoryJournal(dies_at=dies_at))
        with pytest.raises(KilledError):
            world.run(Exchange(MARKET, FIRST, hold=5))
        world.journal.dies_at = -1
        exchange = Exchange(MARKET, FIRST + (dies_at // 2) * STEP)  # the exchange went on meanwhile, or not
        world.run(exchange)
        assert world.journal.tables() == whole.tables(), dies_at


def test_candles_that_come_late_change_the_forecasts_but_no_outcome() -> None:
    def edit(bar: int, candles: list[Candle]) -> Iterable[Candle]:
        return [c for c in candles if (bar + ord(c.symbol)) % 7]

    exchange = Exchange(MARKET, FIRST, edit)
    world = World(MARKET, FIRST)
    world.run(exchange)
    for position in labelled(world):
        bars = CandleSeries.from_candles(MARKET[position.symbol])
        label = label_trades(bars.open, bars.high, bars.low, bars.close, position.side, POLICY)
        signal = int((to_ms(position.entry_time) - BEGIN) // STEP) - 1
        assert position.realized_return == pytest.approx(label.expected_return[signal], abs=1e-12)


def test_an_entry_whose_bar_never_came_is_cancelled_and_a_position_waits_out_a_gap() -> None:
    whole = played()
    entry = next(e for e in whole.journal.read_events("test") if e.kind == "entry")
    symbol, at = str(entry.symbol), (entry.detail["signal_ms"] - BEGIN) // STEP

    cancelled = World({**MARKET, symbol: MARKET[symbol][: at + 1] + MARKET[symbol][at + 3 :]}, FIRST)
    cancelled.run()
    events = [e for e in cancelled.journal.read_events("test") if e.kind == "entry_cancelled"]
    assert events[0].detail["position_id"] == entry.detail["position_id"]
    assert entry.detail["position_id"] not in cancelled.journal.positions

    # Killed after that, the cancelled entry does not come back.
    killed = World(cancelled.market, FIRST, MemoryJournal(dies_at=at + 8 - 40))
    with pytest.raises(KilledError):
        killed.run()
    killed.journal.dies_at = -1
    killed.run()
    assert killed.journal.tables() == cancelled.journal.tables()

    # The entry bar is quiet, then two bars are missing: they count as bars held, and nothing else changes.
    quiet = replace(MARKET[symbol][at + 1], high=MARKET[symbol][at + 1].open, low=MARKET[symbol][at + 1].open)
    quiet = replace(quiet, close=quiet.open)
    gap = World({**MARKET, symbol: [*MARKET[symbol][: at + 1], quiet, *MARKET[symbol][at + 4 :]]}, FIRST)
    gap.run(last_ms=MARKET[symbol][at + 4].open_time_ms)
    missing = [e for e in gap.journal.read_events("test") if e.kind == "bars_missing"]
    assert missing[0].detail == {"position_id": entry.detail["position_id"], "bars": 2}
    assert gap.journal.positions[entry.detail["position_id"]].bars_held == 4


def test_below_the_drawdown_there_are_no_entries() -> None:
    world = World(MARKET, FIRST).with_rules(max_drawdown=0.002)
    world.run()
    equity = world.journal.read_equity("test")
    peaks = np.maximum.accumulate([10_000.0, *(record.equity for record in equity)])[1:]
    below = {r.time for r, peak in zip(equity, peaks, strict=True) if 1 - r.equity / peak >= 0.002}
    signals = world.journal.signals.values()
    assert below
    assert not [s for s in signals if s.open_time in below and s.decision == "taken"]
    assert [s for s in signals if s.reason == "max_drawdown reached"]


def test_margin_that_is_tied_up_cannot_be_used_again() -> None:
    """40 % of equity a trade: two positions leave a fifth, a third is refused."""
    world = World(MARKET, FIRST).with_rules(sizing=Sizing.from_config(40, 10, (0.2, 0.3, 0.3)))
    world.run()
    taken = Counter(s.open_time for s in world.journal.signals.values() if s.decision == "taken")
    assert max(taken.values()) == 2  # max_positions would allow 3
    assert [s for s in world.journal.signals.values() if s.reason == "not enough free margin"]


def test_bars_that_come_too_late_open_nothing() -> None:
    """The exchange's clock stands 60 s after the close of bar 29: that bar may still be traded, bar 28 may not."""
    world = World(MARKET, FIRST)
    world.run(now_ms=FIRST + 30 * STEP + 60_000)
    signals = world.journal.signals.values()
    expired = {to_ms(s.open_time) for s in signals if s.reason == "bar came too late"}
    taken = {to_ms(s.open_time) for s in signals if s.decision == "taken"}
    assert expired
    assert max(expired) < FIRST + 29 * STEP <= min(taken)


def test_a_position_on_other_candles_is_not_continued() -> None:
    world = World(MARKET, FIRST, MemoryJournal(dies_at=60))
    with pytest.raises(KilledError):
        world.run()
    world.journal.dies_at = -1
    other = random_market(SYMBOLS, 200, seed=4, volatility=0.03)
    with pytest.raises(DataError, match="they are not those it was opened on"):
        World(other, FIRST, world.journal).run()


def test_every_reason_for_no_forecast_is_journalled() -> None:
    market = {**MARKET, "B": MARKET["B"][:60] + MARKET["B"][62:], "E": MARKET["E"][50:]}
    world = World(market, FIRST)
    world.run()
    reasons = {
        reason
        for event in world.journal.read_events("test")
        if event.kind == "not_predicted"
        for reason in event.detail.values()
    }
    assert reasons == {"no candle", "gap in the window", "history too short"}


def test_the_last_session_goes_on_unless_it_is_complete_or_another() -> None:
    journal, terms = MemoryJournal(), {"step_ms": STEP, "threshold": 0.1}

    def chosen(now_ms: int = FIRST, bars: int | None = 3, **changed: object) -> str:
        return choose_session(journal, "replay", {**terms, **changed}, now_ms, bars)

    def begin(run: str, bars_done: int) -> None:
        session = SessionJournal(journal, run)
        session.begin(FIRST, 10_000.0, terms)
        for bar in range(bars_done):
            session.equity(FIRST + bar * STEP, 10_000.0, 10_000.0, 0.0, 0)
        session.commit()

    assert chosen() == "replay-1"
    begin("replay-1", bars_done=2)
    assert chosen() == "replay-1"
    assert chosen(bars=None) == "replay-1"
    assert chosen(threshold=0.2) == "replay-2"
    assert chosen(now_ms=FIRST - STEP) == "replay-2"
    assert chosen(bars=2) == "replay-2"
    begin("replay-2", bars_done=3)
    assert chosen() == "replay-3"
    assert sessions(journal, "replay") == ["replay-1", "replay-2"]
