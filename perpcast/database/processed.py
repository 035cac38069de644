"""Indicators and labels by symbol: `processed_market_data`, written by `prepare_dataset.py`, read to build datasets."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any

import numpy as np
from sqlalchemy import Connection, Engine, delete, select, text

from perpcast.database.binary_copy import Block, copy_in, copy_out
from perpcast.database.candles import CandleMonth, CandleSpan, read_spans
from perpcast.database.engine import transact
from perpcast.database.schema import DOUBLE_INDICATORS, INDICATORS, processed_market_data, processed_months
from perpcast.exit_policy import Labels
from perpcast.market import SIDES, Side
from perpcast.timeframe import from_ms, to_ms


def _runs() -> list[tuple[slice, Block]]:
    """The indicators as neighbours of one type, in their order: each a slice of the matrix."""
    runs = []
    first = 0
    for double, names in groupby(INDICATORS, key=DOUBLE_INDICATORS.__contains__):
        block = Block(tuple(names), "double" if double else "real")
        runs.append((slice(first, first + len(block.names)), block))
        first += len(block.names)
    return runs


_RUNS = _runs()
_BLOCKS = (
    Block(("open_time",), "time"),
    *(block for _, block in _RUNS),
    *(
        block
        for side in SIDES
        for block in (
            Block((f"{side}_expected_return",), "double"),
            Block((f"{side}_exit_reason", f"{side}_bars_held", f"{side}_targets_filled"), "smallint"),
            Block((f"{side}_ambiguous",), "boolean"),
        )
    ),
)


@dataclass(frozen=True)
class ProcessedSeries:
    """Indicators and labels of one symbol's bars, oldest first.

    `indicators` is [n, 49] in the order of `schema.INDICATORS`, NaN where unknown: float64 that holds REAL values
    once it has been stored (obv stays double precision). A bar without a label is NaN in `expected_return`, else 0.
    """

    open_time_ms: np.ndarray  # int64 [n]
    indicators: np.ndarray  # float64 [n, 49]
    labels: Mapping[Side, Labels]

    def __len__(self) -> int:
        return len(self.open_time_ms)

    def __getitem__(self, rows: slice) -> "ProcessedSeries":
        labels = {
            side: Labels(*(getattr(of_side, field.name)[rows] for field in fields(Labels)))
            for side, of_side in self.labels.items()
        }
        return ProcessedSeries(self.open_time_ms[rows], self.indicators[rows], labels)


@dataclass(frozen=True, slots=True)
class ProcessedMonth:
    """What the rows of one symbol and month were made of, and what they hold.

    `candles` are those of the month; `version` names everything else that the rows depend on. `quality` is JSON.
    """

    candles: CandleMonth
    version: str
    quality: Mapping[str, Any]


def replace_processed(
    engine: Engine,
    symbol: str,
    processed: ProcessedSeries,
    months: Sequence[ProcessedMonth] = (),
    start_ms: int | None = None,
) -> None:
    """Makes `processed` all that is stored of one symbol from `start_ms` on (None: all), in one transaction.

    And `months` all that is known of what it was made of. Deleting the range and copying anew is the fastest way to
    recompute one (231,867 against 85,506 rows/s of an upsert, spec/ecosystem.md 3), and leaves no row of an earlier run
    behind.
    """
    assert processed.indicators.shape == (len(processed), len(INDICATORS)), "one row per bar, one column per indicator"
    unknown = np.isnan(processed.indicators)
    arrays = [processed.open_time_ms, *(processed.indicators[:, columns] for columns, _ in _RUNS)]
    nulls = [None, *(unknown[:, columns] for columns, _ in _RUNS)]
    for side in SIDES:
        labels = processed.labels[side]
        unlabelled = np.isnan(labels.expected_return)
        codes = np.column_stack([labels.exit_reason, labels.bars_held, labels.targets_filled])
        arrays += [labels.expected_return, codes, labels.ambiguous]
        nulls += [unlabelled] * 3
    rows = [
        {
            "symbol": symbol,
            "month": from_ms(month.candles.month_ms),
            "version": month.version,
            "candles": month.candles.candles,
            "digest": month.candles.digest,
            "quality": dict(month.quality),
        }
        for month in months
    ]
    assert start_ms is None or not len(processed) or processed.open_time_ms[0] >= start_ms, "rows before the range"
    since = from_ms(0 if start_ms is None else start_ms)
    table, ledger = processed_market_data, processed_months

    def replace(connection: Connection) -> None:
        # Two processes on one symbol take turns instead of failing on each other's rows.
        connection.execute(
            text("SELECT pg_advisory_xact_lock(hashtextextended(:key, 0))"), {"key": f"processed {symbol}"}
        )
        connection.execute(delete(table).where(table.c.symbol == symbol, table.c.open_time >= since))
        connection.execute(delete(ledger).where(ledger.c.symbol == symbol, ledger.c.month >= since))
        copy_in(connection, table.name, [("symbol", symbol)], _BLOCKS, arrays, nulls)
        if rows:
            connection.execute(ledger.insert(), rows)

    transact(engine, replace)


def read_processed_months(engine: Engine) -> dict[str, list[ProcessedMonth]]:
    """What the stored rows were made of, by symbol, oldest month first."""
    ledger = processed_months.c
    query = select(processed_months).order_by(ledger.symbol, ledger.month)
    months: dict[str, list[ProcessedMonth]] = {}
    with engine.connect() as connection:
        for row in connection.execute(query):
            candles = CandleMonth(to_ms(row.month), row.candles, row.digest)
            months.setdefault(row.symbol, []).append(ProcessedMonth(candles, row.version, row.quality))
    return months


def read_processed(
    engine: Engine, symbol: str, start_ms: int | None = None, end_ms: int | None = None
) -> ProcessedSeries:
    """Indicators and labels of one symbol, oldest first, from `start_ms` up to but without `end_ms`."""
    with engine.connect() as connection:
        arrays = copy_out(connection, processed_market_data, {"symbol": symbol}, _BLOCKS, start_ms, end_ms)
    open_time_ms, values, parts = arrays[0], arrays[1 : 1 + len(_RUNS)], arrays[1 + len(_RUNS) :]
    indicators = np.empty((len(open_time_ms), len(INDICATORS)))
    for (columns, block), value in zip(_RUNS, values, strict=True):
        indicators[:, columns] = value.reshape(-1, len(block.names))
    labels: dict[Side, Labels] = {}
    for number, side in enumerate(SIDES):
        expected_return, codes, ambiguous = parts[3 * number : 3 * number + 3]
        labels[side] = Labels(
            expected_return=expected_return.astype(np.float64),
            exit_reason=codes[:, 0].astype(np.int8),
            bars_held=codes[:, 1].astype(np.int16),
            targets_filled=codes[:, 2].astype(np.int8),
            ambiguous=ambiguous.astype(np.bool_),
        )
    return ProcessedSeries(open_time_ms, indicators, labels)


def read_processed_spans(engine: Engine) -> dict[str, CandleSpan]:
    """What is stored, by symbol."""
    return read_spans(engine, processed_market_data)
