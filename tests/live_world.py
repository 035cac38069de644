"""A small world for the trader's tests: candles in memory as stream and REST interface, a model made of a formula."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

import numpy as np

from perpcast.database.journal import EquityRecord, EventRecord, PositionRecord, PredictionRecord, Record, SignalRecord
from perpcast.errors import TemporaryExchangeError
from perpcast.exit_policy import ExitPolicy
from perpcast.live.feed import BarFeed, ClosedBar
from perpcast.live.forecast import Forecaster
from perpcast.live.history import CandleHistory
from perpcast.live.journal import SessionJournal
from perpcast.live.session import run_session
from perpcast.live.trader import BarSummary, Rules, Trader
from perpcast.market import Candle, CandleSeries, Instrument
from perpcast.sizing import Sizing

STEP = 900_000
BEGIN = 1_700_000_100_000 // STEP * STEP
POLICY = ExitPolicy(
    stop=0.011,
    take_profit=0.058,
    targets=((0.012, 0.2), (0.024, 0.3), (0.035, 0.3)),
    stop_after=(0.0, 0.012, 0.024),
    horizon=20,
    taker_fee=0.00055,
    maker_fee=0.0002,
    slippage=0.0002,
)
SIZING = Sizing.from_config(2, 10, (0.2, 0.3, 0.3))

RULES = Rules("momentum", 0.004, {"buy": POLICY, "sell": POLICY}, SIZING, 3, 1.0)


def instrument(symbol: str) -> Instrument:
    fine = Decimal("0.001")
    return Instrument(symbol, "Trading", Decimal("0.01"), fine, fine, Decimal(5), Decimal(50), 0, 480)


def random_market(symbols: Sequence[str], bars: int, seed: int, volatility: float = 0.006) -> dict[str, list[Candle]]:
    """`bars` candles of each symbol from BEGIN on, open = close before."""
    rng = np.random.default_rng(seed)
    market = {}
    for symbol in symbols:
        close = 100 * np.exp(np.cumsum(rng.normal(0, volatility, bars)))
        open_ = np.concatenate(([100.0], close[:-1]))
        high = np.maximum(open_, close) * (1 + rng.exponential(volatility / 3, bars))
        low = np.minimum(open_, close) * (1 - rng.exponential(volatility / 3, bars))
        volume = rng.uniform(1, 2, bars)
        times = BEGIN + STEP * np.arange(bars)
        market[symbol] = list(CandleSeries(times, open_, high, low, close, volume, volume * close).candles(symbol))
    return market


@dataclass
class Exchange:
    """Streams closed candles bar by bar from `begin` on and answers for all that are closed at its clock.

    `edit` may change the candles of a bar as they are streamed (leave out, reorder, add); the REST side has them all.
    `hold` bars are streamed together before the reader gets a turn.
    """

    market: dict[str, list[Candle]]
    begin: int
    edit: Callable[[int, list[Candle]], Iterable[Candle]] = lambda bar, candles: candles
    hold: int = 1
    silent_at_end: bool = False
    now_ms: int = 0
    failing: bool = False
    requests: list[tuple[str, int, int]] = field(default_factory=list)

    async def candles(self) -> AsyncGenerator[Candle, None]:
        times = sorted({c.open_time_ms for candles in self.market.values() for c in candles})
        for number, time in enumerate(t for t in times if t >= self.begin):
            self.now_ms = time + STEP
            bar = [c for candles in self.market.values() for c in candles if c.open_time_ms == time]
            for candle in self.edit(number, bar):
                yield candle
            if number % self.hold == self.hold - 1:
                await asyncio.sleep(0)
                await asyncio.sleep(0)
        if self.silent_at_end:
            await asyncio.Event().wait()

    async def fetch(self, symbol: str, start_ms: int, end_ms: int) -> CandleSeries:
        self.requests.append((symbol, start_ms, end_ms))
        await asyncio.sleep(0)
        if self.failing:
            raise TemporaryExchangeError("HTTP 503")
        end_ms = min(end_ms, self.now_ms - STEP + 1)
        return CandleSeries.from_candles([c for c in self.market[symbol] if start_ms <= c.open_time_ms < end_ms])

    async def time_ms(self) -> int:
        return self.now_ms

    def feed(self, first_ms: int, **options: Any) -> BarFeed:
        self.now_ms = max(self.now_ms, self.begin)
        settings: dict[str, Any] = {"history_ms": BEGIN, "grace_seconds": 0.1, "idle_seconds": 0.05, **options}
        return BarFeed(
            list(self.market),
            STEP,
            stream=self,
            fetch=self.fetch,
            exchange_time_ms=self.time_ms,
            first_ms=first_ms,
            **settings,
        )

    def blocks(self, first_ms: int, **options: Any) -> list[list[ClosedBar]]:
        async def run() -> list[list[ClosedBar]]:
            feed = self.feed(first_ms, **options)
            return [block async for block in feed.blocks()]

        return asyncio.run(run())


@dataclass
class MemoryJournal:
    """The journal's promises without a database: history keeps what was first written, states take the newest."""

    signals: dict[str, SignalRecord] = field(default_factory=dict)
    events: dict[tuple[str, int], EventRecord] = field(default_factory=dict)
    positions: dict[str, PositionRecord] = field(default_factory=dict)
    equity: dict[tuple[str, Any], EquityRecord] = field(default_factory=dict)
    predictions: dict[tuple[str, str, Any], PredictionRecord] = field(default_factory=dict)
    commits: int = 0
    dies_at: int = -1  # the number of the commit that never happens

    def write(self, records: Sequence[Record]) -> None:
        if self.commits == self.dies_at:
            raise KilledError
        self.commits += 1
        for record in records:
            if isinstance(record, SignalRecord):
                self.signals.setdefault(record.signal_id, record)
            elif isinstance(record, EventRecord):
                self.events.setdefault((record.run, record.number), record)
            elif isinstance(record, PositionRecord):
                self.positions[record.position_id] = record
            elif isinstance(record, PredictionRecord):
                self.predictions.setdefault((record.model_id, record.symbol, record.open_time), record)
            else:
                self.equity[record.run, record.time] = record

    def read_events(self, run: str) -> list[EventRecord]:
        return sorted((e for e in self.events.values() if e.run == run), key=lambda e: e.number)

    def read_positions(self, run: str) -> list[PositionRecord]:
        return sorted((p for p in self.positions.values() if p.run == run), key=lambda p: (p.entry_time, p.symbol))

    def read_equity(self, run: str) -> list[EquityRecord]:
        return sorted((e for e in self.equity.values() if e.run == run), key=lambda e: e.time)

    def tables(self) -> tuple[Any, ...]:
        return self.signals, self.events, self.positions, self.equity, self.predictions


class KilledError(Exception):
    """Stands for SIGKILL at a commit."""


@dataclass
class Momentum:
    """What rose goes on rising; a trace of the second input shows from where the history was computed."""

    batches: list[tuple[str, ...]] = field(default_factory=list)

    def predict(self, observed: np.ndarray, known: np.ndarray, symbols: Sequence[str]) -> dict[str, np.ndarray]:
        self.batches.append(tuple(symbols))
        change = observed[:, -1, 0] / observed[:, 0, 0] - 1 + 1e-9 * observed[:, -1, 1]
        return {"buy_mean": change, "sell_mean": -change}


def close_inputs(candles: CandleSeries) -> np.ndarray:
    """Closes, and their running sum: like an indicator that never forgets where it started."""
    return np.column_stack([candles.close, np.cumsum(candles.close)]).astype(np.float32)


def hour_inputs(open_time_ms: np.ndarray) -> np.ndarray:
    return (open_time_ms // 3_600_000 % 24).astype(np.float32)[:, None]


@dataclass
class World:
    """One session over a market: `run` carries it from `first` on, or continues it."""

    market: dict[str, list[Candle]]
    first: int
    journal: MemoryJournal = field(default_factory=MemoryJournal)
    rules: Rules = RULES
    lookback: int = 5
    cell_bars: int = 8
    summaries: list[BarSummary] = field(default_factory=list)

    def run(self, exchange: Exchange | None = None, *, now_ms: int | None = None, last_ms: int | None = None) -> Trader:
        exchange = exchange or Exchange(self.market, self.first)
        sessions = SessionJournal(self.journal, "test")
        state = sessions.begin(self.first, 10_000.0, {"step_ms": STEP, "threshold": self.rules.threshold})
        history = CandleHistory(list(self.market), STEP, self.lookback + 20, self.cell_bars)
        forecaster = Forecaster(Momentum(), close_inputs, hour_inputs, lookback=self.lookback, step_ms=STEP)
        instruments = {symbol: instrument(symbol) for symbol in self.market}
        trader = Trader(self.rules, instruments, forecaster, history, sessions, state, STEP)
        feed = exchange.feed(
            state.next_ms, history_ms=history.start_ms(state.next_ms), block_bars=self.cell_bars, last_ms=last_ms
        )

        async def stopped_clock() -> int:
            return now_ms or 0

        clock = None if now_ms is None else stopped_clock
        asyncio.run(run_session(feed, trader, STEP, self.summaries.append, exchange_time_ms=clock))
        return trader

    def with_rules(self, **changes: Any) -> "World":
        return replace(self, rules=replace(self.rules, **changes))
