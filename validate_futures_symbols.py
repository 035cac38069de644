"""Checks the configured symbols: python validate_futures_symbols.py [--suggest]

Reads config.yaml (data_download, exchange) and asks Bybit, or the exchange that exchange.rest_url names. Writes nothing
and needs no database. Exit code 1 where a symbol cannot be used.
"""

import asyncio
import textwrap
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import click
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Column, Table
from rich.text import Text

from perpcast.command_line import console, progress_bar, stage
from perpcast.config import DownloadSettings, Settings
from perpcast.errors import PerpcastError
from perpcast.exchange import BybitClient, hosts_of
from perpcast.market import Ticker
from perpcast.timeframe import DAY_MS, floor_ms, format_time, interval_ms
from perpcast.universe import PAST_DAYS, Proposal, Verdict, check_symbols, suggest_replacements

# Proposed beyond what is needed: a person may not like each of them.
SPARE = 5

PASTE = "paste the lines above over theirs in the configuration, then run this again"


@dataclass(frozen=True)
class Findings:
    """What the exchange answered."""

    start_ms: int  # the first training bar
    now_ms: int
    verdicts: Sequence[Verdict]
    tickers: Mapping[str, Ticker]
    proposals: Sequence[Proposal]
    requests: int

    @property
    def unusable(self) -> list[Verdict]:
        """The verdicts on those that have to go."""
        return [verdict for verdict in self.verdicts if not verdict.usable]

    @property
    def today(self) -> str:
        """The date of the choice."""
        return format_time(self.now_ms)[:10]


@click.command()
@click.option("--suggest", is_flag=True, help="Propose replacements, by their turnover before the first training bar.")
@stage
def main(settings: Settings, suggest: bool) -> None:
    """Checks that every configured symbol is a USDT perpetual, trades, and has candles for the whole training.

    Exit code 1 where one cannot be used; the last line says what to change.

    \b
    Examples:
      python validate_futures_symbols.py
      python validate_futures_symbols.py --suggest
      python validate_futures_symbols.py --config config.yaml --config my_symbols.yaml
    """
    hosts = hosts_of(settings.exchange.environment, settings.exchange.rest_url, settings.exchange.ws_url)
    begun = time.monotonic()
    findings = asyncio.run(_ask(settings.data_download, hosts.rest_url, suggest))
    _report(settings.data_download, findings, time.monotonic() - begun)
    if not findings.unusable:
        console.print("all of them can be used; next: python download_data.py")
        return
    if suggest:
        _report_proposals(findings)
    words = f"{len(findings.unusable)} of {len(findings.verdicts)} symbols cannot be used: "
    raise PerpcastError(words + (PASTE if suggest else _changes(findings)))


async def _ask(wanted: DownloadSettings, rest_url: str, suggest: bool) -> Findings:
    async with BybitClient(rest_url, jitter=np.random.default_rng(), on_notice=_notice) as client:
        now_ms = await client.fetch_server_time_ms()
        start_ms = floor_ms(now_ms, interval_ms(wanted.interval)) - wanted.days * DAY_MS
        listings, tickers = await client.fetch_listings(), await client.fetch_tickers()
        with progress_bar("symbols") as on_progress:
            verdicts = await check_symbols(
                client, wanted.symbols, listings, wanted.interval, start_ms, now_ms, on_progress
            )
        missing, proposals = len(wanted.symbols) - len(_kept(verdicts)), []
        if suggest and missing:
            with progress_bar("turnover") as on_progress:
                proposals = await suggest_replacements(
                    client, {*wanted.symbols, *_kept(verdicts)}, listings, start_ms, missing + SPARE, on_progress
                )
        return Findings(start_ms, now_ms, verdicts, tickers, proposals, client.requests)


def _notice(text: str) -> None:
    console.print(text, markup=False)


def _kept(verdicts: Sequence[Verdict]) -> list[str]:
    """The symbols that can be used, renamed ones by their new names."""
    names = (verdict.symbol if verdict.usable else verdict.replacement for verdict in verdicts)
    return list(dict.fromkeys(name for name in names if name))


def _report(wanted: DownloadSettings, findings: Findings, seconds: float) -> None:
    start = format_time(findings.start_ms)
    console.print(f"first training bar {start} UTC, {wanted.days:,} days before the exchange's clock")
    console.print(_table(findings))
    for verdict in sorted(findings.verdicts, key=lambda verdict: not verdict.usable):  # the worst last, to be seen
        if remark := "; ".join(filter(None, (verdict.problem, *verdict.warnings))):
            console.print(Text(f"{verdict.symbol}: {remark}", style="yellow" if verdict.usable else "red"))
    console.print(f"{len(findings.verdicts)} symbols checked, {findings.requests:,} requests, {seconds:.1f} s")


def _table(findings: Findings) -> Table:
    table = _plain_table("symbol", "perpetual", "trades", "in time", Column("24 h, M USDT", justify="right"), "verdict")
    for verdict in findings.verdicts:
        answers = (verdict.is_perpetual, verdict.is_trading, verdict.is_in_time)
        turnover = _turnover_today(findings, verdict.symbol)
        table.add_row(verdict.symbol, *map(_yes_or_no, answers), turnover, _conclusion(verdict))
    return table


def _plain_table(*columns: str | Column) -> Table:
    """Without any lines where it goes into a file or a pipe."""
    return Table(*columns, box=SIMPLE_HEAD if console.is_terminal else None, pad_edge=False)


def _yes_or_no(answer: bool | None) -> Text:
    if answer is None:
        return Text("-")
    return Text("yes") if answer else Text("no", style="red")


def _conclusion(verdict: Verdict) -> Text:
    if verdict.usable:
        return Text("usable", style="green")
    return Text(f"use {verdict.replacement}" if verdict.replacement else "unusable", style="bold red")


def _turnover_today(findings: Findings, symbol: str) -> str:
    return _millions(float(findings.tickers[symbol].turnover_24h)) if symbol in findings.tickers else "-"


def _millions(usdt: float) -> str:
    return f"{usdt / 1e6:,.1f}"


def _report_proposals(findings: Findings) -> None:
    """The table of proposals, and the configuration with as many of them as are needed."""
    kept = _kept(findings.verdicts)
    needed = len(findings.verdicts) - len(kept)
    if needed:
        table = _plain_table(
            "proposal", *(Column(title, justify="right") for title in ("a day then, M USDT", "24 h now"))
        )
        for proposal in findings.proposals:
            today = _turnover_today(findings, proposal.symbol)
            table.add_row(proposal.symbol, _millions(proposal.past_turnover), today)
        console.print(table)
        console.print(
            f"{needed} needed, {len(findings.proposals)} found. Ranked by turnover in the {PAST_DAYS} days before the "
            "first training bar, as one knew it then; all of them still trade today, so some survivorship remains."
        )
    chosen = [*kept, *(proposal.symbol for proposal in findings.proposals[:needed])]
    symbols = textwrap.fill(", ".join(chosen), 76, initial_indent="    ", subsequent_indent="    ")
    console.print(f"data_download:\n  symbols: [\n{symbols}\n  ]\n  universe_as_of: '{findings.today}'", markup=False)


def _changes(findings: Findings) -> str:
    """What to change in the configuration, by hand."""
    configured = {verdict.symbol for verdict in findings.verdicts}
    renamed = {
        verdict.symbol: verdict.replacement
        for verdict in findings.unusable
        if verdict.replacement and verdict.replacement not in configured
    }
    others = [verdict.symbol for verdict in findings.unusable if verdict.symbol not in renamed]
    steps = [f"change {old} to {new}" for old, new in renamed.items()]
    if others:
        steps.append(f"replace or remove {', '.join(others)} (--suggest proposes others)")
    return f"in data_download.symbols {', '.join(steps)}; set universe_as_of to '{findings.today}'"


if __name__ == "__main__":
    main()
