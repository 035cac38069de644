"""Downloads candles: python download_data.py

Reads config.yaml (data_download, exchange) and asks Bybit, or the exchange that exchange.rest_url names.
Writes the tables `raw_market_data`, `candle_gaps`, `funding_rates` and `instruments`.
"""

import asyncio
import time

import click
import numpy as np

from perpcast.command_line import console, open_database, progress_bar, stage
from perpcast.config import Settings
from perpcast.database import Database
from perpcast.download import DownloadSummary, download
from perpcast.exchange import BybitClient, hosts_of
from perpcast.timeframe import format_time

REJECTED_SHOWN = 20


@click.command()
@stage
def main(settings: Settings) -> None:
    """Brings the database to the newest closed candle and funding rate of every configured symbol.

    Only what is missing is fetched: stop it at any time and run it again, or run it every day.

    \b
    Examples:
      python download_data.py
      python download_data.py --config config.yaml --config my_symbols.yaml
    """
    hosts = hosts_of(settings.exchange.environment, settings.exchange.rest_url, settings.exchange.ws_url)
    begun = time.monotonic()
    with open_database(settings) as database:
        client, summary = asyncio.run(_download(settings, hosts.rest_url, database))
    _report(settings, summary, client, time.monotonic() - begun)


async def _download(settings: Settings, rest_url: str, database: Database) -> tuple[BybitClient, DownloadSummary]:
    wanted = settings.data_download
    async with BybitClient(rest_url, jitter=np.random.default_rng()) as client:
        with progress_bar("candles") as on_progress:
            summary = await download(client, database, wanted.symbols, wanted.interval, wanted.days, on_progress)
    return client, summary


def _report(settings: Settings, summary: DownloadSummary, client: BybitClient, seconds: float) -> None:
    for row in summary.rejected[:REJECTED_SHOWN]:
        console.print(f"rejected {row.symbol} {format_time(row.open_time_ms)}: {row.reason}", markup=False)
    if len(summary.rejected) > REJECTED_SHOWN:
        console.print(f"rejected {len(summary.rejected) - REJECTED_SHOWN:,} more, see the table candle_gaps")
    for cause, bars in sorted(summary.gap_bars.items()):
        console.print(f"missing {bars:,} bars: {cause.replace('_', ' ')}")
    if summary.late:
        console.print(f"newest bars not there yet, run again later: {', '.join(summary.late)}")
    console.print(
        f"{summary.bars_stored:,} candles stored of {len(settings.data_download.symbols)} symbols, "
        f"{summary.funding_rates_stored:,} funding rates, "
        f"{format_time(summary.start_ms)} to {format_time(summary.end_ms)} UTC, "
        f"{client.requests:,} requests, {client.retries:,} repeated, {seconds:.1f} s"
    )
    console.print("next: python prepare_dataset.py")


if __name__ == "__main__":
    main()
