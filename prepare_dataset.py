"""Computes indicators and labels: python prepare_dataset.py

Reads config.yaml (data_download, risk_profile, fees, dataset, model.prediction_horizon) and `raw_market_data`.
Writes `processed_market_data`: the 49 indicators, and what a trade earned at every bar, both sides.
"""

import time
from collections.abc import Sequence

import click
from rich.table import Column, Table

from perpcast.command_line import console, open_database, progress_bar, stage
from perpcast.config import Settings
from perpcast.exit_policy import EXIT_REASONS, ExitPolicy
from perpcast.market import SIDES
from perpcast.prepare import PreparedSymbol, SideCounts, prepare


@click.command()
@stage
def main(settings: Settings) -> None:
    """Computes the 49 indicators and the expected returns of both sides for every stored candle.

    What is in the table already is compared, not written again: stop it at any time and run it again.

    \b
    Examples:
      python prepare_dataset.py
      python prepare_dataset.py --config config.yaml --config my_policy.yaml
    """
    wanted = settings.data_download
    horizon = settings.model.prediction_horizon
    policies = {side: ExitPolicy.from_config(settings.risk_profile, settings.fees, side, horizon) for side in SIDES}
    begun = time.monotonic()
    with open_database(settings) as database, progress_bar("prepare") as on_progress:
        prepared = prepare(
            database, wanted.symbols, wanted.interval, policies, settings.dataset.max_gap_bars, on_progress
        )
    _report(wanted.symbols, prepared, time.monotonic() - begun)


def _report(symbols: Sequence[str], prepared: list[PreparedSymbol], seconds: float) -> None:
    table = Table("over all bars with a label", *(Column(side, justify="right") for side in SIDES))
    rows = zip(
        *(_base_rates(sum((each.sides[side] for each in prepared), SideCounts())) for side in SIDES), strict=True
    )
    for name, values in zip(("labels", "mean return", "profits", "ambiguous", *EXIT_REASONS[1:]), rows, strict=True):
        table.add_row(name, *values)
    console.print(table)
    present = {each.symbol for each in prepared}
    absent = [symbol for symbol in symbols if symbol not in present]
    if absent:
        console.print(f"no candles yet: {', '.join(absent)}")
    bars, complete = sum(each.bars for each in prepared), sum(each.complete for each in prepared)
    written = sum(each.written for each in prepared)
    console.print(
        f"{bars:,} bars of {len(prepared)} symbols, {complete:,} with every indicator; "
        f"{written} symbols written, {len(prepared) - written} unchanged, {seconds:.1f} s"
    )
    console.print("next: python train_universal_transformer.py --task regression")


def _base_rates(counts: SideCounts) -> list[str]:
    of = max(counts.labels, 1)
    shares = (counts.profits, counts.ambiguous, *counts.exits[1:])
    return [f"{counts.labels:,}", f"{counts.return_sum / of:+.4%}", *(f"{share / of:.1%}" for share in shares)]


if __name__ == "__main__":
    main()
