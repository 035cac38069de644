"""The local exchange's markets and clock: what is visible when, the synthetic market's properties, recorded files."""

import asyncio
import itertools
from decimal import Decimal
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from perpcast.config import load_settings
from perpcast.errors import DataError, MissingInputError
from perpcast.exit_policy import ExitPolicy, label_trades
from perpcast.market import SIDES, Candle, CandleSeries, Instrument, Side
from perpcast.simulator.clock import RunningClock, SteppedClock
from perpcast.simulator.instruments import instrument_of
from perpcast.simulator.market import BASE_MS, FUNDING_MS, FundingSeries, Window, running_candle, visible_candles
from perpcast.simulator.recorded import RecordedMarket
from perpcast.simulator.synthetic import START_MS, SyntheticMarket

ROOT = Path(__file__).parents[1]
PANEL = ROOT.parent / "shared" / "data" / "candles" / "binance_usdm_15m_panel51_1y"
DAY_MS = 86_400_000
END_MS = START_MS + 400 * DAY_MS
RISING = Candle("BTCUSDT", 0, open=100.0, high=112.0, low=94.0, close=106.0, volume=30.0, turnover=3000.0)
FALLING = Candle("BTCUSDT", 0, open=106.0, high=112.0, low=94.0, close=100.0, volume=30.0, turnover=3000.0)


@cache
def two_years(seed: int, edge: float) -> SyntheticMarket:
    """700 days, so that every listed symbol has some; a symbol is made once for all tests."""
    return SyntheticMarket(seed, edge, START_MS + 700 * DAY_MS)


class TableMarket:
    """One symbol, BTCUSDT, with bars 0, 1, 2, … of 15 minutes: bar i opens at 100 + i; `missing` bars are left out."""

    symbols: tuple[str, ...] = ("BTCUSDT",)

    def __init__(self, bars: int, missing: frozenset[int] = frozenset()) -> None:
        kept = np.array([bar for bar in range(bars) if bar not in missing], np.int64)
        price = 100.0 + kept
        self.series = CandleSeries(kept * BASE_MS, price, price + 2, price - 1, price + 1, price * 0 + 3, price * 3)

    def instrument(self, symbol: str) -> Instrument:
        return instrument_of(symbol, self.series)

    def candles(self, symbol: str) -> CandleSeries:
        return self.series

    def funding(self, symbol: str) -> FundingSeries:
        return FundingSeries.empty()


def bars_seen(market: TableMarket, step_bars: int, now_bar: float, window: Window) -> list[float]:
    """Opens of the visible bars, counted in base bars."""
    seen = visible_candles(market, "BTCUSDT", step_bars * BASE_MS, int(now_bar * BASE_MS), window)
    return [time / BASE_MS for time in seen.open_time_ms.tolist()]


@pytest.mark.parametrize(
    ("candle", "elapsed", "high", "low", "close"),
    [
        (RISING, 0.0, 100.0, 100.0, 100.0),
        (RISING, 1 / 6, 100.0, 97.0, 97.0),  # half of the way from 100 to the low of 94
        (RISING, 1 / 2, 103.0, 94.0, 103.0),  # half of the way from 94 to the high of 112
        (RISING, 5 / 6, 112.0, 94.0, 109.0),  # half of the way from 112 to the close of 106
        (FALLING, 1 / 6, 109.0, 106.0, 109.0),  # a falling bar goes up first
        (FALLING, 5 / 6, 112.0, 94.0, 97.0),
        (FALLING, 1.0, 112.0, 94.0, 100.0),
    ],
)
def test_running_candle_shows_only_what_has_passed(
    candle: Candle, elapsed: float, high: float, low: float, close: float
) -> None:
    running = running_candle(candle, elapsed, decimals=6)
    assert (running.high, running.low, running.close) == (high, low, close)
    assert running.volume == pytest.approx(30 * elapsed)


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        (Window(), [0, 1, 2, 3, 4, 5]),
        (Window(limit=2), [4, 5]),
        (Window(2 * BASE_MS, 4 * BASE_MS), [2, 3, 4]),
        (Window(2 * BASE_MS + 1, 4 * BASE_MS + 1), [2, 3, 4]),  # a start is floored to its bar
        (Window(1 * BASE_MS, 4 * BASE_MS, limit=2), [3, 4]),  # too many: the newest
        (Window(1 * BASE_MS, None, limit=2), [1, 2]),  # no end: the oldest
        (Window(None, 3 * BASE_MS, limit=2), [2, 3]),
        (Window(8 * BASE_MS, 9 * BASE_MS), []),  # the future
    ],
)
def test_visible_candles_are_those_asked_for_up_to_now(window: Window, expected: list[int]) -> None:
    assert bars_seen(TableMarket(10), 1, 5.5, window) == expected


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        (Window(), [0, 4, 8]),
        (Window(limit=1), [8]),
        (Window(5 * BASE_MS, None, limit=1), [4]),
        (Window(None, 7 * BASE_MS, limit=1), [4]),
        (Window(0, 11 * BASE_MS, limit=2), [4, 8]),
    ],
)
def test_hourly_candles_are_made_of_quarters(window: Window, expected: list[int]) -> None:
    assert bars_seen(TableMarket(20), 4, 10, window) == expected


def test_hourly_candle_adds_up_its_quarters_even_where_one_is_missing() -> None:
    market = TableMarket(20, missing=frozenset({5}))
    hours = visible_candles(market, "BTCUSDT", 4 * BASE_MS, 10 * BASE_MS, Window(4 * BASE_MS, 7 * BASE_MS))
    # Bars 4, 6, 7: opens 104, 106, 107; highs + 2, lows - 1, closes + 1; volume 3 each.
    (hour,) = hours.candles("BTCUSDT")
    assert (hour.open, hour.high, hour.low, hour.close, hour.volume) == (104.0, 109.0, 103.0, 108.0, 9.0)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9])
def test_nothing_of_the_future_shows(share: float) -> None:
    """Bars seen at an instant do not change with the rest of the running bar, nor with the bars after it."""
    market = TableMarket(20)
    before = visible_candles(market, "BTCUSDT", BASE_MS, int((7 + share) * BASE_MS))
    known = market.series[:7]
    assert before.open_time_ms[-1] == 7 * BASE_MS
    np.testing.assert_array_equal(before[:7].close, known.close)
    assert before.volume[-1] == pytest.approx(3 * share, abs=1e-6)


def test_missing_bar_stays_missing_while_it_would_run() -> None:
    assert bars_seen(TableMarket(10, missing=frozenset({5})), 1, 5.5, Window()) == [0, 1, 2, 3, 4]


def test_running_clock_stands_until_its_start_then_passes_speed_seconds_in_a_second() -> None:
    wall = iter([50.0, 50.25])
    clock = RunningClock(1_000_000, 3600, lambda: next(wall))
    assert clock.now_ms() == 1_000_000
    clock.start()
    clock.start()  # a second one changes nothing
    assert clock.now_ms() == 1_000_000 + 900_000


def test_stepped_clock_wakes_who_waits_and_refuses_to_go_back() -> None:
    async def wait() -> int:
        clock = SteppedClock(1000)
        waiting = asyncio.create_task(clock.wait_until(2000, at_most_seconds=0))
        await asyncio.sleep(0)
        assert not waiting.done()
        clock.advance_to(5000)
        await waiting
        with pytest.raises(ValueError, match="time runs forward"):
            clock.advance_to(4999)
        return clock.now_ms()

    assert asyncio.run(wait()) == 5000


def test_synthetic_market_repeats_itself_whatever_its_end_and_order() -> None:
    short, long = SyntheticMarket(7, 0.1, END_MS), SyntheticMarket(7, 0.1, END_MS + 90 * DAY_MS)
    long.candles("ETHUSDT")
    first = short.candles("BTCUSDT")
    second = long.candles("BTCUSDT")[: len(first)]
    for name in ("open_time_ms", "open", "high", "low", "close", "volume", "turnover"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
    rates = [market.funding("BTCUSDT").rate for market in (short, long)]
    np.testing.assert_array_equal(rates[0], rates[1][: len(rates[0])])


def test_synthetic_markets_of_other_seeds_differ() -> None:
    closes = [SyntheticMarket(seed, 0.0, START_MS + DAY_MS).candles("BTCUSDT").close for seed in (1, 2)]
    assert (closes[0] != closes[1]).mean() > 0.9


@pytest.mark.parametrize("symbol", SyntheticMarket(7, 0.1, END_MS).symbols)
def test_synthetic_candles_are_possible_bars_on_the_tick_grid(symbol: str) -> None:
    market = two_years(7, 0.1)
    series, instrument = market.candles(symbol), market.instrument(symbol)
    assert (np.diff(series.open_time_ms) == BASE_MS).all()
    assert series.open_time_ms[0] >= max(START_MS, instrument.launch_time_ms)
    np.testing.assert_array_equal(series.open[1:], series.close[:-1])  # as on Bybit
    assert (series.low > 0).all()
    assert (series.low <= np.minimum(series.open, series.close)).all()
    assert (series.high >= np.maximum(series.open, series.close)).all()
    assert (series.volume > 0).all()
    for price in series.close[-50:].tolist():
        assert Decimal(repr(price)) % instrument.tick_size == 0


def test_symbols_list_when_they_were_launched() -> None:
    market = two_years(7, 0.0)
    launch_ms = market.instrument("SEIUSDT").launch_time_ms  # 2023-08-16
    assert 0 <= market.candles("SEIUSDT").open_time_ms[0] - launch_ms < BASE_MS


def correlation(values: np.ndarray, lag: int) -> float:
    return float(np.corrcoef(values[:-lag], values[lag:])[0, 1])


def test_synthetic_market_moves_as_markets_do() -> None:
    """A common factor, clustering, fat tails, a busy afternoon, about as the recorded panel has them."""
    market = SyntheticMarket(7, 0.0, END_MS)
    symbols = ("BTCUSDT", "ETHUSDT", "SOLUSDT", "ADAUSDT")
    moves = np.array([np.diff(np.log(market.candles(symbol).close)) for symbol in symbols])
    together = np.corrcoef(moves)[np.triu_indices(len(symbols), 1)]
    assert together.min() > 0.4
    assert together.max() < 0.9
    for move in moves:
        assert correlation(np.abs(move), lag=1) > 0.15
        assert correlation(np.abs(move), lag=96) > 0.05
        assert abs(correlation(move, lag=1)) < 0.03
        assert np.mean((move / move.std()) ** 4) > 6  # 3 without fat tails
    hour = market.candles("BTCUSDT").open_time_ms[1:] // 3_600_000 % 24
    busy, quiet = (np.abs(moves[0][np.isin(hour, hours)]).mean() for hours in ([13, 14, 15], [1, 2, 3]))
    assert busy > 1.2 * quiet


def standard_moves(series: CandleSeries) -> np.ndarray:
    """Returns in units of the volatility of the 200 bars before: [n - 201]."""
    move = pd.Series(np.diff(np.log(series.close)))
    return (move / move.rolling(200).std().shift(1)).to_numpy()[200:]


@pytest.mark.parametrize(("edge", "low", "high"), [(0.0, -0.006, 0.006), (0.05, 0.03, 0.06), (0.1, 0.07, 0.11)])
def test_planted_edge_is_the_information_coefficient_of_one_bar(edge: float, low: float, high: float) -> None:
    market = two_years(7, edge)
    symbols = ("BTCUSDT", "ETHUSDT", "SOLUSDT", "ADAUSDT", "XRPUSDT", "DOTUSDT")
    coefficients = []
    for symbol in symbols:
        moves = standard_moves(market.candles(symbol))
        coefficients.append(np.corrcoef(market.pressure(symbol)[-len(moves) - 1 : -1], moves)[0, 1])
    # Six symbols of about 67,000 bars: a coefficient of 0 strays by 0.0016.
    assert low < np.mean(coefficients) < high


def test_pressure_can_be_read_from_signed_volume() -> None:
    """Volume of rising less falling bars over 20 bars, as a share of all: what money-flow indicators see."""
    market = SyntheticMarket(7, 0.0, END_MS)
    series = market.candles("ADAUSDT")
    signed = pd.Series(series.volume * np.sign(series.close - series.open)).rolling(20).sum()
    balance = (signed / pd.Series(series.volume).rolling(20).sum()).to_numpy()
    assert np.corrcoef(balance[20:], market.pressure("ADAUSDT")[20:])[0, 1] > 0.6


def label_by_pressure(edge: float, side: Side) -> np.ndarray:
    """Mean label of each fifth of the pressure, over six symbols and 700 days: [5]."""
    settings = load_settings([ROOT / "config.yaml"])
    policy = ExitPolicy.from_config(settings.risk_profile, settings.fees, side)
    market = two_years(8, edge)
    rows = []
    for symbol in ("BTCUSDT", "ETHUSDT", "SOLUSDT", "ADAUSDT", "XRPUSDT", "DOTUSDT"):
        bars = market.candles(symbol)
        labels = label_trades(bars.open, bars.high, bars.low, bars.close, side, policy)
        rows.append(pd.DataFrame({"pressure": market.pressure(symbol), "label": labels.expected_return}))
    table = pd.concat(rows).dropna()
    return table.groupby(pd.qcut(table["pressure"], 5, labels=False))["label"].mean().to_numpy()


@pytest.mark.parametrize("side", SIDES)
def test_without_an_edge_every_trade_earns_minus_its_costs(side: Side) -> None:
    # Entry 0.055 % + slippage 0.02 %; exit 0.055 % + 0.02 % where a stop, 0.02 % where targets: 0.095 to 0.15 %.
    # The standard error of a fifth's mean is about 0.03 % (labels overlap, symbols move together).
    assert label_by_pressure(0.0, side) == pytest.approx(-0.00125, abs=0.0012)


@pytest.mark.parametrize("side", SIDES)
def test_with_an_edge_labels_rise_with_the_pressure(side: Side) -> None:
    label = label_by_pressure(0.1, side)[:: 1 if side == "buy" else -1]
    assert all(later > earlier for earlier, later in itertools.pairwise(label))
    assert label[0] < -0.004
    assert label[-1] > 0.003  # after fees and slippage


@pytest.mark.parametrize(("end_ms", "edge", "message"), [(START_MS, 0.0, "begins on"), (END_MS, -0.1, "negative")])
def test_impossible_synthetic_market_is_refused(end_ms: int, edge: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SyntheticMarket(7, edge, end_ms)


def test_funding_is_paid_every_eight_hours_from_the_listing_on() -> None:
    market = two_years(7, 0.0)
    funding = market.funding("SEIUSDT")
    assert (np.diff(funding.time_ms) == FUNDING_MS).all()
    assert 0 < funding.time_ms[0] - market.candles("SEIUSDT").open_time_ms[0] <= FUNDING_MS
    assert np.abs(funding.rate).max() < 0.005


def write_candles(path: Path, **columns: object) -> None:
    """Three bars of a file as in shared/data, with columns replaced (None: left out)."""
    time = pd.to_datetime([0, BASE_MS, 3 * BASE_MS], unit="ms", utc=True)
    price = {"open": [1.0, 1.1, 1.2], "high": [1.3] * 3, "low": [0.9] * 3, "close": [1.1, 1.2, 1.25]}
    values = {"timestamp": time, **price, "volume": [10.0, 0.0, 2.5], **columns}
    pd.DataFrame({name: column for name, column in values.items() if column is not None}).to_parquet(path)


def test_recorded_market_serves_the_files_as_they_are(tmp_path: Path) -> None:
    write_candles(tmp_path / "NEWUSDT.parquet")
    market = RecordedMarket(tmp_path)
    series = market.candles("NEWUSDT")
    assert series.open_time_ms.tolist() == [0, BASE_MS, 3 * BASE_MS]
    assert series.close.tolist() == [1.1, 1.2, 1.25]
    assert series.turnover[0] == pytest.approx(10 * (1.0 + 1.3 + 0.9 + 1.1) / 4)
    assert market.end_ms == 4 * BASE_MS
    assert len(market.funding("NEWUSDT").time_ms) == 0
    instrument = market.instrument("NEWUSDT")
    assert (instrument.tick_size, instrument.qty_step) == (Decimal("0.01"), Decimal("0.1"))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"close": None}, "cannot be read: expected parquet with timestamp"),
        ({"close": ["a", "b", "c"]}, "cannot be read"),
        ({"timestamp": pd.to_datetime([0, 0, BASE_MS], unit="ms", utc=True)}, "times must increase"),
        ({"timestamp": pd.to_datetime([0, 1000, BASE_MS], unit="ms", utc=True)}, "expected opens of 15-minute bars"),
    ],
)
def test_damaged_file_is_refused_by_name(tmp_path: Path, columns: dict[str, object], message: str) -> None:
    write_candles(tmp_path / "NEWUSDT.parquet", **columns)
    with pytest.raises(DataError, match=f"NEWUSDT.parquet.*{message}"):
        RecordedMarket(tmp_path)


def test_folder_without_candles_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MissingInputError, match="expected files named"):
        RecordedMarket(tmp_path)


@pytest.mark.skipif(not PANEL.exists(), reason="recorded candles are kept in shared/data, which is absent")
def test_recorded_panel_has_all_its_symbols() -> None:
    market = RecordedMarket(PANEL)
    assert len(market.symbols) == 51
    assert len(market.candles("HYPEUSDT")) == 13_998
