"""Computes indicators and labels: python prepare_dataset.py

Reads config.yaml (data_download, risk_profile, fees, dataset, model.prediction_horizon) and `raw_market_data`.
Writes `processed_market_data` (the 49 indicators, and what a trade earned at every bar, both sides), `processed_months`
(what the rows were made of) and the page reports/dataset/index.html.
"""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
import numpy as np
from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from perpcast.command_line import console, open_database, progress_bar, refresh_dashboards, stage
from perpcast.config import Settings
from perpcast.database import Database, read_candle_gaps, read_candle_spans, read_candles, read_processed
from perpcast.errors import MissingInputError, PerpcastError
from perpcast.exit_policy import EXIT_REASONS, ExitPolicy
from perpcast.features.indicators import CANDLES_49
from perpcast.features.inputs import OBSERVED, observed_inputs
from perpcast.features.leak import check_indicators, planted_leak
from perpcast.market import SIDES
from perpcast.prepare import PreparedSymbol, prepare
from perpcast.quality import Quality, SideQuality
from perpcast.timeframe import format_time


@click.command()
@click.option(
    "--check", is_flag=True, help="Compute nothing: prove on the stored candles that no indicator sees the future."
)
@stage
def main(settings: Settings, check: bool) -> None:
    """Computes the 49 indicators and the expected returns of both sides for every stored candle.

    Only what new or revised candles touch is written again: stop it at any time and run it again, or run it every day.

    \b
    Examples:
      python prepare_dataset.py
      python prepare_dataset.py --check
      python prepare_dataset.py --config config.yaml --config my_policy.yaml
    """
    if check:
        check_leaks(settings)
        return
    wanted = settings.data_download
    horizon = settings.model.prediction_horizon
    policies = {side: ExitPolicy.from_config(settings.risk_profile, settings.fees, side, horizon) for side in SIDES}
    begun = time.monotonic()
    with open_database(settings) as database:
        with progress_bar("prepare") as on_progress:
            prepared = prepare(
                database, wanted.symbols, wanted.interval, policies, settings.dataset.max_gap_bars, on_progress
            )
        gaps = read_gap_bars(database, [each.symbol for each in prepared])
        _report(wanted.symbols, prepared, gaps, time.monotonic() - begun)
        page = settings.path("reports", "dataset", "index.html")
        has_written = any(each.bars_written for each in prepared)
        if has_written or not page.exists():
            _write_page(database, settings, prepared, gaps, page.parent)
        if has_written:
            refresh_dashboards(database, "processed_market_data")
    console.print(f"report: {page}")
    console.print("next: python train_universal_transformer.py --task regression")


def check_leaks(settings: Settings) -> None:
    """Changes and cuts the future of every symbol's candles and compares the past; a planted leak has to be found.

    Raises PerpcastError where an indicator leaks, or where the check did not bite.
    """
    wanted, max_gap_bars = settings.data_download, settings.dataset.max_gap_bars
    begun, leaks, blind = time.monotonic(), [], []
    with open_database(settings) as database, progress_bar("symbols") as on_progress:
        spans = read_candle_spans(database)
        present = [symbol for symbol in wanted.symbols if symbol in spans]
        for number, symbol in enumerate(present, 1):
            candles = read_candles(database, symbol).frame()
            leaks += [(symbol, leak) for leak in check_indicators(candles, CANDLES_49, wanted.interval, max_gap_bars)]
            if not check_indicators(candles, [planted_leak()], wanted.interval, max_gap_bars):
                blind.append(symbol)
            on_progress(number, len(present))
    if not present:
        raise MissingInputError("no candles of any configured symbol are stored: run python download_data.py first")
    table = Table("symbol", "indicator", "of", "test", "future changed from", "value changed at", "by")
    for symbol, leak in leaks:
        cut, changed = format_time(leak.cut_ms), format_time(leak.time_ms)
        table.add_row(symbol, leak.name, leak.form, leak.test, cut, changed, f"{leak.relative:.2%}")
    if leaks:
        console.print(table)
    seconds = time.monotonic() - begun
    console.print(
        f"{len(CANDLES_49)} indicators and their model inputs on {len(present)} symbols, {seconds:.0f} s: future cut "
        f"off, changed and appended; {len(leaks)} leaks; a planted leak was found on {len(present) - len(blind)}"
    )
    if leaks:
        names = sorted({leak.name for _, leak in leaks})
        raise PerpcastError(
            f"{', '.join(names)} depend on the future: nothing that was trained on them can be believed"
        )
    if blind:
        raise PerpcastError(f"the check did not find a planted leak on {', '.join(blind)}: it has shown nothing there")


def read_gap_bars(database: Database, symbols: Sequence[str]) -> dict[str, Counter[str]]:
    """Bars that are missing or do not count, by symbol and cause."""
    bars: dict[str, Counter[str]] = {symbol: Counter() for symbol in symbols}
    for gap in read_candle_gaps(database):
        if gap.symbol in bars:
            bars[gap.symbol][gap.cause] += gap.bars
    return bars


def _write_page(
    database: Database,
    settings: Settings,
    prepared: Sequence[PreparedSymbol],
    gaps: Mapping[str, Mapping[str, int]],
    folder: Path,
) -> None:
    """The report with its pictures; the newest bars of every symbol are its sample of model inputs."""
    from perpcast.evaluation.quality_report import QualityReport, write_quality_report

    with console.status("drawing the report"):
        sample = [_newest_inputs(database, settings, each.symbol, max(each.months)) for each in prepared]
        report = QualityReport(
            market=f"Bybit {settings.exchange.environment}: symbols chosen on {settings.data_download.universe_as_of}",
            months={each.symbol: each.months for each in prepared},
            gap_bars=gaps,
            columns=OBSERVED,
            sample=np.concatenate(sample),
        )
        write_quality_report(report, folder)


def _newest_inputs(database: Database, settings: Settings, symbol: str, since_ms: int) -> np.ndarray:
    """The model inputs of a symbol's newest bars; what reaches further back is unknown."""
    candles, processed = read_candles(database, symbol, since_ms), read_processed(database, symbol, since_ms)
    interval, max_gap_bars = settings.data_download.interval, settings.dataset.max_gap_bars
    return observed_inputs(candles.frame(), processed.indicators, interval, max_gap_bars)


def _report(
    symbols: Sequence[str], prepared: list[PreparedSymbol], gaps: Mapping[str, Mapping[str, int]], seconds: float
) -> None:
    console.print(_symbol_table(prepared, gaps))
    whole = sum((each.quality for each in prepared), Quality())
    table = Table("over all bars with a label", *(Column(side, justify="right") for side in SIDES))
    rows = zip(*(_base_rates(whole.sides[side]) for side in SIDES), strict=True)
    for name, values in zip(("labels", "mean return", "profits", "ambiguous", *EXIT_REASONS[1:]), rows, strict=True):
        table.add_row(name, *values)
    console.print(table)
    present = {each.symbol for each in prepared}
    absent = [symbol for symbol in symbols if symbol not in present]
    if absent:
        console.print(f"no candles yet: {', '.join(absent)}")
    written = [each for each in prepared if each.bars_written]
    console.print(
        f"{whole.bars:,} bars of {len(prepared)} symbols, {whole.complete:,} with every indicator; "
        f"{len(written)} symbols written, {len(prepared) - len(written)} unchanged, {seconds:.1f} s"
    )


def _symbol_table(prepared: Sequence[PreparedSymbol], gaps: Mapping[str, Mapping[str, int]]) -> Table:
    """A line for each symbol: how far back, how complete, what a trade at every bar would have earned."""
    numbers = ("bars", "missing", "warm-up", *SIDES, "ambig.", "odd")
    columns = (Column(name, justify="right", no_wrap=True) for name in numbers)
    table = Table(
        *(Column(name, no_wrap=True) for name in ("symbol", "since")),
        *columns,
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for each in prepared:
        quality = each.quality
        missing = sum(bars for cause, bars in gaps[each.symbol].items() if cause != "flat_run")
        labels = sum(side.labels for side in quality.sides.values())
        ambiguous = sum(side.ambiguous for side in quality.sides.values())
        means = (side.return_sum / max(side.labels, 1) for side in quality.sides.values())
        table.add_row(
            each.symbol,
            format_time(min(each.months))[:7],
            *(f"{number:,}" for number in (quality.bars, missing, quality.bars - quality.complete)),
            *(f"{mean:+.3%}" for mean in means),
            f"{ambiguous / max(labels, 1):.1%}",
            f"{quality.suspicious:,}",
        )
    return table


def _base_rates(side: SideQuality) -> list[str]:
    of = max(side.labels, 1)
    shares = (side.profits, side.ambiguous, *side.exits[1:])
    return [f"{side.labels:,}", f"{side.return_sum / of:+.4%}", *(f"{share / of:.1%}" for share in shares)]


if __name__ == "__main__":
    main()
