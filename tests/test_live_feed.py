"""The feed: every candle once, in order and without a hole, whatever the stream leaves out, repeats or delays."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest

from perpcast.errors import ExchangeUnavailableError
from perpcast.live.feed import ClosedBar
from perpcast.market import Candle, CandleSeries
from tests.live_world import BEGIN, STEP, Exchange, random_market

SYMBOLS = ("A", "B", "C")
FIRST = BEGIN + 10 * STEP
MARKET = random_market(SYMBOLS, 30, seed=1)


def handed(blocks: list[list[ClosedBar]], symbol: str) -> list[Candle]:
    return [candle for block in blocks for bar in block for candle in bar.candles.get(symbol, [])]


def bars(blocks: list[list[ClosedBar]]) -> list[int]:
    return [(bar.open_time_ms - FIRST) // STEP for block in blocks for bar in block]


def test_every_bar_in_order_with_its_history_before_it() -> None:
    blocks = Exchange(MARKET, FIRST).blocks(FIRST)
    assert bars(blocks) == list(range(20))
    for symbol in SYMBOLS:
        assert handed(blocks, symbol) == MARKET[symbol]
    assert [len(new) for new in blocks[0][0].candles.values()] == [11, 11, 11]
    assert blocks[0][0].present == SYMBOLS


def test_a_flood_comes_in_blocks_and_loses_nothing() -> None:
    market = random_market(SYMBOLS, 510, seed=2)
    blocks = Exchange(market, FIRST, hold=1000).blocks(FIRST, block_bars=32)
    assert bars(blocks) == list(range(500))
    assert max(map(len, blocks)) == 32
    assert all(handed(blocks, symbol) == market[symbol] for symbol in SYMBOLS)


def test_a_slow_reader_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("perpcast.live.feed.QUEUE_CANDLES", 7)
    market = random_market(SYMBOLS, 60, seed=2)

    async def run() -> list[list[ClosedBar]]:
        blocks = []
        async for block in Exchange(market, FIRST, hold=1000).feed(FIRST).blocks():
            await asyncio.sleep(0.003)
            blocks.append(block)
        return blocks

    blocks = asyncio.run(run())
    assert bars(blocks) == list(range(50))
    assert all(handed(blocks, symbol) == market[symbol] for symbol in SYMBOLS)


def test_a_candle_that_the_stream_leaves_out_is_fetched_before_the_bar_is_closed() -> None:
    def edit(bar: int, candles: list[Candle]) -> list[Candle]:
        return [c for c in candles if (bar, c.symbol) != (4, "B")]

    exchange = Exchange(MARKET, FIRST, edit)
    blocks = exchange.blocks(FIRST)
    assert handed(blocks, "B") == MARKET["B"]
    assert all(bar.present == SYMBOLS for block in blocks for bar in block)


def test_a_stream_that_begins_late_is_filled_from_the_first_bar_on() -> None:
    blocks = Exchange(MARKET, FIRST + 7 * STEP).blocks(FIRST)
    assert bars(blocks) == list(range(20))
    assert handed(blocks, "A") == MARKET["A"]


def test_a_bar_that_the_exchange_does_not_have_is_passed_over() -> None:
    market = {**MARKET, "B": [c for n, c in enumerate(MARKET["B"]) if n not in (13, 14)]}
    blocks = Exchange(market, FIRST).blocks(FIRST)
    assert bars(blocks) == list(range(20))
    assert handed(blocks, "B") == market["B"]
    absent = [(bar.open_time_ms - FIRST) // STEP for block in blocks for bar in block if "B" not in bar.present]
    assert absent == [3, 4]


def test_a_whole_bar_missing_everywhere_is_still_a_bar() -> None:
    market = {symbol: [c for n, c in enumerate(candles) if n != 15] for symbol, candles in MARKET.items()}
    blocks = Exchange(market, FIRST).blocks(FIRST)
    assert bars(blocks) == list(range(20))
    assert [bar.present for block in blocks for bar in block][5] == ()


def test_no_newer_candle_is_given_on_while_an_older_cannot_be_had() -> None:
    """B lacks bar 4 and the exchange fails six times: B stands still, the others go on, nothing is lost."""
    lost = FIRST + 4 * STEP

    class Failing(Exchange):
        fails = 6

        async def fetch(self, symbol: str, start_ms: int, end_ms: int) -> CandleSeries:
            self.failing = symbol == "B" and start_ms == lost and self.fails > 0
            self.fails -= self.failing
            return await super().fetch(symbol, start_ms, end_ms)

    exchange = Failing(MARKET, FIRST, lambda bar, candles: [c for c in candles if (bar, c.symbol) != (4, "B")])
    blocks = exchange.blocks(FIRST, grace_seconds=0.004)
    assert handed(blocks, "B") == MARKET["B"]
    assert handed(blocks, "A") == MARKET["A"]
    absent = [(bar.open_time_ms - FIRST) // STEP for block in blocks for bar in block if "B" not in bar.present]
    assert absent[0] == 4
    assert len(absent) > 2
    failures = [failure for block in blocks for bar in block for failure in bar.failures]
    assert failures == ["HTTP 503"] * 6


def test_twice_late_and_future_candles_are_dropped() -> None:
    def edit(bar: int, candles: list[Candle]) -> list[Candle]:
        old = [replace(c, close=1.0, open_time_ms=c.open_time_ms - STEP) for c in candles] if bar else []
        future = [replace(candles[0], open_time_ms=candles[0].open_time_ms + 50 * STEP)] if bar == 5 else []
        return [*old, *future, *candles, *candles]

    blocks = Exchange(MARKET, FIRST, edit).blocks(FIRST)
    assert bars(blocks) == list(range(20))
    assert all(handed(blocks, symbol) == MARKET[symbol] for symbol in SYMBOLS)


def test_a_silent_stream_is_noticed_and_the_rest_interface_goes_on() -> None:
    exchange = Exchange(MARKET, FIRST, lambda bar, candles: candles if bar < 5 else [], silent_at_end=True)
    blocks = exchange.blocks(FIRST, last_ms=FIRST + 19 * STEP)
    assert bars(blocks) == list(range(20))
    assert handed(blocks, "C") == MARKET["C"]


def test_a_market_that_is_over_before_the_last_wanted_bar_ends_the_feed() -> None:
    exchange = Exchange(MARKET, FIRST, silent_at_end=True)

    async def run() -> int:
        count = 0
        async for block in exchange.feed(FIRST, last_ms=FIRST + 25 * STEP).blocks():
            count += len(block)
            if count == 20:
                exchange.now_ms = FIRST + 30 * STEP
        return count

    assert asyncio.run(asyncio.wait_for(run(), 10)) == 20


def test_ends_with_the_last_wanted_bar() -> None:
    assert bars(Exchange(MARKET, FIRST).blocks(FIRST, last_ms=FIRST + 6 * STEP)) == list(range(7))


def test_an_unreachable_stream_is_told() -> None:
    class Unreachable(Exchange):
        async def candles(self):
            raise ExchangeUnavailableError("no connection")
            yield

    with pytest.raises(ExchangeUnavailableError):
        Unreachable(MARKET, FIRST).blocks(FIRST)


@pytest.mark.parametrize("seed", range(25))
def test_whatever_is_left_out_repeated_or_reordered_nothing_is_lost(seed: int) -> None:
    rng = np.random.default_rng(seed)
    late: list[Candle] = []

    def edit(bar: int, candles: list[Candle]) -> list[Candle]:
        sent, late[:] = list(late), []
        for candle in candles:
            fate = rng.choice(["keep", "keep", "keep", "drop", "twice", "late"])
            if fate == "late":
                late.append(candle)
            elif fate != "drop":
                sent += [candle] * (2 if fate == "twice" else 1)
        return [sent[place] for place in rng.permutation(len(sent))]

    blocks = Exchange(MARKET, FIRST, edit, hold=int(rng.integers(1, 6))).blocks(FIRST, grace_seconds=0.004)
    got = bars(blocks)
    assert got == list(range(len(got)))
    for symbol in SYMBOLS:
        candles = handed(blocks, symbol)
        assert candles == MARKET[symbol][: len(candles)]
        assert len(candles) >= len(got)
