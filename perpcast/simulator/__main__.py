"""python -m perpcast.simulator: runs the local exchange until it is interrupted.

Reads the parquet files of --candles, or nothing at all; writes nothing. The first line of its output says where it
listens.
"""

import asyncio
import signal
import time
from pathlib import Path

import click

from perpcast.command_line import clean_exit, instant
from perpcast.simulator.clock import RunningClock
from perpcast.simulator.market import Market
from perpcast.simulator.recorded import RecordedMarket
from perpcast.simulator.server import Address, serve
from perpcast.simulator.synthetic import START_MS, SyntheticMarket
from perpcast.timeframe import format_time

# How far a synthetic market goes on after --now; at --speed 3600 that is more than two hours.
_FUTURE_MS = 400 * 86_400_000


@click.command(
    epilog="""\b
Examples:
  python -m perpcast.simulator --synthetic 7 --edge 0.1 --now 2025-07-01T00:00Z --speed 3600
  python -m perpcast.simulator --candles ../shared/data/candles/okx_swap_15m --port 8080
""",
)
@click.option(
    "--candles",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Serve the recorded candles of this folder: SYMBOL.parquet with timestamp, open, high, low, close, volume.",
)
@click.option("--synthetic", type=click.IntRange(min=0), metavar="SEED", help="Serve a synthetic market of this seed.")
@click.option(
    "--edge",
    type=click.FloatRange(min=0, max=1),
    default=0.0,
    show_default=True,
    help="Planted edge of the synthetic market: correlation of a bar's return with what the candles before it tell.",
)
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port on 127.0.0.1.  [default: a free one]")
@click.option(
    "--now",
    "now_ms",
    callback=instant("a time such as 2025-07-01T00:00Z"),
    metavar="TIME",
    help="Where the market's time stands until the first WebSocket subscription, UTC."
    "  [default: synthetic: the present; recorded: the end of the candles]",
)
@click.option(
    "--speed",
    type=click.FloatRange(min=0, min_open=True),
    help="Market seconds in one second of the wall, from the first WebSocket subscription on; 3600 passes a 15-minute"
    " bar in a quarter of a second.  [default: 1]",
)
def main(candles: Path | None, synthetic: int | None, edge: float, port: int, now_ms: int | None, speed: float) -> None:
    """Run the local exchange: Bybit v5 market data over REST and WebSocket on loopback, no keys, no network.

    With --now or --speed the market's time stands still until the first WebSocket subscription, so that a download
    before a fast session always sees the same bars; with neither, it runs from the start.
    """
    if (candles is None) == (synthetic is None):
        raise click.UsageError("give either --candles DIR or --synthetic SEED")
    with clean_exit():
        market: Market
        if candles is not None:
            market = RecordedMarket(candles)
            start_ms = market.end_ms if now_ms is None else now_ms
        else:
            start_ms = int(time.time() * 1000) if now_ms is None else now_ms
            if start_ms <= START_MS:
                raise click.BadParameter(f"a synthetic market begins at {format_time(START_MS)}", param_hint="--now")
            market = SyntheticMarket(synthetic or 0, edge, start_ms + _FUTURE_MS)
        waits = now_ms is not None or speed is not None
        asyncio.run(_run(market, RunningClock(start_ms, speed or 1.0, time.monotonic), port, waits=waits))


async def _run(market: Market, clock: RunningClock, port: int, *, waits: bool) -> None:
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with serve(market, clock, port) as address:
        if not waits:
            clock.start()
        _announce(address, market, clock.now_ms(), waits=waits)
        await stopped.wait()


def _announce(address: Address, market: Market, now_ms: int, *, waits: bool) -> None:
    moves = "stands until the first subscription" if waits else "runs"
    print(f"local exchange: {address.rest_url} and {address.ws_url}", flush=True)
    print(f"{len(market.symbols)} symbols, {format_time(now_ms)} UTC, time {moves}; Ctrl-C ends it", flush=True)


if __name__ == "__main__":
    main()
