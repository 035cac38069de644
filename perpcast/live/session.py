"""The loop of a session: blocks of closed bars from the feed, through the trader, until it ends or is stopped."""

from collections.abc import Callable
from contextlib import aclosing

from perpcast.errors import PerpcastError
from perpcast.live.feed import BarFeed, ClosedBar, ExchangeTime
from perpcast.live.trader import BarSummary, Trader


async def run_session(
    feed: BarFeed,
    trader: Trader,
    step_ms: int,
    on_bar: Callable[[BarSummary], None],
    *,
    exchange_time_ms: ExchangeTime | None = None,
    entry_within_seconds: float = 60.0,
) -> int:
    """Applies every bar of the feed; returns how many.

    With `exchange_time_ms` a signal is entered only within `entry_within_seconds` after its bar's close by the
    exchange's clock: after a sleep or an outage old bars move positions and open none, and so where it has no answer.
    """
    bars = 0
    await feed.prime()
    async with aclosing(feed.blocks()) as blocks:
        async for block in blocks:
            expired: frozenset[int] = frozenset()
            if exchange_time_ms is not None:
                expired = await _expired(block, exchange_time_ms, step_ms + entry_within_seconds * 1000)
            for summary in trader.apply(block, expired):
                bars += 1
                on_bar(summary)
    return bars


async def _expired(block: list[ClosedBar], exchange_time_ms: ExchangeTime, within_ms: float) -> frozenset[int]:
    try:
        now_ms = await exchange_time_ms()
    except PerpcastError:
        return frozenset(bar.open_time_ms for bar in block)
    return frozenset(bar.open_time_ms for bar in block if now_ms > bar.open_time_ms + within_ms)
