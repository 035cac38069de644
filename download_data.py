"""Downloads candles: python download_data.py

Reads config.yaml (data_download, exchange) and asks Bybit, or the exchange that exchange.rest_url names.
Writes the tables `raw_market_data`, `candle_gaps`, `candle_revisions`, `funding_rates` and `instruments`.
"""

import asyncio
import sys
import time
from collections.abc import Mapping
from datetime import timedelta
from types import TracebackType
from typing import Self

import click
import numpy as np
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from perpcast.command_line import console, instant, notice, open_database, refresh_dashboards, stage
from perpcast.config import Settings, symbols_from_text
from perpcast.database import Database
from perpcast.download import DownloadSummary, Wanted, download
from perpcast.errors import PerpcastError
from perpcast.exchange import BybitClient, hosts_of
from perpcast.timeframe import format_time

ROWS_SHOWN = 20
GAPS = {
    "not_listed_yet": "missing, not listed yet",
    "exchange_outage": "missing at the exchange",
    "rejected_row": "rejected",
    "not_yet_fetched": "not yet fetched",
    "flat_run": "not counted, no trade",
}
LINE_SECONDS = 3.0  # between lines of progress


_INSTANT = instant("a date or time such as 2024-01-01 or 2024-01-01T06:00")


@click.command(
    epilog="""\b
Examples:
  python download_data.py                                          what config.yaml asks for, only what is missing
  python download_data.py --symbols BTCUSDT,ETHUSDT --days 30
  python download_data.py --from 2024-01-01 --to 2024-07-01
  python download_data.py --verify                                 ... then compare 200 pages with the exchange
"""
)
@click.option("--from", "from_ms", callback=_INSTANT, metavar="TIME", help="First bar, UTC, instead of counting days.")
@click.option(
    "--to", "to_ms", callback=_INSTANT, metavar="TIME", help="Up to this time, UTC.  [default: newest closed bar]"
)
@click.option("--days", type=click.IntRange(min=1), help="Days before the end.  [default: data_download.days]")
@click.option("--symbols", metavar="A,B,...", help="These only.  [default: data_download.symbols]")
@click.option(
    "--verify",
    is_flag=True,
    help="Afterwards ask again for what was rejected or lacking, and compare a random sample with what is stored.",
)
@stage
def main(
    settings: Settings, from_ms: int | None, to_ms: int | None, days: int | None, symbols: str | None, verify: bool
) -> None:
    """Brings the database to the newest closed candle and funding rate of every configured symbol.

    Only what is missing is fetched: stop it at any time and run it again, or run it every day.
    """
    if from_ms is not None and days is not None:
        raise click.UsageError("give either --from or --days, not both")
    configured = settings.data_download
    wanted = Wanted(
        configured.symbols if symbols is None else symbols_from_text(symbols),
        configured.interval,
        days or configured.days,
        from_ms,
        to_ms,
        verify,
    )
    begun = time.monotonic()
    with open_database(settings) as database, DownloadDisplay() as display:
        client, summary = asyncio.run(_download(settings, database, wanted, display))
        if summary.bars_stored or summary.revised or summary.vanished:
            refresh_dashboards(database, "raw_market_data")
    _report(summary, wanted, client, time.monotonic() - begun)


async def _download(
    settings: Settings, database: Database, wanted: Wanted, display: "DownloadDisplay"
) -> tuple[BybitClient, DownloadSummary]:
    exchange = settings.exchange
    hosts = hosts_of(exchange.environment, exchange.rest_url, exchange.ws_url)
    local_time_ms = None if exchange.environment == "local" else time.time_ns() // 1_000_000
    random = np.random.default_rng()
    async with BybitClient(hosts.rest_url, jitter=random, on_notice=display.notice) as client:
        summary = await download(client, database, wanted, display, sample=random, local_time_ms=local_time_ms)
    return client, summary


class DownloadDisplay:
    """A bar for each symbol in flight and one for all, with rate and ETA; plain lines where there is no terminal."""

    def __init__(self) -> None:
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.completed:,} of {task.total:,} {task.fields[unit]}"),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            disable=not sys.stdout.isatty(),
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def begin(self, phase: str, unit: str, amounts: Mapping[str, int]) -> None:
        """A phase begins; what was shown of the one before goes."""
        for task in [*self._bars.task_ids]:
            self._bars.remove_task(task)
        self._tasks.clear()
        self._phase, self._unit, self._amounts = phase, unit, dict(amounts)
        self._left, self._total = dict(amounts), sum(amounts.values())
        self._done = self._tenth = 0
        self._begun = self._printed = time.monotonic()
        self._all = self._bars.add_task(phase, total=self._total, unit=unit, rate="")

    def advance(self, symbol: str, amount: int) -> None:
        """Part of a symbol's work is done."""
        self._done += amount
        self._left[symbol] -= amount
        rate = self._done / max(time.monotonic() - self._begun, 1e-3)
        self._bars.update(self._all, advance=amount, rate=f"{rate:,.0f}/s")
        if not sys.stdout.isatty():
            self._print_tenth(rate)
        if self._amounts[symbol] == 1:  # not worth a bar
            return
        if symbol not in self._tasks:
            self._tasks[symbol] = self._bars.add_task(f"  {symbol}", total=self._amounts[symbol], unit="", rate="")
        self._bars.update(self._tasks[symbol], advance=amount)
        if self._left[symbol] <= 0:
            self._bars.remove_task(self._tasks.pop(symbol))

    def _print_tenth(self, rate: float) -> None:
        """A line for each tenth, but not more often than a person reads."""
        tenth, now = self._done * 10 // max(self._total, 1), time.monotonic()
        if tenth > self._tenth and now > self._printed + LINE_SECONDS:
            self._tenth, self._printed = tenth, now
            left = timedelta(seconds=round((self._total - self._done) / rate))
            print(
                f"{self._phase}: {self._done:,} of {self._total:,} {self._unit}, {rate:,.0f}/s, {left} left", flush=True
            )

    def notice(self, text: str) -> None:
        """A line above the bars."""
        notice(text)


def _report(summary: DownloadSummary, wanted: Wanted, client: BybitClient, seconds: float) -> None:
    """What was done and what is missing; ends with exit code 1 where a symbol is not complete through the exchange."""
    for symbol, reason in summary.skipped.items():
        console.print(f"skipped {symbol}: {reason}", markup=False)
    _print_rows("rejected", [f"{row.symbol} {format_time(row.open_time_ms)}: {row.reason}" for row in summary.rejected])
    _print_rows("revised by the exchange", [f"{symbol} {format_time(time_ms)}" for symbol, time_ms in summary.revised])
    _print_rows("no longer at the exchange", [f"{symbol} {format_time(time)}" for symbol, time in summary.vanished])
    console.print(_table(summary, wanted, client, seconds))
    if summary.late:
        console.print(f"newest bars not there yet, run again later: {', '.join(summary.late)}")
    if summary.failed:
        reasons = "; ".join(f"{symbol}: {reason}" for symbol, reason in summary.failed.items())
        raise PerpcastError(f"{len(summary.failed)} symbols are not complete ({reasons}); run the same command again")
    if summary.revised:
        console.print("candles have changed since they were stored: what they were is in the table candle_revisions")
    console.print("next: python prepare_dataset.py")


def _print_rows(what: str, rows: list[str]) -> None:
    for row in rows[:ROWS_SHOWN]:
        console.print(f"{what}: {row}", markup=False)
    if len(rows) > ROWS_SHOWN:
        console.print(f"{what}: {len(rows) - ROWS_SHOWN:,} more")


def _table(summary: DownloadSummary, wanted: Wanted, client: BybitClient, seconds: float) -> Table:
    span = f"{format_time(summary.start_ms)} to {format_time(summary.end_ms)} UTC"
    rows = [
        ("span", span),
        ("candles stored", f"{summary.bars_stored:,} of {len(wanted.symbols) - len(summary.skipped)} symbols"),
        *((GAPS[cause], f"{bars:,} bars") for cause, bars in sorted(summary.gap_bars.items())),
        ("funding rates stored", f"{summary.funding_rates_stored:,}"),
        ("requests", f"{client.requests:,}, of them repeated {client.retries:,}"),
        ("time", f"{timedelta(seconds=round(seconds))} ({summary.bars_stored / max(seconds, 1e-3):,.0f} candles/s)"),
    ]
    if wanted.verify:
        compared = f"{summary.verified_bars:,} candles compared, {len(summary.revised):,} differed"
        rows.insert(2, ("verified", compared))
    table = Table(show_header=False, title="download", title_justify="left")
    for row in rows:
        table.add_row(*row)
    return table


if __name__ == "__main__":
    main()
