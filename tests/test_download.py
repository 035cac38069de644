"""The download stage on a real database: what is asked for, what is stored, what is written down as missing."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any

import numpy as np
import pytest

from perpcast.database import (
    CandleGap,
    Database,
    exclusive,
    read_candle_gaps,
    read_candle_revisions,
    read_candles,
    read_funding_rates,
    read_instruments,
    upsert_candles,
    upsert_funding_rates,
)
from perpcast.download import SETTLE_MS, DownloadSummary, Wanted, download
from perpcast.errors import ConfigError, DataError, ExchangeUnavailableError, RefusedError, SetupError
from perpcast.exchange import PAGE_BARS, BybitClient, CandlePage, RejectedRow
from perpcast.market import CandleSeries, FundingRate, Instrument
from perpcast.timeframe import DAY_MS

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


ONE = Decimal(1)
RULES = Instrument("", "Trading", ONE, ONE, ONE, ONE, ONE, 0, 480)


class Exchange(BybitClient):
    """An exchange in memory: bars by symbol, bars that it rejects, a clock, and a record of what it was asked."""

    def __init__(self, bars: dict[str, CandleSeries], now_ms: int = END + SETTLE_MS) -> None:
        super().__init__("http://unused", jitter=np.random.default_rng(1))
        self.bars = bars
        self.now_ms = now_ms
        self.instruments = {symbol: replace(RULES, symbol=symbol) for symbol in bars}
        self.rejects: dict[str, dict[int, str]] = {}
        self.spoiled: dict[str, Exception] = {}
        self.funding: list[FundingRate] = []
        self.asked: list[tuple[str, int, int]] = []
        self.fails_after: int | None = None

    async def fetch_server_time_ms(self) -> int:
        return self.now_ms

    async def fetch_instruments(self, *statuses: str) -> dict[str, Instrument]:
        wanted = statuses or ("Trading",)
        return {symbol: rules for symbol, rules in self.instruments.items() if rules.status in wanted}

    async def fetch_candles(self, symbol: str, interval: str, start_ms: int, end_ms: int) -> CandlePage:
        assert interval == "15"
        assert 0 < end_ms - start_ms <= PAGE_BARS * STEP_MS
        if self.fails_after is not None and len(self.asked) >= self.fails_after:
            raise ExchangeUnavailableError("exchange unreachable: it is gone")
        self.asked.append((symbol, (start_ms - T0) // STEP_MS, (end_ms - T0) // STEP_MS))
        await asyncio.sleep(0)
        if symbol in self.spoiled:
            raise self.spoiled[symbol]
        times = self.bars[symbol].open_time_ms
        rejects = {time: why for time, why in self.rejects.get(symbol, {}).items() if start_ms <= time < end_ms}
        keep = (times >= start_ms) & (times < end_ms) & ~np.isin(times, list(rejects))
        rejected = tuple(RejectedRow(symbol, time, why) for time, why in sorted(rejects.items()))
        return CandlePage(self.bars[symbol][keep], rejected, self.now_ms)

    async def fetch_funding_rates(self, symbol: str, start_ms: int, end_ms: int) -> list[FundingRate]:
        await asyncio.sleep(0)
        return [rate for rate in self.funding if rate.symbol == symbol and start_ms <= rate.funding_time_ms < end_ms]


class Watch:
    """Notes what a person would see."""

    def __init__(self, complete: bool = True) -> None:
        self.complete = complete
        self.phases: list[str] = []
        self.left: dict[str, int] = {}
        self.notices: list[str] = []

    def begin(self, phase: str, unit: str, amounts: Mapping[str, int]) -> None:
        assert not self.complete or set(self.left.values()) <= {0}, "the phase before is complete"
        self.phases.append(phase)
        self.left = dict(amounts)

    def advance(self, symbol: str, amount: int) -> None:
        self.left[symbol] -= amount
        assert self.left[symbol] >= 0

    def notice(self, text: str) -> None:
        self.notices.append(text)


def run(
    exchange: Exchange,
    engine: Database,
    symbols: Sequence[str],
    days: int = DAYS,
    watch: Watch | None = None,
    **wanted: Any,
) -> DownloadSummary:
    local_time_ms = wanted.pop("local_time_ms", None)
    sample = np.random.default_rng(1)
    return asyncio.run(
        download(
            exchange,
            engine,
            Wanted(tuple(symbols), "15", days, **wanted),
            watch or Watch(),
            sample=sample,
            local_time_ms=local_time_ms,
        )
    )


def bar_ms(bar: int) -> int:
    return T0 + bar * STEP_MS


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
    pages = [(0, 1000), (1000, 2000), (2000, BARS)]
    assert sorted(exchange.asked) == [(symbol, *page) for symbol in ("AUSDT", "BUSDT") for page in pages]
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
    assert sorted(exchange.asked) == [("AUSDT", 10, 12), ("AUSDT", 1500, 2500), ("AUSDT", 2500, 2600)]
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
    assert read_candle_gaps(database) == [gap("AUSDT", BARS - 3, 3, "not_yet_fetched")]
    exchange.bars["AUSDT"] = series(0, BARS)
    assert run(exchange, database, ["AUSDT"]).late == ()
    assert read_candle_gaps(database) == []
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
    with pytest.raises(ConfigError, match=r"MATICUSDT, NOPEUSDT not among the 1 USDT.*validate_futures_symbols\.py"):
        run(exchange, database, ["AUSDT", "MATICUSDT", "NOPEUSDT"])
    assert exchange.asked == []


# --- spans ------------------------------------------------------------------------------------------------------------


def test_download_from_and_to_then_the_rest_joins_without_a_hole(database: Database) -> None:
    exchange = Exchange({"AUSDT": series(0, BARS)})
    run(exchange, database, ["AUSDT"], from_ms=bar_ms(2000) + 1, to_ms=bar_ms(2100) + 1)
    assert exchange.asked == [("AUSDT", 2000, 2100)]
    assert read_candle_gaps(database) == []
    run(exchange, database, ["AUSDT"], from_ms=bar_ms(2500), to_ms=bar_ms(2600))
    assert read_candle_gaps(database) == [gap("AUSDT", 2100, 400, "not_yet_fetched")]  # nobody asked for it
    exchange.asked.clear()
    run(exchange, database, ["AUSDT"])
    assert {(first, end) for _, first, end in exchange.asked} == {
        (0, 1000),
        (1000, 2000),
        (2100, 2500),
        (2600, BARS),
    }
    assert_stored(database, "AUSDT", series(0, BARS))
    assert read_candle_gaps(database) == []


def test_download_span_of_the_past_funding_stays_in_one_piece(database: Database) -> None:
    exchange = Exchange({"AUSDT": series(0, BARS)})
    exchange.funding = [FundingRate("AUSDT", T0 + hour * 3_600_000, 1e-4) for hour in range(0, DAYS * 24, 8)]
    for first, end in ((2000, 2100), (2500, 2600), (500, 600)):
        run(exchange, database, ["AUSDT"], from_ms=bar_ms(first), to_ms=bar_ms(end))
    stored = [rate.funding_time_ms for rate in read_funding_rates(database, "AUSDT")]
    assert stored == [
        rate.funding_time_ms for rate in exchange.funding if bar_ms(500) <= rate.funding_time_ms < bar_ms(2600)
    ]


def test_download_outage_before_the_oldest_bar_is_told_from_a_later_listing_once_older_bars_come(
    database: Database,
) -> None:
    exchange = Exchange({"AUSDT": without(series(0, BARS), range(2000, 2010))})
    run(exchange, database, ["AUSDT"], from_ms=bar_ms(2000))
    assert read_candle_gaps(database) == [gap("AUSDT", 2000, 10, "not_listed_yet")]
    run(exchange, database, ["AUSDT"])
    assert read_candle_gaps(database) == [gap("AUSDT", 2000, 10, "exchange_outage")]


@pytest.mark.parametrize(("first", "end"), [(BARS + 96, None), (100, 100), (200, 100)])
def test_download_span_without_a_closed_bar_is_refused(database: Database, first: int, end: int | None) -> None:
    exchange = Exchange({"AUSDT": series(0, BARS)})
    with pytest.raises(ConfigError, match="expected a stretch of closed bars, received .* to .* UTC"):
        run(exchange, database, ["AUSDT"], from_ms=bar_ms(first), to_ms=None if end is None else bar_ms(end))


def test_download_clock_of_this_machine_is_compared_with_the_exchange(database: Database) -> None:
    exchange = Exchange({"AUSDT": series(0, BARS)})
    watch = Watch()
    run(exchange, database, ["AUSDT"], local_time_ms=exchange.now_ms + 59_000, watch=watch)
    assert watch.notices == []
    run(exchange, database, ["AUSDT"], local_time_ms=exchange.now_ms - 3_600_000, watch=watch)
    assert watch.notices == [
        "this machine's clock says 2024-01-30 23:00 UTC, the exchange's 2024-01-31 00:00: the exchange's is used"
    ]
    with pytest.raises(SetupError, match="one of them is wrong; set this machine's clock"):
        run(exchange, database, ["AUSDT"], local_time_ms=exchange.now_ms + 2 * DAY_MS)


@pytest.mark.parametrize(("stored", "wanted"), [(900_000, "60"), (3_600_000, "15"), (300_000, "15")])
def test_download_another_interval_into_the_same_table_is_refused(database: Database, stored: int, wanted: str) -> None:
    bars = series(0, 100)
    times = END - 100 * stored + np.arange(100) * stored
    upsert_candles(database, "AUSDT", replace(bars, open_time_ms=times))
    exchange = Exchange({"AUSDT": bars})
    with pytest.raises(ConfigError, match=r"data_download.interval: the database holds candles of AUSDT of another"):
        asyncio.run(
            download(exchange, database, Wanted(("AUSDT",), wanted, 30), Watch(), sample=np.random.default_rng(1))
        )
    assert exchange.asked == []


# --- what the exchange does with symbols ------------------------------------------------------------------------------


@pytest.mark.fault("D13")
def test_download_delisted_symbol_is_completed_to_its_end_and_the_others_go_on(database: Database) -> None:
    exchange = Exchange({"AUSDT": series(0, BARS), "OLDUSDT": series(0, 2000), "NEWUSDT": series(0, 0)})
    exchange.instruments["OLDUSDT"] = replace(
        exchange.instruments["OLDUSDT"], status="Closed", delivery_time_ms=bar_ms(2000) + 5
    )
    exchange.instruments["NEWUSDT"] = replace(exchange.instruments["NEWUSDT"], status="PreLaunch")
    watch = Watch()
    summary = run(exchange, database, ["AUSDT", "OLDUSDT", "NEWUSDT"], watch=watch)
    assert_stored(database, "OLDUSDT", series(0, 2000))
    assert_stored(database, "AUSDT", series(0, BARS))
    assert read_candle_gaps(database) == []
    assert watch.notices == ["OLDUSDT is delisted (Closed), its last trade was at 2024-01-21 20:00 UTC"]
    assert summary.skipped == {"NEWUSDT": "it does not trade yet; it has no history here"}
    assert summary.late == ()
    assert {symbol: rules.status for symbol, rules in read_instruments(database).items()} == {
        "AUSDT": "Trading",
        "OLDUSDT": "Closed",
        "NEWUSDT": "PreLaunch",
    }


@pytest.mark.fault("D13")
def test_download_symbol_that_the_exchange_forgot_keeps_its_history(database: Database) -> None:
    exchange = Exchange({"AUSDT": series(0, BARS), "GONEUSDT": series(0, BARS - 100)})
    run(exchange, database, ["AUSDT", "GONEUSDT"])
    del exchange.instruments["GONEUSDT"]
    exchange.asked.clear()
    summary = run(exchange, database, ["AUSDT", "GONEUSDT"])
    assert summary.skipped == {"GONEUSDT": "the exchange lists it no more; its history is kept"}
    assert exchange.asked == []
    assert_stored(database, "GONEUSDT", series(0, BARS - 100))
    assert read_instruments(database)["GONEUSDT"].status == "Unlisted"


@pytest.mark.parametrize(
    "error", [RefusedError("retCode 10001", 10001), DataError("expected JSON, received b'<html>'")], ids=type
)
def test_download_symbol_that_is_refused_or_spoiled_harms_no_other(database: Database, error: Exception) -> None:
    exchange = Exchange({"AUSDT": series(0, BARS), "BADUSDT": series(0, BARS)})
    exchange.spoiled["BADUSDT"] = error
    summary = run(exchange, database, ["BADUSDT", "AUSDT"], watch=Watch(complete=False))
    assert summary.failed == {"BADUSDT": str(error)}
    assert_stored(database, "AUSDT", series(0, BARS))
    assert read_candle_gaps(database) == [gap("BADUSDT", 0, BARS, "not_yet_fetched")]
    del exchange.spoiled["BADUSDT"]
    assert run(exchange, database, ["BADUSDT", "AUSDT"]).failed == {}
    assert_stored(database, "BADUSDT", series(0, BARS))


def test_download_banned_stops_everything(database: Database) -> None:
    exchange = Exchange({"AUSDT": series(0, BARS)})
    exchange.spoiled["AUSDT"] = RefusedError("HTTP 403", 403)
    with pytest.raises(RefusedError, match="HTTP 403"):
        run(exchange, database, ["AUSDT"])


# --- bars that do not count, and bars that change ---------------------------------------------------------------------


def flat(candles: CandleSeries, *runs: range) -> CandleSeries:
    """The same bars, without movement and volume in these runs."""
    still = np.isin((candles.open_time_ms - T0) // STEP_MS, [bar for run in runs for bar in run])
    return replace(
        candles,
        high=np.where(still, candles.open, candles.high),
        low=np.where(still, candles.open, candles.low),
        close=np.where(still, candles.open, candles.close),
        volume=np.where(still, 0, candles.volume),
    )


def test_download_long_flat_runs_are_gaps_short_ones_are_not(database: Database) -> None:
    candles = flat(series(0, BARS), range(100, 107), range(200, 208), range(400, 440))
    run(Exchange({"AUSDT": candles}), database, ["AUSDT"])
    expected = [gap("AUSDT", 200, 8, "flat_run"), gap("AUSDT", 400, 40, "flat_run")]
    assert read_candle_gaps(database) == expected
    assert_stored(database, "AUSDT", candles)
    run(Exchange({"AUSDT": candles}), database, ["AUSDT"])
    assert read_candle_gaps(database) == expected


def test_download_flat_run_that_grows_from_day_to_day_is_one_gap(database: Database) -> None:
    candles = flat(series(0, BARS + 20), range(BARS - 5, BARS + 10))
    exchange = Exchange({"AUSDT": candles})
    run(exchange, database, ["AUSDT"])
    assert read_candle_gaps(database) == []  # five bars so far
    exchange.now_ms += 20 * STEP_MS
    assert run(exchange, database, ["AUSDT"]).gap_bars == {"flat_run": 15}


@pytest.mark.fault("D09")
def test_download_verify_finds_what_the_exchange_revised_and_keeps_both_values(database: Database) -> None:
    exchange = Exchange({"AUSDT": series(0, BARS)})
    run(exchange, database, ["AUSDT"])
    changed = replace(series(0, BARS), close=series(0, BARS).close.copy())
    changed.close[1234] += 0.25
    exchange.bars["AUSDT"] = changed
    assert run(exchange, database, ["AUSDT"]).revised == ()  # nothing is missing, nothing is asked
    summary = run(exchange, database, ["AUSDT"], verify=True)
    assert summary.revised == (("AUSDT", bar_ms(1234)),)
    assert (summary.verified_bars, summary.vanished) == (BARS, ())
    ((time_ms, (before, after)),) = read_candle_revisions(database, "AUSDT").items()
    assert time_ms == bar_ms(1234)
    assert (after - before).tolist() == [0, 0, 0, 0.25, 0, 0]
    assert_stored(database, "AUSDT", changed)
    assert run(exchange, database, ["AUSDT"], verify=True).revised == ()


def test_download_verify_asks_again_for_rejected_rows_and_outages(database: Database) -> None:
    exchange = Exchange({"AUSDT": without(series(300, BARS), range(2000, 2010))})
    exchange.rejects["AUSDT"] = {bar_ms(1000): "bad", bar_ms(1001): "bad", bar_ms(1002): "bad"}
    run(exchange, database, ["AUSDT"])
    exchange.bars["AUSDT"] = without(series(300, BARS), range(2005, 2010))
    exchange.rejects["AUSDT"] = {bar_ms(1001): "worse"}
    run(exchange, database, ["AUSDT"], verify=True)
    assert read_candle_gaps(database) == [
        gap("AUSDT", 0, 300, "not_listed_yet"),
        gap("AUSDT", 1001, 1, "rejected_row", "worse"),
        gap("AUSDT", 2005, 5, "exchange_outage"),
    ]
    assert_stored(database, "AUSDT", without(series(300, BARS), range(1001, 1002), range(2005, 2010)))


def test_download_verify_names_stored_bars_that_the_exchange_has_no_longer(database: Database) -> None:
    exchange = Exchange({"AUSDT": series(0, BARS)})
    run(exchange, database, ["AUSDT"])
    exchange.bars["AUSDT"] = without(series(0, BARS), range(70, 72))
    summary = run(exchange, database, ["AUSDT"], verify=True)
    assert summary.vanished == (("AUSDT", bar_ms(70)), ("AUSDT", bar_ms(71)))
    assert_stored(database, "AUSDT", series(0, BARS))


@pytest.mark.fault("D16")
def test_download_second_one_at_once_is_refused_and_the_next_is_not(database: Database) -> None:
    exchange = Exchange({"AUSDT": series(0, BARS)})
    with (
        exclusive(database, "download"),
        pytest.raises(SetupError, match="another download is running on the database"),
    ):
        run(exchange, database, ["AUSDT"])
    assert exchange.asked == []
    run(exchange, database, ["AUSDT"])
    run(exchange, database, ["AUSDT"])
