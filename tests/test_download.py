"""The download stage on a real database: what is asked for, what is stored, what is written down as missing."""

import asyncio
from collections.abc import Sequence
from decimal import Decimal

import numpy as np
import pytest

from perpcast.database import (
    CandleGap,
    Database,
    read_candle_gaps,
    read_candles,
    read_funding_rates,
    read_instruments,
    upsert_candles,
    upsert_funding_rates,
)
from perpcast.download import DAY_MS, SETTLE_MS, DownloadSummary, download, subtract
from perpcast.errors import ConfigError, ExchangeUnavailableError
from perpcast.exchange import PAGE_BARS, BybitClient, CandlePage, RejectedRow
from perpcast.market import CandleSeries, FundingRate, Instrument

STEP_MS = 900_000
BARS_PER_DAY = DAY_MS // STEP_MS
DAYS = 30
T0 = 1_704_067_200_000  # 2024-01-01
END = T0 + DAYS * DAY_MS
BARS = DAYS * BARS_PER_DAY


def series(first: int, end: int, level: float = 100.0) -> CandleSeries:
    """Bars number `first` to `end - 1`, each recognizable by its prices."""
    bar = np.arange(first, end)
    price = level + bar / 1000
    return CandleSeries(T0 + bar * STEP_MS, price, price + 1, price - 1, price + 0.5, bar + 1.0, (bar + 1) * price)


class Exchange(BybitClient):
    """An exchange in memory: bars by symbol, bars that it rejects, a clock, and a record of what it was asked."""

    def __init__(self, bars: dict[str, CandleSeries], now_ms: int = END + SETTLE_MS) -> None:
        super().__init__("http://unused", jitter=np.random.default_rng(1))
        self.bars = bars
        self.now_ms = now_ms
        self.rejects: dict[str, dict[int, str]] = {}
        self.funding: list[FundingRate] = []
        self.asked: list[tuple[str, int, int]] = []
        self.fails_after: int | None = None

    async def fetch_server_time_ms(self) -> int:
        return self.now_ms

    async def fetch_instruments(self) -> dict[str, Instrument]:
        one = Decimal(1)
        return {symbol: Instrument(symbol, "Trading", one, one, one, one, one, 0, 480) for symbol in self.bars}

    async def fetch_candles(self, symbol: str, interval: str, start_ms: int, end_ms: int) -> CandlePage:
        assert interval == "15"
        assert 0 < end_ms - start_ms <= PAGE_BARS * STEP_MS
        if self.fails_after is not None and len(self.asked) >= self.fails_after:
            raise ExchangeUnavailableError("exchange unreachable: it is gone")
        self.asked.append((symbol, (start_ms - T0) // STEP_MS, (end_ms - T0) // STEP_MS))
        await asyncio.sleep(0)
        times = self.bars[symbol].open_time_ms
        rejects = {time: why for time, why in self.rejects.get(symbol, {}).items() if start_ms <= time < end_ms}
        keep = (times >= start_ms) & (times < end_ms) & ~np.isin(times, list(rejects))
        rejected = tuple(RejectedRow(symbol, time, why) for time, why in sorted(rejects.items()))
        return CandlePage(self.bars[symbol][keep], rejected, self.now_ms)

    async def fetch_funding_rates(self, symbol: str, start_ms: int, end_ms: int) -> list[FundingRate]:
        await asyncio.sleep(0)
        return [rate for rate in self.funding if rate.symbol == symbol and start_ms <= rate.funding_time_ms < end_ms]


def run(exchange: Exchange, engine: Database, symbols: Sequence[str], days: int = DAYS) -> DownloadSummary:
    progress: list[tuple[int, int]] = []
    summary = asyncio.run(download(exchange, engine, symbols, "15", days, lambda *step: progress.append(step)))
    assert [done for done, _ in progress] == sorted(done for done, _ in progress)
    assert not progress or progress[-1][0] == progress[-1][1]
    return summary


def without(candles: CandleSeries, *holes: range) -> CandleSeries:
    bars = (candles.open_time_ms - T0) // STEP_MS
    return candles[~np.isin(bars, [bar for hole in holes for bar in hole])]


def assert_stored(engine: Database, symbol: str, expected: CandleSeries) -> None:
    stored = read_candles(engine, symbol)
    for name in ("open_time_ms", "open", "high", "low", "close", "volume", "turnover"):
        np.testing.assert_array_equal(getattr(stored, name), getattr(expected, name))


def gap(symbol: str, first: int, bars: int, cause: str, reason: str | None = None) -> CandleGap:
    return CandleGap(symbol, T0 + first * STEP_MS, bars, cause, reason)


def test_download_empty_database_stores_every_bar_in_pages_of_a_thousand(database: Database) -> None:
    exchange = Exchange({"AUSDT": series(0, BARS + 5), "BUSDT": series(0, BARS + 5, 7.0)})
    summary = run(exchange, database, ["AUSDT", "BUSDT"])
    assert_stored(database, "AUSDT", series(0, BARS))
    assert_stored(database, "BUSDT", series(0, BARS, 7.0))
    assert exchange.asked[:3] == [("AUSDT", 0, 1000), ("AUSDT", 1000, 2000), ("AUSDT", 2000, BARS)]
    assert (summary.bars_stored, summary.gap_bars, summary.late) == (2 * BARS, {}, ())
    assert set(read_instruments(database)) == {"AUSDT", "BUSDT"}


def test_download_again_asks_for_nothing_and_later_for_the_new_bars_only(database: Database) -> None:
    exchange = Exchange({"AUSDT": series(0, BARS + 96)})
    run(exchange, database, ["AUSDT"])
    exchange.asked.clear()
    assert run(exchange, database, ["AUSDT"]).bars_stored == 0
    assert exchange.asked == []
    exchange.now_ms = END + 4 * STEP_MS + SETTLE_MS
    assert run(exchange, database, ["AUSDT"]).bars_stored == 4
    assert exchange.asked == [("AUSDT", BARS, BARS + 4)]


@pytest.mark.parametrize(("late_ms", "bars"), [(-1, BARS - 1), (0, BARS)])
def test_download_bar_that_just_closed_waits_until_it_has_settled(database: Database, late_ms: int, bars: int) -> None:
    run(Exchange({"AUSDT": series(-1, BARS)}, END + SETTLE_MS + late_ms), database, ["AUSDT"])
    assert read_candles(database, "AUSDT").open_time_ms[-1] == T0 + (bars - 1) * STEP_MS


def test_download_holes_in_the_database_are_filled(database: Database) -> None:
    whole = series(0, BARS)
    upsert_candles(database, "AUSDT", without(whole, range(10, 12), range(1500, 2600)))
    exchange = Exchange({"AUSDT": whole})
    assert run(exchange, database, ["AUSDT"]).bars_stored == 2 + 1100
    assert exchange.asked == [("AUSDT", 10, 12), ("AUSDT", 1500, 2500), ("AUSDT", 2500, 2600)]
    assert_stored(database, "AUSDT", whole)


def test_download_what_the_exchange_lacks_is_recorded_and_not_asked_for_again(database: Database) -> None:
    listed = without(series(1200, BARS), range(2000, 2040))
    exchange = Exchange({"AUSDT": listed})
    summary = run(exchange, database, ["AUSDT"])
    expected = [gap("AUSDT", 0, 1200, "not_listed_yet"), gap("AUSDT", 2000, 40, "exchange_outage")]
    assert read_candle_gaps(database) == expected
    assert summary.gap_bars == {"not_listed_yet": 1200, "exchange_outage": 40}
    assert exchange.asked[-1] == ("AUSDT", 2000, 2040)  # asked again before it was called an outage
    exchange.asked.clear()
    run(exchange, database, ["AUSDT"])
    assert exchange.asked == []
    assert read_candle_gaps(database) == expected


def test_download_hole_that_the_exchange_fills_the_second_time_is_no_gap(database: Database) -> None:
    class Forgetful(Exchange):
        async def fetch_candles(self, symbol: str, interval: str, start_ms: int, end_ms: int) -> CandlePage:
            page = await super().fetch_candles(symbol, interval, start_ms, end_ms)
            first_time = len(self.asked) <= 3
            candles = without(page.candles, range(50, 60)) if first_time else page.candles
            return CandlePage(candles, (), page.server_time_ms)

    run(Forgetful({"AUSDT": series(0, BARS)}), database, ["AUSDT"])
    assert_stored(database, "AUSDT", series(0, BARS))
    assert read_candle_gaps(database) == []


def test_download_rejected_rows_are_recorded_with_their_reason_and_reported(database: Database) -> None:
    exchange = Exchange({"AUSDT": series(0, BARS)})
    why = "open or close lies outside low to high"
    exchange.rejects["AUSDT"] = {
        T0 + 7 * STEP_MS: why,
        T0 + 8 * STEP_MS: why,
        T0 + 20 * STEP_MS: "a price is not above zero",
    }
    summary = run(exchange, database, ["AUSDT"])
    expected = [
        gap("AUSDT", 7, 2, "rejected_row", why),
        gap("AUSDT", 20, 1, "rejected_row", "a price is not above zero"),
    ]
    assert read_candle_gaps(database) == expected
    assert [row.open_time_ms for row in summary.rejected] == [T0 + bar * STEP_MS for bar in (7, 8, 20)]
    exchange.asked.clear()
    assert run(exchange, database, ["AUSDT"]).rejected == ()
    assert exchange.asked == []
    assert read_candle_gaps(database) == expected


def test_download_rejected_row_beside_an_outage_keeps_both_causes(database: Database) -> None:
    exchange = Exchange({"AUSDT": without(series(0, BARS), range(100, 110))})
    exchange.rejects["AUSDT"] = {T0 + 104 * STEP_MS: "bad"}
    run(exchange, database, ["AUSDT"])
    assert read_candle_gaps(database) == [
        gap("AUSDT", 100, 4, "exchange_outage"),
        gap("AUSDT", 104, 1, "rejected_row", "bad"),
        gap("AUSDT", 105, 5, "exchange_outage"),
    ]


def test_download_newest_bars_that_are_late_are_no_gap_and_asked_for_again(database: Database) -> None:
    exchange = Exchange({"AUSDT": series(0, BARS - 3)})
    assert run(exchange, database, ["AUSDT"]).late == ("AUSDT",)
    assert read_candle_gaps(database) == []
    exchange.bars["AUSDT"] = series(0, BARS)
    assert run(exchange, database, ["AUSDT"]).late == ()
    assert_stored(database, "AUSDT", series(0, BARS))


def test_download_symbol_without_any_bar_is_late_and_harms_no_other(database: Database) -> None:
    summary = run(Exchange({"AUSDT": series(0, BARS), "NEWUSDT": series(0, 0)}), database, ["AUSDT", "NEWUSDT"])
    assert summary.late == ("NEWUSDT",)
    assert_stored(database, "AUSDT", series(0, BARS))


def test_download_longer_span_asks_for_the_older_bars_and_joins_the_gaps(database: Database) -> None:
    exchange = Exchange({"AUSDT": series(2000, BARS)})
    run(exchange, database, ["AUSDT"], days=20)
    assert read_candle_gaps(database) == [gap("AUSDT", 960, 1040, "not_listed_yet")]
    exchange.asked.clear()
    run(exchange, database, ["AUSDT"], days=30)
    assert exchange.asked == [("AUSDT", 0, 960)]
    assert read_candle_gaps(database) == [gap("AUSDT", 0, 2000, "not_listed_yet")]


def test_download_gap_that_was_filled_meanwhile_is_forgotten(database: Database) -> None:
    run(Exchange({"AUSDT": without(series(0, BARS), range(100, 110))}), database, ["AUSDT"])
    upsert_candles(database, "AUSDT", series(100, 106))
    run(Exchange({"AUSDT": series(0, BARS)}), database, ["AUSDT"])
    assert read_candle_gaps(database) == [gap("AUSDT", 106, 4, "exchange_outage")]


@pytest.mark.parametrize("pages", [0, 1, 2, 4, 5])
def test_download_broken_off_anywhere_then_run_again_equals_one_run(database: Database, pages: int) -> None:
    bars = {"AUSDT": without(series(1100, BARS), range(2000, 2040)), "BUSDT": series(0, BARS)}
    exchange = Exchange(bars)
    exchange.rejects["BUSDT"] = {T0: "bad"}
    exchange.fails_after = pages
    with pytest.raises(ExchangeUnavailableError):
        run(exchange, database, ["AUSDT", "BUSDT"])
    assert read_candle_gaps(database) == []  # nothing is called missing before everything was asked for
    exchange.fails_after = None
    run(exchange, database, ["AUSDT", "BUSDT"])
    assert_stored(database, "AUSDT", bars["AUSDT"])
    assert_stored(database, "BUSDT", series(1, BARS))
    assert read_candle_gaps(database) == [
        gap("AUSDT", 0, 1100, "not_listed_yet"),
        gap("AUSDT", 2000, 40, "exchange_outage"),
        gap("BUSDT", 0, 1, "rejected_row", "bad"),
    ]


def test_download_funding_rates_of_the_span_once_each_on_both_sides_of_the_stored(database: Database) -> None:
    exchange = Exchange({"AUSDT": series(0, BARS)})
    hours = [*range(-8, 0, 8), *range(0, 200, 8), *range(200, DAYS * 24 + 1)]  # from 8-hourly to hourly
    exchange.funding = [FundingRate("AUSDT", T0 + hour * 3_600_000, hour / 1e6) for hour in hours]
    upsert_funding_rates(database, exchange.funding[10:20])
    assert run(exchange, database, ["AUSDT"]).funding_rates_stored == len(hours) - 11
    assert read_funding_rates(database, "AUSDT") == exchange.funding[1:]
    assert run(exchange, database, ["AUSDT"]).funding_rates_stored == 0


def test_download_unknown_symbol_is_refused_before_anything_is_stored(database: Database) -> None:
    exchange = Exchange({"AUSDT": series(0, BARS)})
    with pytest.raises(ConfigError, match=r"data_download.symbols: MATICUSDT, NOPEUSDT not among the 1 USDT"):
        run(exchange, database, ["AUSDT", "MATICUSDT", "NOPEUSDT"])
    assert exchange.asked == []


@pytest.mark.parametrize(
    ("ranges", "holes", "rest"),
    [
        ([(0, 10)], [], [(0, 10)]),
        ([(0, 10)], [(0, 10)], []),
        ([(0, 10)], [(-5, 20)], []),
        ([(0, 10)], [(3, 5)], [(0, 3), (5, 10)]),
        ([(0, 10), (20, 30)], [(5, 25)], [(0, 5), (25, 30)]),
        ([(0, 10)], [(0, 2), (2, 4), (8, 10)], [(4, 8)]),
        ([(0, 10)], [(10, 12), (-2, 0)], [(0, 10)]),
    ],
)
def test_subtract(ranges: list[tuple[int, int]], holes: list[tuple[int, int]], rest: list[tuple[int, int]]) -> None:
    assert subtract(ranges, holes) == rest
